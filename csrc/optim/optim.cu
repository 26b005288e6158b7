// SPDX-License-Identifier: Apache-2.0
#include "optim/cuda_engine.h"
#include "optim/rules.h"

namespace singlepass::optim {

#define SINGLEPASS_INSTANTIATE(...)                                                                           \
  template void step<__VA_ARGS__>(const DeviceTable&, const typename __VA_ARGS__::Hyper&, const StepOptions&, \
                                  const Gpu&, const Phase&);
SINGLEPASS_FOR_EACH_RULE(SINGLEPASS_INSTANTIATE)

}  // namespace singlepass::optim
