// The machine under the CUDA backend: whether it can run here, which device is current, whose memory an address is.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace fused_sam {

// Why CUDA cannot be used here, in words; empty where it can.
std::string cuda_problem();
// Why these kernels cannot run on that device; empty where they can.
std::string cuda_device_problem(int device);
int cuda_runtime_version();  // such as 13000: of the runtime that is linked in
int cuda_driver_version();   // the newest CUDA that the driver can run; 0 without one

// Makes a device current while it lives.
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

// Throws where the address of a tensor's `what` is not memory of that device; one driver call.
void check_memory_of(int device, uintptr_t address, const char* what, size_t row);

}  // namespace fused_sam
