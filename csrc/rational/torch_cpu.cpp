// SPDX-License-Identifier: Apache-2.0
#include "rational/cpu.h"
#include "rational/torch.h"
#include "torch/parallel.h"

namespace singlepass::registration {
namespace {

Tensor rational_forward(Tensor x, Tensor numerator, Tensor denominator, std::optional<Tensor> bias,
                        std::optional<Tensor> gate, int64_t form, int64_t channel_dim, double dropout,
                        std::optional<Tensor> seed) {
  const RationalCall call =
      rational_call({"rational", x, numerator, denominator, bias, gate, form, channel_dim, dropout, seed});
  rational::forward_cpu(call.problem, parallel_for);
  return call.y;
}

RationalGradients rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator,
                                    std::optional<Tensor> bias, std::optional<Tensor> gate, int64_t form,
                                    int64_t channel_dim, double dropout, std::optional<Tensor> seed) {
  const RationalArguments arguments = {"rational_backward", x,       numerator, denominator, bias, gate, form,
                                       channel_dim,         dropout, seed};
  RationalCall call = rational_call(arguments);
  const RationalGradients result = rational_gradients(arguments, grad, call);
  rational::backward_cpu(call.problem, parallel_for);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CPU, m) {
  m.impl("rational", TORCH_BOX(&rational_forward));
  m.impl("rational_backward", TORCH_BOX(&rational_backward));
}

}  // namespace singlepass::registration
