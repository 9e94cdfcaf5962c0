#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>

// Without this option gcc 13 and newer check for uses of a stack after its function's return. The check gives every
// fiber a second stack and takes fifty times the time.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_stack_use_after_return=0";
}
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_shim {
namespace {

constexpr size_t kStack = 256 * 1024;  // the address sanitizer pads every frame

// ---- a context: where a fiber stopped ---------------------------------------------------------------------

#if defined(__x86_64__)

// Saves the registers that a call must preserve on the present stack, stores the stack's address in *from, and
// continues at `to`.
extern "C" void cuda_shim_switch(void** from, void* to);
asm(R"(
.text
.globl cuda_shim_switch
.hidden cuda_shim_switch
.type cuda_shim_switch, @function
cuda_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_shim_switch, .-cuda_shim_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack) - 1;
    *top = nullptr;  // entry's return address: entry never returns, and rsp is then as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer = top;
  }
  static void swap(Context& from, Context& to) { cuda_shim_switch(&from.stack_pointer, to.stack_pointer); }
};

#else

struct Context {
  ucontext_t context;

  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

// ---- fibers -----------------------------------------------------------------------------------------------

enum class State { ready, at_block, at_warp, done };

struct Fiber {
  Context context;
  char* stack = nullptr;
  State state = State::done;
  uint64_t slot = 0;
  void* fake_stack = nullptr;  // the sanitizer's, for a fiber that does not run
};

struct Scheduler {
  std::vector<Fiber> fibers;
  Context main;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  const std::function<void()>* body = nullptr;
  int current = 0;
};

Scheduler& scheduler() {
  static Scheduler* the_scheduler = new Scheduler;  // never freed: its stacks stay until the program ends
  return *the_scheduler;
}

void leave(bool for_good) {
  Scheduler& s = scheduler();
  Fiber& fiber = s.fibers[size_t(s.current)];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, s.main_stack, s.main_stack_size);
#endif
  (void)for_good;
  Context::swap(fiber.context, s.main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void enter(int thread) {
  Scheduler& s = scheduler();
  s.current = thread;
  Fiber& fiber = s.fibers[size_t(thread)];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&s.main_fake_stack, fiber.stack, kStack);
#endif
  Context::swap(s.main, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(s.main_fake_stack, nullptr, nullptr);
#endif
}

void first_frame() {
  Scheduler& s = scheduler();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.main_stack, &s.main_stack_size);
#endif
  (*s.body)();
  s.fibers[size_t(s.current)].state = State::done;
  leave(true);
  fail("a finished thread was run again");
}

char* new_stack() {
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for a fiber's stack");
  return static_cast<char*>(memory);
}

void wait(State barrier) {
  scheduler().fibers[size_t(scheduler().current)].state = barrier;
  leave(false);
}

// Makes the threads first .. end - 1 ready and returns true if all of them wait at `barrier`.
bool release(int first, int end, State barrier) {
  std::vector<Fiber>& fibers = scheduler().fibers;
  for (int t = first; t < end; ++t)
    if (fibers[size_t(t)].state != barrier) return false;
  for (int t = first; t < end; ++t) fibers[size_t(t)].state = State::ready;
  return true;
}

}  // namespace

int current_thread() { return scheduler().current; }
uint64_t& lane_slot(int thread) { return scheduler().fibers[size_t(thread)].slot; }
void wait_for_block() { wait(State::at_block); }
void wait_for_warp() { wait(State::at_warp); }

void run_block(int threads, const std::function<void()>& body) {
  Scheduler& s = scheduler();
  if (int(s.fibers.size()) < threads) s.fibers.resize(size_t(threads));
  s.body = &body;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = s.fibers[size_t(t)];
    if (fiber.stack == nullptr) fiber.stack = new_stack();
    fiber.context.prepare(fiber.stack, first_frame);
    fiber.state = State::ready;
    fiber.fake_stack = nullptr;
  }
  // A warp runs until the block's next barrier. Every other block begins with its last warp, so that a missing barrier
  // changes results.
  static bool backwards = false;
  backwards = !backwards;
  const int warps = (threads + 31) / 32;
  for (;;) {
    bool ran = false, done = true;
    for (int n = 0; n < warps; ++n) {
      const int first = (backwards ? warps - 1 - n : n) * 32, end = std::min(first + 32, threads);
      do {
        for (int k = 0; k < end - first; ++k) {
          const int t = backwards ? end - 1 - k : first + k;
          if (s.fibers[size_t(t)].state == State::ready) enter(t), ran = true;
        }
      } while (release(first, end, State::at_warp));
      for (int t = first; t < end; ++t) done = done && s.fibers[size_t(t)].state == State::done;
    }
    if (done) return;
    if (release(0, threads, State::at_block)) continue;
    if (!ran) fail("threads of a block wait at different barriers, or for threads that have ended");
  }
}

}  // namespace cuda_shim
