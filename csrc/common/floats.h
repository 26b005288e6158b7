// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/integers.h"
#include "common/vector.h"

// Floats for loops whose vectors are as wide as the processor's: sums over lanes then depend on it. What compilers do
// not find an instruction for is written here, next to what it means.
namespace singlepass {

template <int kCount, int kSumCount>
struct FloatLanes {
  static constexpr int kLanes = kCount, kSums = kSumCount;  // kSums: vectors that fit into registers beside factors
  using Floats = typename Lanes<kCount>::Floats;
  using Words = typename Lanes<kCount>::Words;

  // As many elements of any storage type, from there on.
  template <DType kType>
  SINGLEPASS_HD static Floats load(const void* from) {
    if constexpr (kType == DType::kFloat32) return load_vector<Floats>(static_cast<const float*>(from));
    const uint16_t* half = static_cast<const uint16_t*>(from);
    Floats to;
    for (int i = 0; i < kLanes; ++i) {
      to[i] = kType == DType::kBFloat16 ? bfloat16_to_float(half[i]) : float16_to_float(half[i]);
    }
    return to;
  }

  // Bytes, each in a lane of its own.
  SINGLEPASS_HD static Words bytes(const uint8_t* from) {
    Words to;
    for (int i = 0; i < kLanes; ++i) to[i] = from[i];
    return to;
  }

  // Words below 2^31 as floats.
  SINGLEPASS_HD static Floats from_words(Words words) {
    Floats to;
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<float>(static_cast<int32_t>(words[i]));
    return to;
  }

  // The lower halves of 32-bit integers.
  SINGLEPASS_HD static void store_words(typename IntegerLanes<kCount>::Sums v, int16_t* to) {
    typedef int16_t Halves __attribute__((vector_size(2 * kCount)));
    const Halves halves = __builtin_convertvector(v, Halves);
    memcpy(to, &halves, sizeof(halves));
  }
};

// On any processor.
using PlainFloats = FloatLanes<8, 8>;

#if defined(SINGLEPASS_HAS_TARGETS)

// Of vectors; the meaning stands above.
template <int kCount, int kSumCount>
struct VectorFloats : FloatLanes<kCount, kSumCount> {
  using Base = FloatLanes<kCount, kSumCount>;
  using typename Base::Floats;
  using typename Base::Words;

  template <DType kType>
  SINGLEPASS_HD static Floats load(const void* from) {
    if constexpr (kType == DType::kFloat32) return Base::template load<kType>(from);
    const auto& halves = *static_cast<const AnyBytes<2 * kCount>*>(from);
    if constexpr (kType == DType::kBFloat16) {
      Words to;
      asm("vpmovzxwd %1, %0" : "=v"(to) : "m"(halves));
      return bit_cast<Floats>(to << 16);
    }
    Floats to;
    asm("vcvtph2ps %1, %0" : "=v"(to) : "m"(halves));
    return to;
  }

  SINGLEPASS_HD static Words bytes(const uint8_t* from) {
    Words to;
    asm("vpmovzxbd %1, %0" : "=v"(to) : "m"(*reinterpret_cast<const AnyBytes<kCount>*>(from)));
    return to;
  }

  SINGLEPASS_HD static Floats from_words(Words words) {
    Floats to;
    asm("vcvtdq2ps %1, %0" : "=v"(to) : "v"(words));
    return to;
  }
};

// In functions with SINGLEPASS_TARGET_AVX2 and SINGLEPASS_TARGET_AVX512.
using Avx2Floats = VectorFloats<8, 8>;
using Avx512Floats = VectorFloats<16, 16>;

#endif

}  // namespace singlepass
