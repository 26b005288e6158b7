// SPDX-License-Identifier: Apache-2.0
// The floor's stream touches every byte that it is charged with: a NaN anywhere in what it reads shows in what it
// writes.
#include "common/stream.h"

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "check.h"
#include "common/cuda.h"

namespace {

using namespace singlepass;
using Stream = std::function<void(const std::vector<const float*>&, const std::vector<float*>&, std::int64_t)>;

void check_stream(const Stream& run, const std::vector<std::int64_t>& sizes) {
  for (const std::int64_t n : sizes) {
    for (std::size_t reads = 0; reads <= kMaxReads; ++reads) {
      for (std::size_t updates = 1; updates <= kMaxUpdates; updates += 3) {
        std::vector<std::vector<float>> read(reads, std::vector<float>(n, 3.0f));
        std::vector<std::vector<float>> update(updates, std::vector<float>(n, 5.0f));
        std::vector<const float*> read_pointers;
        std::vector<float*> update_pointers;
        for (auto& values : read) read_pointers.push_back(values.data());
        for (auto& values : update) update_pointers.push_back(values.data());
        run(read_pointers, update_pointers, n);
        for (const auto& values : update) CHECK(values == std::vector<float>(n, 5.0f));
        for (std::int64_t i : {std::int64_t{0}, n / 2, n - 1}) {
          for (auto& values : read) {
            if (n == 0) continue;
            values[i] = NAN;
            run(read_pointers, update_pointers, n);
            values[i] = 3.0f;
            for (auto& updated : update) {
              float sum = 0.0f;
              for (const float value : updated) sum += value;
              CHECK(std::isnan(sum));
              updated.assign(n, 5.0f);
            }
          }
        }
      }
    }
  }
}

TEST(the_cpu_stream_reads_everything_and_changes_nothing) {
  const ParallelFor serial([](std::int64_t n, std::int64_t, const ParallelFor::Body& body) { body(0, n); }, 1);
  check_stream([&](const auto& reads, const auto& updates, std::int64_t n) { stream(reads, updates, n, serial); },
               {0, 1, 7, 32768, 32769});
}

TEST(the_cuda_stream_reads_everything_and_changes_nothing) {
  check_stream([](const auto& reads, const auto& updates,
                  std::int64_t n) { stream(reads, updates, n, Gpu{"stream_", nullptr, nullptr, nullptr}); },
               {0, 1, 7, 1024, 3001});
}

}  // namespace

TEST_MAIN()
