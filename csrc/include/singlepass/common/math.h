// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "singlepass/common/dtype.h"

namespace singlepass {

SINGLEPASS_HD float sign(float x) {
  return static_cast<float>((x > 0.0f) - (x < 0.0f));
}

SINGLEPASS_HD float maximum(float a, float b) {
  return a > b || a != a ? a : b;
}

// exp(-a) for a >= 0 within 2 ulp, without a library call: it vectorises, and gives host and device the same bits.
// exp(-a) = 2^n * exp(r), |r| <= ln(2)/2, with exp(r) by its Taylor polynomial of degree 7.
SINGLEPASS_HD float exp_negative(float a) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const float x = a > 87.0f ? -87.0f : -a;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float e = 1.98412698e-4f;
  e = e * r + 1.38888889e-3f;
  e = e * r + 8.33333333e-3f;
  e = e * r + 4.16666667e-2f;
  e = e * r + 1.66666667e-1f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const uint32_t power = (bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRound) + 127u) << 23;
  return e * bit_cast<float>(power);
}

}  // namespace singlepass
