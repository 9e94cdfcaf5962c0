// The device side of a multi-tensor launch: which elements a block takes, and how its threads move over them.
//
// A kernel gives the elements to an operation, a struct with
//   kPack                       elements of a 16-byte access of its narrowest array
//   kElements                   elements of each array that a thread loads before it uses the first
//   Registers<N>                the values of N elements of each array that it reads
//   addresses()                 all its pointers or-ed together, to check their alignment
//   load<N>(i) -> Registers<N>  reads elements i*N .. i*N + N - 1
//   finish<N>(values, i, u)     computes and stores them; u counts the loads in flight
#pragma once

#include <cuda_runtime.h>

#include "core/storage.h"
#include "core/tensor_table.h"
#include "cuda/kernels.h"
#include "cuda/launch_table.h"
#include "cuda/tuning.h"

namespace fused_sam {

#define FUSED_SAM_DEVICE static __device__ __forceinline__
#define FUSED_SAM_METHOD __device__ __forceinline__

// ---- 16-byte accesses -------------------------------------------------------------------------------------

template <class T, int N>
struct Pack {
  T at[N];
};

// `again` is for data that is read again soon. `once` marks its cache lines as the first to be evicted, so that they
// leave the L2 cache to the data that the next kernel reads.
enum class Use { again, once };

template <int N, Use kUse, class T>
FUSED_SAM_DEVICE Pack<T, N> load(const T* from) {
  Pack<T, N> pack;
  if constexpr (sizeof(pack) % 16 == 0) {
    uint4 raw[sizeof(pack) / 16];
    const uint4* vectors = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int k = 0; k < int(sizeof(pack) / 16); ++k) raw[k] = kUse == Use::once ? __ldcs(vectors + k) : vectors[k];
    memcpy(&pack, raw, sizeof(pack));
  } else {
    static_assert(N == 1, "a pack is one element or whole 16-byte vectors");
    pack.at[0] = *from;
  }
  return pack;
}

template <int N, Use kUse, class T>
FUSED_SAM_DEVICE void store(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof(pack) % 16 == 0) {
    uint4 raw[sizeof(pack) / 16];
    memcpy(raw, &pack, sizeof(pack));
    uint4* vectors = reinterpret_cast<uint4*>(to);
#pragma unroll
    for (int k = 0; k < int(sizeof(pack) / 16); ++k) {
      if (kUse == Use::once)
        __stcs(vectors + k, raw[k]);
      else
        vectors[k] = raw[k];
    }
  } else {
    *to = pack.at[0];
  }
}

// ---- a block's elements -----------------------------------------------------------------------------------

struct Span {
  int64_t begin;   // first element within the tensor
  int32_t length;  // elements
  int32_t tensor;
};

template <class Table>
FUSED_SAM_DEVICE Span span_of(const Table& table, int32_t chunk) {
  const int32_t tensor = tensor_of_chunk<int32_t>(table.prefix, table.count, chunk);
  const int64_t begin = int64_t(chunk - table.prefix[tensor]) * table.chunk;
  const int64_t rest = table.size[tensor] - begin;
  return Span{begin, rest < table.chunk ? int32_t(rest) : table.chunk, tensor};
}

// The kernels that write take the chunks from the last to the first. The norm has read the same gradients in rising
// order just before, so that the L2 cache still holds their end.
FUSED_SAM_DEVICE int32_t chunk_from_the_end() { return int32_t(gridDim.x - 1 - blockIdx.x); }

// Packs begin .. end - 1, several loads of every thread in flight.
template <int N, class Operation>
FUSED_SAM_DEVICE void sweep(Operation& operation, int32_t begin, int32_t end) {
  constexpr int kInFlight = Operation::kElements / (N == 1 ? 4 : N);
  for (int32_t first = begin + int32_t(threadIdx.x); first < end; first += kInFlight * kThreads) {
    typename Operation::template Registers<N> values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
      if (first + u * kThreads < end) values[u] = operation.template load<N>(first + u * kThreads);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
      if (first + u * kThreads < end) operation.template finish<N>(values[u], first + u * kThreads, u);
  }
}

// All elements of a span: 16 bytes at a time if every array is aligned to 16 bytes, and the rest one by one.
template <class Operation>
FUSED_SAM_DEVICE void run(Operation& operation, int32_t length) {
  constexpr int N = Operation::kPack;
  const int32_t packs = operation.addresses() % 16 == 0 ? length / N : 0;
  sweep<N>(operation, 0, packs);
  sweep<1>(operation, packs * N, length);
}

// ---- a block's sum ----------------------------------------------------------------------------------------

// Return the sum over the block's threads, in a fixed order, to thread 0.
FUSED_SAM_DEVICE float block_sum(float x) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float warp_sums[kWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kWarps; ++k) sum += warp_sums[k];
  }
  __syncthreads();  // before the next sum writes to warp_sums
  return sum;
}

// A deterministic reduction over all blocks of all launches of a table. Every block leaves its sums in slots, and the
// last block to end adds the slots up, in the chunks' order. Every thread calls it with its own sums; it returns true
// in one thread of that last block, which then has the totals in `sums`.
template <int kSums>
FUSED_SAM_DEVICE bool reduce(float (&sums)[kSums], const Slots& slots) {
  __shared__ bool last_block;
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] = block_sum(sums[k]);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) slots.sums[k * slots.count + slots.first + blockIdx.x] = sums[k];
    __threadfence();  // a block that reads the ticket then reads these slots
    last_block = slots.last && atomicAdd(slots.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last_block) return false;
  __threadfence();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    float total = 0;
    for (int64_t i = threadIdx.x; i < slots.count; i += kThreads) total += __ldcg(slots.sums + k * slots.count + i);
    sums[k] = block_sum(total);
  }
  if (threadIdx.x == 0) *slots.ticket = 0;
  return threadIdx.x == 0;
}

// A deterministic reduction of two sums per tensor, over all blocks of one launch. As `reduce`, except that the last
// block adds up the slots of each tensor, a warp per tensor, and writes the totals: out[t] and out[rows + t].
template <class Table>
FUSED_SAM_DEVICE void reduce_rows(float (&sums)[2], const Slots& slots, const Table& table, float* out, int32_t rows,
                                  bool both) {
  __shared__ bool last_block;
#pragma unroll
  for (int k = 0; k < 2; ++k) sums[k] = block_sum(sums[k]);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < 2; ++k) slots.sums[k * slots.count + slots.first + blockIdx.x] = sums[k];
    __threadfence();  // a block that reads the ticket then reads these slots
    last_block = atomicAdd(slots.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last_block) return;
  __threadfence();
  const int lane = int(threadIdx.x % 32);
  for (int32_t t = int32_t(threadIdx.x / 32); t < table.count; t += kThreads / 32) {
    for (int k = 0; k < (both ? 2 : 1); ++k) {
      const float* of_launch = slots.sums + k * slots.count + slots.first;
      float total = 0;
      for (int32_t c = table.prefix[t] + lane; c < table.prefix[t + 1]; c += 32) total += __ldcg(of_launch + c);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
      if (lane == 0) out[int64_t(k) * rows + t] = total;
    }
  }
  if (threadIdx.x == 0) *slots.ticket = 0;
}

}  // namespace fused_sam
