// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

// What codes are multiplied by, queries or weights, is rounded to integers with a step of its own for each row and
// block of tokens: the same integers on CPUs, whose instructions multiply 16 bits, and on GPUs, whose tensor cores
// multiply bytes. That is all that is lost: sums of products are exact.
namespace singlepass::kv {

inline constexpr int64_t kLargestInteger = 127 * 256 + 127;  // of two signed bytes

// The largest integer of which `terms` products with codes add up in 32 bits.
inline float largest_integer(int bits, int64_t terms) {
  const int64_t most = std::numeric_limits<int32_t>::max() / (terms * ((1 << bits) - 1));
  return static_cast<float>(std::min(most, kLargestInteger));
}

}  // namespace singlepass::kv
