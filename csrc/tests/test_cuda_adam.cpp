// Steps of Adam and AdamW in the CUDA kernels' source on the host (cuda_shim/) equal formulas in double.
#include <algorithm>
#include <cmath>

#include "cuda_runtime.h"
#include "tests/check.h"
#include "tests/cuda_rig.h"

using namespace fused_sam;
using namespace fused_sam_test;

namespace {

std::vector<std::vector<double>> numbers(const Arrays& arrays) {
  std::vector<std::vector<double>> out;
  for (const Array& a : arrays) {
    out.emplace_back();
    for (int64_t i = 0; i < a.size(); ++i) out.back().push_back(a.get(i));
  }
  return out;
}

// With masters, the update reads and writes them, and the params are the rounded masters.
void check_adam(const Case& c, const float* scale, double max_norm) {
  Rig rig(c);
  rig.use_adam();
  rig.norm(true);
  rig.perturb();
  rig.norm(false, true);
  const auto before = numbers(rig.clean()), exp_avg = numbers(rig.state[0]), exp_avg_sq = numbers(rig.state[1]),
             max_exp_avg_sq = numbers(rig.state[2]);
  rig.table.adam(kAdamGroups, rig.arguments(scale, max_norm));
  const double unscale = scale == nullptr ? 1 : 1 / double(*scale);
  const double clip = std::min(1.0, max_norm / (double(rig.status.update_norm) * unscale + 1e-6));
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    const AdamGroupOf<double>& h = kAdamGroups[size_t(rig.group_ids[t])];
    const double step = c.sizes[t] == 0 ? 3 * double(t) : 3 * double(t) + 1;
    CHECK(rig.steps[t] == float(step));
    const double beta1 = 1 - h.one_minus_beta1, c1 = 1 - std::pow(beta1, step), c2 = 1 - std::pow(h.beta2, step);
    bool good = true;
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const size_t k = size_t(i);
      double w = before[t][k], d = h.factor * unscale * clip * rig.grads[t].get(i);
      if (!h.decoupled) d += h.weight_decay * w;
      if (h.decoupled) w *= 1 - h.lr * h.weight_decay;
      const double m = exp_avg[t][k] + h.one_minus_beta1 * (d - exp_avg[t][k]);
      const double v = h.beta2 * exp_avg_sq[t][k] + h.one_minus_beta2 * d * d;
      const double s = h.amsgrad ? std::max(v, max_exp_avg_sq[t][k]) : v;
      const double updated = w - h.lr / c1 * m / (std::sqrt(s) / std::sqrt(c2) + h.eps);
      // A root near 0 magnifies the rounding of its square by less than 1 / eps.
      const double magnitude = 4 + h.lr / c1 / h.eps;
      good = good && near(rig.state[0][t].get(i), m, Dtype::f32, 4) && near(rig.state[1][t].get(i), v, Dtype::f32, 4);
      if (h.amsgrad) good = good && near(rig.state[2][t].get(i), s, Dtype::f32, 4);
      good = good && near(rig.written()[t].get(i), updated, c.has_masters() ? c.master : c.param, magnitude);
    }
    CHECK(good);
  }
  CHECK(!c.has_masters() || rig.params_are_rounded());
  // A skipped step is not counted, changes no state, and restores the params.
  const auto state = copies(rig.state[0]), clean = copies(rig.clean());
  const std::vector<float> steps = rig.steps;
  rig.status.skip = 1;
  rig.table.adam(kAdamGroups, rig.arguments(scale, max_norm));
  CHECK(same(rig.state[0], state) && rig.steps == steps && same(rig.written(), clean));
  CHECK(!c.has_masters() || rig.params_are_rounded());
}

void test_adam() {
  const float scale = 4;
  for (int64_t chunk : {int64_t(333), int64_t(0)})
    for (const Sizes& sizes : {Sizes{33333, 555}, Sizes{0, 3, 5, 8, 15, 16, 0, 17, 4095, 4096, 4097}})
      for (Dtype narrow : {Dtype::bf16, Dtype::f16}) {
        check_adam({Dtype::f32, Dtype::f32, sizes, chunk}, nullptr, kInf);
        check_adam({narrow, narrow, sizes, chunk}, &scale, 1.5);
        check_adam({narrow, Dtype::f32, sizes, chunk}, nullptr, kInf);
        check_adam({narrow, narrow, sizes, chunk, 0, true, Dtype::f32}, &scale, 0.25);
        check_adam({narrow, Dtype::f32, sizes, chunk, 0, true, Dtype::f32}, nullptr, kInf);
      }
  check_adam({Dtype::f32, Dtype::f32, {5000, 7, 4096}, 0, 1, false}, nullptr, kInf);
}

// The steps of tensors in several launches are counted once, whichever block finishes last.
void test_adam_counts_every_step_once() {
  for (int driver : {13000, 12000}) {
    cuda_shim::machine().driver = driver;
    const int slots = driver == 13000 ? LargeAdamTable::kTensors : SmallAdamTable::kTensors;
    for (int count : {1, slots, slots + 1, 2 * slots + 1}) {
      Rig rig({Dtype::f32, Dtype::f32, Sizes(size_t(count), 9), 4});
      rig.use_adam();
      const int before = cuda_shim::machine().launches;
      for (int step = 1; step <= 3; ++step) {
        rig.table.adam(kAdamGroups, rig.arguments());
        bool good = true;
        for (size_t t = 0; t < rig.steps.size(); ++t) good = good && rig.steps[t] == float(3 * t + size_t(step));
        CHECK(good);
      }
      CHECK(cuda_shim::machine().launches - before == 3 * ((count - 1) / slots + 1));
    }
  }
  cuda_shim::machine().driver = 13000;
}

// The columns of state may be set in any order, before and after the others.
void test_columns_in_any_order() {
  const Case c{Dtype::f32, Dtype::f32, {100, 0, 5}, 0};
  Rig usual(c), reversed(c);
  usual.use_adam(), reversed.use_adam();
  CudaTable table(c.param, c.grad, c.master, 0, c.sizes, reversed.group_ids, {}, 0);
  std::vector<uintptr_t> of_steps;
  for (float& t : reversed.steps) of_steps.push_back(reinterpret_cast<uintptr_t>(&t));
  table.set_backups(addresses(reversed.params));
  table.set_state(0, addresses(reversed.state[0]));
  table.set_steps(of_steps);
  table.set_state(2, addresses(reversed.state[2]));
  table.set_grads(addresses(reversed.grads));
  table.set_state(1, addresses(reversed.state[1]));
  table.set_params(addresses(reversed.params));
  usual.table.set_backups(addresses(usual.params));
  table.adam(kAdamGroups, reversed.arguments()), usual.table.adam(kAdamGroups, usual.arguments());
  CHECK(same(reversed.params, copies(usual.params)) && reversed.steps == usual.steps);
  for (int slot = 0; slot < 3; ++slot) CHECK(same(reversed.state[slot], copies(usual.state[slot])));
}

}  // namespace

int main() {
  test_adam();
  test_adam_counts_every_step_once();
  test_columns_in_any_order();
  CHECK(cuda_shim::machine().unloaded_launches == 0);
  return fused_sam_test::result();
}
