// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Loops on the CPU over the codes of a few tokens, which become floats, and over logits.
namespace singlepass::kv {

inline constexpr int64_t kTile = 32;  // tokens; buffers hold as many

// Packed codes as floats.
void unpack(const uint8_t* codes, int bits, int64_t tokens, int64_t head_dim, float* to);

// to = n * step + minimum for `groups` groups of a row, in place.
void restore(const uint16_t* steps, int64_t groups, int64_t head_dim, float* row);

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
