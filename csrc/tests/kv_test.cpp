// SPDX-License-Identifier: Apache-2.0
// Attention's integers on the CPU: the sums are exact wherever they are computed, and rounding is all that is lost.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "kv/integer_tiles.h"

namespace {

using namespace singlepass::kv;

// Codes of `count` tokens, which fill their memory to the last byte.
struct Drawn {
  int bits;
  int64_t count, head_dim, places;
  std::vector<uint8_t> data;

  Drawn(int bits, int64_t count, int64_t head_dim, std::mt19937& random)
      : bits(bits), count(count), head_dim(head_dim), places(head_dim * bits / 8), data(count * places) {
    for (uint8_t& byte : data) byte = random() % 8 == 0 ? 255 : static_cast<uint8_t>(random());
  }

  int64_t code(int64_t t, int64_t d) const {
    return (data[t * places + d % places] >> (d / places * bits)) & ((1 << bits) - 1);
  }
};

void check_products(const Drawn& codes, int64_t rows, std::mt19937& random) {
  constexpr int64_t kStride = 128;
  const int64_t count = codes.count, head_dim = codes.head_dim;
  const auto draw = [&](std::vector<int16_t>& to, int64_t terms) {
    const int largest = static_cast<int>(largest_integer(codes.bits, terms));
    for (int16_t& x : to)
      x = static_cast<int16_t>(random() % 4 == 0 ? largest : random() % (2 * largest + 1) - largest);
  };
  std::vector<int16_t> q(rows * head_dim + kIntegerPad), weights(rows * kStride);
  draw(q, head_dim);
  draw(weights, kStride);
  for (int64_t r = 0; r < rows && count % 2 == 1; ++r) weights[r * kStride + count] = 0;
  std::vector<int32_t> scores(rows * kStride), sums(rows * head_dim);
  dot(q.data(), rows, Rows{codes.data.data(), codes.bits}, count, head_dim, scores.data(), kStride);
  accumulate(weights.data(), kStride, rows, Rows{codes.data.data(), codes.bits}, count, head_dim, sums.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < count; ++t) {
      int64_t expected = 0;
      for (int64_t d = 0; d < head_dim; ++d) expected += q[r * head_dim + d] * codes.code(t, d);
      CHECK_EQUAL(int64_t{scores[r * kStride + t]}, expected);
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      int64_t expected = 0;
      for (int64_t t = 0; t < count; ++t) expected += weights[r * kStride + t] * codes.code(t, d);
      CHECK_EQUAL(int64_t{sums[r * head_dim + d]}, expected);
    }
  }
}

TEST(products_with_codes_are_exact) {
  std::mt19937 random(1);
  for (const int bits : {2, 4, 8}) {
    for (int64_t head_dim = 16; head_dim <= 512; head_dim += head_dim < 144 ? 16 : 92 + head_dim % 16) {
      for (const int64_t rows : {1, 2, 3, 4, 8}) {
        for (const int64_t count : {1, 2, 7, 32, 127, 128}) {
          check_products(Drawn(bits, count, head_dim - head_dim % 16, random), rows, random);
        }
      }
    }
  }
}

TEST(factors_are_rounded_to_the_nearest_integers) {
  constexpr int64_t kLength = 83, kStride = 96, kRows = 7;
  constexpr float kLargest = 32639.0f;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> x(kRows * kStride), steps(kLength), minima(kLength), products(x.size());
  for (float& value : x) value = normal(random);
  for (float& value : steps) value = std::abs(normal(random));
  for (float& value : minima) value = normal(random);
  std::vector<int16_t> integers(x.size(), 7);
  std::vector<Folded> found(kRows);
  const auto run = [&] {
    fold_to_integers(x.data(), steps.data(), minima.data(), kLength, kRows, kStride, kLargest, products.data(),
                     integers.data(), found.data());
  };
  run();
  for (int64_t r = 0; r < kRows; ++r) {
    double bias = 0.0, magnitude = 0.0, largest = 0.0;
    for (int64_t i = 0; i < kLength; ++i) {
      const double value = x[r * kStride + i];
      bias += value * minima[i];
      magnitude += std::abs(value * minima[i]);
      largest = std::max(largest, std::abs(value * steps[i]));
      CHECK(std::abs(integers[r * kStride + i] * double{found[r].step} - value * steps[i]) <= 0.51 * found[r].step);
    }
    for (int64_t i = kLength; i < kStride; ++i) CHECK_EQUAL(integers[r * kStride + i], 0);
    CHECK(std::abs(found[r].step * kLargest / largest - 1.0) < 1e-6);
    CHECK(std::abs(found[r].bias - bias) <= kLength * 0x1p-24 * magnitude);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float special : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const int64_t place : {int64_t{0}, kLength - 1}) {
      const float before = x[kStride + place];
      x[kStride + place] = special;
      run();
      CHECK(std::isnan(found[1].step) && !std::isnan(found[0].step) && !std::isnan(found[2].step));
      x[kStride + place] = before;
    }
  }
  for (float& value : x) value *= 0x1p-120f;
  run();
  for (const Folded& row : found) CHECK(row.step == 0.0f);
  for (const int16_t integer : integers) CHECK(integer == 0);
}

}  // namespace

TEST_MAIN()
