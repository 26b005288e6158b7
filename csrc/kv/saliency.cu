// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "common/math.h"
#include "common/mma.h"
#include "common/reduce.h"
#include "kv/problem.h"
#include "kv/runs.h"

// Attention that tokens receive from probes, in two passes over the keys. The first pass computes lse, the logarithm of
// each row's sum of exp, unless lse is given. The second pass sums exp(logit - lse) over the rows, for each token.
// Logits are computed tile by tile on tensor cores and never stored. Rows are the probes of all query heads that share
// a head of keys, one query head after another.
//
// A tile of logits is (kTile rows, kTile tokens), of which a warp has 16 rows. Lane (g, t) = (lane / 4, lane % 4) holds
// rows g and g + 8 of those, and tokens 2 t and 2 t + 1 of every 8.
namespace singlepass::kv {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kBlocks = 3;           // thread blocks per multiprocessor; registers are limited to fit them
constexpr int kTile = 64;            // rows and tokens of a tile
constexpr int kChannels = 32;        // channels in shared memory at a time
constexpr int kPitch = 20;           // words between rows in shared memory: a warp's reads have no bank conflicts
constexpr int kColumns = kTile / 8;  // groups of 8 tokens; a lane holds two tokens of each
constexpr int64_t kLeastSpan = 512, kMaxSpans = 8;  // first pass: minimum tokens of a span, maximum spans of the keys
constexpr float kInfinity = INFINITY;

struct DeviceSaliency : Saliency {
  bool q_vectors, k_vectors;
  int64_t rows, spans, span;  // rows of a head, spans of its keys, tokens of a span
  float2* partials;           // (batch, heads, rows, spans): row max and sum of exp(logit - row max)
};

// An MMA operand, (rows, pairs of channels). Each number is a sum of kParts 16-bit parts: each part is what the parts
// before it leave, rounded. Three bfloat16 parts hold a float32 exactly; a 16-bit number needs one part.
template <int kParts>
struct Operand {
  uint32_t pairs[kParts][kTile][kPitch];
};

template <int kParts>
struct Shared {
  Operand<kParts> q, k;
  int visible[kTile];  // a row sees the tokens before this one that are not padding
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

// A tile of logits. The stages are called by all threads of the thread block together.
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

  // Stage 1: finds out which tokens exist, and how far each row sees: up to its probe's position, or nothing if the
  // probe itself is padding. Returns, in every thread, whether any row sees tokens from `first` on.
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

  // Stage 2: logits of the warp, (16 rows, kTile tokens). to[c][i] belongs to token 8 c + 2 t + i % 2 and to row g
  // (i < 2) or g + 8 (i >= 2); it is -inf if the row does not see the token.
  __device__ __forceinline__ void logits(int64_t row, int64_t first, float (&to)[kColumns][4]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) to[c][0] = to[c][1] = to[c][2] = to[c][3] = 0.0f;
    // q . k, kChannels channels at a time. The last row and the last token stand in for those that do not exist; their
    // logits are masked below.
    for (int64_t channel = 0; channel < p_.head_dim; channel += kChannels) {
      __syncthreads();
      const int64_t own = threadIdx.x / 2, r = row + own < p_.rows ? row + own : p_.rows - 1;
      const int64_t token = first + own < p_.tokens ? first + own : p_.tokens - 1;
      bring(p_.q, p_.q_vectors, p_.q.at(b_, h_ * p_.group_size + r / p_.probes, r % p_.probes), channel, shared_.q);
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
    // The scale, unless the softcap has applied it, and the mask.
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

  // The row of the tile to which the lane's logits to[c][2 i] and to[c][2 i + 1] belong.
  __device__ __forceinline__ int own_row(int i) const { return warp_ * 16 + g_ + 8 * i; }

 private:
  __device__ __forceinline__ bool is_token(int64_t t) const {
    return p_.mask == nullptr || p_.mask[b_ * p_.mask_stride + t];
  }

  // Loads an operand, (kTile rows, kChannels channels), to shared memory. Two threads share a row: each loads 16
  // channels and splits them into parts. Channels beyond head_dim are zeros.
  __device__ __forceinline__ void bring(const Tokens& from, bool vectors, const char* token, int64_t channel,
                                        Operand<kParts>& to) {
    const int row = static_cast<int>(threadIdx.x) / 2, half = static_cast<int>(threadIdx.x) % 2;
    const int64_t first = channel + half * 16;
    float x[16] = {};
    if (first < p_.head_dim) load_run<16>(token + first * size_of(from.dtype), from.dtype, vectors, x);
#pragma unroll
    for (int k = 0; k < 16; k += 2) split_parts<kParts, kDType>(x + k, row, half * 8 + k / 2, to);
  }

  // Adds the products of 16 channels. Parts i of q and j of k are multiplied only if i + j < kParts: the other products
  // are below the precision of float32.
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

// First pass, on a grid of (heads * tiles of rows, spans). A thread block computes the row max and the sum of exp of
// one tile of rows over one span of the keys.
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
    // Online softmax. The four lanes that share a row agree on its max; each keeps the sum over its own tokens.
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
  // Adds the partial sums of the four lanes of a row and writes the result.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    for (int offset = 1; offset < 4; offset *= 2) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], offset);
    const int64_t own = row + tile.own_row(r);
    if (threadIdx.x % 4 == 0 && own < p.rows) p.partials[(head * p.rows + own) * p.spans + span] = {most[r], sum[r]};
  }
}

// lse of a row: given, or merged from the row's spans in their order. It is -inf for a row that sees nothing.
__device__ __forceinline__ float log_sum(const DeviceSaliency& p, int64_t head, int64_t row) {
  if (p.lse != nullptr) return p.lse[head * p.rows + row];
  const float2* spans = p.partials + (head * p.rows + row) * p.spans;
  float most = -kInfinity, sum = 0.0f;
  for (int64_t s = 0; s < p.spans; ++s) most = fmaxf(most, spans[s].x);
  const float relative = most == -kInfinity ? 0.0f : most;
  for (int64_t s = 0; s < p.spans; ++s) sum += spans[s].y * exp_of_negative(spans[s].x - relative);
  return sum == 0.0f ? -kInfinity : most + logf(sum);
}

// Second pass. A thread block takes one tile of tokens of one head, goes through all tiles of rows that see some of
// them, and writes the tokens' sums. Each lane keeps partial sums of its 16 tokens over the rows that it holds.
template <int kParts, DType kDType>
__global__ void __launch_bounds__(kThreads, kBlocks) columns_kernel(const __grid_constant__ DeviceSaliency p) {
  SINGLEPASS_SHARED(Shared<kParts>, shared);
  const int64_t tiles = (p.tokens + kTile - 1) / kTile, head = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kTile;
  Tile<kParts, kDType> tile(p, shared, head);
  float sums[kColumns][2] = {}, logits[kColumns][4];
  for (int64_t row = 0; row < p.rows; row += kTile) {
    if (!tile.look(row, first)) continue;
    // logits() has barriers between these writes and the reads below.
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
  // Adds the partial sums of the lanes with the same t (they have other rows), then those of the warps, in their order.
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

DeviceSaliency on_device(const Saliency& p, const Gpu& gpu) {
  DeviceSaliency d = {};
  static_cast<Saliency&>(d) = p;
  d.q_vectors = are_vectors(p.q);
  d.k_vectors = are_vectors(p.k);
  d.rows = p.group_size * p.probes;
  // The number of tokens alone decides on the spans, so that results are the same bits on every GPU.
  const int64_t tiles = (p.tokens + kTile - 1) / kTile, least = kLeastSpan / kTile;
  const int64_t tiles_of_span = std::max<int64_t>(least, (tiles + kMaxSpans - 1) / kMaxSpans);
  d.span = tiles_of_span * kTile;
  d.spans = (tiles + tiles_of_span - 1) / tiles_of_span;
  const int64_t sums = p.lse != nullptr ? 0 : d.batch * d.heads * d.rows * d.spans;
  d.partials = static_cast<float2*>(gpu.allocate(sums * static_cast<int64_t>(sizeof(float2))));
  return d;
}

template <int kParts, DType kDType>
void launch_passes(const DeviceSaliency& d, const Gpu& gpu) {
  const int64_t heads = d.batch * d.heads;
  const dim3 tokens(static_cast<unsigned>(heads * ((d.tokens + kTile - 1) / kTile)));
  if (d.lse == nullptr && d.rows > 0) {
    const dim3 rows(static_cast<unsigned>(heads * ((d.rows + kTile - 1) / kTile)), static_cast<unsigned>(d.spans));
    launch(&sums_kernel<kParts, kDType>, rows, dim3(kThreads), 0, gpu, d);
  }
  launch(&columns_kernel<kParts, kDType>, tokens, dim3(kThreads), 0, gpu, d);
}

}  // namespace

void saliency(const Saliency& p, const Gpu& gpu) {
  if (p.batch * p.heads * p.tokens == 0) return;
  const DeviceSaliency d = on_device(p, gpu);
  // Float32 takes three parts, and so do q and k of different dtypes, which have no MMA of their own.
  if (p.q.dtype != p.k.dtype || p.q.dtype == DType::kFloat32) return launch_passes<3, DType::kBFloat16>(d, gpu);
  if (p.q.dtype == DType::kBFloat16) return launch_passes<1, DType::kBFloat16>(d, gpu);
  launch_passes<1, DType::kFloat16>(d, gpu);
}

}  // namespace singlepass::kv
