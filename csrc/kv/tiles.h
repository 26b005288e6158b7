// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Loops on the CPU over a few tokens in floats, (tokens, head_dim) in the first-level cache.
namespace singlepass::kv {

inline constexpr int64_t kTile = 32;  // tokens; buffers hold as many

// Rows of tokens: floats, where bits is kFloats, or packed codes. They follow one another.
inline constexpr int kFloats = 32;
struct Rows {
  const void* data;
  int bits;
};

// Packed codes as floats.
void unpack(const uint8_t* codes, int bits, int64_t tokens, int64_t head_dim, float* to);

// to = n * step + minimum for `groups` groups of a row, in place.
void restore(const uint16_t* steps, int64_t groups, int64_t head_dim, float* row);

// scores[r * stride + t] = q_r . token_t. May write scores up to the next multiple of 8 tokens.
void dot(const float* q, int64_t rows, const Rows& tokens, int64_t count, int64_t head_dim, float* scores,
         int64_t stride);

// sums_r += sum over t of weights[r * stride + t] * token_t.
void accumulate(const float* weights, int64_t stride, int64_t rows, const Rows& tokens, int64_t count, int64_t head_dim,
                float* sums);

// softcap * tanh(s / softcap) in place.
void cap(float* scores, int64_t n, float softcap);

// The largest of n, NaN if one is.
float largest(const float* scores, int64_t n);

// scores = exp(scores - shift) in place, for scores <= shift. Returns their sum.
float exponentials(float* scores, int64_t n, float shift);

// A step of an online softmax over n more tokens. Scores become exp(score - row_max), with row_max the largest so far,
// and are added to row_sum; what was summed before must be multiplied by shifts.
void weigh(float* scores, int64_t rows, int64_t n, int64_t stride, float* row_max, float* row_sum, float* shifts);

}  // namespace singlepass::kv
