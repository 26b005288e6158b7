// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/reduce.h"
#include "spectral/cuda.h"
#include "spectral/cuda_variant.h"

// A thread block covers a tile of columns over a stretch of rows. A thread keeps its vector of columns and takes every
// kRows-th row; its sums are float over kScaleRows of them, double over those, as all sums after them are.
namespace singlepass::spectral {
namespace {

constexpr int kThreads = 256, kColumns = kWarp, kRows = kThreads / kColumns;
constexpr int64_t kLeastRows = 32, kMaxParts = 256;  // rows of a stretch, and stretches

// How columns and rows are cut: `parts` stretches of `rows` rows, for each of `tiles`.
struct Cut {
  int64_t tiles, parts, rows;
};

// One number for each column of the tile and each row of threads; neighbouring threads write to neighbouring banks.
template <int kWidth>
struct TileSums {
  double value[kRows][kWidth][kColumns];
};

// Rows of which a thread has all loads in flight before it converts the first.
template <class V>
constexpr int kBatch = 8 / V::bytes;

template <class V>
__device__ __forceinline__ void scale_batch(const Scale& p, int64_t row, int64_t end, int64_t column, const float* s,
                                            float* sums) {
  Raw<V::width> q[kBatch<V>], t[kBatch<V>];
  const DType q_dtype = V::dtype(p.q.dtype), t_dtype = V::dtype(p.t.dtype);
#pragma unroll
  for (int j = 0; j < kBatch<V>; ++j) {
    const int64_t r = row + j * kRows;
    if (r >= end) break;
    load(p.q.data, q_dtype, r * p.q.stride + column, q[j]);
    load(p.t.data, t_dtype, r * p.t.stride + column, t[j]);
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
    store(encode_any_nan<V::width>(q_values, q_dtype), q_dtype, p.q.data, r * p.q.stride + column);
  }
}

template <class V>
__global__ void __launch_bounds__(kThreads, 2) scale_kernel(const Scale p, const Cut cut) {
  SINGLEPASS_SHARED(TileSums<V::width>, tile);
  const int own_column = static_cast<int>(threadIdx.x) % kColumns, own_row = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kColumns * V::width, column = first + own_column * V::width;
  const int64_t begin = blockIdx.y * cut.rows, end = begin + cut.rows < p.tokens ? begin + cut.rows : p.tokens;
  double totals[V::width] = {};
  if (column < p.values) {
    float s[V::width];
#pragma unroll
    for (int k = 0; k < V::width; ++k) s[k] = p.s[column + k];
    for (int64_t unit = begin + own_row; unit < end; unit += kScaleRows * kRows) {
      const int64_t unit_end = unit + kScaleRows * kRows < end ? unit + kScaleRows * kRows : end;
      float sums[V::width] = {};
      for (int64_t row = unit; row < unit_end; row += kBatch<V> * kRows) {
        scale_batch<V>(p, row, unit_end, column, s, sums);
      }
#pragma unroll
      for (int k = 0; k < V::width; ++k) totals[k] += sums[k];
    }
  }
#pragma unroll
  for (int k = 0; k < V::width; ++k) tile.value[own_row][k][own_column] = totals[k];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kColumns * V::width && first + i < p.values; i += kThreads) {
    double sum = 0.0;
    for (int row = 0; row < kRows; ++row) sum += tile.value[row][i % V::width][i / V::width];
    p.partials[blockIdx.y * p.values + first + i] = sum;
  }
}

// Sums over the parts: a row of threads takes every kRows-th, then the rows' sums are added in their order.
__global__ void __launch_bounds__(kThreads) reduce_kernel(const Scale p, const int64_t parts) {
  SINGLEPASS_SHARED(TileSums<1>, tile);
  const int own_column = static_cast<int>(threadIdx.x) % kColumns, own_row = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + own_column;
  double sum = 0.0;
  for (int64_t part = own_row; part < parts && column < p.values; part += kRows) {
    sum += p.partials[part * p.values + column];
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

Cut make_cut(const Scale& p, int64_t blocks) {
  const int64_t tiles = divide_up(p.values, kColumns * (takes_vectors(p) ? kVector : 1));
  const int64_t most = std::min(kMaxParts, divide_up(p.tokens, kLeastRows));
  const int64_t wanted = std::clamp<int64_t>(blocks / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(most, 1));
  const int64_t rows = std::max(kLeastRows, divide_up(p.tokens, wanted));
  return {tiles, divide_up(p.tokens, rows), rows};
}

}  // namespace

int64_t scale_partials(const Scale& p, int64_t blocks) {
  return make_cut(p, blocks).parts * p.values;
}

cudaError_t launch_scale(const Scale& p, cudaStream_t stream, int64_t blocks) {
  if (p.values == 0) return cudaSuccess;
  const Cut cut = make_cut(p, blocks);
  if (cut.parts > 0) {
    const dim3 grid(static_cast<unsigned>(cut.tiles), static_cast<unsigned>(cut.parts));
    const auto kernel = pick<Kernel>(takes_vectors(p), p.q.dtype);
    const cudaError_t error = launch(kernel, grid, dim3(kThreads), 0, stream, p, cut);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(divide_up(p.values, kColumns)));
  return launch(&reduce_kernel, grid, dim3(kThreads), 0, stream, p, cut.parts);
}

}  // namespace singlepass::spectral
