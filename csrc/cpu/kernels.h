// The functions that csrc/cpu/kernels.cpp compiles for each instruction set, as one table of pointers per set.
#pragma once

#include <cstdint>

#include "core/rng.h"
#include "core/rules.h"
#include "core/storage.h"

namespace fused_sam {

using PerturbGroup = PerturbGroupOf<double>;
using SgdGroup = SgdGroupOf<double>;
using AdamGroup = AdamGroupOf<double>;

constexpr int kStateSlots = 3;

// One tensor of a table. Its columns are dense and have one order in memory; state is of the arithmetic's type.
struct Entry {
  void* param = nullptr;        // what the network computes with
  void* backup = nullptr;       // the unperturbed parameter, which may be `param` itself; null with masters
  void* master = nullptr;       // fp32 copy of the parameter, never perturbed; null without masters
  const void* grad = nullptr;
  // The update rule's buffers, in the order of fused_sam/backends/contract.py. Null if the group does not use it.
  // In a table that perturbs, the first one is Adam's second moment, for Precond-SAM.
  void* state[kStateSlots] = {};
  float* step = nullptr;        // Adam's count of steps
  int32_t group = 0;
  uint32_t rng_stream = 0;
};

struct Dtypes {
  Dtypes(Dtype param, Dtype grad) : Dtypes(param, grad, param) {}
  Dtypes(Dtype param, Dtype grad, Dtype master) : param(param), grad(grad), master(master) {}

  bool has_masters() const { return master != param; }

  Dtype param;
  Dtype grad;
  Dtype master;  // fp32 for masters of bf16 or fp16 params; the params' own dtype without masters
};

// Elements begin .. begin + length - 1 of one tensor; begin is a multiple of the tile.
struct Slice {
  Dtypes dtypes;
  const Entry& entry;
  int64_t begin, length;
};

// The random numbers of one tensor in one primitive.
struct Rng {
  bool stochastic_rounding = false;  // True if params are rounded at random, else to nearest
  StreamKey rounding{}, mask{};
};

// stream: results go around the cache.
struct Kernels {
  // The sum of squares of T_w g; of g where group is null. unbias: null, or T_w is made of the second moment.
  double (*norm)(const Slice&, const PerturbGroup* group, const double* unbias);
  // length: of the perturbation, over the norm.
  void (*perturb)(const Slice&, const PerturbGroup&, double length, const double* unbias, const Rng&, bool stream);
  void (*sgd)(const Slice&, const SgdGroup&, const Rng&, bool stream);
  void (*adam)(const Slice&, const AdamGroup&, const AdamStep<double>&, const Rng&, bool stream);
  void (*save)(const Slice&, bool stream);     // copies param to backup
  void (*restore)(const Slice&, bool stream);  // copies backup to param; with masters, rounds master to param
  // On flat arrays of the given dtypes.
  void (*dot)(Dtype x_dtype, const void* x, Dtype y_dtype, const void* y, double sums[3], int64_t begin,
              int64_t length);
  void (*axpby)(Dtype x_dtype, const void* x, Dtype y_dtype, const void* y, Dtype out_dtype, void* out, double a,
                double b, int64_t begin, int64_t length);
  void (*fence)();  // orders streaming stores before what follows
  const char* name;
  // element(Rule{}): the kernel of a rule in core/rules.h.
#define FUSED_SAM_ELEMENT_KERNEL(Rule)                                                               \
  void (*of_##Rule)(const Slice&, const Rule::GroupOf<double>&, const Rng&, bool stream);             \
  auto element(Rule) const { return of_##Rule; }
  FUSED_SAM_ELEMENT_RULES(FUSED_SAM_ELEMENT_KERNEL)
#undef FUSED_SAM_ELEMENT_KERNEL
};

bool has_instance(Dtypes);  // true if kernels are compiled for these dtypes

extern const Kernels kernels_generic;
#if !defined(FUSED_SAM_ONLY_GENERIC)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace fused_sam
