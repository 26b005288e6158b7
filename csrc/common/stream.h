// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "common/parallel.h"

namespace singlepass {

inline constexpr int kMaxReads = 3;
inline constexpr int kMaxUpdates = 8;

// The traffic of an operation without its arithmetic, which is the floor that benchmarks divide by: reads n floats from
// each of at most kMaxReads `reads`, and reads and writes n floats of each of at most kMaxUpdates `updates`, which keep
// their values if all are finite.
// On GPUs all pointers are aligned to 16.
void stream(const std::vector<const float*>& reads, const std::vector<float*>& updates, int64_t n,
            const ParallelFor& parallel_for);
void stream(const std::vector<const float*>& reads, const std::vector<float*>& updates, int64_t n, const Gpu& gpu);

}  // namespace singlepass
