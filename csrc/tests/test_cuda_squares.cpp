// What the CUDA kernels' source does per tensor, on the host (cuda_shim/): sums of squares, factors, second moments.
#include <cmath>

#include "cuda_runtime.h"
#include "tests/check.h"
#include "tests/check_words.h"
#include "tests/cuda_rig.h"

using namespace fused_sam;
using namespace fused_sam_test;

namespace {

uintptr_t address(const std::vector<float>& numbers) { return reinterpret_cast<uintptr_t>(numbers.data()); }

struct Numbers {
  explicit Numbers(size_t tensors) {
    for (size_t t = 0; t < tensors; ++t) factors.push_back(0.25f * float(1 + t % 9)), unbias.push_back(1 + float(t % 5));
  }
  std::vector<float> factors, unbias;
};

// T_w^2 of an element. state[1] holds the second moments.
double scale_of(const Rig& rig, const Numbers& numbers, size_t t, int64_t i, double w, bool preconditioned) {
  const PerturbGroupOf<double>& h = kPerturbGroups[size_t(rig.group_ids[t])];
  if (preconditioned) return 1 / (std::sqrt(double(rig.state[1][t].get(i))) * numbers.unbias[t] + h.eta);
  return h.adaptive ? std::pow(std::fabs(w) + h.eta, 2) : 1;
}

void check_case(const Case& c, bool preconditioned) {
  Rig rig(c);
  Numbers numbers(c.sizes.size());
  rig.table.set_state(0, addresses(rig.state[1]));
  const uintptr_t unbias = preconditioned ? address(numbers.unbias) : 0;
  const size_t n = c.sizes.size();
  std::vector<float> sums(2 * n, 7.0f);
  rig.table.squares(kPerturbGroups, unbias, address(sums), true, rig.scratch(), 0);
  const Arrays& weights = c.has_masters() ? rig.masters : rig.params;
  std::vector<std::vector<double>> before(n);
  for (size_t t = 0; t < n; ++t) {
    double scaled = 0, of_weights = 0;
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double w = weights[t].get(i), g = rig.grads[t].get(i);
      before[t].push_back(w);
      scaled += scale_of(rig, numbers, t, i, w, preconditioned) * g * g;
      of_weights += w * w;
    }
    CHECK(std::fabs(sums[t] - scaled) <= 1e-5 * scaled);
    CHECK(std::fabs(sums[n + t] - of_weights) <= 1e-5 * of_weights);
  }
  const std::vector<float> first = sums;
  rig.table.squares(kPerturbGroups, unbias, address(sums), true, rig.scratch(), 0);
  CHECK(sums == first);  // bit for bit
  rig.norm(true);        // the ticket is 0 again

  rig.status.inverse_norm = 0.125f;
  rig.table.perturb(kPerturbGroups, rig.status_address(), 0, false, 0, address(numbers.factors), unbias);
  for (size_t t = 0; t < n; ++t) {
    bool good = true;
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double w = before[t][size_t(i)], rho = kPerturbGroups[size_t(rig.group_ids[t])].rho;
      const double e = rho * 0.125 * numbers.factors[t] * scale_of(rig, numbers, t, i, w, preconditioned) *
                       double(rig.grads[t].get(i));
      good = good && near(rig.params[t].get(i), w + e, c.param, 4 + std::fabs(e));
    }
    CHECK(good);
  }
}

void test_steps() {
  const Sizes sizes = {1, 7, 4097, 33, 333, 5000};
  for (bool preconditioned : {false, true}) {
    for (int64_t chunk : {int64_t(0), int64_t(333)})
      for (int64_t offset : {int64_t(0), int64_t(1)}) check_case({Dtype::f32, Dtype::f32, sizes, chunk, offset}, preconditioned);
    for (Dtype low : {Dtype::bf16, Dtype::f16}) {
      check_case({low, low, sizes, 333}, preconditioned);
      check_case({low, Dtype::f32, sizes, 0, 0, true, Dtype::f32}, preconditioned);
    }
    Sizes many;
    for (int64_t t = 0; t < 700; ++t) many.push_back(1 + t % 50);  // several launches
    check_case({Dtype::f32, Dtype::f32, many}, preconditioned);
  }
}

void test_bad_input() {
  Rig rig({Dtype::f32, Dtype::f32, {5, 3}});
  Numbers numbers(2);
  std::vector<float> sums(4);
  const uintptr_t to = address(sums), scratch = rig.scratch(), status = rig.status_address();
  CHECK_WORDS(rig.table.squares(kPerturbGroups, 0, 0, false, scratch, 0), "sums has no address");
  CHECK_WORDS(rig.table.squares(kPerturbGroups, 0, to + 1, false, scratch, 0), "sums is not a multiple");
  CHECK_WORDS(rig.table.squares({}, 0, to, false, scratch, 0), "group number is out of range");
  CHECK_WORDS(rig.table.perturb(kPerturbGroups, status, 0, false, 0, address(numbers.factors) + 2), "factors is not");
  rig.table.set_state(0, {0, 0});
  const uintptr_t unbias = address(numbers.unbias);
  CHECK_WORDS(rig.table.squares(kPerturbGroups, unbias, to, false, scratch, 0), "lacks Adam's second moment");
  CHECK_WORDS(rig.table.perturb(kPerturbGroups, status, 0, false, 0, 0, unbias), "lacks Adam's second moment");
  rig.table.set_state(0, addresses(rig.state[1]));
  auto masked = kPerturbGroups;
  masked[0].mask_prob = 0.5;
  CHECK_WORDS(rig.table.perturb(masked, status, 0, false, 0, 0, unbias), "has no mask");
  Rig empty({Dtype::f32, Dtype::f32, {5, 0}});
  CHECK_WORDS(empty.table.squares(kPerturbGroups, 0, to, false, empty.scratch(), 0), "has no empty tensors");
}

}  // namespace

int main() {
  test_steps();
  test_bad_input();
  return fused_sam_test::result();
}
