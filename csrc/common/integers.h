// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "common/macros.h"

// Exact sums of products of 16-bit integers, and the bytes that they come from. Compilers do not find the processor's
// instructions for these in vector code, so that they are written here, next to what they mean.
namespace singlepass {

template <int kCount>
struct IntegerLanes {
  static constexpr int kSums = kCount, kWords = 2 * kCount;
  typedef int32_t Sums __attribute__((vector_size(4 * kCount)));
  typedef int16_t Words __attribute__((vector_size(4 * kCount)));
  typedef uint64_t Bytes __attribute__((vector_size(2 * kCount)));  // as many as there are words
};

// On any processor.
struct PlainIntegers : IntegerLanes<8> {
  // sums[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1].
  SINGLEPASS_HD static Sums add_products(Sums sums, Words a, const Words& b) {
    for (int i = 0; i < kSums; ++i) sums[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sums;
  }

  // Bytes, each in a lane of its own.
  SINGLEPASS_HD static Words words(const uint8_t* from) {
    Words to;
    for (int i = 0; i < kWords; ++i) to[i] = from[i];
    return to;
  }
  SINGLEPASS_HD static Words words(Bytes bytes) { return words(reinterpret_cast<const uint8_t*>(&bytes)); }

  // Half as many, which then follow once more.
  SINGLEPASS_HD static Words words_twice(const uint8_t* from) {
    Words to;
    for (int i = 0; i < kWords; ++i) to[i] = from[i % kSums];
    return to;
  }

  // The first half of them, likewise.
  SINGLEPASS_HD static Sums sums(const uint8_t* from) {
    Sums to;
    for (int i = 0; i < kSums; ++i) to[i] = from[i];
    return to;
  }
  SINGLEPASS_HD static Sums sums(Bytes bytes) { return sums(reinterpret_cast<const uint8_t*>(&bytes)); }
};

#if defined(SINGLEPASS_HAS_TARGETS)

template <int kSize>
struct AnyBytes {
  uint8_t bytes[kSize];
};

// Of vectors; the meaning stands above.
template <int kCount>
struct VectorIntegers : IntegerLanes<kCount> {
  using Lanes = IntegerLanes<kCount>;
  using typename Lanes::Bytes;
  using typename Lanes::Sums;
  using typename Lanes::Words;

  SINGLEPASS_HD static Words words(const uint8_t* from) {
    Words to;
    asm("vpmovzxbw %1, %0" : "=v"(to) : "m"(*reinterpret_cast<const AnyBytes<Lanes::kWords>*>(from)));
    return to;
  }
  SINGLEPASS_HD static Words words(Bytes bytes) {
    Words to;
    asm("vpmovzxbw %1, %0" : "=v"(to) : "v"(bytes));
    return to;
  }

  SINGLEPASS_HD static Words words_twice(const uint8_t* from) {
    Bytes twice;
    const auto& half = *reinterpret_cast<const AnyBytes<Lanes::kSums>*>(from);
    if constexpr (kCount == 16) {
      asm("vbroadcasti128 %1, %0" : "=x"(twice) : "m"(half));
    } else {
      asm("vpbroadcastq %1, %0" : "=x"(twice) : "m"(half));
    }
    return words(twice);
  }

  SINGLEPASS_HD static Sums sums(const uint8_t* from) {
    Sums to;
    asm("vpmovzxbd %1, %0" : "=v"(to) : "m"(*reinterpret_cast<const AnyBytes<Lanes::kSums>*>(from)));
    return to;
  }
  SINGLEPASS_HD static Sums sums(Bytes bytes) {
    Sums to;
    asm("vpmovzxbd %x1, %0" : "=v"(to) : "v"(bytes));
    return to;
  }
};

// In functions with SINGLEPASS_TARGET_AVX2. Product and sum are one statement: taken apart, compilers would add
// products first, and run out of registers.
struct Avx2Integers : VectorIntegers<8> {
  SINGLEPASS_HD static Sums add_products(Sums sums, Words a, const Words& b) {
    Sums products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(a), "xm"(b));
    return sums;
  }
};

// In functions with SINGLEPASS_TARGET_AVX512, where the processor has VNNI.
struct VnniIntegers : VectorIntegers<16> {
  SINGLEPASS_HD static Sums add_products(Sums sums, Words a, const Words& b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "vm"(b));
    return sums;
  }
};

#endif

}  // namespace singlepass
