// The numbers that depend on the GPU's generation, each with its reason.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fused_sam {

constexpr int kThreads = 256;  // a block: 8 warps, so that its own tail is short and 2 to 5 blocks share an SM

// Elements a thread loads from each array before it uses the first: 4 accesses of 16 bytes in fp32. A block of the
// update then has 3 x 16 KB under way, and an SM with its 3 blocks (79 registers a thread) 144 KB; by Little's law the
// memory's rate takes, at 0.6 to 0.8 us of latency, 11 KB an SM on an A100, 20 KB on an H100 and 45 KB on a B200.
constexpr int kElementsInFlight = 16;

constexpr int64_t kTile = int64_t(kThreads) * kElementsInFlight;  // elements of a block's full round: 4096

struct Tuning {
  int blocks_per_sm;  // that a large table is cut into
};

// 64 blocks for every SM, of which 2 to 5 run at a time: the last ones to end idle the others for some hundredths of
// the time, and still a block of a 100M-parameter model has two tiles to spread its start over (search, pointers,
// hyper-parameters). A Blackwell SM has twice a Hopper SM's share of the bandwidth: fewer, longer blocks.
inline Tuning tuning_of(int compute_capability_major) {
  if (compute_capability_major >= 10) return {48};
  return {64};
}

// Longer chunks gain nothing, and the last block of a norm adds one number for each: 15,000 for 1G elements.
constexpr int64_t kLongestChunk = 16 * kTile;

// Whole tiles, as many as share the work evenly among the SMs: one tile for small models, so that no SM idles.
inline int64_t chunk_for(int64_t elements, int sm_count, Tuning tuning) {
  const int64_t blocks = int64_t(std::max(sm_count, 1)) * tuning.blocks_per_sm;
  const int64_t tiles = elements / (blocks * kTile);
  return std::min(std::max<int64_t>(tiles, 1) * kTile, kLongestChunk);
}

}  // namespace fused_sam
