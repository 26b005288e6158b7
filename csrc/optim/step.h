// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "optim/device_table.h"

namespace singlepass::optim {

// One optimizer step over all tensors, which counts the step of each. On GPUs in one launch, in two for rules with
// norms, whose passes may also be made one by one: the update pass then counts the step.
template <class Rule>
void step(const std::vector<TensorRecord>& tensors, const typename Rule::Hyper& hyper, const StepOptions& options,
          const ParallelFor& parallel_for, const Phase& phase = {});
template <class Rule>
void step(const DeviceTable& table, const typename Rule::Hyper& hyper, const StepOptions& options, const Gpu& gpu,
          const Phase& phase = {});

}  // namespace singlepass::optim
