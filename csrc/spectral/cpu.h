// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "common/parallel.h"
#include "spectral/problem.h"
#include "spectral/step.h"

namespace singlepass::spectral {

void scale_cpu(const Scale& p, const ParallelFor& parallel_for);
void step_cpu(const std::vector<optim::TensorRecord>& tensors, const Rule::Hyper& hyper, const StepOptions& options,
              const ParallelFor& parallel_for);
void sample_cpu(const std::vector<Draw>& layers, const DrawOptions& options, const ParallelFor& parallel_for);
void swap_cpu(const std::vector<Swap>& pairs, const ParallelFor& parallel_for);
void lorentz_cpu(const Lorentz& p, const ParallelFor& parallel_for);
void lorentz_backward_cpu(const Lorentz& p, const ParallelFor& parallel_for);

}  // namespace singlepass::spectral
