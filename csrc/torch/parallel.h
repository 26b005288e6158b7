// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/ops.h>

#include <functional>

namespace singlepass::registration {

// The core's ParallelFor on torch's threads.
inline void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, 1, body);
}

}  // namespace singlepass::registration
