// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "common/math.h"
#include "kv/codec.h"
#include "kv/cuda.h"
#include "kv/pieces.h"

// A thread block makes the codes of one block of tokens of one head. What belongs to channels is found in a first pass;
// the second one finds the tokens in the caches. Nothing depends on the order of minima and maxima.
namespace singlepass::kv {
namespace {

constexpr float kInfinity = INFINITY;

// Numbers of each channel, one for every warp.
struct ByWarp {
  float value[kCodecWarps][kMaxWidth];
};

__device__ __forceinline__ float levels(int bits) {
  return static_cast<float>((1 << bits) - 1);
}

// NaN, where there is one; fminf would lose it.
__device__ __forceinline__ float least(float a, float b) {
  return b < a || b != b ? b : a;
}

// The piece's sixteen numbers of every thread, merged over the rows of each warp and left in shared memory by warp and
// channel.
template <int kBits, class Merge>
__device__ __forceinline__ void merge_rows(const Codec& p, const Cut& cut, const PieceCursor& place, float (&x)[kPiece],
                                           ByWarp& to, Merge merge) {
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    for (int offset = cut.lanes; offset < kWarp; offset *= 2)
      x[k] = merge(x[k], __shfl_xor_sync(kAllLanes, x[k], offset));
  }
  if (!place.active || threadIdx.x % kWarp >= static_cast<unsigned>(cut.lanes)) return;
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    to.value[threadIdx.x / kWarp][Piece<kBits>::channel(p.packed, place.column, k)] = x[k];
  }
}

// Over the warps, for one channel.
template <class Merge>
__device__ __forceinline__ float merge_warps(const ByWarp& from, int64_t channel, Merge merge) {
  float x = from.value[0][channel];
  for (int w = 1; w < kCodecWarps; ++w) x = merge(x, from.value[w][channel]);
  return x;
}

template <int kBits>
__device__ __forceinline__ void read_channels(const Codec& p, const PieceCursor& place, const ByWarp& from,
                                              float (&x)[kPiece]) {
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    x[k] = place.active ? from.value[0][Piece<kBits>::channel(p.packed, place.column, k)] : 0.0f;
  }
}

// Slots without a token get zeros.
template <int kBits>
__device__ __forceinline__ void clear_rest(const Codec& p, const Cut& cut, const PieceCursor& place) {
  for (int64_t i = place.count + place.row; i < place.size && place.active; i += place.rows) {
    const int64_t slot = place.begin + i;
    Words<kBits>().store(p.packed.codes_at(place.b, place.h, slot) + place.column * 2 * kBits, cut.codes_vectors);
    if (p.packed.axis == Axis::kChannel) continue;
    uint16_t* scales = p.packed.scales_at(place.b, place.h, slot, place.block);
    for (int64_t g = place.column; g < 2 * p.packed.groups; g += p.packed.width / kPiece) scales[g] = 0;
  }
}

template <int kBits>
__global__ void __launch_bounds__(kCodecThreads)
    quantize_by_channels_kernel(const __grid_constant__ Codec p, const Cut cut) {
  SINGLEPASS_SHARED(ByWarp, lows);
  SINGLEPASS_SHARED(ByWarp, highs);
  const PieceCursor place(p, cut);
  float low[kPiece], high[kPiece], zeros[kPiece], x[kPiece];  // sums of x * 0 are NaN where x is not finite
#pragma unroll
  for (int k = 0; k < kPiece; ++k) low[k] = kInfinity, high[k] = -kInfinity, zeros[k] = 0.0f;
  for (int64_t i = place.row; i < place.count && place.active; i += place.rows) {
    load_piece<kBits>(p, cut, place, place.begin + i, x);
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      low[k] = fminf(low[k], x[k]);
      high[k] = fmaxf(high[k], x[k]);
      zeros[k] = multiply_add(x[k], 0.0f, zeros[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kPiece; ++k) low[k] = zeros[k] == 0.0f ? low[k] : NAN;
  const auto most = [](float a, float b) { return fmaxf(a, b); };
  merge_rows<kBits>(p, cut, place, low, lows, least);
  merge_rows<kBits>(p, cut, place, high, highs, most);
  __syncthreads();

  uint16_t* scales = p.packed.scales_at(place.b, place.h, 0, place.block);
  for (int64_t d = threadIdx.x; d < p.packed.width; d += kCodecThreads) {
    const float lowest = merge_warps(lows, d, least), highest = merge_warps(highs, d, most);
    const bool empty = place.count == 0;
    const Steps s =
        steps(empty ? 0.0f : clamped(lowest), empty ? 0.0f : clamped(highest), empty || lowest == lowest, kBits);
    scales[d] = float_to_float16(s.step);
    scales[p.packed.width + d] = float_to_float16(s.minimum);
    lows.value[0][d] = s.minimum;
    highs.value[0][d] = inverse(s.step);
  }
  __syncthreads();

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

// By what the channels of a thread's piece are multiplied, from the largest magnitudes in the block.
template <int kBits>
__device__ __forceinline__ void find_factors(const Codec& p, const Cut& cut, const PieceCursor& place, ByWarp& shared,
                                             float (&factors)[kPiece]) {
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
  for (int64_t d = threadIdx.x; d < p.packed.width; d += kCodecThreads) {
    const float c = channel_factor(merge_warps(shared, d, most));
    channels[d] = float_to_float16(c);
    shared.value[0][d] = 1.0f / c;
  }
  __syncthreads();
  read_channels<kBits>(p, place, shared, factors);
}

// Codes of a token whose channels are one group, by the threads that hold it.
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

// Codes of a token in several groups: a thread takes whole groups from `row`, which it leaves there as their codes.
template <int kBits>
__device__ __forceinline__ void encode_groups(const Codec& p, const Cut& cut, const PieceCursor& place, float* row,
                                              uint16_t* scales) {
  const int groups = static_cast<int>(p.packed.groups), size = static_cast<int>(p.packed.width) / groups;
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

struct Rows {
  float value[kCodecThreads * kPiece];
};

template <int kBits>
__global__ void __launch_bounds__(kCodecThreads)
    quantize_by_tokens_kernel(const __grid_constant__ Codec p, const Cut cut) {
  SINGLEPASS_SHARED(ByWarp, shared);
  SINGLEPASS_SHARED(Rows, rows);
  const PieceCursor place(p, cut);
  float factors[kPiece];
#pragma unroll
  for (int k = 0; k < kPiece; ++k) factors[k] = 1.0f;
  if (p.packed.channels.data != nullptr) find_factors<kBits>(p, cut, place, shared, factors);

  float* row = &rows.value[threadIdx.x / cut.lanes * p.packed.width];
  for (int64_t i = place.row; i - place.row % (place.rows / cut.parts) < place.count; i += place.rows) {
    const bool stored = place.active && i < place.count;  // all lanes go on: they meet in shuffles
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

cudaError_t launch_quantize(const Codec& p, cudaStream_t stream) {
  const int64_t tasks = p.batch * p.heads * p.blocks.number;
  if (tasks == 0) return cudaSuccess;
  const Cut cut = make_cut(p, p.packed.axis == Axis::kToken && p.packed.channels.data == nullptr);
  const Axis axis = p.packed.axis;
  const auto chosen = p.packed.bits == 2 ? kernel<2>(axis) : p.packed.bits == 4 ? kernel<4>(axis) : kernel<8>(axis);
  const dim3 grid(static_cast<unsigned>(tasks), static_cast<unsigned>(cut.parts));
  return launch(chosen, grid, dim3(kCodecThreads), 0, stream, p, cut);
}

}  // namespace singlepass::kv
