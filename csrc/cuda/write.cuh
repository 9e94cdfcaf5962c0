// How a kernel writes what it has computed: rounded to nearest or stochastically, and how it restores a parameter.
//
// P is the type of the params and M that of the masters; P and M are one type where there are no masters. Column 1 of a
// table, the backup or the master, has the type M.
#pragma once

#include <type_traits>

#include "core/rng.h"
#include "core/status.h"
#include "cuda/multi_tensor.cuh"

namespace fused_sam {

// A span's random numbers for one purpose. The elements of a span have one upper half of their numbers (tuning.h), so
// that word() of core/rng.h needs only the lower half of each.
struct RngStream {
  uint32_t low;   // of the span's first element, plus the key
  uint32_t high;  // of all its elements, with the key

  FUSED_SAM_METHOD uint32_t operator()(int32_t at) const { return mix(mix(low + uint32_t(at)) ^ high); }
};

template <class Table>
FUSED_SAM_DEVICE RngStream rng_stream(const Table& table, const Span& span, uint64_t seed, float rng_offset,
                                      Draw purpose) {
  const StreamKey key = stream_key(seed, uint32_t(rng_offset), table.rng_stream[span.tensor], purpose);
  const uint64_t begin = uint64_t(span.begin);
  return RngStream{uint32_t(begin) + key.a, key.b + uint32_t(begin >> 32) * 0x9e3779b9u};
}

#if defined(__CUDA_ARCH__)
// Return two fp32 numbers as bf16, with the word's lower half added to each below the place where it is cut off. An
// infinite number has no lower bits, so that nothing carries into its upper ones. Nothing is added to a NaN, whose upper
// bits are a NaN: those of arithmetic have all bits set, and a widened one has no lower bits.
FUSED_SAM_DEVICE uint32_t pair_at_random(bf16, float first, float second, uint32_t word, uint32_t other_word) {
  const uint32_t a = float_bits(first) + (first == first ? word & 0xffffu : 0u);
  const uint32_t b = float_bits(second) + (second == second ? other_word & 0xffffu : 0u);
  return __byte_perm(a, b, 0x7632);  // both upper halves
}
#endif

// Return a pack of fp32 numbers as T, rounded stochastically. at: the pack's first element in the span.
template <class T, int N>
FUSED_SAM_DEVICE Pack<T, N> narrowed_at_random(const Pack<float, N>& wide, const RngStream& words, int32_t at) {
  Pack<T, N> pack;
  if constexpr (kOnGpu && std::is_same<T, bf16>::value && N % 2 == 0) {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int k = 0; k < N; k += 2)
      pairs[k / 2] = pair_at_random(T{}, wide.at[k], wide.at[k + 1], words(at + k), words(at + k + 1));
    memcpy(&pack, pairs, sizeof(pack));
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) pack.at[k] = AtRandom<T>::of(wide.at[k], words(at + k));
  }
  return pack;
}

// Rounds a pack of fp32 numbers to T. at: its first element in the span.
template <class T, bool kRandom>
struct Rounding {
  template <int N>
  FUSED_SAM_METHOD Pack<T, N> operator()(const Pack<float, N>& wide, int32_t) const {
    return narrowed<T, N>(wide);
  }
};
template <class T>
struct Rounding<T, true> {
  RngStream words;

  template <int N>
  FUSED_SAM_METHOD Pack<T, N> operator()(const Pack<float, N>& wide, int32_t at) const {
    return narrowed_at_random<T, N>(wide, words, at);
  }
};

template <class T, bool kRandom, class Table>
FUSED_SAM_DEVICE Rounding<T, kRandom> rounding(const Table& table, const Span& span, uint64_t seed, float rng_offset) {
  if constexpr (kRandom)
    return {rng_stream(table, span, seed, rng_offset, Draw::round_updated)};
  else
    return {};
}

// Copies `from`: rounded to nearest, or bit for bit if the types are the same.
template <class To, class From>
struct Copy {
  static constexpr int kPack = 16 / int(sizeof(To));
  static constexpr int kElements = kElementsInFlight;
  static constexpr bool kLean = false;

  To* to;
  const From* from;

  template <int N>
  using Registers = Pack<From, N>;
  FUSED_SAM_METHOD int32_t head() const { return before_vector(to); }
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const { return uintptr_t(to + at); }
  FUSED_SAM_METHOD uintptr_t other(int32_t at) const { return uintptr_t(from + at); }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    return load_other<N, Use::once, kSplit>(from + at);
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t at, int) const {
    if constexpr (std::is_same<To, From>::value)
      store<N, Use::again>(to + at, values);
    else
      store<N, Use::again>(to + at, narrowed<To, N>(widened(values)));
  }
};

template <class To, class From>
FUSED_SAM_DEVICE void copy(void* to, const void* from, const Span& span) {
  Copy<To, From> operation{static_cast<To*>(to) + span.begin, static_cast<const From*>(from) + span.begin};
  run(operation, span.length);
}

// Copies the backup to the param, or rounds the master into it. A param may be its own backup.
template <class P, class M, class Table>
FUSED_SAM_DEVICE void restore(const Table& table, const Span& span) {
  void* param = table.data[kParam][span.tensor];
  const void* clean = table.data[kBackup][span.tensor];
  if (!std::is_same<P, M>::value || clean != param) copy<P, M>(param, clean, span);
}

// ---- what the updates share -------------------------------------------------------------------------------

// Return the learning rate of a group: the number on the device if there is one, else the host's.
template <class Table>
FUSED_SAM_DEVICE float rate_of(const Table& table, int32_t group, float number) {
  const void* on_device = table.rate[group];
  if (on_device == nullptr) return number;
  return table.rate_is_double[group] ? float(*static_cast<const double*>(on_device))
                                     : *static_cast<const float*>(on_device);
}

// Return what gradients are multiplied by: the group's sign, unscaling and clipping. The order is for the registers: a
// reciprocal in the middle, or a division where nothing is clipped, costs SGD's kernels 10 of them.
FUSED_SAM_DEVICE float grad_factor(float sign, const UpdateCall& call) {
  float factor = sign;
  if (call.grad_scale != nullptr) factor /= *call.grad_scale;
  if (call.max_norm < 3e38f) factor *= clip_factor<float>(call.status->update_norm, fabsf(factor), call.max_norm);
  return factor;
}

// The arrays of one span that every update has, for an operation to inherit.
template <class P, class G, class M>
struct UpdateArrays {
  static constexpr bool kMasters = !std::is_same<P, M>::value;
  static constexpr bool kLean = false;

  P* param;
  M* clean;  // the backup or the master; may be `param`, so that no pointer here is __restrict__
  const G* grad;

  template <class Table>
  FUSED_SAM_METHOD UpdateArrays(const Table& table, const Span& span)
      : param(static_cast<P*>(table.data[kParam][span.tensor]) + span.begin),
        clean(static_cast<M*>(table.data[kBackup][span.tensor]) + span.begin),
        grad(static_cast<const G*>(table.data[kGrad][span.tensor]) + span.begin) {}

  FUSED_SAM_METHOD int32_t head() const { return before_vector(param); }
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const { return uintptr_t(param + at) | uintptr_t(clean + at); }
  FUSED_SAM_METHOD uintptr_t other(int32_t at) const { return uintptr_t(grad + at); }
};

// Return the span's part of a state buffer.
template <class Table>
FUSED_SAM_DEVICE float* state_of(const Table& table, Column column, const Span& span) {
  return static_cast<float*>(table.data[column][span.tensor]) + span.begin;
}

}  // namespace fused_sam
