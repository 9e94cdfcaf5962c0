// Random numbers that are a function of where they are used, and stochastic rounding. fused_sam/backends/rng.py is the
// specification, names the sources and draws the same numbers.
//
// Number i of a stream is a hash of i and of the stream's key. Nothing is stored, and threads share nothing.
#pragma once

#include "core/storage.h"

namespace fused_sam {

// What a primitive draws random numbers for. fused_sam/backends/contract.py has the same order.
enum class Draw : uint32_t { mask = 0, round_perturbed = 1, round_updated = 2 };

// A hash of 32 bits.
FUSED_SAM_FN uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

struct StreamKey {
  uint32_t a, b;
};

// rng_offset: how many primitives have drawn before, see core/status.h. rng_stream: the tensor's number.
FUSED_SAM_FN StreamKey stream_key(uint64_t seed, uint32_t rng_offset, uint32_t rng_stream, Draw purpose) {
  const uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
  const uint32_t a =
      mix(mix(low + rng_offset * 0x9e3779b9u) + rng_stream * 0x85ebca6bu + uint32_t(purpose) * 0xc2b2ae35u);
  return StreamKey{a, mix(mix(high ^ a) + 0x27d4eb2fu)};
}

// Returns number i of the stream.
FUSED_SAM_FN uint32_t word(StreamKey key, int64_t i) {
  return mix(mix(uint32_t(i) + key.a) ^ (key.b + uint32_t(uint64_t(i) >> 32) * 0x9e3779b9u));
}

// Returns true with probability `mask_prob`, in steps of 2^-24.
FUSED_SAM_FN bool in_mask(uint32_t word, float mask_prob) { return float(word >> 8) * 0x1p-24f < mask_prob; }

// Returns the limit below which a word is in the mask, for mask_prob < 1: word < mask_limit(p) is in_mask(word, p).
FUSED_SAM_FN uint32_t mask_limit(float mask_prob) { return uint32_t(ceilf(mask_prob * 0x1p24f)) << 8; }

// Rounds fp32 to T, up or down with probabilities that make the mean x. Numbers that are not finite, and those beyond
// fp16's largest, are rounded to nearest.
template <class T>
struct AtRandom;
template <>
struct AtRandom<float> {
  FUSED_SAM_FN float of(float x, uint32_t) { return x; }
};
template <>
struct AtRandom<double> {
  FUSED_SAM_FN double of(double x, uint32_t) { return x; }
};
template <>
struct AtRandom<bf16> {
  FUSED_SAM_FN bf16 of(float x, uint32_t word) {
    const uint32_t u = float_bits(x);
    const uint16_t down = uint16_t((u + (word & 0xffffu)) >> 16);
    return (u & 0x7f800000u) == 0x7f800000u ? Narrow<bf16, float>::of(x) : bf16{down};
  }
};
template <>
struct AtRandom<f16> {
  FUSED_SAM_FN f16 of(float x, uint32_t word) {
    const uint32_t u = float_bits(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude >= 0x477fe000u) return Narrow<f16, float>::of(x);
    if (magnitude >= 0x38800000u)
      return f16{uint16_t(sign | ((magnitude + (word & 0x1fffu) - 0x38000000u) >> 13))};
    // Below 2^-14 numbers are 2^-24 apart; 10 bits for their count leave 14 of a float's 24 to the random part.
    const float steps = bits_float(magnitude) * 0x1p24f + float(word & 0x3fffu) * 0x1p-14f;
    return f16{uint16_t(sign | uint32_t(steps))};
  }
};

}  // namespace fused_sam
