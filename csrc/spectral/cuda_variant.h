// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/raw.h"

namespace singlepass::spectral {

// What a kernel is compiled for: vectors of one dtype, or, with kDType = -1, single elements of any.
template <int kDType>
struct Variant {
  static constexpr int width = kDType < 0 ? 1 : kVector;
  static constexpr int bytes = kDType > 0 ? 2 : 4;  // of an element, at most
  static constexpr bool spread = kDType == 0;
  static constexpr int step = width == 1 ? 1 : Vectors{spread}.step();  // from one vector of a run to the next
  __device__ __forceinline__ static DType dtype(DType stored) {
    return kDType < 0 ? stored : static_cast<DType>(kDType);
  }
};

template <template <class> class Kernel>
auto pick(bool vectors, DType dtype) {
  if (!vectors) return Kernel<Variant<-1>>::value;
  if (dtype == DType::kFloat32) return Kernel<Variant<0>>::value;
  return dtype == DType::kBFloat16 ? Kernel<Variant<1>>::value : Kernel<Variant<2>>::value;
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace singlepass::spectral
