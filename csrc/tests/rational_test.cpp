// SPDX-License-Identifier: Apache-2.0
// Loops with vectors of sixteen lanes and of eight give the same bits, and bfloat16 is rounded in vectors as elsewhere.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "rational/cpu_loops.h"

namespace {

using namespace singlepass;
using namespace singlepass::rational;
using Wide = Lanes<16>::Floats;
using Narrow = Lanes<8>::Floats;

float stored(float v, float) {
  return v;
}

BFloat16 stored(float v, BFloat16) {
  return {float_to_bfloat16(v)};
}

template <class T>
bool same_bits(const T& a, const T& b) {
  return memcmp(&a, &b, sizeof(T)) == 0;
}

template <class S>
bool same_elements(const std::vector<S>& a, const std::vector<S>& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0;
}

template <Form form, int M, int N, class S>
void check_widths() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const int64_t n : {1, 7, 8, 15, 16, 17, 31, 32, 33, 96, 255, 256, 257, 384, 1000}) {
    Coefficients<float, M, N> c;
    for (float& a : c.a) a = normal(random);
    for (float& b : c.b) b = std::fabs(normal(random));
    std::vector<S> x(n), g(n);
    for (int64_t i = 0; i < n; ++i) {
      x[i] = stored(i % 7 == 3 ? -0.0f : normal(random), S{});
      g[i] = stored(normal(random), S{});
    }
    std::vector<S> wide(n), narrow(n);
    values_by<Wide, form>(c, x.data(), wide.data(), n);
    values_by<Narrow, form>(c, x.data(), narrow.data(), n);
    CHECK(same_elements(wide, narrow));
    CHECK(!same_bits(wide[n - 1], S{}));

    LaneSums<M, N> wide_sums = {}, narrow_sums = {};
    gradients_by<Wide, form>(c, x.data(), g.data(), wide.data(), n, wide_sums);
    gradients_by<Narrow, form>(c, x.data(), g.data(), narrow.data(), n, narrow_sums);
    CHECK(same_elements(wide, narrow));
    CHECK(same_bits(wide_sums, narrow_sums));

    // The sum of g / Q(x), the gradient of a[0], says that no element is missing and none is there twice.
    double sum = 0.0, expected = 0.0, size = 0.0;
    for (const float lane : wide_sums.a[0]) sum += lane;
    for (int64_t i = 0; i < n; ++i) {
      Sums<float, M, N> own = {};
      S pair[2] = {x[i], g[i]};
      float values[2];
      for (int k = 0; k < 2; ++k) {
        if constexpr (sizeof(S) == sizeof(float)) {
          values[k] = pair[k];
        } else {
          values[k] = bfloat16_to_float(pair[k].bits);
        }
      }
      gradients<form>(c, values[0], values[1], own);
      expected += own.a[0];
      size += std::fabs(own.a[0]);
    }
    CHECK(std::fabs(sum - expected) <= 1e-6 * size);
  }
}

TEST(widths_give_the_same_bits) {
  check_widths<Form::kA, 5, 4, float>();
  check_widths<Form::kB, 5, 4, float>();
  check_widths<Form::kC, 7, 6, float>();
  check_widths<Form::kA, 5, 4, BFloat16>();
  check_widths<Form::kB, 7, 6, BFloat16>();
  check_widths<Form::kC, 5, 4, BFloat16>();
}

template <class V>
void check_bfloat16() {
  constexpr int kCount = sizeof(V) / sizeof(float);
  for (uint32_t upper = 0; upper < 0x10000u; ++upper) {
    for (const uint32_t lower : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const float value = bit_cast<float>(upper << 16 | lower);
      V first;
      for (int k = 0; k < kCount; ++k) first[k] = value;
      BFloat16 chunk[kChunk] = {};
      store_two<V>({first, -first}, chunk, 0);
      for (int k = 0; k < kCount; ++k) {
        CHECK(chunk[2 * k].bits == float_to_bfloat16(value));
        CHECK(chunk[2 * k + 1].bits == float_to_bfloat16(-value));
      }
      const Two<V> back = load_two<V>(chunk, 0);
      for (int k = 0; k < kCount; ++k) {
        CHECK(same_bits(float{back.first[k]}, bfloat16_to_float(chunk[2 * k].bits)));
        CHECK(same_bits(float{back.second[k]}, bfloat16_to_float(chunk[2 * k + 1].bits)));
      }
    }
  }
}

TEST(bfloat16_is_rounded_as_elsewhere) {
  check_bfloat16<Wide>();
  check_bfloat16<Narrow>();
}

}  // namespace

TEST_MAIN()
