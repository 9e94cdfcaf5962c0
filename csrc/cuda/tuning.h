// The numbers that depend on the GPU's generation, each with its reason.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fused_sam {

// Threads of a block: 8 warps. A block's tail is then short, and 2 to 5 blocks share an SM.
constexpr int kThreads = 256;

// Elements that a thread loads from each array before it uses the first: 4 accesses of 16 bytes in fp32. A block of the
// SGD update then has 3 x 16 KB in flight, and an SM with its 3 blocks (79 registers per thread) 144 KB. By Little's
// law, at a latency of 0.6 to 0.8 us, the memory's rate needs 11 KB per SM on an A100, 20 KB on an H100 and 45 KB on a
// B200.
constexpr int kElementsInFlight = 16;

// Elements of one full round of a block: 4096.
constexpr int64_t kTile = int64_t(kThreads) * kElementsInFlight;

struct Tuning {
  int blocks_per_sm;  // that a large table is cut into
};

// 64 blocks for every SM, of which 2 to 5 run at a time. The last blocks to end then idle the other SMs for some
// hundredths of the time, and a block of a model with 100M parameters spreads its start (search, pointers,
// hyper-parameters) over two tiles. A Blackwell SM has twice a Hopper SM's share of the bandwidth and takes fewer,
// longer blocks.
inline Tuning tuning_of(int compute_capability_major) {
  if (compute_capability_major >= 10) return {48};
  return {64};
}

// Longer chunks gain nothing, and the last block of a norm adds one number per chunk: 15,000 for 1G elements.
constexpr int64_t kLongestChunk = 16 * kTile;

// Return whole tiles that share the work evenly among the SMs: one tile for small models, so that no SM idles.
inline int64_t chunk_for(int64_t elements, int sm_count, Tuning tuning) {
  const int64_t blocks = int64_t(std::max(sm_count, 1)) * tuning.blocks_per_sm;
  const int64_t tiles = elements / (blocks * kTile);
  return std::min(std::max<int64_t>(tiles, 1) * kTile, kLongestChunk);
}

}  // namespace fused_sam
