// Tests of the CPU primitives on tables and vectors, with the generic kernels, under sanitizers.
#define FUSED_SAM_ONLY_GENERIC
#define FUSED_SAM_ISA generic
#include "cpu/kernels.cpp"
#include "cpu/table.cpp"
#include "cpu/vectors.cpp"
#include "cpu/dispatch.cpp"

#include <cmath>
#include <memory>

#include "tests/check.h"

using namespace fused_sam;

namespace {

// The tensors of one table, in heap blocks of exact sizes, so that the sanitizer detects each access past an end.
// They have one buffer of state, which starts as -0.0.
template <class T>
struct Model {
  using R = typename Arithmetic<T>::type;

  Model(std::vector<int64_t> sizes, const std::vector<int32_t>& group_ids, Dtypes dtypes)
      : sizes_(sizes), table(dtypes, std::move(sizes), group_ids) {
    for (size_t i = 0; i < sizes_.size(); ++i) {
      const size_t n = size_t(sizes_[i]);
      params.push_back(std::vector<T>(n));
      backups.push_back(std::vector<T>(n));
      grads.push_back(std::vector<T>(n));
      state.push_back(std::vector<R>(n, R(-0.0)));
      for (size_t k = 0; k < n; ++k) {
        params[i][k] = Narrow<T, R>::of(R(1) + R(k % 5) / 4);
        grads[i][k] = Narrow<T, R>::of(R(k % 3) - R(0.5));
      }
      Entry& e = table.entries()[i];
      e.param = params[i].data();
      e.backup = backups[i].data();
      e.grad = grads[i].data();
      e.state[0] = state[i].data();
    }
  }

  double squares() const {
    double sum = 0;
    for (const auto& g : grads)
      for (T x : g) sum += double(widen(x)) * double(widen(x));
    return sum;
  }

  std::vector<int64_t> sizes_;
  Table table;
  std::vector<std::vector<T>> params, backups, grads;
  std::vector<std::vector<R>> state;
};

template <class T>
bool same(const std::vector<std::vector<T>>& a, const std::vector<std::vector<T>>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!a[i].empty() && std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(T)) != 0) return false;
  return true;
}

using PerturbGroups = std::vector<PerturbGroup>;

PerturbGroup perturb_group(double rho) { return {rho, 0, 1, false}; }
SgdGroup sgd_group(double lr, double momentum) { return {lr, momentum, 1, 0, 1, false}; }

// Take the norm of one table, for perturb if groups is given and for the update if it is null.
void norm(Table& table, const PerturbGroups* groups, Status& status, bool keep_skip, double eps, int threads) {
  table.accumulate_norm(groups, status, true, threads);
  finish_norm(status, eps, {groups != nullptr, keep_skip});
}

const std::vector<int64_t> kSizes = {0, 7, 0, 1023, 1025, 16385, 40000, 0, 1, 70001, 0};
const std::vector<int32_t> kGroups = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0};
const PerturbGroups kPerturb = {perturb_group(0.5), perturb_group(2.0)};
const std::vector<SgdGroup> kSgd = {sgd_group(0.25, 0.0), sgd_group(0.5, 0.5)};

template <class T>
void test_a_step(Dtypes dtypes, double tolerance) {
  for (int threads : {1, 2, 3}) {
    Model<T> model(kSizes, kGroups, dtypes);
    const auto before = model.params;
    Status status{};
    norm(model.table, &kPerturb, status, false, 0.0, threads);
    CHECK(status.skip == 0);
    CHECK(std::fabs(status.ascent_norm - std::sqrt(model.squares())) <= 1e-9 * status.ascent_norm);
    model.table.perturb(kPerturb, status, threads);
    CHECK(same(model.backups, before));
    double worst = 0;
    for (size_t i = 0; i < kSizes.size(); ++i)
      for (size_t k = 0; k < before[i].size(); ++k) {
        const double expected = double(widen(before[i][k])) + kPerturb[size_t(kGroups[i])].rho / status.ascent_norm *
                                                                  double(widen(model.grads[i][k]));
        worst = std::fmax(worst, std::fabs(double(widen(model.params[i][k])) - expected));
      }
    CHECK(worst <= tolerance);

    norm(model.table, nullptr, status, true, 0.0, threads);
    CHECK(std::fabs(status.update_norm - status.ascent_norm) <= 1e-9 * status.ascent_norm);
    model.table.sgd(kSgd, status, INFINITY, threads);
    worst = 0;
    for (size_t i = 0; i < kSizes.size(); ++i)
      for (size_t k = 0; k < before[i].size(); ++k) {
        const double g = double(widen(model.grads[i][k]));
        const double expected = double(widen(before[i][k])) - kSgd[size_t(kGroups[i])].lr * g;
        worst = std::fmax(worst, std::fabs(double(widen(model.params[i][k])) - expected));
        if (kGroups[i] == 1) CHECK(double(model.state[i][k]) == g);
        if (kGroups[i] == 0) CHECK(is_negative_zero(model.state[i][k]));
      }
    CHECK(worst <= tolerance);

    model.table.restore(threads);
    CHECK(same(model.params, before));
  }
}

// The sum is of T_w g for an adaptive group, and of g if the norm has no groups.
void test_the_norm_of_adaptive_groups() {
  Model<double> model({3}, {0}, {Dtype::f64, Dtype::f64});
  const PerturbGroups groups = {{1.0, 0.5, 1.0, true}};
  Status status{};
  double expected = 0;
  for (size_t k = 0; k < 3; ++k) expected += std::pow((model.params[0][k] + 0.5) * model.grads[0][k], 2);
  model.table.accumulate_norm(&groups, status, true, 1);
  CHECK(std::fabs(status.sum_of_squares - expected) <= 1e-15);
  model.table.accumulate_norm(nullptr, status, false, 1);
  CHECK(std::fabs(status.sum_of_squares - expected - model.squares()) <= 1e-15);
}

void test_gradients_that_are_not_finite_change_nothing() {
  for (double bad : {double(INFINITY), -double(INFINITY), std::nan("")})
    for (int64_t at : {int64_t(0), int64_t(31), int64_t(16384), int64_t(70000)}) {
      Model<float> model(kSizes, kGroups, {Dtype::f32, Dtype::f32});
      const auto before = model.params;
      const auto state = model.state;
      model.grads[9][size_t(at)] = float(bad);
      Status status{};
      norm(model.table, &kPerturb, status, false, 1e-12, 2);
      CHECK(status.skip != 0 && status.inverse_norm == 0);
      model.table.perturb(kPerturb, status, 2);
      CHECK(same(model.params, before) && same(model.backups, before));
      model.grads[9][size_t(at)] = 1.0f;
      norm(model.table, nullptr, status, true, 1e-12, 2);
      CHECK(status.skip != 0);  // the skip of the first pass is kept
      model.table.sgd(kSgd, status, INFINITY, 2);
      CHECK(same(model.params, before) && same(model.state, state));
      norm(model.table, nullptr, status, false, 1e-12, 2);
      CHECK(status.skip == 0);
    }
}

void test_a_param_that_is_its_own_backup() {
  Model<float> model({5, 20000}, {0, 0}, {Dtype::f32, Dtype::f32});
  const auto before = model.params;
  for (Entry& e : model.table.entries()) e.backup = e.param;
  Status status{};
  model.table.restore(2);
  CHECK(same(model.params, before));
  model.table.sgd({sgd_group(0.5, 0)}, status, INFINITY, 2);
  for (size_t i = 0; i < before.size(); ++i)
    for (size_t k = 0; k < before[i].size(); ++k)
      CHECK(model.params[i][k] == before[i][k] - 0.5f * model.grads[i][k]);
  status.skip = 1;
  const auto now = model.params;
  model.table.sgd({sgd_group(0.5, 0)}, status, INFINITY, 2);
  CHECK(same(model.params, now));
}

void test_the_norm_does_not_depend_on_threads() {
  Status first{};
  for (int threads : {1, 2, 3, 5, 8}) {
    Model<float> model(kSizes, kGroups, {Dtype::f32, Dtype::f32});
    Status status{};
    model.table.accumulate_norm(&kPerturb, status, true, threads);
    if (threads == 1) first = status;
    CHECK(std::memcmp(&status.sum_of_squares, &first.sum_of_squares, sizeof(double)) == 0);
  }
}

void test_the_norm_spans_tables() {
  Model<float> a({4}, {0}, {Dtype::f32, Dtype::f32}), empty({0, 0}, {0, 0}, {Dtype::f32, Dtype::f32});
  Model<double> b({4}, {0}, {Dtype::f64, Dtype::f64});
  const PerturbGroups groups = {perturb_group(1)};
  Status status{};
  status.sum_of_squares = 100;  // from an earlier norm
  a.table.accumulate_norm(&groups, status, true, 1);
  b.table.accumulate_norm(&groups, status, false, 1);
  empty.table.accumulate_norm(&groups, status, false, 1);
  finish_norm(status, 0.0, {true, false});
  CHECK(std::fabs(status.ascent_norm - std::sqrt(a.squares() + b.squares())) < 1e-12);
  empty.table.perturb(groups, status, 4);
  empty.table.sgd({sgd_group(1, 0)}, status, INFINITY, 4);
  empty.table.restore(4);
}

void test_low_precision_params_with_fp32_gradients() {
  const Dtypes dtypes = {Dtype::bf16, Dtype::f32};
  Table table(dtypes, {1030}, {0});
  std::vector<bf16> param(1030, Narrow<bf16, float>::of(1.0f)), backup(1030);
  std::vector<float> grad(1030, 0.25f);
  Entry& e = table.entries()[0];
  e.param = param.data();
  e.backup = backup.data();
  e.grad = grad.data();
  Status status{};
  const PerturbGroups groups = {perturb_group(0)};
  norm(table, &groups, status, false, 0.0, 1);
  CHECK(std::fabs(status.ascent_norm - 0.25 * std::sqrt(1030.0)) < 1e-9);
  table.perturb(groups, status, 1);
  table.sgd({sgd_group(1, 0)}, status, INFINITY, 1);
  for (bf16 w : param) CHECK(widen(w) == 0.75f);
}

// fp32 masters with bf16 params and gradients: each primitive writes the right tensors, and a skip keeps the masters.
void test_masters() {
  const int64_t n = 20001;
  Table table({Dtype::bf16, Dtype::bf16, Dtype::f32}, {n}, {0});
  std::vector<float> master(n), momentum_buffer(n, -0.0f);
  std::vector<bf16> grad(n), param(n);
  for (size_t k = 0; k < size_t(n); ++k) {
    master[k] = 1.0f + float(k) * 0x1p-16f;  // finer than bf16
    grad[k] = Narrow<bf16, float>::of(float(int(k % 7) - 3));
  }
  Entry& e = table.entries()[0];
  e.master = master.data(), e.param = param.data(), e.grad = grad.data(), e.state[0] = momentum_buffer.data();
  const std::vector<float> before = master;
  const PerturbGroups perturb = {perturb_group(0.5)};
  const std::vector<SgdGroup> groups = {sgd_group(0.25, 0.5)};
  const auto param_is = [&](auto&& of) {
    int wrong = 0;
    for (size_t k = 0; k < size_t(n); ++k) wrong += param[k].bits != Narrow<bf16, float>::of(of(k)).bits;
    return wrong == 0;
  };
  Status status{};
  status.skip = 1;
  table.perturb(perturb, status, 2);
  CHECK(param_is([](size_t) { return 0.0f; }));
  table.sgd(groups, status, INFINITY, 2);
  CHECK(param_is([&](size_t k) { return master[k]; }) && master == before && is_negative_zero(momentum_buffer[n - 1]));
  status.skip = 0;
  status.inverse_norm = 0.25;
  table.perturb(perturb, status, 2);
  CHECK(param_is([&](size_t k) { return before[k] + 0.125f * widen(grad[k]); }) && master == before);
  table.restore(2);
  CHECK(param_is([&](size_t k) { return before[k]; }));
  table.sgd(groups, status, INFINITY, 2);
  CHECK(param_is([&](size_t k) { return before[k] - 0.25f * widen(grad[k]); }));
  CHECK(master[5] == before[5] - 0.25f * widen(grad[5]) && momentum_buffer[5] == widen(grad[5]));
}

void test_adam_counts_each_tensors_steps() {
  Model<float> model({3, 17000}, {0, 0}, {Dtype::f32, Dtype::f32});
  std::vector<std::vector<float>> exp_avg_sqs = {std::vector<float>(3), std::vector<float>(17000)};
  float steps[2] = {0, 6};
  std::vector<AdamGroup> groups = {AdamGroup{}};
  groups[0].lr = 0.5, groups[0].factor = 1;
  groups[0].one_minus_beta1 = groups[0].one_minus_beta2 = 0.5, groups[0].beta2 = 0.5;
  groups[0].log_beta1 = groups[0].log_beta2 = std::log(0.5);
  Status status{};
  CHECK_THROWS(model.table.adam(groups, status, INFINITY, 2), std::invalid_argument);  // the table has no state yet
  for (size_t i = 0; i < 2; ++i) {
    Entry& e = model.table.entries()[i];
    e.backup = e.param, e.state[1] = exp_avg_sqs[i].data(), e.step = &steps[i];
    for (float& m : model.state[i]) m = 0;
  }
  groups[0].amsgrad = true;
  CHECK_THROWS(model.table.adam(groups, status, INFINITY, 2), std::invalid_argument);  // no max_exp_avg_sq yet
  CHECK(steps[0] == 0 && steps[1] == 6);
  groups[0].amsgrad = false;
  const auto before = model.params;
  status.skip = 1;
  model.table.adam(groups, status, INFINITY, 2);
  model.table.restore(2);
  CHECK(same(model.params, before) && steps[0] == 0 && steps[1] == 6);
  status.skip = 0;
  model.table.adam(groups, status, INFINITY, 2);
  CHECK(steps[0] == 1 && steps[1] == 7);
  double worst = 0;
  for (size_t i = 0; i < 2; ++i)
    for (size_t k = 0; k < before[i].size(); ++k) {
      const double g = model.grads[i][k], t = steps[i], correction = 1 - std::pow(0.5, t);
      const double expected = before[i][k] - 0.5 / correction * (0.5 * g) / std::sqrt(0.5 * g * g / correction);
      worst = std::fmax(worst, std::fabs(model.params[i][k] - expected));
    }
  CHECK(worst <= 1e-6);
}

template <class T>
void test_lion(Dtypes dtypes, double tolerance) {
  const std::vector<int64_t> sizes = {7, 1025, 16385, 1, 70001};
  const std::vector<int32_t> ids = {0, 1, 0, 1, 1};
  for (int threads : {1, 3}) {
    Model<T> model(sizes, ids, dtypes);
    std::vector<LionGroupOf<double>> groups(2);
    groups[0] = {0.25, 0.25, 0.5, 0.5, 1.0};   // lr, 1 - beta1, 1 - beta2, weight_decay, factor
    groups[1] = {0.5, 0.75, 0.125, 0.0, -2.0};  // maximize, with a loss scale of 1 / 2
    for (auto& m : model.state)
      for (size_t k = 0; k < m.size(); ++k) m[k] = typename Model<T>::R(0.25 * double(k % 7) - 0.75);
    const auto state = model.state;
    model.backups = model.params;
    Status status{};
    status.skip = 1;
    model.table.template element<Lion>(groups, status, INFINITY, threads);
    CHECK(same(model.params, model.backups) && same(model.state, state));
    status.skip = 0;
    model.table.template element<Lion>(groups, status, INFINITY, threads);
    double worst = 0;
    for (size_t i = 0; i < sizes.size(); ++i)
      for (size_t k = 0; k < model.params[i].size(); ++k) {
        const LionGroupOf<double>& h = groups[size_t(ids[i])];
        const double d = h.factor * double(widen(model.grads[i][k])), m = double(state[i][k]);
        const double c = (1 - h.one_minus_beta1) * m + h.one_minus_beta1 * d;  // exact, and therefore of the right sign
        const double sign = double(c > 0) - double(c < 0), w = double(widen(model.backups[i][k]));
        const double expected = w - h.lr * (sign + h.weight_decay * w);
        worst = std::fmax(worst, std::fabs(double(widen(model.params[i][k])) - expected));
        const double mean = (1 - h.one_minus_beta2) * m + h.one_minus_beta2 * d;
        worst = std::fmax(worst, std::fabs(double(model.state[i][k]) - mean));
      }
    CHECK(worst <= tolerance);
    model.table.entries()[4].state[0] = nullptr;
    CHECK_THROWS(model.table.template element<Lion>(groups, status, INFINITY, threads), std::invalid_argument);
  }
}

// Updates clip their gradients by the norm in the status, as in torch.
void test_clipping() {
  Model<double> model({5}, {0}, {Dtype::f64, Dtype::f64});
  std::vector<SgdGroup> groups = {sgd_group(0.5, 0)};
  groups[0].factor = -0.25;  // maximize, with a loss scale of 4
  const auto before = model.params;
  model.backups = before;
  Status status{};
  status.update_norm = 32;
  model.table.sgd(groups, status, 2.0, 1);
  for (size_t k = 0; k < 5; ++k)
    CHECK(std::fabs(model.params[0][k] - (before[0][k] + 0.5 * 0.25 * 0.25 * model.grads[0][k])) <= 1e-7);
}

// Elements and their random numbers do not depend on chunks, tiles or threads.
void test_random_numbers() {
  const int64_t n = 40001;
  for (int threads : {1, 3}) {
    Model<bf16> model({5, n}, {0, 0}, {Dtype::bf16, Dtype::bf16});
    const PerturbGroups groups = {{1.0, 0.0, 0.25, false}};
    Status status{};
    status.inverse_norm = 0.125;
    status.rng_offset = 9;
    CHECK_THROWS(model.table.perturb(groups, status, threads), std::invalid_argument);  // the table has no rng_streams
    CHECK_THROWS(model.table.set_rng(1, {2}, true), std::invalid_argument);
    model.table.set_rng(77, {3, 4}, true);
    const auto before = model.params;
    model.table.perturb(groups, status, threads);
    const StreamKey mask = stream_key(77, 9, 4, Draw::mask), round = stream_key(77, 9, 4, Draw::round_perturbed);
    int wrong = 0;
    for (int64_t k = 0; k < n; ++k) {
      const bf16 w = before[1][size_t(k)];
      const float e = in_mask(word(mask, k), 0.25f) ? 0.5f * widen(model.grads[1][size_t(k)]) : 0.0f;
      wrong += model.params[1][size_t(k)].bits != AtRandom<bf16>::of(widen(w) + e, word(round, k)).bits;
    }
    CHECK(wrong == 0);

    model.backups = before;
    LionGroupOf<double> lion{};
    lion.lr = 0.01, lion.one_minus_beta1 = 1, lion.factor = 1;
    model.table.template element<Lion>({lion}, status, INFINITY, threads);
    const StreamKey updated = stream_key(77, 9, 4, Draw::round_updated);
    for (int64_t k = 0; k < n; ++k) {
      const float sign = widen(model.grads[1][size_t(k)]) > 0 ? 1.0f : -1.0f;
      const float w = widen(before[1][size_t(k)]) - 0.01f * sign;
      wrong += model.params[1][size_t(k)].bits != AtRandom<bf16>::of(w, word(updated, k)).bits;
    }
    CHECK(wrong == 0);
  }
}

void test_vectors() {
  const std::vector<int64_t> sizes = {7, 0, 20001};
  for (int threads : {1, 3}) {
    std::vector<std::vector<float>> x, out;
    std::vector<std::vector<bf16>> y;
    Vector vx{Dtype::f32, {}}, vy{Dtype::bf16, {}}, vout{Dtype::f32, {}};
    double xy = 0, xx = 0, yy = 0;
    for (int64_t size : sizes) {
      x.emplace_back(size_t(size)), y.emplace_back(size_t(size)), out.emplace_back(size_t(size));
      for (size_t k = 0; k < size_t(size); ++k) {
        const float a = float(int(k % 5) - 2), b = float(int(k % 3) - 1) / 2;
        x.back()[k] = a, y.back()[k] = Narrow<bf16, float>::of(b);
        xy += double(a * b), xx += double(a * a), yy += double(b * b);
      }
      vx.data.push_back(x.back().data()), vy.data.push_back(y.back().data()), vout.data.push_back(out.back().data());
    }
    VectorPair pair(sizes);
    double sums[3] = {100, 100, 100};
    pair.dot(vx, vy, sums, true, threads);
    CHECK(sums[0] == xy && sums[1] == xx && sums[2] == yy);
    pair.dot(vx, vy, sums, false, threads);
    CHECK(sums[0] == 2 * xy && sums[1] == 2 * xx && sums[2] == 2 * yy);
    pair.axpby(vx, vy, vout, 2.0, -0.5, threads);
    int wrong = 0;
    for (size_t i = 0; i < sizes.size(); ++i)
      for (size_t k = 0; k < x[i].size(); ++k) wrong += out[i][k] != 2 * x[i][k] - 0.5f * widen(y[i][k]);
    CHECK(wrong == 0);
    vy.data.pop_back();
    CHECK_THROWS(pair.dot(vx, vy, sums, true, threads), std::invalid_argument);
    CHECK_THROWS(pair.axpby(vx, vx, vy, 1, 1, threads), std::invalid_argument);
  }
}

void test_bad_arguments_throw() {
  CHECK_THROWS(Table({Dtype::f32, Dtype::f64}, {1}, {0}), std::invalid_argument);
  CHECK_THROWS(Table({Dtype::f32, Dtype::bf16}, {1}, {0}), std::invalid_argument);
  CHECK_THROWS(Table({Dtype::bf16, Dtype::f16, Dtype::f32}, {1}, {0}), std::invalid_argument);
  CHECK_THROWS(Table({Dtype::bf16, Dtype::f32, Dtype::f64}, {1}, {0}), std::invalid_argument);
  CHECK_THROWS(Table({Dtype::f64, Dtype::f32, Dtype::f32}, {1}, {0}), std::invalid_argument);
  CHECK_THROWS(Table({Dtype::f32, Dtype::f32}, {1, 2}, {0}), std::invalid_argument);
  CHECK_THROWS(Table({Dtype::f32, Dtype::f32}, {-1}, {0}), std::invalid_argument);
  Model<float> model({3}, {1}, {Dtype::f32, Dtype::f32});
  Status status{};
  const PerturbGroups groups = {perturb_group(1)};
  CHECK_THROWS(model.table.accumulate_norm(&groups, status, true, 1), std::out_of_range);
  CHECK_THROWS(model.table.perturb(groups, status, 1), std::out_of_range);
  CHECK_THROWS(model.table.sgd({sgd_group(1, 0)}, status, INFINITY, 1), std::out_of_range);
  CHECK_THROWS(model.table.adam({AdamGroup{}}, status, INFINITY, 1), std::out_of_range);
  CHECK_THROWS(model.table.template element<Lion>({LionGroupOf<double>{}}, status, INFINITY, 1), std::out_of_range);
  CHECK_THROWS(use_kernels("sse9"), std::invalid_argument);
  CHECK(usable_kernels() == std::vector<std::string>({"generic"}));
}

}  // namespace

int main() {
  test_a_step<float>({Dtype::f32, Dtype::f32}, 2e-6);
  test_a_step<double>({Dtype::f64, Dtype::f64}, 1e-14);
  test_a_step<bf16>({Dtype::bf16, Dtype::bf16}, 0x1p-7);  // half an ulp of numbers below 4
  test_a_step<f16>({Dtype::f16, Dtype::f16}, 0x1p-10);
  test_the_norm_of_adaptive_groups();
  test_gradients_that_are_not_finite_change_nothing();
  test_a_param_that_is_its_own_backup();
  test_the_norm_does_not_depend_on_threads();
  test_the_norm_spans_tables();
  test_low_precision_params_with_fp32_gradients();
  test_masters();
  test_adam_counts_each_tensors_steps();
  test_lion<float>({Dtype::f32, Dtype::f32}, 1e-6);
  test_lion<double>({Dtype::f64, Dtype::f64}, 1e-14);
  test_lion<bf16>({Dtype::bf16, Dtype::bf16}, 0x1p-7);
  test_clipping();
  test_random_numbers();
  test_vectors();
  test_bad_arguments_throw();
  return fused_sam_test::result();
}
