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
#include "cuda/kernels.h"

namespace fused_sam {

// A learning rate that lies on the device; address 0: the group's own number counts.
struct DeviceRate {
  uintptr_t address = 0;
  bool is_double = false;
};

// A table cut into launches of Small tables, or of Large ones where one small table does not hold it.
template <class SmallTable, class LargeTable>
struct Launches {
  using Small = SmallTable;
  using Large = LargeTable;

  std::vector<LaunchPlan> plans;
  // One entry a launch, in one of the two.
  std::vector<Small> small;
  std::vector<Large> large;

  // f(table, plan) for each.
  template <class F>
  void each(F&& f) {
    for (size_t k = 0; k < small.size(); ++k) f(small[k], plans[k]);
    for (size_t k = 0; k < large.size(); ++k) f(large[k], plans[k]);
  }
};
using PassLaunches = Launches<SmallTable, LargeTable>;
using AdamLaunches = Launches<SmallAdamTable, LargeAdamTable>;

// Columns of addresses.
class Columns {
 public:
  // chunk: elements a block takes; 0: from the device and the work.
  Columns(int device, std::vector<int64_t> sizes, std::vector<int32_t> groups, int64_t chunk);

  using Addresses = std::vector<uintptr_t>;

  int device() const { return device_; }
  int64_t chunk() const { return chunk_; }
  int64_t chunks() const;
  int64_t launches() const { return int64_t(pass_.plans.size()); }

 protected:
  template <class L>
  void cut(L& launches, const std::vector<int32_t>& groups) const;
  // check_memory: also that every address is memory of this device, which costs a driver call each.
  void check(const char* what, const Addresses&, int64_t element_size, bool check_memory, bool may_miss) const;
  template <class L>
  void fill(L& launches, Column, const Addresses&) const;
  template <class L, class F>
  void run(L& launches, bool from_the_end, F&& launch);
  Slots slots(uintptr_t workspace, const LaunchPlan& plan) const;

  int device_;
  std::vector<int64_t> sizes_;
  int64_t chunk_;
  PassLaunches pass_;
};

// What an update is told beside the groups.
struct Update {
  std::vector<DeviceRate> rates;  // none, or one a group
  uintptr_t status = 0;
  uintptr_t grad_scale = 0;       // of a float; 0: none
  uintptr_t workspace = 0;        // of Adam
  uint64_t seed = 0;
  bool random_rounding = false;
  uintptr_t stream = 0;
};

// P1 to P3 and P7.
class CudaTable : public Columns {
 public:
  // model: the weights' dtype, or that of what the network computes with beside master weights.
  // streams: of random numbers, one a tensor; empty where nothing is drawn.
  CudaTable(Dtype weight, Dtype gradient, Dtype model, int device, std::vector<int64_t> sizes, std::vector<int32_t> groups,
            std::vector<uint32_t> streams, int64_t chunk);

  using Groups = std::vector<GroupOf<double>>;

  void set_weights(const Addresses&);
  void set_backups(const Addresses&);
  void set_models(const Addresses&);
  void set_gradients(const Addresses&);
  void set_momenta(const Addresses&);  // SGD's, or Adam's exp_avg
  void set_adam(const Addresses& squares, const Addresses& largest, const Addresses& steps);

  int64_t workspace_bytes() const;  // of zeros before the first use; kept as the kernels leave it
  void norm(const Groups&, uintptr_t status, NormFlags, double eps, uintptr_t workspace, uintptr_t stream);
  void perturb(const Groups&, uintptr_t status, uint64_t seed, bool random_rounding, uintptr_t stream);
  void sgd(const Groups&, const Update&);
  void adam(const Groups&, const Update&);
  void restore(uintptr_t stream);

 private:
  void set(Column, const char* what, const Addresses&, int64_t element_size, bool check_memory, bool may_miss = false);
  template <class L>
  void set_streams(L& launches) const;
  void check_call(const Groups&, const std::vector<DeviceRate>& rates, bool drawn) const;

  Dtypes dtypes_;
  std::vector<int32_t> groups_;
  std::vector<uint32_t> streams_;
  AdamLaunches adam_;        // empty until Adam's state is set
  int32_t group_count_ = 0;  // the highest group number and one
};

// P4 to P6.
class CudaLists : public Columns {
 public:
  CudaLists(Dtype x, Dtype y, int device, std::vector<int64_t> sizes, int64_t chunk);

  int64_t workspace_bytes() const;
  void dots(const Addresses& x, const Addresses& y, uintptr_t sums, bool begin, uintptr_t workspace, uintptr_t stream);
  // coefficients: the address of two floats, or 0 for the numbers a and b. status: 0, or nothing is written under skip.
  void combine(const Addresses& x, const Addresses& y, Dtype out_dtype, const Addresses& out, uintptr_t coefficients,
               double a, double b, uintptr_t status, uintptr_t stream);

 private:
  void set(Column, const char* what, const Addresses&, Dtype);

  Dtype x_, y_;
};

bool cuda_lists_served(Dtype x, Dtype y);

// The end of P1 by itself.
void cuda_finish(uintptr_t status, NormFlags, double eps, int device, uintptr_t stream);

}  // namespace fused_sam
