// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/rule.h"

namespace singlepass::optim {

// Decoupled weight decay regularization, arXiv 1711.05101, as torch.optim.AdamW computes it.
template <bool kAmsgrad>
struct AdamW {
  using Plain = AdamW<false>;  // what runs where no maximum is given
  static constexpr const char* kName = "adamw";
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr bool kScaled = false;
  static constexpr Access kUpdate = {kParam | kGrad | states(kStates), kParam | states(kStates)};

  struct Hyper {
    double beta1, beta2, eps, weight_decay;
  };
  using HyperTypes = std::tuple<double, double, double, double>;

  struct Coefficients {
    float decay, beta1, rest1, beta2, rest2, step_size, inverse_root2, eps;
  };

  SINGLEPASS_HD static Coefficients coefficients(const Hyper& h, double lr, double step, double) {
    return {static_cast<float>(1.0 - lr * h.weight_decay),
            static_cast<float>(h.beta1),
            static_cast<float>(1.0 - h.beta1),
            static_cast<float>(h.beta2),
            static_cast<float>(1.0 - h.beta2),
            static_cast<float>(lr / bias_correction(h.beta1, step)),
            static_cast<float>(1.0 / sqrt(bias_correction(h.beta2, step))),
            static_cast<float>(h.eps)};
  }

  SINGLEPASS_HD static void update(const Coefficients& c, float& p, float g, float* s) {
    s[0] = c.beta1 * s[0] + c.rest1 * g;
    s[1] = c.beta2 * s[1] + c.rest2 * (g * g);
    float v = s[1];
    if constexpr (kAmsgrad) v = s[2] = maximum(s[2], s[1]);
    const float denominator = sqrtf(v) * c.inverse_root2 + c.eps;
    p = p * c.decay - c.step_size * (s[0] / denominator);
  }
};

}  // namespace singlepass::optim
