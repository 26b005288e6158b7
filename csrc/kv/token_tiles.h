// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "common/dtype.h"

// Loops on the CPU over a few tokens that are not compressed, whatever their dtype.
namespace singlepass::kv {

// Rows of tokens, `stride` elements apart.
struct TokenRows {
  const void* data;
  DType dtype;
  int64_t stride;
};

// scores[r * stride + t] = q_r . token_t, of a multiple of 16 channels. May write scores up to the next multiple of 16
// tokens.
void dot(const float* q, int64_t rows, const TokenRows& tokens, int64_t count, int64_t head_dim, float* scores,
         int64_t stride);

// sums_r += sum over t of weights[r * stride + t] * token_t.
void accumulate(const float* weights, int64_t stride, int64_t rows, const TokenRows& tokens, int64_t count,
                int64_t head_dim, float* sums);

}  // namespace singlepass::kv
