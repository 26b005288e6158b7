// SPDX-License-Identifier: Apache-2.0
#include "kv/torch.h"
#include "optim/torch.h"
#include "rational/torch.h"
#include "spectral/torch.h"
#include "torch/on_stream.h"
#include "torch/stream.h"

// What GPUs run, on CPU tensors: for tests, as ops of a namespace whose schemas a test defines.
namespace singlepass::registration {
namespace {

class Simt : public OnStream {
 public:
  Simt(const char* op, const Tensor& like) : OnStream(op, like, nullptr) {}
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SINGLEPASS_SIMT_NAMESPACE, CPU, m) {
  register_kv<Simt>(m);
  register_optim<Simt>(m);
  register_rational<Simt>(m);
  register_spectral<Simt>(m);
  register_stream<Simt>(m);
}

}  // namespace singlepass::registration
