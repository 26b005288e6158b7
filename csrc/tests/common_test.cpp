// SPDX-License-Identifier: Apache-2.0
// Conversions, random numbers and elementary functions of common/.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "check.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/philox.h"

namespace {

using namespace singlepass;

// 2^24 bit patterns spread over all of float, and those around every rounding boundary.
void for_each_float(const std::function<void(float)>& check) {
  for (std::uint64_t u = 0; u <= 0xffffffffu; u += 257) check(bit_cast<float>(static_cast<std::uint32_t>(u)));
  for (std::uint64_t u = 0; u <= 0xffffffffu; u += 4096) {
    check(bit_cast<float>(static_cast<std::uint32_t>(u)));
    check(bit_cast<float>(static_cast<std::uint32_t>(u - 1)));
    check(bit_cast<float>(static_cast<std::uint32_t>(u + 1)));
  }
}

TEST(sixteen_bit_floats_survive_the_way_through_float) {
  for (std::uint32_t h = 0; h <= 0xffffu; ++h) {
    const auto half = static_cast<std::uint16_t>(h);
    const float b = bfloat16_to_float(half), f = float16_to_float(half);
    CHECK_EQUAL(bit_cast<std::uint32_t>(b), h << 16);
    if (b == b) CHECK_EQUAL(float_to_bfloat16(b), half);
    if (b != b) CHECK_EQUAL(float_to_bfloat16(b), 0x7fc0u);
    if (f == f) CHECK_EQUAL(float_to_float16(f), half);
    if (f != f) CHECK_EQUAL(float_to_float16(f) & 0x7fffu, 0x7e00u);
  }
}

#if defined(__FLT16_MANT_DIG__)
TEST(float16_rounds_as_the_compiler_does) {
  for (std::uint32_t h = 0; h <= 0xffffu; ++h) {
    const auto half = static_cast<std::uint16_t>(h);
    const float expected = static_cast<float>(bit_cast<_Float16>(half)), value = float16_to_float(half);
    CHECK(value == expected || (value != value && expected != expected));
  }
  for_each_float([](float x) {
    if (x == x) CHECK_EQUAL(float_to_float16(x), bit_cast<std::uint16_t>(static_cast<_Float16>(x)));
  });
}
#endif

TEST(bfloat16_rounds_to_the_nearest_and_to_even) {
  for_each_float([](float x) {
    if (x != x) return;
    const std::uint32_t down = bit_cast<std::uint32_t>(x) & 0xffff0000u;
    const std::uint32_t discarded = bit_cast<std::uint32_t>(x) & 0xffffu;
    const bool up = discarded > 0x8000u || (discarded == 0x8000u && (down & 0x10000u) != 0);
    CHECK_EQUAL(float_to_bfloat16(x), static_cast<std::uint16_t>((down + (up ? 0x10000u : 0u)) >> 16));
  });
}

TEST(stochastic_rounding_goes_up_for_as_many_draws_as_it_discards) {
  for (const float x : {1.0f, 1.001f, -3.14159f, 1e-30f, -1e-40f, 65504.0f}) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    std::uint32_t up = 0;
    for (std::uint32_t random = 0; random <= 0xffffu; ++random) {
      const std::uint16_t rounded = float_to_bfloat16_stochastic(x, random);
      CHECK(rounded == bits >> 16 || rounded == (bits >> 16) + 1);
      up += rounded != bits >> 16;
    }
    CHECK_EQUAL(up, bits & 0xffffu);
  }
}

TEST(stochastic_rounding_never_leaves_the_finite_numbers) {
  const float largest = bit_cast<float>(0x7f7fffffu), infinity = bit_cast<float>(0x7f800000u);
  for (const std::uint32_t random : {0u, 1u, 0x7fffu, 0xffffu}) {
    CHECK_EQUAL(float_to_bfloat16_stochastic(largest, random), 0x7f7fu);
    CHECK_EQUAL(float_to_bfloat16_stochastic(-largest, random), 0xff7fu);
    CHECK_EQUAL(float_to_bfloat16_stochastic(infinity, random), 0x7f80u);
    CHECK_EQUAL(float_to_bfloat16_stochastic(-infinity, random), 0xff80u);
    CHECK_EQUAL(float_to_bfloat16_stochastic(bit_cast<float>(0x7f800001u), random), 0x7fc0u);
  }
}

// The known answers of Random123's kat_vectors for philox4x32-10.
TEST(philox_gives_the_known_answers) {
  const auto check = [](std::uint64_t key, std::uint64_t low, std::uint64_t high, std::vector<std::uint32_t> expected) {
    const Philox4 random = philox4x32(key, low, high);
    CHECK(std::vector<std::uint32_t>(random.word, random.word + 4) == expected);
  };
  check(0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  check(~0ull, ~0ull, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  check(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

// From the smallest subnormal's square to the largest float's, beside sums of other magnitudes.
TEST(a_product_of_floats_is_added_as_by_one_fused_operation) {
  for (std::uint64_t u = 0; u <= 0xffffffffu; u += 4099) {
    const float a = bit_cast<float>(static_cast<std::uint32_t>(u));
    const float b = bit_cast<float>(static_cast<std::uint32_t>(7 * u));
    if (!is_finite(a) || !is_finite(b)) continue;
    const double product = static_cast<double>(a) * b;
    for (const double sum : {0.1, product / 3.0, -product * (1.0 + 0x1p-50), 1e20 * product}) {
      CHECK_EQUAL(add_product(sum, a, b), std::fma(static_cast<double>(a), static_cast<double>(b), sum));
    }
  }
}

TEST(exp2_of_is_within_two_ulp) {
  double largest = 0.0;
  for (double a = -125.0; a < 10.0; a += 0.00037) {
    const float x = static_cast<float>(a);
    const double truth = std::exp2(static_cast<double>(x));
    largest = std::max(largest, std::fabs(exp2_of(x) - truth) / truth);
  }
  CHECK(largest <= 2.0 * std::numeric_limits<float>::epsilon());
  CHECK_EQUAL(exp2_of(0.0f), 1.0f);
  CHECK_EQUAL(exp2_of(-1000.0f), 0.0f);
  CHECK_EQUAL(exp2_of(-INFINITY), 0.0f);
  CHECK(std::isnan(exp2_of(NAN)));
}

TEST(one_plus_exp_negative_is_within_two_ulp) {
  double largest = 0.0;
  for (double a = 0.0; a < 90.0; a += 0.00037) {
    const float argument = static_cast<float>(a);
    const double truth = 1.0 + std::exp(-static_cast<double>(argument));
    largest = std::max(largest, std::fabs(one_plus_exp_negative(argument) - truth));
  }
  CHECK(largest <= 2.0 * std::numeric_limits<float>::epsilon());
  CHECK_EQUAL(one_plus_exp_negative(0.0f), 2.0f);
  CHECK_EQUAL(one_plus_exp_negative(1e30f), 1.0f);
  CHECK_EQUAL(one_plus_exp_negative(INFINITY), 1.0f);
  CHECK(std::isnan(one_plus_exp_negative(NAN)));
}

TEST(threads_get_enough_elements_to_be_worth_waking) {
  const auto grain_of = [](int64_t n, int64_t elements) {
    int64_t found = 0;
    const ParallelFor threads([&](int64_t, int64_t grain, const auto&) { found = grain; }, 64);
    parallel_for_elements(threads, n, elements, [](int64_t, int64_t) {});
    return found;
  };
  CHECK_EQUAL(grain_of(64, kParallelElements - 1), 0);  // all on this thread
  CHECK_EQUAL(grain_of(64, kParallelElements), 64);
  CHECK_EQUAL(grain_of(64, 3 * kParallelElements), 22);
  CHECK_EQUAL(grain_of(64, 1000 * kParallelElements), 1);
}

TEST(sign_and_maximum) {
  CHECK_EQUAL(sign(2.5f), 1.0f);
  CHECK_EQUAL(sign(-1e-45f), -1.0f);
  CHECK_EQUAL(sign(0.0f), 0.0f);
  CHECK_EQUAL(sign(-0.0f), 0.0f);
  CHECK_EQUAL(maximum(1.0f, 2.0f), 2.0f);
  CHECK_EQUAL(maximum(2.0f, 1.0f), 2.0f);
  CHECK(std::isnan(maximum(NAN, 1.0f)));
  CHECK(std::isnan(maximum(1.0f, NAN)));
}

}  // namespace

TEST_MAIN()
