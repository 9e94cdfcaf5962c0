// A replacement of CUDA's header, with which g++ compiles csrc/cuda for a machine without a GPU. Tests only.
//
// A kernel's blocks run one after another, in a new order at every launch; the threads of a block are fibers
// (fibers.h), switched at barriers and shuffles. Shared memory is static storage. Tests set the state of the machine in cuda_shim::machine().
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibers.h"

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__ &  // "const T __grid_constant__ x": one copy for all threads, as on a GPU
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- the runtime ------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInsufficientDriver,
  cudaErrorNoDevice,
  cudaErrorInvalidDevice,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidResourceHandle,
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
struct cudaFuncAttributes {};
struct cudaStreamValue;
using cudaStream_t = cudaStreamValue*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_shim {

// A launch as a driver gets it: the address of the kernel, blocks, threads, and the bytes of each argument.
using OnLaunch = std::function<void(const void*, unsigned, unsigned, const std::vector<std::string>&)>;

struct Machine {
  int driver = 13000;
  int devices = 2;
  int current_device = 0;
  std::set<int> contexts;  // devices that have a context
  int sm_count = 2;
  int capability = 9;
  cudaError_t device_count_error = cudaSuccess;
  cudaError_t kernel_image = cudaSuccess;
  cudaError_t next_launch = cudaSuccess;  // the result of the next launch, once
  uintptr_t freed_stream = 0;             // a stream on which every launch fails
  int launches = 0;
  OnLaunch on_launch;                     // runs the launches, if it is set
  int unloaded_launches = 0;  // of kernels that were not loaded before
  std::set<const void*> loaded;
  int blocks_per_sm = 2;
  std::map<uintptr_t, cudaPointerAttributes> memory;  // addresses that are not memory of device 0
};
inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

// Return the numbers below `count` in an order that differs from launch to launch. Every program has the same orders.
inline std::vector<unsigned> shuffled(unsigned count) {
  static std::mt19937 random(1);
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

}  // namespace cuda_shim

namespace cuda_shim {

// What most calls do on the current device.
inline void make_context() { machine().contexts.insert(machine().current_device); }
inline int primary_context_state(int device, unsigned int* flags, int* active) {
  *flags = 0;
  *active = machine().contexts.count(device) != 0;
  return 0;
}

}  // namespace cuda_shim

inline dim3 gridDim, blockDim, blockIdx;
#define threadIdx dim3(unsigned(::cuda_shim::current_thread()), 0, 0)

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
  }
  return "unknown";
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error of cuda_shim"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = cuda_shim::machine().driver, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = cuda_shim::machine().devices;
  return cuda_shim::machine().device_count_error;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_shim::machine().current_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_shim::machine().devices) return cudaErrorInvalidDevice;
  cuda_shim::machine().current_device = device;
  cuda_shim::make_context();
  return cudaSuccess;
}
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned int, unsigned long long,
                                                    void*) {
  if (symbol != std::string("cuDevicePrimaryCtxGetState")) return cudaErrorInvalidValue;
  *found = reinterpret_cast<void*>(&cuda_shim::primary_context_state);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 0 || device >= cuda_shim::machine().devices) return cudaErrorInvalidDevice;
  *value = which == cudaDevAttrMultiProcessorCount      ? cuda_shim::machine().sm_count
           : which == cudaDevAttrComputeCapabilityMajor ? cuda_shim::machine().capability
                                                        : 0;
  return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  cuda_shim::make_context();
  const auto found = cuda_shim::machine().memory.find(reinterpret_cast<uintptr_t>(address));
  *attributes = found != cuda_shim::machine().memory.end()
                    ? found->second
                    : cudaPointerAttributes{cudaMemoryTypeDevice, cuda_shim::machine().current_device};
  return cudaSuccess;
}
// A kernel that is asked for counts as loaded.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  cuda_shim::make_context();
  cuda_shim::machine().loaded.insert(kernel);
  return cuda_shim::machine().kernel_image;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  cuda_shim::make_context();
  return *blocks = cuda_shim::machine().blocks_per_sm, cudaSuccess;
}

namespace cuda_shim {

template <class T>
std::string bytes_of(const T& x) {
  static_assert(std::is_trivially_copyable<T>::value, "a kernel's argument is copied byte by byte");
  return std::string(reinterpret_cast<const char*>(&x), sizeof(T));
}

}  // namespace cuda_shim

// Runs the whole grid before it returns.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  cuda_shim::Machine& machine = cuda_shim::machine();
  ++machine.launches;
  machine.unloaded_launches += machine.loaded.count(reinterpret_cast<const void*>(kernel)) == 0;
  const cudaError_t error = std::exchange(machine.next_launch, cudaSuccess);
  if (error != cudaSuccess) return error;
  if (config->stream != nullptr && reinterpret_cast<uintptr_t>(config->stream) == machine.freed_stream)
    return cudaErrorInvalidResourceHandle;
  cuda_shim::make_context();
  if (machine.on_launch) {
    machine.on_launch(reinterpret_cast<const void*>(kernel), config->gridDim.x, config->blockDim.x,
                      {cuda_shim::bytes_of<std::decay_t<Parameters>>(arguments)...});
    return cudaSuccess;
  }
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const auto body = [&] { kernel(arguments...); };
  for (unsigned block : cuda_shim::shuffled(config->gridDim.x)) {
    blockIdx = dim3(block, 0, 0);
    cuda_shim::run_block(int(config->blockDim.x), body);
  }
  return cudaSuccess;
}

// ---- the device's functions --------------------------------------------------------------------------------

inline void __syncthreads() { cuda_shim::wait_for_block(); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::exchange(*address, *address + value); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_shim::exchange(mask, value, lane);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_shim::exchange(mask, value, cuda_shim::current_thread() % 32 ^ lanes);
}

// Cache hints change nothing. A misaligned vector access is an error on a GPU, and the sanitizer reports it here.
template <class T>
inline T __ldcs(const T* from) { return *from; }
template <class T>
inline T __ldcg(const T* from) { return *from; }
template <class T>
inline void __stcs(T* to, T value) { *to = value; }
