// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv/code_words.h"
#include "kv/decode.h"
#include "kv/limbs.h"
#include "kv/runs.h"

// Queries for tensor cores that multiply codes: times the steps of a block's channels, and as limbs. Tensor cores take
// them as columns, two limbs for each of four rows: column 2 r has the high limbs of row r, column 2 r + 1 the low
// ones. A tile of columns is called a group of rows; for float32 a group has two tiles, one for each half of the
// integers.
//
// Keys are taken in tiles of 128 channels, as four steps of 32: of each octet of words, the codes of one plane. Lane
// (g, t) has words 2 t and 2 t + 1 of an octet.
namespace singlepass::kv {

inline constexpr int kKeyTile = 128;
inline constexpr int kFragmentWords = 4 * 2 * kWarp;  // of a key tile, for one tile of columns

__device__ __forceinline__ unsigned lane_of_warp() {
  return threadIdx.x % kWarp;
}

// By a shuffle, so that compilers know that it is the same in all lanes.
__device__ __forceinline__ int warp_of_block() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarp), 0);
}

// A number of channels, which may be a constant.
template <int kWidth>
__device__ __forceinline__ int width_of(int64_t channels) {
  return kWidth > 0 ? kWidth : static_cast<int>(channels);
}

// Calls body(row, channel, x) for every kVector channels of the tile's rows; those beyond the last are zeros. Threads
// share each row.
template <int kRows, class Body>
__device__ __forceinline__ void for_each_query_run(const DeviceDecode& p, const Work& work, const Body& body) {
  constexpr int kThreads = kDecodeThreads / kRows;
  const int row = threadIdx.x / kThreads, head_dim = static_cast<int>(p.head_dim);
  const bool any = row < work.rows(p);
  const char* from = row_of(p, p.q, work.b, work.h, work.tile * kRows + (any ? row : 0));
  for (int d = threadIdx.x % kThreads * kVector; d < head_dim; d += kThreads * kVector) {
    float x[kVector] = {};
    if (any) load_run<kVector>(from + d * size_of(p.q.dtype), p.q.dtype, p.vector_queries, x);
    body(row, d, x);
  }
}

// Copies the rows of the tile to shared memory, (rows, head_dim), scaled.
template <int kRows>
__device__ __forceinline__ void load_queries(const DeviceDecode& p, const Work& work, float* to) {
  const int head_dim = static_cast<int>(p.head_dim);
  for_each_query_run<kRows>(p, work, [&](int row, int channel, const float (&x)[kVector]) {
    float4* const at = reinterpret_cast<float4*>(to + row * head_dim + channel);
    at[0] = {x[0] * p.scale, x[1] * p.scale, x[2] * p.scale, x[3] * p.scale};
    at[1] = {x[4] * p.scale, x[5] * p.scale, x[6] * p.scale, x[7] * p.scale};
  });
}

// Of one warp: what codes of keys are multiplied by.
template <int kBits, int kWidth, int kGroups, int kHalves>
class FoldedQueries {
 public:
  static constexpr int kTiles = kGroups * kHalves;

  // fragments: memory of the warp, kTiles * kFragmentWords for each key tile.
  __device__ __forceinline__ FoldedQueries(const DeviceDecode& p, const Work& work, const float* queries,
                                           uint32_t* fragments)
      : work_(work),
        queries_(queries),
        fragments_(fragments),
        own_(fragments + lane_of_warp() / 16 * 4 * kWarp + lane_of_warp() % 8 / 2 * 4 + lane_of_warp() / 8 % 2 * 2 +
             lane_of_warp() % 2),
        head_dim_(width_of<kWidth>(p.head_dim)),
        key_tiles_((head_dim_ + kKeyTile - 1) / kKeyTile),
        rows_(work.rows(p)) {
    uint4* const all = reinterpret_cast<uint4*>(fragments_);
    for (int i = lane_of_warp(); i < key_tiles_ * kTiles * kFragmentWords / 4; i += kWarp) all[i] = {};
  }

  // q s as limbs, and q . m. `scales` are the steps s and then the minima m of a block's channels; without, all are 1.
  template <bool kScaled>
  __device__ __forceinline__ void fold(const uint16_t* scales) {
    __syncwarp();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) fold<kScaled>(scales, group);
    __syncwarp();
  }

  // The logits of tokens for the lane's row of a group are their sums times step() plus bias(), where
  // from_limbs(..., inverse()) gives sums.
  __device__ __forceinline__ float step(int group) const { return step_[group]; }
  __device__ __forceinline__ float bias(int group) const { return bias_[group]; }
  __device__ __forceinline__ float inverse() const { return work_.inverse; }
  __device__ __forceinline__ int key_tiles() const { return key_tiles_; }
  __device__ __forceinline__ int scales() const { return 2 * head_dim_; }  // of a block

  // The lane's part of steps 2 `pair` and 2 `pair` + 1 of a key tile, two registers for each.
  __device__ __forceinline__ uint4 fragment(int key_tile, int tile, int pair) const {
    return reinterpret_cast<const uint4*>(fragments_ +
                                          (key_tile * kTiles + tile) * kFragmentWords)[pair * kWarp + lane_of_warp()];
  }

 private:
  using Code = CodeWords<kBits>;

  // Of each key tile a lane multiplies four channels, whose codes stand in one plane of one word.
  __device__ __forceinline__ int word(int key_tile) const {
    return (key_tile * 4 + lane_of_warp() / 8) / Code::planes * 8 + lane_of_warp() % 8;
  }
  __device__ __forceinline__ bool is_channel(int key_tile) const {
    return kWidth > 0 || 4 * word(key_tile) * 8 < head_dim_ * kBits;
  }
  __device__ __forceinline__ int first_channel(int key_tile) const {
    return lane_of_warp() / 8 % Code::planes * (head_dim_ / Code::planes) + 4 * word(key_tile);
  }

  template <bool kScaled>
  __device__ __forceinline__ void fold(const uint16_t* scales, int group) {
    constexpr int kLanes = kWarp / 4;  // that get a row's sums
    float x[4][4], bias[4] = {}, top[4] = {};
    for (int key_tile = 0; key_tile < key_tiles_; ++key_tile) multiply<kScaled>(scales, key_tile, group, x, bias, top);
    const float row_bias = reduce_rows(bias, Sum{});
    const Rounding row = rounding(reduce_rows(top, Maximum{}), work_.largest, work_.inverse);
    bias_[group] = __shfl_sync(kAllLanes, row_bias, lane_of_warp() % 4 * kLanes);
    step_[group] = __shfl_sync(kAllLanes, row.step, lane_of_warp() % 4 * kLanes);
    float ups[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) ups[r] = __shfl_sync(kAllLanes, row.up, r * kLanes);
    for (int key_tile = key_tiles_ - 1; key_tile >= 0; --key_tile) {  // x still has the products of the last one
      if (key_tile < key_tiles_ - 1) multiply<kScaled>(scales, key_tile, group, x, bias, top);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (is_row(group, r)) store(x[r], ups[r], key_tile, group, r);
      }
    }
  }
  __device__ __forceinline__ bool is_row(int group, int r) const { return 4 * group + r < rows_; }

  // x = q s for the lane's channels of a key tile; adds their part of q . m to bias.
  template <bool kScaled>
  __device__ __forceinline__ void multiply(const uint16_t* scales, int key_tile, int group, float (&x)[4][4],
                                           float (&bias)[4], float (&top)[4]) const {
    const bool any = is_channel(key_tile);
    const int channel = any ? first_channel(key_tile) : 0;
    float steps[4] = {1.0f, 1.0f, 1.0f, 1.0f}, minima[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    if constexpr (kScaled) {
      load_halves(scales + channel, steps);
      load_halves(scales + head_dim_ + channel, minima);
    }
    const float* const queries = queries_ + 4 * group * head_dim_ + channel;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float4 four = {};
      if (any && is_row(group, r)) four = *reinterpret_cast<const float4*>(queries + r * head_dim_);
      const float q[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[r][k] = q[k] * steps[k];
        bias[r] = multiply_add(q[k], minima[k], bias[r]);
        top[r] = maximum(top[r], absolute(x[r][k]));
      }
    }
  }

  __device__ __forceinline__ void store(const float (&x)[4], float up, int key_tile, int group, int row) {
    uint32_t n[4][kHalves];
#pragma unroll
    for (int k = 0; k < 4; ++k) to_limbs(x[k], up, work_.largest, n[k]);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const LimbWords limbs(n[0][half], n[1][half], n[2][half], n[3][half]);
      uint32_t* const at = own_ + (key_tile * kTiles + group * kHalves + half) * kFragmentWords + row * kWarp;
      at[0] = limbs.high, at[kWarp / 2] = limbs.low;
    }
  }

  const Work& work_;
  const float* const queries_;
  uint32_t *const fragments_, *const own_;  // the lane's words of the first column
  const int head_dim_, key_tiles_, rows_;
  float step_[kGroups] = {}, bias_[kGroups] = {};
};

}  // namespace singlepass::kv
