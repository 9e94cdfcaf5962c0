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
  FUSED_SAM_METHOD uintptr_t addresses() const {
    return uintptr_t(from) | uintptr_t(param) | uintptr_t(backup) | uintptr_t(grad);
  }
  template <int N>
  FUSED_SAM_METHOD Registers<N> load(int32_t i) const {
    const int64_t at = int64_t(i) * N;
    return {fused_sam::load<N, kMasters ? Use::once : Use::again>(from + at),
            fused_sam::load<N, Use::once>(grad + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void write(const Registers<N>& values, const Pack<P, N>& perturbed, int64_t at) const {
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
  FUSED_SAM_METHOD void finish(const typename PerturbArrays<P, G, M>::template Registers<N>& values, int32_t i,
                               int) const {
    Pack<P, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k)
      result.at[k] =
          Narrow<P, float>::of(perturbed<kAdaptive, float>(widen(values.w.at[k]), widen(values.g.at[k]), step, eta));
    this->template write<N>(values, result, int64_t(i) * N);
  }
};

// The same with a random mask, or with stochastic rounding, or with both.
template <class P, class G, class M, bool kAdaptive>
struct PerturbAtRandom : PerturbArrays<P, G, M> {
  using Base = PerturbArrays<P, G, M>;
  static constexpr int kElements = kElementsInFlight / 2;  // the random numbers take registers

  float step, eta, mask_prob;
  bool stochastic_rounding;
  RngStream mask, words;

  FUSED_SAM_METHOD PerturbAtRandom(const Base& arrays, float step, float eta, float mask_prob, bool stochastic_rounding,
                                   const RngStream& mask, const RngStream& words)
      : Base(arrays),
        step(step),
        eta(eta),
        mask_prob(mask_prob),
        stochastic_rounding(stochastic_rounding),
        mask(mask),
        words(words) {}

  template <int N>
  FUSED_SAM_METHOD void finish(const typename Base::template Registers<N>& values, int32_t i, int) const {
    const int64_t at = int64_t(i) * N;
    float w[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      w[k] = widen(values.w.at[k]);
      const float moved = perturbed<kAdaptive, float>(w[k], widen(values.g.at[k]), step, eta);
      if (mask_prob >= 1 || in_mask(mask(at + k), mask_prob)) w[k] = moved;
    }
    Pack<P, N> result;
    if (!Base::kMasters && sizeof(P) == 2 && stochastic_rounding) {
#pragma unroll
      for (int k = 0; k < N; ++k) result.at[k] = AtRandom<P>::of(w[k], words(at + k));
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) result.at[k] = Narrow<P, float>::of(w[k]);
    }
    this->template write<N>(values, result, at);
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
  FUSED_SAM_METHOD uintptr_t addresses() const { return Base::addresses() | uintptr_t(second_moment); }
  template <int N>
  FUSED_SAM_METHOD Registers<N> load(int32_t i) const {
    return {Base::template load<N>(i), fused_sam::load<N, Use::once>(second_moment + int64_t(i) * N)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t i, int) const {
    const int64_t at = int64_t(i) * N;
    Pack<P, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float g = widen(values.of_base.g.at[k]);
      const float w = widen(values.of_base.w.at[k]) + step * (preconditioner<float>(values.v.at[k], unbias, eps) * g);
      if (!Base::kMasters && sizeof(P) == 2 && stochastic_rounding)
        result.at[k] = AtRandom<P>::of(w, words(at + k));
      else
        result.at[k] = Narrow<P, float>::of(w);
    }
    this->template write<N>(values.of_base, result, at);
  }
};

template <class P, class G, class M, bool kRandom, class Table>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const Table __grid_constant__ table, PerturbCall call) {
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
__global__ void __launch_bounds__(kThreads) restore_kernel(const Table __grid_constant__ table) {
  restore<P, M>(table, span_of(table, chunk_from_the_end()));
}

}  // namespace

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
  if (d.param == Dtype::f32)
    launch("restore", d, blocks, stream, restore_kernel<float, float, Table>, table);
  else if (!d.has_masters())  // fp16 is copied as bf16
    launch("restore", d, blocks, stream, restore_kernel<bf16, bf16, Table>, table);
  else if (d.param == Dtype::bf16)
    launch("restore", d, blocks, stream, restore_kernel<bf16, float, Table>, table);
  else
    launch("restore", d, blocks, stream, restore_kernel<f16, float, Table>, table);
}
FUSED_SAM_LAUNCHERS(PerturbKernels, SmallTable, LargeTable);

cudaError_t kernels_fit_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(restore_kernel<float, float, SmallTable>));
  cudaGetLastError();
  return error;
}

}  // namespace fused_sam
