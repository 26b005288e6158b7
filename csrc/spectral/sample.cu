// SPDX-License-Identifier: Apache-2.0
#include "common/raw.h"
#include "common/reduce.h"
#include "spectral/sample.h"

// A thread block draws the places of one layer. Every place gets a race time, and the `rank` places with the smallest
// times are drawn. Times are not negative, so their bits, read as an integer (the key), have the same order. A radix
// select finds the rank-th smallest key, one digit of eight bits at a time.
namespace singlepass::spectral {
namespace {

constexpr int kThreads = 1024;
constexpr int kDigit = 256;  // values of a digit

// keys: (count,), one for each place.
struct Layer : Draw {
  uint64_t* keys;
};

// Kernel arguments are limited to 4 KiB.
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

// The largest key that is drawn, and how many of the keys equal to it are drawn.
struct Threshold {
  uint64_t key;
  int64_t equals;
};

// Returns how many threads before this one have the flag; `all` is how many in the thread block have it. All threads
// must call it. Its barriers let threads write after the call what others read before it.
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

// Stage 1: sums the weights in a fixed order and computes the key of every place.
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

// Stage 2: radix select, from the highest digit down. Each round counts the keys that begin with the digits found so
// far by their next digit. Then one thread goes through the counts to the digit of the rank-th key; `equals` is what
// remains of the rank after the smaller keys.
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

// Stage 3: replaces keys by results. Keys of active places (the first `rank`) become 1 if the place was drawn, else 0.
// After them come the frozen rows that were drawn, counted from 0, in ascending order. Among equal keys, lower places
// are drawn first. The thread block goes through the places in order, one for each thread at a time.
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
    // A row is never written beyond the place it was read from, so no key is overwritten before it has been read.
    if (place < layer.rank) layer.keys[place] = drawn;
    if (comes) layer.keys[layer.rank + row] = static_cast<uint64_t>(place - layer.rank);
  }
  __syncthreads();
}

// Stage 4: the active places that were not drawn leave. The n-th of them gets the n-th frozen row that was drawn; other
// places get -1.
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

// Layers are launched in pieces of as many as fit in kernel arguments.
void sample(const std::vector<Draw>& layers, const DrawOptions& options, const Gpu& gpu, int threads) {
  int64_t places = 0;
  for (const Draw& layer : layers) places += layer.count;
  uint64_t* keys = static_cast<uint64_t*>(gpu.allocate(places * static_cast<int64_t>(sizeof(uint64_t))));
  Piece piece = {};
  unsigned filled = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    static_cast<Draw&>(piece.layers[filled]) = layers[i];
    piece.layers[filled++].keys = keys;
    keys += layers[i].count;
    if (filled < kPieceLayers && i + 1 < layers.size()) continue;
    launch(&sample_kernel, dim3(filled), dim3(threads), 0, gpu, piece, options);
    filled = 0;
  }
}

}  // namespace singlepass::spectral
