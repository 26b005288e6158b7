// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace singlepass {

// Sum of a_i b_i in double precision, in a fixed order that does not depend on the vector width; no float's square
// overflows it.
double dot(const float* a, const float* b, int64_t n);

// dot(a, a, n), which reads and converts each element once.
double sum_of_squares(const float* a, int64_t n);

}  // namespace singlepass
