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

  const X* x;
  const Y* y;
  float sums[3];

  template <int N>
  struct Registers {
    Pack<X, N> x;
    Pack<Y, N> y;
  };
  FUSED_SAM_METHOD uintptr_t addresses() const { return uintptr_t(x) | uintptr_t(y); }
  template <int N>
  FUSED_SAM_METHOD Registers<N> load(int32_t i) const {
    const int64_t at = int64_t(i) * N;
    return {fused_sam::load<N, Use::again>(x + at), fused_sam::load<N, Use::again>(y + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t, int) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float a = widen(values.x.at[k]), b = widen(values.y.at[k]);
      sums[0] += a * b;
      sums[1] += a * a;
      sums[2] += b * b;
    }
  }
};

template <class X, class Y, class Table>
__global__ void __launch_bounds__(kThreads)
    dot_kernel(const Table __grid_constant__ table, Slots slots, float* sums, bool reset) {
  const Span span = span_of(table, int32_t(blockIdx.x));
  Dot<X, Y> operation{static_cast<const X*>(table.data[kX][span.tensor]) + span.begin,
                      static_cast<const Y*>(table.data[kY][span.tensor]) + span.begin,
                      {}};
  run(operation, span.length);
  if (reduce(operation.sums, slots)) {
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] = reset ? operation.sums[k] : sums[k] + operation.sums[k];
  }
}

// ---- axpby: a * x + b * y ---------------------------------------------------------------------------------

template <class X, class Y, class O>
struct Axpby {
  static constexpr int kPack = kPackOfBoth<X, Y>;
  static constexpr int kElements = kElementsInFlight;

  const X* x;
  const Y* y;
  O* out;  // may be x or y
  float a, b;

  template <int N>
  struct Registers {
    Pack<X, N> x;
    Pack<Y, N> y;
  };
  FUSED_SAM_METHOD uintptr_t addresses() const { return uintptr_t(x) | uintptr_t(y) | uintptr_t(out); }
  template <int N>
  FUSED_SAM_METHOD Registers<N> load(int32_t i) const {
    const int64_t at = int64_t(i) * N;
    return {fused_sam::load<N, Use::again>(x + at), fused_sam::load<N, Use::again>(y + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Registers<N>& values, int32_t i, int) const {
    Pack<O, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k)
      result.at[k] = Narrow<O, float>::of(axpby<float>(a, widen(values.x.at[k]), b, widen(values.y.at[k])));
    store<N, Use::again>(out + int64_t(i) * N, result);
  }
};

template <class X, class Y, class O, class Table>
__global__ void __launch_bounds__(kThreads)
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
FUSED_SAM_LAUNCHERS(VectorKernels, SmallTable, LargeTable);

}  // namespace fused_sam
