// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/rule.h"

namespace singlepass::optim {

// Adan, arXiv 2208.06677, as the authors' adan.py computes it: bias corrections, eps outside the root, and betas that
// are one minus the paper's. States: the means of g, of the differences g - g', and of (g + beta2 (g - g'))^2, and the
// negated previous gradient g', which the same pass stores.
struct Adan {
  static constexpr const char* kName = "adan";
  static constexpr int kStates = 4;
  static constexpr bool kScaled = false;
  static constexpr Access kUpdate = {kParam | kGrad | states(4), kParam | states(4)};

  struct Hyper {
    double beta1, beta2, beta3, eps, weight_decay;
    bool no_prox;
  };
  using HyperTypes = std::tuple<double, double, double, double, double, bool>;

  struct Coefficients {
    float decay, shrink, beta1, rest1, beta2, rest2, beta3, rest3, step_size, difference_step_size, inverse_root3, eps;
    bool first;
  };

  SINGLEPASS_HD static Coefficients coefficients(const Hyper& h, double lr, double step, double) {
    return {static_cast<float>(h.no_prox ? 1.0 - lr * h.weight_decay : 1.0),
            static_cast<float>(h.no_prox ? 1.0 : 1.0 / (1.0 + lr * h.weight_decay)),
            static_cast<float>(h.beta1),
            static_cast<float>(1.0 - h.beta1),
            static_cast<float>(h.beta2),
            static_cast<float>(1.0 - h.beta2),
            static_cast<float>(h.beta3),
            static_cast<float>(1.0 - h.beta3),
            static_cast<float>(lr / bias_correction(h.beta1, step)),
            static_cast<float>(lr * h.beta2 / bias_correction(h.beta2, step)),
            static_cast<float>(1.0 / sqrt(bias_correction(h.beta3, step))),
            static_cast<float>(h.eps),
            step == 1.0};
  }

  SINGLEPASS_HD static void update(const Coefficients& c, float& p, float g, float* s) {
    const float difference = c.first ? 0.0f : g + s[3];
    const float lookahead = g + c.beta2 * difference;
    s[0] = c.beta1 * s[0] + c.rest1 * g;
    s[1] = c.beta2 * s[1] + c.rest2 * difference;
    s[2] = c.beta3 * s[2] + c.rest3 * (lookahead * lookahead);
    s[3] = -g;
    const float denominator = sqrtf(s[2]) * c.inverse_root3 + c.eps;
    const float step = (c.step_size * s[0] + c.difference_step_size * s[1]) / denominator;
    p = (p * c.decay - step) * c.shrink;
  }
};

}  // namespace singlepass::optim
