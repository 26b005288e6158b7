// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "common/reduce.h"
#include "kv/runs.h"

// Which channels a thread owns in the kernels that quantise and dequantise. A piece is the 16 channels whose codes fill
// 2 * bits neighbouring bytes: a run of 2 * bits neighbouring channels out of each plane. A thread keeps its piece
// while it goes down the tokens of a block. All pieces of a token belong to one warp, so that lanes merge a token's
// extremes by shuffles.
namespace singlepass::kv {

inline constexpr int kPiece = 16;
inline constexpr int kCodecThreads = 256;
inline constexpr int kCodecWarps = kCodecThreads / kWarp;

// How a launch is divided.
struct Cut {
  int lanes;                          // threads for each token: a power of two, of which head_dim / 16 are active
  int parts;                          // thread blocks that share the tokens of a block
  bool plain_vectors, codes_vectors;  // whether tokens, and codes, are aligned for vector accesses
};

inline Cut make_cut(const CodecCall& p, bool shared_tokens) {
  Cut cut = {1, 1, are_vectors(p.plain), are_vectors(p.packed.codes)};
  while (cut.lanes * kPiece < p.packed.head_dim) cut.lanes *= 2;
  // As many parts as give a thread about four tokens of an average block.
  if (shared_tokens) {
    const int64_t average = p.slots / p.blocks.num_blocks, turn = kCodecThreads / cut.lanes * 4;
    cut.parts = static_cast<int>(std::clamp<int64_t>((average + turn - 1) / turn, 1, 65535));
  }
  return cut;
}

// A thread's place in a block of tokens of one head. Tokens are counted from the block's first slot.
struct PieceCursor {
  int64_t b, h, block, begin, count, size;  // `size` slots from `begin` on, of which the first `count` hold a token
  int column, row, rows;                    // the thread's piece, its first token, and the step to its next token
  bool active;

  __device__ PieceCursor(const CodecCall& p, const Cut& cut) {
    const int64_t task = blockIdx.x;
    block = task % p.blocks.num_blocks;
    h = task / p.blocks.num_blocks % p.heads;
    b = task / p.blocks.num_blocks / p.heads;
    begin = p.blocks.starts[block];
    count = p.blocks.count(b, h, block);
    size = p.blocks.starts[block + 1] - begin;
    column = static_cast<int>(threadIdx.x) % cut.lanes;
    rows = kCodecThreads / cut.lanes * cut.parts;
    row = static_cast<int>(blockIdx.y) * (kCodecThreads / cut.lanes) + static_cast<int>(threadIdx.x) / cut.lanes;
    active = column * kPiece < p.packed.head_dim;
  }
};

template <int kBits>
struct Piece {
  static constexpr int planes = 8 / kBits, run = 2 * kBits;

  // The channel of element k of a piece.
  __device__ __forceinline__ static int channel(const Packed& packed, int column, int k) {
    return k / run * static_cast<int>(packed.bytes()) + column * run + k % run;
  }
};

// Loads the thread's piece of the token in `slot`, one run out of each plane.
template <int kBits>
__device__ __forceinline__ void load_piece(const CodecCall& p, const Cut& cut, const PieceCursor& place, int64_t slot,
                                           float (&x)[kPiece]) {
  using P = Piece<kBits>;
  const char* token = p.plain.at(place.b, place.h, p.token(place.b, place.h, slot));
#pragma unroll
  for (int k = 0; k < kPiece; k += P::run) {
    const int64_t first = P::channel(p.packed, place.column, k);
    load_run<P::run>(token + first * size_of(p.plain.dtype), p.plain.dtype, cut.plain_vectors, x + k);
  }
}

template <int kBits>
__device__ __forceinline__ void store_piece(const CodecCall& p, const Cut& cut, const PieceCursor& place, int64_t slot,
                                            const float (&x)[kPiece]) {
  using P = Piece<kBits>;
  char* token = p.plain.at(place.b, place.h, p.token(place.b, place.h, slot));
#pragma unroll
  for (int k = 0; k < kPiece; k += P::run) {
    const int64_t first = P::channel(p.packed, place.column, k);
    store_run<P::run>(x + k, p.plain.dtype, cut.plain_vectors, token + first * size_of(p.plain.dtype));
  }
}

// The codes of a piece, 2 * kBits bytes, in 32-bit words.
template <int kBits>
struct Words {
  uint32_t bits[kBits / 2] = {};

  __device__ __forceinline__ void load(const uint8_t* from, bool vectors) {
    from = global_memory(from);
    if (!vectors) {
#pragma unroll
      for (int i = 0; i < 2 * kBits; ++i) bits[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
    } else if constexpr (kBits == 2) {
      bits[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kBits == 4) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      bits[0] = two.x, bits[1] = two.y;
    } else {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      bits[0] = four.x, bits[1] = four.y, bits[2] = four.z, bits[3] = four.w;
    }
  }

  __device__ __forceinline__ void store(uint8_t* to, bool vectors) const {
    to = global_memory(to);
    if (!vectors) {
#pragma unroll
      for (int i = 0; i < 2 * kBits; ++i) to[i] = static_cast<uint8_t>(bits[i / 4] >> (8 * (i % 4)));
    } else if constexpr (kBits == 2) {
      *reinterpret_cast<uint32_t*>(to) = bits[0];
    } else if constexpr (kBits == 4) {
      *reinterpret_cast<uint2*>(to) = {bits[0], bits[1]};
    } else {
      *reinterpret_cast<uint4*>(to) = {bits[0], bits[1], bits[2], bits[3]};
    }
  }

  // The word that holds the code of element k, and the code's lowest bit in it.
  __device__ __forceinline__ static constexpr int word(int k) { return k % (2 * kBits) / 4; }
  __device__ __forceinline__ static constexpr int shift(int k) { return k % 4 * 8 + k / (2 * kBits) * kBits; }
};

}  // namespace singlepass::kv
