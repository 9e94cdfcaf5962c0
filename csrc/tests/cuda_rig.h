// Rig: one table of the CUDA backend with everything a step needs, for the tests of the kernels' source on the host.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cuda/table.h"
#include "tests/cuda_arrays.h"

namespace fused_sam_test {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Groups = std::vector<fused_sam::GroupOf<double>>;

// Four groups of unlike options; a rig's tensors take them in turn.
extern const Groups kGroups;      // for SGD
extern const Groups kAdamGroups;

struct Case {
  fused_sam::Dtype weight = fused_sam::Dtype::f32, gradient = fused_sam::Dtype::f32;
  Sizes sizes;
  int64_t chunk = 0;
  int64_t offset = 0;               // misaligns the weights
  bool separate = true;             // the backups are memory of their own
  fused_sam::Dtype model = weight;  // narrower: the weights are masters

  bool masters() const { return model != weight; }
};

struct Rig {
  Case c;
  std::vector<int32_t> groups;
  Arrays weights, backups, models, gradients, momenta, squares, largest;
  std::vector<float> steps;
  fused_sam::StatusOf<float> status{};
  fused_sam::CudaTable table;
  std::vector<char> workspace;

  // Of as many tensors: the groups' numbers, and the streams of random numbers.
  static std::vector<int32_t> numbers(size_t count);
  static std::vector<uint32_t> streams(size_t count);

  explicit Rig(const Case& c);

  void use_adam();
  uintptr_t scratch();
  uintptr_t status_address() { return reinterpret_cast<uintptr_t>(&status); }
  fused_sam::Update update(const float* scale = nullptr, bool random_rounding = false);
  void perturb() { table.perturb(kGroups, status_address(), 0, false, 0); }
  void norm(bool scaled, bool carry = false, bool begin = true, bool finish = true);

  double expected_norm(bool scaled) const;
  // Whether a tensor of `moved` is what perturb() makes of the `clean` one, within its dtype's rounding.
  bool is_perturbed(size_t tensor, const Array& moved, const Array& clean, fused_sam::Dtype dtype) const;
};

}  // namespace fused_sam_test
