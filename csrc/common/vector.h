// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace singlepass {

// Floats that the host's compiler works on together. How vectors are passed depends on the registers of the machine, so
// what takes them is inlined.
template <int kCount>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * kCount)));
  typedef uint32_t Words __attribute__((vector_size(4 * kCount)));
};

// Eight of them, whatever registers the machine has: sums over lanes come out the same everywhere.
inline constexpr int kLanes = 8;
typedef Lanes<kLanes>::Floats Vector;

#if defined(SINGLEPASS_HAS_TARGETS)
// Whether functions with SINGLEPASS_TARGET_AVX2 run here.
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("fma");
}
#endif

// Whether functions with SINGLEPASS_TARGET_AVX512 run here.
inline bool has_avx512() {
#if defined(SINGLEPASS_NO_AVX512)
  return false;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
}

#if defined(SINGLEPASS_HAS_TARGETS)
// Which of three compilations of a function runs here. The last is for processors with AVX-512 for which `fits` holds.
template <class Function>
Function* choose(Function* plain, Function* avx2, Function* avx512, bool fits = true) {
  return has_avx512() && fits ? avx512 : has_avx2() ? avx2 : plain;
}
#endif

template <class V = Vector>
SINGLEPASS_HD V load_vector(const float* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <class V>
SINGLEPASS_HD void store_vector(V v, float* to) {
  memcpy(to, &v, sizeof(v));
}

// The first n floats of a vector, the rest zeros.
template <class V = Vector>
SINGLEPASS_HD V load_part(const float* from, int64_t n) {
  V v = {};
  memcpy(&v, from, static_cast<size_t>(n) * sizeof(float));
  return v;
}

// What `op` makes of the lanes of each of eight vectors of eight, by shuffles that are one instruction each.
template <class V, class Op>
SINGLEPASS_HD V across_lanes(const V (&v)[8], const Op& op) {
  V pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = op(__builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13),
                  __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15));
  }
  for (int i = 0; i < 2; ++i) {
    quads[i] = op(__builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13),
                  __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15));
  }
  return op(__builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11),
            __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15));
}

// The same of sixteen vectors of sixteen.
template <class V, class Op>
SINGLEPASS_HD V across_lanes(const V (&v)[16], const Op& op) {
  V pairs[8], quads[4], octets[2];
  for (int i = 0; i < 8; ++i) {
    const V &a = v[2 * i], &b = v[2 * i + 1];
    pairs[i] = op(__builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
                  __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
  }
  for (int i = 0; i < 4; ++i) {
    const V &a = pairs[2 * i], &b = pairs[2 * i + 1];
    quads[i] = op(__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                  __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  }
  // From here on four lanes stay together.
  const auto fold = [&op](const V& a, const V& b) __attribute__((always_inline)) {
    return op(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
              __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
  };
  for (int i = 0; i < 2; ++i) octets[i] = fold(quads[2 * i], quads[2 * i + 1]);
  return fold(octets[0], octets[1]);
}

// The same for one.
template <class V, class Op>
SINGLEPASS_HD auto across_lanes(V v, const Op& op) {
  v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
  return v[0];
}

struct Add {
  template <class V>
  SINGLEPASS_HD V operator()(V a, V b) const {
    return a + b;
  }
};

// NaN if one is.
struct Maximum {
  SINGLEPASS_HD Vector operator()(Vector a, Vector b) const { return ((a > b) | (a != a)) ? a : b; }
};

template <class V>
SINGLEPASS_HD V absolute(V v) {
  return bit_cast<V>(bit_cast<typename Lanes<sizeof(V) / sizeof(float)>::Words>(v) & 0x7fffffffu);
}

// As for floats, without a blend, which takes longer than the sign's bit does.
template <class V>
SINGLEPASS_HD V with_sign_of(V s, V v) {
  using Words = typename Lanes<sizeof(V) / sizeof(float)>::Words;
  return bit_cast<V>(bit_cast<Words>(v) ^ (bit_cast<Words>(s < 0.0f) & 0x80000000u));
}

}  // namespace singlepass
