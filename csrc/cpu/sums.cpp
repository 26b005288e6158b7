// SPDX-License-Identifier: Apache-2.0
#include "singlepass/common/sums.h"

#include "singlepass/common/macros.h"

namespace singlepass {

SINGLEPASS_TARGET_CLONES double dot(const float* a, const float* b, int64_t n) {
  constexpr int kWidth = 16;
  double lanes[kWidth] = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    for (int k = 0; k < kWidth; ++k) lanes[k] += static_cast<double>(a[i + k]) * b[i + k];
  }
  for (int k = 0; i + k < n; ++k) lanes[k] += static_cast<double>(a[i + k]) * b[i + k];
  double sum = 0.0;
  for (int k = 0; k < kWidth; ++k) sum += lanes[k];
  return sum;
}

}  // namespace singlepass
