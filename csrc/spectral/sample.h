// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "common/philox.h"
#include "spectral/problem.h"

// Drawing without replacement: place j starts a clock that rings after an exponential time with rate p_j, and the first
// r to ring are drawn. That is torch.multinomial's distribution, and every place has a random number of its own.
namespace singlepass::spectral {

// Nothing that is negative, infinite or NaN is ever significant.
SINGLEPASS_HD double weight_of(float s) {
  return s > 0.0f && is_finite(s) ? static_cast<double>(s) : 0.0;
}

// `total` is the sum of all weights; where it is zero, all places are equally likely.
SINGLEPASS_HD double probability(double weight, double total, int64_t count, double uniform) {
  const double even = 1.0 / static_cast<double>(count);
  return uniform * even + (1.0 - uniform) * (total > 0.0 ? weight / total : even);
}

SINGLEPASS_HD double race_time(const DrawOptions& options, int64_t id, int64_t place, double p) {
  const uint64_t stream = (options.draw << 32) + static_cast<uint64_t>(id);
  const Philox4 random = philox4x32(options.seed, static_cast<uint64_t>(place), stream);
  // 52 random bits, and half of the last one so that the number is inside (0, 1).
  const uint64_t bits = static_cast<uint64_t>(random.word[1]) << 20 | random.word[0] >> 12;
  return -log((static_cast<double>(bits) + 0.5) * 0x1p-52) / p;
}

// Whether place a rings before place b.
SINGLEPASS_HD bool rings_first(double time_a, int64_t a, double time_b, int64_t b) {
  return time_a < time_b || (time_a == time_b && a < b);
}

}  // namespace singlepass::spectral
