// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/math.h"
#include "common/reduce.h"

// Numbers as integers in two signed bytes ("limbs"), which tensor cores multiply: n = 256 high + low. Where that is too
// coarse, for float32, a second such integer takes what the first leaves over, in units of its step / largest.
namespace singlepass::kv {

// A number x stands for the integer nearest to x * up, times step.
struct Rounding {
  float up, step;
};

// For numbers of magnitudes up to `top`, which becomes `largest`; inverse: 1 / largest. The step is NaN if top is not
// finite. Below 2^-100 all become 0. A quarter of top has a reciprocal that is not too small.
__device__ __forceinline__ Rounding rounding(float top, float largest, float inverse) {
  const float up = top >= 0x1p-100f ? 0.25f * largest * reciprocal(0.25f * top) : 0.0f;
  return {up, top < INFINITY ? top * inverse : NAN};
}

// Adding it rounds to an integer, whose limbs then stand in the lower bytes: the higher one as it is, thanks to the
// 128, the lower one with its uppermost bit flipped.
inline constexpr float kLimbRounder = 12582912.0f + 128.0f;

template <int kHalves>
__device__ __forceinline__ void to_limbs(float x, float up, float largest, uint32_t (&n)[kHalves]) {
  if constexpr (kHalves == 1) {
    n[0] = bit_cast<uint32_t>(multiply_add(x, up, kLimbRounder));
  } else {
    const float scaled = x * up, rounded = scaled + kLimbRounder;
    n[0] = bit_cast<uint32_t>(rounded);
    n[1] = bit_cast<uint32_t>(multiply_add(scaled - (rounded - kLimbRounder), largest, kLimbRounder));
  }
}

inline constexpr uint32_t kFlipped = 0x80808080u;  // the uppermost bits of four lower limbs

// The sum of products with integers, in units of their step, from those with high and with low limbs.
template <int kHalves>
__device__ __forceinline__ float from_limbs(const int (&high)[kHalves], const int (&low)[kHalves], float inverse) {
  const float sum = static_cast<float>(high[0] * 256 + low[0]);
  if constexpr (kHalves == 1) return sum;
  return multiply_add(static_cast<float>(high[kHalves - 1] * 256 + low[kHalves - 1]), inverse, sum);
}

// The limbs of four numbers, in the order of the numbers.
struct LimbWords {
  uint32_t high, low;

  __device__ __forceinline__ LimbWords(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);
    high = __byte_perm(ab, cd, 0x7632);
    low = __byte_perm(ab, cd, 0x5410) ^ kFlipped;
  }
};

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return maximum(a, b); }
};

// Reduces over all lanes for each row. Lane l gets the result of row l / (kWarp / kRows).
template <int kRows, class Op>
__device__ __forceinline__ float reduce_rows(float (&rows)[kRows], const Op& op) {
  int offset = kWarp / 2;
#pragma unroll
  for (int n = kRows / 2; n > 0; n /= 2, offset /= 2) {  // lanes of either half go on with half of the rows
    const bool upper = (threadIdx.x & offset) != 0;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float own = upper ? rows[k + n] : rows[k], other = upper ? rows[k] : rows[k + n];
      rows[k] = op(own, __shfl_xor_sync(kAllLanes, other, offset));
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) rows[0] = op(rows[0], __shfl_xor_sync(kAllLanes, rows[0], offset));
  return rows[0];
}

// Reduces over the lanes with the same t = lane % 4, each of which has tokens of its own.
template <class Op>
__device__ __forceinline__ float over_tokens(float x, const Op& op) {
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

}  // namespace singlepass::kv
