// The threads of a CUDA block as fibers on one thread of the host: each runs until a barrier, then the next one runs.
//
// A switch is a few instructions on x86-64 and swapcontext() elsewhere; every switch is announced to the address
// sanitizer. If not every thread reaches a barrier, a GPU may hang, and this program ends with a message.
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
void wait_for_block();            // until every thread of the block waits here
void wait_for_warp();             // until the 32 threads of the warp wait here
uint64_t& lane_slot(int thread);  // the value that a thread passes to the others of its warp

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s\n", what);
  std::abort();
}

// Return the value that lane `from` of the same warp passes to the same call.
template <class T>
T exchange(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 8 bytes at most");
  if (mask != 0xffffffffu) fail("only shuffles of whole warps are implemented");
  const int thread = current_thread(), warp = thread / 32 * 32;
  std::memcpy(&lane_slot(thread), &value, sizeof(T));
  wait_for_warp();
  std::memcpy(&value, &lane_slot(warp + from), sizeof(T));
  wait_for_warp();
  return value;
}

}  // namespace cuda_shim
