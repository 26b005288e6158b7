// SPDX-License-Identifier: Apache-2.0
#include "common/sums.h"

#include "common/macros.h"
#include "common/prefetch.h"

// The product of two floats is exact in double precision: a fused addition gives the same bits as two operations.
namespace singlepass {
namespace {

constexpr int kWidth = 16;

// The sum of product(0) to product(n - 1), which reads `from`.
template <class Product, class... Floats>
SINGLEPASS_HD double sum_of(int64_t n, const Product& product, const Floats*... from) {
  double lanes[kWidth] = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    (prefetch_ahead(from + i, kWidth * sizeof(float)), ...);
    for (int k = 0; k < kWidth; ++k) lanes[k] += product(i + k);
  }
  for (int k = 0; i + k < n; ++k) lanes[k] += product(i + k);
  double sum = 0.0;
  for (int k = 0; k < kWidth; ++k) sum += lanes[k];
  return sum;
}

}  // namespace

SINGLEPASS_TARGET_CLONES SINGLEPASS_FUSED_MULTIPLY_ADD double dot(const float* a, const float* b, int64_t n) {
  return sum_of(n, [=](int64_t i) { return static_cast<double>(a[i]) * b[i]; }, a, b);
}

SINGLEPASS_TARGET_CLONES SINGLEPASS_FUSED_MULTIPLY_ADD double sum_of_squares(const float* a, int64_t n) {
  return sum_of(
      n,
      [=](int64_t i) {
        const double v = a[i];
        return v * v;
      },
      a);
}

}  // namespace singlepass
