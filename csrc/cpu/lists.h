// Columns of tensors without groups or status: primitives P4 to P6 of the contract.
#pragma once

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace fused_sam {

struct Column {
  Dtype dtype;
  std::vector<void*> data;
};

class Lists {
 public:
  explicit Lists(std::vector<int64_t> sizes);

  // P4: adds <x, y>, <x, x>, <y, y> to sums[0..2]; begin: from zero.
  void dots(const Column& x, const Column& y, double* sums, bool begin, int threads);
  // P5: out = a * x + b * y. P6 is a = decay, b = 1 - decay, out = x.
  void combine(const Column& x, const Column& y, const Column& out, double a, double b, int threads);

 private:
  void check(const Column&) const;

  size_t rows_;
  Chunks chunks_;
  std::vector<double> partial_;  // three sums a chunk, added in the chunks' order
};

}  // namespace fused_sam
