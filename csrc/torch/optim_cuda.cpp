// SPDX-License-Identifier: Apache-2.0
#include <list>
#include <mutex>

#include "device.h"
#include "optim.h"
#include "singlepass/common/stream_cuda.h"
#include "singlepass/optim/cuda.h"
#include "stream.h"

namespace singlepass::registration {
namespace {

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch("singlepass", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Device tables by their contents. An entry belongs to one stream: its memory comes from that stream's pool and is only
// used on it, so that dropping the entry needs no synchronisation.
class TableCache {
 public:
  optim::DeviceTable get(const std::vector<TensorRecord>& records, int state_count, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const cudaStream_t stream = current_stream(device);
    if (is_capturing(stream)) {
      // The graph owns the memory and uploads the contents again at every replay.
      captured_ = optim::make_table(records, state_count);
      const Tensor workspace = allocate(like, captured_.workspace_size);
      check_launch("singlepass", optim::upload_table(captured_, workspace.data_ptr(), stream));
      return optim::place_table(captured_, workspace.data_ptr());
    }
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
      if (entry->device == device && entry->stream == stream && same(entry->table.records, records)) {
        entries_.splice(entries_.begin(), entries_, entry);
        return optim::place_table(entries_.front().table, entries_.front().workspace.data_ptr());
      }
    }
    optim::HostTable table = optim::make_table(records, state_count);
    const Tensor workspace = allocate(like, table.workspace_size);
    check_launch("singlepass", optim::upload_table(table, workspace.data_ptr(), stream));
    entries_.push_front({device, stream, std::move(table), workspace});
    if (entries_.size() > kCapacity) entries_.pop_back();
    return optim::place_table(entries_.front().table, workspace.data_ptr());
  }

  std::mutex mutex;

 private:
  static constexpr size_t kCapacity = 64;

  struct Entry {
    int32_t device;
    cudaStream_t stream;
    optim::HostTable table;
    Tensor workspace;
  };

  static bool same(const std::vector<TensorRecord>& a, const std::vector<TensorRecord>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(TensorRecord)) == 0;
  }

  std::list<Entry> entries_;
  optim::HostTable captured_;
};

TableCache& table_cache() {
  static TableCache* cache = new TableCache;  // outlives CUDA's own clean-up at exit
  return *cache;
}

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
