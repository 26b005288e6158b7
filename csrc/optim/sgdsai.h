// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/rule.h"

namespace singlepass::optim {

// SGD-SaI, arXiv 2412.11768, as the authors' sgd_sai.py computes it: `scale` is the tensor's gradient signal-to-noise
// ratio, measured once at its first step; the momentum starts as the first gradient itself.
struct SgdSaI {
  static constexpr const char* kName = "sgdsai";
  static constexpr int kStates = 1;
  static constexpr bool kScaled = true;
  static constexpr Access kUpdate = {kParam | kGrad | states(1), kParam | states(1)};

  struct Hyper {
    double momentum, weight_decay;
  };
  using HyperTypes = std::tuple<double, double>;

  struct Coefficients {
    float decay, momentum, rest, step_size;
  };

  SINGLEPASS_HD static Coefficients coefficients(const Hyper& h, double lr, double step, double scale) {
    const double momentum = step == 1.0 ? 0.0 : h.momentum;
    return {static_cast<float>(1.0 - lr * h.weight_decay), static_cast<float>(momentum),
            static_cast<float>(1.0 - momentum), static_cast<float>(lr * scale)};
  }

  SINGLEPASS_HD static void update(const Coefficients& c, float& p, float g, float* s) {
    s[0] = c.momentum * s[0] + c.rest * g;
    p = p * c.decay - c.step_size * s[0];
  }
};

}  // namespace singlepass::optim
