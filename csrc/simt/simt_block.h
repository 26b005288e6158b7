// SPDX-License-Identifier: Apache-2.0
// One thread block: its threads, barriers and shared memory, under a scheduler that a seed permutes.
//
// A thread runs until it must wait; what is ready runs in an order drawn anew at each barrier. A thread that never
// waits costs no switch: the fiber that has ended one thread goes on with the next.
#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <queue>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "simt/simt_fiber.h"
#include "simt/simt_memory.h"
#include "simt/simt_random.h"
#include "simt/simt_traffic.h"
#include "simt/simt_types.h"
#include "simt/simt_warp.h"

inline uint3 threadIdx{};
inline uint3 blockIdx{};
inline dim3 blockDim{};
inline dim3 gridDim{};

namespace simt {

constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr std::size_t kMaxStaticSharedBytes = 48 << 10;
constexpr std::size_t kMaxSharedBytes = 227 << 10;

// A kernel broke a rule of the programming model: a divergent barrier or warp collective, a store beside its shared
// memory, more shared memory than there is, or a wait without end.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State { kNotStarted, kReady, kAtBarrier, kInWarpCollective, kExited };

// Of 16 bytes to shared memory, which nobody has waited for yet.
struct Copy {
  void* to;
  const void* from;  // or null: zeros are written
};

struct Thread {
  uint3 index;
  unsigned linear;
  State state;
  std::unique_ptr<Fiber> fiber;
  std::source_location site;                     // where it waits
  std::deque<std::pair<unsigned, Copy>> copies;  // with the numbers of their groups
  unsigned copy_groups = 0;                      // that have ended
};

class Block {
 public:
  Block(uint3 index, void (*body)(void*), void* arguments, std::size_t dynamic_bytes, Random& random)
      : index_(index),
        body_(body),
        arguments_(arguments),
        dynamic_(dynamic_bytes),
        random_(random),
        recorder_(blockDim.x * blockDim.y * blockDim.z) {
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    recorder_.add_shared(dynamic_.data(), dynamic_.bytes());
    threads_.resize(count);
    warps_.resize((count + kWarpSize - 1) / kWarpSize);
    if (count % kWarpSize != 0) warps_.back().absent = ~0u << count % kWarpSize;
    for (unsigned i = 0; i < count; ++i) {
      threads_[i].linear = i;
      threads_[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    draw_schedule();
    for (Thread& thread : threads_) enqueue(thread);
  }

  // Runs for a turn, to the block's end or to anywhere before it. True when all threads have exited.
  bool run() {
    current = this;
    blockIdx = index_;
    turn_ = random_() % 2 == 0 ? kWholeTurn : std::uint64_t{1} << random_() % 11;
    while (Thread* thread = next()) {
      if (thread->fiber == nullptr) thread->fiber = take_idle_fiber();
      enter(*thread);
      thread->fiber->resume();
      if (failure_) std::rethrow_exception(failure_);
      if (turn_ == 0) return false;
    }
    if (exited_ < threads_.size()) fail("waits without end");
    bool intact = dynamic_.intact();
    for (const auto& [site, memory] : static_) intact &= memory.intact();
    if (!intact) fail("stored beside its shared memory");
    return true;
  }

  // __syncthreads: all threads of the block, at one place of the source. Whether any of them says so.
  bool barrier(std::source_location site, bool any = false) {
    [[maybe_unused]] const Recorder::InRuntime pause;
    wait_at(State::kAtBarrier, site);
    says_so_ = says_so_ || any;
    if (++at_barrier_ == threads_.size()) {
      for (const Thread& thread : threads_)
        if (!same(thread.site, site)) fail("divergent __syncthreads");
      recorder_.meet(0, static_cast<unsigned>(threads_.size()));
      at_barrier_ = 0;
      yields_ = 0;
      any_said_so_ = std::exchange(says_so_, false);
      draw_schedule();
      for (Thread& thread : threads_) release(thread);
    }
    suspend();
    return any_said_so_;
  }

  // cp.async: it happens when the thread that asks for it waits for it.
  void copy_later(const Copy& copy) {
    [[maybe_unused]] const Recorder::InRuntime pause;
    running_->copies.emplace_back(running_->copy_groups, copy);
  }

  void end_copies() {
    [[maybe_unused]] const Recorder::InRuntime pause;
    ++running_->copy_groups;
  }

  // The next of the copies that the thread waits for, those of all groups but its last `left`; or one to nowhere.
  Copy next_copy(unsigned left) {
    [[maybe_unused]] const Recorder::InRuntime pause;
    auto& copies = running_->copies;
    if (copies.empty() || copies.front().first + left >= running_->copy_groups) return {};
    const Copy copy = copies.front().second;
    copies.pop_front();
    return copy;
  }

  // The *_sync collectives: all lanes that `mask` names, with the same mask and operation.
  std::uint64_t warp_collective(WarpOp op, unsigned mask, std::uint64_t value, unsigned argument, unsigned width,
                                std::source_location site) {
    [[maybe_unused]] const Recorder::InRuntime pause;
    Warp& warp = warps_[running_->linear / kWarpSize];
    const unsigned own_lane = running_->linear % kWarpSize, first = running_->linear - own_lane;
    wait_at(State::kInWarpCollective, site);
    if (warp.meet(own_lane, {op, mask, value, argument, width}, [this](const std::string& what) { fail(what); })) {
      if (mask == ~0u) recorder_.meet(first, kWarpSize);
      for (unsigned lane = 0; lane < kWarpSize; ++lane)
        if (mask >> lane & 1u) release(threads_[first + lane]);
    }
    suspend();
    return warp.result(own_lane);
  }

  // Atomics call it before and after: other threads run on, or other blocks, for which atomics are what they meet at.
  void yield_sometimes() {
    [[maybe_unused]] const Recorder::InRuntime pause;
    const std::uint64_t draw = random_() % 8;
    if (draw >= 3) return;
    if (++yields_ > kMaxYields) fail("spins without end");
    if (draw == 0) turn_ = 1;
    release(*running_);
    suspend();
  }

  // The variable that belongs to `site` in this block, made at its first use.
  void* shared(const void* site, std::size_t bytes) {
    [[maybe_unused]] const Recorder::InRuntime pause;
    auto found = static_.find(site);
    if (found == static_.end()) {
      static_bytes_ += bytes;
      if (static_bytes_ > kMaxStaticSharedBytes || static_bytes_ + dynamic_.bytes() > kMaxSharedBytes)
        fail("uses too much shared memory: " + std::to_string(static_bytes_) + " bytes besides " +
             std::to_string(dynamic_.bytes()) + " dynamic ones");
      found = static_.try_emplace(site, bytes).first;
      recorder_.add_shared(found->second.data(), bytes);
    }
    return found->second.data();
  }

  void* dynamic_shared() const {
    [[maybe_unused]] const Recorder::InRuntime pause;
    return dynamic_.data();
  }

  inline static Block* current = nullptr;

 private:
  static constexpr std::uint64_t kWholeTurn = ~std::uint64_t{0};
  static constexpr std::uint64_t kMaxYields = 1'000'000;

  // All fibers run this: the thread that the scheduler entered, then those that can start right after it.
  static void fiber_main() {
    for (;;) {
      Thread* thread = current->running_;
      while (Thread* following = current->run_thread(*thread)) {
        following->fiber = std::move(thread->fiber);
        thread = following;
      }
      Fiber& fiber = *thread->fiber;
      idle_fibers_.push_back(std::move(thread->fiber));
      fiber.suspend();
    }
  }

  static std::unique_ptr<Fiber> take_idle_fiber() {
    if (idle_fibers_.empty()) return std::make_unique<Fiber>(&fiber_main);
    std::unique_ptr<Fiber> fiber = std::move(idle_fibers_.back());
    idle_fibers_.pop_back();
    return fiber;
  }

  // Returns the thread to start next on the same fiber, or null to go back to the scheduler.
  Thread* run_thread(Thread& thread) {
    try {
      body_(arguments_);
    } catch (...) {
      failure_ = std::current_exception();
    }
    thread.state = State::kExited;
    warps_[thread.linear / kWarpSize].absent |= 1u << thread.linear % kWarpSize;
    ++exited_;
    yields_ = 0;
    if (failure_) return nullptr;
    upcoming_ = next();
    if (--turn_ == 0 || upcoming_ == nullptr || upcoming_->state != State::kNotStarted) return nullptr;
    Thread* following = std::exchange(upcoming_, nullptr);
    enter(*following);
    return following;
  }

  void enter(Thread& thread) {
    running_ = &thread;
    recorder_.enter(thread.linear);
    threadIdx = thread.index;
    thread.state = State::kReady;
  }

  void wait_at(State state, std::source_location site) {
    running_->state = state;
    running_->site = site;
  }

  void release(Thread& thread) {
    thread.state = State::kReady;
    enqueue(thread);
  }

  void suspend() {
    --turn_;
    running_->fiber->suspend();
  }

  Thread* next() {
    if (upcoming_ != nullptr) return std::exchange(upcoming_, nullptr);
    if (ready_.empty()) return nullptr;
    Thread* thread = &threads_[ready_.top() % kMaxThreads];
    ready_.pop();
    return thread;
  }

  // Until the next barrier: either any thread may come next, or one warp runs as far as it can before another starts.
  void draw_schedule() {
    warp_by_warp_ = random_() % 2 == 0;
    for (Warp& warp : warps_) warp.order = random_() << 32;
  }

  void enqueue(const Thread& thread) {
    const std::uint64_t draw = random_();
    const std::uint64_t order = warp_by_warp_ ? warps_[thread.linear / kWarpSize].order | draw >> 32 : draw;
    ready_.push(order / kMaxThreads * kMaxThreads + thread.linear);
  }

  static bool same(const std::source_location& a, const std::source_location& b) {
    return a.line() == b.line() && a.column() == b.column() && std::string_view(a.file_name()) == b.file_name();
  }

  // Thrown on a fiber it ends that thread; run() passes it on.
  [[noreturn]] void fail(const std::string& what) const {
    throw Error("simt: block (" + std::to_string(index_.x) + ", " + std::to_string(index_.y) + ", " +
                std::to_string(index_.z) + "): " + what + ": " + census());
  }

  // "31 threads at __syncthreads (reduce.h:20), 1 exited"
  std::string census() const {
    std::map<std::string, unsigned> counts;
    for (const Thread& thread : threads_) {
      const std::string place =
          " (" + std::string(thread.site.file_name()) + ":" + std::to_string(thread.site.line()) + ")";
      switch (thread.state) {
        case State::kNotStarted:
          ++counts["not started"];
          break;
        case State::kReady:
          ++counts["running"];
          break;
        case State::kAtBarrier:
          ++counts["at __syncthreads" + place];
          break;
        case State::kInWarpCollective:
          ++counts["in a warp collective" + place];
          break;
        case State::kExited:
          ++counts["exited"];
          break;
      }
    }
    std::string text;
    for (const auto& [what, count] : counts)
      text += (text.empty() ? "" : ", ") + std::to_string(count) + (count == 1 ? " thread " : " threads ") + what;
    return text;
  }

  inline static std::vector<std::unique_ptr<Fiber>> idle_fibers_;

  uint3 index_;
  void (*body_)(void*);
  void* arguments_;
  GuardedMemory dynamic_;
  Random& random_;
  std::vector<Thread> threads_;
  std::map<const void*, GuardedMemory> static_;
  std::size_t static_bytes_ = 0;
  Recorder recorder_;

  std::vector<Warp> warps_;

  // Threads that may run, in the order that was drawn: the last bits of each number are the thread's own.
  std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>> ready_;
  bool warp_by_warp_ = false;

  Thread* running_ = nullptr;
  Thread* upcoming_ = nullptr;  // taken from ready_ by a fiber that could not start it itself
  std::size_t at_barrier_ = 0;
  bool says_so_ = false, any_said_so_ = false;  // of those at the barrier, and of the last one
  std::size_t exited_ = 0;
  std::uint64_t turn_ = 0;    // how many more times a thread may stop before another block runs on
  std::uint64_t yields_ = 0;  // since a thread last ended or met a barrier
  std::exception_ptr failure_;
};

}  // namespace simt
