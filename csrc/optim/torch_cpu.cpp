// SPDX-License-Identifier: Apache-2.0
#include "optim/cpu.h"
#include "optim/grad_norm.h"
#include "optim/torch.h"
#include "torch/parallel.h"
#include "torch/stream.h"

namespace singlepass::registration {
namespace {

struct CpuEngine {
  template <class Rule>
  static void run(const Step& step, const typename Rule::Hyper& hyper) {
    optim::step_cpu<Rule>(step.records, hyper, step.options, parallel_for);
  }
};

Tensor grad_norm(Tensors grads, double max_norm, double eps, std::optional<Tensor> grad_scale) {
  Tensors kept;
  const std::vector<TensorRecord> records = grad_records(grads, kept);
  const float* scale = scalar_pointer("grad_norm", "grad_scale", grad_scale, grads[0]);
  const optim::GradNorm norm = optim::grad_norm_cpu(records, {max_norm, eps, scale}, parallel_for);
  Tensor result = torch::stable::new_empty(grads[0], {3}, ScalarType::Float);
  std::memcpy(result.data_ptr(), &norm, sizeof(norm));
  return result;
}

void stream_(Tensors reads, Tensors updates) {
  const StreamPointers streams = stream_pointers(reads, updates);
  stream_cpu(streams.reads, streams.updates, streams.n, parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CPU, m) {
  register_steps<CpuEngine>(m);
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("stream_", TORCH_BOX(&stream_));
}

}  // namespace singlepass::registration
