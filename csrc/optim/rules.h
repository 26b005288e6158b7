// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "optim/adabelief.h"
#include "optim/adamw.h"
#include "optim/adan.h"
#include "optim/diffgrad.h"
#include "optim/lamb.h"
#include "optim/lars.h"
#include "optim/lion.h"
#include "optim/sgdsai.h"

// Calls `apply(Rule)` for every rule: the one list from which engines are instantiated and ops registered.
#define SINGLEPASS_FOR_EACH_RULE(apply)                                                                             \
  apply(::singlepass::optim::AdamW<false>) apply(::singlepass::optim::AdamW<true>) apply(::singlepass::optim::Lion) \
      apply(::singlepass::optim::AdaBelief<false>) apply(::singlepass::optim::AdaBelief<true>)                      \
          apply(::singlepass::optim::Adan) apply(::singlepass::optim::DiffGrad) apply(::singlepass::optim::Lamb)    \
              apply(::singlepass::optim::Lars) apply(::singlepass::optim::SgdSaI)
