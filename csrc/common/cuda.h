// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a kernel and its launcher need from CUDA. With SINGLEPASS_SIMT the same source runs on the CPU.
#if defined(SINGLEPASS_SIMT)

#include "simt/simt.h"

#define SINGLEPASS_SHARED(Type, name) \
  static const char name##_site = 0;  \
  Type& name = ::simt::shared<Type>(&name##_site)

namespace singlepass {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(::simt::dynamic_shared_memory());
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
  return ::simt::launch(kernel, grid, block, shared_bytes, stream, args...);
}

template <class T>
T* global_memory(T* pointer) {
  return pointer;
}

}  // namespace singlepass

#else

#include <cuda_runtime.h>

#define SINGLEPASS_SHARED(Type, name) __shared__ Type name

namespace singlepass {

template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// A pointer that was itself loaded from memory could point anywhere: the compiler then takes the slower generic loads
// and stores, unless it is told.
template <class T>
__device__ __forceinline__ T* global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace singlepass

#endif
