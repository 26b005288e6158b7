// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace singlepass {

// a * b + c: one rounding on the device; on the host two, or what SINGLEPASS_FUSED_MULTIPLY_ADD says.
template <class T>
SINGLEPASS_HD T multiply_add(T a, T b, T c) {
  return a * b + c;
}

// sum + a * b in double precision, where a product of two floats is exact: it takes 48 bits of 53, and exponents never
// leave the range. So one fused operation gives the bits of two. The device takes it; on the host it may be a call.
SINGLEPASS_HD double add_product(double sum, float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(static_cast<double>(a), static_cast<double>(b), sum);
#else
  return sum + static_cast<double>(a) * b;
#endif
}

// 1 / a within an ulp: rounded correctly on the host; on the device the hardware's approximation, which is zero for a
// above 2^126.
template <class T>
SINGLEPASS_HD T reciprocal(T a) {
  return 1.0f / a;
}

#if defined(__CUDA_ARCH__)
template <>
SINGLEPASS_HD float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}

template <>
SINGLEPASS_HD float reciprocal(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}
#endif

// One number in every lane of T, which is float or a vector of floats.
template <class T>
SINGLEPASS_HD T broadcast(float v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else {
    return T{} + v;
  }
}

SINGLEPASS_HD float absolute(float v) {
  return fabsf(v);
}

// v times the sign of s, where zero counts as positive.
SINGLEPASS_HD float with_sign_of(float s, float v) {
  return s < 0.0f ? -v : v;
}

SINGLEPASS_HD float sign(float x) {
  return static_cast<float>((x > 0.0f) - (x < 0.0f));
}

// The larger one, or NaN if either is.
SINGLEPASS_HD float maximum(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}

// 2^x for x between -126 and 127, without a library call: it vectorises, and gives host and device the same bits. It is
// 2^n * 2^f with |f| <= 1/2 and a polynomial for 2^f, minimax in relative error (9.4e-8) with 2^0 = 1.
SINGLEPASS_HD float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const float shifted = x + kRound;
  const float f = x - (shifted - kRound);
  float e = 1.32695212e-3f;
  e = e * f + 9.67129134e-3f;
  e = e * f + 5.55071086e-2f;
  e = e * f + 2.40222469e-1f;
  e = e * f + 6.93147004e-1f;
  e = e * f + 1.0f;
  return e * bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
}

// exp(-a) for a >= 0. The one rounding of a * log2(e) adds a relative error of up to a * 2^-24. a above 87 counts
// as 87.
SINGLEPASS_HD float exp_negative(float a) {
  return exp2_polynomial((87.0f < a ? 87.0f : a) * -1.44269504f);
}

// 2^x for x < 127, within two ulp; 0 for what is too small. NaN stays NaN.
SINGLEPASS_HD float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
  return e;
#else
  return x < -125.0f ? 0.0f : exp2_polynomial(x);
#endif
}

// exp(x) for x <= 0, within two ulp and what the conversion to base 2 rounds; 0 for what is too small. NaN stays NaN.
SINGLEPASS_HD float exp_of_negative(float x) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 1.44269504f));
  return e;
#else
  return x < -87.0f ? 0.0f : exp_negative(-x);
#endif
}

// exp(x - top) for x <= top + 4, where `top` is the same for many x; as good as exp_of_negative.
SINGLEPASS_HD float exp_of_difference(float x, float top) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(multiply_add(x, 1.44269504f, top * -1.44269504f)));
  return e;
#else
  return x - top < -87.0f ? 0.0f : exp_negative(top - x);
#endif
}

// 1 + exp(-a) for a >= 0 within 2 ulp.
SINGLEPASS_HD float one_plus_exp_negative(float a) {
  return 1.0f + exp_negative(a);
}

}  // namespace singlepass
