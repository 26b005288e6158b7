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
  return packed.head_dim % channels == 0 && is_aligned(packed.codes, 2 * packed.bits);
}

// Whether scales factor out of the products (they belong to key channels, or to whole tokens), and codes are aligned so
// that tensor cores can take them.
bool runs_on_codes(const Segment& s) {
  const bool rows = s.values.groups == 1 && (s.keys.axis == Axis::kChannel || s.keys.groups == 1);
  return rows && is_aligned(s.keys.codes, 4) && is_aligned(s.keys.scales, s.keys.axis == Axis::kChannel ? 8 : 4) &&
         is_aligned(s.values.codes, 4) && is_aligned(s.values.scales, 4);
}

// Whether blocks are so small that a warp had better take one by itself, and shared memory holds what each warp needs.
bool is_per_warp(const Decode& p, const Segment& s) {
  return s.slots <= kChunk * s.blocks.num_blocks && CodesShared::bytes(p, kDecodeWarps) <= kMostShared;
}

DeviceDecode on_device(const Decode& p, const Gpu& gpu, const DecodeCut& cut) {
  DeviceDecode d = {};
  static_cast<DecodeArguments&>(d) = p;
  d.num_segments = static_cast<int>(p.segments.size());
  d.tiles = (p.rows() + kRowTile - 1) / kRowTile;
  d.value_tiles = (p.value_dim + kValueTile - 1) / kValueTile;
  d.vectors = true;
  int64_t slots = 0;
  for (int i = 0; i < d.num_segments; ++i) {
    d.segments[i] = p.segments[static_cast<size_t>(i)];
    d.vectors = d.vectors && is_vector(d.segments[i].keys, kKeyTile) && is_vector(d.segments[i].values, kValueTile);
    d.on_codes[i] = runs_on_codes(d.segments[i]);
    d.per_warp[i] = d.on_codes[i] && is_per_warp(p, d.segments[i]);
    slots += d.segments[i].slots;
  }
  const int64_t splits = std::max<int64_t>(1, cut.splits / std::max<int64_t>(1, d.tiles));
  d.split = (std::max<int64_t>(1, slots) + splits * cut.min_slots - 1) / (splits * cut.min_slots) * cut.min_slots;
  d.window_split = cut.min_window_slots * std::max<int64_t>(1, d.tiles);
  for (int i = 0; i < d.num_segments; ++i) {
    d.segment_splits[i] = (d.segments[i].slots + d.split - 1) / d.split;
    d.splits += d.segment_splits[i];
  }
  d.splits += std::max<int64_t>(1, (p.window_slots + d.window_split - 1) / d.window_split);
  const int64_t numbers = d.batch * d.heads * d.tiles * d.splits * partial_size(d);
  d.partials = static_cast<float*>(gpu.allocate(numbers * static_cast<int64_t>(sizeof(float))));
  return d;
}

// Reads the codes of a split once and writes its partial result. Keys are read again for each tile of value channels.
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks) decode_kernel(const __grid_constant__ DeviceDecode p) {
  SINGLEPASS_SHARED(Work, work);
  if (threadIdx.x == 0) work.find(p);
  __syncthreads();
  if (work.segment < 0 || !p.on_codes[work.segment]) {
    RestoredAttention(p, work, *dynamic_shared<RestoredShared>()).run();
  } else {
    CodesAttention(p, work, *dynamic_shared<CodesShared>()).run();
  }
}

// A thread block merges the splits of one row, in their order, so that the sums are the same bits every time.
__global__ void __launch_bounds__(kDecodeThreads) merge_kernel(const __grid_constant__ DeviceDecode p) {
  const int64_t r = blockIdx.x % p.rows(), head = blockIdx.x / p.rows();
  const int64_t b = head / p.heads, query_head = head % p.heads * p.group_size + r / p.queries, query = r % p.queries;
  const int64_t tile = r / kRowTile, row = r % kRowTile;
  const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[query_head];
  float row_max = sink;
  for (int64_t split = threadIdx.x % kWarp; split < p.splits; split += kWarp) {
    row_max = fmaxf(row_max, Partial(p, head, tile, split).row_max[row]);
  }
  for (int offset = 1; offset < kWarp; offset *= 2) {
    row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, offset));
  }
  const float relative = safe_max(row_max);
  const float sink_weight = exp_of_negative(sink - relative);

  for (int64_t first = 0; first < p.value_dim; first += kDecodeThreads) {
    const int64_t channel = first + threadIdx.x;
    const bool active = channel < p.value_dim;
    float sum = sink_weight, out = 0.0f;
    for (int64_t split = 0; split < p.splits; ++split) {
      const Partial part(p, head, tile, split);
      const float factor = exp_of_negative(part.row_max[row] - relative);
      sum = multiply_add(part.row_sum[row], factor, sum);
      if (active) out = multiply_add(part.out[row * p.value_dim + channel], factor, out);
    }
    if (active) {
      const float result = out * (sum == 0.0f ? 0.0f : 1.0f / sum);
      const Raw<1> raw = encode_any_nan<1>(&result, p.out.dtype);
      store(raw, p.out.dtype, p.out.at(b, query_head, query), channel);
    }
    if (channel == 0) {
      p.lse[(b * p.heads * p.group_size + query_head) * p.queries + query] =
          sum == 0.0f ? -INFINITY : row_max + logf(sum);
    }
  }
}

}  // namespace

void decode(const Decode& p, const Gpu& gpu, const DecodeCut& cut) {
  if (p.segments.size() > kMaxSegments) {
    throw std::runtime_error(std::string(gpu.op) + ": expected at most " + std::to_string(kMaxSegments) +
                             " segments on CUDA; got " + std::to_string(p.segments.size()) +
                             ". Use backend=\"eager\" for more.");
  }
  if (p.batch * p.heads * p.rows() == 0) return;
  const DeviceDecode d = on_device(p, gpu, cut);
  const bool per_warp = std::any_of(d.per_warp, d.per_warp + d.num_segments, [](bool is) { return is; });
  const size_t bytes = std::max(CodesShared::bytes(p, per_warp ? kDecodeWarps : 1), RestoredShared::bytes(p));
  const dim3 blocks(static_cast<unsigned>(d.batch * d.heads * d.tiles * d.splits * d.value_tiles));
  launch(&decode_kernel, blocks, dim3(kDecodeThreads), bytes, gpu, d);
  const dim3 rows(static_cast<unsigned>(d.batch * d.heads * d.rows()));
  launch(&merge_kernel, rows, dim3(kDecodeThreads), 0, gpu, d);
}

}  // namespace singlepass::kv
