// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"

// The ops' arguments as raw pointers. python/singlepass/_ops/kv.py says what they mean.
namespace singlepass::kv {

inline constexpr int kMaxHeadDim = 512;

// Tokens (batch, heads, tokens, head_dim) whose channels are contiguous.
struct Tokens {
  void* data;
  DType dtype;
  int64_t batch_stride, head_stride, token_stride;  // in elements

  SINGLEPASS_HD char* at(int64_t b, int64_t h, int64_t token) const {
    return static_cast<char*>(data) + (b * batch_stride + h * head_stride + token * token_stride) * size_of(dtype);
  }
};

// An array (batch, heads, ...) that is contiguous from the third dimension on.
template <class T>
struct PerHead {
  T* data;
  int64_t batch_stride, head_stride;

  SINGLEPASS_HD T* at(int64_t b, int64_t h) const { return data + b * batch_stride + h * head_stride; }
};

enum class Axis : int { kChannel = 0, kToken = 1 };

// Compressed tokens. Data of what is missing is null.
struct Packed {
  PerHead<uint8_t> codes;
  PerHead<uint16_t> scales, channels;
  int bits;
  Axis axis;
  int64_t head_dim, groups;  // channels, and groups of them where steps belong to tokens

  SINGLEPASS_HD int64_t bytes() const { return head_dim * bits / 8; }
  SINGLEPASS_HD uint8_t* codes_at(int64_t b, int64_t h, int64_t slot) const { return codes.at(b, h) + slot * bytes(); }
  // Steps, which as many minima follow, of a token or of a block.
  SINGLEPASS_HD uint16_t* scales_at(int64_t b, int64_t h, int64_t slot, int64_t block) const {
    return scales.at(b, h) + (axis == Axis::kChannel ? block * 2 * head_dim : slot * 2 * groups);
  }
  SINGLEPASS_HD uint16_t* channels_at(int64_t b, int64_t h, int64_t block) const {
    return channels.at(b, h) + block * head_dim;
  }
};

// Which slots hold tokens.
struct Blocks {
  const int32_t* starts;
  PerHead<const int32_t> counts;
  int64_t num_blocks;

  SINGLEPASS_HD int64_t count(int64_t b, int64_t h, int64_t block) const { return counts.at(b, h)[block]; }
  // The end of the last block: slots from there on are room for more.
  SINGLEPASS_HD int64_t used() const { return starts[num_blocks]; }
};

struct CodecCall {
  int64_t batch, heads, tokens;  // of `plain`
  Packed packed;
  Blocks blocks;
  PerHead<const int32_t> index;  // data is null: slot s holds token s
  Tokens plain;
  int64_t slots;  // of codes

  SINGLEPASS_HD int64_t token(int64_t b, int64_t h, int64_t slot) const {
    return index.data == nullptr ? slot : index.at(b, h)[slot];
  }
};

struct Saliency {
  int64_t batch, heads, group_size, probes, tokens, head_dim;
  Tokens q, k;  // q: the heads of a group follow one another
  const int64_t* positions;
  const bool* mask;  // null: all are tokens
  int64_t mask_stride;
  const float* lse;  // null: of what is seen in k
  float scale, softcap;
  float* sums;
};

struct Segment {
  Packed keys, values;
  Blocks blocks;
  int64_t slots;
};

// Tokens that come with their queries, one for each, and go to the last slots of the window that are seen. `kept` is a
// copy of the queries. Data is null where there are none.
struct NewTokens {
  Tokens k, v, kept;
};

struct DecodeArguments {
  int64_t batch, heads, group_size, queries, head_dim, value_dim;
  NewTokens added;
  Tokens q, window_k, window_v;
  int64_t window_slots;
  const int32_t* window;  // window[b * window_stride + 0 or 1]
  int64_t window_stride;
  const float* sinks;    // null: none
  const int32_t* first;  // (segments, batch, heads); null: all are seen
  float scale, softcap;
  Tokens out;
  float* lse;

  SINGLEPASS_HD int64_t rows() const { return group_size * queries; }
};

struct Decode : DecodeArguments {
  std::vector<Segment> segments;
};

// A head of one of the tensors of tokens, and its basis: (channels, rank), a row for each channel.
struct Projected {
  size_t source;  // of Projection::sources
  int64_t head, rank;
  const float* basis;
  Tokens out;
  int64_t place;  // among the heads of out
};

struct Source {
  Tokens x;
  int64_t head_dim;
};

struct Projection {
  int64_t batch, group_size, tokens;  // group_size: heads of x and of out for each of those numbered
  std::vector<Source> sources;
  std::vector<Projected> heads;
  Tokens cos, sin;  // for all heads of the first source; data is null: nothing is rotated
  int64_t rotated;  // channels
};

// Segments that decode takes on GPUs.
inline constexpr size_t kMaxSegments = 4;

// What decides into how many splits the slots of a head are cut on a GPU (decode_cut.h). Costs are in units of a bit of
// each channel of a slot; `start` and `merge` are those of a thread block and of merging one split.
struct DecodeCut {
  int64_t places = 0;   // thread blocks that run at the same time; 0: as many as on this GPU
  int64_t slots = 128;  // splits are multiples of it
  int64_t start = 500, merge = 6;
};

void quantize(const CodecCall& p, const ParallelFor& parallel_for);
void dequantize(const CodecCall& p, const ParallelFor& parallel_for);
void saliency(const Saliency& p, const ParallelFor& parallel_for);
void decode(const Decode& p, const ParallelFor& parallel_for);
void project(const Projection& p, const ParallelFor& parallel_for);

// Each in one launch.
void quantize(const CodecCall& p, const Gpu& gpu);
void dequantize(const CodecCall& p, const Gpu& gpu);

// In two launches, or in one where the logarithms of sums are given.
void saliency(const Saliency& p, const Gpu& gpu);

// In one launch: a softmax over each split; the last thread block of a head merges them in the order of splits. Results
// are the same bits in every run on one kind of GPU.
void decode(const Decode& p, const Gpu& gpu, const DecodeCut& cut = {});

// In one launch for every 32 heads of keys and values.
void project(const Projection& p, const Gpu& gpu);

}  // namespace singlepass::kv
