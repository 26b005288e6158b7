// SPDX-License-Identifier: Apache-2.0

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "kv/torch.h"
#include "optim/torch.h"
#include "rational/torch.h"
#include "spectral/torch.h"
#include "torch/on_stream.h"
#include "torch/stream.h"

// That of the ops, under which Python declares them: the name of the package.
#ifndef SINGLEPASS_NAMESPACE
#define SINGLEPASS_NAMESPACE singlepass
#endif

namespace singlepass::registration {
namespace {

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(device, &stream);
  return static_cast<cudaStream_t>(stream);
}

class Cuda : public OnStream {
 public:
  Cuda(const char* op, const Tensor& like)
      : OnStream(op, like, current_stream(like.get_device_index())), guard_(like.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SINGLEPASS_NAMESPACE, CUDA, m) {
  register_kv<Cuda>(m);
  register_optim<Cuda>(m);
  register_rational<Cuda>(m);
  register_spectral<Cuda>(m);
  register_stream<Cuda>(m);
}

}  // namespace singlepass::registration
