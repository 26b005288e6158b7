// SPDX-License-Identifier: Apache-2.0
#include "kv.h"

#include <pybind11/stl.h>

#include <deque>
#include <optional>
#include <tuple>

#include "kv/problem.h"
#include "placement.h"

namespace singlepass::pybind {
namespace {

using OptionalArray = std::optional<py::array>;

// Tokens (batch, heads, tokens, channels) at the beginning of each dimension of an array, which may have room for more
// of them; with `transposed` the array is (batch, tokens, heads, channels).
struct TokenArray {
  py::array array;
  int64_t heads, tokens, head_dim;
  bool transposed;
  int misalignment;  // in elements
};

// Arrays that an op works on, in guarded memory.
class Memory {
 public:
  const DeviceArray& add(const py::array& array, int misalignment = 0) {
    return arrays_.emplace_back(array, misalignment);
  }

  kv::Tokens tokens(const TokenArray& t) {
    const DeviceArray& array = add(t.array, t.misalignment);
    const int64_t outer = t.array.shape(1), inner = t.array.shape(2), head_dim = t.array.shape(3);
    return {array.data(), array.dtype(), outer * inner * head_dim, (t.transposed ? 1 : inner) * head_dim,
            (t.transposed ? inner : 1) * head_dim};
  }

  // Contiguous; heads and sequences beyond those that the op knows of are room that nothing may touch.
  template <class T>
  kv::PerHead<T> per_head(const py::array& array, int misalignment = 0) {
    const DeviceArray& copy = add(array, misalignment);
    int64_t head_stride = 1;
    for (py::ssize_t k = 2; k < array.ndim(); ++k) head_stride *= array.shape(k);
    return {static_cast<T*>(copy.data()), array.shape(1) * head_stride, head_stride};
  }

  template <class T>
  const T* values(const OptionalArray& array) {
    return array ? static_cast<const T*>(add(*array).data()) : nullptr;
  }

  const DeviceArray& front() const { return arrays_.front(); }

  void check_guards() const {
    for (const DeviceArray& array : arrays_)
      if (!array.intact()) guards_overwritten("tensors");
  }

 private:
  std::deque<DeviceArray> arrays_;
};

// Codes, scales and channel factors of one tensor, and the blocks that they lie in.
struct PackedArrays {
  py::array codes, scales;
  OptionalArray channels;
  py::array starts, counts;
  int bits, axis, misalignment;
};

kv::Packed packed(const PackedArrays& a, int64_t head_dim, Memory& memory) {
  kv::Packed p = {};
  p.codes = memory.per_head<uint8_t>(a.codes, a.misalignment);
  p.scales = memory.per_head<uint16_t>(a.scales, a.misalignment);
  if (a.channels) p.channels = memory.per_head<uint16_t>(*a.channels, a.misalignment);
  p.bits = a.bits;
  p.axis = static_cast<kv::Axis>(a.axis);
  p.head_dim = head_dim;
  p.groups = a.scales.shape(4);
  return p;
}

kv::Blocks blocks(const PackedArrays& a, Memory& memory) {
  return {memory.values<int32_t>(a.starts), memory.per_head<const int32_t>(a.counts), a.counts.shape(2)};
}

kv::CodecCall codec(const TokenArray& plain, const OptionalArray& index, const PackedArrays& a, Memory& memory) {
  kv::CodecCall p = {};
  p.batch = plain.array.shape(0);
  p.heads = plain.heads;
  p.tokens = plain.tokens;
  p.packed = packed(a, plain.head_dim, memory);
  p.blocks = blocks(a, memory);
  if (index) p.index = memory.per_head<const int32_t>(*index);
  p.plain = memory.tokens(plain);
  p.slots = a.codes.shape(2);
  return p;
}

using Quantized = std::tuple<py::array, py::array, OptionalArray>;

Quantized kv_quantize(const Placement& place, const TokenArray& x, const OptionalArray& index, const PackedArrays& to) {
  place.check();
  Memory memory, results;
  kv::CodecCall p = codec(x, index, to, memory);
  // What is written, a second time, so that it can be told apart.
  const DeviceArray& codes = results.add(to.codes, to.misalignment);
  const DeviceArray& scales = results.add(to.scales, to.misalignment);
  p.packed.codes.data = static_cast<uint8_t*>(codes.data());
  p.packed.scales.data = static_cast<uint16_t*>(scales.data());
  const DeviceArray* channels = to.channels ? &results.add(*to.channels, to.misalignment) : nullptr;
  if (channels != nullptr) p.packed.channels.data = static_cast<uint16_t*>(channels->data());
  if (place.device == "simt") {
    kv::quantize(p, SimtGpu().where("kv_quantize_"));
  } else {
    kv::quantize(p, parallel_for(place.workers));
  }
  memory.check_guards();
  results.check_guards();
  return {codes.to_numpy(), scales.to_numpy(),
          channels == nullptr ? OptionalArray() : OptionalArray(channels->to_numpy())};
}

py::array kv_dequantize(const Placement& place, const PackedArrays& from, const OptionalArray& index,
                        const TokenArray& out) {
  place.check();
  Memory memory, results;
  kv::CodecCall p = codec(out, index, from, memory);
  const DeviceArray& written = results.add(out.array, out.misalignment);
  p.plain.data = written.data();
  if (place.device == "simt") {
    kv::dequantize(p, SimtGpu().where("kv_dequantize_"));
  } else {
    kv::dequantize(p, parallel_for(place.workers));
  }
  memory.check_guards();
  results.check_guards();
  return written.to_numpy();
}

py::array kv_saliency(const Placement& place, const TokenArray& q, const TokenArray& k, const py::array& positions,
                      const OptionalArray& mask, const OptionalArray& lse, float scale, float softcap) {
  place.check();
  Memory memory, results;
  kv::Saliency p = {};
  p.batch = q.array.shape(0);
  p.heads = k.heads;
  p.group_size = q.heads / k.heads;
  p.probes = q.tokens;
  p.tokens = k.tokens;
  p.head_dim = k.head_dim;
  p.q = memory.tokens(q);
  p.k = memory.tokens(k);
  p.positions = memory.values<int64_t>(positions);
  p.mask = memory.values<bool>(mask);
  p.mask_stride = k.tokens;
  p.lse = memory.values<float>(lse);
  p.scale = scale;
  p.softcap = softcap;
  const DeviceArray& sums = results.add(py::array_t<float>({p.batch, p.heads, p.tokens}));
  p.sums = static_cast<float*>(sums.data());
  if (place.device == "simt") {
    SimtGpu gpu;
    kv::saliency(p, gpu.where("kv_saliency"));
    gpu.check_guards();
  } else {
    kv::saliency(p, parallel_for(place.workers));
  }
  memory.check_guards();
  results.check_guards();
  return sums.to_numpy();
}

// A call of decode_attention: segments of keys and values, the window, and what else there may be.
struct Attention {
  std::vector<std::pair<PackedArrays, PackedArrays>> segments;
  TokenArray window_k, window_v;
  py::array window;
  OptionalArray sinks, first;
  float scale, softcap;
};

std::tuple<py::array, py::array> kv_decode(const Placement& place, const TokenArray& q, const Attention& a,
                                           const TokenArray& out, const kv::DecodeCut& cut) {
  place.check();
  Memory memory, results;
  kv::Decode p = {};
  p.batch = q.array.shape(0);
  p.heads = a.window_k.heads;
  p.group_size = q.heads / p.heads;
  p.queries = q.tokens;
  p.head_dim = q.head_dim;
  p.value_dim = a.window_v.head_dim;
  p.q = memory.tokens(q);
  for (const auto& [keys, values] : a.segments) {
    p.segments.push_back({packed(keys, p.head_dim, memory), packed(values, p.value_dim, memory), blocks(keys, memory),
                          keys.codes.shape(2)});
  }
  p.window_k = memory.tokens(a.window_k);
  p.window_v = memory.tokens(a.window_v);
  p.window_slots = a.window_k.tokens;
  p.window = memory.values<int32_t>(a.window);
  p.window_stride = 2;
  p.sinks = memory.values<float>(a.sinks);
  p.first = memory.values<int32_t>(a.first);
  p.scale = a.scale;
  p.softcap = a.softcap;
  p.out = results.tokens(out);
  const py::ssize_t rows = p.batch * q.heads * p.queries;
  const DeviceArray& lse = results.add(py::array_t<float>(rows));
  p.lse = static_cast<float*>(lse.data());
  if (place.device == "simt") {
    SimtGpu gpu;
    kv::decode(p, gpu.where("kv_decode"), cut);
    gpu.check_guards();
  } else {
    kv::decode(p, parallel_for(place.workers));
  }
  memory.check_guards();
  results.check_guards();
  return {results.front().to_numpy(), lse.to_numpy()};
}

using Turns = std::optional<std::pair<py::array, py::array>>;

// Cosines or sines (batch or 1, tokens, channels).
kv::Tokens turns_of(const py::array& array, int misalignment, Memory& memory) {
  const DeviceArray& copy = memory.add(array, misalignment);
  const int64_t batch = array.shape(0), tokens = array.shape(1), channels = array.shape(2);
  return {copy.data(), copy.dtype(), batch == 1 ? 0 : tokens * channels, 0, channels};
}

std::vector<py::array> kv_project(const Placement& place, const std::vector<TokenArray>& x,
                                  const std::vector<py::array>& bases, const Turns& turns,
                                  const std::vector<TokenArray>& out, const std::vector<int64_t>& heads,
                                  int misalignment) {
  place.check();
  Memory memory;
  std::deque<Memory> results;
  kv::Projection p = {};
  p.batch = x[0].array.shape(0);
  p.group_size = x[0].heads / static_cast<int64_t>(heads.size());
  p.tokens = x[0].tokens;
  for (const TokenArray& t : x) p.sources.push_back({memory.tokens(t), t.head_dim});
  size_t head = 0;
  for (size_t i = 0; i < bases.size(); ++i) {
    const kv::Tokens to = results.emplace_back().tokens(out[i]);
    const float* basis = static_cast<const float*>(memory.add(bases[i], misalignment).data());
    const int64_t own = bases[i].shape(0), rank = bases[i].shape(2);
    const size_t source = i / (bases.size() / x.size());
    for (int64_t k = 0; k < own; ++k, ++head) {
      const float* own_basis = basis + k * p.sources[source].head_dim * rank;
      p.heads.push_back({source, heads[head % heads.size()], rank, own_basis, to, k});
    }
  }
  if (turns) {
    p.cos = turns_of(turns->first, misalignment, memory);
    p.sin = turns_of(turns->second, misalignment, memory);
    p.rotated = turns->first.shape(2);
  }
  if (place.device == "simt") {
    kv::project(p, SimtGpu().where("kv_project_"));
  } else {
    kv::project(p, parallel_for(place.workers));
  }
  memory.check_guards();
  std::vector<py::array> found;
  for (const Memory& result : results) {
    result.check_guards();
    found.push_back(result.front().to_numpy());
  }
  return found;
}

void define_decode(py::module_& m) {
  using Segments = std::vector<std::pair<PackedArrays, PackedArrays>>;
  py::class_<Attention>(m, "KvAttention", "Segments of keys and values, the window, and what else there may be.")
      .def(py::init<Segments, TokenArray, TokenArray, py::array, OptionalArray, OptionalArray, float, float>(),
           py::arg("segments"), py::arg("window_k"), py::arg("window_v"), py::arg("window"), py::arg("sinks"),
           py::arg("first"), py::kw_only(), py::arg("scale"), py::arg("softcap"));
  py::class_<kv::DecodeCut>(m, "KvDecodeCut", "What decides into how many splits the slots of a head are cut.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::kw_only(), py::arg("places"), py::arg("slots"),
           py::arg("start"), py::arg("merge"));
  m.def("kv_decode", &kv_decode, py::arg("placement"), py::arg("q"), py::arg("attention"), py::arg("out"),
        py::arg("cut"), "Results, written over a copy of `out`, and the logarithms of sums.");
}

}  // namespace

void define_kv(py::module_& m) {
  py::class_<Placement>(m, "KvPlacement", "On what a KV cache's op runs.")
      .def(py::init([](const std::string& device, int workers) { return Placement{device, 0, 0, workers}; }),
           py::arg("device"), py::kw_only(), py::arg("workers") = 1);
  py::class_<TokenArray>(m, "KvTokens", "Tokens at the beginning of each dimension of an array.")
      .def(py::init<py::array, int64_t, int64_t, int64_t, bool, int>(), py::arg("array"), py::kw_only(),
           py::arg("heads"), py::arg("tokens"), py::arg("width"), py::arg("transposed") = false,
           py::arg("misalignment") = 0);
  py::class_<PackedArrays>(m, "KvPacked", "Codes, scales and channel factors, and the blocks that they lie in.")
      .def(py::init<py::array, py::array, OptionalArray, py::array, py::array, int, int, int>(), py::arg("codes"),
           py::arg("scales"), py::arg("channels"), py::arg("starts"), py::arg("counts"), py::kw_only(), py::arg("bits"),
           py::arg("axis"), py::arg("misalignment") = 0);
  m.def("kv_quantize", &kv_quantize, py::arg("placement"), py::arg("x"), py::arg("index"), py::arg("to"),
        "Codes, scales and channel factors, written over copies of those of `to`.");
  m.def("kv_dequantize", &kv_dequantize, py::arg("placement"), py::arg("packed"), py::arg("index"), py::arg("out"),
        "Tokens, written over a copy of those of `out`.");
  m.def("kv_saliency", &kv_saliency, py::arg("placement"), py::arg("q"), py::arg("k"), py::arg("positions"),
        py::arg("mask"), py::arg("lse"), py::kw_only(), py::arg("scale"), py::arg("softcap"), "Column sums.");
  m.def("kv_project", &kv_project, py::arg("placement"), py::arg("x"), py::arg("bases"), py::arg("turns"),
        py::arg("out"), py::arg("heads"), py::kw_only(), py::arg("misalignment"),
        "Projections, written over copies of `out`.");
  define_decode(m);
}

}  // namespace singlepass::pybind
