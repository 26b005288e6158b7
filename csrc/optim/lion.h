// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/rule.h"

namespace singlepass::optim {

// Symbolic discovery of optimization algorithms, arXiv 2302.06675, Algorithm 2. sign(0) = 0: rows that never see a
// gradient stay where they are.
struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr int kStates = 1;
  static constexpr bool kScaled = false;
  static constexpr Access kUpdate = {kParam | kGrad | states(1), kParam | states(1)};

  struct Hyper {
    double beta1, beta2, weight_decay;
  };
  using HyperTypes = std::tuple<double, double, double>;

  struct Coefficients {
    float lr, decay, beta1, rest1, beta2, rest2;
  };

  SINGLEPASS_HD static Coefficients coefficients(const Hyper& h, double lr, double, double) {
    return {static_cast<float>(lr),      static_cast<float>(1.0 - lr * h.weight_decay),
            static_cast<float>(h.beta1), static_cast<float>(1.0 - h.beta1),
            static_cast<float>(h.beta2), static_cast<float>(1.0 - h.beta2)};
  }

  SINGLEPASS_HD static void update(const Coefficients& c, float& p, float g, float* s) {
    p = p * c.decay - c.lr * sign(c.beta1 * s[0] + c.rest1 * g);
    s[0] = c.beta2 * s[0] + c.rest2 * g;
  }
};

}  // namespace singlepass::optim
