// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "optim/device_table.h"

namespace singlepass::optim {

// What clipping, unscaling and skipping need of the gradients, from one read of them.
struct GradNorm {
  float norm;       // Euclidean norm of all gradients after unscaling
  float divisor;    // dividing the stored gradients by it unscales and clips them
  float found_inf;  // 1 if an element is infinite or NaN, else 0
};

// Clips to g * min(1, max_norm / (norm + eps)); max_norm <= 0 only unscales.
struct ClipOptions {
  double max_norm, eps;
  const float* grad_scale;
};

SINGLEPASS_HD GradNorm finish_grad_norm(double sum_of_squares, const ClipOptions& options) {
  const double scale = options.grad_scale == nullptr ? 1.0 : static_cast<double>(*options.grad_scale);
  const double norm = sqrt(sum_of_squares) / scale;
  const double clip = options.max_norm > 0.0 ? options.max_norm / (norm + options.eps) : 1.0;
  const bool finite = is_finite(static_cast<float>(sum_of_squares * 0.0));
  return {static_cast<float>(norm), static_cast<float>(clip < 1.0 || clip != clip ? scale / clip : scale),
          finite ? 0.0f : 1.0f};
}

// These read grad, grad_dtype and numel of each record: all gradients once. They write `result` on the gradients'
// device: the sum of squares of what is stored, which is finite if all elements are, and can be added to that of other
// shards.
void grad_squares(const std::vector<TensorRecord>& tensors, double* result, const ParallelFor& parallel_for);
void grad_squares(const DeviceTable& table, double* result, const Gpu& gpu);

// Both steps in one: finish_grad_norm of the sum.
void grad_norm(const std::vector<TensorRecord>& tensors, const ClipOptions& options, GradNorm* result,
               const ParallelFor& parallel_for);
void grad_norm(const DeviceTable& table, const ClipOptions& options, GradNorm* result, const Gpu& gpu);

}  // namespace singlepass::optim
