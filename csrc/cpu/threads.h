// Distributes chunks of tensors over threads.
#pragma once

#include <algorithm>

#include "core/tensor_table.h"

namespace fused_sam {

// 64 KB of fp32. Param, grad and backup of a chunk fit a second-level cache, a model of 10 million parameters has
// hundreds of chunks to distribute, and the loop around a chunk costs nothing in comparison.
constexpr int64_t kChunk = 16384;

// With fewer elements per thread, waking a thread costs more than it saves (torch's own grain size).
constexpr int64_t kElementsPerThread = 32768;

// The chunks of tensors of the given sizes, which `each` cuts into runs of equally many elements, one per thread.
class Chunks {
 public:
  explicit Chunks(const std::vector<int64_t>& sizes) {
    const std::vector<int64_t> prefix = chunk_prefix(sizes, kChunk);
    chunks_.reserve(size_t(prefix.back()));
    for (int64_t i = 0; i < prefix.back(); ++i) chunks_.push_back(chunk_at(prefix, sizes, kChunk, i));
    for (int64_t size : sizes) elements_ += size;
  }

  size_t count() const { return chunks_.size(); }
  int64_t elements() const { return elements_; }

  // Calls work(number, chunk) for each chunk, then done() in each thread that worked.
  template <class Work, class Done>
  void each(int threads, Work&& work, Done&& done) {
    threads = int(std::min<int64_t>(threads, elements_ / kElementsPerThread));
    if (threads <= 1) {
      for (size_t i = 0; i < chunks_.size(); ++i) work(i, chunks_[i]);
      done();
      return;
    }
    if (threads + 1 != int(bounds_.size())) bounds_ = split_chunks(chunks_, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int k = 0; k < threads; ++k) {
      for (int64_t i = bounds_[size_t(k)]; i < bounds_[size_t(k) + 1]; ++i) work(size_t(i), chunks_[size_t(i)]);
      done();
    }
  }

 private:
  std::vector<Chunk> chunks_;
  std::vector<int64_t> bounds_;
  int64_t elements_ = 0;
};

}  // namespace fused_sam
