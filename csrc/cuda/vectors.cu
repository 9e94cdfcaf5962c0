// dot and axpby, which also is ema: each in one launch over all tensors of a pair of vectors.
#include "cuda/launch.cuh"
#include "cuda/multi_tensor.cuh"

namespace fused_sam {
namespace {

// ---- dot --------------------------------------------------------------------------------------------------

template <class X, class Y>
constexpr int kPackOfBoth = 16 / int(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));

template <class X, class Y>
struct Dot {
  static constexpr int kPack = kPackOfBoth<X, Y>;
  static constexpr int kElements = kElementsInFlight;
  static constexpr bool kLean = true;

  const X* x;
  const Y* y;
  float sums[3];

  template <int N>
  struct Registers {
    Pack<X, N> x;
    Pack<Y, N> y;
  };
  FUSED_SAM_METHOD int32_t head() const { return before_vector(x); }
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const { return uintptr_t(x + at); }
  FUSED_SAM_METHOD uintptr_t other(int32_t at) const { return uintptr_t(y + at); }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    return {fused_sam::load<N, Use::again>(x + at), load_other<N, Use::again, kSplit>(y + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t, int) {
    const Pack<float, N> x = widened(values.x), y = widened(values.y);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float a = x.at[k], b = y.at[k];
      sums[0] += a * b;
      sums[1] += a * a;
      sums[2] += b * b;
    }
  }
};

template <class X, class Y, class Table>
__global__ void __launch_bounds__(kThreads, blocks_of(4))
    dot_kernel(const Table __grid_constant__ table, Slots slots, float* sums, bool reset) {
  float mine[3] = {0, 0, 0};
  for_each_chunk(table, [&](const Span& span) {
    Dot<X, Y> operation{static_cast<const X*>(table.data[kX][span.tensor]) + span.begin,
                        static_cast<const Y*>(table.data[kY][span.tensor]) + span.begin,
                        {}};
    run(operation, span.length);
#pragma unroll
    for (int k = 0; k < 3; ++k) mine[k] += operation.sums[k];
  });
  if (reduce(mine, slots)) {
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] = reset ? mine[k] : sums[k] + mine[k];
  }
}

// ---- axpby: a * x + b * y ---------------------------------------------------------------------------------

template <class X, class Y, class O>
struct Axpby {
  static constexpr int kPack = kPackOfBoth<X, Y>;
  static constexpr int kElements = kElementsInFlight;
  static constexpr bool kLean = false;

  const X* x;
  const Y* y;
  O* out;  // may be x or y
  float a, b;

  template <int N>
  struct Registers {
    Pack<X, N> x;
    Pack<Y, N> y;
  };
  FUSED_SAM_METHOD int32_t head() const { return before_vector(out); }
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const { return uintptr_t(x + at) | uintptr_t(out + at); }
  FUSED_SAM_METHOD uintptr_t other(int32_t at) const { return uintptr_t(y + at); }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    return {fused_sam::load<N, Use::again>(x + at), load_other<N, Use::again, kSplit>(y + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t at, int) const {
    const Pack<float, N> x = widened(values.x), y = widened(values.y);
    Pack<float, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) result.at[k] = axpby<float>(a, x.at[k], b, y.at[k]);
    store<N, Use::again>(out + at, narrowed<O, N>(result));
  }
};

template <class X, class Y, class O, class Table>
__global__ void __launch_bounds__(kThreads, blocks_of(4))
    axpby_kernel(const Table __grid_constant__ table, Coefficients coefficients, const StatusOf<float>* status) {
  if (status != nullptr && status->skip != 0) return;
  const Span span = span_of(table, chunk_from_the_end());
  Axpby<X, Y, O> operation{static_cast<const X*>(table.data[kX][span.tensor]) + span.begin,
                           static_cast<const Y*>(table.data[kY][span.tensor]) + span.begin,
                           static_cast<O*>(table.data[kOut][span.tensor]) + span.begin,
                           coefficients.device == nullptr ? coefficients.a : coefficients.device[0],
                           coefficients.device == nullptr ? coefficients.b : coefficients.device[1]};
  run(operation, span.length);
}

}  // namespace

// The two vectors have one dtype, or one of them is fp32.
template <class F>
static void with_types(VectorDtypes d, F&& call) {
  if (d.x == Dtype::f32 && d.y == Dtype::f32) return call(Type<float>{}, Type<float>{});
  if (d.x == Dtype::bf16)
    return d.y == Dtype::f32 ? call(Type<bf16>{}, Type<float>{}) : call(Type<bf16>{}, Type<bf16>{});
  if (d.x == Dtype::f16) return d.y == Dtype::f32 ? call(Type<f16>{}, Type<float>{}) : call(Type<f16>{}, Type<f16>{});
  return d.y == Dtype::bf16 ? call(Type<float>{}, Type<bf16>{}) : call(Type<float>{}, Type<f16>{});
}

template <class Table>
void VectorKernels<Table>::load(VectorDtypes d) {
  with_types(d, [](auto x, auto y) {
    using X = of<decltype(x)>;
    using Y = of<decltype(y)>;
    load_kernel(dot_kernel<X, Y, Table>);
    load_kernel(axpby_kernel<X, Y, X, Table>);
    if constexpr (!std::is_same<X, Y>::value) load_kernel(axpby_kernel<X, Y, Y, Table>);
  });
}

template <class Table>
int VectorKernels<Table>::fitting(VectorDtypes d) {
  int blocks = 0;
  with_types(d, [&](auto x, auto y) {
    blocks = blocks_that_fit(dot_kernel<of<decltype(x)>, of<decltype(y)>, Table>);
  });
  return blocks;
}

template <class Table>
void VectorKernels<Table>::dot(VectorDtypes d, const Table& table, int32_t blocks, Slots slots, float* sums, bool reset,
                               cudaStream_t stream) {
  with_types(d, [&](auto x, auto y) {
    launch("dot", d, blocks, stream, dot_kernel<of<decltype(x)>, of<decltype(y)>, Table>, table, slots, sums, reset);
  });
}

template <class Table>
void VectorKernels<Table>::axpby(VectorDtypes d, const Table& table, int32_t blocks, Coefficients coefficients,
                                 const StatusOf<float>* status, cudaStream_t stream) {
  with_types(d, [&](auto x, auto y) {
    using X = of<decltype(x)>;
    using Y = of<decltype(y)>;
    if (d.out == d.x)
      launch("axpby", d, blocks, stream, axpby_kernel<X, Y, X, Table>, table, coefficients, status);
    else
      launch("axpby", d, blocks, stream, axpby_kernel<X, Y, Y, Table>, table, coefficients, status);
  });
}
FUSED_SAM_LAUNCHERS(VectorKernels, SmallTable, MiddleTable, LargeTable);

}  // namespace fused_sam
