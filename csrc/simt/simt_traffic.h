// SPDX-License-Identifier: Apache-2.0
// Counts what kernels do to memory: requests of warps, the sectors of 32 bytes that these touch, and the wavefronts
// that shared memory needs.
//
// It takes a build with SIMT_TRAFFIC: kernels are compiled with GCC's -fsanitize=thread, which calls a function before
// each access, and simt_traffic.cpp, which has these functions, is linked in place of libtsan. Elsewhere a Recorder is
// empty.
//
// A request is what the lanes of a warp access by the same instruction, the n-th time since they last met at a barrier
// or in a collective of the whole warp. Lanes that leave out a turn of a loop shift this count until they meet again.
// Instructions are GCC's, after its early optimisations: what a GPU's compiler keeps in registers, or loads once more,
// may differ; and stores to neighbours within 16 bytes that follow each other in straight code count as one, as vectors
// written out do. Of caches nothing is modelled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace simt {

#if defined(SIMT_TRAFFIC)

// Of a warp, to global memory.
struct Request {
  std::int64_t address;  // the lowest
  std::int64_t store;    // 1, or 0 for a load
  std::int64_t bytes;    // that lanes ask for, each for itself
  std::int64_t sectors;
  std::int64_t ideal;  // the fewest sectors that hold as many distinct bytes
};

struct Traffic {
  std::vector<Request> requests;
  // Each sector once per launch and direction: launch << 43 | address / 32 << 1 | store.
  std::vector<std::uint64_t> sectors;
  // A request to shared memory goes in groups of lanes, 128 bytes each, and ideally takes one wavefront per group.
  std::int64_t shared_requests = 0, shared_wavefronts = 0, shared_ideal = 0;
};

// Forgets what was counted, and counts from here on, kernels that the calling thread launches.
void start_counting();

const Traffic& finish_counting();

// What the threads of one block have accessed since they last met.
class Recorder {
 public:
  explicit Recorder(unsigned threads) : threads_(threads) {}
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;
  ~Recorder() { meet(0, static_cast<unsigned>(threads_.size())); }

  void add_shared(const void* memory, std::size_t bytes);

  // Accesses that follow are this thread's.
  void enter(unsigned thread);

  // Threads [first, first + count), whole warps, stand at the same place.
  void meet(unsigned first, unsigned count);

  // Accesses count while a kernel's own code runs, not the code that stands in for the device.
  struct InKernel {
    InKernel() { in_kernel_ = true; }
    ~InKernel() { in_kernel_ = false; }
  };
  struct InRuntime {
    InRuntime() { in_kernel_ = false; }
    ~InRuntime() { in_kernel_ = true; }
  };

  static void access(const void* address, std::size_t bytes, bool store, const void* instruction);

  struct Access {
    std::uintptr_t instruction, address;
    unsigned bytes, lane, turn;
    bool store;
  };
  using Lanes = std::vector<Access>;

 private:
  void count_warp(unsigned first, unsigned last);
  bool is_shared(std::uintptr_t address) const;

  // Volatile: it is announced only later that memory is accessed, so that compilers would see nobody read it.
  inline static volatile bool in_kernel_ = false;
  inline static Recorder* current_ = nullptr;
  unsigned thread_ = 0;
  std::vector<Lanes> threads_;
  std::vector<std::pair<std::uintptr_t, std::size_t>> shared_;
};

#else

struct Recorder {
  explicit Recorder(unsigned) {}
  void add_shared(const void*, std::size_t) {}
  void enter(unsigned) {}
  void meet(unsigned, unsigned) {}
  struct InKernel {};
  struct InRuntime {};
};

#endif

}  // namespace simt
