// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "rational/rational.h"

namespace singlepass::rational {

// A tensor of Problem's shape: element (o, c, i) stands at o * outer_stride + c * channel_stride + i.
struct View {
  void* data;
  int64_t outer_stride, channel_stride;
  int64_t step = 0, skip = 0;  // bytes, which launchers set: grid.h says what for
};

// A few numbers per group: `rows` is the number of groups, or 1 if all share them; `columns` per row.
struct Table {
  void* data;
  DType dtype;
  int64_t rows;
  int64_t columns;
};

// One call. Every tensor is seen as (outer, channels, inner) in the order of the result's memory, where element
// (o, c, i) has the number (o * channels + c) * inner + i. Where inner is 1, all channel strides are 1.
struct Problem {
  int64_t outer, channels, inner;
  DType dtype;  // of all views
  Form form;
  Table numerator, denominator;  // forms A, B and D: b_1 to b_n; C: b_0 to b_n
  Table bias;                    // data is null if there is none; one row
  View x;
  View gate;  // data is null if there is none
  View y;     // written by the forward pass
  View grad;  // of y; what follows is written by the backward pass
  View grad_x, grad_gate;
  Table grad_numerator, grad_denominator, grad_bias;
  const int64_t* seed;  // read by form D and by dropout
  uint32_t dropout_threshold;

  SINGLEPASS_HD int64_t groups() const { return numerator.rows > denominator.rows ? numerator.rows : denominator.rows; }
  SINGLEPASS_HD int64_t group_size() const { return channels / groups(); }
  SINGLEPASS_HD int64_t numel() const { return outer * channels * inner; }
  SINGLEPASS_HD bool needs_seed() const { return form == Form::kD || dropout_threshold > 0; }
  SINGLEPASS_HD Dropout dropout() const {
    const uint64_t key = needs_seed() ? static_cast<uint64_t>(*seed) : 0;
    return {key, dropout_threshold, 65536.0f / static_cast<float>(65536u - dropout_threshold)};
  }
};

// How many blocks a launch is cut into, in the direction that is free. It depends on shapes alone, so that sums are the
// same on every GPU.
struct LaunchShape {
  int threads = 256;        // at most; a multiple of 32
  int forward_items = 4;    // at least, per thread, each of them a vector: they share the thread's start
  int backward_items = 16;  // the same, and they share the block's last sums
  int blocks = 2112;        // about, where there is enough to do: more make the chains of additions shorter
  int64_t partial_bytes = 1 << 20;
};

// Writes y.
void forward(const Problem& p, const ParallelFor& parallel_for);
void forward(const Problem& p, const Gpu& gpu, const LaunchShape& shape = {});

// Writes all gradients. Sums have an order that depends neither on the number of threads nor on the GPU. On GPUs in two
// launches: sums by blocks, then their sums.
void backward(const Problem& p, const ParallelFor& parallel_for);
void backward(const Problem& p, const Gpu& gpu, const LaunchShape& shape = {});

SINGLEPASS_HD float load_scalar(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::kBFloat16 ? bfloat16_to_float(half) : float16_to_float(half);
}

SINGLEPASS_HD void store_scalar(float value, void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = dtype == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
  }
}

SINGLEPASS_HD float table_entry(const Table& table, int64_t group, int64_t column) {
  return load_scalar(table.data, table.dtype, (table.rows == 1 ? 0 : group) * table.columns + column);
}

// One group's coefficients, zero above the problem's degrees.
template <int M, int N>
SINGLEPASS_HD Coefficients<float, M, N> coefficients(const Problem& p, int64_t group) {
  const int missing = p.form == Form::kC ? 0 : 1;  // columns of b that the table does not have
  Coefficients<float, M, N> c;
#pragma unroll
  for (int i = 0; i <= M; ++i) c.a[i] = i < p.numerator.columns ? table_entry(p.numerator, group, i) : 0.0f;
#pragma unroll
  for (int i = 0; i <= N; ++i) {
    const int column = i - missing;
    const bool present = column >= 0 && column < p.denominator.columns;
    const float b = present ? table_entry(p.denominator, group, column) : 0.0f;
    c.b[i] = p.form == Form::kA ? fabsf(b) : b;
  }
  if (p.form == Form::kA) c.b[0] = 1.0f;
  return c;
}

}  // namespace singlepass::rational
