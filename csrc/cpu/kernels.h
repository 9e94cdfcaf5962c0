// What the CPU kernels offer the rest of the module: one function table per instruction set.
#pragma once

#include <cstdint>

#include "core/storage.h"

namespace fused_sam {

using Group = GroupOf<double>;

// One tensor of a table. Weight, backup, gradient and momentum are dense, and alike in layout.
struct Entry {
  void* weight = nullptr;
  void* backup = nullptr;          // where perturb saves and the update reads the unperturbed weight; may be `weight`
  const void* gradient = nullptr;
  void* momentum = nullptr;        // of the arithmetic's type; null where the group has no momentum
  int32_t group = 0;
};

struct Dtypes {
  Dtype weight;
  Dtype gradient;
};

// Each works on elements begin .. begin + length - 1 of one tensor.
struct Kernels {
  double (*sum_squares)(Dtypes, const Entry&, const Group&, bool scaled, int64_t begin, int64_t length);
  void (*perturb)(Dtypes, const Entry&, const Group&, double step, bool stream, int64_t begin, int64_t length);
  void (*sgd)(Dtypes, const Entry&, const Group&, bool stream, int64_t begin, int64_t length);
  void (*save)(Dtypes, const Entry&, bool stream, int64_t begin, int64_t length);     // weight to backup
  void (*restore)(Dtypes, const Entry&, bool stream, int64_t begin, int64_t length);  // backup to weight
  // On flat arrays of the given dtypes; `wide` is their common arithmetic.
  void (*dots)(Dtype x_dtype, const void* x, Dtype y_dtype, const void* y, double sums[3], int64_t begin, int64_t length);
  void (*combine)(Dtype x_dtype, const void* x, Dtype y_dtype, const void* y, Dtype out_dtype, void* out, double a,
                  double b, int64_t begin, int64_t length);
  void (*fence)();  // orders streaming stores before what follows
  const char* name;
};

bool has_instance(Dtypes);  // are kernels compiled for these dtypes?

extern const Kernels kernels_generic;
#if !defined(FUSED_SAM_ONLY_GENERIC)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace fused_sam
