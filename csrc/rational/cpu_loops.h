// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/prefetch.h"
#include "common/vector.h"
#include "rational/rational.h"

// Loops over neighbours in memory that share coefficients, on the CPU. S is how they are stored, float or BFloat16.
//
// Elements are worked on by chunks of two vectors of sixteen lanes, and sums over elements kept in sixteen lanes. With
// AVX-512 a vector is a register. Elsewhere the accumulators of sixteen lanes would not fit in the registers, so that a
// block, which stays in the first-level cache, is gone through twice, for eight lanes each time. The sums are the same
// bits.
namespace singlepass::rational {

inline constexpr int kSumLanes = 16;
inline constexpr int64_t kChunk = 2 * kSumLanes;
inline constexpr int64_t kBlock = 8 * kChunk;

template <int M, int N>
struct alignas(4 * kSumLanes) LaneSums {
  float a[M + 1][kSumLanes];
  float b[N + 1][kSumLanes];
};

template <class V>
inline constexpr int kLanesOf = sizeof(V) / sizeof(float);
template <class V>
using WordsOf = typename Lanes<kLanesOf<V>>::Words;

// Lanes `lane` and on of the two vectors of a chunk. Where elements are floats, the second follows the first.
template <class V>
struct Two {
  V first, second;
};

template <class V>
SINGLEPASS_HD Two<V> load_two(const float* chunk, int lane) {
  return {load_vector<V>(chunk + lane), load_vector<V>(chunk + kSumLanes + lane)};
}

template <class V>
SINGLEPASS_HD void store_two(const Two<V>& v, float* chunk, int lane) {
  store_vector(v.first, chunk + lane);
  store_vector(v.second, chunk + kSumLanes + lane);
}

// Where they are bfloat16, the first has the even ones and the second the odd ones, which are the halves of words: that
// takes a shift and a mask, where widening neighbours and packing them again would move them between lanes.
template <class V>
SINGLEPASS_HD Two<V> load_two(const BFloat16* chunk, int lane) {
  WordsOf<V> words;
  memcpy(&words, chunk + 2 * lane, sizeof(words));
  return {bit_cast<V>(words << 16), bit_cast<V>(words & 0xffff0000u)};
}

// A word whose upper half is the rounded number, as by float_to_bfloat16.
template <class V>
SINGLEPASS_HD WordsOf<V> rounded_to_upper_half(V v) {
  const WordsOf<V> u = bit_cast<WordsOf<V>>(v);
  return v == v ? u + 0x7fffu + ((u >> 16) & 1u) : u * 0 + 0x7fc00000u;
}

template <class V>
SINGLEPASS_HD void store_two(const Two<V>& v, BFloat16* chunk, int lane) {
  const WordsOf<V> words = rounded_to_upper_half(v.first) >> 16 | (rounded_to_upper_half(v.second) & 0xffff0000u);
  memcpy(chunk + 2 * lane, &words, sizeof(words));
}

// A chunk of which only n elements are there: the others are zeros, and are not stored.
template <class S>
struct PartOfChunk {
  S elements[kChunk] = {};

  SINGLEPASS_HD PartOfChunk(const S* from, int64_t n) { memcpy(elements, from, static_cast<size_t>(n) * sizeof(S)); }
  SINGLEPASS_HD void store(S* to, int64_t n) const { memcpy(to, elements, static_cast<size_t>(n) * sizeof(S)); }
};

template <class V, Form form, int M, int N, class S>
SINGLEPASS_HD void values_of_chunk(const Coefficients<V, M, N>& c, const S* x, S* y) {
  for (int lane = 0; lane < kSumLanes; lane += kLanesOf<V>) {
    const Two<V> z = load_two<V>(x, lane);
    store_two<V>({value<form>(c, z.first), value<form>(c, z.second)}, y, lane);
  }
}

template <class V, Form form, int M, int N, class S>
SINGLEPASS_HD void values_by(const Coefficients<float, M, N>& coefficients, const S* x, S* y, int64_t n) {
  const Coefficients<V, M, N> c = spread<V>(coefficients);
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    prefetch_ahead(x + i, kChunk * sizeof(S));
    prefetch_ahead(y + i, kChunk * sizeof(S));
    values_of_chunk<V, form>(c, x + i, y + i);
  }
  if (i < n) {
    PartOfChunk<S> part(x + i, n - i);
    values_of_chunk<V, form>(c, part.elements, part.elements);
    part.store(y + i, n - i);
  }
}

template <class V, Form form, int M, int N, class S>
SINGLEPASS_HD void gradients_of_chunk(const Coefficients<V, M, N>& c, const S* x, const S* g, S* dx, int lane,
                                      Sums<V, M, N>& sums) {
  const Two<V> z = load_two<V>(x, lane), grad = load_two<V>(g, lane);
  const V first = gradients<form>(c, z.first, grad.first, sums);
  store_two<V>({first, gradients<form>(c, z.second, grad.second, sums)}, dx, lane);
}

template <class V, int kTerms>
SINGLEPASS_HD void add_lanes(const V (&terms)[kTerms], float (*sums)[kSumLanes], int lane) {
  for (int k = 0; k < kTerms; ++k) store_vector(load_vector<V>(sums[k] + lane) + terms[k], sums[k] + lane);
}

// Writes the gradients of x for the gradients g of f(x), and adds to the sums.
template <class V, Form form, int M, int N, class S>
SINGLEPASS_HD void gradients_by(const Coefficients<float, M, N>& coefficients, const S* x, const S* g, S* dx, int64_t n,
                                LaneSums<M, N>& sums) {
  const Coefficients<V, M, N> c = spread<V>(coefficients);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    for (int lane = 0; lane < kSumLanes; lane += kLanesOf<V>) {
      Sums<V, M, N> s = {};
      int64_t i = begin;
      for (; i + kChunk <= end; i += kChunk) {
        if (lane == 0) {
          prefetch_ahead(x + i, kChunk * sizeof(S));
          prefetch_ahead(g + i, kChunk * sizeof(S));
          prefetch_ahead(dx + i, kChunk * sizeof(S));
        }
        gradients_of_chunk<V, form>(c, x + i, g + i, dx + i, lane, s);
      }
      // Where g is zero an element adds nothing to the sums.
      if (i < end) {
        PartOfChunk<S> z(x + i, end - i), grad(g + i, end - i), result(dx + i, end - i);
        gradients_of_chunk<V, form>(c, z.elements, grad.elements, result.elements, lane, s);
        result.store(dx + i, end - i);
      }
      add_lanes(s.a, sums.a, lane);
      add_lanes(s.b, sums.b, lane);
    }
  }
}

// Both loops for a width of vectors and the targets that have it.
#define SINGLEPASS_RATIONAL_LOOPS(name, targets, lanes)                                                             \
  template <Form form, int M, int N, class S>                                                                       \
  targets SINGLEPASS_FUSED_MULTIPLY_ADD void values_##name(const Coefficients<float, M, N>& c, const S* x, S* y,    \
                                                           int64_t n) {                                             \
    values_by<Lanes<lanes>::Floats, form>(c, x, y, n);                                                              \
  }                                                                                                                 \
  template <Form form, int M, int N, class S>                                                                       \
  targets SINGLEPASS_FUSED_MULTIPLY_ADD void gradients_##name(const Coefficients<float, M, N>& c, const S* x,       \
                                                              const S* g, S* dx, int64_t n, LaneSums<M, N>& sums) { \
    gradients_by<Lanes<lanes>::Floats, form>(c, x, g, dx, n, sums);                                                 \
  }
SINGLEPASS_RATIONAL_LOOPS(wide, SINGLEPASS_TARGET_AVX512, 16)
SINGLEPASS_RATIONAL_LOOPS(narrow, SINGLEPASS_TARGET_CLONES_TO_AVX2, 8)
#undef SINGLEPASS_RATIONAL_LOOPS

}  // namespace singlepass::rational
