// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "common/math.h"
#include "common/mma.h"
#include "common/reduce.h"
#include "kv/cuda.h"
#include "kv/runs.h"

// Two passes over the keys: the logarithm of each probe's sum, where it is not given, then the columns' sums. Logits
// are made tile by tile and not kept. Rows are the probes of a head's query heads, one query head after another.
namespace singlepass::kv {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kBlocks = 3;           // of a multiprocessor, as many as registers are limited for
constexpr int kTile = 64;            // rows of a tile, of which a warp has 16, and tokens
constexpr int kChannels = 32;        // that are multiplied at a time
constexpr int kPitch = 20;           // words between rows in shared memory, so that a warp's reads meet all banks
constexpr int kColumns = kTile / 8;  // that a lane has two of
constexpr int64_t kLeastSpan = 512, kMaxSpans = 8;  // tokens of a thread block where sums are found, and blocks
constexpr float kInfinity = INFINITY;

struct DeviceSaliency : Saliency {
  bool q_vectors, k_vectors;
  int64_t rows, spans, span;
  float2* partials;  // (batch, heads, rows, spans): the largest logit, and the sum of exp(logit - largest)
};

// A part of each number in bfloat16, what is left in the next: three are exact. One is enough for 16-bit numbers.
template <int kParts>
struct Operand {
  uint32_t pairs[kParts][kTile][kPitch];
};

template <int kParts>
struct Shared {
  Operand<kParts> q, k;
  int visible[kTile];  // tokens that a row sees, padding among them
  float lse[kTile];
  bool is_token[kTile];
  float sums[kWarps][kTile];
};

template <int kParts, DType kDType>
__device__ __forceinline__ void split_parts(const float* x, int row, int word, Operand<kParts>& to) {
  float first = x[0], second = x[1];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const uint32_t pair = pack_pair(first, second, kDType);
    to.pairs[part][row][word] = pair;
    first -= element_of(pair, 0, kDType);
    second -= element_of(pair, 1, kDType);
  }
}

// A tile of logits. Two threads bring a row to shared memory.
template <int kParts, DType kDType>
class Tile {
 public:
  __device__ __forceinline__ Tile(const DeviceSaliency& p, Shared<kParts>& shared, int64_t head)
      : p_(p),
        shared_(shared),
        b_(head / p.heads),
        h_(head % p.heads),
        warp_(threadIdx.x / kWarp),
        g_(threadIdx.x % kWarp / 4),
        t_(threadIdx.x % 4) {}

  // Which tokens are there, and how many each row sees. True if a row sees one from `first` on.
  __device__ __forceinline__ bool look(int64_t row, int64_t first) {
    const int i = static_cast<int>(threadIdx.x) % kTile;
    __syncthreads();
    if (threadIdx.x < kTile) {
      shared_.visible[i] = 0;
      if (row + i < p_.rows) {
        const int64_t position = p_.positions[(row + i) % p_.probes];
        if (is_token(position)) shared_.visible[i] = static_cast<int>(position) + 1;
      }
    } else {
      shared_.is_token[i] = first + i < p_.tokens && is_token(first + i);
    }
    __syncthreads();
    return __any_sync(kAllLanes, shared_.visible[threadIdx.x % kWarp] > first ||
                                     shared_.visible[threadIdx.x % kWarp + kWarp] > first);
  }

  // logits[c][i]: token 8 c + 2 t + i % 2 of row g, or g + 8 for i >= 2, of the warp's; -inf where it is not seen.
  __device__ __forceinline__ void logits(int64_t row, int64_t first, float (&to)[kColumns][4]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) to[c][0] = to[c][1] = to[c][2] = to[c][3] = 0.0f;
    for (int64_t channel = 0; channel < p_.width; channel += kChannels) {
      __syncthreads();
      const int64_t own = threadIdx.x / 2, r = row + own < p_.rows ? row + own : p_.rows - 1;
      const int64_t token = first + own < p_.tokens ? first + own : p_.tokens - 1;
      bring(p_.q, p_.q_vectors, p_.q.at(b_, h_ * p_.group + r / p_.probes, r % p_.probes), channel, shared_.q);
      bring(p_.k, p_.k_vectors, p_.k.at(b_, h_, token), channel, shared_.k);
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kChannels / 16; ++step) multiply(step * 8 + t_, to);
    }
    if (p_.softcap > 0.0f) {
      const float inverse = 1.0f / p_.softcap;
#pragma unroll
      for (int k = 0; k < kColumns * 4; ++k) {
        float& logit = to[k / 4][k % 4];
        logit = p_.softcap * tanhf(logit * p_.scale * inverse);
      }
    }
    const float factor = p_.softcap > 0.0f ? 1.0f : p_.scale;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * c + 2 * t_ + i % 2;
        const bool seen = first + token < shared_.visible[own_row(i / 2)] && shared_.is_token[token];
        to[c][i] = seen ? to[c][i] * factor : -kInfinity;
      }
    }
  }

  // Of the tile, for i 0 or 1.
  __device__ __forceinline__ int own_row(int i) const { return warp_ * 16 + g_ + 8 * i; }

 private:
  __device__ __forceinline__ bool is_token(int64_t t) const {
    return p_.mask == nullptr || p_.mask[b_ * p_.mask_stride + t];
  }

  __device__ __forceinline__ void bring(const Tokens& from, bool vectors, const char* token, int64_t channel,
                                        Operand<kParts>& to) {
    const int row = static_cast<int>(threadIdx.x) / 2, half = static_cast<int>(threadIdx.x) % 2;
    const int64_t first = channel + half * 16;
    float x[16] = {};
    if (first < p_.width) load_run<16>(token + first * size_of(from.dtype), from.dtype, vectors, x);
#pragma unroll
    for (int k = 0; k < 16; k += 2) split_parts<kParts, kDType>(x + k, row, half * 8 + k / 2, to);
  }

  // Of sixteen channels, products of parts that count in float32.
  __device__ __forceinline__ void multiply(int word, float (&to)[kColumns][4]) {
    const int row = own_row(0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const auto& q = shared_.q.pairs[part];
      const uint32_t a[4] = {q[row][word], q[row + 8][word], q[row][word + 4], q[row + 8][word + 4]};
#pragma unroll
      for (int other = 0; other < kParts - part; ++other) {
        const auto& k = shared_.k.pairs[other];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          multiply_accumulate<kDType>(to[c], a, k[8 * c + g_][word], k[8 * c + g_][word + 4]);
        }
      }
    }
  }

  const DeviceSaliency& p_;
  Shared<kParts>& shared_;
  const int64_t b_, h_;
  const int warp_, g_, t_;
};

// A thread block finds the largest logits and the sums of a tile of rows over a span of tokens.
template <int kParts, DType kDType>
__global__ void __launch_bounds__(kThreads, kBlocks) sums_kernel(const __grid_constant__ DeviceSaliency p) {
  SINGLEPASS_SHARED(Shared<kParts>, shared);
  const int64_t tiles = (p.rows + kTile - 1) / kTile, head = blockIdx.x / tiles;
  const int64_t row = blockIdx.x % tiles * kTile, span = blockIdx.y;
  Tile<kParts, kDType> tile(p, shared, head);
  float most[2] = {-kInfinity, -kInfinity}, sum[2] = {}, logits[kColumns][4];
  for (int64_t first = span * p.span; first < p.tokens && first < (span + 1) * p.span; first += kTile) {
    if (!tile.look(row, first)) break;
    tile.logits(row, first, logits);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = most[r];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) now = fmaxf(now, fmaxf(logits[c][2 * r], logits[c][2 * r + 1]));
      for (int offset = 1; offset < 4; offset *= 2) now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, offset));
      const float relative = now == -kInfinity ? 0.0f : now;
      sum[r] *= exp_of_negative(most[r] - relative);
      most[r] = now;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sum[r] += exp_of_negative(logits[c][2 * r] - relative) + exp_of_negative(logits[c][2 * r + 1] - relative);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    for (int offset = 1; offset < 4; offset *= 2) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], offset);
    const int64_t own = row + tile.own_row(r);
    if (threadIdx.x % 4 == 0 && own < p.rows) p.partials[(head * p.rows + own) * p.spans + span] = {most[r], sum[r]};
  }
}

// The logarithm of a row's sum: given, or of its spans in their order.
__device__ __forceinline__ float log_sum(const DeviceSaliency& p, int64_t head, int64_t row) {
  if (p.lse != nullptr) return p.lse[head * p.rows + row];
  const float2* spans = p.partials + (head * p.rows + row) * p.spans;
  float most = -kInfinity, sum = 0.0f;
  for (int64_t s = 0; s < p.spans; ++s) most = fmaxf(most, spans[s].x);
  const float relative = most == -kInfinity ? 0.0f : most;
  for (int64_t s = 0; s < p.spans; ++s) sum += spans[s].y * exp_of_negative(spans[s].x - relative);
  return sum == 0.0f ? -kInfinity : most + logf(sum);
}

// A thread block makes the sums of a tile of tokens over all rows that see one of them.
template <int kParts, DType kDType>
__global__ void __launch_bounds__(kThreads, kBlocks) columns_kernel(const __grid_constant__ DeviceSaliency p) {
  SINGLEPASS_SHARED(Shared<kParts>, shared);
  const int64_t tiles = (p.tokens + kTile - 1) / kTile, head = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kTile;
  Tile<kParts, kDType> tile(p, shared, head);
  float sums[kColumns][2] = {}, logits[kColumns][4];
  for (int64_t row = 0; row < p.rows; row += kTile) {
    if (!tile.look(row, first)) continue;
    if (threadIdx.x < kTile && row + threadIdx.x < p.rows)
      shared.lse[threadIdx.x] = log_sum(p, head, row + threadIdx.x);
    tile.logits(row, first, logits);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float lse = shared.lse[tile.own_row(r)];
      const bool counts = row + tile.own_row(r) < p.rows && lse != -kInfinity;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float logit = logits[c][2 * r + i];
          sums[c][i] += counts && logit != -kInfinity ? exp_of_negative(logit - lse) : 0.0f;
        }
      }
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int offset = 4; offset < kWarp; offset *= 2) sums[c][i] += __shfl_xor_sync(kAllLanes, sums[c][i], offset);
      if (lane < 4) shared.sums[threadIdx.x / kWarp][8 * c + 2 * lane + i] = sums[c][i];
    }
  }
  __syncthreads();
  if (threadIdx.x >= kTile || first + threadIdx.x >= p.tokens) return;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][threadIdx.x];
  p.sums[head * p.tokens + first + threadIdx.x] = sum;
}

DeviceSaliency on_device(const Saliency& p, void* workspace) {
  DeviceSaliency d = {};
  static_cast<Saliency&>(d) = p;
  d.q_vectors = are_vectors(p.q);
  d.k_vectors = are_vectors(p.k);
  d.rows = p.group * p.probes;
  const int64_t tiles = (p.tokens + kTile - 1) / kTile, least = kLeastSpan / kTile;
  const int64_t tiles_of_span = std::max<int64_t>(least, (tiles + kMaxSpans - 1) / kMaxSpans);
  d.span = tiles_of_span * kTile;
  d.spans = (tiles + tiles_of_span - 1) / tiles_of_span;
  d.partials = static_cast<float2*>(workspace);
  return d;
}

template <int kParts, DType kDType>
cudaError_t launch_passes(const DeviceSaliency& d, cudaStream_t stream) {
  const int64_t heads = d.batch * d.heads;
  const dim3 tokens(static_cast<unsigned>(heads * ((d.tokens + kTile - 1) / kTile)));
  if (d.lse == nullptr && d.rows > 0) {
    const dim3 rows(static_cast<unsigned>(heads * ((d.rows + kTile - 1) / kTile)), static_cast<unsigned>(d.spans));
    const cudaError_t error = launch(&sums_kernel<kParts, kDType>, rows, dim3(kThreads), 0, stream, d);
    if (error != cudaSuccess) return error;
  }
  return launch(&columns_kernel<kParts, kDType>, tokens, dim3(kThreads), 0, stream, d);
}

}  // namespace

int64_t saliency_workspace(const Saliency& p) {
  const DeviceSaliency d = on_device(p, nullptr);
  return p.lse != nullptr ? 0 : d.batch * d.heads * d.rows * d.spans * static_cast<int64_t>(sizeof(float2));
}

cudaError_t launch_saliency(const Saliency& p, void* workspace, cudaStream_t stream) {
  if (p.batch * p.heads * p.tokens == 0) return cudaSuccess;
  const DeviceSaliency d = on_device(p, workspace);
  if (p.q.dtype != p.k.dtype || p.q.dtype == DType::kFloat32) return launch_passes<3, DType::kBFloat16>(d, stream);
  if (p.q.dtype == DType::kBFloat16) return launch_passes<1, DType::kBFloat16>(d, stream);
  return launch_passes<1, DType::kFloat16>(d, stream);
}

}  // namespace singlepass::kv
