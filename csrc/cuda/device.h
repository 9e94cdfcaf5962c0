// Queries of the machine: whether the CUDA backend can run, the current device, and the memory of an address.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace fused_sam {

// Return why CUDA cannot be used on this machine; empty if it can.
std::string cuda_unavailable_reason();
// Return why these kernels cannot run on that device; empty if they can.
std::string device_unavailable_reason(int device);
int cuda_runtime_version();  // of the runtime that is linked in, such as 13000
int cuda_driver_version();   // the newest CUDA that the driver can run; 0 without a driver

// Makes a device current for its own lifetime. A device without a context does not become current again, because that
// would make one.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

int device_attribute(cudaDeviceAttr which, int device);

// Throws if the address of a tensor's `what` is not memory of that device; one driver call.
void check_memory_of(int device, uintptr_t address, const char* what, size_t row);

}  // namespace fused_sam
