// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "singlepass/common/mma.h"

// Codes of a token as lanes of a warp load them, in words of four bytes, and as tensor cores take them. A lane has so
// many words of a part of a row that they hold sixteen codes.
namespace singlepass::kv {

// The number of word v that a lane loads of a part of a token's codes, out of `number`: neighbours where they make an
// aligned vector, else words apart.
__device__ __forceinline__ int word_index(int number, int part, int lanes, int lane, int v, bool vectors) {
  return vectors ? (part * lanes + lane) * number + v : (part * number + v) * lanes + lane;
}

template <int kBits>
struct CodeWords {
  static constexpr int planes = 8 / kBits, number = 4 / planes;

  // Words that are not there are zeros.
  __device__ __forceinline__ static void load(const uint8_t* row, int words, int part, int lanes, int lane,
                                              bool vectors, uint32_t (&to)[number]) {
    const uint8_t* from = global_memory(row) + 4 * word_index(number, part, lanes, lane, 0, vectors);
    if (!vectors) {
#pragma unroll
      for (int v = 0; v < number; ++v) {
        const bool there = word_index(number, part, lanes, lane, v, false) < words;
        to[v] = there ? load_word(from + 4 * v * lanes) : 0;
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

  __device__ __forceinline__ static uint32_t load_word(const uint8_t* from) {
    if (reinterpret_cast<uintptr_t>(from) % 4 == 0) return *reinterpret_cast<const uint32_t*>(from);
    return from[0] | from[1] << 8 | from[2] << 16 | static_cast<uint32_t>(from[3]) << 24;
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
