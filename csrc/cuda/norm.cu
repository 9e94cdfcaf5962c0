// norm: the global norm of the gradients, and what follows from it, in one launch over all tensors of a table.
// squares: the sums of squares of each tensor, likewise.
//
// Arithmetic is fp32; the formulas are those of core/formulas.h. No kernel includes pybind11 or torch.
#include "cuda/launch.cuh"
#include "cuda/multi_tensor.cuh"

namespace fused_sam {
namespace {

// W: the type of the params, or of the masters where there are masters.
template <class W, class G, bool kAdaptive>
struct SumSquares {
  static constexpr int kPack = 16 / int(kAdaptive && sizeof(W) < sizeof(G) ? sizeof(W) : sizeof(G));
  static constexpr int kElements = kAdaptive ? kElementsInFlight / 2 : kElementsInFlight;  // of two arrays, or of one
  static constexpr int kSums = 4;
  static constexpr bool kLean = true;

  const W* weight;  // read where adaptive
  const G* grad;
  float eta;
  float sums[kSums];

  template <int N>
  struct Registers {
    Pack<W, kAdaptive ? N : 1> w;
    Pack<G, N> g;
  };
  FUSED_SAM_METHOD int32_t head() const { return kAdaptive ? before_vector(weight) : before_vector(grad); }
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const {
    return kAdaptive ? uintptr_t(weight + at) : uintptr_t(grad + at);
  }
  FUSED_SAM_METHOD uintptr_t other(int32_t at) const { return kAdaptive ? uintptr_t(grad + at) : 0; }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    Registers<N> values;
    if constexpr (kAdaptive) values.w = fused_sam::load<N, Use::again>(weight + at);
    values.g = load_other<N, Use::again, kSplit>(grad + at);
    return values;
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t, int u) {
    const Pack<float, N> g = widened(values.g);
    Pack<float, kAdaptive ? N : 1> w{};
    if constexpr (kAdaptive) w = widened(values.w);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float x = scaled_gradient<kAdaptive, float>(w.at[kAdaptive ? k : 0], g.at[k], eta);
      sums[u % kSums] += x * x;
    }
  }
  FUSED_SAM_METHOD float sum() const { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }
};

template <class W, class G, bool kAdaptive>
FUSED_SAM_DEVICE float sum_squares(const void* weight, const void* grad, float eta, const Span& span) {
  SumSquares<W, G, kAdaptive> operation{static_cast<const W*>(weight) + span.begin,
                                        static_cast<const G*>(grad) + span.begin, eta, {}};
  run(operation, span.length);
  return operation.sum();
}

// The sum of squares of g, or of T_w g (core/formulas.h), and what follows from it. Equal gradients give equal norms,
// bit for bit. Squares of |g| above 1.8e19 overflow, which counts as a gradient that is not finite.
// weights: the column that T_w is made of.
template <class W, class G, class Table>
__global__ void __launch_bounds__(kThreads, blocks_of(5)) norm_kernel(const Table __grid_constant__ table, Slots slots,
                                                        StatusOf<float>* status, NormCall call, Column weights) {
  float sums[1] = {0};
  for_each_chunk(table, [&](const Span& span) {
    const PerturbGroupOf<float>& group = table.group[table.group_of[span.tensor]].perturb;
    const void* grad = table.data[kGrad][span.tensor];
    if (call.how.ascent && group.adaptive)
      sums[0] += sum_squares<W, G, true>(table.data[weights][span.tensor], grad, group.eta, span);
    else
      sums[0] += sum_squares<W, G, false>(nullptr, grad, 0, span);
  });
  if (reduce(sums, slots)) {
    accumulate_norm<float>(*status, sums[0], call.reset);
    if (call.finish) finish_norm<float>(*status, call.eps, call.how);
  }
}

// The same with T_w of Precond-SAM, whose second moments v are fp32.
template <class G>
struct SumPreconditioned {
  static constexpr int kPack = 16 / int(sizeof(G));
  static constexpr int kElements = kElementsInFlight / 2;  // the second moments take registers
  static constexpr int kSums = 4;
  static constexpr bool kLean = true;

  const float* second_moment;
  const G* grad;
  float unbias, eps;
  float sums[kSums];

  template <int N>
  struct Registers {
    Pack<float, N> v;
    Pack<G, N> g;
  };
  FUSED_SAM_METHOD int32_t head() const { return before_vector(second_moment); }
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const { return uintptr_t(second_moment + at); }
  FUSED_SAM_METHOD uintptr_t other(int32_t at) const { return uintptr_t(grad + at); }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    return {fused_sam::load<N, Use::again>(second_moment + at), load_other<N, Use::again, kSplit>(grad + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t, int u) {
    const Pack<float, N> g = widened(values.g);
#pragma unroll
    for (int k = 0; k < N; ++k)
      sums[u % kSums] += g.at[k] * (preconditioner<float>(values.v.at[k], unbias, eps) * g.at[k]);
  }
  FUSED_SAM_METHOD float sum() const { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }
};

// The sums of squares of T_w g, and of the weights if they are asked for, of every tensor.
template <class W, class G, class Table>
__global__ void __launch_bounds__(kThreads) squares_kernel(const Table __grid_constant__ table, Slots slots,
                                                           SquaresCall call) {
  const Span span = span_of(table, int32_t(blockIdx.x));
  const PerturbGroupOf<float>& group = table.group[table.group_of[span.tensor]].perturb;
  const void* weight = table.data[call.weights_column][span.tensor];
  const void* grad = table.data[kGrad][span.tensor];
  float sums[2] = {0, 0};
  if (call.unbias != nullptr) {
    SumPreconditioned<G> operation{static_cast<const float*>(table.data[kState0][span.tensor]) + span.begin,
                                   static_cast<const G*>(grad) + span.begin, call.unbias[span.tensor], group.eta, {}};
    run(operation, span.length);
    sums[0] = operation.sum();
  } else if (group.adaptive) {
    sums[0] = sum_squares<W, G, true>(weight, grad, group.eta, span);
  } else {
    sums[0] = sum_squares<W, G, false>(nullptr, grad, 0, span);
  }
  if (call.weights) sums[1] = sum_squares<W, W, false>(nullptr, weight, 0, span);
  reduce_rows(sums, slots, table, call.sums, call.rows, call.weights);
}

__global__ void finish_norm_kernel(StatusOf<float>* status, float eps, FinishNorm how) {
  finish_norm<float>(*status, eps, how);
}

}  // namespace

template <class Table>
void NormKernels<Table>::load(Dtypes d) {
  with_types(d, [](auto, auto g, auto m) {
    load_kernel(norm_kernel<of<decltype(m)>, of<decltype(g)>, Table>);
    load_kernel(squares_kernel<of<decltype(m)>, of<decltype(g)>, Table>);
  });
  load_kernel(finish_norm_kernel);
}

template <class Table>
int NormKernels<Table>::fitting(Dtypes d) {
  int blocks = 0;
  with_types(d, [&](auto, auto g, auto m) {
    blocks = blocks_that_fit(norm_kernel<of<decltype(m)>, of<decltype(g)>, Table>);
  });
  return blocks;
}

template <class Table>
void NormKernels<Table>::norm(Dtypes d, const Table& table, int32_t blocks, Slots slots, StatusOf<float>* status,
                              const NormCall& call, cudaStream_t stream) {
  const Column weights = d.has_masters() ? kMaster : kParam;
  with_types(d, [&](auto, auto g, auto m) {
    launch("norm", d, blocks, stream, norm_kernel<of<decltype(m)>, of<decltype(g)>, Table>, table, slots, status, call,
           weights);
  });
}

template <class Table>
void NormKernels<Table>::squares(Dtypes d, const Table& table, int32_t blocks, Slots slots, const SquaresCall& call,
                                 cudaStream_t stream) {
  with_types(d, [&](auto, auto g, auto m) {
    launch("squares", d, blocks, stream, squares_kernel<of<decltype(m)>, of<decltype(g)>, Table>, table, slots, call);
  });
}
FUSED_SAM_LAUNCHERS(NormKernels, SmallTable, MiddleTable, LargeTable);

void launch_finish_norm(StatusOf<float>* status, float eps, FinishNorm how, cudaStream_t stream) {
  launch<1>("finish_norm", "of one status", 1, stream, finish_norm_kernel, status, eps, how);
}

}  // namespace fused_sam
