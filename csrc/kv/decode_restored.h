// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv/decode.h"
#include "kv/decode_queries.h"

// Attention in float32 over tokens that a thread block first decompresses to shared memory: the window, and codes whose
// scales differ within a token. A lane computes the logits of one token of a tile, a warp does the softmax of one row
// or two, and a thread sums the values of one channel.
namespace singlepass::kv {

inline constexpr int kTokenTile = 32;
inline constexpr int kChannelTile = kDecodeThreads;
static_assert(kChannelTile == kValueTile);

// Tokens that are not compressed.
class PlainTokens {
 public:
  __device__ __forceinline__ PlainTokens(const Tokens& tokens, const Work& work) : tokens_(tokens), work_(work) {}
  __device__ __forceinline__ void choose(int64_t channel) { channel_ = channel; }
  __device__ __forceinline__ float operator()(int64_t slot) const {
    Raw<1> raw;
    float x;
    load(tokens_.at(work_.b, work_.h, slot), tokens_.dtype, channel_, raw);
    decode(raw, tokens_.dtype, &x);
    return x;
  }

 private:
  const Tokens& tokens_;
  const Work& work_;
  int64_t channel_ = 0;
};

// c (n s + m) of tokens of one block.
class PackedTokens {
 public:
  __device__ __forceinline__ PackedTokens(const Packed& packed, const Work& work, int64_t block)
      : packed_(packed), work_(work), block_(block) {}

  __device__ __forceinline__ void choose(int channel) {
    const int bytes = static_cast<int>(packed_.bytes()), head_dim = static_cast<int>(packed_.head_dim);
    byte_ = channel % bytes;
    shift_ = channel / bytes * packed_.bits;
    by_channels_ = packed_.axis == Axis::kChannel;
    at_ = by_channels_ ? channel : channel / (head_dim / static_cast<int>(packed_.groups));
    factor_ = packed_.channels.data == nullptr
                  ? 1.0f
                  : float16_to_float(packed_.channels_at(work_.b, work_.h, block_)[channel]);
  }

  __device__ __forceinline__ float operator()(int64_t slot) const {
    const uint32_t n = (packed_.codes_at(work_.b, work_.h, slot)[byte_] >> shift_) & ((1u << packed_.bits) - 1);
    const uint16_t* scales = packed_.scales_at(work_.b, work_.h, slot, block_) + at_;
    const int64_t minima = by_channels_ ? packed_.head_dim : packed_.groups;
    return factor_ * multiply_add(static_cast<float>(n), float16_to_float(scales[0]), float16_to_float(scales[minima]));
  }

 private:
  const Packed& packed_;
  const Work& work_;
  const int64_t block_;
  int byte_ = 0, at_ = 0, shift_ = 0;
  bool by_channels_ = false;
  float factor_ = 1.0f;
};

// Dynamic memory begins with it; queries (kRows, head_dim) follow.
template <int kRows>
struct RestoredShared {
  float tile[kTokenTile][kChannelTile + 1];  // without the one, a warp that goes through tokens would meet one bank
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
    for (int r = 0; r < kOwn; ++r) {
      row_max_[r] = -INFINITY;
      later_[r] = p.queries - 1 - (work.tile * kRows + kOwn * warp_ + r) % p.queries;
    }
  }

  __device__ __forceinline__ void run() {
    load_queries<kRows>(p_, work_, shared_.queries());
    if (work_.segment < 0) {
      const int64_t last = p_.window[work_.b * p_.window_stride + 1];
      attend(PlainTokens(p_.window_k, work_), PlainTokens(p_.window_v, work_), work_.begin, work_.end, last);
    } else {
      const Segment& s = p_.segments[work_.segment];
      for_each_block(s, work_, work_.begin, work_.end, [&](int block, int begin, int end) {
        attend(PackedTokens(s.keys, work_, block), PackedTokens(s.values, work_, block), begin, end, int64_t{1} << 62);
      });
    }
    write();
  }

 private:
  static constexpr int kOwn = kRows / kDecodeWarps;  // rows of a warp

  // Tokens [begin, end); row r sees those before last - (queries - 1 - its query).
  template <class Source>
  __device__ __forceinline__ void attend(Source keys, Source values, int64_t begin, int64_t end, int64_t last) {
    for (int64_t first = begin; first < end; first += kTokenTile) {
      const int count = static_cast<int>(smaller(kTokenTile, end - first));
      dot(keys, first, count);
      for (int r = 0; r < kOwn; ++r) softmax(r, first, count, last);
      __syncthreads();
      add(values, first, count);
    }
  }

  // Decompresses kChannelTile channels of a tile of tokens to shared memory. What lies beyond the last is zero.
  template <class Source>
  __device__ __forceinline__ void restore(Source& source, int64_t first, int count, int64_t channel, int64_t head_dim) {
    __syncthreads();
    const int own = static_cast<int>(channel + threadIdx.x);
    if (own < head_dim) source.choose(own);
#pragma unroll 8
    for (int t = 0; t < kTokenTile; ++t) {
      shared_.tile[t][threadIdx.x] = t < count && own < head_dim ? source(first + t) : 0.0f;
    }
    __syncthreads();
  }

  // Stage 1: logits without the softcap, in four parts. A warp sums over a quarter of each tile's channels.
  template <class Source>
  __device__ __forceinline__ void dot(Source& keys, int64_t first, int count) {
    float sums[kRows] = {};
    for (int64_t channel = 0; channel < p_.head_dim; channel += kChannelTile) {
      restore(keys, first, count, channel, p_.head_dim);
      const int own = warp_ * (kChannelTile / kDecodeWarps);
      for (int d = own; d < own + kChannelTile / kDecodeWarps && channel + d < p_.head_dim; ++d) {
        const float k = shared_.tile[lane_][d];
        const float* q = &shared_.queries()[channel + d];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] = multiply_add(q[r * p_.head_dim], k, sums[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared_.logits[warp_][r][lane_] = sums[r];
    __syncthreads();
  }

  // Stage 2: online softmax of one of the warp's rows.
  __device__ __forceinline__ void softmax(int r, int64_t first, int count, int64_t last) {
    const int row = kOwn * warp_ + r;
    float logit = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) logit += shared_.logits[w][row][lane_];
    if (p_.softcap > 0.0f) logit = capped(p_, logit);
    if (lane_ >= count || first + lane_ >= last - later_[r]) logit = -INFINITY;
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
  template <class Source>
  __device__ __forceinline__ void add(Source& values, int64_t first, int count) {
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
  int64_t later_[kOwn];  // slots at the window's end that a row of the warp does not see
  float row_max_[kOwn], row_sum_[kOwn] = {};
  float out_[kRows] = {};
};

}  // namespace singlepass::kv
