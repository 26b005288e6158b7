// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/adamw.h"
#include "optim/table.h"

namespace singlepass::spectral {

// The update is AdamW's own. Then records with rows have them made unit vectors, in others what is below zero is zero.
using Rule = optim::AdamW<false>;

struct StepOptions {
  optim::StepOptions shared;
  bool project;  // takes from each row's gradient its part along the row first
};

// What makes a row of this sum of squares a unit vector; a row of zeros stays, one with a NaN becomes NaN.
SINGLEPASS_HD float inverse_norm(double squares) {
  return squares == 0.0 ? 1.0f : static_cast<float>(1.0 / sqrt(squares));
}

// NaN stays NaN.
SINGLEPASS_HD float not_negative(float value) {
  return value < 0.0f ? 0.0f : value;
}

}  // namespace singlepass::spectral
