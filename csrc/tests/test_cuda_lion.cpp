// Steps of Lion in the CUDA kernels' source on the host (cuda_shim/) equal formulas in double.
#include <algorithm>
#include <cmath>

#include "cuda_runtime.h"
#include "tests/check.h"
#include "tests/cuda_rig.h"

using namespace fused_sam;
using namespace fused_sam_test;

namespace {

double sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : x; }

void check_lion(const Case& c, const float* scale, double max_norm) {
  Rig rig(c);
  rig.use_lion();
  rig.norm(true);
  rig.perturb();
  rig.norm(false, true);
  std::vector<std::vector<double>> before, exp_avg;
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    before.emplace_back(), exp_avg.emplace_back();
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      if (i % 5 == 0) rig.grads[t].set(i, 0), rig.state[0][t].set(i, 0);  // sign(0) is 0
      before.back().push_back(rig.clean()[t].get(i)), exp_avg.back().push_back(rig.state[0][t].get(i));
    }
  }
  rig.table.element<Lion>(kLionGroups, rig.arguments(scale, max_norm));
  const double unscale = scale == nullptr ? 1 : 1 / double(*scale);
  const double clip = std::min(1.0, max_norm / (double(rig.status.update_norm) * unscale + 1e-6));
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    const LionGroupOf<double>& h = kLionGroups[size_t(rig.group_ids[t])];
    bool good = true;
    int64_t near_zero = 0;
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const size_t k = size_t(i);
      const double w = before[t][k], old = exp_avg[t][k], d = h.factor * unscale * clip * rig.grads[t].get(i);
      const double mean = old + h.one_minus_beta1 * (d - old), m = old + h.one_minus_beta2 * (d - old);
      good = good && near(rig.state[0][t].get(i), m, Dtype::f32, 4);
      // Rounding may change the sign of a number near 0.
      if (mean != 0 && std::fabs(mean) < 1e-6) {
        ++near_zero;
        continue;
      }
      const double updated = w - h.lr * (sign(mean) + h.weight_decay * w);
      good = good && near(rig.written()[t].get(i), updated, c.has_masters() ? c.master : c.param, 4);
    }
    CHECK(good && near_zero <= 1 + c.sizes[t] / 1000);
  }
  CHECK(!c.has_masters() || rig.params_are_rounded());
  // A skipped step changes no state, and restores the params.
  const auto state = copies(rig.state[0]), clean = copies(rig.clean());
  rig.status.skip = 1;
  rig.table.element<Lion>(kLionGroups, rig.arguments(scale, max_norm));
  CHECK(same(rig.state[0], state) && same(rig.written(), clean));
  CHECK(!c.has_masters() || rig.params_are_rounded());
}

void test_lion() {
  const float scale = 4;
  for (int64_t chunk : {int64_t(333), int64_t(0)})
    for (const Sizes& sizes : {Sizes{33333, 555, 4096, 7}, Sizes{0, 3, 5, 8, 15, 16, 0, 17, 4095, 4096, 4097}})
      for (Dtype narrow : {Dtype::bf16, Dtype::f16}) {
        check_lion({Dtype::f32, Dtype::f32, sizes, chunk}, nullptr, kInf);
        check_lion({narrow, narrow, sizes, chunk}, &scale, 1.5);
        check_lion({narrow, Dtype::f32, sizes, chunk}, nullptr, kInf);
        check_lion({narrow, narrow, sizes, chunk, 0, true, Dtype::f32}, &scale, 0.25);
        check_lion({narrow, Dtype::f32, sizes, chunk, 0, true, Dtype::f32}, nullptr, kInf);
      }
  for (int64_t offset : {1, 2, 3})
    check_lion({Dtype::f32, Dtype::f32, {5000, 7, 4096}, 0, offset, false}, nullptr, kInf);
}

// sign() does not hide a NaN in the state.
void test_nan_stays_nan() {
  Rig rig({Dtype::f32, Dtype::f32, {100}, 0, 0, false});
  rig.use_lion();
  rig.state[0][0].set(7, kNan);
  rig.table.element<Lion>(kLionGroups, rig.arguments());
  for (int64_t i = 0; i < 100; ++i)
    CHECK(std::isnan(rig.params[0].get(i)) == (i == 7) && std::isnan(rig.state[0][0].get(i)) == (i == 7));
}

// Lion uses SGD's tables, with as many tensors per launch.
void test_launches() {
  for (int driver : {13000, 12000}) {
    cuda_shim::machine().driver = driver;
    const int slots = driver == 13000 ? LargeTable::kTensors : SmallTable::kTensors;
    Rig rig({Dtype::f32, Dtype::f32, Sizes(size_t(slots) + 1, 9), 4});
    rig.use_lion();
    const int before = cuda_shim::machine().launches;
    rig.table.element<Lion>(kLionGroups, rig.arguments());
    CHECK(cuda_shim::machine().launches - before == 2);
  }
  cuda_shim::machine().driver = 13000;
}

void test_rates_on_the_device() {
  const float single = 0.1f;
  const double wide = 0.2;
  const Case c{Dtype::f32, Dtype::f32, {300, 300}, 0};
  Rig by_number(c), by_address(c);
  for (Rig* rig : {&by_number, &by_address}) rig->use_lion(), rig->norm(true), rig->perturb();
  by_number.table.element<Lion>(kLionGroups, by_number.arguments());
  std::vector<LionGroupOf<double>> without(kLionGroups.begin(), kLionGroups.begin() + 2);
  for (LionGroupOf<double>& g : without) g.lr = 0;
  UpdateArguments a = by_address.arguments();
  a.rates = {{reinterpret_cast<uintptr_t>(&single), false}, {reinterpret_cast<uintptr_t>(&wide), true}};
  by_address.table.element<Lion>(without, a);
  CHECK(same(by_address.params, copies(by_number.params)));
}

}  // namespace

int main() {
  test_lion();
  test_nan_stays_nan();
  test_launches();
  test_rates_on_the_device();
  CHECK(cuda_shim::machine().unloaded_launches == 0);
  return fused_sam_test::result();
}
