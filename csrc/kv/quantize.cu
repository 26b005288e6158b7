// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "common/cuda.h"
#include "common/math.h"
#include "kv/codec.h"
#include "kv/pieces.h"
#include "kv/problem.h"

// Quantisation, on a grid of (blocks of tokens of all heads, parts). A thread block encodes one block of tokens of one
// head. What belongs to channels (scales, or channel factors) is computed in a first pass over these tokens; the second
// pass, which encodes them, finds them in a cache. Where nothing belongs to channels, `parts` thread blocks share the
// tokens. Minima and maxima do not depend on the order in which they are merged, and so codes do not either.
namespace singlepass::kv {
namespace {

constexpr float kInfinity = INFINITY;

// (warps, channels): the extremes that each warp has found. Once they are merged, row 0 holds what the channels' codes
// are computed with.
struct ByWarp {
  float value[kCodecWarps][kMaxHeadDim];
};

__device__ __forceinline__ float levels(int bits) {
  return static_cast<float>((1 << bits) - 1);
}

// The smaller number, or NaN if either is one; fminf would drop the NaN.
__device__ __forceinline__ float least(float a, float b) {
  return b < a || b != b ? b : a;
}

// Merges the sixteen numbers of each thread with those of the other threads of its warp that have the same channels
// (cut.lanes apart), and writes them to shared memory, (warps, channels).
template <int kBits, class Merge>
__device__ __forceinline__ void merge_rows(const CodecCall& p, const Cut& cut, const PieceCursor& place,
                                           float (&x)[kPiece], ByWarp& to, Merge merge) {
  for (int offset = cut.lanes; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int k = 0; k < kPiece; ++k) x[k] = merge(x[k], __shfl_xor_sync(kAllLanes, x[k], offset));
  }
  if (!place.active || threadIdx.x % kWarp >= static_cast<unsigned>(cut.lanes)) return;
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    to.value[threadIdx.x / kWarp][Piece<kBits>::channel(p.packed, place.column, k)] = x[k];
  }
}

// Merges the numbers of all warps for one channel.
template <class Merge>
__device__ __forceinline__ float merge_warps(const ByWarp& from, int64_t channel, Merge merge) {
  float x = from.value[0][channel];
  for (int w = 1; w < kCodecWarps; ++w) x = merge(x, from.value[w][channel]);
  return x;
}

// Reads row 0 for the channels of the thread's piece.
template <int kBits>
__device__ __forceinline__ void read_channels(const CodecCall& p, const PieceCursor& place, const ByWarp& from,
                                              float (&x)[kPiece]) {
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    x[k] = place.active ? from.value[0][Piece<kBits>::channel(p.packed, place.column, k)] : 0.0f;
  }
}

// Writes zeros to the slots that hold no token: their codes, and their scales if scales belong to tokens.
template <int kBits>
__device__ __forceinline__ void clear_rest(const CodecCall& p, const Cut& cut, const PieceCursor& place) {
  for (int64_t i = place.count + place.row; i < place.size && place.active; i += place.rows) {
    const int64_t slot = place.begin + i;
    Words<kBits>().store(p.packed.codes_at(place.b, place.h, slot) + place.column * 2 * kBits, cut.codes_vectors);
    if (p.packed.axis == Axis::kChannel) continue;
    uint16_t* scales = p.packed.scales_at(place.b, place.h, slot, place.block);
    for (int64_t g = place.column; g < 2 * p.packed.groups; g += p.packed.head_dim / kPiece) scales[g] = 0;
  }
}

// Scales belong to channels: a step and a minimum for each channel of the block.
template <int kBits>
__global__ void __launch_bounds__(kCodecThreads)
    quantize_by_channels_kernel(const __grid_constant__ CodecCall p, const Cut cut) {
  SINGLEPASS_SHARED(ByWarp, lows);
  SINGLEPASS_SHARED(ByWarp, highs);
  const PieceCursor place(p, cut);
  // Stage 1: extremes of the channels. Each thread finds those of its 16 channels over its own tokens; then threads and
  // warps merge theirs. Bits tell channels with an x that is not finite, which fminf and fmaxf would not show.
  float low[kPiece], high[kPiece], x[kPiece];
  uint32_t invalid = 0;
#pragma unroll
  for (int k = 0; k < kPiece; ++k) low[k] = kInfinity, high[k] = -kInfinity;
  for (int64_t i = place.row; i < place.count && place.active; i += place.rows) {
    load_piece<kBits>(p, cut, place, place.begin + i, x);
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      low[k] = fminf(low[k], x[k]);
      high[k] = fmaxf(high[k], x[k]);
      if (!is_finite(x[k])) invalid |= 1u << k;
    }
  }
#pragma unroll
  for (int k = 0; k < kPiece; ++k) low[k] = invalid >> k & 1u ? NAN : low[k];
  const auto most = [](float a, float b) { return fmaxf(a, b); };
  merge_rows<kBits>(p, cut, place, low, lows, least);
  merge_rows<kBits>(p, cut, place, high, highs, most);
  __syncthreads();

  // Stage 2: each thread takes whole channels. It merges a channel's extremes over the warps, writes the scales, and
  // leaves the minimum and 1 / step in shared memory.
  uint16_t* scales = p.packed.scales_at(place.b, place.h, 0, place.block);
  for (int64_t d = threadIdx.x; d < p.packed.head_dim; d += kCodecThreads) {
    const float lowest = merge_warps(lows, d, least), highest = merge_warps(highs, d, most);
    const bool empty = place.count == 0;
    const Steps s =
        steps(empty ? 0.0f : clamped(lowest), empty ? 0.0f : clamped(highest), empty || lowest == lowest, kBits);
    scales[d] = float_to_float16(s.step);
    scales[p.packed.head_dim + d] = float_to_float16(s.minimum);
    lows.value[0][d] = s.minimum;
    highs.value[0][d] = inverse(s.step);
  }
  __syncthreads();

  // Stage 3: each thread encodes its piece of its tokens.
  float minima[kPiece], inverses[kPiece];
  read_channels<kBits>(p, place, lows, minima);
  read_channels<kBits>(p, place, highs, inverses);
  for (int64_t i = place.row; i < place.count && place.active; i += place.rows) {
    load_piece<kBits>(p, cut, place, place.begin + i, x);
    Words<kBits> words;
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      words.bits[words.word(k)] += encode(clamped(x[k]), minima[k], inverses[k], levels(kBits)) << words.shift(k);
    }
    uint8_t* to = p.packed.codes_at(place.b, place.h, place.begin + i) + place.column * 2 * kBits;
    words.store(to, cut.codes_vectors);
  }
  clear_rest<kBits>(p, cut, place);
}

// Computes each channel's factor c from its largest finite magnitude in the block and writes it. Returns 1 / c for the
// channels of the thread's piece.
template <int kBits>
__device__ __forceinline__ void find_factors(const CodecCall& p, const Cut& cut, const PieceCursor& place,
                                             ByWarp& shared, float (&factors)[kPiece]) {
  float x[kPiece];
#pragma unroll
  for (int k = 0; k < kPiece; ++k) factors[k] = 0.0f;
  for (int64_t i = place.row; i < place.count && place.active; i += place.rows) {
    load_piece<kBits>(p, cut, place, place.begin + i, x);
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      factors[k] = fmaxf(factors[k], is_finite(x[k]) ? absolute(clamped(x[k])) : 0.0f);
    }
  }
  const auto most = [](float a, float b) { return fmaxf(a, b); };
  merge_rows<kBits>(p, cut, place, factors, shared, most);
  __syncthreads();
  uint16_t* channels = p.packed.channels_at(place.b, place.h, place.block);
  for (int64_t d = threadIdx.x; d < p.packed.head_dim; d += kCodecThreads) {
    const float c = channel_factor(merge_warps(shared, d, most));
    channels[d] = float_to_float16(c);
    shared.value[0][d] = 1.0f / c;
  }
  __syncthreads();
  read_channels<kBits>(p, place, shared, factors);
}

// Encodes a token that has one step and one minimum. cut.lanes neighbouring lanes hold the token; they merge its
// extremes, and each encodes its piece. If the token is not `finite`, its scales are NaN.
template <int kBits>
__device__ __forceinline__ void encode_token(const Cut& cut, const PieceCursor& place, bool stored,
                                             const float (&y)[kPiece], bool finite, uint16_t* scales,
                                             Words<kBits>& words) {
  float low = kInfinity, high = -kInfinity;
#pragma unroll
  for (int k = 0; k < kPiece; ++k) low = fminf(low, y[k]), high = fmaxf(high, y[k]);
  if (!place.active) low = kInfinity, high = -kInfinity;
  if (!finite) low = NAN;
  for (int offset = 1; offset < cut.lanes; offset *= 2) {
    low = least(low, __shfl_xor_sync(kAllLanes, low, offset));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, offset));
  }
  const Steps s = steps(low, high, low == low, kBits);
  const float factor = inverse(s.step);
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    words.bits[words.word(k)] += encode(y[k], s.minimum, factor, levels(kBits)) << words.shift(k);
  }
  if (stored && place.column == 0) scales[0] = float_to_float16(s.step), scales[1] = float_to_float16(s.minimum);
}

// Encodes a token that has several groups of channels. Each of the token's lanes takes whole groups from `row` in
// shared memory and replaces their numbers by codes.
template <int kBits>
__device__ __forceinline__ void encode_groups(const CodecCall& p, const Cut& cut, const PieceCursor& place, float* row,
                                              uint16_t* scales) {
  const int groups = static_cast<int>(p.packed.groups), size = static_cast<int>(p.packed.head_dim) / groups;
  for (int g = place.column; g < groups; g += cut.lanes) {
    float* group = row + g * size;
    float low = kInfinity, high = -kInfinity;
    for (int k = 0; k < size; ++k) low = least(low, group[k]), high = fmaxf(high, group[k]);
    const Steps s = steps(low, high, low == low, kBits);
    const float factor = inverse(s.step);
    for (int k = 0; k < size; ++k) group[k] = bit_cast<float>(encode(group[k], s.minimum, factor, levels(kBits)));
    scales[g] = float_to_float16(s.step);
    scales[groups + g] = float_to_float16(s.minimum);
  }
}

// The tokens that the thread block encodes together, (tokens, head_dim).
struct Rows {
  float value[kCodecThreads * kPiece];
};

// Scales belong to tokens: a step and a minimum for each group of a token's channels.
template <int kBits>
__global__ void __launch_bounds__(kCodecThreads)
    quantize_by_tokens_kernel(const __grid_constant__ CodecCall p, const Cut cut) {
  SINGLEPASS_SHARED(ByWarp, shared);
  SINGLEPASS_SHARED(Rows, rows);
  const PieceCursor place(p, cut);
  // Stage 1: channel factors, if there are any.
  float factors[kPiece];
#pragma unroll
  for (int k = 0; k < kPiece; ++k) factors[k] = 1.0f;
  if (p.packed.channels.data != nullptr) find_factors<kBits>(p, cut, place, shared, factors);

  // Stage 2: kCodecThreads / cut.lanes tokens at a time, cut.lanes threads for each. Every thread goes on until the
  // thread block has no token left, because all lanes must take part in the shuffles.
  float* row = &rows.value[threadIdx.x / cut.lanes * p.packed.head_dim];
  for (int64_t i = place.row; i - place.row % (place.rows / cut.parts) < place.count; i += place.rows) {
    const bool stored = place.active && i < place.count;
    const int64_t slot = place.begin + i;
    uint16_t* scales = p.packed.scales_at(place.b, place.h, slot, place.block);
    float y[kPiece] = {};
    bool finite = true;
    if (stored) load_piece<kBits>(p, cut, place, slot, y);
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      finite = finite && is_finite(y[k]);
      y[k] = is_finite(y[k]) ? clamped(y[k]) * factors[k] : NAN;
    }
    Words<kBits> words;
    if (p.packed.groups == 1) {
      encode_token<kBits>(cut, place, stored, y, finite, scales, words);
    } else {
      // Groups need not be whole pieces, so the token goes through shared memory. Its lanes are in one warp.
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kPiece && place.active; ++k) row[Piece<kBits>::channel(p.packed, place.column, k)] = y[k];
      __syncwarp();
      if (i < place.count) encode_groups<kBits>(p, cut, place, row, scales);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kPiece && place.active; ++k) {
        const float code = row[Piece<kBits>::channel(p.packed, place.column, k)];
        words.bits[words.word(k)] += bit_cast<uint32_t>(code) << words.shift(k);
      }
    }
    if (stored) words.store(p.packed.codes_at(place.b, place.h, slot) + place.column * 2 * kBits, cut.codes_vectors);
  }
  clear_rest<kBits>(p, cut, place);
}

template <int kBits>
constexpr auto kernel(Axis axis) {
  return axis == Axis::kChannel ? &quantize_by_channels_kernel<kBits> : &quantize_by_tokens_kernel<kBits>;
}

}  // namespace

void quantize(const CodecCall& p, const Gpu& gpu) {
  const int64_t tasks = p.batch * p.heads * p.blocks.num_blocks;
  if (tasks == 0) return;
  const Cut cut = make_cut(p, p.packed.axis == Axis::kToken && p.packed.channels.data == nullptr);
  const Axis axis = p.packed.axis;
  const auto chosen = p.packed.bits == 2 ? kernel<2>(axis) : p.packed.bits == 4 ? kernel<4>(axis) : kernel<8>(axis);
  const dim3 grid(static_cast<unsigned>(tasks), static_cast<unsigned>(cut.parts));
  launch(chosen, grid, dim3(kCodecThreads), 0, gpu, p, cut);
}

}  // namespace singlepass::kv
