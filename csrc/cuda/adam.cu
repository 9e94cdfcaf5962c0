// adam: undo the perturbation and one step of Adam or AdamW, in one launch over all tensors of a table.
#include "cuda/launch.cuh"
#include "cuda/write.cuh"

namespace fused_sam {
namespace {

template <class P, class G, class M, bool kAmsgrad, bool kRandom>
struct Adam : UpdateArrays<P, G, M> {
  using Arrays = UpdateArrays<P, G, M>;
  static constexpr int kPack = 16 / int(sizeof(P));
  static constexpr int kElements = kElementsInFlight / 2;  // in four or five arrays; SGD has as many bytes in three

  float* exp_avg;
  float* exp_avg_sq;
  float* max_exp_avg_sq;  // read with amsgrad
  AdamGroup h;
  AdamStep<float> step;
  Rounding<P, kRandom> round;

  FUSED_SAM_METHOD Adam(const Arrays& arrays, float* exp_avg, float* exp_avg_sq, float* max_exp_avg_sq,
                        const AdamGroup& h, const AdamStep<float>& step, const Rounding<P, kRandom>& round)
      : Arrays(arrays),
        exp_avg(exp_avg),
        exp_avg_sq(exp_avg_sq),
        max_exp_avg_sq(max_exp_avg_sq),
        h(h),
        step(step),
        round(round) {}

  template <int N>
  struct Registers {
    Pack<M, N> w;
    Pack<G, N> g;
    Pack<float, N> m, v;
    Pack<float, kAmsgrad ? N : 1> s;
  };
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const {
    return Arrays::addresses(at) | uintptr_t(exp_avg + at) | uintptr_t(exp_avg_sq + at) |
           (kAmsgrad ? uintptr_t(max_exp_avg_sq + at) : uintptr_t(0));
  }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    Registers<N> values;
    values.w = fused_sam::load<N, Use::once>(this->clean + at);
    values.g = load_other<N, Use::once, kSplit>(this->grad + at);
    values.m = fused_sam::load<N, Use::once>(exp_avg + at);
    values.v = fused_sam::load<N, Use::once>(exp_avg_sq + at);
    if constexpr (kAmsgrad) values.s = fused_sam::load<N, Use::once>(max_exp_avg_sq + at);
    return values;
  }
  template <int N>
  FUSED_SAM_METHOD void finish(Registers<N>& values, int32_t at, int) const {
    Pack<float, N> param = widened(values.w);
    const Pack<float, N> g = widened(values.g);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float w = param.at[k];
      const float d = adam_gradient<float>(w, g.at[k], h);
      const float m = values.m.at[k] = adam_exp_avg<float>(values.m.at[k], d, h);
      const float v = values.v.at[k] = adam_exp_avg_sq<float>(values.v.at[k], d, h);
      float s = v;
      if constexpr (kAmsgrad) values.s.at[k] = s = values.s.at[k] >= v ? values.s.at[k] : v;
      param.at[k] = adam_weight<float>(w, m, s, step, h.eps);
    }
    store<N, Use::once>(exp_avg + at, values.m);
    store<N, Use::once>(exp_avg_sq + at, values.v);
    if constexpr (kAmsgrad) store<N, Use::once>(max_exp_avg_sq + at, values.s);
    if constexpr (Arrays::kMasters) store<N, Use::once>(this->clean + at, param);
    store<N, Use::again>(this->param + at, round(param, at));
  }
};

// Return the number of this step for one tensor. Every block takes a ticket after it has read its tensor's count, and
// the last block to do so adds 1 to the counts of all the launch's tensors.
template <class Table>
FUSED_SAM_DEVICE float count_step(const Table& table, int32_t tensor, unsigned int* ticket) {
  __shared__ float before;
  if (threadIdx.x == 0) before = *static_cast<const float*>(table.data[kStep][tensor]);
  __syncthreads();
  if (threadIdx.x < 32) {  // the other warps begin with their elements
    unsigned int mine = 0;
    if (threadIdx.x == 0) {
      __threadfence();  // the block that reads the last ticket writes after this block's read
      mine = atomicAdd(ticket, 1u);
    }
    if (__shfl_sync(0xffffffffu, mine, 0) == gridDim.x - 1) {
      __threadfence();
      for (int32_t i = int32_t(threadIdx.x); i < table.count; i += 32) *static_cast<float*>(table.data[kStep][i]) += 1;
      if (threadIdx.x == 0) *ticket = 0;
    }
  }
  return before + 1;
}

template <class P, class G, class M, bool kRandom, class Table>
__global__ void __launch_bounds__(kThreads, blocks_of(2))
    adam_kernel(const Table __grid_constant__ table, UpdateCall call, unsigned int* ticket) {
  const Span span = span_of(table, chunk_from_the_end());
  if (call.status->skip != 0) return restore<P, M>(table, span);
  const int32_t group = table.group_of[span.tensor];
  AdamGroup h = table.group[group];
  h.lr = rate_of(table, group, h.lr);
  h.factor = grad_factor(h.factor, call);
  const AdamStep<float> step = adam_step<float>(h, count_step(table, span.tensor, ticket));
  const UpdateArrays<P, G, M> arrays(table, span);
  float* exp_avg = state_of(table, kState0, span);
  float* exp_avg_sq = state_of(table, kState1, span);
  const auto round = rounding<P, kRandom>(table, span, call.seed, call.status->rng_offset);
  if (h.amsgrad) {
    float* max_exp_avg_sq = state_of(table, kState2, span);
    Adam<P, G, M, true, kRandom> operation(arrays, exp_avg, exp_avg_sq, max_exp_avg_sq, h, step, round);
    run(operation, span.length);
  } else {
    Adam<P, G, M, false, kRandom> operation(arrays, exp_avg, exp_avg_sq, nullptr, h, step, round);
    run(operation, span.length);
  }
}

}  // namespace

template <class Table>
void AdamKernels<Table>::load(Dtypes d) {
  with_types(d, [](auto p, auto g, auto m) {
    using P = of<decltype(p)>;
    using G = of<decltype(g)>;
    using M = of<decltype(m)>;
    load_kernel(adam_kernel<P, G, M, false, Table>);
    if constexpr (sizeof(M) == 2) load_kernel(adam_kernel<P, G, M, true, Table>);
  });
}

template <class Table>
void AdamKernels<Table>::adam(Dtypes d, const Table& table, int32_t blocks, const UpdateCall& call,
                              unsigned int* ticket, cudaStream_t stream) {
  with_types(d, [&](auto p, auto g, auto m) {
    using P = of<decltype(p)>;
    using G = of<decltype(g)>;
    using M = of<decltype(m)>;
    if constexpr (sizeof(M) == 2)
      if (call.stochastic_rounding)
        return launch("adam", d, blocks, stream, adam_kernel<P, G, M, true, Table>, table, call, ticket);
    launch("adam", d, blocks, stream, adam_kernel<P, G, M, false, Table>, table, call, ticket);
  });
}
FUSED_SAM_LAUNCHERS(AdamKernels, SmallAdamTable, MiddleAdamTable, LargeAdamTable);

}  // namespace fused_sam
