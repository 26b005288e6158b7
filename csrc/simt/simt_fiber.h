// SPDX-License-Identifier: Apache-2.0
// A fiber: a call stack of its own, entered with resume() and left with suspend().
//
// ucontext would do, but each swapcontext is a system call that saves the signal mask (about 350 ns against 5 ns), and
// a block reduction switches thousands of times. ucontext serves the architectures that have no switch written here.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "simt/simt_memory.h"

#if defined(__x86_64__) && !defined(SIMT_USE_UCONTEXT)
#define SIMT_NATIVE_SWITCH 1
#else
#define SIMT_NATIVE_SWITCH 0
#include <ucontext.h>
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if SIMT_NATIVE_SWITCH
// Saves the callee-saved registers on the current stack, its pointer in *from, and goes on from the stack `to`.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

class Fiber {
 public:
  // `entry` never returns: it suspends when it has nothing left to do. It starts at the first resume().
  explicit Fiber(void (*entry)()) : entry_(entry) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    map_bytes_ = kStackBytes + page;
    map_ = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(map_, page, PROT_NONE);  // a stack overflow faults here
    stack_ = static_cast<char*>(map_) + page;
#if SIMT_NATIVE_SWITCH
    // What switch_stack pops: six registers, then main() as the return address, at the alignment a call would give it.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&Fiber::main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    own_ = top;
#else
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_;
    own_.uc_stack.ss_size = kStackBytes;
    makecontext(&own_, &Fiber::main, 0);
#endif
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // A fiber may be destroyed while suspended in the middle of a kernel: its frames are dropped, no destructor runs.
  ~Fiber() {
    asan_unpoison(stack_, kStackBytes);
    munmap(map_, map_bytes_);
  }

  // Whether an address stands on the stack of the fiber that runs.
  static bool on_stack(const void* address) {
    const char* place = static_cast<const char*>(address);
    return current_ != nullptr && place >= current_->stack_ && place < current_->stack_ + kStackBytes;
  }

  // Runs the fiber until it suspends. Called from the scheduler's stack.
  void resume() {
    current_ = this;
    void* fake_stack = leave(stack_, kStackBytes);
    switch_context(scheduler_, own_);
    arrive(fake_stack);
  }

  // Goes back to the scheduler; returns at the next resume(). Called on the fiber.
  void suspend() {
    void* fake_stack = leave(scheduler_stack_, scheduler_stack_bytes_);
    switch_context(own_, scheduler_);
    arrive(fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
  }

 private:
  static constexpr std::size_t kStackBytes = 512 << 10;  // touched pages alone take memory; sanitizers widen frames

  static void main() {
    current_->arrive(nullptr, &current_->scheduler_stack_, &current_->scheduler_stack_bytes_);
    current_->entry_();
    __builtin_unreachable();
  }

  // ASan must know which stack runs: leave() names the next one, arrive() ends the change and tells the last one's
  // bounds.
  static void* leave([[maybe_unused]] const void* next_stack, [[maybe_unused]] std::size_t bytes) {
    void* fake_stack = nullptr;
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(&fake_stack, next_stack, bytes);
#endif
    return fake_stack;
  }

  static void arrive([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** last_stack = nullptr,
                     [[maybe_unused]] std::size_t* bytes = nullptr) {
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, last_stack, bytes);
#endif
  }

#if SIMT_NATIVE_SWITCH
  using Context = void*;  // the saved stack pointer
  static void switch_context(Context& from, Context& to) { switch_stack(&from, to); }
#else
  using Context = ucontext_t;
  static void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

  inline static Fiber* current_ = nullptr;
  void (*entry_)();
  void* map_ = nullptr;
  std::size_t map_bytes_ = 0;
  char* stack_ = nullptr;
  Context own_{};
  Context scheduler_{};
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_stack_bytes_ = 0;
};

}  // namespace simt
