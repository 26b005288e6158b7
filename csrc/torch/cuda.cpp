// SPDX-License-Identifier: Apache-2.0
#include "common/cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "kv/torch.h"
#include "optim/torch.h"
#include "rational/torch.h"
#include "spectral/torch.h"
#include "torch/stream.h"
#include "torch/table_cache.h"

namespace singlepass::registration {
namespace {

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(device, &stream);
  return static_cast<cudaStream_t>(stream);
}

TableCache& table_cache() {
  static TableCache* cache = new TableCache;  // outlives CUDA's own clean-up at exit
  return *cache;
}

// Runs ops on the device of `like`, on its current stream. Memory that they ask for lives as long as this object, and
// then serves what is launched on that stream later.
class Cuda {
 public:
  Cuda(const char* op, const Tensor& like)
      : like_(like),
        guard_(like.get_device_index()),
        gpu_{op, current_stream(like.get_device_index()),
             [this](int64_t bytes) { return kept_.emplace_back(device_memory(like_, bytes)).data_ptr(); }} {}
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;

  const Gpu& where() const { return gpu_; }

  optim::DeviceTable table(const std::vector<TensorRecord>& records, int states, optim::LaunchShape shape = {}) const {
    const auto [table, memory] = table_cache().get(records, states, shape, like_, gpu_);
    kept_.push_back(memory);
    return table;
  }

 private:
  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  mutable Tensors kept_;
  Gpu gpu_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CUDA, m) {
  register_kv<Cuda>(m);
  register_optim<Cuda>(m);
  register_rational<Cuda>(m);
  register_spectral<Cuda>(m);
  register_stream<Cuda>(m);
}

}  // namespace singlepass::registration
