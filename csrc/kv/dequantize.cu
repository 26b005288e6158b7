// SPDX-License-Identifier: Apache-2.0
#include "common/cuda.h"
#include "common/math.h"
#include "kv/pieces.h"
#include "kv/problem.h"

// Decompression, on a grid of (blocks of tokens of all heads, parts): `parts` thread blocks share the tokens of one
// block. Each token is read and written once.
namespace singlepass::kv {
namespace {

// Reads float16 numbers of the channels of the thread's piece.
template <int kBits>
__device__ __forceinline__ void read_channels(const CodecCall& p, const PieceCursor& place, const uint16_t* from,
                                              float (&x)[kPiece]) {
#pragma unroll
  for (int k = 0; k < kPiece; ++k) x[k] = float16_to_float(from[Piece<kBits>::channel(p.packed, place.column, k)]);
}

// x = n * step + minimum, with the scales of each channel's group. The channels of a run are neighbours, so scales are
// only loaded where a run or a group begins.
template <int kBits>
__device__ __forceinline__ void restore_groups(const CodecCall& p, const PieceCursor& place, const uint16_t* scales,
                                               float (&x)[kPiece]) {
  const int groups = static_cast<int>(p.packed.groups), size = static_cast<int>(p.packed.head_dim) / groups;
  int group = 0, left = 0;
  float step = 0.0f, minimum = 0.0f;
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    const bool begins = k % Piece<kBits>::run == 0;
    if (begins) {
      const int channel = Piece<kBits>::channel(p.packed, place.column, k);
      group = channel / size;
      left = size - channel % size;
    } else if (left == 0) {
      ++group;
      left = size;
    }
    if (begins || left == size) {
      step = float16_to_float(scales[group]);
      minimum = float16_to_float(scales[groups + group]);
    }
    x[k] = multiply_add(x[k], step, minimum);
    --left;
  }
}

// A thread goes down the tokens with its piece of 16 channels. The product of a code and a step is exact in float32, so
// a fused multiply-add gives the same bits as two operations.
template <int kBits, bool kByChannels>
__global__ void __launch_bounds__(kCodecThreads) dequantize_kernel(const __grid_constant__ CodecCall p, const Cut cut) {
  const PieceCursor place(p, cut);
  if (!place.active || place.row >= place.count) return;
  // Stage 1: what belongs to channels is loaded once: steps and minima, or channel factors.
  const bool separable = !kByChannels && p.packed.channels.data != nullptr;
  float factors[kPiece], minima[kPiece];
  if constexpr (kByChannels) {
    const uint16_t* scales = p.packed.scales_at(place.b, place.h, 0, place.block);
    read_channels<kBits>(p, place, scales, factors);
    read_channels<kBits>(p, place, scales + p.packed.head_dim, minima);
  } else if (separable) {
    read_channels<kBits>(p, place, p.packed.channels_at(place.b, place.h, place.block), factors);
  }
  // Stage 2: each turn restores the thread's piece of one token. A code n in the low bits of 2^23, whose spacing is 1,
  // makes the float 2^23 + n.
  for (int64_t i = place.row; i < place.count; i += place.rows) {
    const int64_t slot = place.begin + i;
    Words<kBits> words;
    words.load(p.packed.codes_at(place.b, place.h, slot) + place.column * 2 * kBits, cut.codes_vectors);
    float x[kPiece];
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      const uint32_t code = (words.bits[words.word(k)] >> words.shift(k)) & ((1u << kBits) - 1);
      x[k] = bit_cast<float>(code | 0x4b000000u) - 8388608.0f;
    }
    if constexpr (kByChannels) {
#pragma unroll
      for (int k = 0; k < kPiece; ++k) x[k] = multiply_add(x[k], factors[k], minima[k]);
    } else {
      restore_groups<kBits>(p, place, p.packed.scales_at(place.b, place.h, slot, place.block), x);
    }
#pragma unroll
    for (int k = 0; k < kPiece && separable; ++k) x[k] *= factors[k];
    store_piece<kBits>(p, cut, place, slot, x);
  }
}

template <int kBits>
constexpr auto kernel(Axis axis) {
  return axis == Axis::kChannel ? &dequantize_kernel<kBits, true> : &dequantize_kernel<kBits, false>;
}

}  // namespace

void dequantize(const CodecCall& p, const Gpu& gpu) {
  const int64_t tasks = p.batch * p.heads * p.blocks.num_blocks;
  if (tasks == 0) return;
  const Cut cut = make_cut(p, true);
  const Axis axis = p.packed.axis;
  const auto chosen = p.packed.bits == 2 ? kernel<2>(axis) : p.packed.bits == 4 ? kernel<4>(axis) : kernel<8>(axis);
  const dim3 grid(static_cast<unsigned>(tasks), static_cast<unsigned>(cut.parts));
  launch(chosen, grid, dim3(kCodecThreads), 0, gpu, p, cut);
}

}  // namespace singlepass::kv
