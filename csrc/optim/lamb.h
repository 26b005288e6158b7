// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/rule.h"

namespace singlepass::optim {

// LAMB, arXiv 1904.00962, Algorithm 2 with phi the identity; apex's FusedLAMB leaves tensors without weight decay
// unadapted, which is always_adapt = false. The norm pass updates the moments, the update pass makes the direction
// again from them, so that no scratch and no gradient is written.
struct Lamb {
  static constexpr const char* kName = "lamb";
  static constexpr int kStates = 2;
  static constexpr bool kScaled = false;
  static constexpr Access kNorm = {kParam | kGrad | states(2), states(2)};
  static constexpr bool kNormsOfInputs = false;
  static constexpr Access kUpdate = {kParam | states(2), kParam};

  struct Hyper {
    double beta1, beta2, eps, weight_decay;
    bool always_adapt;
  };
  using HyperTypes = std::tuple<double, double, double, double, bool>;

  struct Coefficients {
    float lr, decay, beta1, rest1, beta2, rest2, inverse1, inverse2, eps;
  };

  SINGLEPASS_HD static Coefficients coefficients(const Hyper& h, double lr, double step, double) {
    return {static_cast<float>(lr),
            static_cast<float>(h.weight_decay),
            static_cast<float>(h.beta1),
            static_cast<float>(1.0 - h.beta1),
            static_cast<float>(h.beta2),
            static_cast<float>(1.0 - h.beta2),
            static_cast<float>(1.0 / bias_correction(h.beta1, step)),
            static_cast<float>(1.0 / bias_correction(h.beta2, step)),
            static_cast<float>(h.eps)};
  }

  SINGLEPASS_HD static float direction(const Coefficients& c, float p, const float* s) {
    return (s[0] * c.inverse1) / (sqrtf(s[1] * c.inverse2) + c.eps) + c.decay * p;
  }

  SINGLEPASS_HD static void norm_terms(const Coefficients& c, float p, float g, float* s, float* terms) {
    s[0] = c.beta1 * s[0] + c.rest1 * g;
    s[1] = c.beta2 * s[1] + c.rest2 * (g * g);
    terms[0] = p;
    terms[1] = direction(c, p, s);
  }

  SINGLEPASS_HD static void apply_norms(const Hyper& h, Coefficients& c, const double* squares) {
    const bool adapt = h.always_adapt || h.weight_decay != 0.0;
    if (adapt && squares[0] > 0.0 && squares[1] > 0.0) c.lr = rate_of(c.lr * sqrt(squares[0] / squares[1]));
  }

  SINGLEPASS_HD static void update(const Coefficients& c, float& p, float, float* s) {
    p = p - c.lr * direction(c, p, s);
  }
};

}  // namespace singlepass::optim
