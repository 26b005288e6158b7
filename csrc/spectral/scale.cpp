// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>
#include <vector>

#include "common/convert.h"
#include "spectral/problem.h"

namespace singlepass::spectral {
namespace {

constexpr int64_t kColumns = 512;  // of a tile whose rows stay in the first-level cache
constexpr int64_t kScaleBlocks = 64;

// The rows of a block, a multiple of kScaleRows, depend on the number of tokens alone, and so do the sums' bits.
int64_t block_rows(int64_t tokens) {
  const int64_t units = (tokens + kScaleRows - 1) / kScaleRows;
  return (units + kScaleBlocks - 1) / kScaleBlocks * kScaleRows;
}

int64_t block_count(int64_t tokens) {
  return tokens == 0 ? 0 : (tokens + block_rows(tokens) - 1) / block_rows(tokens);
}

SINGLEPASS_TARGET_CLONES void scale_row(float* q, const float* t, const float* s, float* sums, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    sums[i] += q[i] * t[i];
    q[i] *= s[i];
  }
}

SINGLEPASS_TARGET_CLONES void add(const float* values, double* totals, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) totals[i] += values[i];
}

void* row_of(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<char*>(m.data) + (row * m.stride + column) * size_of(m.dtype);
}

// Floats of a row: where they stand, or in `buffer`.
float* floats(const Matrix& m, int64_t row, int64_t column, int64_t n, float* buffer) {
  void* memory = row_of(m, row, column);
  if (m.dtype == DType::kFloat32) return static_cast<float*>(memory);
  widen(memory, m.dtype, buffer, n);
  return buffer;
}

// Sums in float over kScaleRows rows, in double over those.
void scale_block(const Scale& p, int64_t block, double* totals) {
  alignas(64) float q_buffer[kColumns], t_buffer[kColumns], sums[kColumns];
  const int64_t begin = block * block_rows(p.tokens), end = std::min(p.tokens, begin + block_rows(p.tokens));
  std::fill_n(totals, p.values, 0.0);
  for (int64_t first = begin; first < end; first += kScaleRows) {
    for (int64_t column = 0; column < p.values; column += kColumns) {
      const int64_t n = std::min(kColumns, p.values - column);
      std::fill_n(sums, n, 0.0f);
      for (int64_t row = first; row < std::min(end, first + kScaleRows); ++row) {
        float* q = floats(p.q, row, column, n, q_buffer);
        scale_row(q, floats(p.t, row, column, n, t_buffer), p.s + column, sums, n);
        if (q == q_buffer) narrow(q, row_of(p.q, row, column), p.q.dtype, n);
      }
      add(sums, totals + column, n);
    }
  }
}

}  // namespace

void scale(const Scale& p, const ParallelFor& parallel_for) {
  const int64_t blocks = block_count(p.tokens);
  const auto partials = std::make_unique_for_overwrite<double[]>(blocks * p.values);
  parallel_for_elements(parallel_for, blocks, p.tokens * p.values, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) scale_block(p, block, &partials[block * p.values]);
  });
  for (int64_t i = 0; i < p.values; ++i) {
    double sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) sum += partials[block * p.values + i];
    p.sums[i] = static_cast<float>(sum);
  }
}

}  // namespace singlepass::spectral
