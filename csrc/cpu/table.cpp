// Runs the kernels over a table, on the given number of threads.
#include "cpu/table.h"

#include <unistd.h>

#include <cmath>

namespace fused_sam {
namespace {

// Streaming stores pay off if the table's params cannot stay in the last cache until the next primitive.
int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
    long size = -1;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (size <= 0) size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return size > 0 ? int64_t(size) : int64_t(32) << 20;
  }();
  return bytes;
}

}  // namespace

bool has_instance(Dtypes d) {
  const bool low_precision = d.param == Dtype::bf16 || d.param == Dtype::f16;
  if (d.has_masters() && !(low_precision && d.master == Dtype::f32)) return false;
  return d.grad == d.param || (low_precision && d.grad == Dtype::f32);
}

Table::Table(Dtypes dtypes, std::vector<int64_t> sizes, const std::vector<int32_t>& group_ids)
    : dtypes_(dtypes), sizes_(std::move(sizes)), entries_(sizes_.size()), chunks_(sizes_), partial_(chunks_.count()) {
  if (!has_instance(dtypes)) throw std::invalid_argument("no CPU kernel for these dtypes of param, grad and master");
  if (group_ids.size() != sizes_.size()) throw std::invalid_argument("the table needs one group number per tensor");
  for (size_t i = 0; i < sizes_.size(); ++i) entries_[i].group = group_ids[i];
  stream_ = chunks_.elements() * size_of(dtypes.master) > last_cache_bytes();
}

void Table::set_rng(uint64_t seed, const std::vector<uint32_t>& rng_streams, bool stochastic_rounding) {
  if (rng_streams.size() != entries_.size()) throw std::invalid_argument("the table needs one rng stream per tensor");
  for (size_t i = 0; i < rng_streams.size(); ++i) entries_[i].rng_stream = rng_streams[i];
  seed_ = seed;
  has_rng_ = true;
  stochastic_rounding_ = stochastic_rounding && size_of(dtypes_.master) == 2;
}

void Table::check(size_t group_count) const {
  for (const Entry& e : entries_)
    if (e.group < 0 || size_t(e.group) >= group_count)
      throw std::out_of_range("the group number of a tensor is out of range");
}

template <class F>
void Table::check_state(const char* rule, F&& has_state) const {
  for (const Entry& e : entries_)
    if (!has_state(e))
      throw std::invalid_argument(std::string("a tensor of the table lacks a column of ") + rule + "'s state");
}

template <class F>
void Table::each_chunk(int threads, F&& work) {
  chunks_.each(
      threads,
      [&](size_t i, const Chunk& c) {
        work(i, Slice{dtypes_, entries_[size_t(c.tensor)], c.begin, c.length});
      },
      [this] {
        if (stream_) kernels().fence();
      });
}

void Table::accumulate_norm(const std::vector<PerturbGroup>* groups, Status& status, bool reset, int threads) {
  if (groups != nullptr) check(groups->size());
  const auto kernel = kernels().norm;
  each_chunk(threads, [&](size_t i, const Slice& s) {
    partial_[i] = kernel(s, groups == nullptr ? nullptr : &(*groups)[size_t(s.entry.group)], nullptr);
  });
  double sum = 0;
  for (double x : partial_) sum += x;
  fused_sam::accumulate_norm(status, sum, reset);
}

void Table::check_second_moments() const {
  check_state("Adam", [](const Entry& e) { return e.state[0] != nullptr; });
}

void Table::squares(const std::vector<PerturbGroup>& groups, const double* unbias, double* sums, bool weights,
                    int threads) {
  check(groups.size());
  if (unbias != nullptr) check_second_moments();
  const auto kernel = kernels().norm;
  // The norm of the weights is that of a gradient that has their place and dtype.
  const Dtypes of_weights(dtypes_.param, dtypes_.master, dtypes_.master);
  std::vector<double> weight_partial(weights ? partial_.size() : 0);
  each_chunk(threads, [&](size_t i, const Slice& s) {
    partial_[i] = kernel(s, &groups[size_t(s.entry.group)], number_of(unbias, s.entry));
    if (!weights) return;
    Entry e = s.entry;
    e.grad = dtypes_.has_masters() ? e.master : e.param;
    weight_partial[i] = kernel(Slice{of_weights, e, s.begin, s.length}, nullptr, nullptr);
  });
  const std::vector<int64_t> prefix = chunk_prefix(sizes_, kChunk);
  const auto add_up = [&](const std::vector<double>& partial, double* to) {
    for (size_t t = 0; t < sizes_.size(); ++t) {
      to[t] = 0;
      for (int64_t c = prefix[t]; c < prefix[t + 1]; ++c) to[t] += partial[size_t(c)];
    }
  };
  add_up(partial_, sums);
  if (weights) add_up(weight_partial, sums + sizes_.size());
}

Rng Table::rng(const Entry& e, const Status& status, Draw rounding, bool masked) const {
  Rng out;
  const uint32_t offset = uint32_t(status.rng_offset);
  out.stochastic_rounding = stochastic_rounding_;
  if (stochastic_rounding_) out.rounding = stream_key(seed_, offset, e.rng_stream, rounding);
  if (masked) out.mask = stream_key(seed_, offset, e.rng_stream, Draw::mask);
  return out;
}

void Table::perturb(const std::vector<PerturbGroup>& groups, const Status& status, int threads, const double* factors,
                    const double* unbias) {
  check(groups.size());
  if (unbias != nullptr) check_second_moments();
  if (status.skip != 0) {
    if (dtypes_.has_masters()) return;
    const auto kernel = kernels().save;
    each_chunk(threads, [&](size_t, const Slice& s) { kernel(s, stream_); });
    return;
  }
  for (const PerturbGroup& g : groups) {
    if (g.mask_prob < 1 && !has_rng_) throw std::invalid_argument("the table has no rng streams to draw a mask from");
    if (g.mask_prob < 1 && unbias != nullptr) throw std::invalid_argument("a table with second moments has no mask");
  }
  const auto kernel = kernels().perturb;
  each_chunk(threads, [&](size_t, const Slice& s) {
    const PerturbGroup& group = groups[size_t(s.entry.group)];
    const double* factor = number_of(factors, s.entry);
    const double length = group.rho * status.inverse_norm / group.mask_prob * (factor == nullptr ? 1 : *factor);
    kernel(s, group, length, number_of(unbias, s.entry),
           rng(s.entry, status, Draw::round_perturbed, group.mask_prob < 1), stream_);
  });
}

template <class Group, class F>
void Table::update(std::vector<Group>& groups, const Status& status, double max_norm, int threads, F&& kernel) {
  for (Group& g : groups) g.factor *= clip_factor<double>(status.update_norm, std::fabs(g.factor), max_norm);
  each_chunk(threads, [&](size_t, const Slice& s) {
    // A param that is its own backup is in the cache already, and streaming would only evict it.
    const bool stream = stream_ && (dtypes_.has_masters() || s.entry.backup != s.entry.param);
    kernel(s, groups[size_t(s.entry.group)], rng(s.entry, status, Draw::round_updated, false), stream);
  });
}

void Table::sgd(std::vector<SgdGroup> groups, const Status& status, double max_norm, int threads) {
  check(groups.size());
  if (status.skip != 0) return restore(threads);
  update(groups, status, max_norm, threads, kernels().sgd);
}

void Table::adam(std::vector<AdamGroup> groups, const Status& status, double max_norm, int threads) {
  check(groups.size());
  if (status.skip != 0) return restore(threads);
  check_state("Adam", [&](const Entry& e) {
    const bool amsgrad = groups[size_t(e.group)].amsgrad;
    return e.step != nullptr && e.state[0] != nullptr && e.state[1] != nullptr && (!amsgrad || e.state[2] != nullptr);
  });
  std::vector<AdamStep<double>> steps;
  steps.reserve(entries_.size());
  for (const Entry& e : entries_) steps.push_back(adam_step<double>(groups[size_t(e.group)], double(*e.step += 1)));
  update(groups, status, max_norm, threads,
         [&, kernel = kernels().adam](const Slice& s, const AdamGroup& group, const Rng& rng, bool stream) {
           kernel(s, group, steps[size_t(&s.entry - entries_.data())], rng, stream);
         });
}

template <class Rule>
void Table::element(std::vector<typename Rule::template GroupOf<double>> groups, const Status& status, double max_norm,
                    int threads) {
  check(groups.size());
  if (status.skip != 0) return restore(threads);
  check_state(Rule::kTitle, [](const Entry& e) {
    for (int slot = 0; slot < kBuffersOf<Rule>; ++slot)
      if (e.state[slot] == nullptr) return false;
    return true;
  });
  update(groups, status, max_norm, threads, kernels().element(Rule{}));
}
#define FUSED_SAM_TABLE_ELEMENT(Rule) \
  template void Table::element<Rule>(std::vector<Rule::GroupOf<double>>, const Status&, double, int);
FUSED_SAM_ELEMENT_RULES(FUSED_SAM_TABLE_ELEMENT)
#undef FUSED_SAM_TABLE_ELEMENT

void Table::restore(int threads) {
  const auto kernel = kernels().restore;
  each_chunk(threads, [&](size_t, const Slice& s) { kernel(s, stream_); });
}

}  // namespace fused_sam
