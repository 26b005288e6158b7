// SPDX-License-Identifier: Apache-2.0
#include "common/raw.h"
#include "common/reduce.h"
#include "spectral/cuda.h"
#include "spectral/sample.h"

// A thread block draws the places of one layer. Times are not negative, so their bits are ordered as they are: the
// rank-th smallest is found digit by digit, and whatever comes before it is drawn.
namespace singlepass::spectral {
namespace {

constexpr int kThreads = 1024;
constexpr int kDigit = 256;

// `keys` has room for a number of each place.
struct Layer : Draw {
  uint64_t* keys;
};

// Kernel arguments may fill 4 KiB.
constexpr int kPieceLayers = 3840 / sizeof(Layer);

struct Piece {
  Layer layers[kPieceLayers];
};

struct WarpCounts {
  unsigned count[kMaxWarps];
};

struct DigitCounts {
  unsigned count[kDigit];
};

// The last key that is drawn, and how many of its equals are.
struct Threshold {
  uint64_t key;
  int64_t equals;
};

// How many threads before this one have the flag, and how many in the block. All threads call it, and whatever they
// read before it was read before any of them goes on.
__device__ __forceinline__ unsigned count_before(bool flag, unsigned& all) {
  SINGLEPASS_SHARED(WarpCounts, warps);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned flags = __ballot_sync(kAllLanes, flag);
  if (lane == 0) warps.count[warp] = __popc(flags);
  __syncthreads();
  unsigned before = __popc(flags & ((1u << lane) - 1u));
  all = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
    if (w == warp) before += all;
    all += warps.count[w];
  }
  __syncthreads();
  return before;
}

__device__ __forceinline__ double weight_at(const Layer& layer, int64_t place) {
  Raw<1> raw;
  float s;
  load(layer.s, layer.dtype, place, raw);
  decode(raw, layer.dtype, &s);
  return weight_of(s);
}

__device__ void make_keys(const Layer& layer, const DrawOptions& options) {
  SINGLEPASS_SHARED(double, total);
  double sum = 0.0;
  for (int64_t j = threadIdx.x; j < layer.count; j += blockDim.x) sum += weight_at(layer, j);
  sum = block_sum(sum);
  if (threadIdx.x == 0) total = sum;
  __syncthreads();
  for (int64_t j = threadIdx.x; j < layer.count; j += blockDim.x) {
    const double p = probability(weight_at(layer, j), total, layer.count, options.uniform);
    layer.keys[j] = bit_cast<uint64_t>(race_time(options, layer.id, j, p));
  }
  __syncthreads();
}

__device__ Threshold find_threshold(const Layer& layer) {
  SINGLEPASS_SHARED(DigitCounts, digits);
  SINGLEPASS_SHARED(Threshold, found);
  if (threadIdx.x == 0) found = {0, layer.rank};
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (unsigned d = threadIdx.x; d < kDigit; d += blockDim.x) digits.count[d] = 0;
    __syncthreads();
    const uint64_t known = shift == 56 ? 0 : ~uint64_t{0} << (shift + 8), prefix = found.key;
    for (int64_t j = threadIdx.x; j < layer.count; j += blockDim.x) {
      const uint64_t key = layer.keys[j];
      if ((key & known) == prefix) atomicAdd(&digits.count[key >> shift & (kDigit - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned d = 0;
      for (; digits.count[d] < found.equals; ++d) found.equals -= digits.count[d];
      found.key |= static_cast<uint64_t>(d) << shift;
    }
    __syncthreads();
  }
  return found;
}

// Makes keys of active places one if they were drawn and else zero, and those that follow the rows that come, counted
// from 0, in their order. Among equal keys the lower places are drawn.
__device__ void mark_drawn(const Layer& layer, const Threshold& last) {
  int64_t equals = 0, coming = 0;
  for (int64_t first = 0; first < layer.count; first += blockDim.x) {
    const int64_t place = first + threadIdx.x;
    const uint64_t key = place < layer.count ? layer.keys[place] : ~uint64_t{0};
    unsigned all;
    const bool equal = place < layer.count && key == last.key;
    const int64_t before = equals + count_before(equal, all);
    equals += all;
    const bool drawn = key < last.key || (equal && before < last.equals);
    const bool comes = drawn && place >= layer.rank;
    const int64_t row = coming + count_before(comes, all);
    coming += all;
    // A row is written no further back than where it was found, so what has not been read stays.
    if (place < layer.rank) layer.keys[place] = drawn;
    if (comes) layer.keys[layer.rank + row] = static_cast<uint64_t>(place - layer.rank);
  }
  __syncthreads();
}

__device__ void write_exchange(const Layer& layer) {
  int64_t leaving = 0;
  for (int64_t first = 0; first < layer.rank; first += blockDim.x) {
    const int64_t place = first + threadIdx.x;
    const bool leaves = place < layer.rank && layer.keys[place] == 0;
    unsigned all;
    const int64_t row = leaving + count_before(leaves, all);
    leaving += all;
    if (place < layer.rank) layer.exchange[place] = leaves ? static_cast<int64_t>(layer.keys[layer.rank + row]) : -1;
  }
}

__global__ void __launch_bounds__(kThreads)
    sample_kernel(const __grid_constant__ Piece piece, const DrawOptions options) {
  const Layer& layer = piece.layers[blockIdx.x];
  make_keys(layer, options);
  mark_drawn(layer, find_threshold(layer));
  write_exchange(layer);
}

}  // namespace

int64_t sample_workspace(const std::vector<Draw>& layers) {
  int64_t places = 0;
  for (const Draw& layer : layers) places += layer.count;
  return places * static_cast<int64_t>(sizeof(uint64_t));
}

cudaError_t launch_sample(const std::vector<Draw>& layers, const DrawOptions& options, void* workspace,
                          cudaStream_t stream, int threads) {
  uint64_t* keys = static_cast<uint64_t*>(workspace);
  Piece piece = {};
  unsigned filled = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    static_cast<Draw&>(piece.layers[filled]) = layers[i];
    piece.layers[filled++].keys = keys;
    keys += layers[i].count;
    if (filled < kPieceLayers && i + 1 < layers.size()) continue;
    const cudaError_t error = launch(&sample_kernel, dim3(filled), dim3(threads), 0, stream, piece, options);
    if (error != cudaSuccess) return error;
    filled = 0;
  }
  return cudaSuccess;
}

}  // namespace singlepass::spectral
