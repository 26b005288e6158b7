// SPDX-License-Identifier: Apache-2.0
#include "kv/decode_added.h"
#include "kv/decode_codes.h"
#include "kv/decode_merge.h"
#include "kv/decode_restored.h"
#include "kv/decode_window.h"

namespace singlepass::kv {
namespace {

constexpr size_t kMostShared = (48 << 10) - sizeof(Work);  // that a launch has without asking
constexpr int kUsualWidth = 128;                           // of heads, for which kernels have a variant of their own

// Thread blocks of a multiprocessor, as many as registers are limited for. With one more, compilers would spill: for
// heads of any width, and for consumer Blackwell with two tiles.
constexpr int decode_blocks(int width, int tiles) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  const bool fewer = width == 0 || tiles == 2;
#else
  const bool fewer = width == 0;
#endif
  return 5 - tiles - (fewer ? 1 : 0);
}

// Whether what belongs to a head begins at a multiple of `alignment` bytes.
template <class T>
bool is_aligned(const PerHead<T>& x, int64_t alignment) {
  const int64_t size = sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(alignment) == 0 &&
         x.batch_stride * size % alignment == 0 && x.head_stride * size % alignment == 0;
}

// Whether tensor cores take the codes: scales factor out of the products (they belong to key channels, or to whole
// tokens), there are as many slots as are read at once, and all is aligned: 16 channels of values, words of keys.
bool runs_on_codes(const Segment& s) {
  const bool rows = s.values.groups == 1 && (s.keys.axis == Axis::kChannel || s.keys.groups == 1);
  return rows && s.slots >= kChunk && is_aligned(s.keys.codes, 4) &&
         is_aligned(s.keys.scales, s.keys.axis == Axis::kChannel ? 8 : 4) &&
         is_aligned(s.values.codes, 2 * s.values.bits) && is_aligned(s.values.scales, 4) &&
         is_aligned(s.values.channels, 8);
}

DeviceDecode on_device(const Decode& p, int row_tile, const Gpu& gpu, const DecodeCut& cut) {
  // Costs of a slot, as for DecodeCut: of one that is first decompressed to shared memory, and of the window's.
  constexpr int64_t kRestored = 60;
  const int64_t plain = 4 * (size_of(p.window_k.dtype) + size_of(p.window_v.dtype));
  DeviceDecode d = {};
  static_cast<DecodeArguments&>(d) = p;
  d.num_segments = static_cast<int>(p.segments.size());
  d.row_tile = row_tile;
  d.vector_queries = are_vectors(p.q);
  d.vector_keys = are_vectors(p.window_k);
  d.vector_values = are_vectors(p.window_v);
  d.vector_out = are_vectors(p.out);
  d.vector_added = d.vector_queries && d.vector_keys && d.vector_values && are_vectors(p.added.k) &&
                   are_vectors(p.added.v) && are_vectors(p.added.kept);
  d.inverse_softcap = 1.0f / p.softcap;
  d.tiles = (p.rows() + row_tile - 1) / row_tile;
  d.value_tiles = (p.value_dim + kValueTile - 1) / kValueTile;
  for (int i = 0; i < d.num_segments; ++i) {
    const Segment& s = d.segments[i] = p.segments[static_cast<size_t>(i)];
    d.on_codes[i] = runs_on_codes(s);
    d.largest[i] = largest_integer(s.keys.bits, p.head_dim);
    d.stretches[i] = {s.slots, cut.slots, d.on_codes[i] ? s.keys.bits + 2 : kRestored};  // a fewth for scales
  }
  d.stretches[d.num_segments] = {p.window_slots, cut.slots, plain};
  const int64_t merged = d.batch * d.heads * d.tiles;
  d.splits = cut_stretches(d.stretches, d.num_segments + 1, merged * d.value_tiles, cut);
  const int64_t numbers = merged * d.splits * partial_size(d);
  d.partials = static_cast<float*>(gpu.allocate(numbers * static_cast<int64_t>(sizeof(float))));
  d.tickets = gpu.tickets(merged);
  return d;
}

template <int kBits, int kWidth, int kGroups, int kHalves>
__device__ __forceinline__ void attend_to_codes(const DeviceDecode& p, const Work& work) {
  SINGLEPASS_APART(kBits);
  CodesAttention<kBits, kWidth, kGroups, kHalves>(p, work, *dynamic_shared<CodesShared<kGroups, kHalves>>()).run();
  SINGLEPASS_APART(kBits);
}

// Reads the codes of a split once and writes its partial result; the last block of a tile of rows merges those of all
// splits. Keys are read again for each tile of value channels.
template <int kWidth, int kGroups, int kHalves>
__global__ void __launch_bounds__(kDecodeThreads, decode_blocks(kWidth, kGroups* kHalves))
    decode_kernel(const __grid_constant__ DeviceDecode p) {
  SINGLEPASS_SHARED(Work, work);
  if (threadIdx.x == 0) work.find(p);
  __syncthreads();
  if (p.added.k.data != nullptr) store_added(p, work);
  const int bits = work.segment < 0 || !p.on_codes[work.segment] ? 0 : p.segments[work.segment].keys.bits;
  if (work.segment < 0) {
    WindowAttention<kWidth, kGroups>(p, work, *dynamic_shared<WindowShared<kGroups>>()).run();
    SINGLEPASS_APART(1);
  } else if (bits == 2) {
    attend_to_codes<2, kWidth, kGroups, kHalves>(p, work);
  } else if (bits == 4) {
    attend_to_codes<4, kWidth, kGroups, kHalves>(p, work);
  } else if (bits == 8) {
    attend_to_codes<8, kWidth, kGroups, kHalves>(p, work);
  } else {
    RestoredAttention<4 * kGroups>(p, work, *dynamic_shared<RestoredShared<4 * kGroups>>()).run();
  }
  const unsigned blocks = static_cast<unsigned>(p.splits * p.value_tiles);
  if (is_last_block(&p.tickets[work.head * p.tiles + work.tile], blocks)) merge(p, work);
}

template <int kWidth, int kGroups, int kHalves>
void run(const Decode& p, const Gpu& gpu, DecodeCut cut) {
  const auto kernel = &decode_kernel<kWidth, kGroups, kHalves>;
  const size_t bytes = std::max({CodesShared<kGroups, kHalves>::bytes(p), WindowShared<kGroups>::bytes(p),
                                 RestoredShared<4 * kGroups>::bytes(p), SplitChannels::kBytes});
  if (cut.places == 0) cut.places = resident_blocks(kernel, kDecodeThreads, bytes, gpu);
  const DeviceDecode d = on_device(p, 4 * kGroups, gpu, cut);
  const dim3 blocks(static_cast<unsigned>(d.batch * d.heads * d.tiles * d.splits * d.value_tiles));
  launch(kernel, blocks, dim3(kDecodeThreads), bytes, gpu, d);
}

// Integers of float32 take both tiles of columns. Eight rows of long queries would not fit in shared memory.
template <int kWidth>
void run(const Decode& p, const Gpu& gpu, const DecodeCut& cut) {
  if (p.q.dtype == DType::kFloat32) {
    run<kWidth, 1, 2>(p, gpu, cut);
  } else if (p.rows() > 4 && CodesShared<2, 1>::bytes(p) <= kMostShared) {
    run<kWidth, 2, 1>(p, gpu, cut);
  } else {
    run<kWidth, 1, 1>(p, gpu, cut);
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
  const auto is_usual = [&](const Segment& s) { return is_aligned(s.keys.codes, 8); };
  if (p.head_dim == kUsualWidth && p.value_dim == kUsualWidth &&
      std::all_of(p.segments.begin(), p.segments.end(), is_usual)) {
    run<kUsualWidth>(p, gpu, cut);
  } else {
    run<0>(p, gpu, cut);
  }
}

}  // namespace singlepass::kv
