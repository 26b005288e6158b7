// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/raw.h"
#include "common/reduce.h"

// What kernels use of tensor cores, with a twin for kernels that run on the CPU. Lane l of a warp is called (g, t) =
// (l / 4, l % 4). A register of pairs holds the first in its low half.
namespace singlepass {

__device__ __forceinline__ float element_of(uint32_t pair, int i, DType dtype) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  return dtype == DType::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

// Two words that one shuffle moves.
__device__ __forceinline__ unsigned long long two_words(uint32_t low, uint32_t high) {
  return low | static_cast<unsigned long long>(high) << 32;
}

// What multiply_accumulate does, where processors do not. A function of its own: wherever it stands, it is much code,
// of which unrolled loops would make megabytes.
template <DType kDType>
#if defined(__CUDACC__)
__device__ __noinline__
#endif
    float4 multiply_accumulate_by_lanes(float4 to, uint4 a, uint2 b) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  float d[4] = {to.x, to.y, to.z, to.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const unsigned long long rows[2] = {__shfl_sync(kAllLanes, two_words(a.x, a.y), g * 4 + k),
                                        __shfl_sync(kAllLanes, two_words(a.z, a.w), g * 4 + k)};
    const unsigned long long columns[2] = {__shfl_sync(kAllLanes, two_words(b.x, b.y), 2 * t * 4 + k),
                                           __shfl_sync(kAllLanes, two_words(b.x, b.y), (2 * t + 1) * 4 + k)};
#pragma unroll
    for (int i = 0; i < 16; ++i) {  // for each number of d, two elements of each half of the columns
      const uint32_t row = static_cast<uint32_t>(rows[i / 2 % 2] >> (32 * (i / 8)));
      const uint32_t column = static_cast<uint32_t>(columns[i / 4 % 2] >> (32 * (i / 2 % 2)));
      d[i / 4] += element_of(row, i % 2, kDType) * element_of(column, i % 2, kDType);
    }
  }
  return {d[0], d[1], d[2], d[3]};
}

// d += a b for a (16, 16), b (16, 8) in float16 or bfloat16 and d (16, 8) in float32.
//   a[0], a[1]: rows g and g + 8, columns 2 t and 2 t + 1;   a[2], a[3]: the same rows, columns 2 t + 8 and 2 t + 9
//   b0, b1:     column g, rows 2 t and 2 t + 1, and the rows 8 below
//   d:          row g, columns 2 t and 2 t + 1; row g + 8, the same columns
template <DType kDType = DType::kFloat16>
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kDType == DType::kFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
#if defined(__CUDA_ARCH__)
  if constexpr (kDType == DType::kFloat16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
    return;
  }
#endif
  const float4 sum = multiply_accumulate_by_lanes<kDType>({d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1});
  d[0] = sum.x, d[1] = sum.y, d[2] = sum.z, d[3] = sum.w;
#endif
}

// d += a b for a (16, 8), b (8, 8) in TF32, floats whose lowest 13 bits are zero, and d (16, 8) in float32.
//   a[0], a[1]: rows g and g + 8, column t;   a[2], a[3]: the same rows, column t + 4
//   b0, b1:     column g, rows t and t + 4
//   d:          row g, columns 2 t and 2 t + 1; row g + 8, the same columns
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], const float (&a)[4], float b0, float b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(bit_cast<uint32_t>(a[0])), "r"(bit_cast<uint32_t>(a[1])), "r"(bit_cast<uint32_t>(a[2])),
        "r"(bit_cast<uint32_t>(a[3])), "r"(bit_cast<uint32_t>(b0)), "r"(bit_cast<uint32_t>(b1)));
#else
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const auto two = [](float low, float high) { return two_words(bit_cast<uint32_t>(low), bit_cast<uint32_t>(high)); };
  const auto part = [](unsigned long long both, int i) {
    return bit_cast<float>(static_cast<uint32_t>(both >> (32 * i)));
  };
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    const unsigned long long rows[2] = {__shfl_sync(kAllLanes, two(a[0], a[1]), g * 4 + k),
                                        __shfl_sync(kAllLanes, two(a[2], a[3]), g * 4 + k)};
    const unsigned long long columns[2] = {__shfl_sync(kAllLanes, two(b0, b1), 2 * t * 4 + k),
                                           __shfl_sync(kAllLanes, two(b0, b1), (2 * t + 1) * 4 + k)};
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i / 2] += part(rows[i % 2], i / 4) * part(columns[i / 2 % 2], i % 2);
  }
#endif
}

// The sum of products of four unsigned bytes with four signed ones.
__device__ __forceinline__ int dot_of_bytes(uint32_t a, uint32_t b) {
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 32; i += 8) sum += static_cast<int>(a >> i & 0xffu) * static_cast<int8_t>(b >> i);
  return sum;
}

// d += a b for a (16, 32) of unsigned bytes, b (32, 8) of signed bytes and d (16, 8) of 32-bit integers. A register has
// four neighbours of a row of a, or of a column of b, the first in its lowest byte.
//   a[0], a[1]: rows g and g + 8, columns from 4 t on;   a[2], a[3]: the same rows, 16 columns further
//   b0, b1:     column g, rows from 4 t on, and the rows 16 below
//   d:          row g, columns 2 t and 2 t + 1; row g + 8, the same columns
__device__ __forceinline__ void multiply_accumulate(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(d[i % 2 * 2]), "+r"(d[i % 2 * 2 + 1])
        : "r"(a[i]), "r"(i < 2 ? b0 : b1));
  }
#else
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  for (int k = 0; k < 4; ++k) {
    for (int half = 0; half < 2; ++half) {
      const auto rows = __shfl_sync(kAllLanes, two_words(a[2 * half], a[2 * half + 1]), g * 4 + k);
      for (int column = 0; column < 2; ++column) {
        const uint32_t b = __shfl_sync(kAllLanes, half == 0 ? b0 : b1, (2 * t + column) * 4 + k);
        d[column] += dot_of_bytes(static_cast<uint32_t>(rows), b);
        d[2 + column] += dot_of_bytes(static_cast<uint32_t>(rows >> 32), b);
      }
    }
  }
#endif
}

// The transpose of an (8, 8) matrix of 16-bit elements, of which a lane has row g, columns 2 t and 2 t + 1.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
#else
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const uint32_t first = __shfl_sync(kAllLanes, pair, 2 * t * 4 + g / 2);
  const uint32_t second = __shfl_sync(kAllLanes, pair, (2 * t + 1) * 4 + g / 2);
  return ((first >> (16 * (g % 2))) & 0xffffu) | second >> (16 * (g % 2)) << 16;
#endif
}

}  // namespace singlepass
