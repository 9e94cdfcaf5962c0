// Rig holds a table of the CUDA backend and all tensors of a step, for tests of the kernels' source on the host.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cuda/table.h"
#include "tests/cuda_arrays.h"

namespace fused_sam_test {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Each primitive has four groups with different options. Tensor i of a rig belongs to group i % 4.
extern const std::vector<fused_sam::PerturbGroupOf<double>> kPerturbGroups;
extern const std::vector<fused_sam::SgdGroupOf<double>> kSgdGroups;
extern const std::vector<fused_sam::AdamGroupOf<double>> kAdamGroups;
extern const std::vector<fused_sam::LionGroupOf<double>> kLionGroups;

struct Case {
  fused_sam::Dtype param = fused_sam::Dtype::f32, grad = fused_sam::Dtype::f32;
  Sizes sizes;
  int64_t chunk = 0;
  int64_t offset = 0;                // elements by which the params are misaligned
  bool separate = true;              // True if the backups are memory of their own
  fused_sam::Dtype master = param;   // fp32 with masters; otherwise the params' dtype
  int64_t grad_offset = 0;           // elements by which the grads are misaligned
  int64_t other_offset = 0;          // and all other arrays

  bool has_masters() const { return master != param; }
};

struct Rig {
  Case c;
  std::vector<int32_t> group_ids;
  Arrays params, backups, masters, grads;
  Arrays state[3];  // momentum_buffer or exp_avg, exp_avg_sq, max_exp_avg_sq
  std::vector<float> steps;
  fused_sam::StatusOf<float> status{};
  fused_sam::CudaTable table;
  std::vector<char> workspace;

  // Return the group ids and the random-number streams of `count` tensors.
  static std::vector<int32_t> ids(size_t count);
  static std::vector<uint32_t> rng_streams(size_t count);

  explicit Rig(const Case& c);

  // Give the table all state of the rule. Before that, it has SGD's.
  void use_adam();
  void use_lion();
  uintptr_t scratch();
  uintptr_t status_address() { return reinterpret_cast<uintptr_t>(&status); }
  fused_sam::UpdateArguments arguments(const float* scale = nullptr, double max_norm = kInf,
                                       bool stochastic_rounding = false);
  void perturb() { table.perturb(kPerturbGroups, status_address(), 0, false, 0); }
  // Take the norm of T_w g for perturb with `ascent`, or of g for the update.
  void norm(bool ascent, bool keep_skip = false, bool reset = true, bool finish = true);

  // Return the clean weights, which are the masters, the backups, or the params themselves.
  Arrays& clean() { return c.has_masters() ? masters : c.separate ? backups : params; }
  // Return the weights that an update computes, which are the masters or the params.
  Arrays& written() { return c.has_masters() ? masters : params; }

  double expected_norm(bool ascent) const;
  // Return true if `moved` is the result of perturb() on `clean`, within the dtype's rounding.
  bool is_perturbed(size_t tensor, const Array& moved, const Array& clean, fused_sam::Dtype dtype) const;
  // Return true if every param is its master, rounded to nearest.
  bool params_are_rounded() const;
};

}  // namespace fused_sam_test
