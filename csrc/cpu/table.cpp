// Runs the kernels over a table with as many threads as asked for.
#include "cpu/table.h"

#include <unistd.h>

#include <cmath>

namespace fused_sam {
namespace {

// 64 KB of fp32: weight, gradient and backup of a chunk stay in a second-level cache, a 10M-parameter model
// still gives hundreds of chunks to share out, and the loop around a chunk costs nothing beside it.
constexpr int64_t kChunk = 16384;

// Below this many elements waking a second thread costs more than it saves (torch's own grain size).
constexpr int64_t kElementsPerThread = 32768;

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
    : dtypes_(dtypes), sizes_(std::move(sizes)), entries_(sizes_.size()) {
  if (!has_instance(dtypes)) throw std::invalid_argument("no CPU kernel for these dtypes of weight and gradient");
  if (groups.size() != sizes_.size()) throw std::invalid_argument("a group number is due for every tensor");
  const std::vector<int64_t> prefix = chunk_prefix(sizes_, kChunk);
  chunks_.reserve(size_t(prefix.back()));
  for (int64_t i = 0; i < prefix.back(); ++i) chunks_.push_back(chunk_at(prefix, sizes_, kChunk, i));
  partial_.resize(chunks_.size());
  for (size_t i = 0; i < sizes_.size(); ++i) {
    entries_[i].group = groups[i];
    elements_ += sizes_[i];
  }
  stream_ = elements_ * size_of(dtypes.weight) > last_cache_bytes();
}

void Table::check(const std::vector<Group>& groups) const {
  for (const Entry& e : entries_)
    if (e.group < 0 || size_t(e.group) >= groups.size()) throw std::out_of_range("a tensor's group number is out of range");
}

template <class F>
void Table::each_chunk(int threads, F&& work) const {
  if (chunks_.empty()) return;
  const int64_t useful = elements_ / kElementsPerThread;
  if (threads > useful) threads = int(useful);
  if (threads <= 1) {
    for (size_t i = 0; i < chunks_.size(); ++i) work(i, chunks_[i]);
    if (stream_) kernels().fence();
    return;
  }
  if (threads != split_threads_) {
    split_ = split_chunks(chunks_, threads);
    split_threads_ = threads;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int k = 0; k < threads; ++k) {
    for (int64_t i = split_[k]; i < split_[k + 1]; ++i) work(size_t(i), chunks_[i]);
    if (stream_) kernels().fence();
  }
}

void Table::norm(const std::vector<Group>& groups, Status& status, bool scaled, bool carry, bool begin, bool finish,
                 double eps, int threads) {
  check(groups);
  const auto kernel = kernels().sum_squares;
  each_chunk(threads, [&](size_t i, const Chunk& c) {
    const Entry& e = entries_[c.tensor];
    partial_[i] = kernel(dtypes_, e, groups[e.group], scaled, c.begin, c.length);
  });
  double sum = begin ? 0 : status.sum;
  for (double x : partial_) sum += x;
  status.sum = sum;
  if (!finish) return;
  const double norm = std::sqrt(sum);
  const double skip = std::isfinite(sum) ? 0 : 1;
  status.skip = carry && status.skip != 0 ? 1 : skip;
  if (!scaled) {
    status.update_norm = norm;
    return;
  }
  status.norm = norm;
  status.inverse = skip != 0 ? 0 : inverse_norm<double>(norm, eps);
}

void Table::perturb(const std::vector<Group>& groups, const Status& status, int threads) const {
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

void Table::sgd(const std::vector<Group>& groups, const Status& status, int threads) const {
  check(groups);
  if (status.skip != 0) return restore(threads);
  const auto kernel = kernels().sgd;
  each_chunk(threads, [&](size_t, const Chunk& c) {
    const Entry& e = entries_[c.tensor];
    // In place the weight's lines are in the cache already, and streaming would only throw them out.
    kernel(dtypes_, e, groups[e.group], stream_ && e.backup != e.weight, c.begin, c.length);
  });
}

void Table::restore(int threads) const {
  const auto kernel = kernels().restore;
  each_chunk(threads, [&](size_t, const Chunk& c) {
    kernel(dtypes_, entries_[c.tensor], stream_, c.begin, c.length);
  });
}

}  // namespace fused_sam
