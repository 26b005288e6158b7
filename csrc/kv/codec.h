// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "common/dtype.h"

// Uniform quantisation of one group of numbers: x^ = code * step + minimum, both in float16, the minimum rounded down
// and the step up, so that they cover the group and no element is off by more than half a step.
namespace singlepass::kv {

inline constexpr float kLargest = 65504.0f;  // of float16; larger magnitudes count as this

SINGLEPASS_HD float clamped(float x) {
  return x < -kLargest ? -kLargest : (x > kLargest ? kLargest : x);
}

// The distance from one float16 to the next at x, for |x| <= 65504.
SINGLEPASS_HD float half_spacing(float x) {
  const uint32_t exponent = bit_cast<uint32_t>(x) & 0x7f800000u, least = 0x38800000u;
  return bit_cast<float>((exponent > least ? exponent : least) - 0x05000000u);
}

// x to a multiple of a power of two, ties to even: the sum with 1.5 * 2^23 times it has no digits below it.
SINGLEPASS_HD float round_to(float x, float spacing) {
  const float rounder = spacing * 12582912.0f;
  return (x + rounder) - rounder;
}

// The largest float16 that is not above x, and the smallest that is not below it. Zeros are positive. Bits come in when
// results are stored: compilers take many floats at a time, but not well beside integers of another size.
SINGLEPASS_HD float half_at_most(float x) {
  const float spacing = half_spacing(x), nearest = round_to(x, spacing);
  return nearest - (nearest > x ? spacing : 0.0f);
}

SINGLEPASS_HD float half_at_least(float x) {
  return 0.0f - half_at_most(-x);
}

struct Steps {
  float step, minimum;  // exact in float16
};

// For a group within [low, high]; `finite` is false if something in it is not.
SINGLEPASS_HD Steps steps(float low, float high, bool finite, int bits) {
  const float minimum = half_at_most(low), levels = static_cast<float>((1 << bits) - 1);
  const float step = half_at_least((high - minimum) / levels);
  return {finite ? step : NAN, finite ? minimum : NAN};
}

// What (x - minimum) is multiplied by to give a code; 0 for a group of equal or of invalid numbers.
SINGLEPASS_HD float inverse(float step) {
  return 1.0f / (step > 0.0f ? step : INFINITY);
}

// The integer nearest to n stands in the low bits, ties to even, for |n| < 2^22; those of a NaN do if n is one, of NAN
// zeros.
SINGLEPASS_HD uint32_t nearest_in_low_bits(float n) {
  return bit_cast<uint32_t>(n + 12582912.0f);
}

// The nearest code of any x; 0 for NaN.
SINGLEPASS_HD uint32_t encode(float x, float minimum, float inverse, float levels) {
  float n = (x - minimum) * inverse;
  n = n > 0.0f ? n : 0.0f;
  n = n < levels ? n : levels;
  return nearest_in_low_bits(n) - 0x4b400000u;
}

// By what a channel is divided: the square root of its largest magnitude, 1 if that is 0; exact in float16.
SINGLEPASS_HD float channel_factor(float largest) {
  const float root = sqrtf(largest), c = round_to(root, half_spacing(root));
  return c > 0.0f ? c : 1.0f;
}

}  // namespace singlepass::kv
