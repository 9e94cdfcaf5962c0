// The CUDA kernels: each primitive in one launch over all tensors of a table, whatever parameter group they belong to.
//
// Arithmetic is fp32; formulas are those of core/formulas.h. Neither pybind11 nor torch is included. Blocks of perturb,
// sgd and restore take the chunks from the last to the first: the norm has gone over the same gradients in rising
// order just before, and the end of them is what the L2 cache still holds.
#include "cuda/kernels.h"

#include <stdexcept>
#include <string>

#include "cuda/multi_tensor.cuh"

namespace fused_sam {
namespace {

// ---- P1: global norm --------------------------------------------------------------------------------------

template <class T, class G, bool kAdaptive>
struct SumSquares {
  static constexpr int kPack = 16 / int(kAdaptive && sizeof(T) < sizeof(G) ? sizeof(T) : sizeof(G));
  static constexpr int kSums = 4;

  const T* weight;  // read where adaptive
  const G* gradient;
  float eta;
  float sums[kSums];

  template <int N>
  struct Held {
    Pack<T, kAdaptive ? N : 1> w;
    Pack<G, N> g;
  };
  FUSED_SAM_METHOD uintptr_t addresses() const {
    return uintptr_t(gradient) | (kAdaptive ? uintptr_t(weight) : uintptr_t(0));
  }
  template <int N>
  FUSED_SAM_METHOD Held<N> load(int32_t i) const {
    Held<N> held;
    if constexpr (kAdaptive) held.w = fused_sam::load<N, Use::again>(weight + int64_t(i) * N);
    held.g = fused_sam::load<N, Use::again>(gradient + int64_t(i) * N);
    return held;
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Held<N>& held, int32_t, int u) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float w = kAdaptive ? widen(held.w.at[kAdaptive ? k : 0]) : 0.0f;
      const float x = scaled_gradient<kAdaptive, float>(w, widen(held.g.at[k]), eta);
      sums[u % kSums] += x * x;
    }
  }
  FUSED_SAM_METHOD float sum() const { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }
};

template <class T, class G, bool kAdaptive>
FUSED_SAM_DEVICE float sum_squares(const void* weight, const void* gradient, float eta, const Part& part) {
  SumSquares<T, G, kAdaptive> operation{static_cast<const T*>(weight) + part.begin,
                                        static_cast<const G*>(gradient) + part.begin, eta, {}};
  run(operation, part.length);
  return operation.sum();
}

// Sum of squares of g, or of T_w g (core/formulas.h), and what follows from it. Equal gradients give equal norms, bit
// for bit. Squares of |g| above 1.8e19 overflow, which counts as a gradient that is not finite.
template <class T, class G, class Table>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const Table __grid_constant__ table, Slots slots, StatusOf<float>* status, float eps, NormFlags flags) {
  const Part part = part_of(table, int32_t(blockIdx.x));
  const GroupOf<float>& group = table.group[table.group_of[part.tensor]];
  const void* weight = table.data[kWeight][part.tensor];
  const void* gradient = table.data[kGradient][part.tensor];
  float sums[1];
  if (flags.scaled && group.adaptive)
    sums[0] = sum_squares<T, G, true>(weight, gradient, group.eta, part);
  else
    sums[0] = sum_squares<T, G, false>(weight, gradient, 0, part);
  if (reduce(sums, slots)) add_norm<float>(*status, sums[0], eps, flags);
}

// ---- P2: perturb ------------------------------------------------------------------------------------------

template <class T, class G, bool kAdaptive>
struct Perturb {
  static constexpr int kPack = 16 / int(sizeof(T));

  T* weight;
  T* backup;
  const G* gradient;
  float step, eta;

  template <int N>
  struct Held {
    Pack<T, N> w;
    Pack<G, N> g;
  };
  FUSED_SAM_METHOD uintptr_t addresses() const { return uintptr_t(weight) | uintptr_t(backup) | uintptr_t(gradient); }
  template <int N>
  FUSED_SAM_METHOD Held<N> load(int32_t i) const {
    const int64_t at = int64_t(i) * N;
    return {fused_sam::load<N, Use::again>(weight + at), fused_sam::load<N, Use::once>(gradient + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Held<N>& held, int32_t i, int) const {
    const int64_t at = int64_t(i) * N;
    Pack<T, N> moved;
#pragma unroll
    for (int k = 0; k < N; ++k)
      moved.at[k] =
          Narrow<T, float>::of(perturbed<kAdaptive, float>(widen(held.w.at[k]), widen(held.g.at[k]), step, eta));
    store<N, Use::once>(backup + at, held.w);  // not read before the second backward pass is over
    store<N, Use::again>(weight + at, moved);
  }
};

template <class T>
struct Copy {
  static constexpr int kPack = 16 / int(sizeof(T));

  T* to;
  const T* from;

  template <int N>
  using Held = Pack<T, N>;
  FUSED_SAM_METHOD uintptr_t addresses() const { return uintptr_t(to) | uintptr_t(from); }
  template <int N>
  FUSED_SAM_METHOD Held<N> load(int32_t i) const {
    return fused_sam::load<N, Use::once>(from + int64_t(i) * N);
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Held<N>& held, int32_t i, int) const {
    store<N, Use::again>(to + int64_t(i) * N, held);
  }
};

template <class T>
FUSED_SAM_DEVICE void copy(void* to, const void* from, const Part& part) {
  Copy<T> operation{static_cast<T*>(to) + part.begin, static_cast<const T*>(from) + part.begin};
  run(operation, part.length);
}

FUSED_SAM_DEVICE int32_t chunk_from_the_end() { return int32_t(gridDim.x - 1 - blockIdx.x); }

template <class T, class G, class Table>
__global__ void __launch_bounds__(kThreads)
    perturb_kernel(const Table __grid_constant__ table, const StatusOf<float>* status) {
  const Part part = part_of(table, chunk_from_the_end());
  void* weight = table.data[kWeight][part.tensor];
  void* backup = table.data[kBackup][part.tensor];
  if (status->skip != 0) return copy<T>(backup, weight, part);
  const GroupOf<float>& group = table.group[table.group_of[part.tensor]];
  T* w = static_cast<T*>(weight) + part.begin;
  T* b = static_cast<T*>(backup) + part.begin;
  const G* g = static_cast<const G*>(table.data[kGradient][part.tensor]) + part.begin;
  const float step = group.rho * status->inverse;
  if (group.adaptive) {
    Perturb<T, G, true> operation{w, b, g, step, group.eta};
    run(operation, part.length);
  } else {
    Perturb<T, G, false> operation{w, b, g, step, 0};
    run(operation, part.length);
  }
}

// ---- P3: undo and SGD -------------------------------------------------------------------------------------

enum class Momentum { none, heavy_ball, dampened, nesterov };

template <class T, class G, Momentum kMode>
struct Sgd {
  static constexpr int kPack = 16 / int(sizeof(T));
  static constexpr bool kHasMomentum = kMode != Momentum::none;

  T* weight;  // may be `backup`: no pointer here is __restrict__
  const T* backup;
  const G* gradient;
  float* momentum;
  GroupOf<float> h;

  template <int N>
  struct Held {
    Pack<T, N> w;
    Pack<G, N> g;
    Pack<float, kHasMomentum ? N : 1> m;
  };
  FUSED_SAM_METHOD uintptr_t addresses() const {
    return uintptr_t(weight) | uintptr_t(backup) | uintptr_t(gradient) | uintptr_t(momentum);
  }
  template <int N>
  FUSED_SAM_METHOD Held<N> load(int32_t i) const {
    const int64_t at = int64_t(i) * N;
    Held<N> held;
    held.w = fused_sam::load<N, Use::once>(backup + at);
    held.g = fused_sam::load<N, Use::once>(gradient + at);
    if constexpr (kHasMomentum) held.m = fused_sam::load<N, Use::once>(momentum + at);
    return held;
  }
  template <int N>
  FUSED_SAM_METHOD void finish(Held<N>& held, int32_t i, int) const {
    const int64_t at = int64_t(i) * N;
    Pack<T, N> moved;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float w = widen(held.w.at[k]);
      const float d = sgd_gradient<float>(w, widen(held.g.at[k]), h);
      float m = d;
      if constexpr (kHasMomentum)
        held.m.at[k] = m = sgd_momentum<kMode == Momentum::dampened, float>(held.m.at[k], d, h);
      moved.at[k] = Narrow<T, float>::of(sgd_weight<kMode == Momentum::nesterov, float>(w, m, d, h));
    }
    if constexpr (kHasMomentum) store<N, Use::once>(momentum + at, held.m);
    store<N, Use::again>(weight + at, moved);
  }
};

template <class T, class G, Momentum kMode>
FUSED_SAM_DEVICE void sgd(T* w, const T* b, const G* g, float* m, const GroupOf<float>& h, int32_t length) {
  Sgd<T, G, kMode> operation{w, b, g, m, h};
  run(operation, length);
}

template <class T, class G, class Table>
__global__ void __launch_bounds__(kThreads)
    sgd_kernel(const Table __grid_constant__ table, const StatusOf<float>* status, const float* grad_scale) {
  const Part part = part_of(table, chunk_from_the_end());
  void* weight = table.data[kWeight][part.tensor];
  const void* backup = table.data[kBackup][part.tensor];
  if (status->skip != 0) {
    if (backup != weight) copy<T>(weight, backup, part);
    return;
  }
  const int32_t number = table.group_of[part.tensor];
  GroupOf<float> h = table.group[number];
  if (const void* lr = table.lr[number])
    h.lr = table.lr_is_double[number] ? float(*static_cast<const double*>(lr)) : *static_cast<const float*>(lr);
  if (grad_scale != nullptr) h.factor /= *grad_scale;
  T* w = static_cast<T*>(weight) + part.begin;
  const T* b = static_cast<const T*>(backup) + part.begin;
  const G* g = static_cast<const G*>(table.data[kGradient][part.tensor]) + part.begin;
  float* m = static_cast<float*>(table.data[kMomentum][part.tensor]);
  if (h.momentum == 0 || m == nullptr) return sgd<T, G, Momentum::none>(w, b, g, nullptr, h, part.length);
  m += part.begin;
  if (h.nesterov) return sgd<T, G, Momentum::nesterov>(w, b, g, m, h, part.length);  // torch: no dampening beside it
  if (h.keep == 1) return sgd<T, G, Momentum::heavy_ball>(w, b, g, m, h, part.length);
  sgd<T, G, Momentum::dampened>(w, b, g, m, h, part.length);
}

// ---- undo -------------------------------------------------------------------------------------------------

template <class T, class Table>
__global__ void __launch_bounds__(kThreads) restore_kernel(const Table __grid_constant__ table) {
  const Part part = part_of(table, chunk_from_the_end());
  copy<T>(table.data[kWeight][part.tensor], table.data[kBackup][part.tensor], part);
}

// ---- P4: dot products -------------------------------------------------------------------------------------

template <class X, class Y>
constexpr int kPackOfBoth = 16 / int(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));

template <class X, class Y>
struct Dots {
  static constexpr int kPack = kPackOfBoth<X, Y>;

  const X* x;
  const Y* y;
  float sums[3];

  template <int N>
  struct Held {
    Pack<X, N> x;
    Pack<Y, N> y;
  };
  FUSED_SAM_METHOD uintptr_t addresses() const { return uintptr_t(x) | uintptr_t(y); }
  template <int N>
  FUSED_SAM_METHOD Held<N> load(int32_t i) const {
    const int64_t at = int64_t(i) * N;
    return {fused_sam::load<N, Use::again>(x + at), fused_sam::load<N, Use::again>(y + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Held<N>& held, int32_t, int) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float a = widen(held.x.at[k]), b = widen(held.y.at[k]);
      sums[0] += a * b;
      sums[1] += a * a;
      sums[2] += b * b;
    }
  }
};

template <class X, class Y, class Table>
__global__ void __launch_bounds__(kThreads)
    dots_kernel(const Table __grid_constant__ table, Slots slots, float* sums, bool begin) {
  const Part part = part_of(table, int32_t(blockIdx.x));
  Dots<X, Y> operation{static_cast<const X*>(table.data[kX][part.tensor]) + part.begin,
                       static_cast<const Y*>(table.data[kY][part.tensor]) + part.begin,
                       {}};
  run(operation, part.length);
  if (reduce(operation.sums, slots)) {
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] = begin ? operation.sums[k] : sums[k] + operation.sums[k];
  }
}

// ---- P5 and P6: a * x + b * y -----------------------------------------------------------------------------

template <class X, class Y, class O>
struct Combine {
  static constexpr int kPack = kPackOfBoth<X, Y>;

  const X* x;
  const Y* y;
  O* out;  // may be x or y
  float a, b;

  template <int N>
  struct Held {
    Pack<X, N> x;
    Pack<Y, N> y;
  };
  FUSED_SAM_METHOD uintptr_t addresses() const { return uintptr_t(x) | uintptr_t(y) | uintptr_t(out); }
  template <int N>
  FUSED_SAM_METHOD Held<N> load(int32_t i) const {
    const int64_t at = int64_t(i) * N;
    return {fused_sam::load<N, Use::again>(x + at), fused_sam::load<N, Use::again>(y + at)};
  }
  template <int N>
  FUSED_SAM_METHOD void finish(const Held<N>& held, int32_t i, int) const {
    Pack<O, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k)
      result.at[k] = Narrow<O, float>::of(combined<float>(a, widen(held.x.at[k]), b, widen(held.y.at[k])));
    store<N, Use::again>(out + int64_t(i) * N, result);
  }
};

template <class X, class Y, class O, class Table>
__global__ void __launch_bounds__(kThreads) combine_kernel(const Table __grid_constant__ table, Coefficients by) {
  const Part part = part_of(table, chunk_from_the_end());
  Combine<X, Y, O> operation{static_cast<const X*>(table.data[kX][part.tensor]) + part.begin,
                             static_cast<const Y*>(table.data[kY][part.tensor]) + part.begin,
                             static_cast<O*>(table.data[kOut][part.tensor]) + part.begin,
                             by.device == nullptr ? by.a : by.device[0],
                             by.device == nullptr ? by.b : by.device[1]};
  run(operation, part.length);
}

// ---- launchers --------------------------------------------------------------------------------------------

template <class T>
struct Type {
  using type = T;
};

template <class F>
void with_types(Dtypes d, F&& call) {
  if (d.weight == Dtype::f32) return call(Type<float>{}, Type<float>{});
  if (d.weight == Dtype::bf16)
    return d.gradient == Dtype::f32 ? call(Type<bf16>{}, Type<float>{}) : call(Type<bf16>{}, Type<bf16>{});
  return d.gradient == Dtype::f32 ? call(Type<f16>{}, Type<float>{}) : call(Type<f16>{}, Type<f16>{});
}

// Two lists have one dtype, or one of them has fp32.
template <class F>
void with_types(ListDtypes d, F&& call) {
  if (d.x == Dtype::f32 && d.y == Dtype::f32) return call(Type<float>{}, Type<float>{});
  if (d.x == Dtype::bf16)
    return d.y == Dtype::f32 ? call(Type<bf16>{}, Type<float>{}) : call(Type<bf16>{}, Type<bf16>{});
  if (d.x == Dtype::f16) return d.y == Dtype::f32 ? call(Type<f16>{}, Type<float>{}) : call(Type<f16>{}, Type<f16>{});
  return d.y == Dtype::bf16 ? call(Type<float>{}, Type<bf16>{}) : call(Type<float>{}, Type<f16>{});
}

const char* name_of(Dtype d) {
  return d == Dtype::f32 ? "fp32" : d == Dtype::f64 ? "fp64" : d == Dtype::bf16 ? "bf16" : "fp16";
}
std::string name_of(Dtypes d) { return std::string(name_of(d.weight)) + " weights, " + name_of(d.gradient) + " gradients"; }
std::string name_of(ListDtypes d) { return std::string(name_of(d.x)) + " and " + name_of(d.y); }

template <class D, class... Parameters, class... Arguments>
void launch(const char* name, D dtypes, int32_t blocks, cudaStream_t stream, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t last = cudaGetLastError();  // taken, so that it is not reported to whoever asks next
  const cudaError_t error = launched != cudaSuccess ? launched : last;
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA kernel ") + name + " (" + name_of(dtypes) + ", " + std::to_string(blocks) +
                             " blocks) was not launched: " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

}  // namespace

template <class Table>
void Launchers<Table>::norm(Dtypes d, const Table& table, int32_t blocks, Slots slots, StatusOf<float>* status,
                            float eps, NormFlags flags, cudaStream_t stream) {
  with_types(d, [&](auto t, auto g) {
    launch("norm", d, blocks, stream, norm_kernel<typename decltype(t)::type, typename decltype(g)::type, Table>, table,
           slots, status, eps, flags);
  });
}

template <class Table>
void Launchers<Table>::perturb(Dtypes d, const Table& table, int32_t blocks, const StatusOf<float>* status,
                               cudaStream_t stream) {
  with_types(d, [&](auto t, auto g) {
    launch("perturb", d, blocks, stream, perturb_kernel<typename decltype(t)::type, typename decltype(g)::type, Table>,
           table, status);
  });
}

template <class Table>
void Launchers<Table>::sgd(Dtypes d, const Table& table, int32_t blocks, const StatusOf<float>* status,
                           const float* grad_scale, cudaStream_t stream) {
  with_types(d, [&](auto t, auto g) {
    launch("sgd", d, blocks, stream, sgd_kernel<typename decltype(t)::type, typename decltype(g)::type, Table>, table,
           status, grad_scale);
  });
}

template <class Table>
void Launchers<Table>::restore(Dtypes d, const Table& table, int32_t blocks, cudaStream_t stream) {
  if (size_of(d.weight) == 4)
    launch("restore", d, blocks, stream, restore_kernel<float, Table>, table);
  else
    launch("restore", d, blocks, stream, restore_kernel<bf16, Table>, table);
}

template <class Table>
void Launchers<Table>::dots(ListDtypes d, const Table& table, int32_t blocks, Slots slots, float* sums, bool begin,
                            cudaStream_t stream) {
  with_types(d, [&](auto x, auto y) {
    launch("dots", d, blocks, stream, dots_kernel<typename decltype(x)::type, typename decltype(y)::type, Table>, table,
           slots, sums, begin);
  });
}

template <class Table>
void Launchers<Table>::combine(ListDtypes d, const Table& table, int32_t blocks, Coefficients by, cudaStream_t stream) {
  with_types(d, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if (d.out == d.x)
      launch("combine", d, blocks, stream, combine_kernel<X, Y, X, Table>, table, by);
    else
      launch("combine", d, blocks, stream, combine_kernel<X, Y, Y, Table>, table, by);
  });
}

template struct Launchers<SmallTable>;
#if CUDART_VERSION >= 12010
template struct Launchers<LargeTable>;
bool large_tables_compiled() { return true; }
#else
bool large_tables_compiled() { return false; }
#endif

bool has_cuda_instance(Dtypes d) {
  const bool narrow = d.weight == Dtype::bf16 || d.weight == Dtype::f16;
  return (d.weight == Dtype::f32 || narrow) && (d.gradient == d.weight || (narrow && d.gradient == Dtype::f32));
}

bool has_cuda_instance(ListDtypes d) {
  const bool known = d.x != Dtype::f64 && d.y != Dtype::f64;
  return known && (d.x == d.y || d.x == Dtype::f32 || d.y == Dtype::f32) && (d.out == d.x || d.out == d.y);
}

cudaError_t kernels_fit_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(restore_kernel<float, SmallTable>));
  cudaGetLastError();
  return error;
}

}  // namespace fused_sam
