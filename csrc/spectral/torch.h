// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <tuple>

#include "optim/torch.h"
#include "spectral/problem.h"
#include "spectral/step.h"

// The ops of sparse spectral training: arguments are checked, and turned into what kernels work on.
namespace singlepass::registration {

inline Tensor new_sums(const Tensor& like, int64_t count) {
  return new_tensor(like, {count}, ScalarType::Float);
}

// Contiguous, float32 and on the device of `like`: small tensors that may have to be copied for it.
inline Tensor as_floats(const char* op, const char* role, const Tensor& t, const Tensor& like) {
  check_device(op, role, t, like);
  dtype_of(op, role, t);
  check_memory(op, role, t);
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
}

struct ScaleCall {
  spectral::Scale problem;
  Tensor s, sums;  // keep what the problem points to
};

inline spectral::Matrix matrix_of(const char* op, const char* role, const Tensor& t, const Tensor& like) {
  check_device(op, role, t, like);
  if (t.dim() != 2 || !same_shape(t, like) || (t.size(1) > 1 && t.stride(1) != 1)) {
    fail(op, role, " of shape ", shape_of(like), " with rows of contiguous elements; got ", shape_of(t),
         ". Make it contiguous.");
  }
  check_memory(op, role, t);
  return {t.data_ptr(), dtype_of(op, role, t), t.stride(0)};
}

// Rows that are written must not lie over each other.
inline void check_rows(const char* op, const Tensor& q) {
  if (q.size(0) > 1 && q.stride(0) < q.size(1)) {
    fail(op, "q in rows that don't overlap; got a stride of ", q.stride(0), ". Clone it.");
  }
}

inline ScaleCall scale_call(const Tensor& q, const Tensor& t, const Tensor& s) {
  const char* op = "spectral_scale_";
  if (q.dim() != 2) fail(op, "q of two dimensions; got ", q.dim(), ". Flatten the tokens.");
  check_rows(op, q);
  const int64_t tokens = q.size(0), values = q.size(1);
  if (s.dim() != 1 || s.size(0) != values) fail(op, "s of shape (", values, ",); got ", shape_of(s), ". Check k.");
  ScaleCall call = {{}, as_floats(op, "s", s, q), new_sums(q, values)};
  call.problem = {matrix_of(op, "q", q, q),
                  matrix_of(op, "t", t, q),
                  static_cast<const float*>(call.s.const_data_ptr()),
                  static_cast<float*>(call.sums.data_ptr()),
                  tokens,
                  values};
  return call;
}

struct SpectralStep {
  Step step;
  spectral::StepOptions options;
};

inline SpectralStep spectral_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avg,
                                  const Tensors& exp_avg_sq, const Tensors& steps, const Tensor& lr, bool project,
                                  bool maximize, std::optional<int64_t> seed, const std::vector<int64_t>& ids,
                                  const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  const std::string op = "spectral_step_";
  if (steps.size() != params.size()) {
    fail(op, "as many steps as parameters, ", params.size(), "; got ", steps.size(), ". Pass one for each.");
  }
  for (const Tensor& p : params) {
    if (p.dim() < 1 || p.dim() > 2 || !p.is_contiguous()) {
      fail(op, "contiguous matrices of vectors, or vectors of values; got ", shape_of(p), ". Make them contiguous.");
    }
  }
  const std::vector<int64_t> none;
  SpectralStep call;
  call.step = make_step({op, params, grads, {&exp_avg, &exp_avg_sq}, nullptr, steps, seed, ids, none});
  if (params.empty()) return call;
  for (size_t i = 0; i < call.step.records.size(); ++i) {
    call.step.records[i].columns = params[i].dim() == 2 ? params[i].size(1) : 0;
  }
  call.options = {options_of({op, params[0], lr, maximize, seed, grad_scale, found_inf}), project};
  return call;
}

struct SampleCall {
  std::vector<spectral::Draw> layers;
  spectral::DrawOptions options;
  Tensors kept, exchanges;
};

inline SampleCall sample_call(const Tensors& s, const std::vector<int64_t>& ranks, const std::vector<int64_t>& ids,
                              int64_t seed, int64_t draw, double uniform) {
  const char* op = "spectral_sample";
  if (ranks.size() != s.size() || ids.size() != s.size()) {
    fail(op, "a rank and an id for each of ", s.size(), " layers; got ", ranks.size(), " and ", ids.size(), ".");
  }
  if (!(uniform >= 0.0 && uniform <= 1.0)) fail(op, "uniform in [0, 1]; got ", uniform, ". It is a share.");
  SampleCall call = {{}, {static_cast<uint64_t>(seed), static_cast<uint64_t>(draw), uniform}, {}, {}};
  for (size_t i = 0; i < s.size(); ++i) {
    check_device(op, "s", s[i], s[0]);
    const int64_t count = s[i].numel();
    if (s[i].dim() != 1 || ranks[i] < 1 || ranks[i] > count) {
      fail(op, "s of one dimension and a rank from 1 to its size; got ", shape_of(s[i]), " and ", ranks[i],
           ". Choose another rank.");
    }
    check_memory(op, "s", s[i]);
    call.kept.push_back(torch::stable::contiguous(s[i]));
    call.exchanges.push_back(new_tensor(s[i], {ranks[i]}, ScalarType::Long));
    call.layers.push_back({call.kept[i].const_data_ptr(), dtype_of(op, "s", s[i]), count, ranks[i], ids[i],
                           static_cast<int64_t*>(call.exchanges[i].data_ptr())});
  }
  return call;
}

inline spectral::Swap swap_pair(const Tensor& active, const Tensor& frozen, const Tensor& scales,
                                const Tensor& exchange) {
  const char* op = "spectral_swap_";
  const bool matrix = active.dim() == 2;
  const int64_t columns = matrix ? active.size(1) : 1;
  if (active.dim() < 1 || active.dim() > 2 || frozen.dim() != active.dim() || (matrix && frozen.size(1) != columns) ||
      !active.is_contiguous() || !frozen.is_contiguous()) {
    fail(op, "contiguous active and frozen rows of equal length; got ", shape_of(active), " and ", shape_of(frozen),
         ". Make them contiguous.");
  }
  if (exchange.scalar_type() != ScalarType::Long || exchange.dim() != 1 || exchange.numel() != active.size(0) ||
      !exchange.is_contiguous()) {
    fail(op, "exchange as ", active.size(0), " of int64; got ", shape_of(exchange), ". Take it from spectral_sample.");
  }
  for (const Tensor* t : {&frozen, &scales, &exchange}) check_device(op, "tensors", *t, active);
  const bool coded = frozen.scalar_type() == ScalarType::Char;
  const int64_t factors = coded ? (columns + spectral::kBlock - 1) / spectral::kBlock : 0;
  if (coded && (scales.scalar_type() != ScalarType::Float || scales.dim() != 2 || !scales.is_contiguous() ||
                scales.size(0) != frozen.size(0) || scales.size(1) != factors)) {
    fail(op, "float32 scales of shape (", frozen.size(0), ", ", factors, "); got ", shape_of(scales),
         ". Make them with the codes.");
  }
  for (const Tensor* t : {&active, &frozen, &scales, &exchange}) check_memory(op, "tensors", *t);
  return {active.data_ptr(),
          frozen.data_ptr(),
          coded ? static_cast<float*>(scales.data_ptr()) : nullptr,
          static_cast<const int64_t*>(exchange.const_data_ptr()),
          dtype_of(op, "active rows", active),
          coded ? DType::kFloat32 : dtype_of(op, "frozen rows", frozen),
          active.size(0),
          frozen.size(0),
          columns};
}

inline std::vector<spectral::Swap> swap_pairs(const Tensors& active, const Tensors& frozen, const Tensors& scales,
                                              const Tensors& exchange) {
  const size_t count = active.size();
  if (frozen.size() != count || scales.size() != count || exchange.size() != count) {
    fail("spectral_swap_", "lists of ", count, "; got ", frozen.size(), ", ", scales.size(), " and ", exchange.size(),
         ". Pass one of each for each pair.");
  }
  std::vector<spectral::Swap> pairs;
  for (size_t i = 0; i < count; ++i) {
    const spectral::Swap pair = swap_pair(active[i], frozen[i], scales[i], exchange[i]);
    // Where nothing is frozen, nothing is ever exchanged.
    if (frozen[i].size(0) > 0) pairs.push_back(pair);
  }
  return pairs;
}

struct LorentzCall {
  spectral::Lorentz problem;
  Tensor z, grad, log_scale, out, grad_scale;
};

inline LorentzCall lorentz_call(const char* op, const Tensor* grad, const Tensor& z, const Tensor& log_scale, double k,
                                double offset) {
  const int64_t columns = z.dim() == 0 ? 0 : z.size(z.dim() - 1);
  if (columns < 2) fail(op, "rows of at least two elements; got ", shape_of(z), ". The first is the time.");
  if (log_scale.numel() != 1) fail(op, "log_scale as one element; got ", shape_of(log_scale), ". Reshape it.");
  check_memory(op, "z", z);
  if (grad != nullptr) check_memory(op, "grad", *grad);
  const int64_t rows = z.numel() / columns;
  const Tensor dense = torch::stable::contiguous(z);
  LorentzCall call = {{}, dense, dense, as_floats(op, "log_scale", log_scale, z), new_like(dense), new_sums(z, 1)};
  if (grad != nullptr) {
    check_device(op, "grad", *grad, z);
    if (!same_shape(*grad, z) || dtype_of(op, "grad", *grad) != dtype_of(op, "z", z)) {
      fail(op, "grad of z's shape ", shape_of(z), " and dtype; got ", shape_of(*grad), ". Convert it.");
    }
    call.grad = torch::stable::contiguous(*grad);
  }
  call.problem = {call.z.const_data_ptr(),
                  grad == nullptr ? nullptr : call.grad.const_data_ptr(),
                  call.out.data_ptr(),
                  static_cast<float*>(call.grad_scale.data_ptr()),
                  static_cast<const float*>(call.log_scale.const_data_ptr()),
                  dtype_of(op, "z", z),
                  static_cast<float>(std::sqrt(k)),
                  static_cast<float>(offset),
                  rows,
                  columns};
  return call;
}

// The gradient of log_scale as log_scale is stored.
inline Tensor grad_scale_of(const LorentzCall& call, const Tensor& log_scale) {
  return torch::stable::view(torch::stable::to(call.grad_scale, log_scale.scalar_type()), log_scale.sizes());
}

template <class Backend>
Tensor spectral_scale_(Tensor q, Tensor t, Tensor s) {
  const Backend on("spectral_scale_", q);
  const ScaleCall call = scale_call(q, t, s);
  spectral::scale(call.problem, on.where());
  return call.sums;
}

template <class Backend>
void spectral_step_(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors steps, Tensor lr,
                    double beta1, double beta2, double eps, double weight_decay, bool project, bool maximize,
                    std::optional<int64_t> seed, std::vector<int64_t> ids, std::optional<Tensor> grad_scale,
                    std::optional<Tensor> found_inf) {
  const SpectralStep call =
      spectral_step(params, grads, exp_avg, exp_avg_sq, steps, lr, project, maximize, seed, ids, grad_scale, found_inf);
  if (call.step.records.empty()) return;
  const Backend on("spectral_step_", params[0]);
  const auto& table = on.table(call.step.records, spectral::Rule::kStates, spectral::kStepShape);
  spectral::step(table, {beta1, beta2, eps, weight_decay}, call.options, on.where());
}

template <class Backend>
Tensors spectral_sample(Tensors s, std::vector<int64_t> ranks, std::vector<int64_t> ids, int64_t seed, int64_t draw,
                        double uniform) {
  const SampleCall call = sample_call(s, ranks, ids, seed, draw, uniform);
  if (s.empty()) return {};
  const Backend on("spectral_sample", s[0]);
  spectral::sample(call.layers, call.options, on.where());
  return call.exchanges;
}

template <class Backend>
void spectral_swap_(Tensors active, Tensors frozen, Tensors scales, Tensors exchange) {
  const std::vector<spectral::Swap> pairs = swap_pairs(active, frozen, scales, exchange);
  if (active.empty()) return;
  const Backend on("spectral_swap_", active[0]);
  spectral::swap(pairs, on.where());
}

template <class Backend>
Tensor lorentz(Tensor z, Tensor log_scale, double k, double offset) {
  const Backend on("lorentz", z);
  const LorentzCall call = lorentz_call("lorentz", nullptr, z, log_scale, k, offset);
  spectral::lorentz(call.problem, on.where());
  return call.out;
}

template <class Backend>
std::tuple<Tensor, Tensor> lorentz_backward(Tensor grad, Tensor z, Tensor log_scale, double k, double offset) {
  const Backend on("lorentz_backward", z);
  const LorentzCall call = lorentz_call("lorentz_backward", &grad, z, log_scale, k, offset);
  spectral::lorentz_backward(call.problem, on.where());
  return {call.out, grad_scale_of(call, log_scale)};
}

template <class Backend, class Library>
void register_spectral(Library& m) {
  m.impl("spectral_scale_", TORCH_BOX(&spectral_scale_<Backend>));
  m.impl("spectral_step_", TORCH_BOX(&spectral_step_<Backend>));
  m.impl("spectral_sample", TORCH_BOX(&spectral_sample<Backend>));
  m.impl("spectral_swap_", TORCH_BOX(&spectral_swap_<Backend>));
  m.impl("lorentz", TORCH_BOX(&lorentz<Backend>));
  m.impl("lorentz_backward", TORCH_BOX(&lorentz_backward<Backend>));
}

}  // namespace singlepass::registration
