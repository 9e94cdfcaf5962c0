// A table of tensors with equal dtypes, and the primitives of a SAM step over all of it.
#pragma once

#include <string>
#include <vector>

#include "core/status.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace fused_sam {

// In memory that the caller owns.
using Status = StatusOf<double>;

class Table {
 public:
  // sizes: elements of each tensor. group_ids: the parameter group of each.
  Table(Dtypes dtypes, std::vector<int64_t> sizes, const std::vector<int32_t>& group_ids);

  std::vector<Entry>& entries() { return entries_; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  // rng_streams: one per tensor. stochastic_rounding: bf16 and fp16 params are rounded at random.
  void set_rng(uint64_t seed, const std::vector<uint32_t>& rng_streams, bool stochastic_rounding);

  // Adds the sum of squares of T_w g to the status, or of g where groups is null. reset: from zero.
  void accumulate_norm(const std::vector<PerturbGroup>* groups, Status&, bool reset, int threads);
  // Writes the sums of squares of T_w g of all tensors, and after them, with `weights`, those of the params or masters.
  // unbias: null, or a number per tensor, and T_w is made of the second moments.
  void squares(const std::vector<PerturbGroup>&, const double* unbias, double* sums, bool weights, int threads);
  // Where status.skip is set, only writes the backups.
  // factors: null, or a number per tensor that multiplies the length of its perturbation. unbias: as in `squares`.
  void perturb(const std::vector<PerturbGroup>&, const Status&, int threads, const double* factors = nullptr,
               const double* unbias = nullptr);
  // Updates; where status.skip is set, they restore instead. Each group's `factor` comes without the clipping.
  void sgd(std::vector<SgdGroup>, const Status&, double max_norm, int threads);
  void adam(std::vector<AdamGroup>, const Status&, double max_norm, int threads);
  // A rule of core/rules.h.
  template <class Rule>
  void element(std::vector<typename Rule::template GroupOf<double>>, const Status&, double max_norm, int threads);
  // Copies backup to param; with masters, rounds master to param.
  void restore(int threads);

 private:
  // work(number, slice) for each chunk of the table.
  template <class F>
  void each_chunk(int threads, F&& work);
  // kernel(slice, group, rng, stream) for each chunk, after the clipping.
  template <class Group, class F>
  void update(std::vector<Group>& groups, const Status&, double max_norm, int threads, F&& kernel);
  void check(size_t group_count) const;
  void check_second_moments() const;
  // The tensor's number in an array with one per tensor; null if the array is.
  const double* number_of(const double* numbers, const Entry& e) const {
    return numbers == nullptr ? nullptr : numbers + (&e - entries_.data());
  }
  // Throws unless has_state(entry) for every tensor.
  template <class F>
  void check_state(const char* rule, F&& has_state) const;
  Rng rng(const Entry&, const Status&, Draw rounding, bool masked) const;

  Dtypes dtypes_;
  std::vector<int64_t> sizes_;
  std::vector<Entry> entries_;
  Chunks chunks_;
  std::vector<double> partial_;  // one sum per chunk, added in the chunks' order: equal for any number of threads
  bool stream_ = false;          // True if what primitives only write goes around the cache
  bool has_rng_ = false;
  bool stochastic_rounding_ = false;
  uint64_t seed_ = 0;
};

const Kernels& kernels();                   // for this processor
void use_kernels(const std::string& name);  // "generic", "avx2", "avx512" or "auto"; throws if the processor lacks it
std::vector<std::string> usable_kernels();  // best first

}  // namespace fused_sam
