// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/raw.h"
#include "common/reduce.h"

// What kernels use of tensor cores and of arithmetic on pairs of float16, with a twin for kernels that run on the CPU.
// Lane l of a warp is called (g, t) = (l / 4, l % 4). A register of pairs holds the first in its low half.
namespace singlepass {

__device__ __forceinline__ float element_of(uint32_t pair, int i, DType dtype) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  return dtype == DType::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

// What multiply_accumulate does, where processors do not.
template <DType kDType>
__device__ __forceinline__ void multiply_accumulate_by_lanes(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                             uint32_t b1) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const auto two = [](uint32_t low, uint32_t high) { return low | static_cast<unsigned long long>(high) << 32; };
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const unsigned long long rows[2] = {__shfl_sync(kAllLanes, two(a[0], a[1]), g * 4 + k),
                                        __shfl_sync(kAllLanes, two(a[2], a[3]), g * 4 + k)};
    const unsigned long long columns[2] = {__shfl_sync(kAllLanes, two(b0, b1), 2 * t * 4 + k),
                                           __shfl_sync(kAllLanes, two(b0, b1), (2 * t + 1) * 4 + k)};
#pragma unroll
    for (int i = 0; i < 16; ++i) {  // for each number of d, two elements of each half of the columns
      const uint32_t row = static_cast<uint32_t>(rows[i / 2 % 2] >> (32 * (i / 8)));
      const uint32_t column = static_cast<uint32_t>(columns[i / 4 % 2] >> (32 * (i / 2 % 2)));
      d[i / 4] += element_of(row, i % 2, kDType) * element_of(column, i % 2, kDType);
    }
  }
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
#elif defined(__CUDA_ARCH__)
  if constexpr (kDType == DType::kFloat16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
  } else {
    multiply_accumulate_by_lanes<kDType>(d, a, b0, b1);
  }
#else
  multiply_accumulate_by_lanes<kDType>(d, a, b0, b1);
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

// Codes of kBits bits that stand in byte 0 and in byte 2 of x, or with kByte 1 in bytes 1 and 3, from bit kShift of
// theirs on, as a pair of float16. Or'ed into 1024, whose spacing is 1, they are 1024 + 2^kShift n.
template <int kBits, int kShift, int kByte>
__device__ __forceinline__ uint32_t codes_to_halves(uint32_t x) {
#if defined(__CUDA_ARCH__)
  constexpr uint32_t kMask = ((1u << kBits) - 1) << kShift, kMagic = 0x64006400u;
  constexpr uint32_t kFactor = 0x3c00u - (kShift << 10),
                     kMinus = 0xe400u - (kShift << 10);  // 2^-kShift, -2^(10-kShift)
  uint32_t raised, result;
  if constexpr (kBits == 8) {
    raised = __byte_perm(x, kMagic | kMagic >> 8, kByte == 0 ? 0x4240 : 0x4341);
  } else {
    // One instruction for `and` and `or`, of which compilers make two where both have constants.
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(raised) : "r"(x >> (8 * kByte)), "n"(kMask | kMask << 16), "r"(kMagic));
  }
  asm("fma.rn.f16x2 %0, %1, %2, %3;"
      : "=r"(result)
      : "r"(raised), "r"(kFactor | kFactor << 16), "r"(kMinus | kMinus << 16));
  return result;
#else
  const uint32_t first = (x >> (8 * kByte + kShift)) & ((1u << kBits) - 1);
  const uint32_t second = (x >> (16 + 8 * kByte + kShift)) & ((1u << kBits) - 1);
  return float_to_float16(static_cast<float>(first)) |
         static_cast<uint32_t>(float_to_float16(static_cast<float>(second))) << 16;
#endif
}

// Numbers in two float16 each, their sum being within 2^-23 of the number, or 2^-25 where that is more.
struct HalfPairs {
  uint32_t high, low;
};

__device__ __forceinline__ HalfPairs split(float first, float second) {
  HalfPairs pairs;
  pairs.high = pack_pair(first, second, DType::kFloat16);
  pairs.low = pack_pair(first - float16_to_float(static_cast<uint16_t>(pairs.high)),
                        second - float16_to_float(static_cast<uint16_t>(pairs.high >> 16)), DType::kFloat16);
  return pairs;
}

// Powers of two that bring numbers of magnitudes up to `most` just below 2^15, and back.
struct Scaling {
  float up, down;
};

__device__ __forceinline__ Scaling scaling(float most) {
  constexpr uint32_t kMinExponent = 15, kMaxExponent = 254;
  uint32_t exponent = bit_cast<uint32_t>(most) >> 23;
  exponent = exponent < kMinExponent ? kMinExponent : (exponent > kMaxExponent ? kMaxExponent : exponent);
  return {bit_cast<float>((268 - exponent) << 23), bit_cast<float>((exponent - 14) << 23)};
}

}  // namespace singlepass
