// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/reduce.h"

// Elements between memory and registers, in one access or two of up to 16 bytes each. Where the dtype is a constant,
// nothing is left of the branches on it; else all threads of a block take them alike, so that loops stand inside them.
namespace singlepass {

inline constexpr int kVector = 8;

// How a run of elements divides into vectors: eight neighbours each or, spread, four of the run's first half and the
// four that stand as far into the second. For float32, whose vectors are two accesses each, and what stands beside it:
// spread, the lanes of a warp are neighbours in both, which then touch half as many sectors.
struct Vectors {
  bool spread;
  int64_t run = kWarp * kVector;  // a row, or what else a vector may not leave; without such, a warp's vectors

  // From one vector of a run to the next.
  SINGLEPASS_HD constexpr int step() const { return spread ? kVector / 2 : kVector; }

  // Vectors of a run begin before this.
  SINGLEPASS_HD constexpr int64_t end() const { return spread ? run / 2 : run; }

  // From the first to the second four of a vector.
  SINGLEPASS_HD constexpr int64_t apart() const { return spread ? run / 2 : kVector / 2; }

  // From the first to the k-th element of a vector.
  SINGLEPASS_HD constexpr int64_t offset(int k) const { return k < kVector / 2 ? k : k - kVector / 2 + apart(); }

  // Where whole warps go through many runs: the elements that vectors take are a multiple of this.
  SINGLEPASS_HD constexpr int unit() const { return spread ? kWarp * kVector : kVector; }

  // Where the thread's first vector begins. The next begins blockDim.x * kVector elements further on.
  __device__ __forceinline__ int first() const {
    return static_cast<int>(threadIdx.x * kVector - (spread ? threadIdx.x % kWarp * (kVector / 2) : 0));
  }
};

// The bits of kWidth elements as they stand in memory: 32-bit elements fill `bits`, 16-bit ones its first half.
template <int kWidth>
struct alignas(kWidth == kVector ? 16 : 4) Raw {
  uint32_t bits[kWidth];
};

// Word by word on the registers' side: to a compiler that knows types, bits written as a uint4 are none of Raw's.
__device__ __forceinline__ void load_four(const char* address, uint32_t* bits) {
  const uint4 four = *reinterpret_cast<const uint4*>(address);
  bits[0] = four.x, bits[1] = four.y, bits[2] = four.z, bits[3] = four.w;
}

__device__ __forceinline__ void store_four(const uint32_t* bits, char* address) {
  *reinterpret_cast<uint4*>(address) = {bits[0], bits[1], bits[2], bits[3]};
}

__device__ __forceinline__ void load_two(const char* address, uint32_t* bits) {
  const uint2 two = *reinterpret_cast<const uint2*>(address);
  bits[0] = two.x, bits[1] = two.y;
}

// To global memory. nvcc would take two of four words that are stored elsewhere for the same store, and split the four.
__device__ __forceinline__ void store_two(const uint32_t* bits, char* address) {
#if defined(__CUDA_ARCH__)
  const size_t global = __cvta_generic_to_global(address);
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(global), "r"(bits[0]), "r"(bits[1]) : "memory");
#else
  *reinterpret_cast<uint2*>(address) = {bits[0], bits[1]};
#endif
}

// apart: Vectors::apart().
template <int kWidth>
__device__ __forceinline__ void load(const void* base, DType dtype, int64_t i, Raw<kWidth>& raw,
                                     int64_t apart = kVector / 2) {
  const char* address = global_memory(static_cast<const char*>(base) + i * size_of(dtype));
  if constexpr (kWidth == 1) {
    raw.bits[0] = dtype == DType::kFloat32 ? *reinterpret_cast<const uint32_t*>(address)
                                           : *reinterpret_cast<const uint16_t*>(address);
  } else if (dtype == DType::kFloat32) {
    load_four(address, &raw.bits[0]);
    load_four(address + apart * sizeof(float), &raw.bits[4]);
  } else if (apart == kVector / 2) {
    load_four(address, &raw.bits[0]);
  } else {
    load_two(address, &raw.bits[0]);
    load_two(address + apart * sizeof(uint16_t), &raw.bits[2]);
  }
}

template <int kWidth>
__device__ __forceinline__ void store(const Raw<kWidth>& raw, DType dtype, void* base, int64_t i,
                                      int64_t apart = kVector / 2) {
  char* address = global_memory(static_cast<char*>(base) + i * size_of(dtype));
  if constexpr (kWidth == 1) {
    if (dtype == DType::kFloat32) {
      *reinterpret_cast<uint32_t*>(address) = raw.bits[0];
    } else {
      *reinterpret_cast<uint16_t*>(address) = static_cast<uint16_t>(raw.bits[0]);
    }
  } else if (dtype == DType::kFloat32) {
    store_four(&raw.bits[0], address);
    store_four(&raw.bits[4], address + apart * sizeof(float));
  } else if (apart == kVector / 2) {
    store_four(&raw.bits[0], address);
  } else {
    store_two(&raw.bits[0], address);
    store_two(&raw.bits[2], address + apart * sizeof(uint16_t));
  }
}

template <int kWidth>
__device__ __forceinline__ void decode(const Raw<kWidth>& raw, DType dtype, float* values) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = bit_cast<float>(raw.bits[k]);
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      values[k] = bfloat16_to_float(static_cast<uint16_t>(raw.bits[k / 2] >> (16 * (k % 2))));
    }
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      values[k] = float16_to_float(static_cast<uint16_t>(raw.bits[k / 2] >> (16 * (k % 2))));
    }
  }
}

template <int kWidth>
__device__ __forceinline__ Raw<kWidth> pack(const uint16_t* half) {
  Raw<kWidth> raw = {};
#pragma unroll
  for (int k = 0; k < kWidth; ++k) raw.bits[k / 2] |= static_cast<uint32_t>(half[k]) << (16 * (k % 2));
  return raw;
}

// Two floats in 16 bits each, the first in the low half, rounded to the nearest. The hardware's instructions make
// another NaN than float_to_bfloat16 and float_to_float16.
__device__ __forceinline__ uint32_t pack_pair(float first, float second, DType dtype) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t bits;
  if (dtype == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  }
  return bits;
#else
  const bool brain = dtype == DType::kBFloat16;
  const uint16_t low = brain ? float_to_bfloat16(first) : float_to_float16(first);
  const uint16_t high = brain ? float_to_bfloat16(second) : float_to_float16(second);
  return low | static_cast<uint32_t>(high) << 16;
#endif
}

// encode() where it does not matter which NaN a NaN becomes.
template <int kWidth>
__device__ __forceinline__ Raw<kWidth> encode_any_nan(const float* values, DType dtype) {
  Raw<kWidth> raw = {};
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (dtype == DType::kFloat32) {
      raw.bits[k] = bit_cast<uint32_t>(values[k]);
    } else if (k % 2 == 0) {
      raw.bits[k / 2] = pack_pair(values[k], k + 1 < kWidth ? values[k + 1] : 0.0f, dtype);
    }
  }
  return raw;
}

// Rounds to the nearest.
template <int kWidth>
__device__ __forceinline__ Raw<kWidth> encode(const float* values, DType dtype) {
  if (dtype == DType::kFloat32) {
    Raw<kWidth> raw = {};
#pragma unroll
    for (int k = 0; k < kWidth; ++k) raw.bits[k] = bit_cast<uint32_t>(values[k]);
    return raw;
  }
  uint16_t half[kWidth];
  if (dtype == DType::kFloat16) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) half[k] = float_to_float16(values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) half[k] = float_to_bfloat16(values[k]);
  }
  return pack<kWidth>(half);
}

}  // namespace singlepass
