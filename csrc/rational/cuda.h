// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda.h"
#include "rational/problem.h"

namespace singlepass::rational {

// How many blocks a launch is cut into, in the direction that is free. It depends on shapes alone, so that sums are the
// same on every GPU.
struct LaunchShape {
  int threads = 256;           // at most; a multiple of 32
  int forward_items = 4;       // per thread, each of them a vector
  int backward_items = 16;     // at least, per thread: they share the block's last sums
  int backward_blocks = 2112;  // about, where there is enough to do: more make the chains of additions shorter
  int64_t partial_bytes = 1 << 20;
};

// Writes y.
cudaError_t launch_forward(const Problem& p, cudaStream_t stream, const LaunchShape& shape = {});

// The bytes of device memory, aligned to 8, that launch_backward needs for partial sums.
int64_t backward_workspace(const Problem& p, const LaunchShape& shape = {});

// Writes all gradients, in two launches: sums by blocks, then their sums in a fixed order.
cudaError_t launch_backward(const Problem& p, void* workspace, cudaStream_t stream, const LaunchShape& shape = {});

}  // namespace singlepass::rational
