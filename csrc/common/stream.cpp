// SPDX-License-Identifier: Apache-2.0
#include "common/stream.h"

#include <algorithm>
#include <utility>

#include "common/dtype.h"

namespace singlepass {
namespace {

constexpr int64_t kChunk = 32768;

template <int kReads, int kUpdates>
SINGLEPASS_TARGET_CLONES void stream_chunk(const float* const* reads, float* const* updates, int64_t begin,
                                           int64_t end) {
  const float* r[kMaxReads];
  float* u[kMaxUpdates];
  for (int k = 0; k < kReads; ++k) r[k] = reads[k];
  for (int k = 0; k < kUpdates; ++k) u[k] = updates[k];
  if constexpr (kUpdates == 0) {
    uint32_t checksum = 0;
    for (int64_t i = begin; i < end; ++i) {
      for (int k = 0; k < kReads; ++k) checksum += bit_cast<uint32_t>(r[k][i]);
    }
    [[maybe_unused]] volatile uint32_t sink = checksum;  // keeps the reads
  } else {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      // All loads before the first store: a load behind a store to the same offset in another page would wait for it.
      float sum = 0.0f, values[kUpdates];
      for (int k = 0; k < kReads; ++k) sum += r[k][i];
      for (int k = 0; k < kUpdates; ++k) values[k] = u[k][i];
      for (int k = 0; k < kUpdates; ++k) u[k][i] = values[k] + 0.0f * sum;
    }
  }
}

using StreamChunk = void (*)(const float* const*, float* const*, int64_t, int64_t);

template <int kReads, int... kUpdates>
constexpr StreamChunk pick(int updates, std::integer_sequence<int, kUpdates...>) {
  constexpr StreamChunk table[] = {&stream_chunk<kReads, kUpdates>...};
  return table[updates];
}

}  // namespace

void stream(const std::vector<const float*>& reads, const std::vector<float*>& updates, int64_t n,
            const ParallelFor& parallel_for) {
  using Counts = std::make_integer_sequence<int, kMaxUpdates + 1>;
  const int count = static_cast<int>(updates.size());
  const StreamChunk chunk = reads.empty()       ? pick<0>(count, Counts{})
                            : reads.size() == 1 ? pick<1>(count, Counts{})
                            : reads.size() == 2 ? pick<2>(count, Counts{})
                                                : pick<3>(count, Counts{});
  parallel_for_elements(parallel_for, (n + kChunk - 1) / kChunk, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      chunk(reads.data(), updates.data(), i * kChunk, std::min(n, (i + 1) * kChunk));
    }
  });
}

}  // namespace singlepass
