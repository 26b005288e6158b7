// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <tuple>

#include "kv/problem.h"
#include "torch/arguments.h"

// The KV cache ops: arguments are checked, and turned into what engines take.
namespace singlepass::registration {

using kv::Axis;
using kv::Blocks;
using kv::kMaxHeadDim;
using kv::Packed;
using kv::PerHead;

inline kv::Tokens tokens_of(const char* op, const char* role, const Tensor& t) {
  if (t.dim() != 4 || (t.numel() > 0 && t.stride(3) != 1)) {
    fail(op, role, " (batch, heads, tokens, channels) whose channels are neighbours; got ", shape_of(t),
         ". Call .contiguous().");
  }
  check_memory(op, role, t);
  const int64_t head_dim = t.size(3);
  if (head_dim < 16 || head_dim > kMaxHeadDim || head_dim % 16 != 0) {
    fail(op, role, " of 16, 32, ..., ", kMaxHeadDim, " channels; got ", head_dim, ". Pad channels with zeros.");
  }
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(op, role, t), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
PerHead<T> per_head(const Tensor& t) {
  return {static_cast<T*>(const_cast<void*>(t.const_data_ptr())), t.stride(0), t.stride(1)};
}

inline Blocks blocks_of(const char* op, const Tensor& starts, const Tensor& counts, int64_t batch, int64_t heads,
                        int64_t slots) {
  check_layout(op, "counts", counts, ScalarType::Int, {batch, heads, -1}, 2);
  check_layout(op, "starts", starts, ScalarType::Int, {counts.size(2) + 1}, 0);
  const Blocks blocks = {static_cast<const int32_t*>(starts.const_data_ptr()), per_head<const int32_t>(counts),
                         counts.size(2)};
  if (!starts.is_cpu()) return blocks;  // what stands on a device is not read here
  bool fits = blocks.starts[0] == 0 && blocks.starts[blocks.num_blocks] <= slots;
  for (int64_t i = 0; fits && i < blocks.num_blocks; ++i) {
    const int64_t size = blocks.starts[i + 1] - blocks.starts[i];
    fits = size >= 0;
    for (int64_t task = 0; fits && task < batch * heads; ++task) {
      const int64_t count = blocks.count(task / heads, task % heads, i);
      fits = count >= 0 && count <= size;
    }
  }
  if (!fits) fail(op, "starts that rise from 0 to at most ", slots, ", and counts within; got others. Check them.");
  return blocks;
}

inline Packed packed_of(const char* op, const Tensor& codes, const Tensor& scales, const Tensor* channels, int64_t bits,
                        int64_t axis, int64_t batch, int64_t heads, int64_t head_dim, int64_t blocks) {
  if (bits != 2 && bits != 4 && bits != 8) fail(op, "bits 2, 4 or 8; got ", bits, ". Choose one of them.");
  if (axis != 0 && axis != 1) fail(op, "axis 0 or 1; got ", axis, ". Choose one of them.");
  check_layout(op, "codes", codes, ScalarType::Byte, {batch, heads, -1, head_dim * bits / 8}, 2);
  const bool by_channel = axis == 0;
  check_layout(op, "scales", scales, ScalarType::Half,
               {batch, heads, by_channel ? blocks : codes.size(2), 2, by_channel ? head_dim : -1}, 2);
  const int64_t groups = scales.size(4);
  if (groups < 1 || head_dim % groups != 0)
    fail(op, "groups that divide ", head_dim, "; got ", groups, ". Choose others.");
  Packed packed = {per_head<uint8_t>(codes),
                   per_head<uint16_t>(scales),
                   {},
                   static_cast<int>(bits),
                   static_cast<Axis>(axis),
                   head_dim,
                   groups};
  if (channels != nullptr) {
    if (by_channel) fail(op, "no channels for axis 0; got some. Leave them out.");
    check_layout(op, "channels", *channels, ScalarType::Half, {batch, heads, blocks, head_dim}, 2);
    packed.channels = per_head<uint16_t>(*channels);
  }
  return packed;
}

// Raises unless what slots hold are tokens.
inline void check_places(const char* op, const kv::CodecCall& p) {
  const auto check = [&](int64_t token) {
    if (token < 0 || token >= p.tokens)
      fail(op, "tokens 0 to ", p.tokens - 1, "; got ", token, ". Check index, starts and counts.");
  };
  const bool indexed = p.index.data != nullptr;
  for (int64_t task = 0; task < p.batch * p.heads; ++task) {
    const int64_t b = task / p.heads, h = task % p.heads;
    for (int64_t i = 0; i < p.blocks.num_blocks; ++i) {
      const int64_t begin = p.blocks.starts[i], end = begin + p.blocks.count(b, h, i);
      if (!indexed && end > begin) check(end - 1);  // slots are tokens
      for (int64_t slot = begin; indexed && slot < end; ++slot) check(p.token(b, h, slot));
    }
  }
}

inline kv::CodecCall codec_of(const char* op, const Tensor& plain, const std::optional<Tensor>& index,
                              const Tensor& starts, const Tensor& counts, const Tensor& codes, const Tensor& scales,
                              const std::optional<Tensor>& channels, int64_t bits, int64_t axis) {
  kv::CodecCall p = {};
  p.plain = tokens_of(op, "tokens", plain);
  p.batch = plain.size(0);
  p.heads = plain.size(1);
  p.tokens = plain.size(2);
  for (const Tensor* t : {&starts, &counts, &codes, &scales}) check_device(op, "everything", *t, plain);
  p.packed = packed_of(op, codes, scales, channels.has_value() ? &*channels : nullptr, bits, axis, p.batch, p.heads,
                       plain.size(3), counts.dim() == 3 ? counts.size(2) : -1);
  p.slots = codes.size(2);
  p.blocks = blocks_of(op, starts, counts, p.batch, p.heads, p.slots);
  if (index.has_value()) {
    check_device(op, "index", *index, plain);
    check_layout(op, "index", *index, ScalarType::Int, {p.batch, p.heads, p.slots}, 2);
    p.index = per_head<const int32_t>(*index);
  }
  if (plain.is_cpu()) check_places(op, p);
  return p;
}

// Query heads for each head of keys.
inline int64_t group_of(const char* op, const Tensor& q, const Tensor& k) {
  const int64_t heads = k.size(1);
  if (q.size(0) != k.size(0) || q.size(3) != k.size(3) || heads == 0 || q.size(1) % heads != 0) {
    fail(op, "q of the keys' batch and channels and a multiple of their heads, ", shape_of(k), "; got ", shape_of(q),
         ". Pass (batch, query heads, tokens, channels).");
  }
  return q.size(1) / heads;
}

inline const float* floats_or_null(const char* op, const char* role, const std::optional<Tensor>& t, const Tensor& like,
                                   const std::vector<int64_t>& shape) {
  if (!t.has_value()) return nullptr;
  check_device(op, role, *t, like);
  check_layout(op, role, *t, ScalarType::Float, shape, 0);
  return static_cast<const float*>(t->const_data_ptr());
}

inline kv::Saliency saliency_of(const Tensor& q, const Tensor& k, const Tensor& positions,
                                const std::optional<Tensor>& mask, const std::optional<Tensor>& lse, double scale,
                                double softcap) {
  const char* op = "kv_saliency";
  kv::Saliency p = {};
  p.q = tokens_of(op, "q", q);
  p.k = tokens_of(op, "k", k);
  p.group_size = group_of(op, q, k);
  p.batch = k.size(0);
  p.heads = k.size(1);
  p.probes = q.size(2);
  p.tokens = k.size(2);
  p.head_dim = k.size(3);
  check_device(op, "q", q, k);
  check_device(op, "positions", positions, k);
  check_layout(op, "positions", positions, ScalarType::Long, {p.probes}, 0);
  p.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t i = 0; positions.is_cpu() && i < p.probes; ++i) {
    if (p.positions[i] < 0 || p.positions[i] >= p.tokens) {
      fail(op, "positions 0 to ", p.tokens - 1, "; got ", p.positions[i], ". Give each probe's place in k.");
    }
  }
  if (mask.has_value()) {
    check_device(op, "mask", *mask, k);
    check_layout(op, "mask", *mask, ScalarType::Bool, {p.batch, p.tokens}, 1);
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
    p.mask_stride = mask->stride(0);
  }
  p.lse = floats_or_null(op, "lse", lse, k, {p.batch, q.size(1), p.probes});
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  return p;
}

inline constexpr size_t kSegmentTensors = 7;

inline kv::Segment segment_of(const char* op, const Tensor* parts, int64_t bits, int64_t key_axis, const Tensor& k,
                              const Tensor& v) {
  for (size_t i = 0; i < kSegmentTensors; ++i) check_device(op, "segments", parts[i], k);
  const int64_t batch = k.size(0), heads = k.size(1), blocks = parts[6].dim() == 3 ? parts[6].size(2) : -1;
  kv::Segment s = {};
  s.keys = packed_of(op, parts[0], parts[1], nullptr, bits, key_axis, batch, heads, k.size(3), blocks);
  const Tensor* channels = parts[4].dim() == 4 ? &parts[4] : nullptr;
  s.values = packed_of(op, parts[2], parts[3], channels, bits, 1, batch, heads, v.size(3), blocks);
  s.slots = parts[0].size(2);
  if (parts[2].size(2) != s.slots) {
    fail(op, "as many slots of values as of keys, ", s.slots, "; got ", parts[2].size(2), ". Quantise them alike.");
  }
  s.blocks = blocks_of(op, parts[5], parts[6], batch, heads, s.slots);
  if (parts[5].is_cpu()) s.slots = s.blocks.used();  // others are room for more
  return s;
}

inline kv::Decode decode_of(const char* op, const Tensor& q, const Tensors& segments, const Tensor& window_k,
                            const Tensor& window_v, const Tensor& window, const std::optional<Tensor>& sinks,
                            const std::optional<Tensor>& first, const std::vector<int64_t>& bits, int64_t key_axis,
                            double scale, double softcap) {
  kv::Decode p = {};
  p.q = tokens_of(op, "q", q);
  p.window_k = tokens_of(op, "window_k", window_k);
  p.window_v = tokens_of(op, "window_v", window_v);
  p.window_slots = window_k.size(2);
  p.group_size = group_of(op, q, window_k);
  p.batch = window_k.size(0);
  p.heads = window_k.size(1);
  p.queries = q.size(2);
  p.head_dim = window_k.size(3);
  p.value_dim = window_v.size(3);
  for (const Tensor* t : {&q, &window_v, &window}) check_device(op, "everything", *t, window_k);
  for (int64_t k = 0; k < 3; ++k) {
    if (window_v.size(k) == window_k.size(k)) continue;
    fail(op, "window_v as window_k, ", shape_of(window_k), "; got ", shape_of(window_v), ". Only channels may differ.");
  }
  check_layout(op, "window", window, ScalarType::Int, {p.batch, 2}, 1);
  p.window = static_cast<const int32_t*>(window.const_data_ptr());
  p.window_stride = window.stride(0);
  for (int64_t b = 0; window.is_cpu() && b < p.batch; ++b) {
    const int64_t begin = p.window[b * p.window_stride], end = p.window[b * p.window_stride + 1];
    if (begin < 0 || end > window_k.size(2)) {
      fail(op, "window within its ", window_k.size(2), " slots; got ", begin, " to ", end, ". Check it.");
    }
  }
  if (segments.size() != kSegmentTensors * bits.size()) {
    fail(op, kSegmentTensors, " tensors for each of ", bits.size(), " segments; got ", segments.size(),
         ". See the op's schema.");
  }
  for (size_t i = 0; i < bits.size(); ++i) {
    p.segments.push_back(segment_of(op, &segments[i * kSegmentTensors], bits[i], key_axis, window_k, window_v));
  }
  p.sinks = floats_or_null(op, "sinks", sinks, window_k, {q.size(1)});
  if (first.has_value()) {
    check_device(op, "first", *first, window_k);
    const int64_t number = static_cast<int64_t>(bits.size());
    check_layout(op, "first", *first, ScalarType::Int, {number, p.batch, p.heads}, 0);
    p.first = static_cast<const int32_t*>(first->const_data_ptr());
  }
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  return p;
}

// New tokens of a call that was checked, as many as queries.
inline void add_tokens(kv::Decode* p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& window_k,
                       const Tensor& window_v, const Tensor& kept) {
  const char* op = "kv_step_";
  p->added = {tokens_of(op, "k", k), tokens_of(op, "v", v), tokens_of(op, "kept", kept)};
  for (const auto& [own, window] : {std::pair{&k, &window_k}, std::pair{&v, &window_v}}) {
    check_device(op, "everything", *own, window_k);
    const bool fits = own->size(0) == p->batch && own->size(1) == p->heads && own->size(2) == p->queries &&
                      own->size(3) == window->size(3) && own->scalar_type() == window->scalar_type();
    if (!fits) {
      fail(op, "a token for each of ", p->queries, " queries, as those of the window, ", shape_of(*window), "; got ",
           shape_of(*own), ". Pass the queries' own.");
    }
  }
  for (int64_t b = 0; q.is_cpu() && b < p->batch; ++b) {
    const int64_t begin = p->window[b * p->window_stride], end = p->window[b * p->window_stride + 1];
    if (begin > end - p->queries) {
      fail(op, "a window that ends with the ", p->queries, " new tokens; got slots ", begin, " to ", end, ".");
    }
  }
}

// cos or sin of every token, for all heads.
inline kv::Tokens turns_of(const char* op, const char* role, const Tensor& t, const Tensor& x) {
  check_device(op, role, t, x);
  const bool fits = t.dim() == 3 && (t.size(0) == x.size(0) || t.size(0) == 1) && t.size(1) == x.size(2);
  if (!fits || t.size(2) < 2 || t.size(2) > x.size(3) || t.size(2) % 2 != 0 || (t.numel() > 0 && t.stride(2) != 1)) {
    fail(op, role, " (batch or 1, tokens, an even number of channels) for x ", shape_of(x), ", dense in the last; got ",
         shape_of(t), ". Pass what rotary embeddings give.");
  }
  check_memory(op, role, t);
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(op, role, t), t.size(0) == 1 ? 0 : t.stride(0), 0,
          t.stride(1)};
}

// The heads of a group, of which `out` holds the vectors.
inline void add_projected(kv::Projection* p, size_t source, const Tensor& basis, const Tensor& out,
                          const std::vector<int64_t>& heads, size_t first) {
  const char* op = "kv_project_";
  const kv::Source& from = p->sources[source];
  check_layout(op, "bases", basis, ScalarType::Float, {-1, from.head_dim, -1}, 0);
  const int64_t own = basis.size(0), rank = basis.size(2);
  const kv::Tokens to = tokens_of(op, "out", out);
  if (to.dtype != from.x.dtype || out.size(0) != p->batch || out.size(1) != own * p->group_size ||
      out.size(2) != p->tokens || out.size(3) != rank || first + static_cast<size_t>(own) > heads.size()) {
    fail(op, "out of x's dtype, batch and tokens, with the heads and the rank of its basis ", shape_of(basis), "; got ",
         shape_of(out), ". Allocate it so.");
  }
  for (int64_t i = 0; i < own; ++i) {
    const float* own_basis = static_cast<const float*>(basis.const_data_ptr()) + i * from.head_dim * rank;
    p->heads.push_back({source, heads[first + static_cast<size_t>(i)], rank, own_basis, to, i});
  }
}

inline kv::Projection projection_of(const Tensors& x, const Tensors& bases, const std::optional<Tensor>& cos,
                                    const std::optional<Tensor>& sin, const Tensors& out,
                                    const std::vector<int64_t>& heads) {
  const char* op = "kv_project_";
  const int64_t number = static_cast<int64_t>(heads.size());
  std::vector<int64_t> sorted = heads;
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 0; i < number; ++i) {
    if (sorted[static_cast<size_t>(i)] != i)
      fail(op, "heads 0 to ", number - 1, ", each once; got others. Check them.");
  }
  if (x.empty() || bases.size() % x.size() != 0 || bases.size() != out.size()) {
    fail(op, "as many bases as outputs, a multiple of ", x.size(), "; got ", bases.size(), " and ", out.size(), ".");
  }
  kv::Projection p = {};
  for (const Tensor& t : x) {
    p.sources.push_back({tokens_of(op, "x", t), t.size(3)});
    check_device(op, "x", t, x[0]);
    const bool alike = t.size(0) == x[0].size(0) && t.size(1) == x[0].size(1) && t.size(2) == x[0].size(2);
    if (!alike || t.scalar_type() != x[0].scalar_type() || number == 0 || t.size(1) % number != 0) {
      fail(op, "x of one dtype, one batch, as many tokens and a multiple of ", number, " heads; got ", shape_of(t),
           ". Pass keys and values of the same tokens.");
    }
  }
  p.batch = x[0].size(0);
  p.group_size = x[0].size(1) / number;
  p.tokens = x[0].size(2);
  if (cos.has_value() != sin.has_value()) fail(op, "both cos and sin, or neither; got one. Pass both.");
  if (cos.has_value()) {
    p.cos = turns_of(op, "cos", *cos, x[0]);
    p.sin = turns_of(op, "sin", *sin, x[0]);
    p.rotated = cos->size(2);
    if (sin->size(2) != p.rotated || p.sin.dtype != p.cos.dtype) {
      fail(op, "sin of as many channels as cos, and of its dtype; got ", shape_of(*sin), ". Pass both alike.");
    }
  }
  const size_t groups = bases.size() / x.size();
  for (size_t i = 0; i < x.size(); ++i) {
    size_t first = 0;
    for (size_t k = i * groups; k < (i + 1) * groups; ++k) {
      check_device(op, "bases", bases[k], x[0]);
      check_device(op, "out", out[k], x[0]);
      add_projected(&p, i, bases[k], out[k], heads, first);
      first += static_cast<size_t>(bases[k].size(0));
    }
    if (first != heads.size()) fail(op, "bases of ", number, " heads; got those of ", first, ". Pass one for each.");
  }
  return p;
}

template <class Backend>
void kv_quantize_(Tensor x, std::optional<Tensor> index, Tensor starts, Tensor counts, Tensor codes, Tensor scales,
                  std::optional<Tensor> channels, int64_t bits, int64_t axis) {
  const char* op = "kv_quantize_";
  const Backend on(op, x);
  kv::quantize(codec_of(op, x, index, starts, counts, codes, scales, channels, bits, axis), on.where());
}

template <class Backend>
void kv_dequantize_(Tensor codes, Tensor scales, std::optional<Tensor> channels, std::optional<Tensor> index,
                    Tensor starts, Tensor counts, Tensor out, int64_t bits, int64_t axis) {
  const char* op = "kv_dequantize_";
  const Backend on(op, out);
  kv::dequantize(codec_of(op, out, index, starts, counts, codes, scales, channels, bits, axis), on.where());
}

template <class Backend>
Tensor kv_saliency(Tensor q, Tensor k, Tensor positions, std::optional<Tensor> mask, std::optional<Tensor> lse,
                   double scale, double softcap) {
  const Backend on("kv_saliency", k);
  kv::Saliency p = saliency_of(q, k, positions, mask, lse, scale, softcap);
  const Tensor sums = new_tensor(k, {p.batch, p.heads, p.tokens}, ScalarType::Float);
  p.sums = static_cast<float*>(sums.data_ptr());
  kv::saliency(p, on.where());
  return sums;
}

// The result and its lse.
template <class Backend>
std::tuple<Tensor, Tensor> decode_on(const Backend& on, const char* op, kv::Decode* p, const Tensor& q) {
  const Tensor out = new_tensor(q, {p->batch, q.size(1), p->queries, p->value_dim}, q.scalar_type());
  const Tensor lse = new_tensor(q, {p->batch, q.size(1), p->queries}, ScalarType::Float);
  p->out = tokens_of(op, "out", out);
  p->lse = static_cast<float*>(lse.data_ptr());
  kv::decode(*p, on.where());
  return {out, lse};
}

template <class Backend>
std::tuple<Tensor, Tensor> kv_decode(Tensor q, Tensors segments, Tensor window_k, Tensor window_v, Tensor window,
                                     std::optional<Tensor> sinks, std::optional<Tensor> first,
                                     std::vector<int64_t> bits, int64_t key_axis, double scale, double softcap) {
  const char* op = "kv_decode";
  const Backend on(op, q);
  kv::Decode p = decode_of(op, q, segments, window_k, window_v, window, sinks, first, bits, key_axis, scale, softcap);
  return decode_on(on, op, &p, q);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> kv_step_(Tensor q, Tensor k, Tensor v, Tensors segments, Tensor window_k,
                                            Tensor window_v, Tensor window, std::optional<Tensor> sinks,
                                            std::optional<Tensor> first, std::vector<int64_t> bits, int64_t key_axis,
                                            double scale, double softcap) {
  const char* op = "kv_step_";
  const Backend on(op, q);
  kv::Decode p = decode_of(op, q, segments, window_k, window_v, window, sinks, first, bits, key_axis, scale, softcap);
  const Tensor kept = new_tensor(q, {p.batch, q.size(1), p.queries, p.head_dim}, q.scalar_type());
  add_tokens(&p, q, k, v, window_k, window_v, kept);
  const auto [out, lse] = decode_on(on, op, &p, q);
  return {out, lse, kept};
}

template <class Backend>
void kv_project_(Tensors x, Tensors bases, std::optional<Tensor> cos, std::optional<Tensor> sin, Tensors out,
                 std::vector<int64_t> heads) {
  if (x.empty()) fail("kv_project_", "tokens; got none. Pass some.");
  const Backend on("kv_project_", x[0]);
  kv::project(projection_of(x, bases, cos, sin, out, heads), on.where());
}

template <class Backend, class Library>
void register_kv(Library& m) {
  m.impl("kv_quantize_", TORCH_BOX(&kv_quantize_<Backend>));
  m.impl("kv_dequantize_", TORCH_BOX(&kv_dequantize_<Backend>));
  m.impl("kv_saliency", TORCH_BOX(&kv_saliency<Backend>));
  m.impl("kv_decode", TORCH_BOX(&kv_decode<Backend>));
  m.impl("kv_step_", TORCH_BOX(&kv_step_<Backend>));
  m.impl("kv_project_", TORCH_BOX(&kv_project_<Backend>));
}

}  // namespace singlepass::registration
