// The argument of one launch: a section of a multi-tensor table, passed by value.
//
// A CUDA graph then holds the whole table, and no launch waits for a copy to the device.
// This file needs no CUDA header, so that csrc/tests/test_launch_table.cpp tests the planner alone.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/rules.h"
#include "core/tensor_table.h"

namespace fused_sam {

// Columns of addresses. Column 1 is the unperturbed parameter: the master where there is one, else the backup.
// State columns are the update rule's buffers, in the order of fused_sam/backends/contract.py.
enum Column : int {
  kParam = 0, kBackup = 1, kMaster = 1, kGrad = 2, kState0 = 3, kColumns = 4,
  kState1 = 4, kState2 = 5, kStep = 6, kAdamColumns = 7,  // of Adam's tables alone
  kX = 0, kY = 1, kOut = 2,                               // of a pair of vectors
};

// The numbers of one group for a kernel of the four-column tables.
union AnyGroup {
  PerturbGroupOf<float> perturb;  // also of the norm
  SgdGroupOf<float> sgd;
#define FUSED_SAM_GROUP(Rule) Rule::GroupOf<float> of_##Rule;
  FUSED_SAM_ELEMENT_RULES(FUSED_SAM_GROUP)
#undef FUSED_SAM_GROUP
};
// numbers_of(group, Rule{}): those of a rule in core/rules.h.
#define FUSED_SAM_NUMBERS(Rule)                                                                       \
  FUSED_SAM_FN Rule::GroupOf<float>& numbers_of(AnyGroup& group, Rule) { return group.of_##Rule; }    \
  FUSED_SAM_FN const Rule::GroupOf<float>& numbers_of(const AnyGroup& group, Rule) { return group.of_##Rule; }
FUSED_SAM_ELEMENT_RULES(FUSED_SAM_NUMBERS)
#undef FUSED_SAM_NUMBERS
using AdamGroup = AdamGroupOf<float>;

// The same numbers in fp32; core/formulas.h converts the groups of updates.
static inline PerturbGroupOf<float> in_fp32(const PerturbGroupOf<double>& g) {
  return {float(g.rho), float(g.eta), float(g.mask_prob), g.adaptive};
}

// Columns of tensors, and the hyper-parameters of the groups that these tensors belong to. `prefix` numbers the chunks
// (core/tensor_table.h); groups are numbered from 0 within the launch.
template <int kColumnSlots, class GroupType, int kTensorSlots, int kGroupSlots>
struct LaunchTable {
  static constexpr int kTensors = kTensorSlots;
  static constexpr int kGroups = kGroupSlots;

  void* data[kColumnSlots][kTensors];  // a state buffer is null where the tensor's group does not use it
  int64_t size[kTensors];              // elements
  const void* rate[kGroups];           // the learning rate on the device; null: the number in `group`
  GroupType group[kGroups];
  int32_t prefix[kTensors + 1];
  int32_t count;  // of tensors
  int32_t chunk;  // elements per block
  uint32_t rng_stream[kTensors];
  uint8_t group_of[kTensors];
  bool rate_is_double[kGroups];  // True if `rate` points to a double
};

// A kernel's arguments may take 4 KB, and 32,764 bytes from CUDA 12.1 on; 64 bytes are left for the other arguments.
// Every launch copies its table whole. The middle tables are for models such as ResNet-50, of 161 tensors.
constexpr int kOtherArguments = 64;
using SmallTable = LaunchTable<kColumns, AnyGroup, 64, 24>;
using MiddleTable = LaunchTable<kColumns, AnyGroup, 224, 36>;
using LargeTable = LaunchTable<kColumns, AnyGroup, 600, 90>;
using SmallAdamTable = LaunchTable<kAdamColumns, AdamGroup, 44, 15>;
using MiddleAdamTable = LaunchTable<kAdamColumns, AdamGroup, 176, 24>;
using LargeAdamTable = LaunchTable<kAdamColumns, AdamGroup, 400, 66>;
static_assert(sizeof(SmallTable) + kOtherArguments <= 4096, "SmallTable exceeds what any driver passes");
static_assert(sizeof(SmallAdamTable) + kOtherArguments <= 4096, "SmallAdamTable exceeds what any driver passes");
static_assert(sizeof(MiddleTable) <= 12 * 1024, "MiddleTable takes more than 12 KB");
static_assert(sizeof(MiddleAdamTable) <= 14 * 1024, "MiddleAdamTable takes more than 14 KB");
static_assert(sizeof(LargeTable) + kOtherArguments <= 32764, "LargeTable exceeds what CUDA 12.1 passes");
static_assert(sizeof(LargeAdamTable) + kOtherArguments <= 32764, "LargeAdamTable exceeds what CUDA 12.1 passes");
static_assert(LargeTable::kGroups <= 256 && LargeAdamTable::kGroups <= 256, "group_of holds 8 bits");

// The tensors of one launch, with the numbers that their chunks and groups have there.
struct LaunchPlan {
  std::vector<int32_t> tensors;    // the table's row of each; none is empty
  std::vector<uint8_t> group_of;
  std::vector<int32_t> group_ids;  // the optimizer's number of each of the launch's groups
  std::vector<int32_t> prefix;     // chunks before each tensor; the last entry is the grid
  int64_t first_chunk = 0;         // chunks of the launches before

  int32_t chunks() const { return prefix.back(); }
};

// Fills launches in the tensors' order; one is closed when it has no slot left for a tensor or for its group.
static inline std::vector<LaunchPlan> plan_launches(const std::vector<int64_t>& sizes,
                                                    const std::vector<int32_t>& group_ids, int64_t chunk,
                                                    int max_tensors, int max_groups) {
  constexpr int64_t kMostBlocks = INT32_MAX;  // of a grid
  if (group_ids.size() != sizes.size()) throw std::invalid_argument("every tensor needs a group number");
  if (chunk > (int64_t(1) << 30)) throw std::invalid_argument("chunk size must be at most 2^30 elements");
  const std::vector<int64_t> all = chunk_prefix(sizes, chunk);
  std::vector<LaunchPlan> launches;
  const auto slot_of = [](const LaunchPlan& launch, int32_t group_id) {
    size_t slot = 0;
    while (slot < launch.group_ids.size() && launch.group_ids[slot] != group_id) ++slot;
    return slot;
  };
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t chunks = all[i + 1] - all[i];
    if (chunks == 0) continue;
    if (chunks > kMostBlocks)
      throw std::invalid_argument("tensor " + std::to_string(i) + " has " + std::to_string(sizes[i]) +
                                  " elements: too many for one launch; take a larger chunk size");
    bool full = launches.empty();
    if (!full) {
      const LaunchPlan& open = launches.back();
      full = int(open.tensors.size()) == max_tensors || slot_of(open, group_ids[i]) == size_t(max_groups) ||
             int64_t(open.chunks()) + chunks > kMostBlocks;
    }
    if (full) {
      launches.emplace_back();
      launches.back().prefix.push_back(0);
      launches.back().first_chunk = all[i];
    }
    LaunchPlan& launch = launches.back();
    const size_t slot = slot_of(launch, group_ids[i]);
    if (slot == launch.group_ids.size()) launch.group_ids.push_back(group_ids[i]);
    launch.tensors.push_back(int32_t(i));
    launch.group_of.push_back(uint8_t(slot));
    launch.prefix.push_back(launch.chunks() + int32_t(chunks));
  }
  return launches;
}

}  // namespace fused_sam
