// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "common/math.h"
#include "spectral/problem.h"

// int8 codes of frozen vectors: 128 columns share a factor, their largest magnitude divided by 127.
namespace singlepass::spectral {

SINGLEPASS_HD int64_t factor_count(int64_t columns) {
  return (columns + kBlock - 1) / kBlock;
}

SINGLEPASS_HD float factor_of(float largest) {
  return largest / 127.0f;
}

SINGLEPASS_HD float inverse_of(float factor) {
  return factor > 0.0f ? 1.0f / factor : 0.0f;
}

// Rounds to nearest even, NaN to 0; adding 1.5 * 2^23 leaves the integer in the low bits.
SINGLEPASS_HD int8_t code_of(float value, float inverse) {
  const float scaled = value * inverse;
  const float held = scaled < -127.0f ? -127.0f : scaled > 127.0f ? 127.0f : scaled == scaled ? scaled : 0.0f;
  return static_cast<int8_t>(bit_cast<int32_t>(held + 12582912.0f) - 0x4b400000);
}

}  // namespace singlepass::spectral
