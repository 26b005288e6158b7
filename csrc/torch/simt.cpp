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

STABLE_TORCH_LIBRARY_IMPL(SINGLEPASS_NAMESPACE, CPU, m) {
  register_kv<Simt>(m);
  register_optim<Simt>(m);
  register_rational<Simt>(m);
  register_spectral<Simt>(m);
  register_stream<Simt>(m);
}

}  // namespace singlepass::registration

// For ctypes: what is launched on a GPU with so many places for thread blocks. It is recorded, and does not run.
extern "C" {
__attribute__((visibility("default"))) void simt_start_recording(int places) {
  simt::Device& device = simt::device();
  device.records = true, device.places = places;
  device.shapes.clear();
}
__attribute__((visibility("default"))) std::int64_t simt_finish_recording(const simt::Shape** shapes) {
  simt::Device& device = simt::device();
  device.records = false, device.places = simt::Device().places;
  *shapes = device.shapes.data();
  return static_cast<std::int64_t>(device.shapes.size());
}
}
