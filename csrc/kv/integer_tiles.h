// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kv/integers.h"

// Loops on the CPU over the codes of a few tokens, as integers. What codes are multiplied by,
// queries or weights, is rounded to integers (kv/integers.h) with a step of its own for each row, and that is all that
// is lost: the sums of products are exact, and so the same on every processor.
namespace singlepass::kv {

// Packed codes of tokens, whose rows follow one another.
struct Rows {
  const uint8_t* codes;
  int bits;
};

inline constexpr int64_t kIntegerPad = 32;  // integers that may be read beyond the last row of queries

// What stands for x * steps of a row is `to` times the row's step, and its bias is x . minima. The step is NaN if a
// product is not finite, and 0 if all are below 2^-100, which counts as nothing. Rows lie `stride` numbers apart, which
// is a multiple of kFoldPad: zeros are written up to the next one. `products` is memory for as many floats.
inline constexpr int64_t kFoldPad = 16;
struct Folded {
  float step, bias;
};
void fold_to_integers(const float* x, const float* steps, const float* minima, int64_t n, int64_t rows, int64_t stride,
                      float largest, float* products, int16_t* to, Folded* results);

// to = sums * step + bias.
void from_integers(const int32_t* sums, int64_t n, float step, float bias, float* to);

// out = out * factor + channels * (sums * step + bias).
void add_integers(const int32_t* sums, int64_t n, float step, float bias, const float* channels, float factor,
                  float* out);

// sums[r * stride + t] = q_r . token_t. May write sums up to the next multiple of 16 tokens.
void dot(const int16_t* q, int64_t rows, const Rows& tokens, int64_t count, int64_t head_dim, int32_t* sums,
         int64_t stride);

// sums_r += sum over t of weights[r * stride + t] * token_t. If count is odd, the weight after the last is 0.
void accumulate(const int16_t* weights, int64_t stride, int64_t rows, const Rows& tokens, int64_t count,
                int64_t head_dim, int32_t* sums);

}  // namespace singlepass::kv
