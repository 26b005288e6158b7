// SPDX-License-Identifier: Apache-2.0
#include "rational/cuda.h"
#include "rational/torch.h"
#include "torch/device.h"

namespace singlepass::registration {
namespace {

Tensor rational_forward(Tensor x, Tensor numerator, Tensor denominator, std::optional<Tensor> bias,
                        std::optional<Tensor> gate, int64_t form, int64_t channel_dim, double dropout,
                        std::optional<Tensor> seed) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const RationalCall call =
      rational_call({"rational", x, numerator, denominator, bias, gate, form, channel_dim, dropout, seed});
  check_launch("rational", rational::launch_forward(call.problem, current_stream(x.get_device_index())));
  return call.y;
}

RationalGradients rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator,
                                    std::optional<Tensor> bias, std::optional<Tensor> gate, int64_t form,
                                    int64_t channel_dim, double dropout, std::optional<Tensor> seed) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const RationalArguments arguments = {"rational_backward", x,       numerator, denominator, bias, gate, form,
                                       channel_dim,         dropout, seed};
  RationalCall call = rational_call(arguments);
  const RationalGradients result = rational_gradients(arguments, grad, call);
  const Tensor workspace = allocate(x, rational::backward_workspace(call.problem));
  check_launch("rational_backward",
               rational::launch_backward(call.problem, workspace.data_ptr(), current_stream(x.get_device_index())));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CUDA, m) {
  m.impl("rational", TORCH_BOX(&rational_forward));
  m.impl("rational_backward", TORCH_BOX(&rational_backward));
}

}  // namespace singlepass::registration
