// SPDX-License-Identifier: Apache-2.0
#include "spectral/step.h"

#include <algorithm>
#include <vector>

#include "optim/cpu_engine.h"

namespace singlepass::spectral {
namespace {

using optim::TensorRecord;

SINGLEPASS_TARGET_CLONES void multiply(float* values, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] *= factor;
}

SINGLEPASS_TARGET_CLONES void clamp(float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = not_negative(values[i]);
}

SINGLEPASS_TARGET_CLONES void subtract(float* from, float factor, const float* values, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) from[i] -= factor * values[i];
}

// Elements that one constraint ties together: a row, or a stretch of singular values.
struct Span {
  int32_t tensor;
  int64_t begin, count;
};

// One span after another, in float where it is stored so, else in buffers.
class Spans {
 public:
  Spans(const std::vector<TensorRecord>& tensors, const Rule::Hyper& hyper, const StepOptions& options)
      : tensors_(tensors), hyper_(hyper), options_(options) {}

  void update(const Span& span) {
    const TensorRecord& t = tensors_[span.tensor];
    if (current_ != span.tensor) {
      current_ = span.tensor;
      const optim::Scalar& lr = options_.shared.lr;
      c_ = optim::coefficients_of<Rule>(t, hyper_, lr.device == nullptr ? lr.value : *lr.device);
    }
    TensorRecord r = part(t, span);
    const bool rows = t.columns > 0;
    if (t.param_dtype != DType::kFloat32) widen_into(params_, r.param, r.param_dtype, span.count);
    float* p = static_cast<float*>(r.param);
    optim::StepOptions options = options_.shared;
    if (rows && options_.project) project(r, p, span.count, options);
    for (int64_t i = 0; i < optim::chunk_count(span.count, optim::kCpuChunk); ++i) {
      optim::run_chunk<Rule, optim::kUpdatePass>(r, c_, options, i, nullptr);
    }
    if (rows) {
      multiply(p, inverse_norm(sum_of_squares(p, span.count)), span.count);
    } else {
      clamp(p, span.count);
    }
    if (t.param_dtype != DType::kFloat32) narrow_param(p, t, span.begin, span.count, options);
  }

 private:
  static TensorRecord part(const TensorRecord& t, const Span& span) {
    TensorRecord r = t;
    r.param = optim::at(t.param, t.param_dtype, span.begin);
    r.grad = optim::at(const_cast<void*>(t.grad), t.grad_dtype, span.begin);
    for (int k = 0; k < Rule::kStates; ++k) r.state[k] = optim::at(t.state[k], t.state_dtype[k], span.begin);
    r.numel = span.count;
    return r;
  }

  template <class Pointer>
  static void widen_into(std::vector<float>& buffer, Pointer& data, DType& dtype, int64_t n) {
    buffer.resize(n);
    widen(data, dtype, buffer.data(), n);
    data = buffer.data();
    dtype = DType::kFloat32;
  }

  // g - (g . p) p takes the gradient's place, with sign and scale in it.
  void project(TensorRecord& r, const float* p, int64_t n, optim::StepOptions& options) {
    widen_into(grads_, r.grad, r.grad_dtype, n);
    float* g = grads_.data();
    multiply(g, optim::grad_factor(options.maximize, options.grad_scale), n);
    subtract(g, static_cast<float>(dot(g, p, n)), p, n);
    options.maximize = false;
    options.grad_scale = nullptr;
  }

  const std::vector<TensorRecord>& tensors_;
  const Rule::Hyper& hyper_;
  const StepOptions& options_;
  int32_t current_ = -1;
  Rule::Coefficients c_ = {};
  std::vector<float> params_, grads_;
};

}  // namespace

void step(const std::vector<TensorRecord>& tensors, const Rule::Hyper& hyper, const StepOptions& options,
          const ParallelFor& parallel_for) {
  if (options.shared.found_inf != nullptr && *options.shared.found_inf != 0.0f) return;
  std::vector<Span> spans;
  int64_t elements = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t numel = tensors[t].numel;
    const int64_t count = tensors[t].columns > 0 ? tensors[t].columns : optim::kCpuChunk;
    for (int64_t begin = 0; begin < numel; begin += count) {
      spans.push_back({static_cast<int32_t>(t), begin, std::min(count, numel - begin)});
    }
    elements += numel;
  }
  parallel_for_elements(parallel_for, static_cast<int64_t>(spans.size()), elements, [&](int64_t begin, int64_t end) {
    Spans worker(tensors, hyper, options);
    for (int64_t i = begin; i < end; ++i) worker.update(spans[i]);
  });
  for (const TensorRecord& t : tensors) *t.step += 1.0f;
}

}  // namespace singlepass::spectral
