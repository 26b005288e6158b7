// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv/decode.h"

// New tokens, which are stored in the window before it is read, and the copy of the queries.
namespace singlepass::kv {

// One of a head's tokens.
__device__ __forceinline__ void copy_token(const char* from, char* to, int64_t bytes, bool vectors) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if (vectors) {
    for (int64_t i = lane; i < bytes / 16; i += kWarp) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
    for (int64_t i = lane; i < bytes / 2; i += kWarp) {
      reinterpret_cast<uint16_t*>(to)[i] = reinterpret_cast<const uint16_t*>(from)[i];
    }
  }
}

// A warp takes a token at a time. Thread blocks of several tiles write the same to the window, each for itself to read.
__device__ __forceinline__ void store_added(const DeviceDecode& p, const Work& work) {
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  if (work.segment < 0) {
    const int first = p.window[work.b * p.window_stride + 1] - static_cast<int>(p.queries);
    for (int slot = (work.begin > first ? work.begin : first) + warp; slot < work.end; slot += kDecodeWarps) {
      const auto copy = [&](const Tokens& from, const Tokens& to, int64_t channels) {
        copy_token(from.at(work.b, work.h, slot - first), to.at(work.b, work.h, slot), channels * size_of(to.dtype),
                   p.vector_added);
      };
      copy(p.added.k, p.window_k, p.head_dim);
      copy(p.added.v, p.window_v, p.value_dim);
    }
  }
  if (work.split == 0 && work.value_tile == 0) {
    for (int row = warp; row < work.rows(p); row += kDecodeWarps) {
      const int r = work.tile * p.row_tile + row;
      copy_token(row_of(p, p.q, work.b, work.h, r), row_of(p, p.added.kept, work.b, work.h, r),
                 p.head_dim * size_of(p.q.dtype), p.vector_added);
    }
  }
  __syncthreads();
}

}  // namespace singlepass::kv
