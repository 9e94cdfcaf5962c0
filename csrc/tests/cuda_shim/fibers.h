// The threads of a CUDA block as fibers on one thread of the host: each runs until a barrier, then the next one does.
//
// A switch is a few instructions on x86-64 and swapcontext() elsewhere; the address sanitizer is told of each. A barrier
// that not every thread reaches, which on a GPU hangs or worse, ends the program with a message.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

namespace cuda_shim {

// Runs `body` once for each thread.
void run_block(int threads, const std::function<void()>& body);

int current_thread();
void wait_for_block();                // until every thread of the block has come here
void wait_for_warp();                 // the same for the 32 threads of a warp
uint64_t& lane_slot(int thread);      // what a thread shows to the others of its warp

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s\n", what);
  std::abort();
}

// The value that lane `from` of the same warp brings to the same call.
template <class T>
T exchange(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 8 bytes at most");
  if (mask != 0xffffffffu) fail("only shuffles of whole warps are known here");
  const int thread = current_thread(), warp = thread / 32 * 32;
  std::memcpy(&lane_slot(thread), &value, sizeof(T));
  wait_for_warp();
  std::memcpy(&value, &lane_slot(warp + from), sizeof(T));
  wait_for_warp();
  return value;
}

}  // namespace cuda_shim
