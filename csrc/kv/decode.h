// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "common/math.h"
#include "common/raw.h"
#include "common/reduce.h"
#include "kv/cuda.h"

// How attention over compressed tokens is cut: a thread block takes a tile of rows of one head over a span of slots of
// one segment or of the window, for a slab of the values' channels. Rows are the queries of the head's group, one query
// head after another.
namespace singlepass::kv {

inline constexpr int kDecodeThreads = 128;
inline constexpr int kDecodeWarps = kDecodeThreads / kWarp;
inline constexpr int kRowTile = 8;
inline constexpr int kSlab = 128;  // channels of values, whose sums fit registers

struct DeviceDecode : DecodeArguments {
  Segment segments[kMaxSegments];
  int number;                 // of segments
  bool folded[kMaxSegments];  // whether steps are rows', and codes stand in aligned words: tensor cores take them
  bool apart[kMaxSegments];   // whether each warp of those takes blocks of its own
  bool vectors;               // whether all folded codes can be loaded as vectors
  int64_t span, window_span;  // slots
  int64_t segment_spans[kMaxSegments];  // spans of each
  int64_t spans, tiles, slabs;          // of a head
  float* partials;                      // (batch, heads, tiles, spans) of partial_size
};

// What a thread block works on, in shared memory: registers are for what is in the loops. `head` counts those of all
// sequences.
struct Work {
  int slab, tile, span, head, b, h;
  int begin, end;
  int segment;  // -1: the window

  __device__ void find(const DeviceDecode& p) {
    unsigned index = blockIdx.x;
    const auto next = [&index](int64_t size) {
      const unsigned digit = index % static_cast<unsigned>(size);
      index /= static_cast<unsigned>(size);
      return static_cast<int>(digit);
    };
    slab = next(p.slabs);
    tile = next(p.tiles);
    span = next(p.spans);
    head = index;
    h = next(p.heads);
    b = index;
    int64_t at = span;
    for (segment = 0; segment < p.number && at >= p.segment_spans[segment]; ++segment) at -= p.segment_spans[segment];
    if (segment == p.number) {
      const int64_t first = p.window[b * p.window_stride], last = p.window[b * p.window_stride + 1];
      segment = -1;
      begin = static_cast<int>(max_of(first, at * p.window_span));
      end = static_cast<int>(min_of(last, (at + 1) * p.window_span));
    } else {
      const int64_t first = p.first == nullptr ? 0 : p.first[(segment * p.batch + b) * p.heads + h];
      begin = static_cast<int>(max_of(first, at * p.span));
      end = static_cast<int>(min_of(p.segments[segment].slots, (at + 1) * p.span));
    }
  }

  __device__ static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
  __device__ static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

  __device__ int first_channel() const { return slab * kSlab; }
  __device__ int64_t channels(const DeviceDecode& p) const { return min_of(kSlab, p.value_width - first_channel()); }
  __device__ int64_t rows(const DeviceDecode& p) const { return min_of(kRowTile, p.rows() - tile * kRowTile); }
};

// Most, sum and weighted values of each row of a tile: a softmax that is not finished.
SINGLEPASS_HD int64_t partial_size(const DecodeArguments& p) {
  return kRowTile * (2 + p.value_width);
}

struct Partial {
  float* most;  // (kRowTile,)
  float* sum;   // (kRowTile,)
  float* out;   // (kRowTile, value_width)

  __device__ Partial(const DeviceDecode& p, int64_t head, int64_t tile, int64_t span) {
    most = p.partials + ((head * p.tiles + tile) * p.spans + span) * partial_size(p);
    sum = most + kRowTile;
    out = sum + kRowTile;
  }
  __device__ Partial(const DeviceDecode& p, const Work& work) : Partial(p, work.head, work.tile, work.span) {}
};

// Element d of a row of queries, scaled; rows that are not there are zeros.
__device__ __forceinline__ float query(const DeviceDecode& p, const Work& work, int row, int64_t d) {
  const int64_t r = work.tile * kRowTile + row;
  if (r >= p.rows()) return 0.0f;
  const char* from = p.q.at(work.b, work.h * p.group + r / p.queries, r % p.queries);
  Raw<1> raw;
  float x;
  load(from, p.q.dtype, d, raw);
  decode(raw, p.q.dtype, &x);
  return x * p.scale;
}

__device__ __forceinline__ float capped(float logit, float softcap, float inverse) {
  return softcap * tanhf(logit * inverse);
}

// The largest logit yet as weights are relative to it, where none was seen too.
__device__ __forceinline__ float reference(float most) {
  return most == -INFINITY ? 0.0f : most;
}

// The block of tokens in which a span begins, found by all threads together. `shared` is one int.
__device__ __forceinline__ int first_block(const Blocks& blocks, int begin, int& shared) {
  for (int i = threadIdx.x; i < blocks.number; i += kDecodeThreads) {
    if (blocks.starts[i] <= begin && begin < blocks.starts[i + 1]) shared = i;
  }
  if (threadIdx.x == 0 && begin >= blocks.starts[blocks.number]) shared = static_cast<int>(blocks.number);
  __syncthreads();
  return shared;
}

// Calls body(block, begin, end) for the tokens of blocks that are within a span: every one, or every `step`-th from
// number `at` on.
template <class Body>
__device__ __forceinline__ void for_each_block(const Segment& s, const Work& work, int& shared, const Body& body,
                                               int at = 0, int step = 1) {
  if (work.begin >= work.end) return;
  for (int i = first_block(s.blocks, work.begin, shared) + at; i < s.blocks.number; i += step) {
    const int start = s.blocks.starts[i];
    if (start >= work.end) break;
    const int begin = start > work.begin ? start : work.begin;
    const int end = static_cast<int>(Work::min_of(work.end, start + s.blocks.count(work.b, i)));
    if (begin < end) body(i, begin, end);
  }
}

}  // namespace singlepass::kv
