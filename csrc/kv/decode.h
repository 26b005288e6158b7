// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "common/cuda.h"
#include "common/math.h"
#include "common/raw.h"
#include "common/reduce.h"
#include "kv/decode_cut.h"
#include "kv/problem.h"

// How decode attention is divided: a thread block takes one tile of rows of one head, one split of the slots of a
// segment or of the window, and one tile of value channels. Rows are the queries of all query heads that share the head
// of keys, one query head after another.
namespace singlepass::kv {

inline constexpr int kDecodeThreads = 128;
inline constexpr int kDecodeWarps = kDecodeThreads / kWarp;
inline constexpr int kValueTile = 128;  // value channels, whose sums fit in registers

struct DeviceDecode : DecodeArguments {
  Segment segments[kMaxSegments];
  int num_segments;
  bool on_codes[kMaxSegments];                                  // tensor cores multiply the codes themselves
  float largest[kMaxSegments];                                  // integer that a query becomes
  bool vector_queries, vector_keys, vector_values, vector_out;  // accessed as such; keys and values of the window
  bool vector_added;                                            // copied so
  float inverse_softcap;
  int row_tile;
  Stretch stretches[kMaxSegments + 1];  // the segments, and then the window
  int64_t splits, tiles, value_tiles;   // of a head
  float* partials;                      // (batch, heads, tiles, splits) of partial_size
  unsigned* tickets;                    // (batch, heads, tiles)
};

__device__ __forceinline__ int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// What a thread block works on. It stands in shared memory, because registers are needed for what is in the loops.
// `head` counts the heads of all sequences.
struct Work {
  int value_tile, tile, split, head, b, h;
  int begin, end;
  int segment;            // -1: the window
  const int32_t* counts;  // of the head, as what follows
  const uint16_t *key_scales, *value_scales, *channel_factors;
  float largest, inverse;  // the largest integer that a query becomes, and 1 / largest

  __device__ void find(const DeviceDecode& p) {
    unsigned index = blockIdx.x;
    const auto next = [&index](int64_t size) {
      const unsigned digit = index % static_cast<unsigned>(size);
      index /= static_cast<unsigned>(size);
      return static_cast<int>(digit);
    };
    value_tile = next(p.value_tiles);
    tile = next(p.tiles);
    head = next(p.batch * p.heads);
    split = index;
    b = head / static_cast<unsigned>(p.heads);
    h = head - b * static_cast<int>(p.heads);
    int at = split;
    for (segment = 0; at >= p.stretches[segment].splits; ++segment) at -= p.stretches[segment].splits;
    const Stretch& stretch = p.stretches[segment];
    int64_t first = 0, last = stretch.slots;
    if (segment == p.num_segments) {
      segment = -1;
      first = p.window[b * p.window_stride], last = p.window[b * p.window_stride + 1];
    } else if (p.first != nullptr) {
      first = p.first[(segment * p.batch + b) * p.heads + h];
    }
    begin = static_cast<int>(larger(first, stretch.begin(at)));
    end = static_cast<int>(smaller(last, stretch.begin(at + 1)));
    if (segment >= 0) {
      const Segment& s = p.segments[segment];
      end = static_cast<int>(smaller(end, s.blocks.used()));  // slots from there on are room for more
      largest = p.largest[segment];
      inverse = 1.0f / largest;
      counts = s.blocks.counts.at(b, h);
      key_scales = s.keys.scales.at(b, h);
      value_scales = s.values.scales.at(b, h);
      channel_factors = s.values.channels.data == nullptr ? nullptr : s.values.channels.at(b, h);
    }
  }

  __device__ int first_channel() const { return value_tile * kValueTile; }
  __device__ int64_t channels(const DeviceDecode& p) const {
    return smaller(kValueTile, p.value_dim - first_channel());
  }
  __device__ int rows(const DeviceDecode& p) const {
    return static_cast<int>(smaller(p.row_tile, p.rows() - tile * p.row_tile));
  }
};

// The unfinished softmax of a tile: for each row what its weights are relative to, their sum, and the weighted values.
SINGLEPASS_HD int64_t partial_size(const DeviceDecode& p) {
  return p.row_tile * (2 + p.value_dim);
}

struct Partial {
  float* row_max;  // (row_tile,)
  float* row_sum;  // (row_tile,)
  float* out;      // (row_tile, value_dim)

  __device__ Partial(const DeviceDecode& p, int64_t head, int64_t tile, int64_t split) {
    row_max = p.partials + ((head * p.tiles + tile) * p.splits + split) * partial_size(p);
    row_sum = row_max + p.row_tile;
    out = row_sum + p.row_tile;
  }
  __device__ Partial(const DeviceDecode& p, const Work& work) : Partial(p, work.head, work.tile, work.split) {}
};

// Where row r of a head's queries or results stands.
__device__ __forceinline__ char* row_of(const DeviceDecode& p, const Tokens& tokens, int64_t b, int64_t h, int64_t r) {
  const unsigned row = static_cast<unsigned>(r), queries = static_cast<unsigned>(p.queries);
  const unsigned member = queries == 1 ? row : row / queries;
  return tokens.at(b, h * p.group_size + member, row - member * queries);
}

__device__ __forceinline__ float capped(const DeviceDecode& p, float logit) {
  return p.softcap * tanhf(logit * p.inverse_softcap);
}

// The row maximum to subtract, or 0 for a row that has seen no token, which avoids -inf - -inf.
__device__ __forceinline__ float safe_max(float row_max) {
  return row_max == -INFINITY ? 0.0f : row_max;
}

// The block of tokens that a slot lies in. The lanes of a warp search together, each at one of 32 places at a time.
__device__ __forceinline__ int block_of(const Blocks& blocks, int slot) {
  int first = 0;
  for (int size = static_cast<int>(blocks.num_blocks) + 1; size > 1;) {
    const int step = (size + kWarp - 1) / kWarp, at = static_cast<int>(threadIdx.x % kWarp) * step;
    const bool before = at < size && global_memory(blocks.starts)[first + at] <= slot;
    const int last = (__popc(__ballot_sync(kAllLanes, before)) - 1) * step;
    first += last;
    size = size - last < step ? size - last : step;
  }
  return first;
}

// Calls body(block, begin, end) for the tokens of each block within [begin, end), for all lanes of a warp. What is
// known of the next block is loaded before.
template <class Body>
__device__ __forceinline__ void for_each_block(const Segment& s, const Work& work, int begin, int end,
                                               const Body& body) {
  if (begin >= end) return;
  const int num_blocks = static_cast<int>(s.blocks.num_blocks);
  const auto start_of = [&](int block) { return global_memory(s.blocks.starts)[block]; };
  const auto count_of = [&](int block) { return block < num_blocks ? global_memory(work.counts)[block] : 0; };
  int block = block_of(s.blocks, begin), start = start_of(block), count = count_of(block);
  while (block < num_blocks && start < end) {
    const int next = block + 1, next_start = start_of(next), next_count = count_of(next);
    const int first = start > begin ? start : begin, last = start + count < end ? start + count : end;
    if (first < last) body(block, first, last);
    block = next, start = next_start, count = next_count;
  }
}

}  // namespace singlepass::kv
