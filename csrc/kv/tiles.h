// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Loops on the CPU over the codes of a few tokens, which become floats, over their scales, and over logits.
namespace singlepass::kv {

inline constexpr int64_t kTile = 32;  // tokens; buffers hold as many

// Packed codes as floats.
void unpack(const uint8_t* codes, int bits, int64_t tokens, int64_t head_dim, float* to);

// to = n * step + minimum for `groups` groups of a row, in place.
void restore(const uint16_t* steps, int64_t groups, int64_t head_dim, float* row);

// to = x * steps. Returns x . minima.
float fold(const float* x, const float* steps, const float* minima, int64_t n, float* to);

// out = out * factor + channels * (sums + shift).
void add_piece(float* out, float factor, const float* channels, const float* sums, float shift, int64_t n);

// scores = scores * steps + minima * sum.
void apply_steps(float* scores, const float* steps, const float* minima, float sum, int64_t n);

// The first and the second of n pairs.
void separate(const float* pairs, int64_t n, float* first, float* second);

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
