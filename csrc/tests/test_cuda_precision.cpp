// Master weights and rounding at random in the CUDA kernels' source on the host (cuda_shim/).
#include <cmath>

#include "core/rng.h"
#include "tests/check.h"
#include "tests/cuda_rig.h"

using namespace fused_sam;
using namespace fused_sam_test;

namespace {

void test_masters() {
  for (Dtype model : {Dtype::bf16, Dtype::f16})
    for (Dtype gradient : {model, Dtype::f32})
      for (int64_t chunk : {int64_t(333), int64_t(0)}) {
        Rig rig({Dtype::f32, gradient, {33333, 0, 555, 1, 4097}, chunk, 0, true, model});
        const auto original = copies(rig.weights), garbage = copies(rig.models);
        const auto models_are_rounded = [&] {
          for (size_t t = 0; t < rig.weights.size(); ++t)
            for (int64_t i = 0; i < rig.weights[t].size(); ++i)
              if (rig.models[t].get(i) != rounded(rig.weights[t].get(i), model)) return false;
          return true;
        };
        rig.norm(true);
        CHECK(std::fabs(rig.status.norm - rig.expected_norm(true)) <= 1e-5 * rig.status.norm);
        rig.status.skip = 1;
        rig.perturb();
        CHECK(same(rig.models, garbage) && same(rig.weights, original));
        rig.status.skip = 0;
        rig.perturb();
        CHECK(same(rig.weights, original) && !models_are_rounded());
        for (size_t t = 0; t < rig.weights.size(); ++t)
          CHECK(rig.is_perturbed(t, rig.models[t], rig.weights[t], model));
        rig.table.restore(0);
        CHECK(models_are_rounded() && same(rig.weights, original));
        rig.perturb();
        Rig plain({Dtype::f32, Dtype::f32, rig.c.sizes, chunk, 0, false});
        for (size_t t = 0; t < rig.weights.size(); ++t)
          for (int64_t i = 0; i < rig.weights[t].size(); ++i) {
            plain.weights[t].set(i, rig.weights[t].get(i));
            plain.gradients[t].set(i, rig.gradients[t].get(i));
            plain.momenta[t].set(i, rig.momenta[t].get(i));
          }
        rig.table.sgd(kGroups, rig.update()), plain.table.sgd(kGroups, plain.update());
        bool good = true;  // the master's update is that of an fp32 weight
        for (size_t t = 0; t < rig.weights.size(); ++t)
          for (int64_t i = 0; i < rig.weights[t].size(); ++i)
            good = good && near(rig.weights[t].get(i), plain.weights[t].get(i), Dtype::f32, 1) &&
                   near(rig.momenta[t].get(i), plain.momenta[t].get(i), Dtype::f32, 1);
        CHECK(good && models_are_rounded());
      }
}

// From weights of 0 the perturbed weight is the gradient exactly: what is left is the draw and the rounding.
template <class T>
void check_random(Dtype dtype) {
  for (int64_t chunk : {int64_t(333), int64_t(0)}) {
    Rig rig({dtype, Dtype::f32, {5000, 1, 4097}, chunk});
    rig.groups = {0, 1, 2};
    for (Array& w : rig.weights)
      for (int64_t i = 0; i < w.size(); ++i) w.set(i, 0);
    Groups groups = kGroups;
    for (GroupOf<double>& g : groups) g.rho = 1, g.adaptive = false, g.share = 1;
    groups[1].share = 0.5, groups[2].share = 0.125;
    rig.status.inverse = 1, rig.status.draws = 7;
    const uint64_t seed = 0xf123456789abcdefu;
    rig.table.perturb(groups, rig.status_address(), seed, true, 0);
    for (size_t t = 0; t < 3; ++t) {
      const uint32_t stream = Rig::streams(3)[t];
      const StreamKey mask = stream_key(seed, 7, stream, Draw::mask);
      const StreamKey words = stream_key(seed, 7, stream, Draw::round_perturbed);
      const float share = float(groups[t].share);
      bool good = true;
      for (int64_t i = 0; i < rig.weights[t].size(); ++i) {
        const float g = chosen(word(mask, i), share) ? rig.gradients[t].get(i) / share : 0;
        good = good && rig.weights[t].get(i) == widen(AtRandom<T>::of(g, word(words, i)));
      }
      CHECK(good);
    }
  }
}

void test_random_numbers() {
  check_random<bf16>(Dtype::bf16);
  check_random<f16>(Dtype::f16);
}

}  // namespace

int main() {
  test_masters();
  test_random_numbers();
  return fused_sam_test::result();
}
