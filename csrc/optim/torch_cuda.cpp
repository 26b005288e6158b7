// SPDX-License-Identifier: Apache-2.0
#include "common/stream_cuda.h"
#include "optim/torch.h"
#include "optim/torch_table_cache.h"
#include "torch/stream.h"

namespace singlepass::registration {
namespace {

struct CudaEngine {
  template <class Rule>
  static void run(const Step& step, const typename Rule::Hyper& hyper) {
    const torch::stable::accelerator::DeviceGuard guard(step.like->get_device_index());
    TableCache& cache = table_cache();
    const std::lock_guard<std::mutex> lock(cache.mutex);
    const optim::DeviceTable table = cache.get(step.records, Rule::kStates, *step.like);
    const cudaStream_t stream = current_stream(step.like->get_device_index());
    check_launch(Rule::kName, optim::launch_step<Rule>(table, hyper, step.options, stream));
  }
};

Tensor grad_norm(Tensors grads, double max_norm, double eps, std::optional<Tensor> grad_scale) {
  Tensors kept;
  const std::vector<TensorRecord> records = grad_records(grads, kept);
  const float* scale = scalar_pointer("grad_norm", "grad_scale", grad_scale, grads[0]);
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  Tensor result = torch::stable::new_empty(grads[0], {3}, ScalarType::Float);
  TableCache& cache = table_cache();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  const optim::DeviceTable table = cache.get(records, 0, grads[0]);
  check_launch("grad_norm",
               optim::launch_grad_norm(table, {max_norm, eps, scale}, static_cast<optim::GradNorm*>(result.data_ptr()),
                                       current_stream(grads[0].get_device_index())));
  return result;
}

void stream_(Tensors reads, Tensors updates) {
  const StreamPointers streams = stream_pointers(reads, updates);
  const int32_t device = (reads.empty() ? updates[0] : reads[0]).get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch("stream_", launch_stream(streams.reads, streams.updates, streams.n, current_stream(device)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CUDA, m) {
  register_steps<CudaEngine>(m);
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("stream_", TORCH_BOX(&stream_));
}

}  // namespace singlepass::registration
