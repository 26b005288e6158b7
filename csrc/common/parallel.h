// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

namespace singlepass {

// Threads that share work.
class ParallelFor {
 public:
  using Body = std::function<void(int64_t begin, int64_t end)>;
  using Run = std::function<void(int64_t n, int64_t grain, const Body& body)>;

  ParallelFor(Run run, int64_t threads) : run_(std::move(run)), threads_(threads) {}

  // Calls body(begin, end) over [0, n) in any split, on any threads, each of which gets `grain` or more if there are so
  // many, and returns when all is done.
  void operator()(int64_t n, int64_t grain, const Body& body) const { run_(n, grain, body); }

  // How many there are. Results must not depend on it.
  int64_t threads() const { return threads_; }

 private:
  Run run_;
  int64_t threads_;
};

// Where an op runs on a GPU; common/cuda.h has it.
struct Gpu;

// For fewer elements, to wake another thread costs more than it saves.
inline constexpr int64_t kParallelElements = 1 << 15;

// parallel_for over n tasks that work on `elements` elements in all.
inline void parallel_for_elements(const ParallelFor& parallel_for, int64_t n, int64_t elements,
                                  const ParallelFor::Body& body) {
  if (elements < kParallelElements) {
    body(0, n);
  } else {
    parallel_for(n, (n * kParallelElements + elements - 1) / elements, body);
  }
}

}  // namespace singlepass
