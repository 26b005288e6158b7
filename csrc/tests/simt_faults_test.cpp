// SPDX-License-Identifier: Apache-2.0
// Kernels with planted faults: the SIMT harness catches each.
#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "check.h"
#include "common/async_copy.h"
#include "common/cuda.h"

namespace {

using singlepass::launch;

template <int kLength>
struct Floats {
  float value[kLength];
};

#if defined(SIMT_ASAN)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

template <bool kMissingBarrier>
__global__ void block_sum_kernel(const float* in, float* out) {
  SINGLEPASS_SHARED(Floats<128>, values);
  values.value[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  for (unsigned half = 64; half > 0; half /= 2) {
    if (threadIdx.x < half) values.value[threadIdx.x] += values.value[threadIdx.x + half];
    if constexpr (!kMissingBarrier) __syncthreads();
  }
  if (threadIdx.x == 0) *out = values.value[0];
}

std::set<float> sums_over_seeds(void (*kernel)(const float*, float*)) {
  std::vector<float> in(128);
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i * i % 31);
  std::set<float> sums;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    float out = -1.0f;
    simt::set_seed(seed);
    CHECK_EQUAL(simt::launch(kernel, 1, 128, 0, nullptr, in.data(), &out), cudaSuccess);
    sums.insert(out);
  }
  return sums;
}

TEST(a_missing_barrier_changes_the_result_between_seeds) {
  CHECK_EQUAL(sums_over_seeds(block_sum_kernel<false>).size(), 1u);
  CHECK(sums_over_seeds(block_sum_kernel<true>).size() > 1);
}

// The barrier that is missing here would keep round 2's store from overtaking round 1's load.
template <bool kMissingBarrier>
__global__ void reuse_kernel(const float* in, float* out) {
  SINGLEPASS_SHARED(float, total);
  float sum = 0.0f;
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x == static_cast<unsigned>(round)) total = in[round];
    __syncthreads();
    sum += total * static_cast<float>(threadIdx.x + 1);
    if constexpr (!kMissingBarrier) __syncthreads();
  }
  SINGLEPASS_SHARED(Floats<128>, sums);
  sums.value[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    *out = 0.0f;
    for (const float each : sums.value) *out += each;
  }
}

TEST(a_missing_barrier_between_read_and_reuse_changes_the_result) {
  CHECK_EQUAL(sums_over_seeds(reuse_kernel<false>).size(), 1u);
  CHECK(sums_over_seeds(reuse_kernel<true>).size() > 1);
}

// Every thread reads *step, and the last block to arrive counts it. Thread 0 takes the block's ticket while others may
// still be about to read.
template <bool kMissingBarrier>
__global__ void count_step_kernel(int* step, unsigned* ticket, int* seen) {
  SINGLEPASS_SHARED(bool, is_last);
  __syncthreads();
  seen[blockIdx.x * blockDim.x + threadIdx.x] = *step;
  if constexpr (!kMissingBarrier) __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (is_last && threadIdx.x == 0) ++*step;
}

int seeds_that_see_the_next_step(void (*kernel)(int*, unsigned*, int*)) {
  int count = 0;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    int step = 0;
    unsigned ticket = 0;
    std::vector<int> seen(3 * 256);
    simt::set_seed(seed);
    CHECK_EQUAL(simt::launch(kernel, 3, 256, 0, nullptr, &step, &ticket, seen.data()), cudaSuccess);
    CHECK_EQUAL(step, 1);
    count += std::count(seen.begin(), seen.end(), 1) > 0;
  }
  return count;
}

TEST(a_race_between_blocks_changes_the_result_between_seeds) {
  CHECK_EQUAL(seeds_that_see_the_next_step(count_step_kernel<false>), 0);
  CHECK(seeds_that_see_the_next_step(count_step_kernel<true>) > 0);
}

__global__ void copy_kernel(const float* in, float* out, int n, int overrun) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n + overrun) out[i] = in[i % n];
}

// The guards see the store in a plain build; ASan stops at it.
TEST(a_store_out_of_bounds_is_caught) {
  const auto faulty = [](int overrun) {
    simt::GuardedMemory in(1000 * sizeof(float)), out(1000 * sizeof(float));
    auto* source = reinterpret_cast<float*>(in.data());
    std::fill_n(source, 1000, 1.0f);
    simt::launch(copy_kernel, 8, 128, 0, nullptr, source, reinterpret_cast<float*>(out.data()), 1000, overrun);
    if (!out.intact()) throw simt::Error("guards overwritten");
  };
  CHECK_EQUAL(check::thrown_message<simt::Error>([&] { faulty(0); }), "");
  if (kSanitized) {
    const std::string message = check::death_message([&] { faulty(1); });
    CHECK_CONTAINS(message, "AddressSanitizer");
    CHECK_CONTAINS(message, "WRITE of size 4");
  } else {
    CHECK_CONTAINS(check::thrown_message<simt::Error>([&] { faulty(1); }), "guards overwritten");
  }
}

__global__ void shared_overrun_kernel(unsigned length, bool dynamic) {
  SINGLEPASS_SHARED(Floats<64>, fixed);
  float* values = dynamic ? singlepass::dynamic_shared<float>() : fixed.value;
  if (threadIdx.x < length) values[threadIdx.x] = 1.0f;
}

TEST(a_store_beside_shared_memory_is_caught) {
  for (const bool dynamic : {false, true}) {
    const auto run = [=](unsigned length) {
      simt::launch(shared_overrun_kernel, 1, 96, 256, nullptr, length, dynamic);
    };
    CHECK_EQUAL(check::thrown_message<simt::Error>([&] { run(64); }), "");
    if (kSanitized) {
      CHECK_CONTAINS(check::death_message([&] { run(65); }), "AddressSanitizer");
    } else {
      CHECK_CONTAINS(check::thrown_message<simt::Error>([&] { run(65); }), "stored beside its shared memory");
    }
  }
}

TEST(a_dropped_tail_leaves_elements_unwritten) {
  const int n = 1000;
  const auto unwritten = [n](unsigned blocks) {
    std::vector<float> in(n, 1.0f);
    simt::GuardedMemory out(n * sizeof(float));
    auto* result = reinterpret_cast<float*>(out.data());
    simt::launch(copy_kernel, blocks, 128, 0, nullptr, in.data(), result, n, 0);
    return std::count_if(result, result + n, [](float x) { return std::isnan(x); });
  };
  CHECK_EQUAL(unwritten((n + 127) / 128), 0);
  CHECK_EQUAL(unwritten(n / 128), n % 128);
}

enum class Divergence { kNone, kExit, kOtherBarrier, kWarpCollective };

__global__ void divergent_kernel(Divergence divergence) {
  if (threadIdx.x == 37) {
    if (divergence == Divergence::kExit) return;
    if (divergence == Divergence::kOtherBarrier) {
      __syncthreads();
      return;
    }
    if (divergence == Divergence::kWarpCollective) __syncwarp();
  }
  __syncthreads();
}

TEST(a_divergent_barrier_is_reported) {
  const auto message = [](Divergence divergence) {
    return check::thrown_message<simt::Error>([=] { simt::launch(divergent_kernel, 2, 64, 0, nullptr, divergence); });
  };
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    simt::set_seed(seed);
    CHECK_EQUAL(message(Divergence::kNone), "");
    CHECK_CONTAINS(message(Divergence::kExit), "63 threads at __syncthreads");
    CHECK_CONTAINS(message(Divergence::kExit), "1 thread exited");
    CHECK_CONTAINS(message(Divergence::kOtherBarrier), "divergent __syncthreads");
    CHECK_CONTAINS(message(Divergence::kWarpCollective), "1 thread in a warp collective");
  }
}

enum class WarpFault { kNone, kExitedLane, kOwnLaneLeftOut, kMixed, kSourceLeftOut };

__global__ void warp_fault_kernel(WarpFault fault) {
  const unsigned lane = threadIdx.x % 32;
  if (fault == WarpFault::kExitedLane && lane == 31) return;
  if (fault == WarpFault::kMixed && lane == 3) {
    __syncwarp();
    return;
  }
  if (fault == WarpFault::kSourceLeftOut) {
    if (lane < 16) __shfl_sync(0x0000ffffu, 1, 16);
    return;
  }
  const unsigned mask = fault == WarpFault::kOwnLaneLeftOut && lane == 3 ? 0xfffffff7u : 0xffffffffu;
  __shfl_xor_sync(mask, 1.0f, 1);
}

TEST(a_divergent_warp_collective_is_reported) {
  const auto message = [](WarpFault fault, unsigned block) {
    return check::thrown_message<simt::Error>([=] { simt::launch(warp_fault_kernel, 1, block, 0, nullptr, fault); });
  };
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    simt::set_seed(seed);
    CHECK_EQUAL(message(WarpFault::kNone, 64), "");
    CHECK_CONTAINS(message(WarpFault::kNone, 48), "names lane 16, which is not there");
    CHECK(!message(WarpFault::kExitedLane, 32).empty());
    CHECK(!message(WarpFault::kOwnLaneLeftOut, 32).empty());
    CHECK_CONTAINS(message(WarpFault::kMixed, 32), "wait for each other in different collectives");
    CHECK_CONTAINS(message(WarpFault::kSourceLeftOut, 32), "reads lane 16, which its mask leaves out");
  }
}

__global__ void spin_kernel(int* flag) {
  while (atomicAdd(flag, 0) == 0) {
  }
}

TEST(a_wait_without_end_is_reported) {
  int flag = 0;
  const auto run = [&] { simt::launch(spin_kernel, 1, 2, 0, nullptr, &flag); };
  CHECK_CONTAINS(check::thrown_message<simt::Error>(run), "spins without end");
}

__global__ void uninitialised_kernel(float* out) {
  SINGLEPASS_SHARED(Floats<32>, values);
  if (threadIdx.x != 5) values.value[threadIdx.x] = 1.0f;
  __syncthreads();
  float sum = 0.0f;
  for (const float value : values.value) sum += value;
  out[threadIdx.x] = sum;
}

template <bool kMissingWait>
__global__ void reverse_kernel(const float* in, float* out) {
  SINGLEPASS_SHARED(Floats<256>, values);
  singlepass::copy_async(&values.value[4 * threadIdx.x], &in[4 * threadIdx.x], threadIdx.x < 63);
  if constexpr (!kMissingWait) singlepass::wait_for_copies();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = values.value[255 - (4 * threadIdx.x + i)];
}

TEST(a_copy_that_nobody_waits_for_is_missing) {
  alignas(16) float in[256];
  for (int i = 0; i < 256; ++i) in[i] = static_cast<float>(i);
  std::vector<float> out(256);
  CHECK_EQUAL(simt::launch(reverse_kernel<false>, 1, 64, 0, nullptr, in, out.data()), cudaSuccess);
  for (int i = 0; i < 256; ++i) CHECK_EQUAL(out[i], i < 4 ? 0.0f : 255.0f - static_cast<float>(i));
  CHECK_EQUAL(simt::launch(reverse_kernel<true>, 1, 64, 0, nullptr, in, out.data()), cudaSuccess);
  CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::isnan(x); }));
}

__global__ void two_copies_kernel(const float* in, float* out) {
  SINGLEPASS_SHARED(Floats<8>, values);
  for (int i = 0; i < 8; i += 4) {
    singlepass::copy_async(&values.value[i], &in[i], true);
    singlepass::end_copies();
  }
  singlepass::wait_for_copies<1>();
  out[0] = values.value[3], out[1] = values.value[4];
  singlepass::wait_for_copies<0>();
  out[2] = values.value[4];
}

TEST(the_last_groups_of_copies_are_not_there_before_they_are_waited_for) {
  alignas(16) const float in[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  std::vector<float> out(3);
  CHECK_EQUAL(simt::launch(two_copies_kernel, 1, 1, 0, nullptr, in, out.data()), cudaSuccess);
  CHECK_EQUAL(out[0], 3.0f);
  CHECK(std::isnan(out[1]));
  CHECK_EQUAL(out[2], 4.0f);
}

TEST(uninitialised_shared_memory_reads_as_nan) {
  std::vector<float> out(32, 0.0f);
  for (int again = 0; again < 2; ++again) {  // nor does a block see what the last one left
    simt::launch(uninitialised_kernel, 2, 32, 0, nullptr, out.data());
    for (const float sum : out) CHECK(std::isnan(sum));
  }
}

__global__ void load_four_kernel(const float* in, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(in);
  *out = four.x + four.y + four.z + four.w;
}

TEST(a_misaligned_16_byte_access_is_caught) {
  if (!kSanitized) return;  // x86 loads it without complaint: only UBSan sees it
  const auto run = [](std::size_t misalignment) {
    simt::GuardedMemory in(64, misalignment);
    float out;
    simt::launch(load_four_kernel, 1, 1, 0, nullptr, reinterpret_cast<const float*>(in.data()), &out);
  };
  CHECK_EQUAL(check::death_message([&] { run(16); }), "");
  CHECK_CONTAINS(check::death_message([&] { run(4); }), "misaligned address");
}

__global__ void too_much_shared_kernel() {
  SINGLEPASS_SHARED(Floats<12 << 10>, a);
  SINGLEPASS_SHARED(float, b);
  a.value[0] = b = 0.0f;
}

TEST(too_much_static_shared_memory_is_reported) {
  const auto run = [] { simt::launch(too_much_shared_kernel, 1, 1, 0, nullptr); };
  CHECK_CONTAINS(check::thrown_message<simt::Error>(run), "too much shared memory: 49156 bytes");
}

TEST(the_harness_goes_on_after_a_fault) {
  for (int i = 0; i < 3; ++i) {
    CHECK(!check::thrown_message<simt::Error>([] {
             simt::launch(divergent_kernel, 1, 1024, 0, nullptr, Divergence::kExit);
           }).empty());
    CHECK_EQUAL(simt::launch(divergent_kernel, 1, 1024, 0, nullptr, Divergence::kNone), cudaSuccess);
  }
}

}  // namespace

TEST_MAIN()
