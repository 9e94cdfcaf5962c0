// Pairs of vectors over many tensors, without groups or status: dot, axpby and ema of the contract.
#pragma once

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace fused_sam {

// One tensor per row, all of one dtype.
struct Vector {
  Dtype dtype;
  std::vector<void*> data;
};

class VectorPair {
 public:
  // sizes: elements of each row.
  explicit VectorPair(std::vector<int64_t> sizes);

  // Adds <x, y>, <x, x>, <y, y> to sums[0..2]; reset: from zero.
  void dot(const Vector& x, const Vector& y, double* sums, bool reset, int threads);
  // Writes out = a * x + b * y. ema is a = decay, b = 1 - decay, out = x.
  void axpby(const Vector& x, const Vector& y, const Vector& out, double a, double b, int threads);

 private:
  void check(const Vector&) const;

  size_t rows_;
  Chunks chunks_;
  std::vector<double> partial_;  // three sums per chunk, added in the chunks' order
};

}  // namespace fused_sam
