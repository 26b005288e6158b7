// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "common/mma.h"
#include "common/reduce.h"

// How the lanes of a warp load the codes of tokens and unpack them for tensor cores. A row of codes (one token) is
// loaded part by part; a part is a key tile or a value tile. `lanes` lanes share a part of a row, and each loads
// sixteen codes of it, as words of four bytes.
namespace singlepass::kv {

// Sum and maximum over the lanes with the same t, each of which has tokens of its own.
__device__ __forceinline__ float sum_over_tokens(float x) {
  for (int offset = 4; offset < kWarp; offset *= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ __forceinline__ float max_over_tokens(float x) {
  for (int offset = 4; offset < kWarp; offset *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Loads four neighbouring float16, aligned to 8 bytes.
__device__ __forceinline__ void load_halves(const uint16_t* from, float (&to)[4]) {
  uint2 pairs;
  memcpy(&pairs, __builtin_assume_aligned(global_memory(from), 8), sizeof(pairs));
  to[0] = float16_to_float(static_cast<uint16_t>(pairs.x)),
  to[1] = float16_to_float(static_cast<uint16_t>(pairs.x >> 16));
  to[2] = float16_to_float(static_cast<uint16_t>(pairs.y)),
  to[3] = float16_to_float(static_cast<uint16_t>(pairs.y >> 16));
}

// Loads the step and the minimum of a token that has one group, aligned to 4 bytes.
__device__ __forceinline__ float2 steps_of_token(const uint16_t* scales, unsigned token) {
  uint32_t pair;
  memcpy(&pair, __builtin_assume_aligned(global_memory(scales) + 2 * token, 4), sizeof(pair));
  return {float16_to_float(static_cast<uint16_t>(pair)), float16_to_float(static_cast<uint16_t>(pair >> 16))};
}

// Tokens [first, first + count) of a block. Where a warp needs more, row() repeats the last one, whose copies get no
// weight.
struct Chunk {
  int first, count;

  __device__ __forceinline__ unsigned row(int i) const { return static_cast<unsigned>(i < count ? i : count - 1); }
};

// Which word of a row a lane loads as word v of its num_words words of a part. With vectors, a lane's words are
// neighbours and loaded at once. Otherwise the lanes' words alternate, so that each load of the lanes is contiguous.
__device__ __forceinline__ int word_index(int num_words, int part, int lanes, int lane, int v, bool vectors) {
  return vectors ? (part * lanes + lane) * num_words + v : (part * num_words + v) * lanes + lane;
}

// kVectors: all parts of a row are whole, and aligned for vector loads.
template <int kBits, bool kVectors>
struct CodeWords {
  static constexpr int planes = 8 / kBits, num_words = 4 / planes;
  static constexpr bool vectors = kVectors;

  // Bytes from the beginning of a row to the lane's words of a part. Without vectors it is 0: load() then adds them.
  __device__ __forceinline__ static int offset(int part, int lanes, int lane) {
    return kVectors ? 4 * word_index(num_words, part, lanes, lane, 0, true) : 0;
  }

  // Loads a lane's words of a part. `from` is the row plus offset(), and the row has `words` words. A word beyond the
  // last one repeats it; results do not depend on it.
  __device__ __forceinline__ static void load(const uint8_t* from, int words, int part, int lanes, int lane,
                                              uint32_t (&to)[num_words]) {
    from = global_memory(from);
    if constexpr (!kVectors) {
#pragma unroll
      for (int v = 0; v < num_words; ++v) {
        const int word = word_index(num_words, part, lanes, lane, v, false);
        to[v] = *reinterpret_cast<const uint32_t*>(from + 4 * (word < words ? word : words - 1));
      }
    } else if constexpr (num_words == 1) {
      to[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (num_words == 2) {
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

  // Two codes of a plane as a pair of float16: those in bytes 0 and 2 of x (byte = 0), or in bytes 1 and 3 (byte = 1).
  template <int plane, int byte>
  __device__ __forceinline__ static uint32_t halves(uint32_t x) {
    return codes_to_halves<kBits, plane * kBits, byte>(x);
  }
};

}  // namespace singlepass::kv
