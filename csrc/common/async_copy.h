// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda.h"

// Copies of 16 bytes from global to shared memory, for which a thread waits only when it says so. Before sm_80, each is
// there at once.
namespace singlepass {

// Writes zeros, and reads nothing, if the source does not exist.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(exists ? 16 : 0)
      : "memory");
#elif defined(SINGLEPASS_SIMT)
  ::simt::copy_later(to, from, exists);
#else
  *static_cast<uint4*>(to) = exists ? *global_memory(static_cast<const uint4*>(from)) : uint4{};
#endif
}

// Waits for the thread's own copies. Those of others are there after a barrier that follows.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#elif defined(SINGLEPASS_SIMT)
  ::simt::finish_copies();
#endif
}

}  // namespace singlepass
