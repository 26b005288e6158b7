// SPDX-License-Identifier: Apache-2.0
#include "kv/decode_codes.h"
#include "kv/decode_restored.h"

namespace singlepass::kv {
namespace {

constexpr size_t kMostShared = 48 << 10;  // that a launch has without asking
constexpr int kDecodeBlocks = 3;          // of a multiprocessor, as many as registers are limited for

// Whether what belongs to a head begins at a multiple of `alignment` bytes.
template <class T>
bool is_aligned(const PerHead<T>& x, int64_t alignment) {
  const int64_t size = sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(alignment) == 0 &&
         x.batch_stride * size % alignment == 0 && x.head_stride * size % alignment == 0;
}

// Whether a lane's words can be loaded as vectors: all of them are there, and aligned.
bool is_vector(const Packed& packed, int64_t channels) {
  return packed.width % channels == 0 && is_aligned(packed.codes, 2 * packed.bits);
}

// Whether steps are those of a key's channels or of a whole token, and tensor cores can take the codes.
bool is_folded(const Segment& s) {
  const bool rows = s.values.groups == 1 && (s.keys.axis == Axis::kChannel || s.keys.groups == 1);
  return rows && is_aligned(s.keys.codes, 4) && is_aligned(s.keys.scales, s.keys.axis == Axis::kChannel ? 8 : 4) &&
         is_aligned(s.values.codes, 4) && is_aligned(s.values.scales, 4);
}

// Whether blocks of tokens are so small that a warp had better take one by itself, and shared memory holds what each
// needs.
bool is_apart(const Decode& p, const Segment& s) {
  return s.slots <= kChunk * s.blocks.number && CodesShared::bytes(p, kDecodeWarps) <= kMostShared;
}

DeviceDecode on_device(const Decode& p, void* workspace, const DecodeCut& cut) {
  DeviceDecode d = {};
  static_cast<DecodeArguments&>(d) = p;
  d.number = static_cast<int>(p.segments.size());
  d.tiles = (p.rows() + kRowTile - 1) / kRowTile;
  d.slabs = (p.value_width + kSlab - 1) / kSlab;
  d.vectors = true;
  int64_t slots = 0;
  for (int i = 0; i < d.number; ++i) {
    d.segments[i] = p.segments[static_cast<size_t>(i)];
    d.vectors = d.vectors && is_vector(d.segments[i].keys, kUnit) && is_vector(d.segments[i].values, kSlab);
    d.folded[i] = is_folded(d.segments[i]);
    d.apart[i] = d.folded[i] && is_apart(p, d.segments[i]);
    slots += d.segments[i].slots;
  }
  const int64_t spans = std::max<int64_t>(1, cut.spans / std::max<int64_t>(1, d.tiles));
  d.span = (std::max<int64_t>(1, slots) + spans * cut.least - 1) / (spans * cut.least) * cut.least;
  d.window_span = cut.window_least * std::max<int64_t>(1, d.tiles);
  for (int i = 0; i < d.number; ++i) {
    d.segment_spans[i] = (d.segments[i].slots + d.span - 1) / d.span;
    d.spans += d.segment_spans[i];
  }
  d.spans += std::max<int64_t>(1, (p.window_slots + d.window_span - 1) / d.window_span);
  d.partials = static_cast<float*>(workspace);
  return d;
}

// Costs a read of the codes of a span, and a write of its result; keys are read again for each slab.
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks) decode_kernel(const __grid_constant__ DeviceDecode p) {
  SINGLEPASS_SHARED(Work, work);
  if (threadIdx.x == 0) work.find(p);
  __syncthreads();
  if (work.segment < 0 || !p.folded[work.segment]) {
    RestoredAttention(p, work, *dynamic_shared<RestoredShared>()).run();
  } else {
    CodesAttention(p, work, *dynamic_shared<CodesShared>()).run();
  }
}

// A thread block merges the spans of one row, in their order.
__global__ void __launch_bounds__(kDecodeThreads) merge_kernel(const __grid_constant__ DeviceDecode p) {
  const int64_t r = blockIdx.x % p.rows(), head = blockIdx.x / p.rows();
  const int64_t b = head / p.heads, query_head = head % p.heads * p.group + r / p.queries, query = r % p.queries;
  const int64_t tile = r / kRowTile, row = r % kRowTile;
  const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[query_head];
  float most = sink;
  for (int64_t span = threadIdx.x % kWarp; span < p.spans; span += kWarp) {
    most = fmaxf(most, Partial(p, head, tile, span).most[row]);
  }
  for (int offset = 1; offset < kWarp; offset *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
  const float relative = reference(most);
  const float sink_weight = exp_of_negative(sink - relative);

  for (int64_t first = 0; first < p.value_width; first += kDecodeThreads) {
    const int64_t channel = first + threadIdx.x;
    const bool active = channel < p.value_width;
    float sum = sink_weight, out = 0.0f;
    for (int64_t span = 0; span < p.spans; ++span) {
      const Partial part(p, head, tile, span);
      const float factor = exp_of_negative(part.most[row] - relative);
      sum = multiply_add(part.sum[row], factor, sum);
      if (active) out = multiply_add(part.out[row * p.value_width + channel], factor, out);
    }
    if (active) {
      const float result = out * (sum == 0.0f ? 0.0f : 1.0f / sum);
      const Raw<1> raw = encode_any_nan<1>(&result, p.out.dtype);
      store(raw, p.out.dtype, p.out.at(b, query_head, query), channel);
    }
    if (channel == 0) {
      p.lse[(b * p.heads * p.group + query_head) * p.queries + query] = sum == 0.0f ? -INFINITY : most + logf(sum);
    }
  }
}

}  // namespace

int64_t decode_workspace(const Decode& p, const DecodeCut& cut) {
  if (p.segments.size() > kMaxSegments) return 0;
  const DeviceDecode d = on_device(p, nullptr, cut);
  return d.batch * d.heads * d.tiles * d.spans * partial_size(d) * static_cast<int64_t>(sizeof(float));
}

cudaError_t launch_decode(const Decode& p, void* workspace, cudaStream_t stream, const DecodeCut& cut) {
  if (p.segments.size() > kMaxSegments) return cudaErrorInvalidValue;
  if (p.batch * p.heads * p.rows() == 0) return cudaSuccess;
  const DeviceDecode d = on_device(p, workspace, cut);
  const bool apart = std::any_of(d.apart, d.apart + d.number, [](bool is) { return is; });
  const size_t bytes = std::max(CodesShared::bytes(p, apart ? kDecodeWarps : 1), RestoredShared::bytes(p));
  const dim3 blocks(static_cast<unsigned>(d.batch * d.heads * d.tiles * d.spans * d.slabs));
  const cudaError_t error = launch(&decode_kernel, blocks, dim3(kDecodeThreads), bytes, stream, d);
  if (error != cudaSuccess) return error;
  const dim3 rows(static_cast<unsigned>(d.batch * d.heads * d.rows()));
  return launch(&merge_kernel, rows, dim3(kDecodeThreads), 0, stream, d);
}

}  // namespace singlepass::kv
