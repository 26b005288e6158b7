// SPDX-License-Identifier: Apache-2.0
#include "common/convert.h"

#include "common/vector.h"

#if defined(SINGLEPASS_HAS_TARGETS)
#include <immintrin.h>
#endif

// Copies are left out where there is nothing to copy: then there may be no memory either, which memcpy is not to see.
namespace singlepass {

#if defined(SINGLEPASS_HAS_TARGETS)
namespace {

// The float16 that fill vectors, by an instruction that compilers do not choose by themselves. Returns how many.
SINGLEPASS_TARGET_AVX2 int64_t widen_vectors(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  return i;
}

}  // namespace
#endif

SINGLEPASS_TARGET_CLONES void widen(const void* from, DType dtype, float* to, int64_t n) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  if (dtype == DType::kFloat32) {
    if (n > 0) memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(half[i]);
  } else {
    int64_t done = 0;
#if defined(SINGLEPASS_HAS_TARGETS)
    if (has_avx2()) done = widen_vectors(half, n, to);
#endif
#pragma GCC ivdep
    for (int64_t i = done; i < n; ++i) to[i] = float16_to_float(half[i]);
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
