// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda.h"
#include "common/dtype.h"

// Codes as tensor cores take them, four in a register. A row of codes (one token) is read in words of four bytes, in
// each of which every plane has the codes of four channels.
namespace singlepass::kv {

template <int kBits>
struct CodeWords {
  static constexpr int planes = 8 / kBits;
  static constexpr int words = 4 / planes;  // that sixteen channels fill

  // The codes of a plane where they stand, times 2^(kBits * plane).
  __device__ __forceinline__ static uint32_t in_place(uint32_t word, int plane) {
    constexpr uint32_t kCodes = (1u << kBits) - 1;
    return word & kCodes * 0x01010101u << (kBits * plane);
  }

  // Shifted only by whole half bytes: planes `plane` and plane + 2 come out alike.
  __device__ __forceinline__ static uint32_t in_half_byte(uint32_t word, int plane) {
    return in_place(word >> (plane / 2 * 4), plane % 2);
  }
};

// The words of four tokens as four words of one byte of each: a transpose.
__device__ __forceinline__ void transpose_bytes(uint32_t (&x)[4]) {
  const uint32_t a = __byte_perm(x[0], x[1], 0x5140), b = __byte_perm(x[0], x[1], 0x7362);
  const uint32_t c = __byte_perm(x[2], x[3], 0x5140), d = __byte_perm(x[2], x[3], 0x7362);
  x[0] = __byte_perm(a, c, 0x5410), x[1] = __byte_perm(a, c, 0x7632);
  x[2] = __byte_perm(b, d, 0x5410), x[3] = __byte_perm(b, d, 0x7632);
}

// Loads kWords neighbouring words, aligned to as many.
template <int kWords>
__device__ __forceinline__ void load_words(const uint8_t* from, uint32_t* to) {
  from = global_memory(from);
  if constexpr (kWords == 1) {
    to[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kWords == 2) {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    to[0] = two.x, to[1] = two.y;
  } else {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
}

// Loads four neighbouring float16, aligned to 8 bytes.
__device__ __forceinline__ void load_halves(const uint16_t* from, float (&to)[4]) {
  uint2 pairs;
  memcpy(&pairs, __builtin_assume_aligned(global_memory(from), 8), sizeof(pairs));
  to[0] = float16_to_float(static_cast<uint16_t>(pairs.x));
  to[1] = float16_to_float(static_cast<uint16_t>(pairs.x >> 16));
  to[2] = float16_to_float(static_cast<uint16_t>(pairs.y));
  to[3] = float16_to_float(static_cast<uint16_t>(pairs.y >> 16));
}

// Step and minimum of a token that has one group, as they are loaded, aligned to 4 bytes.
__device__ __forceinline__ uint32_t load_steps(const uint16_t* scales, unsigned token) {
  uint32_t pair;
  memcpy(&pair, __builtin_assume_aligned(global_memory(scales) + 2 * token, 4), sizeof(pair));
  return pair;
}

__device__ __forceinline__ float step_of(uint32_t pair) {
  return float16_to_float(static_cast<uint16_t>(pair));
}

__device__ __forceinline__ float minimum_of(uint32_t pair) {
  return float16_to_float(static_cast<uint16_t>(pair >> 16));
}

}  // namespace singlepass::kv
