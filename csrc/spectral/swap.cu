// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/raw.h"
#include "common/reduce.h"
#include "spectral/swap.h"

// A warp exchanges one active row with one frozen row, two blocks of kBlock columns at a time. Sixteen lanes share a
// block, which has one factor if frozen rows are int8 codes. Each lane has eight of its columns: a vector, if it can.
namespace singlepass::spectral {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 16;
static_assert(kLanes * kVector == kBlock);

// Kernel arguments are limited to 4 KiB.
constexpr int kPiecePairs = 3840 / sizeof(Swap);

struct Piece {
  Swap pairs[kPiecePairs];
};

// The eight columns of a lane. Columns beyond the end of the row read as zeros and are not written.
template <bool kVectors>
struct Columns {
  int64_t begin, end;  // the first column of the block, and the end of the row
  Vectors vectors;     // of the block

  __device__ __forceinline__ Columns(int64_t begin, int64_t end, bool spread)
      : begin(begin), end(end), vectors{spread, end - begin < kBlock ? end - begin : kBlock} {}

  __device__ __forceinline__ int64_t at(int k) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    return begin + (kVectors ? lane * vectors.step() + vectors.offset(k) : lane + k * kLanes);
  }
  __device__ __forceinline__ bool has_vector() const { return at(0) < begin + vectors.end(); }

  __device__ __forceinline__ void read(const void* base, DType dtype, int64_t row, float* values) const {
    if constexpr (kVectors) {
      Raw<kVector> raw = {};
      if (has_vector()) load(base, dtype, row + at(0), raw, vectors.apart());
      decode(raw, dtype, values);
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        Raw<1> raw = {};
        if (at(k) < end) load(base, dtype, row + at(k), raw);
        decode(raw, dtype, values + k);
      }
    }
  }

  __device__ __forceinline__ void write(const float* values, void* base, DType dtype, int64_t row) const {
    if constexpr (kVectors) {
      if (has_vector()) store(encode<kVector>(values, dtype), dtype, base, row + at(0), vectors.apart());
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (at(k) < end) store(encode<1>(values + k, dtype), dtype, base, row + at(k));
      }
    }
  }

  __device__ __forceinline__ void read_codes(const int8_t* codes, float factor, float* values) const {
    int8_t code[kVector] = {};
    if constexpr (kVectors) {
      if (has_vector() && vectors.spread) {
        const uint32_t words[2] = {*reinterpret_cast<const uint32_t*>(codes + at(0)),
                                   *reinterpret_cast<const uint32_t*>(codes + at(kVector / 2))};
        memcpy(code, words, sizeof(words));
      } else if (has_vector()) {
        const uint2 words = *reinterpret_cast<const uint2*>(codes + at(0));
        memcpy(code, &words, sizeof(words));
      }
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (at(k) < end) code[k] = codes[at(k)];
      }
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) values[k] = static_cast<float>(code[k]) * factor;
  }

  __device__ __forceinline__ void write_codes(const float* values, float inverse, int8_t* codes) const {
    int8_t code[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) code[k] = code_of(values[k], inverse);
    if constexpr (kVectors) {
      uint2 words;
      memcpy(&words, code, sizeof(words));
      if (has_vector() && vectors.spread) {
        *reinterpret_cast<uint32_t*>(codes + at(0)) = words.x;
        *reinterpret_cast<uint32_t*>(codes + at(kVector / 2)) = words.y;
      } else if (has_vector()) {
        *reinterpret_cast<uint2*>(codes + at(0)) = words;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (at(k) < end) codes[at(k)] = code[k];
      }
    }
  }
};

// The largest magnitude in a block, returned to its sixteen lanes; NaN if there is a NaN.
__device__ __forceinline__ float largest_of(const float* values) {
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < kVector; ++k) largest = maximum(absolute(values[k]), largest);
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    largest = maximum(__shfl_xor_sync(kAllLanes, largest, offset), largest);
  }
  return largest;
}

// Exchanges the active row `place` with the frozen row `row`, converting between their dtypes. A lane reads its columns
// of both rows before it writes either. Lanes without columns go on, because all lanes take part in the shuffles.
template <bool kVectors>
__device__ __forceinline__ void swap_row(const Swap& pair, int64_t place, int64_t row) {
  const int64_t n = pair.columns, active = place * n, frozen = row * n;
  const int half = static_cast<int>(threadIdx.x) % kWarp / kLanes;
  const bool spread =
      pair.active_dtype == DType::kFloat32 && (pair.scales != nullptr || pair.frozen_dtype == DType::kFloat32);
  for (int64_t begin = 0; begin < n; begin += 2 * kBlock) {
    const Columns<kVectors> columns(begin + half * kBlock, n, spread);
    float leaving[kVector], coming[kVector];
    columns.read(pair.active, pair.active_dtype, active, leaving);
    if (pair.scales == nullptr) {
      columns.read(pair.frozen, pair.frozen_dtype, frozen, coming);
      columns.write(leaving, pair.frozen, pair.frozen_dtype, frozen);
    } else {
      // Restores the frozen row's codes, then quantises the active row with a new factor.
      int8_t* const codes = global_memory(static_cast<int8_t*>(pair.frozen) + frozen);
      float* const factor = global_memory(pair.scales + row * factor_count(n) + columns.begin / kBlock);
      const bool exists = columns.begin < n;
      columns.read_codes(codes, exists ? *factor : 0.0f, coming);
      const float fresh = factor_of(largest_of(leaving));
      __syncwarp();  // all lanes have read the old factor
      if (exists && threadIdx.x % kLanes == 0) *factor = fresh;
      columns.write_codes(leaving, inverse_of(fresh), codes);
    }
    columns.write(coming, pair.active, pair.active_dtype, active);
  }
}

__device__ __forceinline__ bool takes_vectors(const Swap& pair) {
  const uintptr_t frozen = reinterpret_cast<uintptr_t>(pair.frozen);
  return pair.columns % kVector == 0 && reinterpret_cast<uintptr_t>(pair.active) % 16 == 0 &&
         frozen % (pair.scales == nullptr ? 16 : 8) == 0;
}

// Runs on a grid of (places of a pair / warps of a thread block, pairs), with a warp for each active place. Warps of
// places that do not change return at once.
__global__ void __launch_bounds__(kThreads) swap_kernel(const __grid_constant__ Piece piece) {
  const Swap& pair = piece.pairs[blockIdx.y];
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (place >= pair.rank || !pair.changes(place)) return;
  const int64_t row = pair.exchange[place];
  if (takes_vectors(pair)) {
    swap_row<true>(pair, place, row);
  } else {
    swap_row<false>(pair, place, row);
  }
}

}  // namespace

void swap(const std::vector<Swap>& pairs, const Gpu& gpu, int threads) {
  const int64_t warps = threads / kWarp;
  for (size_t first = 0; first < pairs.size(); first += kPiecePairs) {
    Piece piece = {};
    const size_t count = std::min<size_t>(kPiecePairs, pairs.size() - first);
    int64_t places = 1;
    for (size_t i = 0; i < count; ++i) {
      piece.pairs[i] = pairs[first + i];
      places = std::max(places, pairs[first + i].rank);
    }
    const dim3 grid(static_cast<unsigned>((places + warps - 1) / warps), static_cast<unsigned>(count));
    launch(&swap_kernel, grid, dim3(threads), 0, gpu, piece);
  }
}

}  // namespace singlepass::spectral
