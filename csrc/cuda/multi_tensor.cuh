// The device side of a multi-tensor launch: which elements a block takes, and how its threads move over them.
//
// A kernel gives the elements to an operation, a struct with
//   kPack                        elements of a 16-byte access of its narrowest array
//   kElements                    elements of each array that a thread loads before it uses the first
//   kLean                        true to have one load in flight at a span's end: fewer registers, and so more blocks
//   Registers<N>                 the values of N elements of each array that it reads
//   head()                       elements before the first that begins a 16-byte vector of its main array
//   addresses(at)                the pointers to element `at` of all arrays but one, or-ed together
//   other(at)                    the pointer to element `at` of that one, whose vectors may begin elsewhere: a gradient
//                                is often a view of a communication bucket
//   load<N, kSplit>(at)          reads N elements from `at` on; with kSplit those of the other array one by one
//   finish<N>(values, at, u)     computes and stores them; u counts the loads in flight
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

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

// The same where the address may not be a multiple of 16: kSplit loads element by element.
template <int N, Use kUse, bool kSplit, class T>
FUSED_SAM_DEVICE Pack<T, N> load_other(const T* from) {
  if constexpr (kSplit) {
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.at[k] = from[k];
    return pack;
  } else {
    return load<N, kUse>(from);
  }
}

// Return the elements before the first whose address is a multiple of 16.
template <class T>
FUSED_SAM_DEVICE int32_t before_vector(const T* from) {
  return int32_t((0u - uint32_t(uintptr_t(from))) % 16u / uint32_t(sizeof(T)));
}

// ---- packs as fp32, and back: GPUs convert 16-bit numbers in pairs -------------------------------------------

#if defined(__CUDA_ARCH__)
constexpr bool kOnGpu = true;

// Return two fp32 numbers as a word of two 16-bit ones, rounded to nearest, the first in the lower half.
FUSED_SAM_DEVICE uint32_t pair_of(bf16, float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
FUSED_SAM_DEVICE uint32_t pair_of(f16, float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
// Return both numbers of such a word.
FUSED_SAM_DEVICE void split_pair(uint32_t pair, f16& first, f16& second) {
  asm("mov.b32 {%0, %1}, %2;" : "=h"(first.bits), "=h"(second.bits) : "r"(pair));
}
#else
constexpr bool kOnGpu = false;  // csrc/tests/cuda_shim, or the host's half of a compilation
#endif

// Return a pack of fp32 numbers as T, rounded to nearest.
template <class T, int N>
FUSED_SAM_DEVICE Pack<T, N> narrowed(const Pack<float, N>& wide) {
  Pack<T, N> pack;
  if constexpr (kOnGpu && sizeof(T) == 2 && N % 2 == 0) {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int k = 0; k < N / 2; ++k) pairs[k] = pair_of(T{}, wide.at[2 * k], wide.at[2 * k + 1]);
    memcpy(&pack, pairs, sizeof(pack));
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) pack.at[k] = Narrow<T, float>::of(wide.at[k]);
  }
  return pack;
}

// Return a pack as fp32.
template <class T, int N>
FUSED_SAM_DEVICE Pack<float, N> widened(const Pack<T, N>& pack) {
  Pack<float, N> wide;
  if constexpr (kOnGpu && std::is_same<T, f16>::value && N % 2 == 0) {
    uint32_t pairs[N / 2];
    memcpy(pairs, &pack, sizeof(pack));
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      T first, second;
      split_pair(pairs[k], first, second);
      wide.at[2 * k] = widen(first);
      wide.at[2 * k + 1] = widen(second);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) wide.at[k] = widen(pack.at[k]);
  }
  return wide;
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

// Calls take(span) for every gridDim.x-th chunk of the launch, in rising order.
template <class Table, class F>
FUSED_SAM_DEVICE void for_each_chunk(const Table& table, F&& take) {
  const uint32_t chunks = uint32_t(table.prefix[table.count]);
#pragma unroll 1
  for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) take(span_of(table, int32_t(chunk)));
}

// One round: the loads of every thread, then their use. kFull: all of them are before `end`.
template <int N, int kInFlight, bool kFull, bool kSplit, class Operation>
FUSED_SAM_DEVICE void round(Operation& operation, int32_t first, int32_t end) {
  constexpr int32_t kStride = kThreads * N;
  typename Operation::template Registers<N> values[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u)
    if (kFull || first + u * kStride < end) values[u] = operation.template load<N, kSplit>(first + u * kStride);
#pragma unroll
  for (int u = 0; u < kInFlight; ++u)
    if (kFull || first + u * kStride < end) operation.template finish<N>(values[u], first + u * kStride, u);
}

// Elements begin .. end - 1 in packs of N, several loads of every thread in flight.
template <int N, bool kSplit, class Operation>
FUSED_SAM_DEVICE void sweep(Operation& operation, int32_t begin, int32_t end) {
  constexpr int kInFlight = Operation::kElements / (N == 1 ? kScalarShare : N);
  constexpr int32_t kRound = kInFlight * kThreads * N;
  int32_t first = begin + int32_t(threadIdx.x) * N;
#pragma unroll 1
  for (; begin + kRound <= end; begin += kRound, first += kRound)
    round<N, kInFlight, true, kSplit>(operation, first, end);
  if constexpr (Operation::kLean) {
#pragma unroll 1
    for (; first < end; first += kThreads * N) round<N, 1, true, kSplit>(operation, first, end);
  } else if (begin < end) {
    round<N, kInFlight, false, kSplit>(operation, first, end);
  }
}

// All elements of a span: 16 bytes at a time between the first and the last element that begin a vector in all arrays
// but one, and the rest one by one.
template <class Operation>
FUSED_SAM_DEVICE void run(Operation& operation, int32_t length) {
  constexpr int N = Operation::kPack;
  const int32_t head = operation.head();
  if (head > length || operation.addresses(head) % 16 != 0) return sweep<1, false>(operation, 0, length);
  const int32_t packed = (length - head) / N * N;
  if (operation.other(head) % 16 == 0)
    sweep<N, false>(operation, head, head + packed);
  else
    sweep<N, true>(operation, head, head + packed);
  const int32_t edge = int32_t(threadIdx.x);  // before and behind the vectors are fewer than 2 N elements
  if (edge < length - packed) {
    const int32_t at = edge < head ? edge : edge + packed;
    auto values = operation.template load<1, false>(at);
    operation.template finish<1>(values, at, 0);
  }
}

// ---- a block's sums ----------------------------------------------------------------------------------------

// Replace every thread's sums by those over the block's threads, in a fixed order; only thread 0 gets them.
template <int kSums>
FUSED_SAM_DEVICE void add_up_block(float (&sums)[kSums]) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float warp_sums[kSums][kWarps];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], distance);
    if (threadIdx.x % 32 == 0) warp_sums[k][threadIdx.x / 32] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      sums[k] = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sums[k] += warp_sums[k][warp];
    }
  }
}

// A deterministic reduction over all blocks of all launches of a table. Every block leaves its sums in slots, and the
// last block to end adds the slots up, in the blocks' order. Every thread calls it with its own sums; it returns true
// in one thread of that last block, which then has the totals in `sums`.
template <int kSums>
FUSED_SAM_DEVICE bool reduce(float (&sums)[kSums], const Slots& slots) {
  __shared__ bool last_block;
  add_up_block(sums);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) slots.sums[k * slots.count + slots.first + blockIdx.x] = sums[k];
    __threadfence();  // a block that reads the ticket then reads these slots
    last_block = slots.last && atomicAdd(slots.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();  // also before the next sums are written to the warps' places
  if (!last_block) return false;
  __threadfence();
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] = 0;
  for (int32_t i = int32_t(threadIdx.x); i < slots.count; i += kThreads) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] += __ldcg(slots.sums + k * slots.count + i);
  }
  add_up_block(sums);
  if (threadIdx.x == 0) *slots.ticket = 0;
  return threadIdx.x == 0;
}

// A deterministic reduction of two sums per tensor, over all blocks of one launch. As `reduce`, except that the last
// block adds up the slots of each tensor, a warp per tensor, and writes the totals: out[t] and out[rows + t].
template <class Table>
FUSED_SAM_DEVICE void reduce_rows(float (&sums)[2], const Slots& slots, const Table& table, float* out, int32_t rows,
                                  bool both) {
  __shared__ bool last_block;
  add_up_block(sums);
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
