// SPDX-License-Identifier: Apache-2.0
#include <utility>

#include "common/cuda.h"
#include "common/stream.h"

namespace singlepass {
namespace {

struct Pointers {
  const float* reads[kMaxReads];
  float* updates[kMaxUpdates];
};

__device__ __forceinline__ float sum4(const float4& v) {
  return (v.x + v.y) + (v.z + v.w);
}

// A thread owns 16 bytes of every array.
template <int kReads, int kUpdates>
__global__ void stream_kernel(const Pointers pointers, int64_t n) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i + 4 <= n) {
    float4 r[kReads + 1], u[kUpdates + 1];
    for (int k = 0; k < kReads; ++k) r[k] = *reinterpret_cast<const float4*>(pointers.reads[k] + i);
    for (int k = 0; k < kUpdates; ++k) u[k] = *reinterpret_cast<const float4*>(pointers.updates[k] + i);
    float sum = 0.0f;
    for (int k = 0; k < kReads; ++k) sum += sum4(r[k]);
    if constexpr (kUpdates == 0) {
      // Never true of finite reads; without it the compiler drops the loads.
      if (sum != sum) const_cast<float*>(pointers.reads[0])[i] = sum;
    }
    for (int k = 0; k < kUpdates; ++k) {
      u[k].x += 0.0f * sum;
      *reinterpret_cast<float4*>(pointers.updates[k] + i) = u[k];
    }
  } else {
    for (int64_t j = i; j < n; ++j) {
      float sum = 0.0f;
      for (int k = 0; k < kReads; ++k) sum += pointers.reads[k][j];
      for (int k = 0; k < kUpdates; ++k) pointers.updates[k][j] += 0.0f * sum;
    }
  }
}

using Kernel = void (*)(Pointers, int64_t);

template <int kReads, int... kUpdates>
Kernel pick(size_t updates, std::integer_sequence<int, kUpdates...>) {
  const Kernel table[] = {&stream_kernel<kReads, kUpdates>...};
  return table[updates];
}

}  // namespace

void stream(const std::vector<const float*>& reads, const std::vector<float*>& updates, int64_t n, const Gpu& gpu) {
  if (n == 0) return;
  using Counts = std::make_integer_sequence<int, kMaxUpdates + 1>;
  Pointers pointers = {};
  for (size_t k = 0; k < reads.size(); ++k) pointers.reads[k] = reads[k];
  for (size_t k = 0; k < updates.size(); ++k) pointers.updates[k] = updates[k];
  const Kernel kernel = reads.empty()       ? pick<0>(updates.size(), Counts{})
                        : reads.size() == 1 ? pick<1>(updates.size(), Counts{})
                        : reads.size() == 2 ? pick<2>(updates.size(), Counts{})
                                            : pick<3>(updates.size(), Counts{});
  const int threads = 256;
  const int64_t blocks = ((n + 3) / 4 + threads - 1) / threads;
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, gpu, pointers, n);
}

}  // namespace singlepass
