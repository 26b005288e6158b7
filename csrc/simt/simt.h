// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels and their launchers on the CPU: a few blocks at a time, each thread of a block on a fiber.
//
// common/cuda.h includes this header in place of <cuda_runtime.h> when SINGLEPASS_SIMT is defined.
// set_seed() chooses the order of blocks and threads: a kernel whose result depends on it has a race.
// A kernel that breaks the programming model throws simt::Error from launch(); a launch that the device would refuse
// returns its error code. Build with ASan and UBSan to see accesses out of bounds and misaligned ones.
// Not modelled: a wait for a block that has not started, weak memory order, clocks, launch bounds.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <deque>
#include <mutex>
#include <numeric>
#include <tuple>
#include <type_traits>

#include "simt/simt_block.h"

namespace simt {

constexpr std::uint64_t kMaxResidentBlocks = 4;

// Of a launch.
struct Shape {
  std::int64_t blocks, threads, dynamic_bytes;
};

struct Device {
  std::mutex mutex;  // one launch at a time: threadIdx and its like are plain globals
  Random random{0};
  std::uint64_t launches = 0;
  bool records = false;  // launches, which then do not run
  std::vector<Shape> shapes;
  cudaError_t last_error = cudaSuccess;
  int driver = 13000;  // the CUDA version that it is for, times 1,000
  int places = 8;      // thread blocks that run at the same time, as the device says: a processor for each
  std::map<const void*, std::size_t> dynamic_limit;  // by kernel, where cudaFuncSetAttribute raised it
};

inline Device& device() {
  static Device device;
  return device;
}

inline void set_seed(std::uint64_t seed) {
  device().random = Random(seed);
}

// Launches that ran since the program began.
inline std::uint64_t launches() {
  return device().launches;
}

// The device's answer to a launch of this shape.
inline cudaError_t check_launch(const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes) {
  const auto within = [](unsigned value, unsigned limit) { return value >= 1 && value <= limit; };
  if (!within(grid.x, 0x7fffffffu) || !within(grid.y, 65535) || !within(grid.z, 65535))
    return cudaErrorInvalidConfiguration;
  if (!within(block.x, 1024) || !within(block.y, 1024) || !within(block.z, 64)) return cudaErrorInvalidConfiguration;
  if (block.x * block.y * block.z > kMaxThreads) return cudaErrorInvalidConfiguration;
  const auto raised = device().dynamic_limit.find(kernel);
  const std::size_t limit = raised == device().dynamic_limit.end() ? kMaxStaticSharedBytes : raised->second;
  return dynamic_bytes <= limit ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes, void (*body)(void*),
                            void* arguments) {
  const std::lock_guard lock(device().mutex);
  const cudaError_t error = check_launch(kernel, grid, block, dynamic_bytes);
  if (error != cudaSuccess) return device().last_error = error;
  ++device().launches;
  if (device().records) {
    const auto count = [](dim3 size) { return std::int64_t{size.x} * size.y * size.z; };
    device().shapes.push_back({count(grid), count(block), static_cast<std::int64_t>(dynamic_bytes)});
    return cudaSuccess;
  }
  gridDim = grid;
  blockDim = block;
  Random& random = device().random;
  std::vector<std::uint64_t> order(std::uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  for (std::uint64_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  const std::size_t limit = 1 + random() % kMaxResidentBlocks;
  // A block that is stopped waits until the others have had their turns, those that start in its place among them.
  std::deque<std::unique_ptr<Block>> resident;
  for (auto next = order.begin(); next != order.end() || !resident.empty();) {
    for (; next != order.end() && resident.size() < limit; ++next) {
      const uint3 index = {static_cast<unsigned>(*next % grid.x), static_cast<unsigned>(*next / grid.x % grid.y),
                           static_cast<unsigned>(*next / grid.x / grid.y)};
      resident.push_front(std::make_unique<Block>(index, body, arguments, dynamic_bytes, random));
    }
    std::unique_ptr<Block> block = std::move(resident.front());
    resident.pop_front();
    if (!block->run()) resident.push_back(std::move(block));
  }
  return cudaSuccess;
}

// Stands in for kernel<<<grid, block, dynamic_bytes, stream>>>(args...). Arguments are copied bytewise, as to a device.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t dynamic_bytes, cudaStream_t,
                   Args&&... args) {
  static_assert((std::is_trivially_copyable_v<Params> && ...),
                "a kernel's parameters are copied to the device bytewise");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  } call{kernel, std::tuple<Params...>(static_cast<Params>(args)...)};
  const auto body = [](void* pointer) {
    auto& [kernel, arguments] = *static_cast<Call*>(pointer);
    [[maybe_unused]] const Recorder::InKernel recording;
    std::apply(kernel, arguments);
  };
  return run_grid(reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes, body, &call);
}

template <class T>
T& shared(const void* site) {
  static_assert(std::is_trivially_default_constructible_v<T> && std::is_trivially_copyable_v<T>);
  return *static_cast<T*>(Block::current->shared(site, sizeof(T)));
}

inline void* dynamic_shared_memory() {
  return Block::current->dynamic_shared();
}

template <class T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Shuffled T>
T shuffle(WarpOp op, unsigned mask, T value, unsigned argument, int width, std::source_location site) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  const std::uint64_t result = Block::current->warp_collective(op, mask, std::bit_cast<Bits>(value), argument,
                                                               static_cast<unsigned>(width), site);
  return std::bit_cast<T>(static_cast<Bits>(result));
}

inline unsigned ballot(unsigned mask, int predicate, std::source_location site) {
  return static_cast<unsigned>(
      Block::current->warp_collective(WarpOp::kBallot, mask, predicate != 0, 0, kWarpSize, site));
}

inline void copy_later(void* to, const void* from, bool exists) {
  Block::current->copy_later({to, exists ? from : nullptr});
}

inline void end_copies() {
  Block::current->end_copies();
}

// All groups of the thread's copies but its last `left`.
inline void finish_copies(unsigned left) {
  for (Copy copy = Block::current->next_copy(left); copy.to != nullptr; copy = Block::current->next_copy(left)) {
    *static_cast<uint4*>(copy.to) = copy.from != nullptr ? *static_cast<const uint4*>(copy.from) : uint4{};
  }
}

// The types that CUDA's integer atomics take. Float atomics are left out: their order would change the result.
template <class T>
concept Atomic = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;

template <Atomic T, class Update>
T atomic(T* address, Update update) {
  Block::current->yield_sometimes();
  const T old = *address;
  *address = update(old);
  Block::current->yield_sometimes();
  return old;
}

}  // namespace simt

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > simt::kMaxSharedBytes) return cudaErrorInvalidValue;
  simt::device().dynamic_limit[reinterpret_cast<const void*>(kernel)] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = simt::device().driver;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = simt::device().places;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, std::size_t) {
  *blocks = 1;
  return cudaSuccess;
}

inline cudaError_t cudaPeekAtLastError() {
  return simt::device().last_error;
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(simt::device().last_error, cudaSuccess);
}

// Barriers and warp collectives.

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  simt::Block::current->barrier(site);
}

inline int __syncthreads_or(int predicate, std::source_location site = std::source_location::current()) {
  return simt::Block::current->barrier(site, predicate != 0);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location site = std::source_location::current()) {
  simt::Block::current->warp_collective(simt::WarpOp::kSync, mask, 0, 0, simt::kWarpSize, site);
}

template <simt::Shuffled T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              std::source_location site = std::source_location::current()) {
  return simt::shuffle(simt::WarpOp::kShuffle, mask, value, static_cast<unsigned>(lane), width, site);
}

template <simt::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 std::source_location site = std::source_location::current()) {
  return simt::shuffle(simt::WarpOp::kShuffleUp, mask, value, delta, width, site);
}

template <simt::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   std::source_location site = std::source_location::current()) {
  return simt::shuffle(simt::WarpOp::kShuffleDown, mask, value, delta, width, site);
}

template <simt::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  std::source_location site = std::source_location::current()) {
  return simt::shuffle(simt::WarpOp::kShuffleXor, mask, value, static_cast<unsigned>(lane_mask), width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location site = std::source_location::current()) {
  return simt::ballot(mask, predicate, site);
}

inline int __any_sync(unsigned mask, int predicate, std::source_location site = std::source_location::current()) {
  return simt::ballot(mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, std::source_location site = std::source_location::current()) {
  return simt::ballot(mask, predicate, site) == mask;
}

// Atomics and fences. One thread runs at a time, so a fence has nothing to order.

template <simt::Atomic T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T old) { return static_cast<T>(old + value); });
}

template <simt::Atomic T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T old) { return std::max(old, value); });
}

template <simt::Atomic T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T) { return value; });
}

template <simt::Atomic T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T old) { return old == compare ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// Single-instruction functions.

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
// Byte i of the result is the one of x and y, taken as eight bytes, that nibble i of the selector names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xffu) << (8 * i);
  }
  return result;
}
