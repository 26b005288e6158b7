// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "rational/cpu_loops.h"
#include "rational/problem.h"
#include "rational/rational.h"

// The gradients of coefficients and bias, which are sums over all elements, on the CPU.
namespace singlepass::rational {

// Sums are made in three steps, so that no chain of additions in float32 is long: over the vectors of a block, over
// some blocks, and over all of those in double precision.
inline constexpr int64_t kBlocks = 32;

// Four sums side by side, whose additions need not wait for one another.
inline double sum_of_lanes(const float (&lanes)[kSumLanes]) {
  double sums[4] = {};
  for (int k = 0; k < kSumLanes; ++k) sums[k % 4] += lanes[k];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Sums in double precision: (groups, M + 1 + N + 1) and (channels,).
template <int M, int N>
struct Totals {
  static constexpr int kWidth = M + 1 + N + 1;
  std::vector<double> coefficients, bias;

  explicit Totals(const Problem& p)
      : coefficients(p.groups() * kWidth), bias(p.bias.data == nullptr ? 0 : p.channels) {}

  static int64_t bytes(const Problem& p) { return (p.groups() * kWidth + p.channels) * sizeof(double); }

  // Takes over a group's sums and clears them.
  void take(int64_t group, LaneSums<M, N>& sums) {
    double* row = &coefficients[group * kWidth];
    for (int i = 0; i <= M; ++i) row[i] += sum_of_lanes(sums.a[i]);
    for (int i = 0; i <= N; ++i) row[M + 1 + i] += sum_of_lanes(sums.b[i]);
    sums = {};
  }

  void add(const Totals& other) {
    for (size_t i = 0; i < coefficients.size(); ++i) coefficients[i] += other.coefficients[i];
    for (size_t c = 0; c < bias.size(); ++c) bias[c] += other.bias[c];
  }

  void store(const Problem& p) const {
    const auto fold = [&](const Table& table, int64_t row, int64_t column) {  // over the groups that share a row
      if (table.rows > 1) return coefficients[row * kWidth + column];
      double sum = 0.0;
      for (int64_t k = 0; k < p.groups(); ++k) sum += coefficients[k * kWidth + column];
      return sum;
    };
    const int first_b = M + 1 + (p.form == Form::kC ? 0 : 1);
    for (int64_t row = 0; row < p.numerator.rows; ++row) {
      for (int64_t i = 0; i < p.numerator.columns; ++i) {
        const double sum = fold(p.grad_numerator, row, i);
        store_scalar(static_cast<float>(sum), p.grad_numerator.data, p.grad_numerator.dtype,
                     row * p.numerator.columns + i);
      }
    }
    for (int64_t row = 0; row < p.denominator.rows; ++row) {
      for (int64_t i = 0; i < p.denominator.columns; ++i) {
        const float sum = static_cast<float>(fold(p.grad_denominator, row, first_b + i));
        const float b = p.form == Form::kA ? table_entry(p.denominator, row, i) : 1.0f;
        store_scalar(with_sign_of(b, sum), p.grad_denominator.data, p.grad_denominator.dtype,
                     row * p.denominator.columns + i);
      }
    }
    for (size_t c = 0; c < bias.size(); ++c) {
      store_scalar(static_cast<float>(bias[c]), p.grad_bias.data, p.grad_bias.dtype, static_cast<int64_t>(c));
    }
  }
};

// Sums on their way to a Totals.
template <int M, int N>
struct Partials {
  struct Group {
    LaneSums<M, N> sums = {};
    int64_t blocks = 0;
  };
  std::vector<Group> groups;
  std::vector<float> bias;

  explicit Partials(const Problem& p) : groups(p.groups()), bias(p.bias.data == nullptr ? 0 : p.channels) {}

  // `count` elements of a group were added to its sums.
  void added(int64_t group, int64_t count, Totals<M, N>& totals) {
    Group& g = groups[group];
    g.blocks += (count + kBlock - 1) / kBlock;
    if (g.blocks < kBlocks) return;
    totals.take(group, g.sums);
    g.blocks = 0;
  }

  void flush(Totals<M, N>& totals) {
    for (size_t k = 0; k < groups.size(); ++k) {
      totals.take(static_cast<int64_t>(k), groups[k].sums);
      groups[k].blocks = 0;
    }
    for (size_t c = 0; c < bias.size(); ++c) {
      totals.bias[c] += bias[c];
      bias[c] = 0.0f;
    }
  }
};

}  // namespace singlepass::rational
