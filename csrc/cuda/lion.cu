// lion: undo the perturbation and one step of Lion, in one launch over all tensors of a table.
#include "cuda/launch.cuh"
#include "cuda/write.cuh"

namespace fused_sam {
namespace {

template <class P, class G, class M, bool kRandom>
struct Lion : UpdateArrays<P, G, M> {
  using Arrays = UpdateArrays<P, G, M>;
  static constexpr int kPack = 16 / int(sizeof(P));
  // Half as many if an element has many bytes: else the compiler waits for the first loads before it issues the last.
  static constexpr bool kFewer = kRandom || Arrays::kMasters || sizeof(P) < sizeof(G);
  static constexpr int kElements = kFewer ? kElementsInFlight / 2 : kElementsInFlight;

  float* exp_avg;
  LionGroupOf<float> h;
  Rounding<P, kRandom> round;

  FUSED_SAM_METHOD Lion(const Arrays& arrays, float* exp_avg, const LionGroupOf<float>& h,
                        const Rounding<P, kRandom>& round)
      : Arrays(arrays), exp_avg(exp_avg), h(h), round(round) {}

  template <int N>
  struct Registers {
    Pack<M, N> w;
    Pack<G, N> g;
    Pack<float, N> m;
  };
  FUSED_SAM_METHOD uintptr_t addresses() const {
    return uintptr_t(this->param) | uintptr_t(this->clean) | uintptr_t(this->grad) | uintptr_t(exp_avg);
  }
  template <int N>
  FUSED_SAM_METHOD Registers<N> load(int32_t i) const {
    const int64_t at = int64_t(i) * N;
    Registers<N> values;
    values.w = fused_sam::load<N, Use::once>(this->clean + at);
    values.g = fused_sam::load<N, Use::once>(this->grad + at);
    values.m = fused_sam::load<N, Use::once>(exp_avg + at);
    return values;
  }
  template <int N>
  FUSED_SAM_METHOD void finish(Registers<N>& values, int32_t i, int) const {
    const int64_t at = int64_t(i) * N;
    Pack<M, Arrays::kMasters ? N : 1> master;
    Pack<P, N> param;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = h.factor * widen(values.g.at[k]);
      const float updated = lion_weight<float>(widen(values.w.at[k]), values.m.at[k], d, h);
      values.m.at[k] = lion_exp_avg<float>(values.m.at[k], d, h);
      if constexpr (Arrays::kMasters) master.at[k] = updated;
      param.at[k] = round(updated, at + k);
    }
    store<N, Use::once>(exp_avg + at, values.m);
    if constexpr (Arrays::kMasters) store<N, Use::once>(this->clean + at, master);
    store<N, Use::again>(this->param + at, param);
  }
};

template <class P, class G, class M, bool kRandom, class Table>
__global__ void __launch_bounds__(kThreads) lion_kernel(const Table __grid_constant__ table, UpdateCall call) {
  const Span span = span_of(table, chunk_from_the_end());
  if (call.status->skip != 0) return restore<P, M>(table, span);
  const int32_t group = table.group_of[span.tensor];
  LionGroupOf<float> h = table.group[group].lion;
  h.lr = rate_of(table, group, h.lr);
  h.factor = grad_factor(h.factor, call);
  const auto round = rounding<P, kRandom>(table, span, call.seed, call.status->rng_offset);
  Lion<P, G, M, kRandom> operation({table, span}, state_of(table, kState0, span), h, round);
  run(operation, span.length);
}

}  // namespace

template <class Table>
void LionKernels<Table>::lion(Dtypes d, const Table& table, int32_t blocks, const UpdateCall& call,
                              cudaStream_t stream) {
  with_types(d, [&](auto p, auto g, auto m) {
    using P = of<decltype(p)>;
    using G = of<decltype(g)>;
    using M = of<decltype(m)>;
    if constexpr (sizeof(M) == 2)
      if (call.stochastic_rounding)
        return launch("lion", d, blocks, stream, lion_kernel<P, G, M, true, Table>, table, call);
    launch("lion", d, blocks, stream, lion_kernel<P, G, M, false, Table>, table, call);
  });
}
FUSED_SAM_LAUNCHERS(LionKernels, SmallTable, LargeTable);

}  // namespace fused_sam
