// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>

namespace singlepass {

// Calls body(begin, end) over [0, n) in any split, on any threads, and returns when all is done.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t begin, int64_t end)>& body)>;

}  // namespace singlepass
