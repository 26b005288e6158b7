// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv/decode.h"
#include "kv/decode_queries.h"

// Attention in float32 over codes whose scales differ within a token, which a thread block first decompresses to shared
// memory. A lane computes the logits of one token of a tile, a warp does the softmax of one row or two, and a thread
// sums the values of one channel.
namespace singlepass::kv {

inline constexpr int kTokenTile = 32;
inline constexpr int kChannelTile = kDecodeThreads;
static_assert(kChannelTile == kValueTile);

// Restored tokens. Rows are four floats longer than needed: lanes that each read four floats of a row of their own then
// meet different banks.
using Tile = float[kTokenTile][kChannelTile + 4];

// c (n s + m) of tokens of one block. A thread restores one channel.
class PackedTokens {
 public:
  __device__ __forceinline__ PackedTokens(const Packed& packed, const Work& work, int64_t block)
      : packed_(packed), work_(work), block_(block) {}

  __device__ __forceinline__ void restore(int64_t first, int count, int64_t channel, int64_t head_dim, Tile& to) const {
    const int own = static_cast<int>(channel + threadIdx.x), width = static_cast<int>(head_dim);
    const bool any = own < width, by_channels = packed_.axis == Axis::kChannel;
    const int bytes = static_cast<int>(packed_.bytes()), byte = own % bytes, shift = own / bytes * packed_.bits;
    const int at = by_channels ? own : own / (width / static_cast<int>(packed_.groups));
    const int minima = static_cast<int>(by_channels ? packed_.head_dim : packed_.groups);
    const int apart = by_channels ? 0 : 2 * minima;  // scales of a token and of the next one
    const uint8_t* codes = packed_.codes_at(work_.b, work_.h, first) + byte;
    const uint16_t* scales = packed_.scales_at(work_.b, work_.h, first, block_) + at;
    float factor = 1.0f;
    if (any && packed_.channels.data != nullptr) {
      factor = float16_to_float(packed_.channels_at(work_.b, work_.h, block_)[own]);
    }
#pragma unroll 8
    for (int t = 0; t < kTokenTile; ++t, codes += bytes, scales += apart) {
      float x = 0.0f;
      if (t < count && any) {
        const uint32_t n = global_memory(codes)[0] >> shift & ((1u << packed_.bits) - 1);
        x = factor * multiply_add(static_cast<float>(n), float16_to_float(global_memory(scales)[0]),
                                  float16_to_float(global_memory(scales)[minima]));
      }
      to[t][threadIdx.x] = x;
    }
  }

 private:
  const Packed& packed_;
  const Work& work_;
  const int64_t block_;
};

// Dynamic memory begins with it; queries (kRows, head_dim) follow.
template <int kRows>
struct RestoredShared {
  alignas(16) Tile tile;
  float logits[kDecodeWarps][kRows][kTokenTile];
  alignas(16) float weights[kTokenTile][kRows];
  alignas(16) float factors[kRows];

  __device__ __forceinline__ float* queries() { return reinterpret_cast<float*>(this + 1); }
  static size_t bytes(const DecodeArguments& p) { return sizeof(RestoredShared) + 4 * kRows * p.head_dim; }
};

template <int kRows>
class RestoredAttention {
 public:
  __device__ __forceinline__ RestoredAttention(const DeviceDecode& p, const Work& work, RestoredShared<kRows>& shared)
      : p_(p), work_(work), shared_(shared), lane_(threadIdx.x % kWarp), warp_(threadIdx.x / kWarp) {
    for (int r = 0; r < kOwn; ++r) row_max_[r] = -INFINITY;
  }

  __device__ __forceinline__ void run() {
    load_queries<kRows>(p_, work_, shared_.queries());
    const Segment& s = p_.segments[work_.segment];
    for_each_block(s, work_, work_.begin, work_.end, [&](int block, int begin, int end) {
      attend(PackedTokens(s.keys, work_, block), PackedTokens(s.values, work_, block), begin, end);
    });
    write();
  }

 private:
  static constexpr int kOwn = kRows / kDecodeWarps;  // rows of a warp

  // Tokens [begin, end).
  __device__ __forceinline__ void attend(const PackedTokens& keys, const PackedTokens& values, int64_t begin,
                                         int64_t end) {
    for (int64_t first = begin; first < end; first += kTokenTile) {
      const int count = static_cast<int>(smaller(kTokenTile, end - first));
      dot(keys, first, count);
      for (int r = 0; r < kOwn; ++r) softmax(r, count);
      __syncthreads();
      add(values, first, count);
    }
  }

  // Decompresses kChannelTile channels of a tile of tokens to shared memory. What lies beyond the last is zero.
  __device__ __forceinline__ void restore(const PackedTokens& source, int64_t first, int count, int64_t channel,
                                          int64_t head_dim) {
    __syncthreads();
    source.restore(first, count, channel, head_dim, shared_.tile);
    __syncthreads();
  }

  // Stage 1: logits without the softcap, in four parts. A warp sums over a quarter of each tile's channels.
  __device__ __forceinline__ void dot(const PackedTokens& keys, int64_t first, int count) {
    float sums[kRows] = {};
    for (int64_t channel = 0; channel < p_.head_dim; channel += kChannelTile) {
      restore(keys, first, count, channel, p_.head_dim);
      const int own = warp_ * (kChannelTile / kDecodeWarps);
      for (int d = own; d < own + kChannelTile / kDecodeWarps && channel + d < p_.head_dim; d += 4) {
        const float4 k = *reinterpret_cast<const float4*>(&shared_.tile[lane_][d]);
        const float* const queries = &shared_.queries()[channel + d];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 q = *reinterpret_cast<const float4*>(queries + r * p_.head_dim);
          sums[r] = multiply_add(q.x, k.x, multiply_add(q.y, k.y, sums[r]));
          sums[r] = multiply_add(q.z, k.z, multiply_add(q.w, k.w, sums[r]));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared_.logits[warp_][r][lane_] = sums[r];
    __syncthreads();
  }

  // Stage 2: online softmax of one of the warp's rows.
  __device__ __forceinline__ void softmax(int r, int count) {
    const int row = kOwn * warp_ + r;
    float logit = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) logit += shared_.logits[w][row][lane_];
    if (p_.softcap > 0.0f) logit = capped(p_, logit);
    if (lane_ >= count) logit = -INFINITY;
    float row_max = fmaxf(row_max_[r], logit);
    for (int offset = 1; offset < kWarp; offset *= 2) {
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, offset));
    }
    const float weight = exp_of_negative(logit - safe_max(row_max));
    const float factor = exp_of_negative(row_max_[r] - safe_max(row_max));
    row_max_[r] = row_max;
    float sum = weight;
    for (int offset = 1; offset < kWarp; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    row_sum_[r] = multiply_add(row_sum_[r], factor, sum);
    shared_.weights[lane_][row] = weight;
    if (lane_ == 0) shared_.factors[row] = factor;
  }

  // Stage 3: adds the weighted values.
  __device__ __forceinline__ void add(const PackedTokens& values, int64_t first, int count) {
    restore(values, first, count, work_.first_channel(), p_.value_dim);
#pragma unroll
    for (int r = 0; r < kRows; ++r) out_[r] *= shared_.factors[r];
    for (int t = 0; t < count; ++t) {
      const float v = shared_.tile[t][threadIdx.x];
#pragma unroll
      for (int r = 0; r < kRows; ++r) out_[r] = multiply_add(shared_.weights[t][r], v, out_[r]);
    }
  }

  __device__ __forceinline__ void write() {
    const Partial to(p_, work_);
    for (int r = 0; r < kOwn && lane_ == 0 && work_.value_tile == 0; ++r) {
      to.row_max[kOwn * warp_ + r] = row_max_[r], to.row_sum[kOwn * warp_ + r] = row_sum_[r];
    }
    float* out = to.out + work_.first_channel() + threadIdx.x;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (threadIdx.x < work_.channels(p_) && r < work_.rows(p_)) out[r * p_.value_dim] = out_[r];
    }
  }

  const DeviceDecode& p_;
  const Work& work_;
  RestoredShared<kRows>& shared_;
  const int lane_, warp_;
  float row_max_[kOwn], row_sum_[kOwn] = {};
  float out_[kRows] = {};
};

}  // namespace singlepass::kv
