// Cuts the tensors of a table into chunks, the units of work of threads and CUDA blocks.
//
// The chunks of all tensors have consecutive numbers. prefix[i] is the number of chunks before tensor i, so that
// tensor i owns chunks prefix[i] .. prefix[i + 1] - 1 and an empty tensor owns none.
// All sizes and offsets have 64 bits.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "core/formulas.h"

namespace fused_sam {

struct Chunk {
  int64_t begin;   // first element within the tensor
  int64_t length;  // in elements; only a tensor's last chunk is shorter than the chunk size
  int32_t tensor;
};

// Returns the tensor that owns a chunk: the last i with prefix[i] <= chunk. count: the number of tensors.
template <class Index>
FUSED_SAM_FN int32_t tensor_of_chunk(const Index* prefix, int32_t count, Index chunk) {
  int32_t low = 0, high = count;  // prefix[low] <= chunk < prefix[high]
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (prefix[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Returns the number of chunks before each tensor, and last the number of all chunks.
static inline std::vector<int64_t> chunk_prefix(const std::vector<int64_t>& sizes, int64_t chunk) {
  if (chunk <= 0) throw std::invalid_argument("chunk size must be positive");
  std::vector<int64_t> prefix(sizes.size() + 1, 0);
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 0) throw std::invalid_argument("a tensor's size is negative");
    prefix[i + 1] = prefix[i] + (sizes[i] / chunk + (sizes[i] % chunk != 0));
  }
  return prefix;
}

// Returns the chunk of that number.
static inline Chunk chunk_at(const std::vector<int64_t>& prefix, const std::vector<int64_t>& sizes, int64_t chunk,
                             int64_t index) {
  const int32_t tensor = tensor_of_chunk<int64_t>(prefix.data(), int32_t(sizes.size()), index);
  const int64_t begin = (index - prefix[tensor]) * chunk;
  const int64_t rest = sizes[tensor] - begin;
  return Chunk{begin, rest < chunk ? rest : chunk, tensor};
}

// Splits the chunks into one contiguous run per worker, of about equally many elements: worker k takes chunks
// result[k] .. result[k + 1] - 1. No run holds more than an equal share and one chunk.
static inline std::vector<int64_t> split_chunks(const std::vector<Chunk>& chunks, int64_t workers) {
  int64_t total = 0;
  for (const Chunk& c : chunks) total += c.length;
  std::vector<int64_t> bounds(1, 0);
  int64_t done = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    done += chunks[i].length;
    // Quotient first: total * workers may not fit 64 bits.
    while (int64_t(bounds.size()) < workers &&
           done >= total / workers * int64_t(bounds.size()) + total % workers * int64_t(bounds.size()) / workers)
      bounds.push_back(int64_t(i) + 1);
  }
  while (int64_t(bounds.size()) <= workers) bounds.push_back(int64_t(chunks.size()));
  bounds[workers] = int64_t(chunks.size());
  return bounds;
}

}  // namespace fused_sam
