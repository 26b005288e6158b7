// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "common/raw.h"
#include "kv/problem.h"

// Loads and stores of runs: 4, 8 or 16 neighbouring channels of a token, in float32 registers.
namespace singlepass::kv {

// Whether every token or head is aligned to 16 bytes, for vector accesses. `strides` are in elements of `size` bytes.
inline bool are_vectors(const void* data, int64_t size, std::initializer_list<int64_t> strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         std::all_of(strides.begin(), strides.end(), [size](int64_t stride) { return stride * size % 16 == 0; });
}

inline bool are_vectors(const Tokens& t) {
  return are_vectors(t.data, size_of(t.dtype), {t.batch_stride, t.head_stride, t.token_stride});
}

inline bool are_vectors(const PerHead<uint8_t>& codes) {
  return are_vectors(codes.data, 1, {codes.batch_stride, codes.head_stride});
}

// Loads vectors of 16 bytes, or of 8 for what is left, if `vectors`; else single elements. dtype and vectors are the
// same for all threads, so that branches do not diverge.
template <int kRun>
__device__ __forceinline__ void load_run(const char* from, DType dtype, bool vectors, float* x) {
  Raw<kRun> raw = {};
  if (!vectors) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      Raw<1> one;
      load(from, dtype, k, one);
      decode(one, dtype, x + k);
    }
    return;
  }
  from = global_memory(from);
  const int words = dtype == DType::kFloat32 ? kRun : kRun / 2;
#pragma unroll
  for (int k = 0; k < kRun; k += 4) {
    if (k >= words) break;
    if (k + 4 <= words) {
      const uint4 four = *reinterpret_cast<const uint4*>(from + 4 * k);
      raw.bits[k] = four.x, raw.bits[k + 1] = four.y, raw.bits[k + 2] = four.z, raw.bits[k + 3] = four.w;
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(from + 4 * k);
      raw.bits[k] = two.x, raw.bits[k + 1] = two.y;
    }
  }
  decode(raw, dtype, x);
}

// Words in vectors of 16 bytes, and one of 8 for what is left.
template <int kWords>
__device__ __forceinline__ void store_words(const uint32_t* x, char* to) {
#pragma unroll
  for (int k = 0; k < kWords; k += 4) {
    if (k + 4 <= kWords) {
      *reinterpret_cast<uint4*>(to + 4 * k) = {x[k], x[k + 1], x[k + 2], x[k + 3]};
    } else {
      *reinterpret_cast<uint2*>(to + 4 * k) = {x[k], x[k + 1]};
    }
  }
}

template <int kRun>
__device__ __forceinline__ void store_run(const float* x, DType dtype, bool vectors, char* to) {
  if (!vectors) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) store(encode_any_nan<1>(x + k, dtype), dtype, to, k);
    return;
  }
  to = global_memory(to);
  const Raw<kRun> raw = encode_any_nan<kRun>(x, dtype);
  if (dtype == DType::kFloat32) {
    store_words<kRun>(raw.bits, to);
  } else {
    store_words<kRun / 2>(raw.bits, to);
  }
}

}  // namespace singlepass::kv
