// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "common/math.h"
#include "spectral/problem.h"

// HyboNet's map (Chen et al., arXiv 2105.14686): time = sigmoid(z_0) e^log_scale + offset, and the other elements times
// root = sqrt((time^2 - k) / |z_1..|^2), so that -time^2 + |x_1..|^2 = -k.
namespace singlepass::spectral {

// Rows that share a partial sum: few, so that a GPU has work for all of itself.
inline constexpr int64_t kLorentzRows = 16;

SINGLEPASS_HD int64_t lorentz_blocks(int64_t rows) {
  return (rows + kLorentzRows - 1) / kLorentzRows;
}

struct LorentzRow {
  float gate, scale, time, held, root;
  bool clamped;

  SINGLEPASS_HD LorentzRow(const Lorentz& p, float first, double square) {
    gate = 1.0f / (1.0f + expf(-first));
    scale = expf(*p.log_scale);
    time = gate * scale + p.offset;
    clamped = !(square > 1e-8);
    held = maximum(static_cast<float>(square), 1e-8f);
    root = sqrtf(maximum((time - p.least) * (time + p.least), 0.0f) / held);
  }

  // Gradients, from that of the time and `along`, the sum of grad_i z_i over the others.
  SINGLEPASS_HD float grad_time(float grad_first, double along) const {
    return root > 0.0f ? grad_first + static_cast<float>(along) * time / (held * root) : grad_first;
  }
  SINGLEPASS_HD float grad_first(float grad_time) const { return grad_time * scale * gate * (1.0f - gate); }
  SINGLEPASS_HD float grad_scale(float grad_time) const { return grad_time * gate * scale; }
  // grad z_i = grad_i root - pull z_i
  SINGLEPASS_HD float pull(double along) const { return clamped ? 0.0f : static_cast<float>(along) * root / held; }
};

}  // namespace singlepass::spectral
