// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda.h"

namespace singlepass {

inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;  // of a warp, for its collectives

struct WarpSums {
  double sum[kMaxWarps];
};

// Sum over the block in a fixed order, returned to thread 0. All threads must call it; blockDim.x is a multiple of 32.
__device__ inline double block_sum(double value) {
  SINGLEPASS_SHARED(WarpSums, warps);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(kAllLanes, value, offset);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  if (lane == 0) warps.sum[warp] = value;
  __syncthreads();
  value = 0.0;
  if (threadIdx.x == 0) {
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) value += warps.sum[w];
  }
  __syncthreads();
  return value;
}

// Sum of `count` partial sums, `stride` doubles apart, over the block in a fixed order, returned to thread 0. Volatile:
// other blocks of the same launch may have written them. A thread has several loads in flight before it adds the first.
__device__ inline double sum_partials(const volatile double* partials, int64_t count, int stride = 1) {
  constexpr int kInFlight = 8;
  double sum = 0.0;
  for (int64_t first = threadIdx.x; first < count; first += kInFlight * blockDim.x) {
    double loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = first + k * blockDim.x;
      loaded[k] = i < count ? partials[i * stride] : 0.0;
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) sum += loaded[k];
  }
  return block_sum(sum);
}

// True, in every thread, of the last of `count` blocks that call it with the same ticket, which it sets back to zero.
// Whatever any thread of these blocks read or wrote before the call happened before what the last block does after it.
__device__ inline bool is_last_block(unsigned* ticket, unsigned count) {
  SINGLEPASS_SHARED(bool, last);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == count - 1;
    if (last) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  const bool result = last;
  __syncthreads();  // before another call may write `last`
  return result;
}

}  // namespace singlepass
