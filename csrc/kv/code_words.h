// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "common/mma.h"
#include "common/reduce.h"

// Codes of a token as lanes of a warp load them, in words of four bytes, and as tensor cores take them. A lane has so
// many words of a part of a row that they hold sixteen codes.
namespace singlepass::kv {

// Over the lanes g of a warp, which have tokens of their own.
__device__ __forceinline__ float sum_over_tokens(float x) {
  for (int offset = 4; offset < kWarp; offset *= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ __forceinline__ float most_over_tokens(float x) {
  for (int offset = 4; offset < kWarp; offset *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Four neighbours, which are aligned.
__device__ __forceinline__ void load_halves(const uint16_t* from, float (&to)[4]) {
  uint2 pairs;
  memcpy(&pairs, __builtin_assume_aligned(global_memory(from), 8), sizeof(pairs));
  to[0] = float16_to_float(static_cast<uint16_t>(pairs.x)),
  to[1] = float16_to_float(static_cast<uint16_t>(pairs.x >> 16));
  to[2] = float16_to_float(static_cast<uint16_t>(pairs.y)),
  to[3] = float16_to_float(static_cast<uint16_t>(pairs.y >> 16));
}

// Step and minimum of a token whose channels are one group; they are aligned.
__device__ __forceinline__ float2 steps_of_token(const uint16_t* scales, unsigned token) {
  uint32_t pair;
  memcpy(&pair, __builtin_assume_aligned(global_memory(scales) + 2 * token, 4), sizeof(pair));
  return {float16_to_float(static_cast<uint16_t>(pair)), float16_to_float(static_cast<uint16_t>(pair >> 16))};
}

// Tokens of a block from `first` on. The last one stands for those that would follow it, without a weight.
struct Chunk {
  int first, count;

  __device__ __forceinline__ unsigned row(int i) const { return static_cast<unsigned>(i < count ? i : count - 1); }
};

// The number of word v that a lane loads of a part of a token's codes, out of `number`: neighbours, where all parts are
// whole and aligned, else words apart.
__device__ __forceinline__ int word_index(int number, int part, int lanes, int lane, int v, bool vectors) {
  return vectors ? (part * lanes + lane) * number + v : (part * number + v) * lanes + lane;
}

template <int kBits, bool kVectors>
struct CodeWords {
  static constexpr int planes = 8 / kBits, number = 4 / planes;
  static constexpr bool vectors = kVectors;

  // Where a lane's words of a part begin, in each row.
  __device__ __forceinline__ static int offset(int part, int lanes, int lane) {
    return kVectors ? 4 * word_index(number, part, lanes, lane, 0, true) : 0;
  }

  // Of a row from there on. The last word of a row stands for those that would follow it.
  __device__ __forceinline__ static void load(const uint8_t* from, int words, int part, int lanes, int lane,
                                              uint32_t (&to)[number]) {
    from = global_memory(from);
    if constexpr (!kVectors) {
#pragma unroll
      for (int v = 0; v < number; ++v) {
        const int word = word_index(number, part, lanes, lane, v, false);
        to[v] = *reinterpret_cast<const uint32_t*>(from + 4 * (word < words ? word : words - 1));
      }
    } else if constexpr (number == 1) {
      to[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (number == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      to[0] = two.x, to[1] = two.y;
    } else {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    }
  }

  template <class Body>
  __device__ __forceinline__ static void for_each_plane(const Body& body) {
    body.template operator()<0>();
    if constexpr (planes > 1) body.template operator()<1>();
    if constexpr (planes > 2) body.template operator()<2>(), body.template operator()<3>();
  }

  // Codes of a plane that stand in bytes 0 and 2 of x, or in bytes 1 and 3.
  template <int plane, int byte>
  __device__ __forceinline__ static uint32_t halves(uint32_t x) {
    return codes_to_halves<kBits, plane * kBits, byte>(x);
  }
};

}  // namespace singlepass::kv
