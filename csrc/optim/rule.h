// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tuple>

#include "common/math.h"

// What a rule is. A rule is a struct in a header of its own with
//
//   kName, kStates       the op's name, without _step_, and the number of state tensors beside each parameter
//   kScaled              whether each parameter has a scalar of its own (SGD-SaI's gain), passed to coefficients()
//   Hyper, HyperTypes    the hyperparameters in the order of the op's schema, and their types
//   Coefficients         what the elements need, made once per tensor and step in double precision:
//   coefficients(hyper, lr, step, scale)      `step` counts from 1
//   kUpdate              which of parameter, gradient and states the update reads and writes
//   update(c, p, g, s)   the update of one element, on registers
//
// and, where the update needs norms of the whole tensor first (LAMB, LARS), a pass before it:
//
//   kNorm, norm_terms(c, p, g, s, terms)      one element of the two vectors whose norms are wanted
//   kNormsOfInputs                            whether these are the parameter and the gradient themselves
//   apply_norms(hyper, c, squares)            brings the two squared norms into the coefficients
namespace singlepass::optim {

inline constexpr int kMaxStates = 4;
inline constexpr int kNorms = 2;

// A rate that norms made. Norms near zero make some that float32 does not hold, which count as its largest number.
SINGLEPASS_HD float rate_of(double rate) {
  constexpr double kLargest = 0x1.fffffep127;
  return static_cast<float>(rate > kLargest ? kLargest : rate);
}

// Bits that name the tensors of one parameter in Access masks; states follow: kState << 0, kState << 1, ...
enum : uint32_t { kParam = 1, kGrad = 2, kState = 4 };

constexpr uint32_t states(int count) {
  return ((1u << count) - 1u) * kState;
}

struct Access {
  uint32_t reads;
  uint32_t writes;
};

// The two passes over a tensor. Rules without norms have kUpdatePass alone.
enum Pass { kNormPass, kUpdatePass };

template <class Rule>
inline constexpr bool kHasNorms = requires { Rule::kNorm; };

template <class Rule>
constexpr bool norms_of_inputs() {
  if constexpr (kHasNorms<Rule>) {
    return Rule::kNormsOfInputs;
  } else {
    return false;
  }
}

template <class Rule, Pass pass>
constexpr Access access() {
  if constexpr (pass == kNormPass) {
    return Rule::kNorm;
  } else {
    return Rule::kUpdate;
  }
}

SINGLEPASS_HD double bias_correction(double beta, double step) {
  return 1.0 - pow(beta, step);
}

}  // namespace singlepass::optim
