// Tables of tensors on one GPU for the Python bindings, to which addresses and streams are integers.
//
// Every function here throws std::runtime_error or std::invalid_argument with what is wrong and what to do. None waits
// for the device.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/formulas.h"
#include "core/status.h"
#include "core/storage.h"
#include "cuda/kernels.h"

namespace fused_sam {

// A learning rate on the device; with address 0 the number in the group counts.
struct DeviceRate {
  uintptr_t address = 0;
  bool is_double = false;
};

// A table cut into launches of Small tables, or of Middle or Large ones if one smaller table does not hold it.
template <class SmallTable, class MiddleTable, class LargeTable>
struct Launches {
  using Small = SmallTable;
  using Middle = MiddleTable;
  using Large = LargeTable;

  std::vector<LaunchPlan> plans;
  // One entry per launch, in one of the three.
  std::vector<Small> small;
  std::vector<Middle> middle;
  std::vector<Large> large;

  // f(table, plan) for the k-th launch.
  template <class F>
  void at(size_t k, F&& f) {
    if (!small.empty()) return f(small[k], plans[k]);
    if constexpr (FUSED_SAM_LARGE_TABLES) {
      if (!middle.empty()) return f(middle[k], plans[k]);
      f(large[k], plans[k]);
    }
  }
  template <class F>
  void each(F&& f) {
    for (size_t k = 0; k < plans.size(); ++k) at(k, f);
  }
};
using TableLaunches = Launches<SmallTable, MiddleTable, LargeTable>;
using AdamLaunches = Launches<SmallAdamTable, MiddleAdamTable, LargeAdamTable>;

// Columns of addresses.
class Columns {
 public:
  // chunk: elements per block; 0: from the device and the number of elements.
  Columns(int device, std::vector<int64_t> sizes, const std::vector<int32_t>& group_ids, int64_t chunk);

  using Addresses = std::vector<uintptr_t>;

  int device() const { return device_; }
  int64_t chunk() const { return chunk_; }
  int64_t chunks() const;
  int64_t launches() const { return int64_t(launches_.plans.size()); }
  // Blocks of the launches of a reduction.
  int64_t reduction_blocks() const;

 protected:
  template <class L>
  void cut(L& launches, const std::vector<int32_t>& group_ids) const;
  // check_memory: also check that every address is memory of this device, by a driver call for each.
  // may_miss: an address may be 0.
  void check(const char* what, const Addresses&, int64_t element_size, bool check_memory, bool may_miss) const;
  template <class L>
  void fill(L& launches, Column, const Addresses&) const;
  template <class L, class F>
  void run(L& launches, bool from_the_end, F&& launch);
  // The grid of a reduction over the launch, and its slots.
  int32_t reduction_blocks(const LaunchPlan& plan) const;
  Slots slots(uintptr_t workspace, const LaunchPlan& plan) const;
  // Sets fitting_ from that of the reduction on an SM.
  void set_fitting(int on_an_sm);

  int device_;
  std::vector<int64_t> sizes_;
  int64_t chunk_;
  TableLaunches launches_;
  int64_t fitting_ = 1;  // blocks of a reduction that the GPU holds at a time
};

// Arguments of an update besides its groups.
struct UpdateArguments {
  std::vector<DeviceRate> rates;  // none, or one per group
  uintptr_t status = 0;
  uintptr_t grad_scale = 0;  // of a float; 0: none
  double max_norm = std::numeric_limits<double>::infinity();  // no clipping
  uintptr_t workspace = 0;   // used by Adam
  uint64_t seed = 0;
  bool stochastic_rounding = false;
  uintptr_t stream = 0;
};

// The tensors of norm, perturb, the updates and restore.
class CudaTable : public Columns {
 public:
  // master: fp32 if there are masters, else the params' dtype.
  // rng_streams: one per tensor; empty where nothing is drawn.
  CudaTable(Dtype param, Dtype grad, Dtype master, int device, std::vector<int64_t> sizes,
            std::vector<int32_t> group_ids, std::vector<uint32_t> rng_streams, int64_t chunk);

  void set_params(const Addresses&);
  void set_backups(const Addresses&);  // without masters
  void set_masters(const Addresses&);
  void set_grads(const Addresses&);
  // The update rule's buffer of that number, in fp32; an address is 0 where the tensor's group does not use it.
  void set_state(int slot, const Addresses&);
  void set_steps(const Addresses&);  // Adam's step counts

  int64_t workspace_bytes() const;  // zeros before the first use; the kernels leave it ready for the next
  // groups: null for the norm of g itself.
  void norm(const std::vector<PerturbGroupOf<double>>* groups, uintptr_t status, const NormCall&, uintptr_t workspace,
            uintptr_t stream);
  // unbias, factors: addresses of a number per tensor, or 0. With `unbias`, state buffer 0 has the second moments.
  void squares(const std::vector<PerturbGroupOf<double>>&, uintptr_t unbias, uintptr_t sums, bool weights,
               uintptr_t workspace, uintptr_t stream);
  void perturb(const std::vector<PerturbGroupOf<double>>&, uintptr_t status, uint64_t seed, bool stochastic_rounding,
               uintptr_t stream, uintptr_t factors = 0, uintptr_t unbias = 0);
  void sgd(const std::vector<SgdGroupOf<double>>&, const UpdateArguments&);
  void adam(const std::vector<AdamGroupOf<double>>&, const UpdateArguments&);
  // A rule of core/rules.h.
  template <class Rule>
  void element(const std::vector<typename Rule::template GroupOf<double>>&, const UpdateArguments&);
  void restore(uintptr_t stream);

 private:
  void set(Column, const char* what, const Addresses&, int64_t element_size, bool check_memory, bool may_miss = false);
  void make_adam_launches();
  template <class L>
  void set_rng_streams(L& launches) const;
  void check_groups(size_t groups) const;
  void check_rng_streams(bool random) const;
  // Checks numbers per tensor, which need every tensor of the table in a launch, and the second moments.
  void check_numbers(uintptr_t numbers, const char* what) const;
  void check_second_moments(uintptr_t unbias);
  // Checks the arguments, fills in the groups by set(group of the launch, group), and calls launch(table, blocks, call)
  // for each launch.
  template <class L, class Group, class Set, class Launch>
  void update(L& launches, const std::vector<Group>&, const UpdateArguments&, Set&& set, Launch&& launch);

  Dtypes dtypes_;
  std::vector<int32_t> group_ids_;
  std::vector<uint32_t> rng_streams_;
  AdamLaunches adam_launches_;  // empty until a state column is set that only Adam's tables have
  int32_t group_count_ = 0;     // the highest group number plus 1
};

// The tensors of dot, axpby and ema.
class CudaVectorPair : public Columns {
 public:
  CudaVectorPair(Dtype x, Dtype y, int device, std::vector<int64_t> sizes, int64_t chunk);

  int64_t workspace_bytes() const;
  void dot(const Addresses& x, const Addresses& y, uintptr_t sums, bool reset, uintptr_t workspace, uintptr_t stream);
  // coefficients: the address of two floats, or 0 for the numbers a and b. status: 0, or nothing is written where skip
  // is set.
  void axpby(const Addresses& x, const Addresses& y, Dtype out_dtype, const Addresses& out, uintptr_t coefficients,
             double a, double b, uintptr_t status, uintptr_t stream);

 private:
  void set(Column, const char* what, const Addresses&, Dtype);

  Dtype x_, y_;
};

// Return true if CudaVectorPair has kernels for these dtypes.
bool supports_vectors(Dtype x, Dtype y);

// finish_norm in a launch of its own.
void cuda_finish_norm(uintptr_t status, FinishNorm, double eps, int device, uintptr_t stream);

}  // namespace fused_sam
