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

// 1 + exp(-a) for a >= 0 within 2 ulp, without a library call: it vectorises, and gives host and device the same bits.
// exp(-a) = 2^n * 2^f with |f| <= 1/2 and a polynomial for 2^f, minimax in relative error (9.4e-8) with 2^0 = 1. The one
// rounding of a * log2(e) costs exp(-a) a relative error that grows with a, but never what the sum could show.
SINGLEPASS_HD float one_plus_exp_negative(float a) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const float x = (87.0f < a ? 87.0f : a) * -1.44269504f;
  const float shifted = x + kRound;
  const float f = x - (shifted - kRound);
  float e = 1.32695212e-3f;
  e = e * f + 9.67129134e-3f;
  e = e * f + 5.55071086e-2f;
  e = e * f + 2.40222469e-1f;
  e = e * f + 6.93147004e-1f;
  e = e * f + 1.0f;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
  return 1.0f + e * power;
}

}  // namespace singlepass
