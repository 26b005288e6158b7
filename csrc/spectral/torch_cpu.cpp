// SPDX-License-Identifier: Apache-2.0
#include "spectral/cpu.h"
#include "spectral/torch.h"
#include "torch/parallel.h"

namespace singlepass::registration {
namespace {

Tensor scale(Tensor q, Tensor t, Tensor s) {
  ScaleCall call = scale_call(q, t, s);
  make_partials(call, spectral::block_count(call.problem.tokens) * call.problem.values);
  spectral::scale_cpu(call.problem, parallel_for);
  return call.sums;
}

void step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors steps, Tensor lr, double beta1,
          double beta2, double eps, double weight_decay, bool project, bool maximize, std::optional<Tensor> grad_scale,
          std::optional<Tensor> found_inf) {
  const SpectralStep call =
      spectral_step(params, grads, exp_avg, exp_avg_sq, steps, lr, project, maximize, grad_scale, found_inf);
  if (call.step.records.empty()) return;
  spectral::step_cpu(call.step.records, {beta1, beta2, eps, weight_decay}, call.options, parallel_for);
}

Tensors sample(Tensors s, std::vector<int64_t> ranks, std::vector<int64_t> ids, int64_t seed, int64_t draw,
               double uniform) {
  const SampleCall call = sample_call(s, ranks, ids, seed, draw, uniform);
  spectral::sample_cpu(call.layers, call.options, parallel_for);
  return call.exchanges;
}

void swap(Tensors active, Tensors frozen, Tensors scales, Tensors exchange) {
  spectral::swap_cpu(swap_pairs(active, frozen, scales, exchange), parallel_for);
}

Tensor lorentz(Tensor z, Tensor log_scale, double k, double offset) {
  const LorentzCall call = lorentz_call("lorentz", nullptr, z, log_scale, k, offset);
  spectral::lorentz_cpu(call.problem, parallel_for);
  return call.out;
}

std::tuple<Tensor, Tensor> lorentz_backward(Tensor grad, Tensor z, Tensor log_scale, double k, double offset) {
  const LorentzCall call = lorentz_call("lorentz_backward", &grad, z, log_scale, k, offset);
  spectral::lorentz_backward_cpu(call.problem, parallel_for);
  return {call.out, grad_scale_of(call, log_scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CPU, m) {
  m.impl("spectral_scale_", TORCH_BOX(&scale));
  m.impl("spectral_step_", TORCH_BOX(&step));
  m.impl("spectral_sample", TORCH_BOX(&sample));
  m.impl("spectral_swap_", TORCH_BOX(&swap));
  m.impl("lorentz", TORCH_BOX(&lorentz));
  m.impl("lorentz_backward", TORCH_BOX(&lorentz_backward));
}

}  // namespace singlepass::registration
