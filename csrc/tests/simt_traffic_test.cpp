// SPDX-License-Identifier: Apache-2.0
// What is counted of kernels whose requests, sectors and wavefronts are known.
#include <vector>

#include "check.h"
#include "common/cuda.h"
#include "simt/simt_memory.h"

namespace {

using simt::GuardedMemory;
using simt::Traffic;

// Totals over the requests of one direction.
struct Sum {
  std::int64_t requests = 0, bytes = 0, sectors = 0, ideal = 0, unique = 0;
};

Sum sum_of(const Traffic& traffic, bool store) {
  Sum sum;
  for (const simt::Request& r : traffic.requests) {
    if (r.store != store) continue;
    ++sum.requests;
    sum.bytes += r.bytes;
    sum.sectors += r.sectors;
    sum.ideal += r.ideal;
  }
  for (const std::uint64_t sector : traffic.sectors) sum.unique += (sector & 1) == store;
  return sum;
}

void check_sum(const Sum& sum, const Sum& expected) {
  CHECK_EQUAL(sum.requests, expected.requests);
  CHECK_EQUAL(sum.bytes, expected.bytes);
  CHECK_EQUAL(sum.sectors, expected.sectors);
  CHECK_EQUAL(sum.ideal, expected.ideal);
  CHECK_EQUAL(sum.unique, expected.unique);
}

template <class Kernel, class... Args>
const Traffic& counted(Kernel* kernel, unsigned blocks, unsigned threads, Args... args) {
  simt::start_counting();
  CHECK_EQUAL(simt::launch(kernel, blocks, threads, 0, nullptr, args...), cudaSuccess);
  return simt::finish_counting();
}

constexpr unsigned kBlocks = 2, kThreads = 64, kWarps = kBlocks * kThreads / 32;

// Each thread copies one T, `step` of them from its neighbour's.
template <class T>
__global__ void copy_kernel(const T* in, T* out, int step) {
  const unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * static_cast<unsigned>(step);
  out[i] = in[i];
}

template <class T>
void check_copy(int step, std::size_t misalignment, const Sum& expected) {
  const std::size_t bytes = kBlocks * kThreads * static_cast<std::size_t>(step) * sizeof(T);
  const GuardedMemory in(bytes, misalignment), out(bytes, misalignment);
  const Traffic& traffic = counted(&copy_kernel<T>, kBlocks, kThreads, reinterpret_cast<const T*>(in.data()),
                                   reinterpret_cast<T*>(out.data()), step);
  check_sum(sum_of(traffic, false), expected);
  check_sum(sum_of(traffic, true), expected);
  CHECK_EQUAL(traffic.shared_requests, 0);
}

TEST(neighbours_that_access_neighbours_touch_the_fewest_sectors) {
  check_copy<float>(1, 0, {kWarps, kWarps * 128, kWarps * 4, kWarps * 4, kWarps * 4});
  check_copy<uint4>(1, 0, {kWarps, kWarps * 512, kWarps * 16, kWarps * 16, kWarps * 16});
  check_copy<unsigned char>(1, 0, {kWarps, kWarps * 32, kWarps, kWarps, kWarps});
}

TEST(strides_touch_more) {
  check_copy<float>(2, 0, {kWarps, kWarps * 128, kWarps * 8, kWarps * 4, kWarps * 8});
  check_copy<uint4>(2, 0, {kWarps, kWarps * 512, kWarps * 32, kWarps * 16, kWarps * 32});
}

TEST(misaligned_requests_touch_one_sector_more_and_share_it) {
  check_copy<float>(1, 4, {kWarps, kWarps * 128, kWarps * 5, kWarps * 4, kWarps * 4 + 1});
}

// A vector written out, and the same words one by one.
__global__ void vector_kernel(uint4* out) {
  const unsigned i = threadIdx.x;
  out[i] = {i, i + 1, i + 2, i + 3};
}

__global__ void words_kernel(unsigned* out) {
  for (unsigned k = 0; k < 4; ++k) out[4 * threadIdx.x + k] = k;
}

TEST(a_vector_is_one_request_and_words_in_a_loop_are_four) {
  const GuardedMemory out(512);
  check_sum(sum_of(counted(&vector_kernel, 1, 32, reinterpret_cast<uint4*>(out.data())), true), {1, 512, 16, 16, 16});
  check_sum(sum_of(counted(&words_kernel, 1, 32, reinterpret_cast<unsigned*>(out.data())), true), {4, 512, 64, 16, 16});
}

__global__ void broadcast_kernel(const float* in, float* out) {
  out[threadIdx.x] = in[0];
}

TEST(a_broadcast_is_one_sector) {
  const GuardedMemory in(32), out(256);
  const Traffic& traffic = counted(&broadcast_kernel, 1, 64, reinterpret_cast<const float*>(in.data()),
                                   reinterpret_cast<float*>(out.data()));
  check_sum(sum_of(traffic, false), {2, 256, 2, 2, 1});
}

// Two loads of one place by two instructions, as the compiler may not join them.
__global__ void twice_kernel(const volatile float* in, float* out) {
  const float first = in[threadIdx.x];
  out[threadIdx.x] = first + in[threadIdx.x];
}

TEST(a_second_read_is_two_requests_of_the_same_sectors) {
  const GuardedMemory in(128), out(128);
  const Traffic& traffic = counted(&twice_kernel, 1, 32, reinterpret_cast<const volatile float*>(in.data()),
                                   reinterpret_cast<float*>(out.data()));
  check_sum(sum_of(traffic, false), {2, 256, 8, 8, 4});
}

TEST(each_launch_reads_anew) {
  const GuardedMemory in(128), out(128);
  simt::start_counting();
  for (int i = 0; i < 2; ++i)
    simt::launch(&broadcast_kernel, 1, 32, 0, nullptr, reinterpret_cast<const float*>(in.data()),
                 reinterpret_cast<float*>(out.data()));
  const Traffic& traffic = simt::finish_counting();
  CHECK_EQUAL(sum_of(traffic, false).unique, 2);
  CHECK_EQUAL(sum_of(traffic, true).unique, 8);
}

// Odd lanes leave out the first turn: without the barrier their second would count as the others' first.
__global__ void uneven_kernel(const float* in, float* out) {
  float sum = 0.0f;
  for (unsigned i = threadIdx.x % 2; i < 2; ++i) {
    if (i == 1) __syncwarp();
    sum += in[i * 32 + threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

TEST(lanes_that_left_out_a_turn_count_together_again_once_they_have_met) {
  const GuardedMemory in(256), out(128);
  const Traffic& traffic =
      counted(&uneven_kernel, 1, 32, reinterpret_cast<const float*>(in.data()), reinterpret_cast<float*>(out.data()));
  check_sum(sum_of(traffic, false), {2, 192, 8, 6, 8});
}

// Each thread stores T to and loads it from shared memory, `step` of them from its neighbour's.
template <class T>
__global__ void exchange_kernel(int step) {
  using Tile = T[32 * 33];
  SINGLEPASS_SHARED(Tile, tile);
  const unsigned i = threadIdx.x * static_cast<unsigned>(step);
  tile[i] = T{};
  __syncthreads();
  volatile T* const place = &tile[(threadIdx.x ^ 1) * static_cast<unsigned>(step)];
  (void)*reinterpret_cast<volatile int*>(place);
}

void check_wavefronts(const Traffic& traffic, std::int64_t wavefronts, std::int64_t ideal) {
  CHECK_EQUAL(traffic.requests.size(), 0u);
  CHECK_EQUAL(traffic.shared_requests, 2);
  CHECK_EQUAL(traffic.shared_wavefronts, wavefronts);
  CHECK_EQUAL(traffic.shared_ideal, ideal);
}

TEST(lanes_that_want_one_bank_wait_for_each_other) {
  check_wavefronts(counted(&exchange_kernel<int>, 1, 32, 1), 2, 2);
  check_wavefronts(counted(&exchange_kernel<int>, 1, 32, 2), 4, 2);
  check_wavefronts(counted(&exchange_kernel<int>, 1, 32, 32), 64, 2);
  check_wavefronts(counted(&exchange_kernel<int>, 1, 32, 33), 2, 2);
  check_wavefronts(counted(&exchange_kernel<int>, 1, 32, 0), 2, 2);  // a broadcast
}

TEST(wide_accesses_go_in_groups_of_lanes) {
  // Stores of 16 bytes in 4 groups without conflicts; loads of 4 bytes at every fourth bank in one group.
  check_wavefronts(counted(&exchange_kernel<int4>, 1, 32, 1), 4 + 4, 4 + 1);
}

TEST(nothing_else_counts) {
  simt::start_counting();
  const Traffic& traffic = simt::finish_counting();
  const GuardedMemory in(128), out(128);
  simt::launch(&broadcast_kernel, 1, 32, 0, nullptr, reinterpret_cast<const float*>(in.data()),
               reinterpret_cast<float*>(out.data()));
  CHECK_EQUAL(traffic.requests.size(), 0u);
  CHECK_EQUAL(traffic.sectors.size(), 0u);
}

}  // namespace

TEST_MAIN()
