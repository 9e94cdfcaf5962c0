// Steps of SAM with SGD in the CUDA kernels' source on the host (cuda_shim/) equal formulas in double.
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
  const auto original = copies(rig.params);
  const double norm = rig.expected_norm(true);

  rig.norm(true);
  CHECK(std::fabs(rig.status.ascent_norm - norm) <= 1e-5 * norm);
  CHECK(rig.status.skip == 0 && std::fabs(rig.status.inverse_norm * norm - 1) <= 1e-5);
  const float first = rig.status.ascent_norm;
  rig.norm(true);
  CHECK(rig.status.ascent_norm == first);  // bit for bit

  if (c.separate) {
    rig.perturb();
    CHECK(same(rig.backups, original));
    for (size_t t = 0; t < c.sizes.size(); ++t)
      CHECK(rig.is_perturbed(t, rig.params[t], rig.backups[t], c.param));
  }

  rig.norm(false, true);
  CHECK(std::fabs(rig.status.update_norm - rig.expected_norm(false)) <= 1e-5 * rig.status.update_norm);
  CHECK(rig.status.ascent_norm == first);

  // Every third momentum has its initial value.
  for (Array& m : rig.state[0])
    for (int64_t i = 0; i < m.size(); i += 3) m.set(i, -0.0f);
  const auto momentum_buffers = copies(rig.state[0]);
  std::vector<std::vector<float>> before;
  for (const Array& a : rig.clean()) {
    before.emplace_back();
    for (int64_t i = 0; i < a.size(); ++i) before.back().push_back(a.get(i));
  }
  const float scale = 4;
  rig.table.sgd(kSgdGroups, rig.arguments(&scale));
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    const SgdGroupOf<double>& h = kSgdGroups[size_t(rig.group_ids[t])];
    bool good = true;
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double w = before[t][size_t(i)], d = h.factor / scale * rig.grads[t].get(i) + h.weight_decay * w;
      float old;
      std::memcpy(&old, &momentum_buffers[t][size_t(i) * 4], 4);
      const bool dampened = h.one_minus_dampening != 1, first = dampened && is_negative_zero(old);
      const double m = h.momentum == 0 || first ? d : h.momentum * old + h.one_minus_dampening * d;
      const double updated = w - h.lr * (h.nesterov ? d + h.momentum * m : m);
      good = good && near(rig.params[t].get(i), updated, c.param, 4);
      good = good && (h.momentum == 0 || near(rig.state[0][t].get(i), m, Dtype::f32, 4));
      good = good && (h.momentum == 0 || !dampened || !is_negative_zero(rig.state[0][t].get(i)));
    }
    CHECK(good);
    if (h.momentum == 0) CHECK(rig.state[0][t].equals(momentum_buffers[t]));
  }
  if (c.separate) {
    CHECK(same(rig.backups, original));
    rig.table.restore(0);
    CHECK(same(rig.params, original));
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
  for (Dtype param : {Dtype::bf16, Dtype::f16})
    for (Dtype grad : {param, Dtype::f32})
      for (size_t m = 1; m < kMatrix.size(); ++m)
        for (int64_t chunk : {int64_t(333), int64_t(0)}) check_step({param, grad, kMatrix[m], chunk});
}

void test_unaligned_and_own_backup() {
  for (int64_t offset : {1, 2, 3, 4})
    for (Dtype param : {Dtype::f32, Dtype::bf16}) {
      check_step({param, Dtype::f32, {5000, 7, 4096}, 0, offset});
      check_step({param, Dtype::f32, {5000, 7, 4096}, 0, offset, false});
    }
}

// Gradients in the middle of a bucket, and tensors that all begin in the middle of a vector, as shards of flat params do.
void test_misaligned_grads_and_shards() {
  for (int64_t offset : {1, 3, 4, 5})
    for (Dtype param : {Dtype::f32, Dtype::bf16, Dtype::f16})
      for (Dtype grad : {param, Dtype::f32}) {
        check_step({param, grad, {5000, 7, 4096, 9}, 0, 0, true, param, offset});
        check_step({param, grad, {5000, 7, 4096, 9}, 333, offset, true, param, offset, offset});
        check_step({param, grad, {5000, 7, 4096, 1}, 0, offset, true, param, 0, offset});
      }
}

// The blocks of a reduction take one chunk or several, and their number does not matter to an update.
void test_blocks_of_a_reduction() {
  for (int fitting : {1, 2, 3, 8}) {
    cuda_shim::machine().blocks_per_sm = fitting;
    check_step({Dtype::f32, Dtype::f32, {33333, 0, 555, 4097}, 333});
    Rig rig({Dtype::f32, Dtype::f32, {33333, 0, 555, 4097}, 333});
    const int64_t blocks = rig.table.reduction_blocks(), chunks = rig.table.chunks();
    CHECK(blocks <= 2 * fitting && (chunks + blocks - 1) / blocks == (chunks + 2 * fitting - 1) / (2 * fitting));
  }
  cuda_shim::machine().blocks_per_sm = 2;
}

// The tables fill a launch, or have one tensor more or less. Old drivers take small tables, and new ones also middle and
// large ones.
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
    for (int count : {SmallTable::kTensors + 1, MiddleTable::kTensors, MiddleTable::kTensors + 1}) {
      check_step({Dtype::f32, Dtype::f32, Sizes(size_t(count), 6), 4});
      Rig rig({Dtype::f32, Dtype::f32, Sizes(size_t(count), 6), 4});
      CHECK(rig.table.launches() == (driver == 13000 ? 1 : (count - 1) / SmallTable::kTensors + 1));
    }
  }
  cuda_shim::machine().driver = 13000;
}

// An inf or a NaN at the start, in the middle or at the end of either gradient changes no param and no state.
void test_skip() {
  const Sizes sizes = {33333, 0, 555};
  for (float bad : {kInf, -kInf, kNan})
    for (int place = 0; place < 3; ++place)
      for (bool second : {false, true}) {
        Rig rig({Dtype::f32, Dtype::f32, sizes, 333});
        const auto params = copies(rig.params), momentum_buffers = copies(rig.state[0]);
        const auto poison = [&](float value) {
          Array& g = rig.grads[place == 2 ? 2 : 0];
          const int64_t i = place == 0 ? 0 : place == 1 ? g.size() / 2 : g.size() - 1;
          const float old = g.get(i);
          g.set(i, value);
          return old;
        };
        const float good = second ? 0 : poison(bad);
        rig.norm(true);
        CHECK((rig.status.skip != 0) == !second);
        rig.perturb();
        CHECK(same(rig.backups, params) && same(rig.params, params) == !second);
        poison(second ? bad : good);
        rig.norm(false, true);
        CHECK(rig.status.skip == 1);
        rig.table.sgd(kSgdGroups, rig.arguments());
        CHECK(same(rig.params, params) && same(rig.state[0], momentum_buffers));
        rig.norm(false, false);
        CHECK((rig.status.skip != 0) == second);  // without keep_skip, only the present gradient is checked
      }
}

// A norm over several tables needs only a common status. The first table resets it, and the last one finishes it.
void test_chain_of_tables() {
  for (int driver : {13000, 12000}) {  // the last table takes one launch, or two
    cuda_shim::machine().driver = driver;
    Rig a({Dtype::f32, Dtype::f32, {1000, 5}, 0}), b({Dtype::bf16, Dtype::f32, Sizes(SmallTable::kTensors + 1, 77), 0});
    a.status = {1e6f, 3, 4, 1, 5, 6, 0, 0, 0};
    const int before = cuda_shim::machine().launches;
    a.norm(true, false, true, false);
    const double first = std::pow(a.expected_norm(true), 2);
    CHECK(std::fabs(a.status.sum_of_squares - first) <= 1e-5 * first);
    CHECK(a.status.ascent_norm == 3 && a.status.inverse_norm == 4 && a.status.skip == 1 && a.status.update_norm == 5);
    b.status = a.status;
    b.norm(true, false, false, true);
    CHECK(cuda_shim::machine().launches - before == 1 + b.table.launches());
    const double expected = std::hypot(a.expected_norm(true), b.expected_norm(true));
    CHECK(std::fabs(b.status.ascent_norm - expected) <= 1e-5 * expected);
    CHECK(std::fabs(b.status.inverse_norm * expected - 1) <= 1e-5);
    CHECK(b.status.skip == 0 && b.status.update_norm == 5 && b.status.rng_offset == 6);
  }
  cuda_shim::machine().driver = 13000;
}

void test_zero_gradient() {
  Rig rig({Dtype::f32, Dtype::f32, {100}, 0});
  for (int64_t i = 0; i < 100; ++i) rig.grads[0].set(i, 0);
  const auto params = copies(rig.params);
  rig.table.norm(&kPerturbGroups, rig.status_address(), {true, true, {true, false}, 0}, rig.scratch(), 0);
  CHECK(rig.status.ascent_norm == 0 && rig.status.inverse_norm == 0 && rig.status.skip == 0);
  rig.perturb();
  CHECK(same(rig.params, params));
}

void test_rates_on_the_device() {
  const float single = 0.1f;
  const double wide = 0.2;
  std::vector<SgdGroupOf<double>> without = kSgdGroups;
  for (SgdGroupOf<double>& g : without) g.lr = 0;
  const std::vector<DeviceRate> rates = {{reinterpret_cast<uintptr_t>(&single), false},
                                         {reinterpret_cast<uintptr_t>(&wide), true}};
  const Case c{Dtype::f32, Dtype::f32, {300, 300}, 0};
  Rig by_number(c), by_address(c);
  by_number.norm(true), by_address.norm(true);
  by_number.table.sgd(kSgdGroups, by_number.arguments());
  without.resize(2);
  UpdateArguments a = by_address.arguments();
  a.rates = rates;
  by_address.table.sgd(without, a);
  CHECK(same(by_address.params, copies(by_number.params)));
}

void test_finish_norm_in_a_launch_of_its_own() {
  StatusOf<float> status{6.25f, 3, 4, 1, 5, 6, 0, 0, 0};
  cuda_finish_norm(reinterpret_cast<uintptr_t>(&status), {true, true}, 0.5, 0, 0);
  CHECK(status.sum_of_squares == 6.25f && status.ascent_norm == 2.5f && status.inverse_norm == 1 / 3.0f);
  CHECK(status.skip == 1 && status.update_norm == 5 && status.rng_offset == 6);
  cuda_finish_norm(reinterpret_cast<uintptr_t>(&status), {false, false}, 0.5, 0, 0);
  CHECK(status.update_norm == 2.5f && status.skip == 0 && status.ascent_norm == 2.5f);
}

// Blocks have the right spans in tensors that are too large for this machine, with offsets beyond 32 bits.
void test_spans_beyond_32_bits() {
  const Sizes sizes = {555, (int64_t(1) << 33) + 777, 3};
  for (int64_t chunk : {int64_t(333), int64_t(33333), kLongestChunk}) {
    const LaunchPlan plan = plan_launches(sizes, {0, 0, 0}, chunk, SmallTable::kTensors, SmallTable::kGroups).front();
    static SmallTable table;
    table.count = 3;
    table.chunk = int32_t(chunk);
    std::copy(sizes.begin(), sizes.end(), table.size);
    std::copy(plan.prefix.begin(), plan.prefix.end(), table.prefix);
    const Span last = span_of(table, plan.prefix[2] - 1), next = span_of(table, plan.prefix[2]);
    CHECK(last.tensor == 1 && last.begin + last.length == sizes[1] && last.begin % chunk == 0 && last.length > 0);
    CHECK(last.begin > int64_t(1) << 32 && next.tensor == 2 && next.begin == 0 && next.length == 3);
    const Span middle = span_of(table, plan.prefix[1] + (plan.prefix[2] - plan.prefix[1]) / 2);
    CHECK(middle.tensor == 1 && middle.length == chunk && middle.begin > int64_t(1) << 31);
  }
}

}  // namespace

int main() {
  test_size_matrix();
  test_dtypes();
  test_unaligned_and_own_backup();
  test_misaligned_grads_and_shards();
  test_blocks_of_a_reduction();
  test_full_tables();
  test_skip();
  test_chain_of_tables();
  test_zero_gradient();
  test_rates_on_the_device();
  test_finish_norm_in_a_launch_of_its_own();
  test_spans_beyond_32_bits();
  CHECK(cuda_shim::machine().unloaded_launches == 0);
  return fused_sam_test::result();
}
