// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/mma.h"
#include "common/raw.h"

// Numbers as TF32, of 11 bits, which tensor cores multiply. Numbers of 16 bits are such as they are. A float32 is a sum
// of two.
namespace singlepass::kv {

// The nearest TF32, and the first 11 bits of what it leaves over, which has 12: 2^-23 of the number at most is lost.
// What is not finite leaves a rest that is NaN.
struct Tf32Parts {
  float leading, rest;

  __device__ __forceinline__ explicit Tf32Parts(float x)
      : leading(cut(bit_cast<uint32_t>(x) + 0x1000u)), rest(cut(bit_cast<uint32_t>(x - leading))) {}

 private:
  __device__ __forceinline__ static float cut(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }
};

// Neighbouring channels of a token, 16 bytes of them, as they lie in memory.
template <DType kDType>
struct Channels {
  static constexpr int kSize = kDType == DType::kFloat32 ? 4 : 2, kCount = 16 / kSize;

  uint32_t bits[4];

  __device__ __forceinline__ float operator[](int k) const {
    return kSize == 4 ? bit_cast<float>(bits[k]) : element_of(bits[k / 2], k % 2, kDType);
  }
  // Puts an element behind the others, of which the first goes.
  __device__ __forceinline__ void push(uint32_t element) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t next = i < 3 ? bits[i + 1] : element;
      bits[i] = kSize == 4 ? next : bits[i] >> 16 | next << 16;
    }
  }
};

// Sums of products of an MMA whose 16 rows are numbers of a dtype. Columns 2 t and 2 t + 1 are the parts of one float.
template <DType kDType>
class Tf32Sums {
 public:
  __device__ __forceinline__ void add(const float (&a)[4], float b0, float b1) {
    if constexpr (kDType == DType::kFloat32) {
      const Tf32Parts x[4] = {Tf32Parts(a[0]), Tf32Parts(a[1]), Tf32Parts(a[2]), Tf32Parts(a[3])};
      multiply_accumulate(leading_, {x[0].leading, x[1].leading, x[2].leading, x[3].leading}, b0, b1);
      multiply_accumulate(rest_, {x[0].rest, x[1].rest, x[2].rest, x[3].rest}, b0, b1);
    } else {
      multiply_accumulate(leading_, a, b0, b1);
    }
  }

  // Of row g + 8 i.
  __device__ __forceinline__ float of(int i) const {
    const float sum = leading_[2 * i] + leading_[2 * i + 1];
    if constexpr (kDType == DType::kFloat32) return sum + (rest_[2 * i] + rest_[2 * i + 1]);
    return sum;
  }

 private:
  float leading_[4] = {},
        rest_[4] = {};  // apart, as the sum of many small numbers with large ones would lose their bits
};

}  // namespace singlepass::kv
