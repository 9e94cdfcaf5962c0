// The numbers that depend on the GPU's generation, each with its reason.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fused_sam {

// tools/gpu_sweep.py measures other numbers of both, in builds with these macros.
#ifndef FUSED_SAM_THREADS
#define FUSED_SAM_THREADS 256
#endif
#ifndef FUSED_SAM_ELEMENTS
#define FUSED_SAM_ELEMENTS 16
#endif

// Threads of a block: 8 warps. A block's tail is then short, and 2 to 8 blocks share an SM.
constexpr int kThreads = FUSED_SAM_THREADS;

// For __launch_bounds__: the least blocks per SM that the compiler must leave registers for, given for 256 threads.
constexpr int blocks_of(int blocks_of_256) { return std::max(blocks_of_256 * 256 / kThreads, 1); }

// Elements that a thread loads from each array before it uses the first: 4 accesses of 16 bytes in fp32. A block of the
// SGD update then has 3 x 16 KB in flight, and an SM with its 3 blocks (79 registers per thread) 144 KB. By Little's
// law, at a latency of 0.6 to 0.8 us, the memory's rate needs 11 KB per SM on an A100, 20 KB on an H100 and 45 KB on a
// B200.
constexpr int kElementsInFlight = FUSED_SAM_ELEMENTS;

// Where elements go one by one, a thread loads kElementsInFlight / kScalarShare of each array before it uses the first:
// with 8 loads of 2 bytes from two arrays, an SM's 4 blocks have 32 KB in flight.
constexpr int kScalarShare = 2;

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

// Longer chunks gain nothing.
constexpr int64_t kLongestChunk = 16 * kTile;

// Return whole tiles that share the work evenly among the SMs: one tile for small models, so that no SM idles. Their
// number is a power of 2, so that no chunk contains element 2^32 of a tensor and its predecessor: the upper halves of a
// chunk's element numbers are one number, which the random streams rely on.
inline int64_t chunk_for(int64_t elements, int sm_count, Tuning tuning) {
  const int64_t blocks = int64_t(std::max(sm_count, 1)) * tuning.blocks_per_sm;
  int64_t chunk = kTile;
  while (chunk < kLongestChunk && 2 * chunk * blocks <= elements) chunk *= 2;
  return chunk;
}

// Return the blocks of a reduction over `chunks`, of which each takes every blocks-th chunk. All of them fit the GPU at
// once, and all have the same number of chunks or one fewer: a block then starts once, and a sum of few slots ends it.
inline int64_t reduction_blocks(int64_t chunks, int64_t blocks_that_fit) {
  const int64_t most = std::max<int64_t>(blocks_that_fit, 1);
  const int64_t rounds = (chunks + most - 1) / most;
  return rounds == 0 ? 0 : (chunks + rounds - 1) / rounds;
}

}  // namespace fused_sam
