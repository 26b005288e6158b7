// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "common/parallel.h"
#include "optim/table.h"

namespace singlepass::optim {

// The random bits of one tensor at one step, from its element `start` (a multiple of 8) on.
struct RandomStream {
  uint64_t seed;
  uint32_t id, step;
  uint64_t start;
};

// One optimizer step over `tensors`; counts the step of each.
template <class Rule>
void step_cpu(const std::vector<TensorRecord>& tensors, const typename Rule::Hyper& hyper, const StepOptions& options,
              const ParallelFor& parallel_for);

}  // namespace singlepass::optim
