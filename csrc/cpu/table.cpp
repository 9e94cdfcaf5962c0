// Runs the kernels over a table with as many threads as asked for.
#include "cpu/table.h"

#include <unistd.h>

namespace fused_sam {
namespace {

// Streaming stores pay when the table's weights cannot stay in the last cache until the next pass.
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
  const bool narrow = d.weight == Dtype::bf16 || d.weight == Dtype::f16;
  return d.gradient == d.weight || (narrow && d.gradient == Dtype::f32);
}

Table::Table(Dtypes dtypes, std::vector<int64_t> sizes, std::vector<int32_t> groups)
    : dtypes_(dtypes), sizes_(std::move(sizes)), entries_(sizes_.size()), chunks_(sizes_), partial_(chunks_.count()) {
  if (!has_instance(dtypes)) throw std::invalid_argument("no CPU kernel for these dtypes of weight and gradient");
  if (groups.size() != sizes_.size()) throw std::invalid_argument("a group number is due for every tensor");
  for (size_t i = 0; i < sizes_.size(); ++i) entries_[i].group = groups[i];
  stream_ = chunks_.elements() * size_of(dtypes.weight) > last_cache_bytes();
}

void Table::check(const std::vector<Group>& groups) const {
  for (const Entry& e : entries_)
    if (e.group < 0 || size_t(e.group) >= groups.size()) throw std::out_of_range("a tensor's group number is out of range");
}

template <class F>
void Table::each_chunk(int threads, F&& work) {
  chunks_.each(threads, work, [this] {
    if (stream_) kernels().fence();
  });
}

void Table::norm(const std::vector<Group>& groups, Status& status, NormFlags flags, double eps, int threads) {
  check(groups);
  const auto kernel = kernels().sum_squares;
  each_chunk(threads, [&](size_t i, const Chunk& c) {
    const Entry& e = entries_[c.tensor];
    partial_[i] = kernel(dtypes_, e, groups[e.group], flags.scaled, c.begin, c.length);
  });
  double sum = 0;
  for (double x : partial_) sum += x;
  add_norm(status, sum, eps, flags);
}

void Table::perturb(const std::vector<Group>& groups, const Status& status, int threads) {
  check(groups);
  if (status.skip != 0) {
    const auto kernel = kernels().save;
    each_chunk(threads, [&](size_t, const Chunk& c) {
      kernel(dtypes_, entries_[c.tensor], stream_, c.begin, c.length);
    });
    return;
  }
  const auto kernel = kernels().perturb;
  each_chunk(threads, [&](size_t, const Chunk& c) {
    const Entry& e = entries_[c.tensor];
    const Group& group = groups[e.group];
    kernel(dtypes_, e, group, group.rho * status.inverse, stream_, c.begin, c.length);
  });
}

void Table::sgd(const std::vector<Group>& groups, const Status& status, int threads) {
  check(groups);
  if (status.skip != 0) return restore(threads);
  const auto kernel = kernels().sgd;
  each_chunk(threads, [&](size_t, const Chunk& c) {
    const Entry& e = entries_[c.tensor];
    // In place the weight's lines are in the cache already, and streaming would only throw them out.
    kernel(dtypes_, e, groups[e.group], stream_ && e.backup != e.weight, c.begin, c.length);
  });
}

void Table::restore(int threads) {
  const auto kernel = kernels().restore;
  each_chunk(threads, [&](size_t, const Chunk& c) {
    kernel(dtypes_, entries_[c.tensor], stream_, c.begin, c.length);
  });
}

}  // namespace fused_sam
