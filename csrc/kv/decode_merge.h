// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv/decode.h"
#include "kv/limbs.h"

// Merges the splits of one row, a thread block for each. Warps take splits by turns, and are added in their order, so
// that the sums are the same bits every time. A lane sums four channels.
namespace singlepass::kv {

struct MergeShared {
  alignas(16) float sums[kDecodeWarps][kValueTile];
  float factors[kDecodeThreads], row_sums[kDecodeThreads];  // of some splits
};

class Merge {
 public:
  __device__ __forceinline__ Merge(const DeviceDecode& p, MergeShared& shared)
      : p_(p), shared_(shared), head_(blockIdx.x / static_cast<unsigned>(p.rows())) {
    r_ = static_cast<int>(blockIdx.x - head_ * static_cast<unsigned>(p.rows()));
    tile_ = r_ / p.row_tile;
    row_ = r_ % p.row_tile;
  }

  __device__ __forceinline__ void run() {
    const int b = head_ / static_cast<unsigned>(p_.heads), h = head_ % static_cast<unsigned>(p_.heads);
    const unsigned queries = static_cast<unsigned>(p_.queries), member = static_cast<unsigned>(r_) / queries;
    const int64_t query_head = h * p_.group_size + member;
    const float sink = p_.sinks == nullptr ? -INFINITY : p_.sinks[query_head];
    const float row_max = largest(sink);
    for (int64_t first = 0; first < p_.value_dim; first += kValueTile) {
      const float total = sum(first, safe_max(row_max)) + exp_of_difference(sink, safe_max(row_max));
      const int64_t channel = first + threadIdx.x;
      if (channel < p_.value_dim) {
        float out = 0.0f;
        for (int w = 0; w < kDecodeWarps; ++w) out += shared_.sums[w][threadIdx.x];
        out *= total == 0.0f ? 0.0f : 1.0f / total;
        store(encode_any_nan<1>(&out, p_.out.dtype), p_.out.dtype, p_.out.at(b, query_head, r_ - member * queries),
              channel);
      }
      if (channel == 0) {
        p_.lse[(b * p_.heads * p_.group_size + query_head) * p_.queries + (r_ - member * queries)] =
            total == 0.0f ? -INFINITY : row_max + logf(total);
      }
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ Partial part(int split) const { return Partial(p_, head_, tile_, split); }

  // Each warp looks at all splits.
  __device__ __forceinline__ float largest(float row_max) const {
#pragma unroll 4
    for (int split = threadIdx.x % kWarp; split < p_.splits; split += kWarp) {
      row_max = fmaxf(row_max, part(split).row_max[row_]);
    }
    for (int offset = 1; offset < kWarp; offset *= 2) {
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, offset));
    }
    return row_max;
  }

  // Weighted values from channel `first` on, in parts: shared_.sums, one for each warp. Returns the sum of weights.
  __device__ __forceinline__ float sum(int64_t first, float row_max) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, splits = static_cast<int>(p_.splits);
    const bool active = first + 4 * lane < p_.value_dim;
    float total = 0.0f;
    float4 out = {};
    for (int begin = 0; begin < splits; begin += kDecodeThreads) {
      const int own = begin + static_cast<int>(threadIdx.x), count = splits - begin;
      float factor = 0.0f, row_sum = 0.0f;
      if (own < splits) factor = exp_of_difference(part(own).row_max[row_], row_max), row_sum = part(own).row_sum[row_];
      __syncthreads();
      shared_.factors[threadIdx.x] = factor, shared_.row_sums[threadIdx.x] = row_sum * factor;
      __syncthreads();
#pragma unroll 8
      for (int i = warp; i < (count < kDecodeThreads ? count : kDecodeThreads); i += kDecodeWarps) {
        const float* from = part(begin + i).out + row_ * p_.value_dim + first;
        const float4 x = active ? reinterpret_cast<const float4*>(from)[lane] : float4{};
        const float weight = shared_.factors[i];
        out.x = multiply_add(x.x, weight, out.x), out.y = multiply_add(x.y, weight, out.y);
        out.z = multiply_add(x.z, weight, out.z), out.w = multiply_add(x.w, weight, out.w);
      }
      float sums = 0.0f;
      for (int i = lane; i < kDecodeThreads; i += kWarp) sums += shared_.row_sums[i];
      for (int offset = 1; offset < kWarp; offset *= 2) sums += __shfl_xor_sync(kAllLanes, sums, offset);
      total += sums;
    }
    reinterpret_cast<float4*>(shared_.sums[warp])[lane] = out;
    __syncthreads();
    return total;
  }

  const DeviceDecode& p_;
  MergeShared& shared_;
  const unsigned head_;
  int r_, tile_, row_;
};

}  // namespace singlepass::kv
