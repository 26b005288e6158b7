// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace singlepass {

inline constexpr int64_t kCacheLine = 64;
inline constexpr uintptr_t kBytesAhead = 4096;

// On the CPU: asks for bytes that are read or written later. Nothing happens where there is no memory.
SINGLEPASS_HD void prefetch(uintptr_t from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<uintptr_t>(i)));
  }
}

// For loops over memory: what stands a page further on. The processor's own prefetching stops at every page.
SINGLEPASS_HD void prefetch_ahead(const void* from, int64_t bytes) {
  prefetch(reinterpret_cast<uintptr_t>(from) + kBytesAhead, bytes);
}

}  // namespace singlepass
