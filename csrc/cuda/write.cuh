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

// A span's random numbers for one purpose.
struct RngStream {
  StreamKey key;
  int64_t begin;  // first element of the span within the tensor

  FUSED_SAM_METHOD uint32_t operator()(int64_t i) const { return word(key, begin + i); }
};

template <class Table>
FUSED_SAM_DEVICE RngStream rng_stream(const Table& table, const Span& span, uint64_t seed, float rng_offset,
                                      Draw purpose) {
  return RngStream{stream_key(seed, uint32_t(rng_offset), table.rng_stream[span.tensor], purpose), span.begin};
}

// Rounds fp32 to T, for element i of the span.
template <class T, bool kRandom>
struct Rounding {
  FUSED_SAM_METHOD T operator()(float x, int64_t) const { return Narrow<T, float>::of(x); }
};
template <class T>
struct Rounding<T, true> {
  RngStream words;

  FUSED_SAM_METHOD T operator()(float x, int64_t i) const { return AtRandom<T>::of(x, words(i)); }
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

  To* to;
  const From* from;

  template <int N>
  using Registers = Pack<From, N>;
  FUSED_SAM_METHOD uintptr_t addresses() const { return uintptr_t(to) | uintptr_t(from); }
  template <int N>
  FUSED_SAM_METHOD Registers<N> load(int32_t i) const {
    return fused_sam::load<N, Use::once>(from + int64_t(i) * N);
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t i, int) const {
    if constexpr (std::is_same<To, From>::value) {
      store<N, Use::again>(to + int64_t(i) * N, values);
    } else {
      Pack<To, N> rounded;
#pragma unroll
      for (int k = 0; k < N; ++k) rounded.at[k] = Narrow<To, float>::of(values.at[k]);
      store<N, Use::again>(to + int64_t(i) * N, rounded);
    }
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

  P* param;
  M* clean;  // the backup or the master; may be `param`, so that no pointer here is __restrict__
  const G* grad;

  template <class Table>
  FUSED_SAM_METHOD UpdateArrays(const Table& table, const Span& span)
      : param(static_cast<P*>(table.data[kParam][span.tensor]) + span.begin),
        clean(static_cast<M*>(table.data[kBackup][span.tensor]) + span.begin),
        grad(static_cast<const G*>(table.data[kGrad][span.tensor]) + span.begin) {}
};

// Return the span's part of a state buffer.
template <class Table>
FUSED_SAM_DEVICE float* state_of(const Table& table, Column column, const Span& span) {
  return static_cast<float*>(table.data[column][span.tensor]) + span.begin;
}

}  // namespace fused_sam
