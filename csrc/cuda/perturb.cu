// perturb and restore: params to the perturbed point and back, each in one launch over all tensors of a table.
#include "cuda/launch.cuh"
#include "cuda/write.cuh"

namespace fused_sam {
namespace {

// ---- perturb ----------------------------------------------------------------------------------------------

// With masters, the unperturbed parameter is read from the master, and no backup is written.
template <class P, class G, class M>
struct PerturbArrays {
  static constexpr int kPack = 16 / int(sizeof(P));
  static constexpr int kElements = kElementsInFlight;
  static constexpr bool kLean = false;
  static constexpr bool kMasters = !std::is_same<P, M>::value;

  const M* from;  // the master, or the param itself
  P* param;
  M* backup;
  const G* grad;

  template <int N>
  struct Registers {
    Pack<M, N> w;
    Pack<G, N> g;
  };
  FUSED_SAM_METHOD int32_t head() const { return before_vector(param); }
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const {
    return uintptr_t(from + at) | uintptr_t(param + at) | (kMasters ? uintptr_t(0) : uintptr_t(backup + at));
  }
  FUSED_SAM_METHOD uintptr_t other(int32_t at) const { return uintptr_t(grad + at); }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    return {fused_sam::load<N, kMasters ? Use::once : Use::again>(from + at),
            load_other<N, Use::once, kSplit>(grad + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void write(const Registers<N>& values, const Pack<P, N>& perturbed, int32_t at) const {
    // The backup is not read until the second backward pass is over.
    if constexpr (!kMasters) store<N, Use::once>(backup + at, values.w);
    store<N, Use::again>(param + at, perturbed);
  }
};

template <class P, class G, class M, bool kAdaptive>
struct Perturb : PerturbArrays<P, G, M> {
  float step, eta;

  FUSED_SAM_METHOD Perturb(const PerturbArrays<P, G, M>& arrays, float step, float eta)
      : PerturbArrays<P, G, M>(arrays), step(step), eta(eta) {}

  template <int N>
  FUSED_SAM_METHOD void finish(const typename PerturbArrays<P, G, M>::template Registers<N>& values, int32_t at,
                               int) const {
    Pack<float, N> w = widened(values.w);
    const Pack<float, N> g = widened(values.g);
#pragma unroll
    for (int k = 0; k < N; ++k) w.at[k] = perturbed<kAdaptive, float>(w.at[k], g.at[k], step, eta);
    this->template write<N>(values, narrowed<P, N>(w), at);
  }
};

// The same with a random mask, or with stochastic rounding, or with both.
template <class P, class G, class M, bool kAdaptive>
struct PerturbAtRandom : PerturbArrays<P, G, M> {
  using Base = PerturbArrays<P, G, M>;
  static constexpr int kElements = kElementsInFlight / 2;  // the random numbers take registers

  float step, eta;
  bool masked, stochastic_rounding;
  uint32_t limit;  // of the words in the mask
  RngStream mask, words;

  FUSED_SAM_METHOD PerturbAtRandom(const Base& arrays, float step, float eta, float mask_prob, bool stochastic_rounding,
                                   const RngStream& mask, const RngStream& words)
      : Base(arrays),
        step(step),
        eta(eta),
        masked(mask_prob < 1),
        stochastic_rounding(stochastic_rounding),
        limit(masked ? mask_limit(mask_prob) : 0),
        mask(mask),
        words(words) {}

  template <int N>
  FUSED_SAM_METHOD void finish(const typename Base::template Registers<N>& values, int32_t at, int) const {
    const Pack<float, N> w = widened(values.w), g = widened(values.g);
    Pack<float, N> moved;
#pragma unroll
    for (int k = 0; k < N; ++k) moved.at[k] = perturbed<kAdaptive, float>(w.at[k], g.at[k], step, eta);
    if (masked) {
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (mask(at + k) >= limit) moved.at[k] = w.at[k];
    }
    if (!Base::kMasters && sizeof(P) == 2 && stochastic_rounding)
      this->template write<N>(values, narrowed_at_random<P, N>(moved, words, at), at);
    else
      this->template write<N>(values, narrowed<P, N>(moved), at);
  }
};

// Precond-SAM: T_w is made of Adam's second moments v, which are fp32.
template <class P, class G, class M>
struct PerturbPreconditioned : PerturbArrays<P, G, M> {
  using Base = PerturbArrays<P, G, M>;
  static constexpr int kElements = kElementsInFlight / 2;  // the second moments and random numbers take registers

  const float* second_moment;
  float step, unbias, eps;
  bool stochastic_rounding;
  RngStream words;

  FUSED_SAM_METHOD PerturbPreconditioned(const Base& arrays, const float* second_moment, float step, float unbias,
                                         float eps, bool stochastic_rounding, const RngStream& words)
      : Base(arrays),
        second_moment(second_moment),
        step(step),
        unbias(unbias),
        eps(eps),
        stochastic_rounding(stochastic_rounding),
        words(words) {}

  template <int N>
  struct Registers {
    typename Base::template Registers<N> of_base;
    Pack<float, N> v;
  };
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const {
    return Base::addresses(at) | uintptr_t(second_moment + at);
  }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    return {Base::template load<N, kSplit>(at), fused_sam::load<N, Use::once>(second_moment + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t at, int) const {
    Pack<float, N> w = widened(values.of_base.w);
    const Pack<float, N> g = widened(values.of_base.g);
#pragma unroll
    for (int k = 0; k < N; ++k) w.at[k] += step * (preconditioner<float>(values.v.at[k], unbias, eps) * g.at[k]);
    if (!Base::kMasters && sizeof(P) == 2 && stochastic_rounding)
      this->template write<N>(values.of_base, narrowed_at_random<P, N>(w, words, at), at);
    else
      this->template write<N>(values.of_base, narrowed<P, N>(w), at);
  }
};

template <class P, class G, class M, bool kRandom, class Table>
__global__ void __launch_bounds__(kThreads, blocks_of(sizeof(P) == 4 || kRandom ? 3 : 4))
    perturb_kernel(const Table __grid_constant__ table, PerturbCall call) {
  const Span span = span_of(table, chunk_from_the_end());
  void* param = table.data[kParam][span.tensor];
  void* clean = table.data[kBackup][span.tensor];  // the backup or the master
  constexpr bool kMasters = !std::is_same<P, M>::value;
  if (call.status->skip != 0) {
    if constexpr (!kMasters) copy<P, P>(clean, param, span);
    return;
  }
  const PerturbGroupOf<float>& group = table.group[table.group_of[span.tensor]].perturb;
  PerturbArrays<P, G, M> arrays{static_cast<const M*>(kMasters ? clean : param) + span.begin,
                                static_cast<P*>(param) + span.begin,
                                kMasters ? nullptr : static_cast<M*>(clean) + span.begin,
                                static_cast<const G*>(table.data[kGrad][span.tensor]) + span.begin};
  float step = group.rho * call.status->inverse_norm;
  if (call.factors != nullptr) step *= call.factors[span.tensor];
  if constexpr (kRandom) {
    const RngStream mask = rng_stream(table, span, call.seed, call.status->rng_offset, Draw::mask);
    const RngStream words = rng_stream(table, span, call.seed, call.status->rng_offset, Draw::round_perturbed);
    if (call.unbias != nullptr) {
      PerturbPreconditioned<P, G, M> operation(arrays, state_of(table, kState0, span), step, call.unbias[span.tensor],
                                               group.eta, call.stochastic_rounding, words);
      run(operation, span.length);
      return;
    }
    const float masked_step = step / group.mask_prob;
    if (group.adaptive) {
      PerturbAtRandom<P, G, M, true> operation(arrays, masked_step, group.eta, group.mask_prob,
                                               call.stochastic_rounding, mask, words);
      run(operation, span.length);
    } else {
      PerturbAtRandom<P, G, M, false> operation(arrays, masked_step, 0, group.mask_prob, call.stochastic_rounding, mask,
                                                words);
      run(operation, span.length);
    }
  } else if (group.adaptive) {
    Perturb<P, G, M, true> operation(arrays, step, group.eta);
    run(operation, span.length);
  } else {
    Perturb<P, G, M, false> operation(arrays, step, 0);
    run(operation, span.length);
  }
}

// ---- restore ----------------------------------------------------------------------------------------------

template <class P, class M, class Table>
__global__ void __launch_bounds__(kThreads, blocks_of(4)) restore_kernel(const Table __grid_constant__ table) {
  restore<P, M>(table, span_of(table, chunk_from_the_end()));
}

}  // namespace

// The type of the params that restore writes from backups: fp16 is copied as bf16.
template <class P, class M>
using Restored = std::conditional_t<std::is_same<P, M>::value && sizeof(P) == 2, bf16, P>;
template <class P, class M>
using RestoredFrom = std::conditional_t<std::is_same<P, M>::value, Restored<P, M>, M>;

template <class Table>
void PerturbKernels<Table>::load(Dtypes d) {
  with_types(d, [](auto p, auto g, auto m) {
    using P = of<decltype(p)>;
    using G = of<decltype(g)>;
    using M = of<decltype(m)>;
    load_kernel(perturb_kernel<P, G, M, false, Table>);
    load_kernel(perturb_kernel<P, G, M, true, Table>);
    load_kernel(restore_kernel<Restored<P, M>, RestoredFrom<P, M>, Table>);
  });
}

template <class Table>
void PerturbKernels<Table>::perturb(Dtypes d, const Table& table, int32_t blocks, const PerturbCall& call, bool random,
                                    cudaStream_t stream) {
  with_types(d, [&](auto p, auto g, auto m) {
    using P = of<decltype(p)>;
    using G = of<decltype(g)>;
    using M = of<decltype(m)>;
    if (random)
      launch("perturb", d, blocks, stream, perturb_kernel<P, G, M, true, Table>, table, call);
    else
      launch("perturb", d, blocks, stream, perturb_kernel<P, G, M, false, Table>, table, call);
  });
}

template <class Table>
void PerturbKernels<Table>::restore(Dtypes d, const Table& table, int32_t blocks, cudaStream_t stream) {
  with_types(d, [&](auto p, auto, auto m) {
    using P = of<decltype(p)>;
    using M = of<decltype(m)>;
    launch("restore", d, blocks, stream, restore_kernel<Restored<P, M>, RestoredFrom<P, M>, Table>, table);
  });
}
FUSED_SAM_LAUNCHERS(PerturbKernels, SmallTable, MiddleTable, LargeTable);

cudaError_t kernels_fit_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(restore_kernel<float, float, SmallTable>));
  cudaGetLastError();
  return error;
}

}  // namespace fused_sam
