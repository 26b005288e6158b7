// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/rule.h"

namespace singlepass::optim {

// diffGrad, arXiv 1909.11015, as the authors' second version computes it: coupled weight decay, eps scaled by the bias
// correction, and a friction 1 / (1 + exp(-|g' - g|)) that starts from g' = 0.
struct DiffGrad {
  static constexpr const char* kName = "diffgrad";
  static constexpr int kStates = 3;
  static constexpr bool kScaled = false;
  static constexpr Access kUpdate = {kParam | kGrad | states(3), kParam | states(3)};

  struct Hyper {
    double beta1, beta2, eps, weight_decay;
  };
  using HyperTypes = std::tuple<double, double, double, double>;

  struct Coefficients {
    float coupled_decay, beta1, rest1, beta2, rest2, step_size, eps;
  };

  SINGLEPASS_HD static Coefficients coefficients(const Hyper& h, double lr, double step, double) {
    const double root_correction2 = sqrt(bias_correction(h.beta2, step));
    return {
        static_cast<float>(h.weight_decay), static_cast<float>(h.beta1),
        static_cast<float>(1.0 - h.beta1),  static_cast<float>(h.beta2),
        static_cast<float>(1.0 - h.beta2),  static_cast<float>(lr * root_correction2 / bias_correction(h.beta1, step)),
        static_cast<float>(h.eps)};
  }

  SINGLEPASS_HD static void update(const Coefficients& c, float& p, float g, float* s) {
    g = g + c.coupled_decay * p;
    s[0] = c.beta1 * s[0] + c.rest1 * g;
    s[1] = c.beta2 * s[1] + c.rest2 * (g * g);
    // m times the friction over the root, with one division for both.
    const float denominator = one_plus_exp_negative(fabsf(s[2] - g)) * (sqrtf(s[1]) + c.eps);
    s[2] = g;
    p = p - c.step_size * (s[0] / denominator);
  }
};

}  // namespace singlepass::optim
