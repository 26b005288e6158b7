// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/rule.h"

namespace singlepass::optim {

// AdaBelief, arXiv 2010.07468, Algorithm 2, as adabelief-pytorch 0.2.1 computes it: the residual is taken from the
// updated mean, and eps is added to the stored variance at every step. `rectify` is RAdam's variance rectification
// (arXiv 1908.03265) with the threshold 5; there the maximum of AMSGrad is kept but not used.
template <bool kAmsgrad>
struct AdaBelief {
  using Plain = AdaBelief<false>;  // what runs where no maximum is given
  static constexpr const char* kName = "adabelief";
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr bool kScaled = false;
  static constexpr Access kUpdate = {kParam | kGrad | states(kStates), kParam | states(kStates)};

  struct Hyper {
    double beta1, beta2, eps, weight_decay;
    bool decoupled_weight_decay, fixed_decay, rectify, degenerated_to_sgd;
  };
  using HyperTypes = std::tuple<double, double, double, double, bool, bool, bool, bool>;

  struct Coefficients {
    float decay, coupled_decay, beta1, rest1, beta2, rest2, step_size, inverse_root2, eps;
    bool adaptive, use_maximum;
  };

  SINGLEPASS_HD static Coefficients coefficients(const Hyper& h, double lr, double step, double) {
    const double decay = h.fixed_decay ? h.weight_decay : lr * h.weight_decay;
    const double correction1 = bias_correction(h.beta1, step);
    const double correction2 = bias_correction(h.beta2, step);
    double step_size = lr / correction1;
    double inverse_root2 = 1.0 / sqrt(correction2);
    bool adaptive = true;
    if (h.rectify) {
      const double n_max = 2.0 / (1.0 - h.beta2) - 1.0;
      const double n = n_max - 2.0 * step * (1.0 - correction2) / correction2;
      adaptive = n >= 5.0;
      inverse_root2 = 1.0;  // the correction is part of the rectification
      if (adaptive) {
        step_size *= sqrt(correction2 * (n - 4.0) / (n_max - 4.0) * (n - 2.0) / n * n_max / (n_max - 2.0));
      } else if (!h.degenerated_to_sgd) {
        step_size = 0.0;
      }
    }
    return {static_cast<float>(h.decoupled_weight_decay ? 1.0 - decay : 1.0),
            static_cast<float>(h.decoupled_weight_decay ? 0.0 : h.weight_decay),
            static_cast<float>(h.beta1),
            static_cast<float>(1.0 - h.beta1),
            static_cast<float>(h.beta2),
            static_cast<float>(1.0 - h.beta2),
            static_cast<float>(step_size),
            static_cast<float>(inverse_root2),
            static_cast<float>(h.eps),
            adaptive,
            !h.rectify};
  }

  SINGLEPASS_HD static void update(const Coefficients& c, float& p, float g, float* s) {
    g = g + c.coupled_decay * p;
    s[0] = c.beta1 * s[0] + c.rest1 * g;
    const float residual = g - s[0];
    s[1] = (c.beta2 * s[1] + c.rest2 * (residual * residual)) + c.eps;
    float variance = s[1];
    if constexpr (kAmsgrad) {
      s[2] = maximum(s[2], s[1]);
      variance = c.use_maximum ? s[2] : s[1];
    }
    const float denominator = sqrtf(variance) * c.inverse_root2 + c.eps;
    p = p * c.decay - c.step_size * (s[0] / (c.adaptive ? denominator : 1.0f));
  }
};

}  // namespace singlepass::optim
