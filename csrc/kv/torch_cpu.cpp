// SPDX-License-Identifier: Apache-2.0
#include "kv/cpu.h"
#include "kv/torch.h"
#include "torch/parallel.h"

namespace singlepass::registration {
namespace {

void quantize(Tensor x, std::optional<Tensor> index, Tensor starts, Tensor counts, Tensor codes, Tensor scales,
              std::optional<Tensor> channels, int64_t bits, int64_t axis) {
  const auto p = codec_of("kv_quantize_", x, index, starts, counts, codes, scales, channels, bits, axis);
  kv::quantize_cpu(p, parallel_for);
}

void dequantize(Tensor codes, Tensor scales, std::optional<Tensor> channels, std::optional<Tensor> index, Tensor starts,
                Tensor counts, Tensor out, int64_t bits, int64_t axis) {
  const auto p = codec_of("kv_dequantize_", out, index, starts, counts, codes, scales, channels, bits, axis);
  kv::dequantize_cpu(p, parallel_for);
}

Tensor saliency(Tensor q, Tensor k, Tensor positions, std::optional<Tensor> mask, std::optional<Tensor> lse,
                double scale, double softcap) {
  kv::Saliency p = saliency_of(q, k, positions, mask, lse, scale, softcap);
  const Tensor sums = torch::stable::new_empty(k, {p.batch, p.heads, p.tokens}, ScalarType::Float);
  p.sums = static_cast<float*>(sums.data_ptr());
  kv::saliency_cpu(p, parallel_for);
  return sums;
}

std::tuple<Tensor, Tensor> decode(Tensor q, Tensors segments, Tensor window_k, Tensor window_v, Tensor window,
                                  std::optional<Tensor> sinks, std::optional<Tensor> first, std::vector<int64_t> bits,
                                  int64_t key_axis, double scale, double softcap) {
  kv::Decode p = decode_of(q, segments, window_k, window_v, window, sinks, first, bits, key_axis, scale, softcap);
  const Tensor out = torch::stable::new_empty(q, {p.batch, q.size(1), p.queries, p.value_width});
  const Tensor lse = torch::stable::new_empty(q, {p.batch, q.size(1), p.queries}, ScalarType::Float);
  p.out = tokens_of("kv_decode", "out", out);
  p.lse = static_cast<float*>(lse.data_ptr());
  kv::decode_cpu(p, parallel_for);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singlepass, CPU, m) {
  m.impl("kv_quantize_", TORCH_BOX(&quantize));
  m.impl("kv_dequantize_", TORCH_BOX(&dequantize));
  m.impl("kv_saliency", TORCH_BOX(&saliency));
  m.impl("kv_decode", TORCH_BOX(&decode));
}

}  // namespace singlepass::registration
