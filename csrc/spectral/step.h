// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "optim/adamw.h"
#include "optim/device_table.h"

namespace singlepass::spectral {

// The update is AdamW's own. Then records with rows have them made unit vectors, in others what is below zero is zero.
using Rule = optim::AdamW<false>;

struct StepOptions {
  optim::StepOptions shared;
  bool project;  // takes from each row's gradient its part along the row first
};

// How records are cut for step: short rows share a thread block, which has no more threads than a row needs.
inline constexpr optim::LaunchShape kStepShape = {128, 4096};

// Elements of a row that are kept in shared memory while its norm is found, a multiple of 256: with what the kernel has
// beside them they fill the 48 KiB that every device grants. What a row has beyond them is read and updated twice.
inline constexpr int64_t kHeldElements = 11264;

// One step over all tensors; on GPUs in one launch.
void step(const std::vector<optim::TensorRecord>& tensors, const Rule::Hyper& hyper, const StepOptions& options,
          const ParallelFor& parallel_for);
void step(const optim::DeviceTable& table, const Rule::Hyper& hyper, const StepOptions& options, const Gpu& gpu,
          int64_t held = kHeldElements);

// What makes a row of this sum of squares a unit vector; a row of zeros stays, one with a NaN becomes NaN.
SINGLEPASS_HD float inverse_norm(double squares) {
  return squares == 0.0 ? 1.0f : static_cast<float>(1.0 / sqrt(squares));
}

// NaN stays NaN.
SINGLEPASS_HD float not_negative(float value) {
  return value < 0.0f ? 0.0f : value;
}

}  // namespace singlepass::spectral
