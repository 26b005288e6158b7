// SPDX-License-Identifier: Apache-2.0
#include "optim/torch_table_cache.h"
#include "spectral/cuda.h"
#include "spectral/torch.h"
#include "torch/device.h"

namespace singlepass::registration {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor scale(Tensor q, Tensor t, Tensor s) {
  const DeviceGuard guard(q.get_device_index());
  ScaleCall call = scale_call(q, t, s);
  make_partials(call, spectral::scale_partials(call.problem));
  check_launch("spectral_scale_", spectral::launch_scale(call.problem, current_stream(q.get_device_index())));
  return call.sums;
}

void step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors steps, Tensor lr, double beta1,
          double beta2, double eps, double weight_decay, bool project, bool maximize, std::optional<Tensor> grad_scale,
          std::optional<Tensor> found_inf) {
  if (params.empty()) return;
  const int32_t device = params[0].get_device_index();
  const DeviceGuard guard(device);
  const SpectralStep call =
      spectral_step(params, grads, exp_avg, exp_avg_sq, steps, lr, project, maximize, grad_scale, found_inf);
  TableCache& cache = table_cache();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  const optim::DeviceTable table =
      cache.get(call.step.records, spectral::Rule::kStates, params[0], spectral::kStepShape);
  const spectral::Rule::Hyper hyper = {beta1, beta2, eps, weight_decay};
  check_launch("spectral_step_", spectral::launch_step(table, hyper, call.options, current_stream(device)));
}

Tensors sample(Tensors s, std::vector<int64_t> ranks, std::vector<int64_t> ids, int64_t seed, int64_t draw,
               double uniform) {
  if (s.empty()) return {};
  const int32_t device = s[0].get_device_index();
  const DeviceGuard guard(device);
  const SampleCall call = sample_call(s, ranks, ids, seed, draw, uniform);
  const Tensor workspace = allocate(s[0], spectral::sample_workspace(call.layers));
  check_launch("spectral_sample",
               spectral::launch_sample(call.layers, call.options, workspace.data_ptr(), current_stream(device)));
  return call.exchanges;
}

void swap(Tensors active, Tensors frozen, Tensors scales, Tensors exchange) {
  if (active.empty()) return;
  const int32_t device = active[0].get_device_index();
  const DeviceGuard guard(device);
  check_launch("spectral_swap_",
               spectral::launch_swap(swap_pairs(active, frozen, scales, exchange), current_stream(device)));
}

Tensor lorentz(Tensor z, Tensor log_scale, double k, double offset) {
  const DeviceGuard guard(z.get_device_index());
  const LorentzCall call = lorentz_call("lorentz", nullptr, z, log_scale, k, offset);
  check_launch("lorentz", spectral::launch_lorentz(call.problem, current_stream(z.get_device_index())));
  return call.out;
}

std::tuple<Tensor, Tensor> lorentz_backward(Tensor grad, Tensor z, Tensor log_scale, double k, double offset) {
  const DeviceGuard guard(z.get_device_index());
  const LorentzCall call = lorentz_call("lorentz_backward", &grad, z, log_scale, k, offset);
  check_launch("lorentz_backward",
               spectral::launch_lorentz_backward(call.problem, current_stream(z.get_device_index())));
  return {call.out, grad_scale_of(call, log_scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CUDA, m) {
  m.impl("spectral_scale_", TORCH_BOX(&scale));
  m.impl("spectral_step_", TORCH_BOX(&step));
  m.impl("spectral_sample", TORCH_BOX(&sample));
  m.impl("spectral_swap_", TORCH_BOX(&swap));
  m.impl("lorentz", TORCH_BOX(&lorentz));
  m.impl("lorentz_backward", TORCH_BOX(&lorentz_backward));
}

}  // namespace singlepass::registration
