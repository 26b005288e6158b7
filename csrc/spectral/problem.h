// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"

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
// the blocks.
struct Scale {
  Matrix q, t;
  const float* s;
  float* sums;
  int64_t tokens, values;
};

// Rows whose sums are float; sums over those are double.
inline constexpr int64_t kScaleRows = 32;

// Into about how many thread blocks the tokens of a product are cut. Sizes alone decide, and so do the sums' bits.
inline constexpr int64_t kScaleLaunch = 1024;

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
// pass `out` is the gradient of z.
struct Lorentz {
  const void* z;
  const void* grad;
  void* out;
  float* grad_scale;
  const float* log_scale;
  DType dtype;
  float least, offset;  // times: sqrt(k), and what is added to every one
  int64_t rows, columns;
};

void scale(const Scale& p, const ParallelFor& parallel_for);
void sample(const std::vector<Draw>& layers, const DrawOptions& options, const ParallelFor& parallel_for);
void swap(const std::vector<Swap>& pairs, const ParallelFor& parallel_for);
void lorentz(const Lorentz& p, const ParallelFor& parallel_for);
void lorentz_backward(const Lorentz& p, const ParallelFor& parallel_for);

// In two launches: the product with partial sums, and their sums.
void scale(const Scale& p, const Gpu& gpu, int64_t blocks = kScaleLaunch);

// A thread block for each layer; one launch for every kPieceLayers of them.
void sample(const std::vector<Draw>& layers, const DrawOptions& options, const Gpu& gpu, int threads = 1024);

// A warp for each row that is exchanged; one launch for every kPiecePairs pairs.
void swap(const std::vector<Swap>& pairs, const Gpu& gpu, int threads = 256);

// A warp for each row; the backward pass adds up partial sums in a second launch.
void lorentz(const Lorentz& p, const Gpu& gpu, int threads = 256);
void lorentz_backward(const Lorentz& p, const Gpu& gpu, int threads = 256);

}  // namespace singlepass::spectral
