// The per-element formulas equal numbers computed by hand. A momentum of -0.0 has its initial value.
#include "core/formulas.h"

#include <cmath>
#include <initializer_list>
#include <limits>

#include "tests/check.h"

using namespace fused_sam;

namespace {

SgdGroupOf<double> sgd_group() {
  SgdGroupOf<double> h{};
  h.lr = 0.5;
  h.momentum = 0.25;
  h.one_minus_dampening = 1;
  h.factor = 1;
  return h;
}

void test_inverse_norm() {
  CHECK(inverse_norm<double>(3, 1) == 0.25);
  CHECK(inverse_norm<float>(0.5f, 0.0f) == 2.0f);
  // A gradient of zero, and one with a norm below 1e-30, have no direction.
  CHECK(inverse_norm<double>(0, 0) == 0);
  CHECK(inverse_norm<float>(0, 0) == 0);
  CHECK(inverse_norm<double>(1e-31, 0) == 0);
  CHECK(inverse_norm<double>(0, 1e-12) == 1e12);  // the factor of a gradient of zero
  CHECK(inverse_norm<double>(std::numeric_limits<double>::infinity(), 0) == 0);
  CHECK(inverse_norm<double>(std::nan(""), 0) == 0);
}

void test_negative_zero() {
  CHECK(is_negative_zero(-0.0f) && is_negative_zero(-0.0));
  CHECK(!is_negative_zero(0.0f) && !is_negative_zero(0.0));
  CHECK(!is_negative_zero(-std::numeric_limits<float>::denorm_min()));
  CHECK(!is_negative_zero(std::nanf("")));
}

void test_perturbation() {
  CHECK(weight_scale<false>(-3.0, 0.5) == 1.0);
  CHECK(weight_scale<true>(-3.0, 0.5) == 3.5);
  CHECK(weight_scale<true>(3.0f, 0.5f) == 3.5f);
  CHECK(scaled_gradient<false>(-3.0, 2.0, 0.5) == 2.0);
  CHECK(scaled_gradient<true>(-3.0, 2.0, 0.5) == 7.0);
  CHECK(perturbed<false>(1.0, 2.0, 0.25, 9.0) == 1.5);
  CHECK(perturbed<true>(-3.0, 2.0, 0.5, 1.0) == -3.0 + 0.5 * 16 * 2);
  CHECK(preconditioner(4.0, 1.5, 1.0) == 0.25);
  CHECK(preconditioner(0.0f, 1.5f, 0.5f) == 2.0f);
  // T is multiplied twice, because its square would overflow and T * (T * g) does not.
  CHECK(std::isfinite(perturbed<true>(1e25f, 1e-30f, 1.0f, 0.0f)));
}

void test_sgd_without_momentum() {
  SgdGroupOf<double> h = sgd_group();
  h.weight_decay = 0.5;
  CHECK(sgd_gradient(4.0, 3.0, h) == 5.0);
  h.factor = -0.5;  // maximize, with a loss scale of 2
  CHECK(sgd_gradient(4.0, 3.0, h) == 0.5);
  CHECK(sgd_weight<false>(4.0, 5.0, 5.0, h) == 1.5);
}

void test_sgd_momentum() {
  SgdGroupOf<double> h = sgd_group();
  CHECK(sgd_momentum<false>(-0.0, 8.0, h) == 8.0);
  CHECK(sgd_momentum<false>(4.0, 8.0, h) == 9.0);
  h.one_minus_dampening = 0.5;
  CHECK(sgd_momentum<true>(-0.0, 8.0, h) == 8.0);  // the first gradient is not dampened
  CHECK(sgd_momentum<true>(0.0, 8.0, h) == 4.0);
  CHECK(sgd_momentum<true>(4.0, 8.0, h) == 5.0);
  // An update never writes a momentum of -0.0.
  for (double d : {0.0, -0.0, 1.0, -1.0})
    for (double m : {0.0, -0.0, 1.0, -1.0, -std::numeric_limits<double>::denorm_min()}) {
      const double next = sgd_momentum<true>(m, d, h);
      CHECK(!is_negative_zero(next));
    }
}

void test_nesterov() {
  const SgdGroupOf<double> h = sgd_group();
  CHECK(sgd_weight<false>(1.0, 4.0, 2.0, h) == -1.0);
  CHECK(sgd_weight<true>(1.0, 4.0, 2.0, h) == -0.5);  // 1 - 0.5 * (2 + 0.25 * 4)
}

void test_clip_factor() {
  CHECK(clip_factor<double>(8, 1, INFINITY) == 1);
  CHECK(clip_factor(8.0, 1.0, 100.0) == 1);
  CHECK(clip_factor(8.0, 1.0, 2.0) == 2 / (8 + 1e-6));
  CHECK(clip_factor(16.0, 0.5, 2.0) == 2 / (8 + 1e-6));  // the norm still has the loss scale, 2
  CHECK(clip_factor(0.0, 1.0, 0.5) == 1);
  CHECK(clip_factor<float>(8, 1, INFINITY) == 1 && clip_factor<float>(8, 1, 0) == 0);
}

void test_bias_correction() {
  CHECK(std::fabs(bias_correction(std::log(0.9), 3.0) - (1 - 0.729)) <= 1e-15);
  CHECK(std::fabs(bias_correction(float(std::log(0.999)), 1.0f) - 0.001f) <= 2e-10f);  // 1 - 0.999f is off by 1e-8
  CHECK(bias_correction(std::log(0.0), 1.0) == 1 && bias_correction(std::log(0.0f), 5.0f) == 1);  // beta 0: no bias
}

void test_adam() {
  AdamGroupOf<double> h{};
  h.lr = 0.5, h.factor = 1, h.weight_decay = 0.25, h.eps = 0.5;
  h.one_minus_beta1 = 0.25, h.one_minus_beta2 = 0.5, h.beta2 = 0.5;
  h.log_beta1 = std::log(0.75), h.log_beta2 = std::log(0.5);
  CHECK(adam_gradient(4.0, 3.0, h) == 4.0);
  h.decoupled = true;
  CHECK(adam_gradient(4.0, 3.0, h) == 3.0);
  h.factor = -0.5;
  CHECK(adam_gradient(4.0, 3.0, h) == -1.5);
  CHECK(adam_exp_avg(8.0, 4.0, h) == 7.0);
  CHECK(adam_exp_avg_sq(8.0, 4.0, h) == 12.0);
  const AdamStep<double> step = adam_step(h, 2.0);
  CHECK(step.shrink == 0.875);
  CHECK(std::fabs(step.rate - 0.5 / (1 - 0.5625)) <= 1e-15);
  CHECK(std::fabs(step.unbias - 1 / std::sqrt(0.75)) <= 1e-15);
  h.decoupled = false;
  CHECK(adam_step(h, 2.0).shrink == 1);
  CHECK(adam_weight(2.0, 3.0, 4.0, AdamStep<double>{0.5, 2.0, 0.25}, 0.5) == 1.0 - 2.0 * 3.0 / (2 * 0.25 + 0.5));
}

void test_moving_average() {
  CHECK(moving_average(8.0, 4.0, 0.25) == 7.0 && moving_average(8.0, 4.0, 0.75) == 5.0);
  CHECK(moving_average(0.1f, 1e8f, 1.0f) == 1e8f && moving_average(1e8f, 0.1f, 0.0f) == 1e8f);  // exact at both ends
}

void test_lion() {
  LionGroupOf<double> h{};
  h.lr = 0.5, h.one_minus_beta1 = 0.25, h.one_minus_beta2 = 0.75, h.weight_decay = 0.5, h.factor = 1;
  CHECK(lion_weight(4.0, 1.0, 1.0, h) == 4 * 0.75 - 0.5);
  CHECK(lion_weight(4.0, 1.0, -2.0, h) == 4 * 0.75 - 0.5);  // 0.75 * 1 - 0.25 * 2 is above 0
  CHECK(lion_weight(4.0, 1.0, -4.0, h) == 4 * 0.75 + 0.5);
  CHECK(lion_weight(4.0, 1.0, -3.0, h) == 4 * 0.75);  // sign(0) is 0
  CHECK(lion_weight(4.0, -0.0, -0.0, h) == 4 * 0.75);
  CHECK(std::isnan(lion_weight(4.0, std::nan(""), 1.0, h)) && std::isnan(lion_weight(4.0, 1.0, std::nan(""), h)));
  CHECK(lion_exp_avg(8.0, 4.0, h) == 5.0);
  h.one_minus_beta1 = 1, h.weight_decay = 0;
  CHECK(lion_weight(4.0f, 1e9f, -1e-9f, group_as<float>(h)) == 4.5f);  // with beta1 = 0, c is the gradient
}

void test_groups_in_another_type() {
  const SgdGroupOf<float> sgd = group_as<float>(SgdGroupOf<double>{1, 2, 3, 4, 5, true});
  CHECK(sgd.lr == 1 && sgd.momentum == 2 && sgd.one_minus_dampening == 3 && sgd.weight_decay == 4 && sgd.factor == 5);
  CHECK(sgd.nesterov);
  const AdamGroupOf<float> adam = group_as<float>(AdamGroupOf<double>{1, 2, 3, 4, 5, 6, 7, 8, 9, true, false});
  CHECK(adam.lr == 1 && adam.one_minus_beta1 == 2 && adam.one_minus_beta2 == 3 && adam.beta2 == 4);
  CHECK(adam.log_beta1 == 5 && adam.log_beta2 == 6 && adam.eps == 7 && adam.weight_decay == 8 && adam.factor == 9);
  CHECK(adam.decoupled && !adam.amsgrad);
  const LionGroupOf<float> lion = group_as<float>(LionGroupOf<double>{1, 2, 3, 4, 5});
  CHECK(lion.lr == 1 && lion.one_minus_beta1 == 2 && lion.one_minus_beta2 == 3 && lion.weight_decay == 4);
  CHECK(lion.factor == 5);
}

void test_axpby() {
  CHECK(axpby(2.0, 3.0, -0.5, 4.0) == 4.0);
  CHECK(axpby(0.0, std::nan(""), 1.0, 4.0) == 4.0 && axpby(2.0f, 3.0f, 0.0f, INFINITY) == 6.0f);
}

void test_fp32_stays_fp32() {
  SgdGroupOf<float> h{};
  h.lr = 0.1f;
  h.factor = 1;
  const float w = sgd_weight<false>(1.0f, 3.0f, 3.0f, h);
  CHECK(sizeof(w) == 4);
  CHECK(std::fabs(w - (1.0f - 0.1f * 3.0f)) <= 0x1p-24f);
}

}  // namespace

int main() {
  test_inverse_norm();
  test_negative_zero();
  test_perturbation();
  test_sgd_without_momentum();
  test_sgd_momentum();
  test_nesterov();
  test_clip_factor();
  test_bias_correction();
  test_moving_average();
  test_adam();
  test_lion();
  test_groups_in_another_type();
  test_axpby();
  test_fp32_stays_fp32();
  return fused_sam_test::result();
}
