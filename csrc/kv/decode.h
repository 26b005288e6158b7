// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "common/cuda.h"
#include "common/math.h"
#include "common/raw.h"
#include "common/reduce.h"
#include "kv/problem.h"

// How decode attention is divided: a thread block takes one tile of rows of one head, one split (a stretch of slots of
// a segment, or of the window), and one tile of value channels. Rows are the queries of all query heads that share the
// head of keys, one query head after another.
namespace singlepass::kv {

inline constexpr int kDecodeThreads = 128;
inline constexpr int kDecodeWarps = kDecodeThreads / kWarp;
inline constexpr int kRowTile = 8;
inline constexpr int kValueTile = 128;  // value channels, whose sums fit in registers

struct DeviceDecode : DecodeArguments {
  Segment segments[kMaxSegments];
  int num_segments;
  bool
      on_codes[kMaxSegments];  // scales factor out of the products and codes are 4-byte aligned: tensor cores take them
  bool per_warp[kMaxSegments];           // of those: each warp takes blocks of its own
  bool vectors;                          // all codes of those can be loaded as vectors
  int64_t split, window_split;           // slots in a split
  int64_t segment_splits[kMaxSegments];  // splits of each segment
  int64_t splits, tiles, value_tiles;    // of a head
  float* partials;                       // (batch, heads, tiles, splits) of partial_size
};

// What a thread block works on. It stands in shared memory, because registers are needed for what is in the loops.
// `head` counts the heads of all sequences.
struct Work {
  int value_tile, tile, split, head, b, h;
  int begin, end;
  int segment;  // -1: the window

  __device__ void find(const DeviceDecode& p) {
    unsigned index = blockIdx.x;
    const auto next = [&index](int64_t size) {
      const unsigned digit = index % static_cast<unsigned>(size);
      index /= static_cast<unsigned>(size);
      return static_cast<int>(digit);
    };
    value_tile = next(p.value_tiles);
    tile = next(p.tiles);
    split = next(p.splits);
    head = index;
    h = next(p.heads);
    b = index;
    int64_t at = split;
    for (segment = 0; segment < p.num_segments && at >= p.segment_splits[segment]; ++segment)
      at -= p.segment_splits[segment];
    if (segment == p.num_segments) {
      const int64_t first = p.window[b * p.window_stride], last = p.window[b * p.window_stride + 1];
      segment = -1;
      begin = static_cast<int>(max_of(first, at * p.window_split));
      end = static_cast<int>(min_of(last, (at + 1) * p.window_split));
    } else {
      const int64_t first = p.first == nullptr ? 0 : p.first[(segment * p.batch + b) * p.heads + h];
      begin = static_cast<int>(max_of(first, at * p.split));
      end = static_cast<int>(min_of(p.segments[segment].slots, (at + 1) * p.split));
    }
  }

  __device__ static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
  __device__ static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

  __device__ int first_channel() const { return value_tile * kValueTile; }
  __device__ int64_t channels(const DeviceDecode& p) const { return min_of(kValueTile, p.value_dim - first_channel()); }
  __device__ int64_t rows(const DeviceDecode& p) const { return min_of(kRowTile, p.rows() - tile * kRowTile); }
};

// The unfinished softmax of a tile: maximum, sum and weighted values of each row.
SINGLEPASS_HD int64_t partial_size(const DecodeArguments& p) {
  return kRowTile * (2 + p.value_dim);
}

struct Partial {
  float* row_max;  // (kRowTile,)
  float* row_sum;  // (kRowTile,)
  float* out;      // (kRowTile, value_dim)

  __device__ Partial(const DeviceDecode& p, int64_t head, int64_t tile, int64_t split) {
    row_max = p.partials + ((head * p.tiles + tile) * p.splits + split) * partial_size(p);
    row_sum = row_max + kRowTile;
    out = row_sum + kRowTile;
  }
  __device__ Partial(const DeviceDecode& p, const Work& work) : Partial(p, work.head, work.tile, work.split) {}
};

// Element d of a row of queries, scaled. Rows beyond the last are zeros.
__device__ __forceinline__ float query(const DeviceDecode& p, const Work& work, int row, int64_t d) {
  const int64_t r = work.tile * kRowTile + row;
  if (r >= p.rows()) return 0.0f;
  const char* from = p.q.at(work.b, work.h * p.group_size + r / p.queries, r % p.queries);
  Raw<1> raw;
  float x;
  load(from, p.q.dtype, d, raw);
  decode(raw, p.q.dtype, &x);
  return x * p.scale;
}

__device__ __forceinline__ float capped(float logit, float softcap, float inverse) {
  return softcap * tanhf(logit * inverse);
}

// The row maximum to subtract, or 0 for a row that has seen no token, which avoids -inf - -inf.
__device__ __forceinline__ float safe_max(float row_max) {
  return row_max == -INFINITY ? 0.0f : row_max;
}

// The block of tokens in which a split begins. All threads search together; `shared` is one int.
__device__ __forceinline__ int first_block(const Blocks& blocks, int begin, int& shared) {
  for (int i = threadIdx.x; i < blocks.num_blocks; i += kDecodeThreads) {
    if (blocks.starts[i] <= begin && begin < blocks.starts[i + 1]) shared = i;
  }
  if (threadIdx.x == 0 && begin >= blocks.starts[blocks.num_blocks]) shared = static_cast<int>(blocks.num_blocks);
  __syncthreads();
  return shared;
}

// Calls body(block, begin, end) for the tokens of each block within the split: for every block, or for every `step`-th
// from the `at`-th on.
template <class Body>
__device__ __forceinline__ void for_each_block(const Segment& s, const Work& work, int& shared, const Body& body,
                                               int at = 0, int step = 1) {
  if (work.begin >= work.end) return;
  for (int i = first_block(s.blocks, work.begin, shared) + at; i < s.blocks.num_blocks; i += step) {
    const int start = s.blocks.starts[i];
    if (start >= work.end) break;
    const int begin = start > work.begin ? start : work.begin;
    const int end = static_cast<int>(Work::min_of(work.end, start + s.blocks.count(work.b, work.h, i)));
    if (begin < end) body(i, begin, end);
  }
}

}  // namespace singlepass::kv
