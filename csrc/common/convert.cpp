// SPDX-License-Identifier: Apache-2.0
#include "common/convert.h"

// Copies are left out where there is nothing to copy: then there may be no memory either, which memcpy is not to see.
namespace singlepass {

SINGLEPASS_TARGET_CLONES void widen(const void* from, DType dtype, float* to, int64_t n) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  if (dtype == DType::kFloat32) {
    if (n > 0) memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(half[i]);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = float16_to_float(half[i]);
  }
}

SINGLEPASS_TARGET_CLONES void narrow(const float* from, void* to, DType dtype, int64_t n) {
  uint16_t* half = static_cast<uint16_t*>(to);
  if (dtype == DType::kFloat32) {
    if (n > 0) memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) half[i] = float_to_bfloat16(from[i]);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) half[i] = float_to_float16(from[i]);
  }
}

}  // namespace singlepass
