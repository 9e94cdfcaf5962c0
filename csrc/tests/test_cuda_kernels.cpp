// The CUDA kernels' real source on the host (cuda_shim/), against formulas in double, under the sanitizers.
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>

#include "check_words.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/table.h"
#include "cuda_runtime.h"

using namespace fused_sam;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using Sizes = std::vector<int64_t>;

// ---- memory whose ends the address sanitizer watches ------------------------------------------------------

class Array {
 public:
  // offset: elements between a 16-byte boundary and the first element.
  Array(Dtype dtype, int64_t size, int64_t offset)
      : dtype_(dtype), size_(size), bytes_(new char[size_t((size + offset) * size_of(dtype))]), offset_(offset) {}

  char* data() const { return bytes_.get() + offset_ * size_of(dtype_); }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data()); }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * size_of(dtype_); }

  float get(int64_t i) const {
    if (dtype_ == Dtype::f32) return reinterpret_cast<const float*>(data())[i];
    if (dtype_ == Dtype::bf16) return widen(reinterpret_cast<const bf16*>(data())[i]);
    return widen(reinterpret_cast<const f16*>(data())[i]);
  }
  void set(int64_t i, float x) {
    if (dtype_ == Dtype::f32)
      reinterpret_cast<float*>(data())[i] = x;
    else if (dtype_ == Dtype::bf16)
      reinterpret_cast<bf16*>(data())[i] = Narrow<bf16, float>::of(x);
    else
      reinterpret_cast<f16*>(data())[i] = Narrow<f16, float>::of(x);
  }
  void fill(std::mt19937& random, float scale) {
    for (int64_t i = 0; i < size_; ++i) set(i, scale * (float(random()) * 0x1p-31f - 1));
  }
  std::vector<char> copy() const { return std::vector<char>(data(), data() + bytes()); }
  bool equals(const std::vector<char>& other) const {
    return other.empty() || std::memcmp(other.data(), data(), other.size()) == 0;
  }

 private:
  Dtype dtype_;
  int64_t size_;
  std::unique_ptr<char[]> bytes_;
  int64_t offset_;
};

using Arrays = std::vector<Array>;

Arrays arrays(Dtype dtype, const Sizes& sizes, int64_t offset) {
  Arrays out;
  for (int64_t n : sizes) out.emplace_back(dtype, n, offset);
  return out;
}
std::vector<uintptr_t> addresses(const Arrays& arrays) {
  std::vector<uintptr_t> out;
  for (const Array& a : arrays) out.push_back(a.address());
  return out;
}
std::vector<std::vector<char>> copies(const Arrays& arrays) {
  std::vector<std::vector<char>> out;
  for (const Array& a : arrays) out.push_back(a.copy());
  return out;
}
bool same(const Arrays& arrays, const std::vector<std::vector<char>>& before) {
  for (size_t t = 0; t < arrays.size(); ++t)
    if (!arrays[t].equals(before[t])) return false;
  return true;
}

// Within the rounding of a few fp32 operations, and of one write in the storage type.
bool near(double found, double expected, Dtype dtype, double magnitude) {
  const double storage = dtype == Dtype::bf16 ? 0x1p-8 : dtype == Dtype::f16 ? 0x1p-11 : 0;
  return std::fabs(found - expected) <= magnitude * 0x1p-20 + std::fabs(expected) * storage + 0x1p-24;
}

// ---- one table, with everything a step needs --------------------------------------------------------------

const std::vector<GroupOf<double>> kGroups = {
    // rho, eta, lr, momentum, keep, weight_decay, factor, adaptive, nesterov
    {0.5, 0, 0.1, 0.9, 1, 0.01, 1, false, false},
    {0.25, 0.125, 0.2, 0.8, 0.75, 0, -1, true, false},
    {1, 0, 0.1, 0.9, 1, 0.001, 1, true, true},
    {0.5, 0, 0.3, 0, 1, 0.01, 1, false, false},
};

struct Case {
  Dtype weight = Dtype::f32, gradient = Dtype::f32;
  Sizes sizes;
  int64_t chunk = 0;
  int64_t offset = 0;     // misaligns the weights
  bool separate = true;   // the backups are memory of their own
};

struct Rig {
  Case c;
  std::vector<int32_t> groups;
  Arrays weights, backups, gradients, momenta;
  StatusOf<float> status{};
  CudaTable table;
  std::vector<char> workspace;

  static std::vector<int32_t> numbers(size_t count) {
    std::vector<int32_t> out(count);
    for (size_t i = 0; i < count; ++i) out[i] = int32_t(i % kGroups.size());
    return out;
  }

  explicit Rig(const Case& c)
      : c(c),
        groups(numbers(c.sizes.size())),
        weights(arrays(c.weight, c.sizes, c.offset)),
        backups(arrays(c.weight, c.sizes, 0)),
        gradients(arrays(c.gradient, c.sizes, 0)),
        momenta(arrays(Dtype::f32, c.sizes, 0)),
        table(c.weight, c.gradient, 0, c.sizes, groups, c.chunk),
        workspace(size_t(table.workspace_bytes()) + 64) {
    std::mt19937 random(1);
    for (size_t t = 0; t < c.sizes.size(); ++t) {
      weights[t].fill(random, 2);
      backups[t].fill(random, 100);  // rubbish
      gradients[t].fill(random, 0.5);
      momenta[t].fill(random, 1);
    }
    table.set(kWeight, "weight", addresses(weights), size_of(c.weight), true);
    table.set(kBackup, "backup", addresses(c.separate ? backups : weights), size_of(c.weight), true);
    std::vector<uintptr_t> momentum = addresses(momenta);
    for (size_t t = 0; t < groups.size(); ++t)
      if (kGroups[size_t(groups[t])].momentum == 0) momentum[t] = 0;
    table.set(kMomentum, "momentum", momentum, 4, true);
    table.set(kGradient, "gradient", addresses(gradients), size_of(c.gradient), false);
  }

  uintptr_t scratch() { return (reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64; }
  uintptr_t status_address() { return reinterpret_cast<uintptr_t>(&status); }
  void norm(bool scaled, bool carry = false, bool begin = true, bool finish = true) {
    table.norm(kGroups, status_address(), NormFlags{scaled, carry, begin, finish}, 1e-12, scratch(), 0);
  }
  double expected_norm(bool scaled) const {
    double sum = 0;
    for (size_t t = 0; t < c.sizes.size(); ++t) {
      const GroupOf<double>& h = kGroups[size_t(groups[t])];
      for (int64_t i = 0; i < c.sizes[t]; ++i) {
        const double scale = scaled && h.adaptive ? std::fabs(double(weights[t].get(i))) + h.eta : 1;
        sum += std::pow(scale * gradients[t].get(i), 2);
      }
    }
    return std::sqrt(sum);
  }
};

void check_step(const Case& c) {
  Rig rig(c);
  const auto original = copies(rig.weights);
  const double norm = rig.expected_norm(true);
  const double count = double(std::accumulate(c.sizes.begin(), c.sizes.end(), int64_t(0)));

  rig.norm(true);
  CHECK(std::fabs(rig.status.norm - norm) <= 1e-5 * norm);
  CHECK(rig.status.skip == 0 && std::fabs(rig.status.inverse * norm - 1) <= 1e-5);
  const float first = rig.status.norm;
  rig.norm(true);
  CHECK(rig.status.norm == first);  // bit for bit

  if (c.separate) {
    rig.table.perturb(kGroups, rig.status_address(), 0);
    CHECK(same(rig.backups, original));
    for (size_t t = 0; t < c.sizes.size(); ++t) {
      const GroupOf<double>& h = kGroups[size_t(rig.groups[t])];
      bool good = true;
      for (int64_t i = 0; i < c.sizes[t]; ++i) {
        const double w = rig.backups[t].get(i), scale = h.adaptive ? std::fabs(w) + h.eta : 1;
        const double e = h.rho * double(rig.status.inverse) * scale * scale * rig.gradients[t].get(i);
        good = good && near(rig.weights[t].get(i), w + e, c.weight, 4);
      }
      CHECK(good);
    }
  }

  rig.norm(false, true);
  CHECK(std::fabs(rig.status.update_norm - rig.expected_norm(false)) <= 1e-5 * rig.status.update_norm);
  CHECK(rig.status.norm == first && count > 0);

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
  rig.table.sgd(kGroups, {}, rig.status_address(), reinterpret_cast<uintptr_t>(&scale), 0);
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
        rig.table.perturb(kGroups, rig.status_address(), 0);
        CHECK(same(rig.backups, weights) && same(rig.weights, weights) == !second);
        poison(second ? bad : good);
        rig.norm(false, true);
        CHECK(rig.status.skip == 1);
        rig.table.sgd(kGroups, {}, rig.status_address(), 0, 0);
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
  rig.table.perturb(kGroups, rig.status_address(), 0);
  CHECK(same(rig.weights, weights));
}

void test_rates_on_the_device() {
  const float single = 0.1f;
  const double wide = 0.2;
  std::vector<GroupOf<double>> without = kGroups;
  for (GroupOf<double>& g : without) g.lr = 0;
  const std::vector<DeviceRate> rates = {{reinterpret_cast<uintptr_t>(&single), false},
                                         {reinterpret_cast<uintptr_t>(&wide), true}};
  const Case c{Dtype::f32, Dtype::f32, {300, 300}, 0};
  Rig by_number(c), by_address(c);
  by_number.norm(true), by_address.norm(true);
  by_number.table.sgd(kGroups, {}, by_number.status_address(), 0, 0);
  without.resize(2);
  by_address.table.sgd(without, rates, by_address.status_address(), 0, 0);
  CHECK(same(by_address.weights, copies(by_number.weights)));
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

// ---- P4 to P6 ---------------------------------------------------------------------------------------------

void test_lists() {
  const Sizes sizes = {33333, 0, 555, 1, 4096};
  for (int64_t chunk : {int64_t(333), int64_t(0)})
    for (const auto& [dx, dy] : std::vector<std::pair<Dtype, Dtype>>{{Dtype::f32, Dtype::f32},
                                                                    {Dtype::bf16, Dtype::bf16},
                                                                    {Dtype::f16, Dtype::f16},
                                                                    {Dtype::bf16, Dtype::f32},
                                                                    {Dtype::f32, Dtype::bf16},
                                                                    {Dtype::f16, Dtype::f32},
                                                                    {Dtype::f32, Dtype::f16}}) {
      Arrays x = arrays(dx, sizes, 0), y = arrays(dy, sizes, 0);
      std::mt19937 random(2);
      double xy = 0, xx = 0, yy = 0;
      for (size_t t = 0; t < sizes.size(); ++t) {
        x[t].fill(random, 1), y[t].fill(random, 3);
        for (int64_t i = 0; i < sizes[t]; ++i) {
          const double a = x[t].get(i), b = y[t].get(i);
          xy += a * b, xx += a * a, yy += b * b;
        }
      }
      CudaLists lists(dx, dy, 0, sizes, chunk);
      std::vector<char> workspace(size_t(lists.workspace_bytes()) + 64);
      const uintptr_t scratch = (reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64;
      float sums[3] = {1, 2, 3};
      lists.dots(addresses(x), addresses(y), reinterpret_cast<uintptr_t>(sums), true, scratch, 0);
      lists.dots(addresses(x), addresses(y), reinterpret_cast<uintptr_t>(sums), false, scratch, 0);
      const double loose = 1e-5 * std::sqrt(xx * yy);
      CHECK(std::fabs(sums[0] - 2 * xy) <= 2 * loose && std::fabs(sums[1] - 2 * xx) <= 1e-5 * 2 * xx &&
            std::fabs(sums[2] - 2 * yy) <= 1e-5 * 2 * yy);

      for (Dtype out_dtype : {dx, dy})
        for (int in_place = 0; in_place < 2; ++in_place) {
          Arrays third = arrays(out_dtype, sizes, 0);
          const auto before_x = copies(x), before_y = copies(y);
          Arrays& out = in_place ? (out_dtype == dx ? x : y) : third;
          std::vector<std::vector<double>> expected;
          for (size_t t = 0; t < sizes.size(); ++t) {
            expected.emplace_back();
            for (int64_t i = 0; i < sizes[t]; ++i) expected.back().push_back(0.75 * x[t].get(i) - 2.5 * y[t].get(i));
          }
          const float coefficients[2] = {0.75f, -2.5f};
          lists.combine(addresses(x), addresses(y), out_dtype, addresses(out),
                        in_place ? 0 : reinterpret_cast<uintptr_t>(coefficients), 0.75, -2.5, 0);
          bool good = true;
          for (size_t t = 0; t < sizes.size(); ++t)
            for (int64_t i = 0; i < sizes[t]; ++i)
              good = good && near(out[t].get(i), expected[t][size_t(i)], out_dtype, 12);
          CHECK(good);
          for (size_t t = 0; in_place && t < sizes.size(); ++t) {
            if (sizes[t] == 0) continue;
            std::memcpy(x[t].data(), before_x[t].data(), before_x[t].size());
            std::memcpy(y[t].data(), before_y[t].data(), before_y[t].size());
          }
        }
    }
  // A column whose coefficient is 0 counts for nothing, even where it is not finite.
  Arrays x = arrays(Dtype::f32, {3}, 0), y = arrays(Dtype::f32, {3}, 0);
  for (int64_t i = 0; i < 3; ++i) x[0].set(i, float(i)), y[0].set(i, i == 1 ? kNan : kInf);
  CudaLists lists(Dtype::f32, Dtype::f32, 0, {3}, 0);
  lists.combine(addresses(x), addresses(y), Dtype::f32, addresses(y), 0, 2, 0, 0);
  for (int64_t i = 0; i < 3; ++i) CHECK(y[0].get(i) == 2 * float(i));
}

// ---- bad input --------------------------------------------------------------------------------------------

void test_bad_input() {
  cuda_shim::Machine& machine = cuda_shim::machine();
  Rig rig({Dtype::f32, Dtype::f32, {100, 0, 50}, 0});
  const auto weights = copies(rig.weights);
  rig.norm(true);
  auto a = addresses(rig.weights);
  const auto set = [&] { rig.table.set(kWeight, "weight", a, 4, true); };
  machine.memory[a[2]] = {cudaMemoryTypeUnregistered, 0};
  CHECK_WORDS(set(), "the weight of tensor 2 is not in GPU memory");
  machine.memory[a[2]] = {cudaMemoryTypeDevice, 1};
  CHECK_WORDS(set(), "is on cuda:1, the table on cuda:0");
  machine.memory[a[2]] = {cudaMemoryTypeManaged, 0};
  set();
  machine.memory.clear();
  a[0] += 2;
  CHECK_WORDS(set(), "not a multiple of its element size");
  a[0] = 0;
  CHECK_WORDS(set(), "has no address");
  a.pop_back();
  CHECK_WORDS(set(), "an address is due for every tensor");
  CHECK_WORDS(rig.table.perturb({kGroups[0]}, rig.status_address(), 0), "group number is out of range");
  CHECK_WORDS(rig.table.perturb(kGroups, 0, 0), "the status has no address");
  CHECK_WORDS(rig.table.perturb(kGroups, rig.status_address() + 1, 0), "status is not a multiple");
  CHECK_WORDS(CudaTable(Dtype::f64, Dtype::f64, 0, {1}, {0}, 0), "no CUDA kernel for these dtypes");
  CHECK_WORDS(CudaTable(Dtype::f32, Dtype::bf16, 0, {1}, {0}, 0), "no CUDA kernel for these dtypes");
  CHECK_WORDS(CudaTable(Dtype::f32, Dtype::f32, 7, {1}, {0}, 0), "cudaErrorInvalidDevice");
  CHECK_WORDS(CudaTable(Dtype::f32, Dtype::f32, 0, {1}, {-1}, 0), "negative");
  CHECK_WORDS(CudaLists(Dtype::bf16, Dtype::f16, 0, {1}, 0), "no CUDA kernel for lists");
  machine.freed_stream = 0x1000;
  CHECK_WORDS(rig.table.perturb(kGroups, rig.status_address(), 0x1000),
               "kernel perturb (fp32 weights, fp32 gradients, 2 blocks) was not launched: cudaErrorInvalidResourceHandle");
  machine.freed_stream = 0;
  machine.next_launch = cudaErrorInvalidValue;
  CHECK_WORDS(rig.table.restore(0), "kernel restore");
  CHECK(same(rig.weights, weights));
}

void test_device_guard() {
  Rig rig({Dtype::f32, Dtype::f32, {100}, 0});
  cuda_shim::machine().current_device = 1;
  rig.norm(true);
  CHECK(cuda_shim::machine().current_device == 1);
  cuda_shim::machine().next_launch = cudaErrorInvalidValue;
  CHECK_WORDS(rig.norm(true), "kernel norm");
  CHECK(cuda_shim::machine().current_device == 1);
  cuda_shim::machine().current_device = 0;
}

void test_problems_in_words() {
  cuda_shim::Machine& machine = cuda_shim::machine();
  CHECK(cuda_problem().empty() && cuda_device_problem(0).empty());
  machine.driver = 0;
  CHECK(cuda_problem().find("no NVIDIA driver") != std::string::npos);
  machine.driver = 12020;
  machine.device_count_error = cudaErrorInsufficientDriver;
  CHECK(cuda_problem().find("driver knows CUDA 12.2 and fused_sam._cuda was built with 13.0") != std::string::npos);
  machine.device_count_error = cudaErrorNoDevice;
  CHECK(cuda_problem().find("no NVIDIA GPU is visible") != std::string::npos);
  machine.device_count_error = cudaSuccess;
  machine.driver = 13000;
  machine.kernel_image = cudaErrorNoKernelImageForDevice;
  CHECK(cuda_device_problem(0).find("no kernels for cuda:0, whose compute capability is 9.0") != std::string::npos);
  machine.kernel_image = cudaSuccess;
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
  test_parts_beyond_32_bits();
  test_lists();
  test_bad_input();
  test_device_guard();
  test_problems_in_words();
  return fused_sam_test::result();
}
