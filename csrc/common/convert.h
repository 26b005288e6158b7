// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/dtype.h"

namespace singlepass {

// n elements of any storage type to float, and back to the nearest.
void widen(const void* from, DType dtype, float* to, int64_t n);
void narrow(const float* from, void* to, DType dtype, int64_t n);

}  // namespace singlepass
