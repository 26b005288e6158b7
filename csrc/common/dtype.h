// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace singlepass {

// Storage types of tensors. Arithmetic is float everywhere.
enum class DType : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

SINGLEPASS_HD int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// How a bfloat16 lies in memory, where a type has to say so.
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
SINGLEPASS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

SINGLEPASS_HD bool is_finite(float x) {
  return (bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u;
}

SINGLEPASS_HD float bfloat16_to_float(uint16_t h) {
  return bit_cast<float>(static_cast<uint32_t>(h) << 16);
}

// Round to nearest, ties to even; every NaN becomes the quiet one.
SINGLEPASS_HD uint16_t float_to_bfloat16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Rounds up with probability equal to the discarded fraction: `random` holds 16 uniform bits.
// Infinities and NaNs stay what they are, and no finite value is carried into infinity.
SINGLEPASS_HD uint16_t float_to_bfloat16_stochastic(float x, uint32_t random) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t up = u + random;
  const uint32_t finite = (up & 0x7f800000u) == 0x7f800000u ? u : up;
  return (u & 0x7f800000u) == 0x7f800000u ? float_to_bfloat16(x) : static_cast<uint16_t>(finite >> 16);
}

SINGLEPASS_HD float float16_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  // Shifting exponent and mantissa into place leaves the value 2^112 too small, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  return bit_cast<float>(sign | ((h & 0x7c00u) == 0x7c00u ? special : scaled));
#endif
}

// Round to nearest, ties to even; overflow goes to infinity; every NaN becomes the quiet one.
SINGLEPASS_HD uint16_t float_to_float16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  // Normal results: rebias the exponent and round the 13 discarded bits in integers.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 lets the float adder round at 2^-24, the spacing of float16's subnormals.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(sign | h);
}

}  // namespace singlepass
