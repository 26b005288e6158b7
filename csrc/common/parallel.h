// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>

namespace singlepass {

// Calls body(begin, end) over [0, n) in any split, on any threads, each of which gets `grain` or more if there are so
// many, and returns when all is done.
using ParallelFor =
    std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

// Where an op runs on a GPU; common/cuda.h has it.
struct Gpu;

// For fewer elements, to wake another thread costs more than it saves.
inline constexpr int64_t kParallelElements = 1 << 15;

// parallel_for over n tasks that work on `elements` elements in all.
inline void parallel_for_elements(const ParallelFor& parallel_for, int64_t n, int64_t elements,
                                  const std::function<void(int64_t begin, int64_t end)>& body) {
  if (elements < kParallelElements) {
    body(0, n);
  } else {
    parallel_for(n, (n * kParallelElements + elements - 1) / elements, body);
  }
}

}  // namespace singlepass
