// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/dtype.h"

// What the ops of sparse spectral training work on; python/singlepass/_ops/spectral.py says what they do.
namespace singlepass::spectral {

// Columns of a row of int8 codes that share a factor.
inline constexpr int64_t kBlock = 128;

// Rows of contiguous elements, `stride` elements apart.
struct Matrix {
  void* data;
  DType dtype;
  int64_t stride;
};

// q *= s by columns, and the column sums of q * t: (tokens, values). Sums are made block by block of rows, then over
// the blocks: `partials` has room for `values` numbers of each, block_count(tokens) blocks on the CPU.
struct Scale {
  Matrix q, t;
  const float* s;
  float* sums;
  double* partials;
  int64_t tokens, values;
};

inline constexpr int64_t kScaleRows = 32;
inline constexpr int64_t kScaleBlocks = 64;

// The rows of a block, a multiple of kScaleRows, depend on the number of tokens alone, and so do the sums' bits.
SINGLEPASS_HD int64_t block_rows(int64_t tokens) {
  const int64_t units = (tokens + kScaleRows - 1) / kScaleRows;
  return (units + kScaleBlocks - 1) / kScaleBlocks * kScaleRows;
}

SINGLEPASS_HD int64_t block_count(int64_t tokens) {
  return tokens == 0 ? 0 : (tokens + block_rows(tokens) - 1) / block_rows(tokens);
}

// Draws of one layer: `rank` of `count` places. `exchange` (rank,): the frozen row that comes to each place, or -1.
struct Draw {
  const void* s;
  DType dtype;
  int64_t count, rank, id;
  int64_t* exchange;
};

struct DrawOptions {
  uint64_t seed, draw;
  double uniform;
};

// Rows to exchange between two segments. Frozen rows are int8 codes where `scales` is not null, (columns + 127) / 128
// factors for each row.
struct Swap {
  void* active;
  void* frozen;
  float* scales;
  const int64_t* exchange;
  DType active_dtype, frozen_dtype;
  int64_t rank, frozen_rows, columns;

  // Whether the vector in a place is exchanged.
  SINGLEPASS_HD bool changes(int64_t place) const { return exchange[place] >= 0 && exchange[place] < frozen_rows; }
};

// HyboNet's map of rows (rows, columns), contiguous. In the forward pass grad and grad_scale are null; in the backward
// pass `out` is the gradient of z, and `partials` has room for lorentz_blocks(rows) numbers.
struct Lorentz {
  const void* z;
  const void* grad;
  void* out;
  double* partials;
  float* grad_scale;
  const float* log_scale;
  DType dtype;
  float least, offset;  // times: sqrt(k), and what is added to every one
  int64_t rows, columns;
};

}  // namespace singlepass::spectral
