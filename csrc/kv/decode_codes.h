// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv/code_words.h"
#include "kv/decode.h"

// Attention by tensor cores over the codes themselves, which are exact in float16. Steps and minima meet rows, not
// elements. With keys k^ = n s + m by channels, q . k^ = (q s) . n + q . m; with keys s_t n + m_t by tokens,
// q . k^ = s_t (q . n) + m_t sum(q); with values v^ = c (n s_t + m_t),
// sum_t p_t v^_t = c (sum_t (p_t s_t) n_t + sum_t p_t m_t). What codes are multiplied by is scaled by a power of two
// for each row and represented by two float16, so that results are as exact as float32's.
//
// Steps of keys' channels and factors of values' channels meet the rows once for each block of tokens. All warps share
// a large block, of which each takes chunks of tokens; of small ones each warp takes its own.
//
// Codes are the matrix of 16 rows, queries that of 8 columns: logits are (tokens, rows), results (channels, rows), and
// the lane (g, t) = (lane / 4, lane % 4) of a warp has rows 2 t and 2 t + 1 of both.
namespace singlepass::kv {

inline constexpr int kChunk = 32;       // tokens that a warp works on together
inline constexpr int kUnit = 64;        // channels of keys whose codes four lanes load together
inline constexpr int kTilesOfSlab = 8;  // of 16 channels

// What the threads of a block share. Dynamic memory begins with it; queries (kRowTile, width) in float32 follow, then
// fragments of what the codes are multiplied by and the values' channel factors, of a block of tokens or of each
// warp's. At the end the warps' sums are added up where these stood.
struct CodesShared {
  const uint8_t *key_codes, *value_codes;  // of the head
  const uint16_t* value_scales;
  int block;
  float down[kDecodeWarps][kRowTile], bias[kDecodeWarps][kRowTile];
  alignas(16) float most[kDecodeWarps][kRowTile], sum[kDecodeWarps][kRowTile];

  __device__ __forceinline__ float* queries() { return reinterpret_cast<float*>(this + 1); }
  // A block's fragments, then its factors.
  __device__ __forceinline__ uint4* fragments(const DeviceDecode& p, int team) {
    return reinterpret_cast<uint4*>(queries() + kRowTile * p.width) + team * (team_bytes(p) / 16);
  }
  __device__ __forceinline__ float* channels(const DeviceDecode& p, int team) {
    return reinterpret_cast<float*>(fragments(p, team) + fragments_of(p));
  }
  SINGLEPASS_HD static int64_t fragments_of(const DecodeArguments& p) {
    return (p.width + kUnit - 1) / kUnit * (kUnit / 16) * kWarp;
  }
  // Of whole slabs: lanes also look at channels that are not there.
  SINGLEPASS_HD static int64_t channels_of(const DecodeArguments& p) {
    return (p.value_width + kSlab - 1) / kSlab * kSlab;
  }
  SINGLEPASS_HD static int64_t team_bytes(const DecodeArguments& p) {
    return 16 * fragments_of(p) + 4 * channels_of(p);
  }
  static size_t bytes(const DecodeArguments& p, int64_t teams) {
    return sizeof(CodesShared) +
           std::max(4 * kRowTile * p.width + teams * team_bytes(p), int64_t{4 * kRowTile * kSlab});
  }
};

// A warp's softmax, of whose sums a lane has those of its own tokens.
class CodesAttention {
 public:
  __device__ __forceinline__ CodesAttention(const DeviceDecode& p, const Work& work, CodesShared& shared)
      : p_(p),
        work_(work),
        s_(p.segments[work.segment]),
        shared_(shared),
        key_bytes_(static_cast<int>(s_.keys.bytes())),
        value_bytes_(static_cast<int>(s_.values.bytes())),
        units_(static_cast<int>(p.width + kUnit - 1) / kUnit),
        apart_(p.apart[work.segment]),
        lane_(threadIdx.x % kWarp),
        warp_(threadIdx.x / kWarp),
        team_(apart_ ? warp_ : 0),
        g_(lane_ / 4),
        t_(lane_ % 4) {}

  __device__ __forceinline__ void run() {
    for (int i = threadIdx.x; i < kRowTile * p_.width; i += kDecodeThreads) {
      const int width = static_cast<int>(p_.width);
      shared_.queries()[i] = query(p_, work_, i / width, i % width);
    }
    float* const channels = shared_.channels(p_, team_);
    for (int d = rank(); d < CodesShared::channels_of(p_); d += size()) channels[d] = 1.0f;
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
        for (int d = rank(); d < p_.value_width; d += size()) channels[d] = float16_to_float(from[d]);
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
    for_each_block(s_, work_, shared_.block, attend_block, team_, apart_ ? kDecodeWarps : 1);
    merge();
  }

 private:
  // Of the threads that work on a block together: their number, the number of this one, and a barrier.
  __device__ __forceinline__ int size() const { return apart_ ? kWarp : kDecodeThreads; }
  __device__ __forceinline__ int rank() const { return apart_ ? lane_ : static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ void sync() const {
    if (apart_) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Fragments of q s, and the sums q . m; s = m = 1 where steps belong to tokens. Sixteen threads take a row. Products
  // stand where their fragments will, until their scaling is known.
  __device__ __forceinline__ void fold(const uint16_t* scales) {
#pragma unroll 1
    for (int row = rank() / 16; row < kRowTile; row += size() / 16) fold(scales, row, lane_ % 16);
  }

  __device__ __forceinline__ void fold(const uint16_t* scales, int row, int i) {
    const int planes = 8 / s_.keys.bits, number = 4 / planes, v = i / 4 / planes, plane = i / 4 % planes;
    uint4* const fragments = shared_.fragments(p_, team_) + i / 4 * kWarp + row * 4 + i % 4;
    float bias = 0.0f, most = 0.0f;
#pragma unroll 1
    for (int unit = 0; unit < units_; ++unit) {
      const int word = word_index(number, unit, 4, i % 4, v, p_.vectors);
      float x[4] = {};
      if (4 * word < key_bytes_) bias += products(scales, row, plane * key_bytes_ + 4 * word, x);
      most = fmaxf(fmaxf(most, fmaxf(absolute(x[0]), absolute(x[1]))), fmaxf(absolute(x[2]), absolute(x[3])));
      fragments[unit * 4 * kWarp] = {bit_cast<uint32_t>(x[0]), bit_cast<uint32_t>(x[1]), bit_cast<uint32_t>(x[2]),
                                     bit_cast<uint32_t>(x[3])};
    }
    for (int offset = 1; offset < 16; offset *= 2) {
      bias += __shfl_xor_sync(kAllLanes, bias, offset);
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
    }
    const Scaling scale = scaling(most);
    if (i == 0) shared_.down[team_][row] = scale.down, shared_.bias[team_][row] = bias;
#pragma unroll 1
    for (int unit = 0; unit < units_; ++unit) {
      const uint4 x = fragments[unit * 4 * kWarp];
      const HalfPairs even = split(bit_cast<float>(x.x) * scale.up, bit_cast<float>(x.z) * scale.up);
      const HalfPairs odd = split(bit_cast<float>(x.y) * scale.up, bit_cast<float>(x.w) * scale.up);
      fragments[unit * 4 * kWarp] = {even.high, odd.high, even.low, odd.low};
    }
  }

  // q s of four channels; returns their part of q . m.
  __device__ __forceinline__ float products(const uint16_t* scales, int row, int first, float (&x)[4]) {
    const int width = static_cast<int>(p_.width);
    const float4 q = *reinterpret_cast<const float4*>(&shared_.queries()[row * width + first]);
    const float values[4] = {q.x, q.y, q.z, q.w};
    float steps[4] = {1.0f, 1.0f, 1.0f, 1.0f}, minima[4] = {1.0f, 1.0f, 1.0f, 1.0f}, bias = 0.0f;
    if (scales != nullptr) {
      load_halves(scales + first, steps);
      load_halves(scales + width + first, minima);
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
    uint32_t codes[2][4][Code::number];
    if constexpr (kVectors) load_values<Code>(chunk, codes);  // on their way while the weights are made
    float weights[4][2], shifts[2], minima[2], down[2];
    logits<Code>(chunk, weights);
    softmax(weights, shifts);
    uint32_t high[4], low[4];
    fold_weights(chunk, weights, high, low, minima, down);
    if constexpr (!kVectors) load_values<Code>(chunk, codes);  // addresses of words apart take too many registers
    weigh<Code>(codes, high, low, shifts, minima, down);
  }

  // Of tokens 16 i + 2 t, the one after it, and the two 8 below.
  template <class Code>
  __device__ __forceinline__ void load_values(const Chunk& chunk, uint32_t (&codes)[2][4][Code::number]) {
    const uint8_t* from = shared_.value_codes + int64_t{chunk.first} * value_bytes_ + Code::offset(work_.slab, 8, g_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint8_t* row =
            from + chunk.row(16 * i + 2 * t_ + j % 2 + j / 2 * 8) * static_cast<unsigned>(value_bytes_);
        Code::load(row, value_bytes_ / 4, work_.slab, 8, g_, codes[i][j]);
      }
    }
  }

  // The lane has those of tokens 8 j + g.
  template <class Code>
  __device__ __forceinline__ void logits(const Chunk& chunk, float (&to)[4][2]) {
    const uint8_t* from = shared_.key_codes + int64_t{chunk.first} * key_bytes_ + Code::offset(0, 4, t_);
    const uint8_t* rows[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) rows[j] = from + chunk.row(8 * j + g_) * static_cast<unsigned>(key_bytes_);
    const uint4* fragment = shared_.fragments(p_, team_) + lane_;
    float sums[2][4] = {};
#pragma unroll 1
    for (int unit = 0; unit < units_; ++unit) {
      uint32_t codes[4][Code::number];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Code::load(rows[j] + Code::offset(unit, 4, 0), key_bytes_ / 4, unit, 4, t_, codes[j]);
      }
#pragma unroll
      for (int v = 0; v < Code::number; ++v) {
        Code::for_each_plane([&]<int plane>() {
          const uint4 q = fragment[((unit * Code::number + v) * Code::planes + plane) * kWarp];
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

  // Logits to weights relative to the largest one yet; what was summed before is to be multiplied by `shifts`.
  __device__ __forceinline__ void softmax(float (&weights)[4][2], float (&shifts)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = most_[r];
#pragma unroll
      for (int j = 0; j < 4; ++j) most = fmaxf(most, weights[j][r]);
      most = most_over_tokens(most);
      const float relative = reference(most);
      shifts[r] = exp_of_negative(most_[r] - relative);
      most_[r] = most;
      sum_[r] *= shifts[r];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weights[j][r] = exp_of_negative(weights[j][r] - relative);
        sum_[r] += weights[j][r];
      }
    }
  }

  // Fragments of p s, by what their sums are to be multiplied, and the sums of p m.
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
      const float most = fmaxf(fmaxf(weights[0][r], weights[1][r]), fmaxf(weights[2][r], weights[3][r]));
      const Scaling scale = scaling(most_over_tokens(most));
      up[r] = scale.up, down[r] = scale.down;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const HalfPairs pairs = split(weights[j][0] * up[0], weights[j][1] * up[1]);
      high[j] = transpose(pairs.high);
      low[j] = transpose(pairs.low);
    }
  }

  // Adds the weighted values, word by word of the lane g. A tile is of channels 2 half and 2 half + 1 of a word in a
  // plane.
  template <class Code>
  __device__ __forceinline__ void weigh(const uint32_t (&codes)[2][4][Code::number], const uint32_t (&high)[4],
                                        const uint32_t (&low)[4], const float (&shifts)[2], const float (&minima)[2],
                                        const float (&down)[2]) {
    const float* const channels = shared_.channels(p_, team_);
#pragma unroll
    for (int v = 0; v < Code::number; ++v) {
      const int word = word_index(Code::number, work_.slab, 8, g_, v, Code::vectors);
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
          add(out_[(v * 2 + half) * Code::planes + plane], channels + channel, sums[plane], shifts, minima, down);
        }
      }
    }
  }

  // The same two bytes of the codes of two tokens.
  __device__ __forceinline__ static uint32_t pair_of(uint32_t first, uint32_t second, int half) {
    return half == 0 ? (first & 0xffffu) | second << 16 : first >> 16 | (second & 0xffff0000u);
  }

  // out = out * shift + c (sum + minima), for two channels.
  __device__ __forceinline__ void add(float (&out)[4], const float* channels, const float (&sums)[4],
                                      const float (&shifts)[2], const float (&minima)[2], const float (&down)[2]) {
    const float2 c = *reinterpret_cast<const float2*>(channels);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float value = multiply_add(sums[k], down[k % 2], minima[k % 2]);
      out[k] = multiply_add(out[k], shifts[k % 2], (k < 2 ? c.x : c.y) * value);
    }
  }

  // Adds the warps' results, one after another: sums[i][lane] is number i of every lane's out_.
  __device__ __forceinline__ void merge() {
    const Partial to(p_, work_);
    float factors[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_over_tokens(sum_[r]);
      if (g_ == 0) shared_.most[warp_][2 * t_ + r] = most_[r], shared_.sum[warp_][2 * t_ + r] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * t_ + r;
      float most = -INFINITY, sum = 0.0f;
      for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, shared_.most[w][row]);
      for (int w = 0; w < kDecodeWarps; ++w) {
        sum = multiply_add(shared_.sum[w][row], exp_of_negative(shared_.most[w][row] - reference(most)), sum);
      }
      factors[r] = exp_of_negative(most_[r] - reference(most));
      if (warp_ == 0 && g_ == 0 && work_.slab == 0) to.most[row] = most, to.sum[row] = sum;
    }
    float* sums = shared_.queries();
    for (int w = 0; w < kDecodeWarps; ++w) {
      if (w == warp_) {
#pragma unroll
        for (int i = 0; i < kTilesOfSlab * 4; ++i) {
          float& at = sums[i * kWarp + lane_];
          at = multiply_add(out_[i / 4][i % 4], factors[i % 2], w == 0 ? 0.0f : at);
        }
      }
      __syncthreads();
    }
    write(sums, to.out);
  }

  // Puts the slab's channels in their order.
  __device__ __forceinline__ void write(const float* sums, float* to) const {
    const int planes = 8 / s_.values.bits, number = 4 / planes, width = static_cast<int>(p_.value_width);
    const int rows = static_cast<int>(work_.rows(p_));
    for (int i = threadIdx.x; i < rows * width; i += kDecodeThreads) {
      const int row = i / width, channel = i % width, byte = channel % value_bytes_, word = byte / 4;
      const int v = p_.vectors ? word % number : word / 8 % number, g = p_.vectors ? word / number % 8 : word % 8;
      if (word / (8 * number) != work_.slab) continue;
      const int tile = (v * 2 + byte % 4 / 2) * planes + channel / value_bytes_;
      to[i] = sums[(tile * 4 + byte % 2 * 2 + row % 2) * kWarp + g * 4 + row / 2];
    }
  }

  const DeviceDecode& p_;
  const Work& work_;
  const Segment& s_;
  CodesShared& shared_;
  const int key_bytes_, value_bytes_, units_;
  const bool apart_;
  const int lane_, warp_, team_, g_, t_;
  float most_[2] = {-INFINITY, -INFINITY}, sum_[2] = {};
  float out_[kTilesOfSlab][4] = {};
};

}  // namespace singlepass::kv
