// Tests of what the CPU table does per tensor: sums of squares, factors, and T_w of the second moments.
#define FUSED_SAM_ONLY_GENERIC
#define FUSED_SAM_ISA generic
#include "cpu/kernels.cpp"
#include "cpu/table.cpp"
#include "cpu/dispatch.cpp"

#include <cmath>

#include "cpu/vectors.h"
#include "tests/check.h"

using namespace fused_sam;

namespace {

const std::vector<int64_t> kSizes = {3, 7, 1023, 1025, 16385, 1, 70001};
const std::vector<int32_t> kGroups = {0, 1, 0, 1, 0, 1, 0};
const std::vector<PerturbGroup> kPerturb = {{0.5, 0.25, 1, false}, {2.0, 0.5, 1, true}};

// Params, gradients and second moments in heap blocks of exact sizes, so that the sanitizer detects each access past an
// end. With masters the params are bf16.
struct Model {
  explicit Model(bool masters)
      : table(masters ? Dtypes(Dtype::bf16, Dtype::f32, Dtype::f32) : Dtypes(Dtype::f32, Dtype::f32), kSizes, kGroups) {
    for (size_t i = 0; i < kSizes.size(); ++i) {
      const size_t n = size_t(kSizes[i]);
      low.emplace_back(n);
      for (auto* column : {&weights, &backups, &grads, &moments}) column->emplace_back(n);
      for (size_t k = 0; k < n; ++k) {
        weights[i][k] = 1 - float(k % 5) / 4, grads[i][k] = float(k % 3) - 0.5f, moments[i][k] = float(k % 7) / 8;
      }
      factors.push_back(0.5 + double(i)), unbias.push_back(1 + 0.25 * double(i));
      Entry& e = table.entries()[i];
      e.param = masters ? static_cast<void*>(low[i].data()) : weights[i].data();
      e.master = masters ? weights[i].data() : nullptr;
      e.backup = masters ? nullptr : backups[i].data();
      e.grad = grads[i].data();
      e.state[0] = moments[i].data();
    }
  }

  // T_w^2 of an element, whose weight is w.
  double scale(size_t i, size_t k, double w, bool preconditioned) const {
    const PerturbGroup& h = kPerturb[size_t(kGroups[i])];
    if (preconditioned) return 1 / (std::sqrt(double(moments[i][k])) * unbias[i] + h.eta);
    return h.adaptive ? std::pow(std::fabs(w) + h.eta, 2) : 1;
  }

  Table table;
  std::vector<std::vector<bf16>> low;
  std::vector<std::vector<float>> weights, backups, grads, moments;
  std::vector<double> factors, unbias;
};

bool near(double found, double expected) { return std::fabs(found - expected) <= 1e-6 * (1 + std::fabs(expected)); }

void test_squares() {
  for (bool masters : {false, true})
    for (bool preconditioned : {false, true})
      for (int threads : {1, 3}) {
        Model model(masters);
        std::vector<double> sums(2 * kSizes.size(), 7.0);
        const double* unbias = preconditioned ? model.unbias.data() : nullptr;
        model.table.squares(kPerturb, unbias, sums.data(), true, threads);
        for (size_t i = 0; i < kSizes.size(); ++i) {
          double scaled = 0, of_weights = 0;
          for (size_t k = 0; k < model.grads[i].size(); ++k) {
            const double w = model.weights[i][k], g = model.grads[i][k];
            scaled += model.scale(i, k, w, preconditioned) * g * g;
            of_weights += w * w;
          }
          CHECK(near(sums[i], scaled));
          CHECK(near(sums[kSizes.size() + i], of_weights));
        }
        std::vector<double> first(kSizes.size(), 7.0);
        model.table.squares(kPerturb, unbias, first.data(), false, 1);  // writes one number per tensor
        CHECK(std::equal(first.begin(), first.end(), sums.begin()));
        Status status{};
        model.table.accumulate_norm(nullptr, status, true, 1);  // the table's other sums are as before
        CHECK(status.sum_of_squares > 0);
      }
}

void test_perturb() {
  for (bool masters : {false, true})
    for (bool preconditioned : {false, true}) {
      Model model(masters);
      const auto before = model.weights;
      Status status{};
      status.inverse_norm = 0.125;
      model.table.perturb(kPerturb, status, 2, model.factors.data(), preconditioned ? model.unbias.data() : nullptr);
      for (size_t i = 0; i < kSizes.size(); ++i)
        for (size_t k = 0; k < before[i].size(); ++k) {
          const double rho = kPerturb[size_t(kGroups[i])].rho, w = before[i][k];
          const double e = rho * 0.125 * model.factors[i] * model.scale(i, k, w, preconditioned) * double(model.grads[i][k]);
          const double found = masters ? double(widen(model.low[i][k])) : double(model.weights[i][k]);
          CHECK(std::fabs(found - (w + e)) <= (masters ? 0x1p-8 : 1e-6) * (1 + std::fabs(w + e)));  // of bf16 or fp32
        }
    }
}

void test_bad_arguments_throw() {
  Model model(false);
  Status status{};
  std::vector<double> sums(2 * kSizes.size());
  CHECK_THROWS(model.table.squares({kPerturb[0]}, nullptr, sums.data(), false, 1), std::out_of_range);
  auto masked = kPerturb;
  masked[0].mask_prob = 0.5;
  model.table.set_rng(1, std::vector<uint32_t>(kSizes.size()), false);
  CHECK_THROWS(model.table.perturb(masked, status, 1, nullptr, model.unbias.data()), std::invalid_argument);
  model.table.entries()[2].state[0] = nullptr;
  CHECK_THROWS(model.table.squares(kPerturb, model.unbias.data(), sums.data(), false, 1), std::invalid_argument);
  CHECK_THROWS(model.table.perturb(kPerturb, status, 1, nullptr, model.unbias.data()), std::invalid_argument);
}

}  // namespace

int main() {
  test_squares();
  test_perturb();
  test_bad_arguments_throw();
  return fused_sam_test::result();
}
