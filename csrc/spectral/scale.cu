// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/reduce.h"
#include "spectral/cuda_variant.h"
#include "spectral/problem.h"

// q *= s by columns, and the column sums of q * t. A thread block covers a tile of columns over a stretch of rows. Its
// threads are (kRows, kColumns): each keeps one vector of columns and takes every kRows-th row. It sums kScaleRows rows
// in float32 at a time; these sums, and all sums of sums, are in double.
namespace singlepass::spectral {
namespace {

constexpr int kThreads = 256, kColumns = kWarp, kRows = kThreads / kColumns;
constexpr int64_t kLeastRows = 32, kMaxParts = 256;  // rows of a stretch, and stretches

// How a launch is divided: `tiles` tiles of columns times `parts` stretches of `rows` rows. sums: (parts, values).
struct Cut {
  int64_t tiles, parts, rows;
  double* sums;
};

// The sums of all threads, (rows of threads, elements of a vector, columns of threads). Neighbouring threads write to
// neighbouring banks; what is added to a row lets half a warp read neighbouring columns of q from different ones.
template <int kWidth, int kStep>
struct TileSums {
  double value[kRows][kWidth][kColumns + kWarp / 2 / kStep];
};

// Rows that a thread loads together, so that their loads are all in flight at once.
template <class V>
constexpr int kBatch = 8 / V::bytes;

// kBatch rows of a thread: adds q * t to its sums and writes q * s.
template <class V>
__device__ __forceinline__ void scale_batch(const Scale& p, const Vectors& vectors, int64_t row, int64_t end,
                                            int64_t column, const float* s, float* sums) {
  Raw<V::width> q[kBatch<V>], t[kBatch<V>];
  const DType q_dtype = V::dtype(p.q.dtype), t_dtype = V::dtype(p.t.dtype);
#pragma unroll
  for (int j = 0; j < kBatch<V>; ++j) {
    const int64_t r = row + j * kRows;
    if (r >= end) break;
    load(p.q.data, q_dtype, r * p.q.stride + column, q[j], vectors.apart());
    load(p.t.data, t_dtype, r * p.t.stride + column, t[j], vectors.apart());
  }
#pragma unroll
  for (int j = 0; j < kBatch<V>; ++j) {
    const int64_t r = row + j * kRows;
    if (r >= end) break;
    float q_values[V::width], t_values[V::width];
    decode(q[j], q_dtype, q_values);
    decode(t[j], t_dtype, t_values);
#pragma unroll
    for (int k = 0; k < V::width; ++k) {
      sums[k] += q_values[k] * t_values[k];
      q_values[k] *= s[k];
    }
    store(encode_any_nan<V::width>(q_values, q_dtype), q_dtype, p.q.data, r * p.q.stride + column, vectors.apart());
  }
}

// Runs on a grid of (tiles of columns, stretches of rows).
template <class V>
__global__ void __launch_bounds__(kThreads, 2) scale_kernel(const Scale p, const Cut cut) {
  using Sums = TileSums<V::width, V::step>;
  SINGLEPASS_SHARED(Sums, tile);
  const int own_column = static_cast<int>(threadIdx.x) % kColumns, own_row = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kColumns * V::width, column = first + own_column * V::step;
  const int64_t columns = p.values - first < kColumns * V::width ? p.values - first : kColumns * V::width;
  const Vectors vectors = {V::spread, columns};
  const int64_t begin = blockIdx.y * cut.rows, end = begin + cut.rows < p.tokens ? begin + cut.rows : p.tokens;
  // Stage 1: each thread goes down its rows.
  double totals[V::width] = {};
  if (own_column * V::step < vectors.end()) {
    float s[V::width];
#pragma unroll
    for (int k = 0; k < V::width; ++k) s[k] = p.s[column + vectors.offset(k)];
    for (int64_t unit = begin + own_row; unit < end; unit += kScaleRows * kRows) {
      const int64_t unit_end = unit + kScaleRows * kRows < end ? unit + kScaleRows * kRows : end;
      float sums[V::width] = {};
      for (int64_t row = unit; row < unit_end; row += kBatch<V> * kRows) {
        scale_batch<V>(p, vectors, row, unit_end, column, s, sums);
      }
#pragma unroll
      for (int k = 0; k < V::width; ++k) totals[k] += sums[k];
    }
  }
  // Stage 2: adds the sums of the rows of threads in their order, and writes one partial sum for each column.
#pragma unroll
  for (int k = 0; k < V::width; ++k) tile.value[own_row][k][own_column] = totals[k];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < columns; i += kThreads) {
    const int half = i >= vectors.end(), place = i - half * static_cast<int>(vectors.end());  // in a half of its own
    double sum = 0.0;
    for (int row = 0; row < kRows; ++row) {
      sum += tile.value[row][half * V::step + place % V::step][place / V::step];
    }
    cut.sums[blockIdx.y * p.values + first + i] = sum;
  }
}

// Adds the partial sums of the stretches, for kColumns columns. Each row of threads adds every kRows-th stretch; then
// the sums of these rows are added in their order.
__global__ void __launch_bounds__(kThreads) reduce_kernel(const Scale p, const Cut cut) {
  using Sums = TileSums<1, 1>;
  SINGLEPASS_SHARED(Sums, tile);
  const int own_column = static_cast<int>(threadIdx.x) % kColumns, own_row = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + own_column;
  double sum = 0.0;
  for (int64_t part = own_row; part < cut.parts && column < p.values; part += kRows) {
    sum += cut.sums[part * p.values + column];
  }
  tile.value[own_row][0][own_column] = sum;
  __syncthreads();
  if (own_row > 0 || column >= p.values) return;
  for (int row = 1; row < kRows; ++row) sum += tile.value[row][0][own_column];
  p.sums[column] = static_cast<float>(sum);
}

template <class V>
struct Kernel {
  static constexpr auto value = &scale_kernel<V>;
};

bool takes_vectors(const Matrix& m, int64_t values) {
  return is_aligned(m.data) && m.stride % kVector == 0 && values % kVector == 0;
}

bool takes_vectors(const Scale& p) {
  return p.q.dtype == p.t.dtype && takes_vectors(p.q, p.values) && takes_vectors(p.t, p.values);
}

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// About `blocks` thread blocks in all, with at least kLeastRows rows each.
Cut make_cut(const Scale& p, int64_t blocks) {
  const int64_t tiles = divide_up(p.values, kColumns * (takes_vectors(p) ? kVector : 1));
  const int64_t most = std::min(kMaxParts, divide_up(p.tokens, kLeastRows));
  const int64_t wanted = std::clamp<int64_t>(blocks / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(most, 1));
  const int64_t rows = std::max(kLeastRows, divide_up(p.tokens, wanted));
  return {tiles, divide_up(p.tokens, rows), rows, nullptr};
}

}  // namespace

void scale(const Scale& p, const Gpu& gpu, int64_t blocks) {
  if (p.values == 0) return;
  Cut cut = make_cut(p, blocks);
  cut.sums = static_cast<double*>(gpu.allocate(cut.parts * p.values * static_cast<int64_t>(sizeof(double))));
  if (cut.parts > 0) {
    const dim3 grid(static_cast<unsigned>(cut.tiles), static_cast<unsigned>(cut.parts));
    launch(pick<Kernel>(takes_vectors(p), p.q.dtype), grid, dim3(kThreads), 0, gpu, p, cut);
  }
  const dim3 grid(static_cast<unsigned>(divide_up(p.values, kColumns)));
  launch(&reduce_kernel, grid, dim3(kThreads), 0, gpu, p, cut);
}

}  // namespace singlepass::spectral
