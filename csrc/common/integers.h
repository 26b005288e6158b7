// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "common/macros.h"

// Exact sums of products of 16-bit integers: to[i] += a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], in 32 bits. Compilers do
// not find the processor's instruction for it in vector code, so that it is written here, next to what it means.
namespace singlepass {

template <int kCount>
struct IntegerLanes {
  typedef int16_t Words __attribute__((vector_size(4 * kCount)));
  typedef int32_t Sums __attribute__((vector_size(4 * kCount)));
};

// On any processor.
struct PlainIntegers : IntegerLanes<8> {
  static constexpr int kSums = 8;

  SINGLEPASS_HD static void add_products(Sums& to, Words a, Words b) {
    for (int i = 0; i < kSums; ++i) to[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  }
};

#if defined(SINGLEPASS_HAS_TARGETS)

// In functions with SINGLEPASS_TARGET_AVX2.
struct Avx2Integers : IntegerLanes<8> {
  static constexpr int kSums = 8;

  SINGLEPASS_HD static void add_products(Sums& to, Words a, Words b) {
    Sums products;
    asm("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(a), "xm"(b));
    to += products;
  }
};

// In functions with SINGLEPASS_TARGET_AVX512, where the processor has VNNI.
struct VnniIntegers : IntegerLanes<16> {
  static constexpr int kSums = 16;

  SINGLEPASS_HD static void add_products(Sums& to, Words a, Words b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(to) : "v"(a), "vm"(b));
  }
};

#endif

}  // namespace singlepass
