// These tests cover all 65,536 values of bf16 and of fp16, and the rounding of floats around each value.
#include "core/storage.h"

#include <cmath>
#include <initializer_list>
#include <limits>

#include "tests/check.h"

using namespace fused_sam;

namespace {

// Return the value of a half-precision number by its definition.
double meaning(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

template <class T>
void test_every_value(int exponent_bits, int mantissa_bits) {
  int wrong_widened = 0, wrong_back = 0, wrong_nan = 0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T x{uint16_t(bits)};
    const double expected = meaning(x.bits, exponent_bits, mantissa_bits);
    const float wide = widen(x);
    const T back = Narrow<T, float>::of(wide);
    if (std::isnan(expected)) {
      wrong_nan += !std::isnan(wide) || !std::isnan(meaning(back.bits, exponent_bits, mantissa_bits));
      continue;
    }
    wrong_widened += double(wide) != expected || std::signbit(wide) != std::signbit(expected);
    wrong_back += back.bits != x.bits;
  }
  CHECK(wrong_widened == 0);
  CHECK(wrong_back == 0);
  CHECK(wrong_nan == 0);
}

// The middle of two neighbours is rounded to the even one, and the floats around the middle to the nearer one.
template <class T>
void test_rounding(int exponent_bits, int mantissa_bits) {
  int wrong = 0;
  const uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  for (uint32_t sign : {0u, 0x8000u})
    for (uint32_t low = 0; low < infinity; ++low) {
      const uint32_t high = low + 1;
      const double a = meaning(uint16_t(low), exponent_bits, mantissa_bits);
      // The number after the largest would be a power of two. From the middle of the two, the result is infinity.
      const double b = high == infinity ? std::ldexp(1, 1 << (exponent_bits - 1))
                                        : meaning(uint16_t(high), exponent_bits, mantissa_bits);
      const double middle = a + (b - a) / 2;
      const float f = float(sign ? -middle : middle);
      if (std::isinf(f)) continue;  // above the largest float for bf16
      const float nearer_zero = std::nextafterf(f, 0.0f), farther = std::nextafterf(f, sign ? -INFINITY : INFINITY);
      const uint32_t even = low % 2 == 0 ? low : high;
      wrong += Narrow<T, float>::of(f).bits != (sign | even);
      wrong += Narrow<T, float>::of(nearer_zero).bits != (sign | low);
      wrong += Narrow<T, float>::of(farther).bits != (sign | high);
    }
  CHECK(wrong == 0);
}

void test_special_values() {
  using Half = Narrow<f16, float>;
  using Brain = Narrow<bf16, float>;
  CHECK(Half::of(65504.0f).bits == 0x7bff);
  CHECK(Half::of(1e9f).bits == 0x7c00 && Half::of(-INFINITY).bits == 0xfc00);
  CHECK(Half::of(1e-9f).bits == 0 && Half::of(-1e-9f).bits == 0x8000);
  CHECK((Half::of(std::nanf("")).bits & 0x7c00) == 0x7c00 && (Half::of(std::nanf("")).bits & 0x03ff) != 0);
  CHECK(Brain::of(INFINITY).bits == 0x7f80 && Brain::of(-0.0f).bits == 0x8000);
  CHECK(Brain::of(std::numeric_limits<float>::max()).bits == 0x7f80);
  // These NaNs have a payload only in the bits that rounding removes.
  CHECK((Brain::of(bits_float(0x7f800001u)).bits & 0x7f) != 0);
  CHECK((Brain::of(bits_float(0xffffffffu)).bits & 0x7fff) > 0x7f80);
}

void test_wide_types_pass_through() {
  CHECK((Narrow<float, float>::of(1.5f) == 1.5f) && (Narrow<double, double>::of(0.1) == 0.1));
  CHECK(widen(0.1) == 0.1 && widen(0.1f) == 0.1f);
  CHECK(sizeof(Arithmetic<double>::type) == 8 && sizeof(Arithmetic<float>::type) == 4);
  CHECK(sizeof(Arithmetic<bf16>::type) == 4 && sizeof(Arithmetic<f16>::type) == 4);
  CHECK(size_of(Dtype::f32) == 4 && size_of(Dtype::f64) == 8 && size_of(Dtype::bf16) == 2 && size_of(Dtype::f16) == 2);
}

}  // namespace

int main() {
  test_every_value<f16>(5, 10);
  test_every_value<bf16>(8, 7);
  test_rounding<f16>(5, 10);
  test_rounding<bf16>(8, 7);
  test_special_values();
  test_wide_types_pass_through();
  return fused_sam_test::result();
}
