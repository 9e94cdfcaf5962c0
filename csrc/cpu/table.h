// A table of tensors with equal dtypes, and the three passes of a SAM step over all of it.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace fused_sam {

// What a step leaves behind for the next pass and for the reader, as doubles in memory of the caller's.
// fused_sam/backends/contract.py holds the same order.
struct Status {
  double sum;          // of squares, of all tables so far
  double norm;         // of the gradient that perturbs, scaled by T_w
  double inverse;      // inverse_norm(norm)
  double skip;         // not 0: a gradient was not finite, and no weight or momentum may change
  double update_norm;  // of the gradient that updates
};

class Table {
 public:
  Table(Dtypes dtypes, std::vector<int64_t> sizes, std::vector<int32_t> groups);

  std::vector<Entry>& entries() { return entries_; }
  const std::vector<int64_t>& sizes() const { return sizes_; }

  // P1. begin: first table of this norm; finish: last one, which writes norm, inverse and skip.
  // scaled: of T_w g, for perturb; else of g, for the update. carry: keep a skip that is already set.
  void norm(const std::vector<Group>&, Status&, bool scaled, bool carry, bool begin, bool finish, double eps,
            int threads);
  // P2. Where status.skip is set, only the backups are written.
  void perturb(const std::vector<Group>&, const Status&, int threads);
  // P3. Where status.skip is set, restores instead.
  void sgd(const std::vector<Group>&, const Status&, int threads);
  // Backup to weight.
  void restore(int threads);

 private:
  template <class F>
  void each_chunk(int threads, F&& work);
  void check(const std::vector<Group>&) const;

  Dtypes dtypes_;
  std::vector<int64_t> sizes_;
  std::vector<Entry> entries_;
  Chunks chunks_;
  std::vector<double> partial_;  // one sum a chunk, added in the chunks' order: equal for any number of threads
  bool stream_ = false;
};

const Kernels& kernels();  // for this processor
void use_kernels(const std::string& name);  // "generic", "avx2", "avx512" or "auto"; throws where it can't run
std::vector<std::string> usable_kernels();

}  // namespace fused_sam
