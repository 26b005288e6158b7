// SPDX-License-Identifier: Apache-2.0
#include "kv/saliency_tile.h"

// Attention that tokens receive from probes, in two passes over the keys. The first pass computes lse, the logarithm of
// each row's sum of exp, unless lse is given. The second pass sums exp(logit - lse) over the rows, for each token.
// Logits are computed tile by tile on tensor cores and never stored. Rows are the probes of all query heads that share
// a head of keys, one query head after another.
namespace singlepass::kv {
namespace {

constexpr int64_t kLeastSpan = 512, kMaxSpans = 8;  // first pass: minimum tokens of a span, maximum spans of the keys

// The grid numbers them, so there are fewer than 2^31.
SINGLEPASS_HD int tiles_of(int64_t count) {
  return static_cast<int>((count + kSaliencyTile - 1) / kSaliencyTile);
}

// lse of a row: merged from its spans in their order. It is -inf for a row that sees nothing. Volatile: other thread
// blocks of the launch have written them.
__device__ __forceinline__ float merge_spans(const DeviceSaliency& p, int64_t row) {
  const volatile float2* spans = p.partials + row * p.spans;
  float most = -kInfinity, sum = 0.0f;
  for (int64_t s = 0; s < p.spans; ++s) most = fmaxf(most, spans[s].x);
  const float relative = most == -kInfinity ? 0.0f : most;
  for (int64_t s = 0; s < p.spans; ++s) sum += spans[s].y * exp_of_negative(spans[s].x - relative);
  return sum == 0.0f ? -kInfinity : most + logf(sum);
}

// First pass, on a grid of (heads * tiles of rows, spans). A thread block computes the row max and the sum of exp of
// one tile of rows over one span of the keys. The last one of a tile of rows merges the spans.
template <int kParts, DType kDType>
__global__ void __launch_bounds__(kSaliencyThreads, kBlocks<kParts>)
    sums_kernel(const __grid_constant__ DeviceSaliency p) {
  SINGLEPASS_SHARED(SaliencyShared<kParts>, shared);
  const int row_tiles = tiles_of(p.rows), row_tile = static_cast<int>(blockIdx.x) % row_tiles;
  const int64_t head = static_cast<int>(blockIdx.x) / row_tiles, span = blockIdx.y;
  SaliencyTile<kParts, kDType> tile(p, shared, head);
  float most[2] = {-kInfinity, -kInfinity}, sum[2] = {}, logits[kColumns][4];
  const int of_span = static_cast<int>(p.span / kSaliencyTile), end = tiles_of(p.tokens);
  for (int t = static_cast<int>(span) * of_span; t < end && t < static_cast<int>(span + 1) * of_span; ++t) {
    if (!tile.look(row_tile, t)) break;
    tile.logits(row_tile, t, logits);
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
        sum[r] += exp_of_difference(logits[c][2 * r], relative) + exp_of_difference(logits[c][2 * r + 1], relative);
      }
    }
  }
  const int64_t row = int64_t{row_tile} * kSaliencyTile;
  // Adds the partial sums of the four lanes of a row and writes the result.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    for (int offset = 1; offset < 4; offset *= 2) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], offset);
    const int64_t own = row + tile.own_row(r);
    if (threadIdx.x % 4 == 0 && own < p.rows) p.partials[(head * p.rows + own) * p.spans + span] = {most[r], sum[r]};
  }
  if (!is_last_block(&p.tickets[blockIdx.x], gridDim.y)) return;
  const int64_t own = row + threadIdx.x;
  if (threadIdx.x < kSaliencyTile && own < p.rows)
    p.made_lse[head * p.rows + own] = merge_spans(p, head * p.rows + own);
}

// Second pass. A thread block takes one tile of tokens of one head, goes through all tiles of rows that see some of
// them, and writes the tokens' sums. Each lane keeps partial sums of its 16 tokens over the rows that it holds.
template <int kParts, DType kDType>
__global__ void __launch_bounds__(kSaliencyThreads, kBlocks<kParts>)
    columns_kernel(const __grid_constant__ DeviceSaliency p) {
  SINGLEPASS_SHARED(SaliencyShared<kParts>, shared);
  const int token_tiles = tiles_of(p.tokens), token_tile = static_cast<int>(blockIdx.x) % token_tiles;
  const int64_t head = static_cast<int>(blockIdx.x) / token_tiles;
  SaliencyTile<kParts, kDType> tile(p, shared, head);
  float sums[kColumns][2] = {}, logits[kColumns][4];
  for (int row_tile = 0; row_tile < tiles_of(p.rows); ++row_tile) {
    if (!tile.look(row_tile, token_tile)) continue;
    // logits() has barriers between these writes and the reads below. Rows that see nothing, and those that do not
    // exist, add nothing: exp of -inf.
    if (threadIdx.x < kSaliencyTile) {
      const int64_t own = int64_t{row_tile} * kSaliencyTile + threadIdx.x;
      const float lse = own < p.rows ? (p.lse == nullptr ? p.made_lse : p.lse)[head * p.rows + own] : -kInfinity;
      shared.lse[threadIdx.x] = lse == -kInfinity ? kInfinity : lse;
    }
    tile.logits(row_tile, token_tile, logits);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float lse = shared.lse[tile.own_row(r)];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 2; ++i) sums[c][i] += exp_of_difference(logits[c][2 * r + i], lse);
      }
    }
  }
  const int64_t first = int64_t{token_tile} * kSaliencyTile;
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
  if (threadIdx.x >= kSaliencyTile || first + threadIdx.x >= p.tokens) return;
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
  const int64_t tiles = (p.tokens + kSaliencyTile - 1) / kSaliencyTile, least = kLeastSpan / kSaliencyTile;
  const int64_t tiles_of_span = std::max<int64_t>(least, (tiles + kMaxSpans - 1) / kMaxSpans);
  d.span = tiles_of_span * kSaliencyTile;
  d.spans = (tiles + tiles_of_span - 1) / tiles_of_span;
  if (p.lse != nullptr || d.rows == 0) return d;
  const int64_t heads = d.batch * d.heads, rows = heads * d.rows;
  d.partials = static_cast<float2*>(gpu.allocate(rows * d.spans * static_cast<int64_t>(sizeof(float2))));
  d.made_lse = static_cast<float*>(gpu.allocate(rows * static_cast<int64_t>(sizeof(float))));
  d.tickets = gpu.tickets(heads * ((d.rows + kSaliencyTile - 1) / kSaliencyTile));
  return d;
}

template <int kParts, DType kDType>
void launch_passes(const DeviceSaliency& d, const Gpu& gpu) {
  const int64_t heads = d.batch * d.heads;
  const dim3 tokens(static_cast<unsigned>(heads * ((d.tokens + kSaliencyTile - 1) / kSaliencyTile)));
  if (d.lse == nullptr && d.rows > 0) {
    const dim3 rows(static_cast<unsigned>(heads * ((d.rows + kSaliencyTile - 1) / kSaliencyTile)),
                    static_cast<unsigned>(d.spans));
    launch(&sums_kernel<kParts, kDType>, rows, dim3(kSaliencyThreads), 0, gpu, d);
  }
  launch(&columns_kernel<kParts, kDType>, tokens, dim3(kSaliencyThreads), 0, gpu, d);
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
