// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "singlepass/optim/adabelief.h"
#include "singlepass/optim/adamw.h"
#include "singlepass/optim/adan.h"
#include "singlepass/optim/diffgrad.h"
#include "singlepass/optim/lamb.h"
#include "singlepass/optim/lars.h"
#include "singlepass/optim/lion.h"
#include "singlepass/optim/sgdsai.h"

// Calls `apply(Rule)` for every rule: the one list from which engines are instantiated and ops registered.
#define SINGLEPASS_FOR_EACH_RULE(apply)                                                                             \
  apply(::singlepass::optim::AdamW<false>) apply(::singlepass::optim::AdamW<true>) apply(::singlepass::optim::Lion) \
      apply(::singlepass::optim::AdaBelief<false>) apply(::singlepass::optim::AdaBelief<true>)                      \
          apply(::singlepass::optim::Adan) apply(::singlepass::optim::DiffGrad) apply(::singlepass::optim::Lamb)    \
              apply(::singlepass::optim::Lars) apply(::singlepass::optim::SgdSaI)
