// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv/decode.h"
#include "kv/limbs.h"
#include "kv/runs.h"

// Merges the splits of a tile of rows, in their order, so that the sums are the same bits every time. Each warp takes a
// row by itself, and a lane sums four channels. Other thread blocks of the launch have written what is read.
namespace singlepass::kv {

inline constexpr int kMergeLoads = 16;  // in flight

// The partial results of a row. What belongs to a split stands `stride` floats after what belongs to the one before.
struct PartialRow {
  const float *row_max, *row_sum, *out;
  int64_t stride;

  __device__ PartialRow(const DeviceDecode& p, const Work& work, int row) : stride(partial_size(p)) {
    const Partial first(p, work.head, work.tile, 0);
    row_max = first.row_max + row, row_sum = first.row_sum + row, out = first.out + row * p.value_dim;
  }
};

// The largest of `row_max` and of the splits' maxima, in every lane.
__device__ __forceinline__ float max_of_splits(const PartialRow& row, int splits, float row_max) {
  constexpr int kLoads = 4;
#pragma unroll 1
  for (int own = threadIdx.x % kWarp; own < splits; own += kLoads * kWarp) {
    float x[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int split = own + k * kWarp;
      x[k] = split < splits ? row.row_max[split * row.stride] : -INFINITY;
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) row_max = fmaxf(row_max, x[k]);
  }
  for (int offset = 1; offset < kWarp; offset *= 2) {
    row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, offset));
  }
  return row_max;
}

// The sum of four of the row's channels over all splits; `total` becomes that of the weights.
__device__ __forceinline__ float4 sum_splits(const PartialRow& row, int splits, float base, int channel, bool any,
                                             float& total) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  float4 out = {};
  total = 0.0f;
  for (int begin = 0; begin < splits; begin += kWarp) {
    const int own = begin + lane;
    const float factor = own < splits ? exp_of_difference(row.row_max[own * row.stride], base) : 0.0f;
    if (own < splits) total = multiply_add(row.row_sum[own * row.stride], factor, total);
    const float* from = row.out + begin * row.stride + channel;
    for (int i = 0; i < kWarp && begin + i < splits; i += kMergeLoads) {
      float4 x[kMergeLoads] = {};
#pragma unroll
      for (int k = 0; k < kMergeLoads; ++k, from += row.stride) {
        if (any && begin + i + k < splits) x[k] = *reinterpret_cast<const float4*>(from);
      }
#pragma unroll
      for (int k = 0; k < kMergeLoads; ++k) {
        const float weight = __shfl_sync(kAllLanes, factor, i + k);
        out.x = multiply_add(x[k].x, weight, out.x), out.y = multiply_add(x[k].y, weight, out.y);
        out.z = multiply_add(x[k].z, weight, out.z), out.w = multiply_add(x[k].w, weight, out.w);
      }
    }
  }
  for (int offset = 1; offset < kWarp; offset *= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
  return out;
}

__device__ __forceinline__ void merge(const DeviceDecode& p, const Work& work) {
  const int lane = static_cast<int>(threadIdx.x % kWarp), splits = static_cast<int>(p.splits);
  for (int own = threadIdx.x / kWarp; own < work.rows(p); own += kDecodeWarps) {
    const PartialRow row(p, work, own);
    const int r = work.tile * p.row_tile + own;  // of the head
    const unsigned queries = static_cast<unsigned>(p.queries), member = static_cast<unsigned>(r) / queries;
    const int64_t query_head = work.h * p.group_size + member;
    const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[query_head];
    const float row_max = max_of_splits(row, splits, sink), base = safe_max(row_max);
    for (int first = 0; first < p.value_dim; first += kValueTile) {
      const int channel = first + 4 * lane;
      const bool any = channel < p.value_dim;
      float total;
      const float4 sum = sum_splits(row, splits, base, channel, any, total);
      total += exp_of_difference(sink, base);
      const float scale = total == 0.0f ? 0.0f : 1.0f / total;
      const float out[4] = {sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale};
      char* const to = row_of(p, p.out, work.b, work.h, r) + channel * size_of(p.out.dtype);
      if (any) store_run<4>(out, p.out.dtype, p.vector_out, to);
      if (channel == 0) {
        p.lse[(work.b * p.heads * p.group_size + query_head) * p.queries + (r - member * queries)] =
            total == 0.0f ? -INFINITY : row_max + logf(total);
      }
    }
  }
}

}  // namespace singlepass::kv
