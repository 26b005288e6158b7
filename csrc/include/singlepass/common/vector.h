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

SINGLEPASS_HD void store_vector(Vector v, float* to) {
  memcpy(to, &v, sizeof(v));
}

SINGLEPASS_HD Vector absolute(Vector v) {
  VectorBits bits;
  memcpy(&bits, &v, sizeof(bits));
  bits &= 0x7fffffff;
  memcpy(&v, &bits, sizeof(bits));
  return v;
}

}  // namespace singlepass
