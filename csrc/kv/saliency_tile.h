// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "common/math.h"
#include "common/mma.h"
#include "common/reduce.h"
#include "kv/problem.h"
#include "kv/runs.h"

// A tile of logits is (kSaliencyTile rows, kSaliencyTile tokens), of which a warp has 16 rows. Lane (g, t) = (lane / 4,
// lane % 4) holds rows g and g + 8 of those, and tokens 2 t and 2 t + 1 of every 8.
namespace singlepass::kv {

inline constexpr int kSaliencyThreads = 128, kWarps = kSaliencyThreads / kWarp;
inline constexpr int kSaliencyTile = 64;            // rows and tokens of a tile
inline constexpr int kUnit = 32;                    // channels that a lane takes four words of
inline constexpr int kColumns = kSaliencyTile / 8;  // groups of 8 tokens; a lane holds two tokens of each
inline constexpr float kInfinity = INFINITY;

struct DeviceSaliency : Saliency {
  bool q_vectors, k_vectors;
  int64_t rows, spans, span;  // rows of a head, spans of its keys, tokens of a span
  float2* partials;           // (batch, heads, rows, spans): row max and sum of exp(logit - row max)
  float* made_lse;            // (batch, heads, rows), where lse is not given
  unsigned* tickets;          // of tiles of rows
};

// Thread blocks per multiprocessor, at least; registers are limited to fit them.
template <int kParts>
inline constexpr int kBlocks = kParts == 1 ? 3 : 2;

// Channels in shared memory at a time.
template <int kParts>
inline constexpr int kChannels = kParts == 1 ? 128 : kUnit;

// Operands of MMAs. Each number is a sum of kParts 16-bit parts: each part is what the parts before it leave, rounded.
// Three bfloat16 parts hold a float32 exactly; a 16-bit number needs one part. Lane (g, t) has four words, which are
// pairs of channels, of every unit of a row. Keys stand as rows. Queries stand as what the lanes of a warp take for an
// MMA: two words of row g and two of row g + 8 by turns. What is added makes neighbours lie in different banks.
template <int kParts>
struct alignas(16) KeyParts {
  uint32_t pairs[kParts][kSaliencyTile][kChannels<kParts> / 2 + (kParts == 1 ? 16 : 0)];
};

template <int kParts>
struct QueryParts {
  uint4 words[kParts][kWarps][kChannels<kParts> / kUnit][2 * kWarp + 4];  // of the unit's first MMA, then of its second
};

template <int kParts>
struct SaliencyShared {
  QueryParts<kParts> q;
  KeyParts<kParts> k;
  const char* rows[kSaliencyTile];  // of q
  int visible[kSaliencyTile];       // a row sees the tokens before this one that are not padding
  float lse[kSaliencyTile];
  bool is_token[kSaliencyTile];
  float sums[kWarps][kSaliencyTile];
};

// Eight channels of a token: pairs of 16-bit numbers that are neighbours or, if they have several parts, floats, of
// which four are from c on and four from c + kUnit / 2 on, so that the lanes' loads of float32 are neighbours. Channels
// beyond head_dim are zeros.
template <int kParts, DType kDType>
__device__ __forceinline__ void load_channels(const char* token, DType dtype, bool vectors, int64_t c, int64_t head_dim,
                                              Raw<kVector>& raw) {
  raw = {};
  if constexpr (kParts == 1) {
    if (c < head_dim && vectors) load(token, kDType, c, raw);
    if (c < head_dim && !vectors) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        Raw<1> one;
        load(token, kDType, c + k, one);
        raw.bits[k / 2] |= one.bits[0] << (16 * (k % 2));
      }
    }
  } else {
    float x[kVector] = {};
    const int64_t size = size_of(dtype), second = c + kUnit / 2;
    if (c < head_dim) load_run<4>(token + c * size, dtype, vectors, x);
    if (second < head_dim) load_run<4>(token + second * size, dtype, vectors, x + 4);
    raw = encode_any_nan<kVector>(x, DType::kFloat32);
  }
}

template <int kParts, DType kDType>
__device__ __forceinline__ void split_parts(const Raw<kVector>& raw, uint4 (&parts)[kParts]) {
  if constexpr (kParts == 1) {
    parts[0] = {raw.bits[0], raw.bits[1], raw.bits[2], raw.bits[3]};
  } else {
    float x[kVector];
    decode(raw, DType::kFloat32, x);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t pairs[kVector / 2];
#pragma unroll
      for (int k = 0; k < kVector; k += 2) {
        const uint32_t pair = pairs[k / 2] = pack_pair(x[k], x[k + 1], kDType);
        x[k] -= element_of(pair, 0, kDType);
        x[k + 1] -= element_of(pair, 1, kDType);
      }
      parts[part] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
}

// A tile of logits, of a tile of rows and one of tokens, by their numbers. The stages are called by all threads of the
// thread block together.
template <int kParts, DType kDType>
class SaliencyTile {
 public:
  __device__ __forceinline__ SaliencyTile(const DeviceSaliency& p, SaliencyShared<kParts>& shared, int64_t head)
      : p_(p),
        shared_(shared),
        b_(static_cast<int>(head / p.heads)),
        h_(static_cast<int>(head % p.heads)),
        warp_(threadIdx.x / kWarp),
        g_(threadIdx.x % kWarp / 4),
        t_(threadIdx.x % 4) {}

  // Stage 1: finds out which tokens exist, and how far each row sees: up to its probe's position, or nothing if the
  // probe itself is padding. Returns, in every thread, whether any row sees any of the tokens.
  __device__ __forceinline__ bool look(int row_tile, int token_tile) {
    const int64_t row = int64_t{row_tile} * kSaliencyTile, first = int64_t{token_tile} * kSaliencyTile;
    const int i = static_cast<int>(threadIdx.x) % kSaliencyTile;
    __syncthreads();
    if (threadIdx.x >= kSaliencyTile) {
      shared_.is_token[i] = first + i < p_.tokens && is_token(first + i);
    } else if (row_tile != row_tile_) {
      // The last row stands in for those that do not exist.
      const int64_t own = row + i < p_.rows ? row + i : p_.rows - 1, head = own / p_.probes, probe = own % p_.probes;
      const int64_t position = p_.positions[probe];
      shared_.rows[i] = p_.q.at(b_, h_ * p_.group_size + head, probe);
      shared_.visible[i] = row + i < p_.rows && is_token(position) ? static_cast<int>(position) + 1 : 0;
    }
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, before = static_cast<int>(first);
    const int low = shared_.visible[lane] - before, high = shared_.visible[lane + kWarp] - before;
    const bool tokens = shared_.is_token[lane] && shared_.is_token[lane + kWarp];
    is_whole_ = __all_sync(kAllLanes, tokens && low >= kSaliencyTile && high >= kSaliencyTile);
    return __any_sync(kAllLanes, low > 0 || high > 0);
  }

  // Stage 2: logits of the warp, (16 rows, kSaliencyTile tokens). to[c][i] belongs to token 8 c + 2 t + i % 2 and to
  // row g (i < 2) or g + 8 (i >= 2); it is -inf if the row does not see the token.
  __device__ __forceinline__ void logits(int row_tile, int token_tile, float (&to)[kColumns][4]) {
    const int64_t first = int64_t{token_tile} * kSaliencyTile;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) to[c][0] = to[c][1] = to[c][2] = to[c][3] = 0.0f;
    // q . k, kChannels channels at a time. If these are all, an operand stays where it is as long as it is the same.
    // The last token stands in for those that do not exist; their logits are masked below.
    for (int64_t channel = 0; channel < p_.head_dim; channel += kChannels<kParts>) {
      const bool all = kParts == 1 && p_.head_dim <= kChannels<kParts>;
      const int64_t left = p_.head_dim - channel < kChannels<kParts> ? p_.head_dim - channel : kChannels<kParts>;
      const int units = kChannels<kParts> == kUnit ? 1 : static_cast<int>((left + kUnit - 1) / kUnit);
      if (channel > 0) __syncthreads();
      const bool queries = !all || row_tile != row_tile_;
      const bool keys = !all || token_tile != token_tile_;
      if constexpr (kParts == 1) {  // one of them at a time: both take more registers than there are
        if (queries) bring(true, false, first, channel, units);
        if (keys) bring(false, true, first, channel, units);
      } else {
        bring(queries, keys, first, channel, units);
      }
      __syncthreads();
      for (int unit = 0; unit < units; ++unit) multiply(unit, to);
    }
    row_tile_ = row_tile, token_tile_ = token_tile;
    if (p_.softcap > 0.0f) {
      const float inverse = 1.0f / p_.softcap;
#pragma unroll
      for (int k = 0; k < kColumns * 4; ++k) {
        float& logit = to[k / 4][k % 4];
        logit = p_.softcap * tanhf(logit * p_.scale * inverse);
      }
    }
    // The scale, unless the softcap has applied it, and the mask.
    const float factor = p_.softcap > 0.0f ? 1.0f : p_.scale;
#pragma unroll
    for (int k = 0; k < kColumns * 4; ++k) to[k / 4][k % 4] *= factor;
    if (is_whole_) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * c + 2 * t_ + i % 2;
        const bool seen = first + token < shared_.visible[own_row(i / 2)] && shared_.is_token[token];
        to[c][i] = seen ? to[c][i] : -kInfinity;
      }
    }
  }

  // The row of the tile to which the lane's logits to[c][2 i] and to[c][2 i + 1] belong.
  __device__ __forceinline__ int own_row(int i) const { return warp_ * 16 + g_ + 8 * i; }

 private:
  __device__ __forceinline__ bool is_token(int64_t t) const {
    return p_.mask == nullptr || p_.mask[b_ * p_.mask_stride + t];
  }

  // A thread brings one vector of channels of kBrought rows to shared memory, kTogether at a time. Threads side by side
  // have neighbours of a row; a thread's rows are 8 apart, and come in twos that belong to the same MMA.
  static constexpr int kVectors = kChannels<kParts> / kVector, kBrought = kSaliencyTile * kVectors / kSaliencyThreads;
  static constexpr int kTogether = kParts == 1 ? 4 : 2;  // rows whose loads are in flight at once

  __device__ __forceinline__ static int vector() { return static_cast<int>(threadIdx.x) % kVectors; }

  __device__ __forceinline__ static int brought_row(int i) {
    const int own = static_cast<int>(threadIdx.x) / kVectors;
    return own / 8 * 16 + own % 8 + 8 * i;
  }

  __device__ __forceinline__ void bring(bool queries, bool keys, int64_t first, int64_t channel, int units) {
    if (vector() >= units * 4) return;
    const int64_t c = channel + vector() * (kParts == 1 ? kVector : kVector / 2);
    const char* const tokens = p_.k.at(b_, h_, first);
    const int64_t stride = p_.k.token_stride * size_of(p_.k.dtype);
    const int last = static_cast<int>(p_.tokens - first < kSaliencyTile ? p_.tokens - first : kSaliencyTile) - 1;
    const auto token = [&](int i) { return tokens + (i < last ? i : last) * stride; };
#pragma unroll 1
    for (int i = 0; i < kBrought; i += kTogether) {
      Raw<kVector> q[kTogether], k[kTogether];
      if (queries) load_rows(p_.q, p_.q_vectors, [&](int row) { return shared_.rows[row]; }, i, c, q);
      if (keys) load_rows(p_.k, p_.k_vectors, token, i, c, k);
      if (queries) store_queries(q, i);
      if (keys) store_keys(k, i);
    }
  }

  // From the thread's i-th row on.
  template <class Address>
  __device__ __forceinline__ void load_rows(const Tokens& from, bool vectors, const Address& address, int i, int64_t c,
                                            Raw<kVector> (&raw)[kTogether]) const {
    if (vectors) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        load_channels<kParts, kDType>(address(brought_row(i + k)), from.dtype, true, c, p_.head_dim, raw[k]);
      }
    } else {
      SINGLEPASS_APART(0);  // else vectors wait for what single elements do not load
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        load_channels<kParts, kDType>(address(brought_row(i + k)), from.dtype, false, c, p_.head_dim, raw[k]);
      }
    }
  }

  __device__ __forceinline__ void store_keys(const Raw<kVector> (&raw)[kTogether], int i) {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      uint4 parts[kParts];
      split_parts<kParts, kDType>(raw[k], parts);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        *reinterpret_cast<uint4*>(&shared_.k.pairs[part][brought_row(i + k)][vector() * 4]) = parts[part];
      }
    }
  }

  __device__ __forceinline__ void store_queries(const Raw<kVector> (&raw)[kTogether], int i) {
#pragma unroll
    for (int k = 0; k < kTogether; k += 2) {
      uint4 low[kParts], high[kParts];  // rows g and g + 8
      split_parts<kParts, kDType>(raw[k], low);
      split_parts<kParts, kDType>(raw[k + 1], high);
      const int row = brought_row(i + k), lane = row % 8 * 4 + vector() % 4;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        auto& to = shared_.q.words[part][row / 16][vector() / 4];
        to[lane] = {low[part].x, high[part].x, low[part].y, high[part].y};
        to[kWarp + lane] = {low[part].z, high[part].z, low[part].w, high[part].w};
      }
    }
  }

  // Adds the products of a unit of channels, which two MMAs take. Which of them stand where does not matter, as it is
  // the same of q and k. Parts i of q and j of k are multiplied only if i + j < kParts: the other products are below
  // the precision of float32.
  __device__ __forceinline__ void multiply(int unit, float (&to)[kColumns][4]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    uint4 q[kParts][2];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      q[part][0] = shared_.q.words[part][warp_][unit][lane];
      q[part][1] = shared_.q.words[part][warp_][unit][kWarp + lane];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int other = 0; other < kParts; ++other) {
        const uint32_t* const pairs = &shared_.k.pairs[other][8 * c + g_][unit * kUnit / 2 + t_ * 4];
        const uint4 k = *reinterpret_cast<const uint4*>(pairs);
#pragma unroll
        for (int part = 0; part < kParts - other; ++part) {
          const uint4 first = q[part][0], second = q[part][1];
          multiply_accumulate<kDType>(to[c], {first.x, first.y, first.z, first.w}, k.x, k.y);
          multiply_accumulate<kDType>(to[c], {second.x, second.y, second.z, second.w}, k.z, k.w);
        }
      }
    }
  }

  const DeviceSaliency& p_;
  SaliencyShared<kParts>& shared_;
  const int b_, h_, warp_, g_, t_;
  int row_tile_ = -1, token_tile_ = -1;  // of the operands in shared memory
  bool is_whole_ = false;                // whether all rows see all tokens
};

}  // namespace singlepass::kv
