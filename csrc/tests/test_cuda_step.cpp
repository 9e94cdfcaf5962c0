// SAM's passes with SGD (P1 to P3) in the CUDA kernels' source on the host (cuda_shim/), against formulas in double.
#include <algorithm>
#include <cmath>

#include "cuda/multi_tensor.cuh"
#include "cuda_runtime.h"
#include "tests/check.h"
#include "tests/cuda_rig.h"

using namespace fused_sam;
using namespace fused_sam_test;

namespace {

void check_step(const Case& c) {
  Rig rig(c);
  const auto original = copies(rig.weights);
  const double norm = rig.expected_norm(true);

  rig.norm(true);
  CHECK(std::fabs(rig.status.norm - norm) <= 1e-5 * norm);
  CHECK(rig.status.skip == 0 && std::fabs(rig.status.inverse * norm - 1) <= 1e-5);
  const float first = rig.status.norm;
  rig.norm(true);
  CHECK(rig.status.norm == first);  // bit for bit

  if (c.separate) {
    rig.perturb();
    CHECK(same(rig.backups, original));
    for (size_t t = 0; t < c.sizes.size(); ++t)
      CHECK(rig.is_perturbed(t, rig.weights[t], rig.backups[t], c.weight));
  }

  rig.norm(false, true);
  CHECK(std::fabs(rig.status.update_norm - rig.expected_norm(false)) <= 1e-5 * rig.status.update_norm);
  CHECK(rig.status.norm == first);

  // Momentum that was never written, here and there.
  for (Array& m : rig.momenta)
    for (int64_t i = 0; i < m.size(); i += 3) m.set(i, -0.0f);
  const auto momenta = copies(rig.momenta);
  const Arrays& from = c.separate ? rig.backups : rig.weights;
  std::vector<std::vector<float>> before;
  for (const Array& a : from) {
    before.emplace_back();
    for (int64_t i = 0; i < a.size(); ++i) before.back().push_back(a.get(i));
  }
  const float scale = 4;
  rig.table.sgd(kGroups, rig.update(&scale));
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    const GroupOf<double>& h = kGroups[size_t(rig.groups[t])];
    bool good = true;
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double w = before[t][size_t(i)], d = h.factor / scale * rig.gradients[t].get(i) + h.weight_decay * w;
      float old;
      std::memcpy(&old, &momenta[t][size_t(i) * 4], 4);
      const bool fresh = h.keep != 1 && is_negative_zero(old);
      const double m = h.momentum == 0 ? d : fresh ? d : h.momentum * old + h.keep * d;
      const double moved = w - h.lr * (h.nesterov ? d + h.momentum * m : m);
      good = good && near(rig.weights[t].get(i), moved, c.weight, 4);
      good = good && (h.momentum == 0 || near(rig.momenta[t].get(i), m, Dtype::f32, 4));
      good = good && (h.momentum == 0 || h.keep == 1 || !is_negative_zero(rig.momenta[t].get(i)));
    }
    CHECK(good);
    if (h.momentum == 0) CHECK(rig.momenta[t].equals(momenta[t]));
  }
  if (c.separate) {
    CHECK(same(rig.backups, original));
    rig.table.restore(0);
    CHECK(same(rig.weights, original));
  }
}

const std::vector<Sizes> kMatrix = {
    {7777 * 77, 555 * 555}, {2048 * 32 + 1, 555}, {33333, 555}, {1},         {0, 555, 33},
    {555, 0, 33},           {555, 33, 0},         {0, 1, 0, 4, 0}, {3, 5, 8, 15, 16, 17, 4095, 4096, 4097},
};

void test_size_matrix() {
  for (const Sizes& sizes : kMatrix)
    for (int64_t chunk : {int64_t(333), int64_t(33333), int64_t(0)}) check_step({Dtype::f32, Dtype::f32, sizes, chunk});
}

void test_dtypes() {
  for (Dtype weight : {Dtype::bf16, Dtype::f16})
    for (Dtype gradient : {weight, Dtype::f32})
      for (size_t m = 1; m < kMatrix.size(); ++m)
        for (int64_t chunk : {int64_t(333), int64_t(0)}) check_step({weight, gradient, kMatrix[m], chunk});
}

void test_unaligned_and_own_backup() {
  for (int64_t offset : {1, 2, 3, 4})
    for (Dtype weight : {Dtype::f32, Dtype::bf16}) {
      check_step({weight, Dtype::f32, {5000, 7, 4096}, 0, offset});
      check_step({weight, Dtype::f32, {5000, 7, 4096}, 0, offset, false});
    }
}

// Tables of one launch more or less: of small tables where the driver is old, and of large ones.
void test_full_tables() {
  for (int driver : {13000, 12000}) {
    cuda_shim::machine().driver = driver;
    const int slots = driver == 13000 ? LargeTable::kTensors : SmallTable::kTensors;
    for (int count : {slots - 1, slots, slots + 1, 2 * slots + 1}) {
      Sizes sizes{0};
      for (int i = 0; i < count; ++i) sizes.push_back(5 + i % 7);
      sizes.push_back(0);
      check_step({Dtype::f32, Dtype::f32, sizes, 4});
      Rig rig({Dtype::f32, Dtype::f32, sizes, 4});
      CHECK(rig.table.launches() == (count - 1) / slots + 1);
    }
  }
  cuda_shim::machine().driver = 13000;
}

// inf and NaN first, in the middle and last, in either gradient: no weight and no momentum changes.
void test_skip() {
  const Sizes sizes = {33333, 0, 555};
  for (float bad : {kInf, -kInf, kNan})
    for (int place = 0; place < 3; ++place)
      for (bool second : {false, true}) {
        Rig rig({Dtype::f32, Dtype::f32, sizes, 333});
        const auto weights = copies(rig.weights), momenta = copies(rig.momenta);
        const auto poison = [&](float value) {
          Array& g = rig.gradients[place == 2 ? 2 : 0];
          const int64_t i = place == 0 ? 0 : place == 1 ? g.size() / 2 : g.size() - 1;
          const float old = g.get(i);
          g.set(i, value);
          return old;
        };
        const float good = second ? 0 : poison(bad);
        rig.norm(true);
        CHECK((rig.status.skip != 0) == !second);
        rig.perturb();
        CHECK(same(rig.backups, weights) && same(rig.weights, weights) == !second);
        poison(second ? bad : good);
        rig.norm(false, true);
        CHECK(rig.status.skip == 1);
        rig.table.sgd(kGroups, rig.update());
        CHECK(same(rig.weights, weights) && same(rig.momenta, momenta));
        rig.norm(false, false);
        CHECK((rig.status.skip != 0) == second);  // without carry the present gradient alone counts
      }
}

// A sum that goes over several tables, the status being all that they share.
void test_chain_of_tables() {
  Rig a({Dtype::f32, Dtype::f32, {1000, 5}, 0}), b({Dtype::bf16, Dtype::f32, {77, 4096}, 0});
  a.norm(true, false, true, false);
  b.status = a.status;
  b.norm(true, false, false, true);
  const double expected = std::hypot(a.expected_norm(true), b.expected_norm(true));
  CHECK(std::fabs(b.status.norm - expected) <= 1e-5 * expected);
}

void test_zero_gradient() {
  Rig rig({Dtype::f32, Dtype::f32, {100}, 0});
  for (int64_t i = 0; i < 100; ++i) rig.gradients[0].set(i, 0);
  const auto weights = copies(rig.weights);
  rig.table.norm(kGroups, rig.status_address(), NormFlags{true, false, true, true}, 0, rig.scratch(), 0);
  CHECK(rig.status.norm == 0 && rig.status.inverse == 0 && rig.status.skip == 0);
  rig.perturb();
  CHECK(same(rig.weights, weights));
}

void test_rates_on_the_device() {
  const float single = 0.1f;
  const double wide = 0.2;
  Groups without = kGroups;
  for (GroupOf<double>& g : without) g.lr = 0;
  const std::vector<DeviceRate> rates = {{reinterpret_cast<uintptr_t>(&single), false},
                                         {reinterpret_cast<uintptr_t>(&wide), true}};
  const Case c{Dtype::f32, Dtype::f32, {300, 300}, 0};
  Rig by_number(c), by_address(c);
  by_number.norm(true), by_address.norm(true);
  by_number.table.sgd(kGroups, by_number.update());
  without.resize(2);
  Update u = by_address.update();
  u.rates = rates;
  by_address.table.sgd(without, u);
  CHECK(same(by_address.weights, copies(by_number.weights)));
}

void test_finish_by_itself() {
  StatusOf<float> status{6.25f, 3, 4, 1, 5, 6};
  cuda_finish(reinterpret_cast<uintptr_t>(&status), NormFlags{true, true, false, true}, 0.5, 0, 0);
  CHECK(status.sum == 6.25f && status.norm == 2.5f && status.inverse == 1 / 3.0f && status.skip == 1);
  CHECK(status.update_norm == 5 && status.draws == 6);
  cuda_finish(reinterpret_cast<uintptr_t>(&status), NormFlags{false, false, false, true}, 0.5, 0, 0);
  CHECK(status.update_norm == 2.5f && status.skip == 0 && status.norm == 2.5f);
}

// Where a block finds its elements in tensors too large for this machine: offsets beyond 32 bits.
void test_parts_beyond_32_bits() {
  const Sizes sizes = {555, (int64_t(1) << 33) + 777, 3};
  for (int64_t chunk : {int64_t(333), int64_t(33333), kLongestChunk}) {
    const LaunchPlan plan = plan_launches(sizes, {0, 0, 0}, chunk, SmallTable::kTensors, SmallTable::kGroups).front();
    static SmallTable table;
    table.count = 3;
    table.chunk = int32_t(chunk);
    std::copy(sizes.begin(), sizes.end(), table.size);
    std::copy(plan.prefix.begin(), plan.prefix.end(), table.prefix);
    const Part last = part_of(table, plan.prefix[2] - 1), next = part_of(table, plan.prefix[2]);
    CHECK(last.tensor == 1 && last.begin + last.length == sizes[1] && last.begin % chunk == 0 && last.length > 0);
    CHECK(last.begin > int64_t(1) << 32 && next.tensor == 2 && next.begin == 0 && next.length == 3);
    const Part middle = part_of(table, plan.prefix[1] + (plan.prefix[2] - plan.prefix[1]) / 2);
    CHECK(middle.tensor == 1 && middle.length == chunk && middle.begin > int64_t(1) << 31);
  }
}

}  // namespace

int main() {
  test_size_matrix();
  test_dtypes();
  test_unaligned_and_own_backup();
  test_full_tables();
  test_skip();
  test_chain_of_tables();
  test_zero_gradient();
  test_rates_on_the_device();
  test_finish_by_itself();
  test_parts_beyond_32_bits();
  return fused_sam_test::result();
}
