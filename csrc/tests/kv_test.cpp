// SPDX-License-Identifier: Apache-2.0
// Attention's loops on the CPU. Sums of integers are exact wherever they are computed, and rounding is all that is
// lost.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "common/convert.h"
#include "kv/integer_tiles.h"
#include "kv/problem.h"
#include "kv/tiles.h"
#include "kv/token_tiles.h"

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
  std::vector<int32_t> scores(rows * kStride), sums(rows * head_dim, 5);
  dot(q.data(), rows, Rows{codes.data.data(), codes.bits}, count, head_dim, scores.data(), kStride);
  accumulate(weights.data(), kStride, rows, Rows{codes.data.data(), codes.bits}, count, head_dim, sums.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < count; ++t) {
      int64_t expected = 0;
      for (int64_t d = 0; d < head_dim; ++d) expected += q[r * head_dim + d] * codes.code(t, d);
      CHECK_EQUAL(int64_t{scores[r * kStride + t]}, expected);
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      int64_t expected = 5;
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

TEST(codes_become_floats) {
  std::mt19937 random(3);
  for (const int bits : {2, 4, 8}) {
    for (const int64_t head_dim : {16, 32, 48, 64, 80, 96, 112, 128, 192, 512}) {
      const Drawn codes(bits, 5, head_dim, random);
      std::vector<float> found(5 * head_dim);
      unpack(codes.data.data(), bits, 5, head_dim, found.data());
      for (int64_t t = 0; t < 5; ++t) {
        for (int64_t d = 0; d < head_dim; ++d) CHECK_EQUAL(found[t * head_dim + d], float(codes.code(t, d)));
      }
    }
  }
}

// Tokens of whole numbers, whose products and sums are exact in floats; they fill their memory to the last element.
void check_tokens(singlepass::DType dtype, int64_t rows, int64_t count, int64_t head_dim, std::mt19937& random) {
  constexpr int64_t kStride = 128;
  const int64_t stride = head_dim + 16;
  const auto draw = [&](int64_t n) {
    std::vector<float> values(n);
    for (float& x : values) x = static_cast<float>(random() % 17) - 8.0f;
    return values;
  };
  const std::vector<float> tokens = draw((count - 1) * stride + head_dim), q = draw(rows * head_dim),
                           weights = draw(rows * kStride);
  std::vector<char> stored(tokens.size() * singlepass::size_of(dtype));
  singlepass::narrow(tokens.data(), stored.data(), dtype, static_cast<int64_t>(tokens.size()));
  std::vector<float> scores(rows * kStride), sums(rows * head_dim, 3.0f);
  dot(q.data(), rows, TokenRows{stored.data(), dtype, stride}, count, head_dim, scores.data(), kStride);
  accumulate(weights.data(), kStride, rows, TokenRows{stored.data(), dtype, stride}, count, head_dim, sums.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < count; ++t) {
      float expected = 0.0f;
      for (int64_t d = 0; d < head_dim; ++d) expected += q[r * head_dim + d] * tokens[t * stride + d];
      CHECK_EQUAL(scores[r * kStride + t], expected);
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      float expected = 3.0f;
      for (int64_t t = 0; t < count; ++t) expected += weights[r * kStride + t] * tokens[t * stride + d];
      CHECK_EQUAL(sums[r * head_dim + d], expected);
    }
  }
}

TEST(products_with_tokens) {
  std::mt19937 random(4);
  for (const auto dtype : {singlepass::DType::kFloat32, singlepass::DType::kBFloat16, singlepass::DType::kFloat16}) {
    for (const int64_t head_dim : {16, 32, 48, 64, 80, 128, 144, 256, 512}) {
      for (const int64_t rows : {1, 2, 3, 4, 7, 8}) {
        for (const int64_t count : {1, 2, 5, 16, 33, 128}) check_tokens(dtype, rows, count, head_dim, random);
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

// Sequences of any length keep many threads busy, and whoever is the last merges a head's splits in their order.
TEST(threads_share_a_head_and_end_in_any_order) {
  constexpr int64_t kSlots = 5000, kDim = 32, kRows = 2;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t n) {
    std::vector<float> x(n);
    for (float& value : x) value = normal(random);
    return x;
  };
  std::vector<float> q = draw(kRows * kDim), k = draw(kSlots * kDim), v = draw(kSlots * kDim);
  const auto tokens = [](std::vector<float>& x, int64_t n) {
    return Tokens{x.data(), singlepass::DType::kFloat32, n * kDim, n * kDim, kDim};
  };
  const int32_t window[] = {0, kSlots};
  const auto attend = [&](const singlepass::ParallelFor::Run& run) {
    std::vector<float> out(kRows * kDim), lse(kRows);
    Decode p = {};
    p.batch = p.heads = p.queries = 1;
    p.group_size = kRows;
    p.head_dim = p.value_dim = kDim;
    p.q = tokens(q, 1), p.q.head_stride = kDim;
    p.window_k = tokens(k, kSlots), p.window_v = tokens(v, kSlots);
    p.window_slots = kSlots, p.window = window, p.window_stride = 2;
    p.scale = 1.0f;
    p.out = tokens(out, 1), p.out.head_stride = kDim;
    p.lse = lse.data();
    decode(p, singlepass::ParallelFor(run, 1));
    out.insert(out.end(), lse.begin(), lse.end());
    return out;
  };
  int64_t tasks = 0;
  const std::vector<float> expected = attend([&](int64_t n, int64_t, const auto& body) {
    tasks = n;
    body(0, n);
  });
  CHECK(tasks >= 12);
  const std::vector<float> backwards = attend([](int64_t n, int64_t, const auto& body) {
    for (int64_t i = n; i-- > 0;) body(i, i + 1);
  });
  CHECK(backwards == expected);
}

}  // namespace

TEST_MAIN()
