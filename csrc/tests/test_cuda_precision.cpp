// Masters and stochastic rounding in the CUDA kernels' source on the host (cuda_shim/).
#include <cmath>

#include "core/rng.h"
#include "cuda_runtime.h"
#include "tests/check.h"
#include "tests/cuda_rig.h"

using namespace fused_sam;
using namespace fused_sam_test;

namespace {

void test_masters() {
  for (Dtype param : {Dtype::bf16, Dtype::f16})
    for (Dtype grad : {param, Dtype::f32})
      for (int64_t chunk : {int64_t(333), int64_t(0)}) {
        Rig rig({param, grad, {33333, 0, 555, 1, 4097}, chunk, 0, true, Dtype::f32});
        const auto original = copies(rig.masters), garbage = copies(rig.params);
        rig.norm(true);
        CHECK(std::fabs(rig.status.ascent_norm - rig.expected_norm(true)) <= 1e-5 * rig.status.ascent_norm);
        rig.status.skip = 1;
        rig.perturb();
        CHECK(same(rig.params, garbage) && same(rig.masters, original));
        rig.status.skip = 0;
        rig.perturb();
        CHECK(same(rig.masters, original) && !rig.params_are_rounded());
        for (size_t t = 0; t < rig.masters.size(); ++t)
          CHECK(rig.is_perturbed(t, rig.params[t], rig.masters[t], param));
        rig.table.restore(0);
        CHECK(rig.params_are_rounded() && same(rig.masters, original));
        rig.perturb();
        Rig plain({Dtype::f32, Dtype::f32, rig.c.sizes, chunk, 0, false});
        for (size_t t = 0; t < rig.masters.size(); ++t)
          for (int64_t i = 0; i < rig.masters[t].size(); ++i) {
            plain.params[t].set(i, rig.masters[t].get(i));
            plain.grads[t].set(i, rig.grads[t].get(i));
            plain.state[0][t].set(i, rig.state[0][t].get(i));
          }
        rig.table.sgd(kSgdGroups, rig.arguments()), plain.table.sgd(kSgdGroups, plain.arguments());
        bool good = true;  // a master is updated like an fp32 param
        for (size_t t = 0; t < rig.masters.size(); ++t)
          for (int64_t i = 0; i < rig.masters[t].size(); ++i)
            good = good && near(rig.masters[t].get(i), plain.params[t].get(i), Dtype::f32, 1) &&
                   near(rig.state[0][t].get(i), plain.state[0][t].get(i), Dtype::f32, 1);
        CHECK(good && rig.params_are_rounded());
      }
}

constexpr uint64_t kSeed = 0xf123456789abcdefu;  // Rig::arguments has the same seed

// With params of 0, the perturbed param is the gradient, except for the mask and the rounding.
template <class T>
void check_perturb(Dtype dtype) {
  for (int64_t chunk : {int64_t(333), int64_t(0)}) {
    Rig rig({dtype, Dtype::f32, {5000, 1, 4097}, chunk});
    for (Array& w : rig.params)
      for (int64_t i = 0; i < w.size(); ++i) w.set(i, 0);
    const std::vector<PerturbGroupOf<double>> groups = {
        {1, 0, 1, false}, {1, 0, 0.5, false}, {1, 0, 0.125, false}, {1, 0, 1, false}};
    rig.status.inverse_norm = 1, rig.status.rng_offset = 7;
    rig.table.perturb(groups, rig.status_address(), kSeed, true, 0);
    for (size_t t = 0; t < 3; ++t) {
      const uint32_t stream = Rig::rng_streams(3)[t];
      const StreamKey mask = stream_key(kSeed, 7, stream, Draw::mask);
      const StreamKey words = stream_key(kSeed, 7, stream, Draw::round_perturbed);
      const float mask_prob = float(groups[t].mask_prob);
      bool good = true;
      for (int64_t i = 0; i < rig.params[t].size(); ++i) {
        const float g = in_mask(word(mask, i), mask_prob) ? rig.grads[t].get(i) / mask_prob : 0;
        good = good && rig.params[t].get(i) == widen(AtRandom<T>::of(g, word(words, i)));
      }
      CHECK(good);
    }
  }
}

// Updates start from params of 0 with a learning rate of -1, so that the new param is exactly known before rounding.
template <class T>
void check_updates(Dtype dtype) {
  for (int64_t chunk : {int64_t(333), int64_t(0)})
    for (int rule = 0; rule < 2; ++rule) {
      Rig rig({dtype, Dtype::f32, {5000, 1, 4097}, chunk, 0, false});
      rig.use_lion();
      for (size_t t = 0; t < 3; ++t)
        for (int64_t i = 0; i < rig.params[t].size(); ++i) rig.params[t].set(i, 0);
      rig.status.rng_offset = 7;
      const double lr = 1 / 3.0;  // Lion's params are then +-1/3
      if (rule == 0)
        rig.table.sgd(std::vector<SgdGroupOf<double>>(4, {-1, 0, 1, 0, 1, false}), rig.arguments(nullptr, kInf, true));
      else
        rig.table.element<Lion>(std::vector<LionGroupOf<double>>(4, {-lr, 1, 1, 0, 1}), rig.arguments(nullptr, kInf, true));
      for (size_t t = 0; t < 3; ++t) {
        const StreamKey words = stream_key(kSeed, 7, Rig::rng_streams(3)[t], Draw::round_updated);
        bool good = true;
        for (int64_t i = 0; i < rig.params[t].size(); ++i) {
          const float g = rig.grads[t].get(i), x = rule == 0 ? g : g > 0 ? float(lr) : g < 0 ? -float(lr) : 0;
          good = good && rig.params[t].get(i) == widen(AtRandom<T>::of(x, word(words, i)));
        }
        CHECK(good);
      }
    }
}

void test_random_numbers() {
  check_perturb<bf16>(Dtype::bf16);
  check_perturb<f16>(Dtype::f16);
  check_updates<bf16>(Dtype::bf16);
  check_updates<f16>(Dtype::f16);
}

}  // namespace

int main() {
  test_masters();
  test_random_numbers();
  CHECK(cuda_shim::machine().unloaded_launches == 0);
  return fused_sam_test::result();
}
