// How a launcher finds the instance for its dtypes, and how it reports a launch that fails.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/tuning.h"

// Instantiates a file's launchers for small tables and, if the toolkit passes them, for large ones.
#if FUSED_SAM_LARGE_TABLES
#define FUSED_SAM_LAUNCHERS(Kernels, Small, Large) \
  template struct Kernels<Small>;                  \
  template struct Kernels<Large>
#else
#define FUSED_SAM_LAUNCHERS(Kernels, Small, Large) template struct Kernels<Small>
#endif

namespace fused_sam {

template <class T>
struct Type {
  using type = T;
};
template <class T>
using of = typename T::type;

// call(param, grad, master), for the dtypes that has_cuda_instance accepts.
template <class F>
static void with_types(Dtypes d, F&& call) {
  if (d.param == Dtype::f32) return call(Type<float>{}, Type<float>{}, Type<float>{});
  const auto narrow = [&](auto p) {
    const auto with = [&](auto m) {
      d.grad == Dtype::f32 ? call(p, Type<float>{}, m) : call(p, p, m);
    };
    d.has_masters() ? with(Type<float>{}) : with(p);
  };
  d.param == Dtype::bf16 ? narrow(Type<bf16>{}) : narrow(Type<f16>{});
}

static inline const char* name_of(Dtype d) {
  return d == Dtype::f32 ? "fp32" : d == Dtype::f64 ? "fp64" : d == Dtype::bf16 ? "bf16" : "fp16";
}
static inline std::string name_of(Dtypes d) {
  return std::string(name_of(d.param)) + " params, " + name_of(d.grad) + " grads" +
         (d.has_masters() ? std::string(", ") + name_of(d.master) + " masters" : "");
}
static inline std::string name_of(VectorDtypes d) { return std::string(name_of(d.x)) + " and " + name_of(d.y); }
static inline std::string name_of(const char* text) { return text; }

// what: the dtypes, or a text, for the error message.
template <int kBlock = kThreads, class D, class... Parameters, class... Arguments>
static void launch(const char* name, D what, int32_t blocks, cudaStream_t stream, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kBlock);
  config.stream = stream;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t last = cudaGetLastError();  // cleared, so that no later call reports it again
  const cudaError_t error = launched != cudaSuccess ? launched : last;
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA kernel ") + name + " (" + name_of(what) + ", " +
                             std::to_string(blocks) + " blocks) was not launched: " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
}

}  // namespace fused_sam
