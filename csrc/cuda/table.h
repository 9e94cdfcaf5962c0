// Tables of tensors on one GPU, as the Python bindings see them: addresses are integers, so is the stream.
//
// Everything here throws std::runtime_error or std::invalid_argument with what is wrong and what to do. Nothing waits
// for the device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/formulas.h"
#include "core/status.h"
#include "core/storage.h"
#include "cuda/launch_table.h"

namespace fused_sam {

struct Slots;

// A learning rate that lies on the device; address 0: the group's own number counts.
struct DeviceRate {
  uintptr_t address = 0;
  bool is_double = false;
};

// Columns of addresses, cut into launches.
class Columns {
 public:
  // chunk: elements a block takes; 0: from the device and the work.
  Columns(int device, std::vector<int64_t> sizes, std::vector<int32_t> groups, int64_t chunk);

  // check_memory: also that every address is memory of this device, which costs a driver call each.
  void set(Column column, const char* what, const std::vector<uintptr_t>& addresses, int64_t element_size,
           bool check_memory);

  int device() const { return device_; }
  int64_t chunk() const { return chunk_; }
  int64_t chunks() const;
  int64_t launches() const { return int64_t(plans_.size()); }

 protected:
  template <class F>
  void each(bool from_the_end, F&& launch);
  Slots slots(uintptr_t workspace, const LaunchPlan& plan) const;

  int device_;
  std::vector<int64_t> sizes_;
  int64_t chunk_;
  std::vector<LaunchPlan> plans_;
  // One entry a launch, in one of the two.
  std::vector<SmallTable> small_;
  std::vector<LargeTable> large_;
};

// P1 to P3.
class CudaTable : public Columns {
 public:
  CudaTable(Dtype weight, Dtype gradient, int device, std::vector<int64_t> sizes, std::vector<int32_t> groups,
            int64_t chunk);

  using Groups = std::vector<GroupOf<double>>;

  int64_t weight_size() const { return size_of(weight_); }
  int64_t gradient_size() const { return size_of(gradient_); }
  int64_t workspace_bytes() const;  // of zeros before the first norm; kept as the norm leaves it
  void norm(const Groups&, uintptr_t status, NormFlags, double eps, uintptr_t workspace, uintptr_t stream);
  void perturb(const Groups&, uintptr_t status, uintptr_t stream);
  // rates: none, or one a group. grad_scale: 0, or the address of a float.
  void sgd(const Groups&, const std::vector<DeviceRate>& rates, uintptr_t status, uintptr_t grad_scale, uintptr_t stream);
  void restore(uintptr_t stream);

 private:
  void set_groups(const Groups&, const std::vector<DeviceRate>& rates);

  Dtype weight_, gradient_;
  int32_t group_count_ = 0;  // the highest group number and one
};

// P4 to P6.
class CudaLists : public Columns {
 public:
  CudaLists(Dtype x, Dtype y, int device, std::vector<int64_t> sizes, int64_t chunk);

  using Addresses = std::vector<uintptr_t>;

  int64_t workspace_bytes() const;
  void dots(const Addresses& x, const Addresses& y, uintptr_t sums, bool begin, uintptr_t workspace, uintptr_t stream);
  // coefficients: the address of two floats, or 0 for the numbers a and b.
  void combine(const Addresses& x, const Addresses& y, Dtype out_dtype, const Addresses& out, uintptr_t coefficients,
               double a, double b, uintptr_t stream);

 private:
  Dtype x_, y_;
};

bool cuda_lists_served(Dtype x, Dtype y);

// Why CUDA cannot be used here, in words; empty where it can.
std::string cuda_problem();
// Why these kernels cannot run on that device; empty where they can.
std::string cuda_device_problem(int device);
int cuda_runtime_version();  // such as 13000: of the runtime that is linked in
int cuda_driver_version();   // the newest CUDA that the driver can run; 0 without one

}  // namespace fused_sam
