// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv/code_words.h"
#include "kv/decode.h"

// Attention on tensor cores that multiply the codes themselves: small integers n, exact in float16. Scales (steps s and
// minima m) are applied to rows of queries and of weights, not to elements:
//
//   keys k^ = n s + m with scales per channel:   q . k^ = (q s) . n + q . m
//   keys k^ = s_t n + m_t with scales per token: q . k^ = s_t (q . n) + m_t sum(q)
//   values v^ = c (n s_t + m_t):                 sum_t p_t v^_t = c (sum_t (p_t s_t) n_t + sum_t p_t m_t)
//
// The other operand (q s, or p s) is scaled by a power of two for each row and split into two float16, so that results
// are as exact as in float32.
//
// Channel scales of keys and channel factors of values are applied once for each block of tokens. In a large block the
// warps share the tokens, chunk by chunk; small blocks are given to one warp each ("per warp").
//
// The file is long because its stages are one kernel, and share registers and the layout of lanes.
//
// In each MMA the codes are the 16-row matrix and the queries the 8-column one: logits are (tokens, rows), results
// (channels, rows). Lane (g, t) = (lane / 4, lane % 4) of a warp holds rows 2 t and 2 t + 1 of both.
namespace singlepass::kv {

inline constexpr int kChunk = 32;    // tokens that a warp processes at a time
inline constexpr int kKeyTile = 64;  // channels of keys whose codes four lanes load together
inline constexpr int kMmaTiles = 8;  // tiles of 16 channels in a value tile

// Shared memory. After this struct come the queries (kRowTile, head_dim) in float32; then, once for the thread block or
// once for each warp, the MMA fragments that codes are multiplied by and the channel factors of the values. At the end
// the same memory takes the sums of the warps.
struct CodesShared {
  const uint8_t *key_codes, *value_codes;  // of the head
  const uint16_t* value_scales;
  int block;
  float down[kDecodeWarps][kRowTile], bias[kDecodeWarps][kRowTile];
  alignas(16) float row_max[kDecodeWarps][kRowTile], row_sum[kDecodeWarps][kRowTile];

  __device__ __forceinline__ float* queries() { return reinterpret_cast<float*>(this + 1); }
  // The fragments of a team, then its channel factors.
  __device__ __forceinline__ uint4* fragments(const DeviceDecode& p, int team) {
    return reinterpret_cast<uint4*>(queries() + kRowTile * p.head_dim) + team * (team_bytes(p) / 16);
  }
  __device__ __forceinline__ float* channel_factors(const DeviceDecode& p, int team) {
    return reinterpret_cast<float*>(fragments(p, team) + fragments_of(p));
  }
  SINGLEPASS_HD static int64_t fragments_of(const DecodeArguments& p) {
    return (p.head_dim + kKeyTile - 1) / kKeyTile * (kKeyTile / 16) * kWarp;
  }
  // Rounded up to whole value tiles: lanes read the channels beyond value_dim, too.
  SINGLEPASS_HD static int64_t channels_of(const DecodeArguments& p) {
    return (p.value_dim + kValueTile - 1) / kValueTile * kValueTile;
  }
  SINGLEPASS_HD static int64_t team_bytes(const DecodeArguments& p) {
    return 16 * fragments_of(p) + 4 * channels_of(p);
  }
  static size_t bytes(const DecodeArguments& p, int64_t teams) {
    return sizeof(CodesShared) +
           std::max(4 * kRowTile * p.head_dim + teams * team_bytes(p), int64_t{4 * kRowTile * kValueTile});
  }
};

// Online softmax of one warp. Each lane keeps partial sums for its own tokens; merge() adds them up.
class CodesAttention {
 public:
  __device__ __forceinline__ CodesAttention(const DeviceDecode& p, const Work& work, CodesShared& shared)
      : p_(p),
        work_(work),
        s_(p.segments[work.segment]),
        shared_(shared),
        key_bytes_(static_cast<int>(s_.keys.bytes())),
        value_bytes_(static_cast<int>(s_.values.bytes())),
        key_tiles_(static_cast<int>(p.head_dim + kKeyTile - 1) / kKeyTile),
        per_warp_(p.per_warp[work.segment]),
        lane_(threadIdx.x % kWarp),
        warp_(threadIdx.x / kWarp),
        team_(per_warp_ ? warp_ : 0),
        g_(lane_ / 4),
        t_(lane_ % 4) {}

  __device__ __forceinline__ void run() {
    for (int i = threadIdx.x; i < kRowTile * p_.head_dim; i += kDecodeThreads) {
      const int head_dim = static_cast<int>(p_.head_dim);
      shared_.queries()[i] = query(p_, work_, i / head_dim, i % head_dim);
    }
    float* const channel_factors = shared_.channel_factors(p_, team_);
    for (int d = rank(); d < CodesShared::channels_of(p_); d += size()) channel_factors[d] = 1.0f;
    if (threadIdx.x == 0) {
      shared_.key_codes = s_.keys.codes.at(work_.b, work_.h);
      shared_.value_codes = s_.values.codes.at(work_.b, work_.h);
      shared_.value_scales = s_.values.scales.at(work_.b, work_.h);
    }
    const bool by_channels = s_.keys.axis == Axis::kChannel;
    __syncthreads();
    if (!by_channels) fold(nullptr);
    const auto attend_block = [&](int block, int begin, int end) {
      sync();
      if (by_channels) fold(s_.keys.scales_at(work_.b, work_.h, 0, block));
      if (s_.values.channels.data != nullptr) {
        const uint16_t* from = s_.values.channels_at(work_.b, work_.h, block);
        for (int d = rank(); d < p_.value_dim; d += size()) channel_factors[d] = float16_to_float(from[d]);
      }
      sync();
      for (int first = begin + rank() / kWarp * kChunk; first < end; first += size()) {
        const Chunk chunk = {first, end - first < kChunk ? end - first : kChunk};
        if (p_.vectors) {
          attend<true>(chunk);
        } else {
          attend<false>(chunk);
        }
      }
    };
    for_each_block(s_, work_, shared_.block, attend_block, team_, per_warp_ ? kDecodeWarps : 1);
    merge();
  }

 private:
  // The team that shares a block of tokens (one warp, or the whole thread block): its size, this thread's rank in it,
  // and its barrier.
  __device__ __forceinline__ int size() const { return per_warp_ ? kWarp : kDecodeThreads; }
  __device__ __forceinline__ int rank() const { return per_warp_ ? lane_ : static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ void sync() const {
    if (per_warp_) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Stage 1, once for each block of tokens: fragments of q s, and the sums q . m (s = m = 1 if keys have scales per
  // token). Sixteen threads work on a row. The products wait in the fragments' memory until the row's scaling is known.
  __device__ __forceinline__ void fold(const uint16_t* scales) {
#pragma unroll 1
    for (int row = rank() / 16; row < kRowTile; row += size() / 16) fold(scales, row, lane_ % 16);
  }

  __device__ __forceinline__ void fold(const uint16_t* scales, int row, int i) {
    const int planes = 8 / s_.keys.bits, num_words = 4 / planes, v = i / 4 / planes, plane = i / 4 % planes;
    uint4* const fragments = shared_.fragments(p_, team_) + i / 4 * kWarp + row * 4 + i % 4;
    float bias = 0.0f, largest = 0.0f;
#pragma unroll 1
    for (int key_tile = 0; key_tile < key_tiles_; ++key_tile) {
      const int word = word_index(num_words, key_tile, 4, i % 4, v, p_.vectors);
      float x[4] = {};
      if (4 * word < key_bytes_) bias += products(scales, row, plane * key_bytes_ + 4 * word, x);
      largest = fmaxf(fmaxf(largest, fmaxf(absolute(x[0]), absolute(x[1]))), fmaxf(absolute(x[2]), absolute(x[3])));
      fragments[key_tile * 4 * kWarp] = {bit_cast<uint32_t>(x[0]), bit_cast<uint32_t>(x[1]), bit_cast<uint32_t>(x[2]),
                                         bit_cast<uint32_t>(x[3])};
    }
    for (int offset = 1; offset < 16; offset *= 2) {
      bias += __shfl_xor_sync(kAllLanes, bias, offset);
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    }
    const Scaling scale = scaling(largest);
    if (i == 0) shared_.down[team_][row] = scale.down, shared_.bias[team_][row] = bias;
#pragma unroll 1
    for (int key_tile = 0; key_tile < key_tiles_; ++key_tile) {
      const uint4 x = fragments[key_tile * 4 * kWarp];
      const HalfPairs even = split(bit_cast<float>(x.x) * scale.up, bit_cast<float>(x.z) * scale.up);
      const HalfPairs odd = split(bit_cast<float>(x.y) * scale.up, bit_cast<float>(x.w) * scale.up);
      fragments[key_tile * 4 * kWarp] = {even.high, odd.high, even.low, odd.low};
    }
  }

  // x = q s for four channels. Returns their part of q . m.
  __device__ __forceinline__ float products(const uint16_t* scales, int row, int first, float (&x)[4]) {
    const int head_dim = static_cast<int>(p_.head_dim);
    const float4 q = *reinterpret_cast<const float4*>(&shared_.queries()[row * head_dim + first]);
    const float values[4] = {q.x, q.y, q.z, q.w};
    float steps[4] = {1.0f, 1.0f, 1.0f, 1.0f}, minima[4] = {1.0f, 1.0f, 1.0f, 1.0f}, bias = 0.0f;
    if (scales != nullptr) {
      load_halves(scales + first, steps);
      load_halves(scales + head_dim + first, minima);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[k] = values[k] * steps[k];
      bias = multiply_add(values[k], minima[k], bias);
    }
    return bias;
  }

  template <bool kVectors>
  __device__ __forceinline__ void attend(const Chunk& chunk) {
    if (s_.keys.bits == 2) {
      attend<2, kVectors>(chunk);
    } else if (s_.keys.bits == 4) {
      attend<4, kVectors>(chunk);
    } else {
      attend<8, kVectors>(chunk);
    }
  }

  template <int kBits, bool kVectors>
  __device__ __forceinline__ void attend(const Chunk& chunk) {
    using Code = CodeWords<kBits, kVectors>;
    uint32_t codes[2][4][Code::num_words];
    if constexpr (kVectors) load_values<Code>(chunk, codes);  // in flight while the weights are computed
    float weights[4][2], shifts[2], minima[2], down[2];
    logits<Code>(chunk, weights);
    softmax(weights, shifts);
    uint32_t high[4], low[4];
    fold_weights(chunk, weights, high, low, minima, down);
    if constexpr (!kVectors) load_values<Code>(chunk, codes);  // earlier, its addresses would take too many registers
    add_values<Code>(codes, high, low, shifts, minima, down);
  }

  // codes[i]: the words of tokens 16 i + 2 t, 16 i + 2 t + 1, and the two that come 8 later.
  template <class Code>
  __device__ __forceinline__ void load_values(const Chunk& chunk, uint32_t (&codes)[2][4][Code::num_words]) {
    const uint8_t* from =
        shared_.value_codes + int64_t{chunk.first} * value_bytes_ + Code::offset(work_.value_tile, 8, g_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint8_t* row =
            from + chunk.row(16 * i + 2 * t_ + j % 2 + j / 2 * 8) * static_cast<unsigned>(value_bytes_);
        Code::load(row, value_bytes_ / 4, work_.value_tile, 8, g_, codes[i][j]);
      }
    }
  }

  // Stage 2, for each chunk: logits (tokens, rows) on tensor cores. to[j] has those of token 8 j + g for the lane's
  // rows.
  template <class Code>
  __device__ __forceinline__ void logits(const Chunk& chunk, float (&to)[4][2]) {
    const uint8_t* from = shared_.key_codes + int64_t{chunk.first} * key_bytes_ + Code::offset(0, 4, t_);
    const uint8_t* rows[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) rows[j] = from + chunk.row(8 * j + g_) * static_cast<unsigned>(key_bytes_);
    const uint4* fragment = shared_.fragments(p_, team_) + lane_;
    float sums[2][4] = {};
#pragma unroll 1
    for (int key_tile = 0; key_tile < key_tiles_; ++key_tile) {
      uint32_t codes[4][Code::num_words];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Code::load(rows[j] + Code::offset(key_tile, 4, 0), key_bytes_ / 4, key_tile, 4, t_, codes[j]);
      }
#pragma unroll
      for (int v = 0; v < Code::num_words; ++v) {
        Code::for_each_plane([&]<int plane>() {
          const uint4 q = fragment[((key_tile * Code::num_words + v) * Code::planes + plane) * kWarp];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t first = codes[2 * i][v], second = codes[2 * i + 1][v];
            const uint32_t a[4] = {Code::template halves<plane, 0>(first), Code::template halves<plane, 0>(second),
                                   Code::template halves<plane, 1>(first), Code::template halves<plane, 1>(second)};
            multiply_accumulate(sums[i], a, q.x, q.y);
            multiply_accumulate(sums[i], a, q.z, q.w);
          }
        });
      }
    }
    const bool by_tokens = s_.keys.axis == Axis::kToken;
    const uint16_t* scales = by_tokens ? s_.keys.scales_at(work_.b, work_.h, chunk.first, 0) : nullptr;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 own = by_tokens ? steps_of_token(scales, chunk.row(8 * j + g_)) : float2{1.0f, 1.0f};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float dot = sums[j / 2][j % 2 * 2 + r] * shared_.down[team_][2 * t_ + r] * own.x;
        to[j][r] = multiply_add(shared_.bias[team_][2 * t_ + r], own.y, dot);
      }
    }
    if (p_.softcap > 0.0f) {
      const float inverse = 1.0f / p_.softcap;
      for (int k = 0; k < 8; ++k) to[k / 2][k % 2] = capped(to[k / 2][k % 2], p_.softcap, inverse);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (8 * j + g_ >= chunk.count) to[j][0] = to[j][1] = -INFINITY;
    }
  }

  // Stage 3: online softmax. Logits become weights exp(logit - row_max); what was summed before must be multiplied by
  // `shifts`.
  __device__ __forceinline__ void softmax(float (&weights)[4][2], float (&shifts)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float row_max = row_max_[r];
#pragma unroll
      for (int j = 0; j < 4; ++j) row_max = fmaxf(row_max, weights[j][r]);
      row_max = max_over_tokens(row_max);
      const float relative = safe_max(row_max);
      shifts[r] = exp_of_negative(row_max_[r] - relative);
      row_max_[r] = row_max;
      row_sum_[r] *= shifts[r];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weights[j][r] = exp_of_negative(weights[j][r] - relative);
        row_sum_[r] += weights[j][r];
      }
    }
  }

  // Stage 4: fragments of p s in two float16 each, `down` to undo their scaling, and the sums of p m.
  __device__ __forceinline__ void fold_weights(const Chunk& chunk, float (&weights)[4][2], uint32_t (&high)[4],
                                               uint32_t (&low)[4], float (&minima)[2], float (&down)[2]) {
    const uint16_t* scales = shared_.value_scales + int64_t{2} * chunk.first;
    minima[0] = minima[1] = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 own = steps_of_token(scales, chunk.row(8 * j + g_));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        minima[r] = multiply_add(weights[j][r], own.y, minima[r]);
        weights[j][r] *= own.x;
      }
    }
    float up[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      minima[r] = sum_over_tokens(minima[r]);
      const float largest = fmaxf(fmaxf(weights[0][r], weights[1][r]), fmaxf(weights[2][r], weights[3][r]));
      const Scaling scale = scaling(max_over_tokens(largest));
      up[r] = scale.up, down[r] = scale.down;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const HalfPairs pairs = split(weights[j][0] * up[0], weights[j][1] * up[1]);
      high[j] = transpose(pairs.high);
      low[j] = transpose(pairs.low);
    }
  }

  // Stage 5: adds the weighted values on tensor cores, word by word of lane group g. An MMA tile holds, for one plane,
  // the channels 2 half and 2 half + 1 of each word.
  template <class Code>
  __device__ __forceinline__ void add_values(const uint32_t (&codes)[2][4][Code::num_words], const uint32_t (&high)[4],
                                             const uint32_t (&low)[4], const float (&shifts)[2],
                                             const float (&minima)[2], const float (&down)[2]) {
    const float* const channel_factors = shared_.channel_factors(p_, team_);
#pragma unroll
    for (int v = 0; v < Code::num_words; ++v) {
      const int word = word_index(Code::num_words, work_.value_tile, 8, g_, v, Code::vectors);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sums[Code::planes][4] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t first = pair_of(codes[i][0][v], codes[i][1][v], half);
          const uint32_t second = pair_of(codes[i][2][v], codes[i][3][v], half);
          Code::for_each_plane([&]<int plane>() {
            const uint32_t a[4] = {Code::template halves<plane, 0>(first), Code::template halves<plane, 1>(first),
                                   Code::template halves<plane, 0>(second), Code::template halves<plane, 1>(second)};
            multiply_accumulate(sums[plane], a, high[2 * i], high[2 * i + 1]);
            multiply_accumulate(sums[plane], a, low[2 * i], low[2 * i + 1]);
          });
        }
#pragma unroll
        for (int plane = 0; plane < Code::planes; ++plane) {
          const int channel = plane * value_bytes_ + 4 * word + 2 * half;
          add(out_[(v * 2 + half) * Code::planes + plane], channel_factors + channel, sums[plane], shifts, minima,
              down);
        }
      }
    }
  }

  // The same two bytes of the codes of two tokens.
  __device__ __forceinline__ static uint32_t pair_of(uint32_t first, uint32_t second, int half) {
    return half == 0 ? (first & 0xffffu) | second << 16 : first >> 16 | (second & 0xffff0000u);
  }

  // out = out * shift + c (sum + minima), for two channels.
  __device__ __forceinline__ void add(float (&out)[4], const float* factors, const float (&sums)[4],
                                      const float (&shifts)[2], const float (&minima)[2], const float (&down)[2]) {
    const float2 c = *reinterpret_cast<const float2*>(factors);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float value = multiply_add(sums[k], down[k % 2], minima[k % 2]);
      out[k] = multiply_add(out[k], shifts[k % 2], (k < 2 ? c.x : c.y) * value);
    }
  }

  // Last stage: adds the results of the warps in their order. sums[i][lane] is the i-th of the lane's out_.
  __device__ __forceinline__ void merge() {
    const Partial to(p_, work_);
    float factors[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float row_sum = sum_over_tokens(row_sum_[r]);
      if (g_ == 0) shared_.row_max[warp_][2 * t_ + r] = row_max_[r], shared_.row_sum[warp_][2 * t_ + r] = row_sum;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * t_ + r;
      float row_max = -INFINITY, row_sum = 0.0f;
      for (int w = 0; w < kDecodeWarps; ++w) row_max = fmaxf(row_max, shared_.row_max[w][row]);
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float factor = exp_of_negative(shared_.row_max[w][row] - safe_max(row_max));
        row_sum = multiply_add(shared_.row_sum[w][row], factor, row_sum);
      }
      factors[r] = exp_of_negative(row_max_[r] - safe_max(row_max));
      if (warp_ == 0 && g_ == 0 && work_.value_tile == 0) to.row_max[row] = row_max, to.row_sum[row] = row_sum;
    }
    float* sums = shared_.queries();
    for (int w = 0; w < kDecodeWarps; ++w) {
      if (w == warp_) {
#pragma unroll
        for (int i = 0; i < kMmaTiles * 4; ++i) {
          float& at = sums[i * kWarp + lane_];
          at = multiply_add(out_[i / 4][i % 4], factors[i % 2], w == 0 ? 0.0f : at);
        }
      }
      __syncthreads();
    }
    write(sums, to.out);
  }

  // Writes the channels of the value tile in their order.
  __device__ __forceinline__ void write(const float* sums, float* to) const {
    const int planes = 8 / s_.values.bits, num_words = 4 / planes, value_dim = static_cast<int>(p_.value_dim);
    const int rows = static_cast<int>(work_.rows(p_));
    for (int i = threadIdx.x; i < rows * value_dim; i += kDecodeThreads) {
      const int row = i / value_dim, channel = i % value_dim, byte = channel % value_bytes_, word = byte / 4;
      const int v = p_.vectors ? word % num_words : word / 8 % num_words,
                g = p_.vectors ? word / num_words % 8 : word % 8;
      if (word / (8 * num_words) != work_.value_tile) continue;
      const int tile = (v * 2 + byte % 4 / 2) * planes + channel / value_bytes_;
      to[i] = sums[(tile * 4 + byte % 2 * 2 + row % 2) * kWarp + g * 4 + row / 2];
    }
  }

  const DeviceDecode& p_;
  const Work& work_;
  const Segment& s_;
  CodesShared& shared_;
  const int key_bytes_, value_bytes_, key_tiles_;
  const bool per_warp_;
  const int lane_, warp_, team_, g_, t_;
  float row_max_[2] = {-INFINITY, -INFINITY}, row_sum_[2] = {};
  float out_[kMmaTiles][4] = {};
};

}  // namespace singlepass::kv
