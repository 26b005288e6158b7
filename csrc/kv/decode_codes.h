// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/mma.h"
#include "kv/code_words.h"
#include "kv/decode.h"
#include "kv/decode_queries.h"
#include "kv/decode_softmax.h"
#include "kv/integers.h"
#include "kv/limbs.h"

// Attention on tensor cores that multiply the codes themselves, bytes n, by integers. Scales (steps s and minima m) are
// applied to rows of queries and of weights, not to elements:
//
//   keys k^ = n s + m with scales per channel:   q . k^ = (q s) . n + q . m
//   keys k^ = s_t n + m_t with scales per token: q . k^ = s_t (q . n) + m_t sum(q)
//   values v^ = c (n s_t + m_t):                 sum_t p_t v^_t = c (sum_t (p_t s_t) n_t + sum_t p_t m_t)
//
// The other operand (q s for a block of tokens, p s for a chunk of them) is rounded to integers, of which tensor cores
// take the limbs as columns; their sums are exact. Each warp goes through a stretch of tokens by itself.
//
// In each MMA the codes are the 16-row matrix: logits are (tokens, limbs of rows), results (channels, limbs of rows).
// Lane (g, t) = (lane / 4, lane % 4) of a warp holds row t of each group of four rows, for eight tokens or channels.
namespace singlepass::kv {

// Shared memory. After this struct come the queries (rows, head_dim) in float32; then, for each warp, what codes of
// keys are multiplied by, and the channel factors of the values.
template <int kGroups, int kHalves>
struct CodesShared : SoftmaxShared<kGroups> {
  static constexpr int kRows = 4 * kGroups;

  __device__ __forceinline__ float* queries() { return reinterpret_cast<float*>(this + 1); }
  __device__ __forceinline__ uint32_t* fragments(const DeviceDecode& p, int warp) {
    return reinterpret_cast<uint32_t*>(queries() + kRows * p.head_dim) + warp * (fragment_words(p) + kValueTile);
  }
  __device__ __forceinline__ float* channel_factors(const DeviceDecode& p, int warp) {
    return reinterpret_cast<float*>(fragments(p, warp) + fragment_words(p));
  }
  SINGLEPASS_HD static int64_t fragment_words(const DecodeArguments& p) {
    return (p.head_dim + kKeyTile - 1) / kKeyTile * kGroups * kHalves * kFragmentWords;
  }
  static size_t bytes(const DecodeArguments& p) {
    const int64_t inputs = kRows * p.head_dim + kDecodeWarps * (fragment_words(p) + kValueTile);
    return sizeof(CodesShared) + std::max(4 * inputs, CodesShared::sums_bytes);
  }
};

// kWidth: 128, which many models have, if keys and values have as many channels and keys are aligned to 8 bytes, and 0
// in general.
template <int kBits, int kWidth, int kGroups, int kHalves>
class CodesAttention {
 public:
  using Shared = CodesShared<kGroups, kHalves>;

  __device__ __forceinline__ CodesAttention(const DeviceDecode& p, const Work& work, Shared& shared)
      : p_(p),
        work_(work),
        s_(p.segments[work.segment]),
        shared_(shared),
        g_(threadIdx.x % kWarp / 4),
        t_(threadIdx.x % 4),
        value_dim_(width_of<kWidth>(p.value_dim)),
        key_bytes_(width_of<kWidth>(p.head_dim) * kBits / 8),
        value_bytes_(value_dim_ * kBits / 8),
        key_codes_(s_.keys.codes.at(work.b, work.h)),
        factors_(shared.channel_factors(p, warp_of_block())),
        queries_(p, work, shared.queries(), shared.fragments(p, warp_of_block())) {
    const int last = value_dim_ / 16 - 1, own = first_part() + g_;
    value_codes_ = s_.values.codes.at(work.b, work.h) + 2 * kBits * (kWidth > 0 || own < last ? own : last);
  }

  __device__ __forceinline__ void run() {
    load_queries<kRows>(p_, work_, shared_.queries());
    for (int i = lane_of_warp(); i < kValueTile; i += kWarp) factors_[i] = 1.0f;
    __syncthreads();
    if (s_.keys.axis == Axis::kToken) queries_.template fold<false>(nullptr);
    const Share share(work_);
    for_each_block(s_, work_, share.begin, share.end, [&](int block, int first, int last) {
      for (int at = first; at < last; at += kChunk) attend(block, at == first, at, last);
    });
    write();
  }

 private:
  using Code = CodeWords<kBits>;
  static constexpr int kRows = 4 * kGroups, kTiles = kGroups * kHalves;
  static constexpr int kSums = Code::planes == 1 ? 1 : 2;
  static constexpr float kLargest = kLargestInteger, kInverse = 1.0f / kLargest;  // of weights

  // What is loaded before a block's scales are waited for, as registers allow.
  static constexpr bool kEarlyKeys = kTiles == 1, kEarlyValues = kEarlyKeys && kBits < 8;

  struct Keys {
    uint32_t codes[4][Code::words][2];  // of token 8 j + g, octet by octet
  };
  struct Values {
    uint32_t codes[2][4][Code::words];  // of tokens 16 i + 2 t, 16 i + 2 t + 1, and the two that come 8 later
    uint32_t scales[4];                 // of token 8 j + g
  };

  // One step of the online softmax: tokens of a block from `first` on, up to `end`. What is read beyond the tokens lies
  // within the segment.
  __device__ __forceinline__ void attend(int block, bool is_new, int first, int end) {
    const int last = static_cast<int>(s_.slots) - kChunk, begin = first < last ? first : last;
    Keys keys;
    Values values;
    if (kEarlyKeys) load_keys(begin, keys);
    if (kEarlyValues) load_values(begin, values);
    if (is_new) enter(block);
    if (!kEarlyKeys) load_keys(begin, keys);
    float weights[kGroups][4], minima[kGroups], steps[kGroups];
    uint32_t columns[kTiles][2];
    logits(begin, keys, weights);
    if (!kEarlyValues) load_values(begin, values);
    if (first - begin > 0 || end - begin < kChunk) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int slot = begin + 8 * j + g_;
        if (first <= slot && slot < end) continue;
        values.scales[j] = 0;  // whatever stands there
        for (int group = 0; group < kGroups; ++group) weights[group][j] = -INFINITY;
      }
    }
    softmax_.weigh(weights);
    fold_weights(values.scales, weights, columns, minima, steps);
    add_values(values.codes, columns, minima, steps);
  }

  // Once for each block: its steps and minima go into the queries, its channel factors to shared memory.
  __device__ __forceinline__ void enter(int block) {
    __syncwarp();
    if (work_.channel_factors != nullptr) {
      const int part = lane_of_warp() / 8, g = lane_of_warp() % 8;
      float c[4] = {};
      if (is_channel(g)) load_halves(work_.channel_factors + int64_t{block} * value_dim_ + channel_of(part, g), c);
      reinterpret_cast<float4*>(factors_)[lane_of_warp()] = {c[0], c[1], c[2], c[3]};
    }
    if (s_.keys.axis == Axis::kChannel)
      queries_.template fold<true>(work_.key_scales + int64_t{block} * queries_.scales());
    __syncwarp();
  }

  // The first of the four channels, which stand in one word and plane, of a part for lane group g.
  __device__ __forceinline__ int channel_of(int part, int g) const {
    const int word = (first_part() + g) * Code::words + part / Code::planes;
    return part % Code::planes * value_bytes_ + 4 * word;
  }
  // Parts of sixteen channels before the value tile.
  __device__ __forceinline__ int first_part() const { return kWidth > 0 ? 0 : work_.value_tile * 8; }
  __device__ __forceinline__ bool is_channel(int g) const { return kWidth > 0 || (first_part() + g) * 16 < value_dim_; }

  __device__ __forceinline__ void load_values(int begin, Values& to) const {
    const uint8_t* const from = value_codes_ + int64_t{begin + 2 * t_} * value_bytes_;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = i / 4 * 16 + i % 2 + i % 4 / 2 * 8;
      load_words<Code::words>(from + token * value_bytes_, to.codes[i / 4][i % 4]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) to.scales[j] = load_steps(work_.value_scales + int64_t{2} * (begin + g_), 8 * j);
  }

  __device__ __forceinline__ void load_keys(int begin, Keys& to) const {
    const uint8_t* const from = key_codes_ + int64_t{begin + g_} * key_bytes_;
#pragma unroll
    for (int j = 0; j < 4; ++j) load_key(from + 8 * j * key_bytes_, 0, to.codes[j]);
  }

  // The lane's words of a row of keys. A word beyond the last one repeats it, and is multiplied by zeros.
  __device__ __forceinline__ void load_key(const uint8_t* row, int key_tile, uint32_t (&to)[Code::words][2]) const {
#pragma unroll
    for (int octet = 0; octet < Code::words; ++octet) {
      const int word = (key_tile * Code::words + octet) * 8 + 2 * t_;
      if constexpr (kWidth > 0) {
        load_words<2>(row + 4 * word, to[octet]);
      } else {
        const int last = key_bytes_ / 4 - 1;
        for (int i = 0; i < 2; ++i) load_words<1>(row + 4 * (word + i < last ? word + i : last), &to[octet][i]);
      }
    }
  }

  // Stage 1: to[group][j] is the logit of token 8 j + g.
  __device__ __forceinline__ void logits(int begin, const Keys& keys, float (&to)[kGroups][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int sums[kTiles][kSums][4] = {};
      multiply_keys(0, keys.codes[2 * i], keys.codes[2 * i + 1], sums);
      for (int key_tile = 1; key_tile < queries_.key_tiles(); ++key_tile) {
        const uint8_t* const row = key_codes_ + int64_t{begin + 16 * i + g_} * key_bytes_;
        uint32_t more[2][Code::words][2];
        for (int k = 0; k < 2; ++k) load_key(row + 8 * k * key_bytes_, key_tile, more[k]);
        multiply_keys(key_tile, more[0], more[1], sums);
      }
#pragma unroll
      for (int k = 0; k < 2 * kGroups; ++k) to[k / 2][2 * i + k % 2] = dot_of(sums, k / 2, k % 2);
    }
    finish_logits(begin, to);
  }

  // Adds the products of two tokens' codes to sums[tile][.][2 token + limb], apart for planes that stand in the upper
  // part of half bytes.
  __device__ __forceinline__ void multiply_keys(int key_tile, const uint32_t (&one)[Code::words][2],
                                                const uint32_t (&other)[Code::words][2],
                                                int (&sums)[kTiles][kSums][4]) const {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int octet = step / Code::planes, plane = step % Code::planes;
      const uint32_t a[4] = {Code::in_half_byte(one[octet][0], plane), Code::in_half_byte(other[octet][0], plane),
                             Code::in_half_byte(one[octet][1], plane), Code::in_half_byte(other[octet][1], plane)};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 q = queries_.fragment(key_tile, tile, step / 2);
        multiply_accumulate(sums[tile][plane % kSums], a, step % 2 == 0 ? q.x : q.z, step % 2 == 0 ? q.y : q.w);
      }
    }
  }

  __device__ __forceinline__ float dot_of(const int (&sums)[kTiles][kSums][4], int group, int token) const {
    int both[2][kHalves];  // sums with high and with low limbs
#pragma unroll
    for (int k = 0; k < 2 * kHalves; ++k) {
      const auto& sum = sums[group * kHalves + k / 2];
      both[k % 2][k / 2] = sum[0][2 * token + k % 2];
      if constexpr (kSums == 2) both[k % 2][k / 2] += sum[1][2 * token + k % 2] >> kBits;
    }
    return from_limbs(both[0], both[1], queries_.inverse());
  }

  // Logits from dot products of integers.
  __device__ __forceinline__ void finish_logits(int begin, float (&to)[kGroups][4]) const {
    if (s_.keys.axis == Axis::kToken) [[unlikely]] {
      const uint16_t* const scales = work_.key_scales + int64_t{2} * begin;
      for (int k = 0; k < 4 * kGroups; ++k) {
        const uint32_t own = load_steps(scales, 8 * (k % 4) + g_);
        float& logit = to[k / 4][k % 4];
        logit *= queries_.step(k / 4) * step_of(own);
        logit = multiply_add(queries_.bias(k / 4), minimum_of(own), logit);
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4 * kGroups; ++k) {
        to[k / 4][k % 4] = multiply_add(to[k / 4][k % 4], queries_.step(k / 4), queries_.bias(k / 4));
      }
    }
    if (p_.softcap > 0.0f) {
      for (int k = 0; k < 4 * kGroups; ++k) to[k / 4][k % 4] = capped(p_, to[k / 4][k % 4]);
    }
  }

  // Stage 2: columns of limbs of p s, the steps of these integers, and the sums of p m.
  __device__ __forceinline__ void fold_weights(const uint32_t (&scales)[4], float (&weights)[kGroups][4],
                                               uint32_t (&columns)[kTiles][2], float (&minima)[kGroups],
                                               float (&steps)[kGroups]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float top = 0.0f, minimum = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& weight = weights[group][j];
        minimum = multiply_add(weight, minimum_of(scales[j]), minimum);
        weight *= step_of(scales[j]);
        top = maximum(top, absolute(weight));
      }
      minima[group] = over_tokens(minimum, Sum{});
      const Rounding to = rounding(over_tokens(top, Maximum{}), kLargest, kInverse);
      steps[group] = to.step;
      uint32_t n[4][kHalves];
#pragma unroll
      for (int j = 0; j < 4; ++j) to_limbs(weights[group][j], to.up, kLargest, n[j]);
#pragma unroll
      for (int k = 0; k < 2 * kHalves; ++k) {
        const int i = k % 2, half = k / 2;
        columns[group * kHalves + half][i] = column(n[2 * i][half], n[2 * i + 1][half]);
      }
    }
  }

  // From the integers of tokens 16 i + g and 16 i + g + 8 of the lane's row, the limbs of tokens 2 t, 2 t + 1, 2 t + 8
  // and 2 t + 9 (+ 16 i) in column g.
  __device__ __forceinline__ uint32_t column(uint32_t first, uint32_t second) const {
    const bool low = g_ % 2 == 1;  // this lane now has the later two tokens, its neighbour the earlier two
    const uint32_t own = transpose(__byte_perm(first, second, 0x5410)), other = __shfl_xor_sync(kAllLanes, own, 4);
    return __byte_perm(own, other, low ? 0x2064 : 0x7531) ^ (low ? kFlipped : 0);
  }

  // Stage 3: adds the weighted values.
  __device__ __forceinline__ void add_values(const uint32_t (&codes)[2][4][Code::words],
                                             const uint32_t (&columns)[kTiles][2], const float (&minima)[kGroups],
                                             const float (&steps)[kGroups]) {
#pragma unroll
    for (int v = 0; v < Code::words; ++v) {
      uint32_t bytes[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) bytes[i / 4][i % 4] = codes[i / 4][i % 4][v];
      transpose_bytes(bytes[0]), transpose_bytes(bytes[1]);
#pragma unroll
      for (int plane = 0; plane < Code::planes; ++plane) {
        const int part = v * Code::planes + plane;
        const float4 four = reinterpret_cast<const float4*>(factors_)[part * 8 + g_];
        const float c[4] = {four.x, four.y, four.z, four.w};
        const float lowered = 1.0f / static_cast<float>(1 << (kBits * plane));  // codes are used where they stand
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const uint32_t a[4] = {Code::in_place(bytes[0][k], plane), Code::in_place(bytes[0][k + 1], plane),
                                 Code::in_place(bytes[1][k], plane), Code::in_place(bytes[1][k + 1], plane)};
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
            int sums[kHalves][4] = {};
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
              const auto& column = columns[group * kHalves + half];
              multiply_accumulate(sums[half], a, column[0], column[1]);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              int high[kHalves], low[kHalves];
#pragma unroll
              for (int half = 0; half < kHalves; ++half)
                high[half] = sums[half][2 * i], low[half] = sums[half][2 * i + 1];
              const float sum = from_limbs(high, low, kInverse);
              const float value = multiply_add(sum, steps[group] * lowered, minima[group]);
              softmax_.add(group, part * 4 + k + i, c[k + i], value);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void write() {
    const Partial to(p_, work_);
    softmax_.merge(shared_, work_, to, [&](int group, int part, const float4& sum) {
      const int row = 4 * group + t_;
      if (row >= work_.rows(p_) || !is_channel(g_)) return;
      *reinterpret_cast<float4*>(to.out + row * value_dim_ + channel_of(part, g_)) = sum;
    });
  }

  const DeviceDecode& p_;
  const Work& work_;
  const Segment& s_;
  Shared& shared_;
  const int g_, t_, value_dim_, key_bytes_, value_bytes_;
  const uint8_t *const key_codes_, *value_codes_;  // of the head, values from the lane's first word on
  float* const factors_;
  FoldedQueries<kBits, kWidth, kGroups, kHalves> queries_;
  Softmax<kGroups> softmax_;
};

}  // namespace singlepass::kv
