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

// Ends a group of copies, those that the thread has asked for since the last one.
__device__ __forceinline__ void end_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(SINGLEPASS_SIMT)
  ::simt::end_copies();
#endif
}

// Waits for the thread's own copies, but for its last kLeft groups. Those of others are there after a barrier that
// follows.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#elif defined(SINGLEPASS_SIMT)
  ::simt::finish_copies(kLeft);
#endif
}

// The same for all copies.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#elif defined(SINGLEPASS_SIMT)
  ::simt::end_copies();
  ::simt::finish_copies(0);
#endif
}

}  // namespace singlepass
