// SPDX-License-Identifier: Apache-2.0
#include "device.h"
#include "kv.h"
#include "singlepass/kv/cuda.h"

namespace singlepass::registration {
namespace {

void quantize(Tensor x, std::optional<Tensor> index, Tensor starts, Tensor counts, Tensor codes, Tensor scales,
              std::optional<Tensor> channels, int64_t bits, int64_t axis) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto p = codec_of("kv_quantize_", x, index, starts, counts, codes, scales, channels, bits, axis);
  check_launch("kv_quantize_", kv::launch_quantize(p, current_stream(x.get_device_index())));
}

void dequantize(Tensor codes, Tensor scales, std::optional<Tensor> channels, std::optional<Tensor> index, Tensor starts,
                Tensor counts, Tensor out, int64_t bits, int64_t axis) {
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const auto p = codec_of("kv_dequantize_", out, index, starts, counts, codes, scales, channels, bits, axis);
  check_launch("kv_dequantize_", kv::launch_dequantize(p, current_stream(out.get_device_index())));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CUDA, m) {
  m.impl("kv_quantize_", TORCH_BOX(&quantize));
  m.impl("kv_dequantize_", TORCH_BOX(&dequantize));
}

}  // namespace singlepass::registration
