// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv/decode.h"
#include "kv/decode_queries.h"
#include "kv/limbs.h"

// Online softmax of a warp that goes through a stretch of tokens by itself, and the sum over the warps of a thread
// block. Of each group of four rows lane (g, t) has row t, and sixteen of its channels in parts of four.
namespace singlepass::kv {

inline constexpr int kChunk = 32;  // tokens that a warp processes at a time
inline constexpr int kParts = 4;
static_assert(kParts == kDecodeWarps);  // each warp writes a part

// After it comes memory for the sums of the warps.
template <int kGroups>
struct SoftmaxShared {
  alignas(16) float row_max[kDecodeWarps][4 * kGroups], row_sum[kDecodeWarps][4 * kGroups];

  __device__ __forceinline__ float4* sums() { return reinterpret_cast<float4*>(this + 1); }
  static constexpr int64_t sums_bytes = int64_t{4} * kDecodeWarps * 4 * kGroups * kValueTile;
};

// The slots that a warp goes through: whole chunks, but for the last.
struct Share {
  int begin, end;

  __device__ __forceinline__ explicit Share(const Work& work) {
    const int slots = (work.end - work.begin + kDecodeThreads - 1) / kDecodeThreads * kChunk;
    begin = work.begin + warp_of_block() * slots;
    end = begin + slots < work.end ? begin + slots : work.end;
  }
};

template <int kGroups>
class Softmax {
 public:
  __device__ __forceinline__ Softmax() {
    for (int group = 0; group < kGroups; ++group) row_max_[group] = -INFINITY;
  }

  // Logits of tokens 8 j + g become weights exp(logit - row_max). The row_max stays what it was until a logit exceeds
  // it by kSlack, so that it hardly ever changes.
  __device__ __forceinline__ void weigh(float (&weights)[kGroups][4]) {
    bool above = false;
#pragma unroll
    for (int k = 0; k < 4 * kGroups; ++k) above = above || weights[k / 4][k % 4] > row_max_[k / 4] + kSlack;
    if (__any_sync(kAllLanes, above)) raise(weights);
#pragma unroll
    for (int k = 0; k < 4 * kGroups; ++k) {
      float& weight = weights[k / 4][k % 4];
      weight = exp_of_difference(weight, safe_max(row_max_[k / 4]));
      row_sum_[k / 4] += weight;
    }
  }

  // out = out + c value, for a channel of the lane's row of a group.
  __device__ __forceinline__ void add(int group, int channel, float c, float value) {
    out_[group][channel] = multiply_add(c, value, out_[group][channel]);
  }

  // Moves the lane's channels by some places to the front, the first ones to the end: for loops that are not unrolled.
  template <int kPlaces>
  __device__ __forceinline__ void rotate() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float moved[4 * kParts];
#pragma unroll
      for (int i = 0; i < 4 * kParts; ++i) moved[i] = out_[group][(i + kPlaces) % (4 * kParts)];
#pragma unroll
      for (int i = 0; i < 4 * kParts; ++i) out_[group][i] = moved[i];
    }
  }

  // Adds the results of the warps in their order. Calls write(group, part, sum), for one part in each warp.
  template <class Write>
  __device__ __forceinline__ void merge(SoftmaxShared<kGroups>& shared, const Work& work, const Partial& to,
                                        const Write& write) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float row_sum = over_tokens(row_sum_[group], Sum{});
      if (g == 0) shared.row_max[warp][4 * group + t] = row_max_[group];
      if (g == 0) shared.row_sum[warp][4 * group + t] = row_sum;
    }
    __syncthreads();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int row = 4 * group + t;
      float row_max = -INFINITY, row_sum = 0.0f;
      for (int w = 0; w < kDecodeWarps; ++w) row_max = fmaxf(row_max, shared.row_max[w][row]);
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float factor = exp_of_difference(shared.row_max[w][row], safe_max(row_max));
        row_sum = multiply_add(shared.row_sum[w][row], factor, row_sum);
      }
      if (warp == 0 && g == 0 && work.value_tile == 0) to.row_max[row] = row_max, to.row_sum[row] = row_sum;
      const float factor = exp_of_difference(row_max_[group], safe_max(row_max));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float* out = &out_[group][4 * part];
        shared.sums()[((warp * kGroups + group) * kParts + part) * kWarp + lane] = {out[0] * factor, out[1] * factor,
                                                                                    out[2] * factor, out[3] * factor};
      }
    }
    __syncthreads();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float4 sum = {};
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float4 more = shared.sums()[((w * kGroups + group) * kParts + warp) * kWarp + lane];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      write(group, warp, sum);
    }
  }

 private:
  static constexpr float kSlack = 3.0f;

  __device__ __forceinline__ void raise(const float (&logits)[kGroups][4]) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float row_max = row_max_[group];
#pragma unroll
      for (int j = 0; j < 4; ++j) row_max = fmaxf(row_max, logits[group][j]);
      row_max = over_tokens(row_max, [](float a, float b) { return fmaxf(a, b); });
      const float shift = exp_of_difference(row_max_[group], safe_max(row_max));
      row_max_[group] = row_max;
      row_sum_[group] *= shift;
#pragma unroll
      for (int i = 0; i < 4 * kParts; ++i) out_[group][i] *= shift;
    }
  }

  float row_max_[kGroups], row_sum_[kGroups] = {};
  float out_[kGroups][4 * kParts] = {};
};

}  // namespace singlepass::kv
