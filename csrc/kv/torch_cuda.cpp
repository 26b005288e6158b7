// SPDX-License-Identifier: Apache-2.0
#include "kv/cuda.h"
#include "kv/torch.h"
#include "torch/device.h"

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

Tensor saliency(Tensor q, Tensor k, Tensor positions, std::optional<Tensor> mask, std::optional<Tensor> lse,
                double scale, double softcap) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  kv::Saliency p = saliency_of(q, k, positions, mask, lse, scale, softcap);
  const Tensor sums = torch::stable::new_empty(k, {p.batch, p.heads, p.tokens}, ScalarType::Float);
  p.sums = static_cast<float*>(sums.data_ptr());
  const Tensor workspace = allocate(k, kv::saliency_workspace(p));
  check_launch("kv_saliency", kv::launch_saliency(p, workspace.data_ptr(), current_stream(k.get_device_index())));
  return sums;
}

std::tuple<Tensor, Tensor> decode(Tensor q, Tensors segments, Tensor window_k, Tensor window_v, Tensor window,
                                  std::optional<Tensor> sinks, std::optional<Tensor> first, std::vector<int64_t> bits,
                                  int64_t key_axis, double scale, double softcap) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  if (bits.size() > kv::kMaxSegments) {
    fail("kv_decode", "at most ", kv::kMaxSegments, " segments on CUDA; got ", bits.size(),
         ". Use backend=\"eager\" for more.");
  }
  kv::Decode p = decode_of(q, segments, window_k, window_v, window, sinks, first, bits, key_axis, scale, softcap);
  const Tensor out = torch::stable::new_empty(q, {p.batch, q.size(1), p.queries, p.value_width});
  const Tensor lse = torch::stable::new_empty(q, {p.batch, q.size(1), p.queries}, ScalarType::Float);
  p.out = tokens_of("kv_decode", "out", out);
  p.lse = static_cast<float*>(lse.data_ptr());
  const Tensor workspace = allocate(q, kv::decode_workspace(p));
  check_launch("kv_decode", kv::launch_decode(p, workspace.data_ptr(), current_stream(q.get_device_index())));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CUDA, m) {
  m.impl("kv_quantize_", TORCH_BOX(&quantize));
  m.impl("kv_dequantize_", TORCH_BOX(&dequantize));
  m.impl("kv_saliency", TORCH_BOX(&saliency));
  m.impl("kv_decode", TORCH_BOX(&decode));
}

}  // namespace singlepass::registration
