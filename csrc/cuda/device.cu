// Queries of the CUDA runtime, and its answers as sentences.
#include "cuda/device.h"

#include <stdexcept>

#include "cuda/kernels.h"

namespace fused_sam {
namespace {

std::string text_of(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // cleared, so that no later call reports it again
  throw std::runtime_error(std::string(what) + " failed: " + text_of(error));
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Returns the driver's cuDevicePrimaryCtxGetState, to which the runtime has no equal; null if there is none.
using ContextState = int (*)(int device, unsigned int* flags, int* active);
ContextState context_state() {
  void* found = nullptr;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault, nullptr);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault);
#endif
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? reinterpret_cast<ContextState>(found) : nullptr;
}

// Returns true if this process has a context on the device, or if that cannot be asked.
bool has_context(int device) {
  static const ContextState state = context_state();
  unsigned int flags = 0;
  int active = 0;
  return state == nullptr || state(device, &flags, &active) != 0 || active != 0;
}

}  // namespace

OnDevice::OnDevice(int device) {
  check(cudaGetDevice(&before_), "asking for the current CUDA device");
  changed_ = before_ != device;
  if (changed_) check(cudaSetDevice(device), "switching to the tensors' CUDA device");
}

OnDevice::~OnDevice() {
  // As torch does: since CUDA 12 cudaSetDevice makes a context, some 500 MB, which every process would have on GPU 0.
  if (changed_ && has_context(before_)) cudaSetDevice(before_);
}

int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking for a property of the CUDA device");
  return value;
}

void check_memory_of(int device, uintptr_t address, const char* what, size_t row) {
  cudaPointerAttributes attributes = {};
  check(cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(address)),
        "asking what memory an address is");
  if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
    throw std::invalid_argument(std::string("the ") + what + " of tensor " + std::to_string(row) +
                                " is not in GPU memory: move it to cuda:" + std::to_string(device));
  if (attributes.type == cudaMemoryTypeDevice && attributes.device != device)
    throw std::invalid_argument(std::string("the ") + what + " of tensor " + std::to_string(row) + " is on cuda:" +
                                std::to_string(attributes.device) + ", the table on cuda:" + std::to_string(device) +
                                ": use one optimizer per device");
}

int cuda_runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int cuda_driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) cudaGetLastError();
  return version;
}

std::string cuda_unavailable_reason() {
  if (cuda_driver_version() == 0) return "no NVIDIA driver is installed on this machine";
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) cudaGetLastError();
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver runs CUDA " + version_text(cuda_driver_version()) +
           " at most, and fused_sam._cuda was built with " + version_text(cuda_runtime_version()) +
           ": update the driver, or build with an older CUDA toolkit";
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) return "no NVIDIA GPU is visible";
  if (error != cudaSuccess) return "CUDA does not start: " + text_of(error);
  return "";
}

std::string device_unavailable_reason(int device) {
  const OnDevice guard(device);
  const cudaError_t error = kernels_fit_device();
  if (error == cudaSuccess) return "";
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  return "fused_sam._cuda has no kernels for cuda:" + std::to_string(device) + ", whose compute capability is " +
         std::to_string(major) + "." + std::to_string(minor) + " (" + cudaGetErrorName(error) +
         "): build it with FUSED_SAM_CUDA_ARCHS=native; 8.0 is the oldest that is supported";
}

}  // namespace fused_sam
