// How a launcher finds the instance for its dtypes, and how it reports a launch that fails.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/tuning.h"

// Instantiates a file's launchers for small tables and, if the toolkit passes them, for middle and large ones.
#if FUSED_SAM_LARGE_TABLES
#define FUSED_SAM_LAUNCHERS(Kernels, Small, Middle, Large) \
  template struct Kernels<Small>;                          \
  template struct Kernels<Middle>;                         \
  template struct Kernels<Large>
#else
#define FUSED_SAM_LAUNCHERS(Kernels, Small, Middle, Large) template struct Kernels<Small>
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

template <class T>
using Plain = std::remove_cv_t<std::remove_reference_t<T>>;

// Launches a kernel, whose parameters' types are those of the arguments. CUDA's own template copies every argument once
// more, which for a large table is 32 KB.
template <class... Parameters, class... Arguments>
static cudaError_t launch_kernel(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                                 const Arguments&... arguments) {
  static_assert((std::is_same_v<Plain<Parameters>, Arguments> && ...), "an argument is not of its parameter's type");
#if defined(__CUDACC__)
  const void* addresses[] = {static_cast<const void*>(&arguments)...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), const_cast<void**>(addresses));
#else
  return cudaLaunchKernelEx(&config, kernel, arguments...);  // csrc/tests/cuda_shim
#endif
}

// Return the error of a call, or one that the runtime still holds. It is cleared, so that no later call reports it again.
static inline cudaError_t error_of(cudaError_t error) {
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}
[[noreturn]] static inline void refuse(const std::string& what, cudaError_t error) {
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// what: the dtypes, or a text, for the error message.
template <int kBlock = kThreads, class D, class... Parameters, class... Arguments>
static void launch(const char* name, D what, int32_t blocks, cudaStream_t stream, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kBlock);
  config.stream = stream;
  const cudaError_t error = error_of(launch_kernel(config, kernel, arguments...));
  if (error != cudaSuccess)
    refuse(std::string("CUDA kernel ") + name + " (" + name_of(what) + ", " + std::to_string(blocks) +
               " blocks) was not launched", error);
}

// Loads a kernel onto the current device.
template <class... Parameters>
static void load_kernel(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = error_of(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  if (error != cudaSuccess) refuse("a CUDA kernel was not loaded onto the GPU", error);
}

// Return how many blocks of a kernel an SM of the current device holds at a time.
template <class... Parameters>
static int blocks_that_fit(void (*kernel)(Parameters...)) {
  int blocks = 0;
  const cudaError_t error = error_of(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  if (error != cudaSuccess) refuse("asking how many blocks of a CUDA kernel an SM holds failed", error);
  return blocks;
}

}  // namespace fused_sam
