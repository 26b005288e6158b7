// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/rule.h"

namespace singlepass::optim {

// LARS, arXiv 1708.03888, Algorithm 1: the local rate trust * ||p|| / (||g|| + decay ||p|| + eps), 1 where a norm is
// zero, and the learning rate inside the momentum.
struct Lars {
  static constexpr const char* kName = "lars";
  static constexpr int kStates = 1;
  static constexpr bool kScaled = false;
  static constexpr Access kNorm = {kParam | kGrad, 0};
  static constexpr bool kNormsOfInputs = true;
  static constexpr Access kUpdate = {kParam | kGrad | states(1), kParam | states(1)};

  struct Hyper {
    double momentum, weight_decay, trust_coefficient, eps;
  };
  using HyperTypes = std::tuple<double, double, double, double>;

  struct Coefficients {
    float lr, decay, momentum;
  };

  SINGLEPASS_HD static Coefficients coefficients(const Hyper& h, double lr, double, double) {
    return {static_cast<float>(lr), static_cast<float>(h.weight_decay), static_cast<float>(h.momentum)};
  }

  SINGLEPASS_HD static void norm_terms(const Coefficients&, float p, float g, float*, float* terms) {
    terms[0] = p;
    terms[1] = g;
  }

  SINGLEPASS_HD static void apply_norms(const Hyper& h, Coefficients& c, const double* squares) {
    if (squares[0] > 0.0 && squares[1] > 0.0) {
      const double norm = sqrt(squares[0]);
      const double rate = h.trust_coefficient * norm / (sqrt(squares[1]) + h.weight_decay * norm + h.eps);
      c.lr = rate_of(c.lr * rate);
    }
  }

  SINGLEPASS_HD static void update(const Coefficients& c, float& p, float g, float* s) {
    s[0] = c.momentum * s[0] + c.lr * (g + c.decay * p);
    p = p - s[0];
  }
};

}  // namespace singlepass::optim
