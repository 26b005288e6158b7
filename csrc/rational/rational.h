// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/math.h"
#include "common/philox.h"
#if !defined(__CUDACC__)
#include "common/vector.h"
#endif

// The rational function f(x) = P(x) / Q(x) of one element and its derivatives. T is float, or a vector of floats on the
// host.
namespace singlepass::rational {

// The denominator Q. kD is kB with noise on the coefficients.
enum class Form : int {
  kA = 0,  // 1 + |b_1| |x| + ... + |b_n| |x|^n
  kB = 1,  // 1 + |b_1 x + ... + b_n x^n|
  kC = 2,  // 0.1 + |b_0 + b_1 x + ... + b_n x^n|
  kD = 3,
};

inline constexpr int kMaxNumerator = 7;    // largest degree of P
inline constexpr int kMaxDenominator = 6;  // largest degree of Q

// One group's coefficients: P's, and those of the polynomial inside Q, from the constant up. Form A has the absolute
// values and b[0] = 1; forms B and D have b[0] = 0. What a smaller degree does not use is zero.
template <class T, int M, int N>
struct Coefficients {
  T a[M + 1];
  T b[N + 1];
};

// Sums of one group over many elements: the gradients of a and b.
template <class T, int M, int N>
struct Sums {
  T a[M + 1];
  T b[N + 1];
};

// The same coefficients for every lane of a vector T.
template <class T, int M, int N>
SINGLEPASS_HD Coefficients<T, M, N> spread(const Coefficients<float, M, N>& c) {
  Coefficients<T, M, N> result;
  for (int i = 0; i <= M; ++i) result.a[i] = broadcast<T>(c.a[i]);
  for (int i = 0; i <= N; ++i) result.b[i] = broadcast<T>(c.b[i]);
  return result;
}

// What is added to the polynomial's absolute value; form A has it in b[0].
template <Form form>
inline constexpr float kOffset = form == Form::kC   ? 0.1f
                                 : form == Form::kA ? 0.0f
                                                    : 1.0f;

// P(x) / Q(x).
template <Form form, int M, int N, class T>
SINGLEPASS_HD T value(const Coefficients<T, M, N>& c, T x) {
  T p = c.a[M];
  for (int i = M - 1; i >= 0; --i) p = multiply_add(p, x, c.a[i]);
  const T z = form == Form::kA ? absolute(x) : x;
  T q = c.b[N];
  for (int i = N - 1; i >= 0; --i) q = multiply_add(q, z, c.b[i]);
  if constexpr (form != Form::kA) q = absolute(q) + kOffset<form>;
  return p * reciprocal(q);
}

// Adds the terms of x^i and above to the sums. Not a loop: compilers that take its first round apart keep sums in
// memory.
template <Form form, int i, int M, int N>
SINGLEPASS_HD void add_powers(float x, float power, float scaled, float h, Sums<float, M, N>& sums) {
  if constexpr (i <= M) sums.a[i] = multiply_add(scaled, power, sums.a[i]);
  if constexpr (i <= N) sums.b[i] = multiply_add(h, form == Form::kA ? absolute(power) : power, sums.b[i]);
  if constexpr (i < M || i < N) add_powers<form, i + 1>(x, power * x, scaled, h, sums);
}

// The same for vectors, where i is even: even powers have no sign, and odd ones are those times x, or z = |x|. Fewer
// operations, but more values at a time than a thread of a GPU has registers for.
template <int i, class T, int M, int N>
SINGLEPASS_HD void add_even_powers(T power, T square, T scaled, T scaled_x, T h, T h_z, Sums<T, M, N>& sums) {
  if constexpr (i <= M) sums.a[i] = multiply_add(scaled, power, sums.a[i]);
  if constexpr (i < M) sums.a[i + 1] = multiply_add(scaled_x, power, sums.a[i + 1]);
  if constexpr (i <= N) sums.b[i] = multiply_add(h, power, sums.b[i]);
  if constexpr (i < N) sums.b[i + 1] = multiply_add(h_z, power, sums.b[i + 1]);
  if constexpr (i + 2 <= M || i + 2 <= N) {
    add_even_powers<i + 2>(power * square, square, scaled, scaled_x, h, h_z, sums);
  }
}

// For the gradient g of f(x): returns the gradient of x and adds to the sums the gradients of the coefficients (form A:
// of their absolute values). With r = 1/Q, f = P r and g' = g r:
//   dx = g' (P' - f Q'),  da_i = g' x^i,  db_i = -f g' dQ/db_i.
template <Form form, int M, int N, class T>
SINGLEPASS_HD T gradients(const Coefficients<T, M, N>& c, T x, T g, Sums<T, M, N>& sums) {
  T p = c.a[M], dp = {};
  for (int i = M - 1; i >= 0; --i) {
    dp = i == M - 1 ? p : multiply_add(dp, x, p);
    p = multiply_add(p, x, c.a[i]);
  }
  const T z = form == Form::kA ? absolute(x) : x;
  T q = c.b[N], dq = {};
  for (int i = N - 1; i >= 0; --i) {
    dq = i == N - 1 ? q : multiply_add(dq, z, q);
    q = multiply_add(q, z, c.b[i]);
  }
  const T inside = form == Form::kA ? x : q;  // the sign of what stands between the bars
  dq = with_sign_of(inside, dq);
  if constexpr (form != Form::kA) q = absolute(q) + kOffset<form>;
  const T r = reciprocal(q);
  const T f = p * r;
  const T scaled = g * r;
  const T dx = scaled * multiply_add(-f, dq, dp);

  const T h = form == Form::kA ? -f * scaled : with_sign_of(inside, -f * scaled);
  sums.a[0] = sums.a[0] + scaled;
  if constexpr (form == Form::kC) sums.b[0] = sums.b[0] + h;
  if constexpr (sizeof(T) == sizeof(float)) {
    add_powers<form, 1>(x, x, scaled, h, sums);
  } else {
    const T scaled_x = scaled * x, h_z = h * z, square = x * x;
    sums.a[1] = sums.a[1] + scaled_x;
    sums.b[1] = sums.b[1] + h_z;
    add_even_powers<2>(square, square, scaled, scaled_x, h, h_z, sums);
  }
  return dx;
}

// Form D's factors for the coefficients of one element, uniform in [0.9, 1.1).
template <int M, int N>
struct Noise {
  float a[M + 1];
  float b[N + 1];
};

SINGLEPASS_HD float noise_factor(const Philox4& random, int index) {
  const uint32_t half = (random.word[index / 2] >> (16 * (index % 2))) & 0xffffu;
  return 0.9f + static_cast<float>(half) * (0.2f / 65536.0f);
}

template <int M, int N>
SINGLEPASS_HD Noise<M, N> draw_noise(uint64_t seed, uint64_t element) {
  const Philox4 random_a = philox4x32(seed, element, 1), random_b = philox4x32(seed, element, 2);
  Noise<M, N> noise;
  for (int i = 0; i <= M; ++i) noise.a[i] = noise_factor(random_a, i);
  noise.b[0] = 1.0f;
  for (int i = 1; i <= N; ++i) noise.b[i] = noise_factor(random_b, i - 1);
  return noise;
}

template <int M, int N>
SINGLEPASS_HD Coefficients<float, M, N> operator*(const Coefficients<float, M, N>& c, const Noise<M, N>& noise) {
  Coefficients<float, M, N> result;
  for (int i = 0; i <= M; ++i) result.a[i] = c.a[i] * noise.a[i];
  for (int i = 0; i <= N; ++i) result.b[i] = c.b[i] * noise.b[i];
  return result;
}

template <int M, int N>
SINGLEPASS_HD float noisy_value(const Coefficients<float, M, N>& c, float x, uint64_t seed, uint64_t element) {
  return value<Form::kB>(c * draw_noise<M, N>(seed, element), x);
}

template <int M, int N>
SINGLEPASS_HD float noisy_gradients(const Coefficients<float, M, N>& c, float x, float g, uint64_t seed,
                                    uint64_t element, Sums<float, M, N>& sums) {
  const Noise<M, N> noise = draw_noise<M, N>(seed, element);
  Sums<float, M, N> own = {};
  const float dx = gradients<Form::kB>(c * noise, x, g, own);
  for (int i = 0; i <= M; ++i) sums.a[i] = multiply_add(noise.a[i], own.a[i], sums.a[i]);
  for (int i = 0; i <= N; ++i) sums.b[i] = multiply_add(noise.b[i], own.b[i], sums.b[i]);
  return dx;
}

// Dropout of one element: zero, or what the kept ones are multiplied by.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // an element whose 16 random bits are below is dropped; 0 drops none
  float scale;
};

SINGLEPASS_HD float keep_factor(const Dropout& dropout, const Philox4& random, int lane) {
  const uint32_t half = (random.word[lane / 2] >> (16 * (lane % 2))) & 0xffffu;
  return half < dropout.threshold ? 0.0f : dropout.scale;
}

}  // namespace singlepass::rational
