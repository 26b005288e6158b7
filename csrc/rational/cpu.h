// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/parallel.h"
#include "rational/problem.h"

namespace singlepass::rational {

// Writes y.
void forward_cpu(const Problem& p, const ParallelFor& parallel_for);

// Writes all gradients. Sums have an order that does not depend on the number of threads.
void backward_cpu(const Problem& p, const ParallelFor& parallel_for);

}  // namespace singlepass::rational
