// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "singlepass/common/dtype.h"

// Uniform quantisation of one group of numbers: x^ = code * step + minimum, both in float16, the minimum rounded down
// and the step up, so that they cover the group and no element is off by more than half a step.
namespace singlepass::kv {

inline constexpr float kLargest = 65504.0f;  // of float16; larger magnitudes count as this

SINGLEPASS_HD float clamped(float x) {
  return x < -kLargest ? -kLargest : (x > kLargest ? kLargest : x);
}

// The largest float16 that is not above x, for |x| <= 65504. Zeros are positive.
SINGLEPASS_HD uint16_t half_at_most(float x) {
  const uint16_t nearest = float_to_float16(x);
  const bool above = float16_to_float(nearest) > x, zero = (nearest & 0x7fffu) == 0;
  if (zero) return above ? 0x8001u : 0;
  if (!above) return nearest;
  return static_cast<uint16_t>(nearest & 0x8000u ? nearest + 1 : nearest - 1);
}

SINGLEPASS_HD uint16_t half_at_least(float x) {
  const uint16_t opposite = half_at_most(-x);
  return opposite == 0 ? 0 : opposite ^ 0x8000u;
}

struct Steps {
  uint16_t step, minimum;  // float16
};

inline constexpr uint16_t kNaN = 0x7e00u;

// For a group within [low, high]; `finite` is false if something in it is not.
SINGLEPASS_HD Steps steps(float low, float high, bool finite, int bits) {
  if (!finite) return {kNaN, kNaN};
  const uint16_t minimum = half_at_most(low);
  const float levels = static_cast<float>((1 << bits) - 1);
  return {half_at_least((high - float16_to_float(minimum)) / levels), minimum};
}

// What (x - minimum) is multiplied by to give a code; 0 for a group of equal or of invalid numbers.
SINGLEPASS_HD float inverse(uint16_t step) {
  const float s = float16_to_float(step);
  return s > 0.0f ? 1.0f / s : 0.0f;
}

// The nearest code, ties to even; 0 for NaN. Adding 1.5 * 2^23 leaves the integer in the low bits.
SINGLEPASS_HD uint32_t encode(float x, float minimum, float inverse, float levels) {
  float n = (x - minimum) * inverse;
  n = n > 0.0f ? n : 0.0f;
  n = n < levels ? n : levels;
  return bit_cast<uint32_t>(n + 12582912.0f) - 0x4b400000u;
}

// By what a channel is divided: the square root of its largest magnitude, 1 if that is 0.
SINGLEPASS_HD uint16_t channel_factor(float largest) {
  const uint16_t c = float_to_float16(sqrtf(largest));
  return c == 0 ? 0x3c00u : c;
}

}  // namespace singlepass::kv
