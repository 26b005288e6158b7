// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/async_copy.h"
#include "kv/decode.h"
#include "kv/limbs.h"
#include "kv/runs.h"

// Merges the splits of a tile of rows, in their order, so that the sums are the same bits every time. Each warp takes a
// row by itself, and a lane sums four channels. Other thread blocks of the launch have written what is read: it is in
// the L2 cache, and no other work hides how long it takes from there, so that all is asked for before it is needed.
namespace singlepass::kv {

// The partial results of a row. What belongs to a split stands `stride` floats after what belongs to the one before.
struct PartialRow {
  const float *row_max, *row_sum, *out;
  int64_t stride;
  int splits;

  __device__ PartialRow(const DeviceDecode& p, const Work& work, int row)
      : stride(partial_size(p)), splits(static_cast<int>(p.splits)) {
    const Partial first(p, work.head, work.tile, 0);
    row_max = first.row_max + row, row_sum = first.row_sum + row, out = first.out + row * p.value_dim;
  }

  // Of a split, or of the last one: compilers wait for loads under a condition one by one.
  __device__ __forceinline__ float max_of(int split) const { return row_max[place(split)]; }
  __device__ __forceinline__ float sum_of(int split) const { return row_sum[place(split)]; }

 private:
  __device__ __forceinline__ int64_t place(int split) const { return (split < splits ? split : splits - 1) * stride; }
};

// The largest of the splits' maxima, in every lane.
__device__ __forceinline__ float max_of_splits(const PartialRow& row) {
  constexpr int kLoads = 4;
  float row_max = -INFINITY;
#pragma unroll 1
  for (int own = threadIdx.x % kWarp; own < row.splits; own += kLoads * kWarp) {
    float x[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) x[k] = row.max_of(own + k * kWarp);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) row_max = fmaxf(row_max, x[k]);
  }
  for (int offset = 1; offset < kWarp; offset *= 2) {
    row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, offset));
  }
  return row_max;
}

// Four channels of a row in one split after another, on their way to shared memory, in which each lane has places of
// its own. In registers, the compiler would wait for all of them at once.
class SplitChannels {
 public:
  static constexpr int kAhead = 8, kTogether = 4;  // splits: on their way, and waited for at the same time
  static constexpr size_t kBytes = sizeof(float4) * kDecodeThreads * kAhead;

  // A lane that has no channels gets zeros, as all do beyond the last split.
  __device__ __forceinline__ SplitChannels(const PartialRow& row, int channel, bool any)
      : from_(row.out + channel), stride_(row.stride), left_(any ? row.splits : 0) {
#pragma unroll
    for (int i = 0; i < kAhead; i += kTogether) ask();
  }

  __device__ __forceinline__ void take(float4 (&x)[kTogether]) {
    wait_for_copies<kAhead / kTogether - 1>();
#pragma unroll
    for (int k = 0; k < kTogether; ++k) x[k] = place()[k * kDecodeThreads];
    ask();
  }

 private:
  __device__ __forceinline__ float4* place() const {
    return dynamic_shared<float4>() + next_ * kDecodeThreads + threadIdx.x;
  }

  __device__ __forceinline__ void ask() {
#pragma unroll
    for (int k = 0; k < kTogether; ++k, from_ += stride_) copy_async(place() + k * kDecodeThreads, from_, k < left_);
    end_copies();
    left_ -= kTogether;
    next_ = next_ + kTogether == kAhead ? 0 : next_ + kTogether;
  }

  const float* from_;
  const int64_t stride_;
  int left_, next_ = 0;
};

// A row's merged softmax: four of its channels, what weights are relative to, and their sum.
struct MergedRow {
  float4 out = {};
  float row_max, total = 0.0f;

  // sink: a logit without a value.
  __device__ __forceinline__ MergedRow(const PartialRow& row, float sink, int channel, bool any) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    float next_max = row.max_of(lane), next_sum = row.sum_of(lane), factor = 0.0f;  // of a split in each lane
    SplitChannels channels(row, channel, any);
    row_max = fmaxf(max_of_splits(row), sink);
#pragma unroll 1
    for (int first = 0; first < row.splits; first += SplitChannels::kTogether) {
      if (first % kWarp == 0) {
        factor = exp_of_difference(next_max, safe_max(row_max));
        if (first + lane < row.splits) total = multiply_add(next_sum, factor, total);
        next_max = row.max_of(first + kWarp + lane), next_sum = row.sum_of(first + kWarp + lane);
      }
      float weights[SplitChannels::kTogether];
#pragma unroll
      for (int k = 0; k < SplitChannels::kTogether; ++k) weights[k] = __shfl_sync(kAllLanes, factor, first + k);
      float4 x[SplitChannels::kTogether];
      channels.take(x);
#pragma unroll
      for (int k = 0; k < SplitChannels::kTogether; ++k) {
        out.x = multiply_add(x[k].x, weights[k], out.x), out.y = multiply_add(x[k].y, weights[k], out.y);
        out.z = multiply_add(x[k].z, weights[k], out.z), out.w = multiply_add(x[k].w, weights[k], out.w);
      }
    }
    wait_for_copies();
    for (int offset = 1; offset < kWarp; offset *= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
    total += exp_of_difference(sink, safe_max(row_max));
  }
};

__device__ __forceinline__ void merge(const DeviceDecode& p, const Work& work) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  for (int own = threadIdx.x / kWarp; own < work.rows(p); own += kDecodeWarps) {
    const PartialRow row(p, work, own);
    const int r = work.tile * p.row_tile + own;  // of the head
    const int queries = static_cast<int>(p.queries), member = queries == 1 ? r : r / queries;
    const int64_t query_head = work.h * p.group_size + member;
    const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[query_head];
    for (int channel = 4 * lane; channel < kValueTile * p.value_tiles; channel += kValueTile) {
      const bool any = channel < p.value_dim;
      const MergedRow merged(row, sink, channel, any);
      const float scale = merged.total == 0.0f ? 0.0f : 1.0f / merged.total;
      const float out[4] = {merged.out.x * scale, merged.out.y * scale, merged.out.z * scale, merged.out.w * scale};
      char* const to = row_of(p, p.out, work.b, work.h, r) + channel * size_of(p.out.dtype);
      if (any) store_run<4>(out, p.out.dtype, p.vector_out, to);
      if (channel == 0) {
        p.lse[(work.b * p.heads * p.group_size + query_head) * p.queries + (r - member * queries)] =
            merged.total == 0.0f ? -INFINITY : merged.row_max + logf(merged.total);
      }
    }
  }
}

}  // namespace singlepass::kv
