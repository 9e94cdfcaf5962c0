// Storage types of tensors, and their conversion to the type of the arithmetic.
// bf16 and fp16 are stored as bits. Conversion to float is exact; from float it rounds to nearest, ties to even.
// GPUs convert in one instruction, which gives the same bits for all numbers; NaNs may have another payload.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/formulas.h"

namespace fused_sam {

enum class Dtype : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline int64_t size_of(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

// The type of arithmetic, optimizer state and hyper-parameters for a storage type.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

FUSED_SAM_FN uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FUSED_SAM_FN float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

FUSED_SAM_FN float widen(float x) { return x; }
FUSED_SAM_FN double widen(double x) { return x; }
FUSED_SAM_FN float widen(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
FUSED_SAM_FN float widen(f16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude << 13));  // inf, NaN
  // The multiplication corrects the exponent and also normalises subnormals.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
#endif
}

// Rounds the arithmetic's type to a storage type, to nearest.
template <class T, class R>
struct Narrow;
template <>
struct Narrow<float, float> {
  FUSED_SAM_FN float of(float x) { return x; }
};
template <>
struct Narrow<double, double> {
  FUSED_SAM_FN double of(double x) { return x; }
};
template <>
struct Narrow<bf16, float> {
  FUSED_SAM_FN bf16 of(float x) {
#if defined(__CUDA_ARCH__)
    bf16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
#else
    const uint32_t u = float_bits(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (u >> 16) | 0x40u;
    return bf16{uint16_t((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
#endif
  }
};
template <>
struct Narrow<f16, float> {
  FUSED_SAM_FN f16 of(float x) {
#if defined(__CUDA_ARCH__)
    f16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
#else
    const uint32_t u = float_bits(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u)};   // NaN
    if (magnitude >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // rounds to 65536 and above: inf
    if (magnitude < 0x38800000u) {
      // Subnormal: after adding 0.5, the low bits of the sum are the rounded multiple of 2^-24.
      const uint32_t sum = float_bits(bits_float(magnitude) + 0.5f);
      return f16{uint16_t(sign | (sum - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return f16{uint16_t(sign | (rounded >> 13))};
#endif
  }
};

}  // namespace fused_sam
