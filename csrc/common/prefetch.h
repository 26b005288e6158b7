// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace singlepass {

inline constexpr uintptr_t kCacheLine = 64;
inline constexpr uintptr_t kBytesAhead = 4096;

// For loops over memory on the CPU: asks for kBytes that stand a page further on. The processor's own prefetching stops
// at every page. Nothing happens where there is no memory.
template <uintptr_t kBytes>
SINGLEPASS_HD void prefetch_ahead(const void* from) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(from) + kBytesAhead;
  for (uintptr_t byte = 0; byte < kBytes; byte += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + byte));
  }
}

}  // namespace singlepass
