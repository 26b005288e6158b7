// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

// What a kernel and its launcher need from CUDA. With SINGLEPASS_SIMT the same source runs on the CPU.
//
// SINGLEPASS_APART(number) keeps compilers from merging branches that have different numbers, which costs registers.
#if defined(SINGLEPASS_SIMT)

#include "simt/simt.h"

#define SINGLEPASS_APART(number)
#define SINGLEPASS_SHARED(Type, name) \
  static const char name##_site = 0;  \
  Type& name = ::simt::shared<Type>(&name##_site)

namespace singlepass {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(::simt::dynamic_shared_memory());
}

template <class T>
T* global_memory(T* pointer) {
  return pointer;
}

}  // namespace singlepass

#else

#include <cuda_runtime.h>

#define SINGLEPASS_APART(number) asm volatile("// %0" ::"n"(number) : "memory")
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

}  // namespace singlepass

#endif

namespace singlepass {

// Where an op runs: `allocate` gives device memory, aligned to 16, that lives until what is launched has read it.
// `tickets` gives so many numbers that are zero when what is launched next reads them, which leaves them at zero.
struct Gpu {
  const char* op;  // its name, for errors
  cudaStream_t stream;
  std::function<void*(int64_t bytes)> allocate;
  std::function<unsigned*(int64_t count)> tickets;
};

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

// Thread blocks of a kernel that the current GPU runs at the same time.
template <class... Params>
int64_t resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes, const Gpu& gpu) {
  int device = 0, processors = 0, blocks = 0;
  check_cuda(gpu.op, cudaGetDevice(&device));
  check_cuda(gpu.op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_cuda(gpu.op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
  return int64_t{processors} * std::max(1, blocks);
}

// Bytes of arguments that every launch has room for, and those of a launch for which takes_many_arguments().
inline constexpr int kArguments = 4096, kManyArguments = 32764;

// Whether the driver is of CUDA 12.1 or later. What is compiled for an older one of the same major version runs, too.
inline bool takes_many_arguments(const Gpu& gpu) {
  int version = 0;
  check_cuda(gpu.op, cudaDriverGetVersion(&version));
  return version >= 12010;
}

// Starts a kernel, or throws.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Gpu& gpu, Args... args) {
#if defined(SINGLEPASS_SIMT)
  check_cuda(gpu.op, ::simt::launch(kernel, grid, block, shared_bytes, gpu.stream, args...));
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = gpu.stream;
  check_cuda(gpu.op, cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
#endif
}

}  // namespace singlepass
