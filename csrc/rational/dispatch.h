// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "rational/problem.h"

namespace singlepass::rational {

// The degrees that kernels are compiled for: KAT's own, and the largest, in which all others are padded with zeros.
inline constexpr int kTunedNumerator = 5;
inline constexpr int kTunedDenominator = 4;

inline bool has_tuned_degrees(const Problem& p) {
  const int degree = p.denominator.columns - (p.form == Form::kC ? 1 : 0);
  return p.numerator.columns == kTunedNumerator + 1 && degree == kTunedDenominator;
}

// Body<form, M, N>::run(args...) for the form of the problem.
template <template <Form, int, int> class Body, int M, int N, class... Args>
auto dispatch_form(Form form, Args&&... args) {
  switch (form) {
    case Form::kA:
      return Body<Form::kA, M, N>::run(args...);
    case Form::kB:
      return Body<Form::kB, M, N>::run(args...);
    case Form::kC:
      return Body<Form::kC, M, N>::run(args...);
    default:
      return Body<Form::kD, M, N>::run(args...);
  }
}

}  // namespace singlepass::rational
