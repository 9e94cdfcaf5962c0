// Distributes chunks of tensors over threads.
#pragma once

#include <algorithm>
#include <functional>
#include <system_error>
#include <thread>

#include "core/tensor_table.h"
#include "cpu/fork.h"

namespace fused_sam {

// 64 KB of fp32. Param, grad and backup of a chunk fit a second-level cache, a model of 10 million parameters has
// hundreds of chunks to distribute, and the loop around a chunk costs nothing in comparison.
constexpr int64_t kChunk = 16384;

// With fewer elements per thread, waking a thread costs more than it saves (torch's own grain size).
constexpr int64_t kElementsPerThread = 32768;

// Calls part(k) for each k below `count`, on threads that this call starts: in a forked child, for OpenMP.
template <class Part>
void on_new_threads(int count, Part&& part) {
  std::vector<std::thread> others;
  others.reserve(size_t(count));
  int k = 1;
  try {
    for (; k < count; ++k) others.emplace_back(std::ref(part), k);
  } catch (const std::system_error&) {  // the system has no further thread, so that this one takes the rest
  }
  part(0);
  for (; k < count; ++k) part(k);
  for (std::thread& t : others) t.join();
}

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
    const auto part = [&](int k) {
      for (int64_t i = bounds_[size_t(k)]; i < bounds_[size_t(k) + 1]; ++i) work(size_t(i), chunks_[size_t(i)]);
      done();
    };
    if (in_forked_child()) {
      on_new_threads(threads, part);
      return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int k = 0; k < threads; ++k) part(k);
  }

 private:
  std::vector<Chunk> chunks_;
  std::vector<int64_t> bounds_;
  int64_t elements_ = 0;
};

}  // namespace fused_sam
