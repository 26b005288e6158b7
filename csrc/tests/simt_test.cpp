// SPDX-License-Identifier: Apache-2.0
// The SIMT harness does what a device does.
#include <array>
#include <numeric>
#include <set>
#include <vector>

#include "check.h"
#include "common/cuda.h"

namespace {

using singlepass::launch;

constexpr unsigned kFullMask = 0xffffffffu;

__global__ void write_index_kernel(int* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[i] = static_cast<int>(i);
}

TEST(byte_perm_picks_bytes_of_two_words) {
  CHECK_EQUAL(__byte_perm(0x33221100u, 0x77665544u, 0x7531u), 0x77553311u);
  CHECK_EQUAL(__byte_perm(0x33221100u, 0x77665544u, 0x2064u), 0x22006644u);
}

TEST(every_thread_of_a_three_dimensional_grid_runs_once) {
  const dim3 grid(3, 2, 2), block(5, 3, 2);
  std::vector<int> out(3 * 2 * 2 * 5 * 3 * 2, -1), expected(out.size());
  std::iota(expected.begin(), expected.end(), 0);
  CHECK_EQUAL(simt::launch(write_index_kernel, grid, block, 0, nullptr, out.data()), cudaSuccess);
  CHECK(out == expected);
}

__global__ void record_order_kernel(unsigned* order, unsigned* count) {
  order[*count] = blockIdx.x * blockDim.x + threadIdx.x;
  ++*count;
}

std::vector<unsigned> order_under_seed(std::uint64_t seed) {
  std::vector<unsigned> order(4 * 64);
  unsigned count = 0;
  simt::set_seed(seed);
  simt::launch(record_order_kernel, 4, 64, 0, nullptr, order.data(), &count);
  return order;
}

TEST(the_seed_permutes_blocks_and_threads_reproducibly) {
  std::set<std::vector<unsigned>> orders;
  std::set<unsigned> first_blocks;
  for (std::uint64_t seed = 0; seed < 32; ++seed) {
    orders.insert(order_under_seed(seed));
    first_blocks.insert(order_under_seed(seed)[0] / 64);
  }
  CHECK_EQUAL(orders.size(), 32u);
  CHECK_EQUAL(first_blocks.size(), 4u);
}

template <int kBlock>
__device__ float block_sum(float value) {
  using Partial = std::array<float, kBlock / 32>;
  SINGLEPASS_SHARED(Partial, partial);
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(kFullMask, value, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kBlock / 32; ++i) sum += partial[i];
  __syncthreads();
  return sum;
}

template <int kBlock>
__global__ void two_sums_kernel(const float* in, float* out) {
  const float first = block_sum<kBlock>(in[threadIdx.x]);
  const float second = block_sum<kBlock>(in[threadIdx.x] * 2.0f);
  out[threadIdx.x] = first + second;
}

TEST(a_block_reduction_is_right_under_every_schedule) {
  std::vector<float> in(256), out(256);
  std::iota(in.begin(), in.end(), 1.0f);
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    simt::set_seed(seed);
    CHECK_EQUAL(simt::launch(two_sums_kernel<256>, 1, 256, 0, nullptr, in.data(), out.data()), cudaSuccess);
    for (const float sum : out) CHECK_EQUAL(sum, 3.0f * 256 * 257 / 2);
  }
}

template <class T>
__global__ void shuffles_kernel(const T* in, T* out) {
  const T value = in[threadIdx.x];
  out[threadIdx.x] = __shfl_sync(kFullMask, value, 5);
  out[32 + threadIdx.x] = __shfl_up_sync(kFullMask, value, 3);
  out[64 + threadIdx.x] = __shfl_down_sync(kFullMask, value, 3);
  out[96 + threadIdx.x] = __shfl_xor_sync(kFullMask, value, 9);
  out[128 + threadIdx.x] = __shfl_sync(kFullMask, value, 2, 8);
  out[160 + threadIdx.x] = __shfl_up_sync(kFullMask, value, 1, 8);
  out[192 + threadIdx.x] = __shfl_down_sync(kFullMask, value, 1, 8);
  out[224 + threadIdx.x] = __shfl_xor_sync(kFullMask, value, 8, 8);
}

template <class T>
void check_shuffles() {
  std::vector<T> in(32), out(8 * 32);
  for (int i = 0; i < 32; ++i) in[i] = static_cast<T>(100 + i);
  CHECK_EQUAL(simt::launch(shuffles_kernel<T>, 1, 32, 0, nullptr, in.data(), out.data()), cudaSuccess);
  for (int i = 0; i < 32; ++i) {
    CHECK_EQUAL(out[i], in[5]);
    CHECK_EQUAL(out[32 + i], in[i < 3 ? i : i - 3]);
    CHECK_EQUAL(out[64 + i], in[i + 3 > 31 ? i : i + 3]);
    CHECK_EQUAL(out[96 + i], in[i ^ 9]);
    CHECK_EQUAL(out[128 + i], in[i / 8 * 8 + 2]);
    CHECK_EQUAL(out[160 + i], in[i % 8 == 0 ? i : i - 1]);
    CHECK_EQUAL(out[192 + i], in[i % 8 == 7 ? i : i + 1]);
    CHECK_EQUAL(out[224 + i], in[i % 16 < 8 ? i : i - 8]);  // a lane reads an earlier segment, never a later one
  }
}

TEST(shuffles_move_values_as_the_programming_guide_says) {
  check_shuffles<float>();
  check_shuffles<int>();
  check_shuffles<unsigned>();
  check_shuffles<double>();
  check_shuffles<long long>();
}

__global__ void votes_kernel(unsigned* out) {
  const bool odd = threadIdx.x % 2 == 1;
  const unsigned ballot = __ballot_sync(kFullMask, odd);
  const int any = __any_sync(kFullMask, threadIdx.x == 40), all = __all_sync(kFullMask, threadIdx.x < 32);
  // Half a warp meets by itself.
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const unsigned of_half = __ballot_sync(half, odd);
  __syncwarp();
  unsigned* mine = out + 4 * threadIdx.x;
  mine[0] = ballot;
  mine[1] = static_cast<unsigned>(any);
  mine[2] = static_cast<unsigned>(all);
  mine[3] = of_half;
}

TEST(votes_see_the_lanes_of_their_mask) {
  std::vector<unsigned> out(4 * 64);
  CHECK_EQUAL(simt::launch(votes_kernel, 1, 64, 0, nullptr, out.data()), cudaSuccess);
  for (unsigned i = 0; i < 64; ++i) {
    CHECK_EQUAL(out[4 * i], 0xaaaaaaaau);
    CHECK_EQUAL(out[4 * i + 1], i < 32 ? 0u : 1u);
    CHECK_EQUAL(out[4 * i + 2], i < 32 ? 1u : 0u);
    CHECK_EQUAL(out[4 * i + 3], i % 32 < 16 ? 0x0000aaaau : 0xaaaa0000u);
  }
}

__global__ void last_block_kernel(unsigned* tickets, int* order, int* last_block) {
  SINGLEPASS_SHARED(bool, is_last);
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(tickets, 1u) == gridDim.x - 1;
  }
  order[atomicAdd(tickets + 1, 1u)] = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (is_last && threadIdx.x == 0) *last_block = static_cast<int>(blockIdx.x);
}

__global__ void ask_all_kernel(const int* says_so, int* out) {
  for (int turn = 0; turn < 3; ++turn) {
    const int any = __syncthreads_or(says_so[turn * blockDim.x + threadIdx.x]);
    out[turn * blockDim.x + threadIdx.x] = any != 0;
  }
}

TEST(a_barrier_tells_all_threads_whether_any_says_so) {
  std::vector<int> says_so(3 * 64), out(3 * 64, -1), expected(3 * 64);
  says_so[64 + 17] = 4;
  std::fill_n(expected.begin() + 64, 64, 1);
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    simt::set_seed(seed);
    CHECK_EQUAL(simt::launch(ask_all_kernel, 1, 64, 0, nullptr, says_so.data(), out.data()), cudaSuccess);
    CHECK(out == expected);
  }
}

TEST(atomics_lose_nothing_and_vary_their_order) {
  std::set<std::vector<int>> orders;
  std::set<int> last_blocks;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    simt::set_seed(seed);
    unsigned tickets[2] = {0, 0};
    int last_block = -1;
    std::vector<int> order(4 * 32, -1);
    CHECK_EQUAL(simt::launch(last_block_kernel, 4, 32, 0, nullptr, &tickets[0], order.data(), &last_block),
                cudaSuccess);
    CHECK_EQUAL(tickets[0], 4u);
    CHECK_EQUAL(tickets[1], 128u);
    orders.insert(order);
    last_blocks.insert(last_block);
  }
  CHECK_EQUAL(orders.size(), 20u);
  CHECK(last_blocks.size() > 1 && last_blocks.count(-1) == 0);
}

__global__ void atomic_operations_kernel(int* out) {
  const int i = static_cast<int>(threadIdx.x);
  atomicMax(out, i);
  atomicCAS(out + 1, -1, 7);
  atomicExch(out + 2, 9);
}

TEST(atomic_max_cas_and_exchange) {
  int out[3] = {-1, -1, -1};
  CHECK_EQUAL(simt::launch(atomic_operations_kernel, 1, 100, 0, nullptr, &out[0]), cudaSuccess);
  CHECK_EQUAL(out[0], 99);
  CHECK_EQUAL(out[1], 7);
  CHECK_EQUAL(out[2], 9);
}

// Thread 0 waits for a value that another thread of its block stores.
__global__ void wait_for_neighbour_kernel(int* flag) {
  if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) {
    }
  } else if (threadIdx.x == 1) {
    atomicExch(flag, 1);
  }
}

TEST(a_thread_may_wait_for_another_of_its_block) {
  int flag = 0;
  CHECK_EQUAL(simt::launch(wait_for_neighbour_kernel, 1, 2, 0, nullptr, &flag), cudaSuccess);
}

__global__ void reverse_kernel(float* data) {
  float* shared = singlepass::dynamic_shared<float>();
  shared[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

TEST(dynamic_shared_memory_is_one_array_of_the_block) {
  std::vector<float> data(1000);
  std::iota(data.begin(), data.end(), 0.0f);
  CHECK_EQUAL(simt::launch(reverse_kernel, 1, 1000, 4000, nullptr, data.data()), cudaSuccess);
  for (int i = 0; i < 1000; ++i) CHECK_EQUAL(data[i], 999.0f - i);
}

template <class T>
__device__ T* shared_slot() {
  SINGLEPASS_SHARED(T, slot);
  return &slot;
}

__global__ void sites_kernel(void** out) {
  SINGLEPASS_SHARED(float, a);
  SINGLEPASS_SHARED(float, b);
  void* mine[] = {&a, &b, shared_slot<float>(), shared_slot<int>()};
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = mine[i];
}

TEST(shared_variables_are_one_per_site_and_instantiation) {
  std::vector<void*> out(8);
  CHECK_EQUAL(simt::launch(sites_kernel, 1, 2, 0, nullptr, out.data()), cudaSuccess);
  for (int i = 0; i < 4; ++i) CHECK_EQUAL(out[i], out[4 + i]);
  CHECK_EQUAL(std::set<void*>(out.begin(), out.end()).size(), 4u);
}

__global__ void empty_kernel() {}

TEST(launches_that_a_device_refuses_return_its_error) {
  const auto shape = [](dim3 grid, dim3 block) { return simt::launch(empty_kernel, grid, block, 0, nullptr); };
  CHECK_EQUAL(shape(1, 1024), cudaSuccess);
  CHECK_EQUAL(shape(1, 1025), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(shape(1, dim3(32, 33)), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(shape(1, dim3(1, 1, 65)), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(shape(1, 0), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(shape(0, 1), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(shape(dim3(1, 65536), 1), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(shape(dim3(1, 1, 65536), 1), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(cudaGetLastError(), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(cudaGetLastError(), cudaSuccess);
}

__global__ void opted_in_kernel() {}

TEST(dynamic_shared_memory_over_48_KiB_must_be_asked_for) {
  CHECK_EQUAL(simt::launch(opted_in_kernel, 1, 1, 48 << 10, nullptr), cudaSuccess);
  CHECK_EQUAL(simt::launch(opted_in_kernel, 1, 1, (48 << 10) + 1, nullptr), cudaErrorInvalidValue);
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  CHECK_EQUAL(cudaFuncSetAttribute(opted_in_kernel, attribute, 228 << 10), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaFuncSetAttribute(opted_in_kernel, attribute, 227 << 10), cudaSuccess);
  CHECK_EQUAL(simt::launch(opted_in_kernel, 1, 1, 227 << 10, nullptr), cudaSuccess);
  CHECK_EQUAL(simt::launch(empty_kernel, 1, 1, 227 << 10, nullptr), cudaErrorInvalidValue);
}

TEST(launches_are_counted) {
  const std::uint64_t before = simt::launches();
  simt::launch(empty_kernel, 3, 32, 0, nullptr);
  simt::launch(empty_kernel, 1, 0, 0, nullptr);
  CHECK_EQUAL(simt::launches() - before, 1u);
}

}  // namespace

TEST_MAIN()
