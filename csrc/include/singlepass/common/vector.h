// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

#include "singlepass/common/macros.h"

namespace singlepass {

// Eight floats that the host's compiler works on together, whatever registers the machine has: sums over lanes come out
// the same on all of them. How vectors are passed depends on the registers, so what takes them is inlined.
inline constexpr int kLanes = 8;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t VectorBits __attribute__((vector_size(4 * kLanes)));

SINGLEPASS_HD Vector load_vector(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof(v));
  return v;
}

// Eight bytes, each in a lane of its own. Compilers know this loop; a conversion of vectors they make byte by byte.
SINGLEPASS_HD VectorBits load_bytes(const uint8_t* from) {
  int32_t lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = from[k];
  VectorBits v;
  memcpy(&v, lanes, sizeof(v));
  return v;
}

SINGLEPASS_HD void store_vector(Vector v, float* to) {
  memcpy(to, &v, sizeof(v));
}

// The lane sums of eight vectors.
SINGLEPASS_HD Vector lane_sums(const Vector (&v)[8]) {
  Vector pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    quads[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

SINGLEPASS_HD Vector absolute(Vector v) {
  VectorBits bits;
  memcpy(&bits, &v, sizeof(bits));
  bits &= 0x7fffffff;
  memcpy(&v, &bits, sizeof(bits));
  return v;
}

}  // namespace singlepass
