// SPDX-License-Identifier: Apache-2.0
#include "common/reduce.h"
#include "spectral/cuda_variant.h"
#include "spectral/lorentz.h"

// A warp works on one row after another, in two sweeps: sums over the row, then the result. The first kHeldByLane
// elements of each lane stay in registers in between; the rest of a long row is read again, then from a cache.
namespace singlepass::spectral {
namespace {

constexpr int kThreads = 256;
constexpr int kHeldByLane = 16;

// Sum over the warp in a fixed order, in every lane.
__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// A row of z and, in the backward pass, of the gradient, divided among the lanes of a warp.
template <class V, bool kBackward>
class Row {
 public:
  __device__ __forceinline__ Row(const Lorentz& p, int64_t row)
      : p_(p),
        dtype_(V::dtype(p.dtype)),
        vectors_{V::spread, p.columns},
        begin_(row * p.columns),
        lane_(static_cast<int>(threadIdx.x) % kWarp) {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      if (element(v) < vectors_.end()) read(element(v), z_[v], grad_[kBackward ? v : 0]);
    }
  }

  // Calls body(i, z, grad) for the lane's elements, a vector that begins at element i at a time.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      if (element(v) < vectors_.end()) give(element(v), z_[v], grad_[kBackward ? v : 0], body);
    }
    for (int64_t i = element(kHeld); i < vectors_.end(); i += kWarp * V::step) {
      Raw<V::width> z, grad;
      read(i, z, grad);
      give(i, z, grad, body);
    }
  }

  // Element 0 of the row (the time), in every lane.
  __device__ __forceinline__ float first(const void* base) const {
    Raw<1> raw;
    float value;
    load(base, dtype_, begin_, raw);
    decode(raw, dtype_, &value);
    return value;
  }

  __device__ __forceinline__ void write(int64_t i, const float* values) const {
    store(encode_any_nan<V::width>(values, dtype_), dtype_, p_.out, begin_ + i, vectors_.apart());
  }

 private:
  static constexpr int kHeld = kHeldByLane / V::width;

  __device__ __forceinline__ int64_t element(int v) const { return (v * kWarp + lane_) * V::step; }

  __device__ __forceinline__ void read(int64_t i, Raw<V::width>& z, Raw<V::width>& grad) const {
    load(p_.z, dtype_, begin_ + i, z, vectors_.apart());
    if constexpr (kBackward) load(p_.grad, dtype_, begin_ + i, grad, vectors_.apart());
  }

  template <class Body>
  __device__ __forceinline__ void give(int64_t i, const Raw<V::width>& raw_z, const Raw<V::width>& raw_grad,
                                       const Body& body) const {
    float z[V::width], grad[V::width] = {};
    decode(raw_z, dtype_, z);
    if constexpr (kBackward) decode(raw_grad, dtype_, grad);
    body(i, z, grad);
  }

  const Lorentz& p_;
  const DType dtype_;
  const Vectors vectors_;
  const int64_t begin_;
  const int lane_;
  Raw<V::width> z_[kHeld], grad_[kBackward ? kHeld : 1];
};

// Maps a row, or computes its gradients. Returns, in every lane, the row's part of the gradient of log_scale.
template <class V, bool kBackward>
__device__ __forceinline__ double map_row(const Lorentz& p, int64_t index) {
  const Row<V, kBackward> row(p, index);
  // Stage 1: |z|^2 and grad . z over all elements but the first, which is the time.
  double square = 0.0, along = 0.0;
  row.for_each([&](int64_t i, const float* z, const float* grad) {
#pragma unroll
    for (int k = 0; k < V::width; ++k) {
      if (i + k == 0) continue;
      square = add_product(square, z[k], z[k]);
      if constexpr (kBackward) along = add_product(along, grad[k], z[k]);
    }
  });
  // Stage 2: the row's numbers (time, root, gradients), in every lane.
  const LorentzRow x(p, row.first(p.z), warp_sum(square));
  float first = x.time, pull = 0.0f, grad_time = 0.0f;
  if constexpr (kBackward) {
    along = warp_sum(along);
    grad_time = x.grad_time(row.first(p.grad), along);
    first = x.grad_first(grad_time);
    pull = x.pull(along);
  }
  // Stage 3: the result, element by element.
  row.for_each([&](int64_t i, const float* z, const float* grad) {
    float out[V::width];
#pragma unroll
    for (int k = 0; k < V::width; ++k) {
      out[k] = kBackward ? grad[k] * x.root - z[k] * pull : z[k] * x.root;
      if (i + k == 0) out[k] = first;
    }
    row.write(i, out);
  });
  return kBackward ? x.grad_scale(grad_time) : 0.0;
}

// A thread block owns kLorentzRows rows, which its warps share. In the backward pass it writes their part of the
// gradient of log_scale.
template <class V, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) lorentz_kernel(const Lorentz p, double* partials) {
  const int64_t begin = blockIdx.x * kLorentzRows, warp = threadIdx.x / kWarp;
  const int64_t end = begin + kLorentzRows < p.rows ? begin + kLorentzRows : p.rows;
  double sum = 0.0;
  for (int64_t row = begin + warp; row < end; row += blockDim.x / kWarp) sum += map_row<V, kBackward>(p, row);
  if constexpr (kBackward) {
    sum = block_sum(threadIdx.x % kWarp == 0 ? sum : 0.0);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
  }
}

// One thread block adds these parts, in a fixed order.
__global__ void __launch_bounds__(kThreads) add_partials_kernel(const Lorentz p, const double* partials) {
  const double sum = sum_partials(partials, lorentz_blocks(p.rows));
  if (threadIdx.x == 0) *p.grad_scale = static_cast<float>(sum);
}

template <class V>
struct Forward {
  static constexpr auto value = &lorentz_kernel<V, false>;
};

template <class V>
struct Backward {
  static constexpr auto value = &lorentz_kernel<V, true>;
};

template <template <class> class Kernel>
void launch_rows(const Lorentz& p, double* partials, const Gpu& gpu, int threads) {
  if (p.rows == 0) return;
  const bool vectors = p.columns % kVector == 0 && is_aligned(p.z) && is_aligned(p.grad) && is_aligned(p.out);
  const dim3 grid(static_cast<unsigned>(lorentz_blocks(p.rows)));
  launch(pick<Kernel>(vectors, p.dtype), grid, dim3(threads), 0, gpu, p, partials);
}

}  // namespace

void lorentz(const Lorentz& p, const Gpu& gpu, int threads) {
  launch_rows<Forward>(p, nullptr, gpu, threads);
}

void lorentz_backward(const Lorentz& p, const Gpu& gpu, int threads) {
  const int64_t bytes = lorentz_blocks(p.rows) * static_cast<int64_t>(sizeof(double));
  double* const partials = static_cast<double*>(gpu.allocate(bytes));
  launch_rows<Backward>(p, partials, gpu, threads);
  launch(&add_partials_kernel, dim3(1), dim3(threads), 0, gpu, p, partials);
}

}  // namespace singlepass::spectral
