// SPDX-License-Identifier: Apache-2.0
#include <cfloat>

#include "kv/runs.h"
#include "kv/saliency_tile.h"

// Attention that tokens receive from probes, in two passes over the keys. The first pass computes lse, the logarithm of
// each row's sum of exp, unless lse is given. The second pass sums exp(logit - lse) over the rows, for each token.
// Logits are computed tile by tile on tensor cores and never stored; rows are kept in the first pass, and tokens in the
// second, so that both sum over what goes by. Everything is to the base of 2 in between.
namespace singlepass::kv {
namespace {

constexpr int64_t kLeastSpan = 512, kMaxKeySpans = 8, kMaxRowSpans = 2;  // minimum lines of a span, maximum spans
constexpr int kSpanUnit = 64;                      // a span is a multiple of it, and it of the tiles' lines
constexpr int64_t kMostLines = INT32_MAX - kKept;  // so that numbers of lines are ints
constexpr int kCopyThreads = 256;
constexpr float kLowest = -1e38f;  // below all logits, and finite, even as -kLowest
constexpr float kSlack = 4.0f;     // by which a logit may exceed what its row's sum is relative to

// The grid numbers them, so there are fewer than 2^31.
SINGLEPASS_HD int tiles_of(int64_t count, int lines) {
  return static_cast<int>((count + lines - 1) / lines);
}

// lse of a row: merged from its spans in their order. It is -inf for a row that sees nothing. Volatile: other thread
// blocks of the launch have written them.
__device__ __forceinline__ float merge_spans(const DeviceSaliency& p, int64_t row) {
  const volatile float2* spans = p.row_partials + row * p.key_spans.count;
  float most = kLowest, sum = 0.0f;
  for (int s = 0; s < p.key_spans.count; ++s) most = fmaxf(most, spans[s].x);
  for (int s = 0; s < p.key_spans.count; ++s) sum += spans[s].y * exp2_of(spans[s].x - most);
  return most + log2f(sum);
}

template <int kCount>
__device__ __forceinline__ float sum_of(const float* x) {
  if constexpr (kCount == 1)
    return x[0];
  else
    return sum_of<kCount / 2>(x) + sum_of<kCount / 2>(x + kCount / 2);
}

// Sum of 2^(logit - base(i)) over what a lane has of its kept line r.
template <int kParts, class Base>
__device__ __forceinline__ float sum_of_weights(const Products<kParts>& x, int r, float factor, const Base& base) {
  constexpr int kCount = kLines<kParts> / 4;
  float weights[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    weights[i] = exp2_of(multiply_add(x[r / 2][i / 2][r % 2 * 2 + i % 2], factor, -base(i)));
  }
  return sum_of<kCount>(weights);
}

// First pass, on a grid of (heads * tiles of kept rows, spans). A thread block sums over one span of the keys; each
// lane over the keys that it holds, relative to a logit of its own. The last thread block of a tile of rows merges the
// spans.
template <int kParts, DType kDType, bool kWhole>
__global__ void __launch_bounds__(kSaliencyThreads, kBlocks<kParts>)
    sums_kernel(const __grid_constant__ DeviceSaliency p) {
  SINGLEPASS_SHARED(SaliencyShared<kParts>, shared);
  const int row_tiles = tiles_of(p.rows, kKept), row_tile = static_cast<int>(blockIdx.x) % row_tiles;
  const int head = static_cast<int>(blockIdx.x) / row_tiles, span = static_cast<int>(blockIdx.y);
  const int of_span = p.key_spans.lines / kLines<kParts>;
  SaliencyTiles<kParts, kDType, kWhole, QueryLines<kParts>, KeyLines<kParts>> tiles(p, shared, head, row_tile,
                                                                                    span * of_span);
  const int visible = tiles_of(std::min(p.tokens, int64_t{tiles.highest_bound()}), kLines<kParts>);
  float base[kOwn], sum[kOwn] = {};
#pragma unroll
  for (int r = 0; r < kOwn; ++r) base[r] = kLowest;
  tiles.run(std::min((span + 1) * of_span, visible), [&](const Products<kParts>& x, const float*) {
    float most[kOwn];
    bool is_above = false;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      most[r] = -kInfinity;
#pragma unroll
      for (const auto& logits : x[r / 2]) most[r] = fmaxf(most[r], fmaxf(logits[r % 2 * 2], logits[r % 2 * 2 + 1]));
      is_above = is_above || multiply_add(most[r], p.factor, -base[r]) > kSlack;
    }
    if (__any_sync(kAllLanes, is_above)) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const float higher = fmaxf(base[r], most[r] * p.factor);
        sum[r] *= exp2_of(base[r] - higher);
        base[r] = higher;
      }
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) sum[r] += sum_of_weights<kParts>(x, r, p.factor, [&](int) { return base[r]; });
  });
  const int64_t first = head * p.rows + int64_t{row_tile} * kKept;
  // Adds the sums of the four lanes of a row.
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    float most = base[r];
    for (int offset = 1; offset < 4; offset *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
    sum[r] *= exp2_of(base[r] - most);
    for (int offset = 1; offset < 4; offset *= 2) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], offset);
    const int own = tiles.own(r);
    if (threadIdx.x % 4 == 0 && row_tile * int64_t{kKept} + own < p.rows)
      p.row_partials[(first + own) * p.key_spans.count + span] = {most, sum[r]};
  }
  if (!is_last_block(&p.tickets[blockIdx.x], gridDim.y)) return;
  if (int64_t{row_tile} * kKept + threadIdx.x < p.rows)
    p.made_lse[first + threadIdx.x] = merge_spans(p, first + threadIdx.x);
}

// Second pass, on a grid of (heads * tiles of kept tokens, spans). A thread block sums over one span of the rows, each
// lane over those that it holds. The last thread block of a tile of tokens adds up the spans.
template <int kParts, DType kDType, bool kWhole>
__global__ void __launch_bounds__(kSaliencyThreads, kBlocks<kParts>)
    columns_kernel(const __grid_constant__ DeviceSaliency p) {
  SINGLEPASS_SHARED(SaliencyShared<kParts>, shared);
  const int token_tiles = tiles_of(p.tokens, kKept), token_tile = static_cast<int>(blockIdx.x) % token_tiles;
  const int head = static_cast<int>(blockIdx.x) / token_tiles, span = static_cast<int>(blockIdx.y);
  const int of_span = p.row_spans.lines / kLines<kParts>;
  SaliencyTiles<kParts, kDType, kWhole, KeyLines<kParts>, QueryLines<kParts>> tiles(p, shared, head, token_tile,
                                                                                    span * of_span);
  float sum[kOwn] = {};
  const int end = std::min((span + 1) * of_span, tiles_of(p.rows, kLines<kParts>));
  tiles.run(end, [&](const Products<kParts>& x, const float* lse) {
    float2 of_rows[kLines<kParts> / 8];
#pragma unroll
    for (int c = 0; c < kLines<kParts> / 8; ++c) of_rows[c] = *reinterpret_cast<const float2*>(lse + 8 * c);
    const auto base = [&](int i) { return i % 2 == 0 ? of_rows[i / 2].x : of_rows[i / 2].y; };
#pragma unroll
    for (int r = 0; r < kOwn; ++r) sum[r] += sum_of_weights<kParts>(x, r, p.factor, base);
  });
  const int64_t first = head * p.tokens + int64_t{token_tile} * kKept;
  const int count = static_cast<int>(gridDim.y);
  // Adds the sums of the four lanes of a token.
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    for (int offset = 1; offset < 4; offset *= 2) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], offset);
    const int own = tiles.own(r);
    if (threadIdx.x % 4 != 0 || token_tile * int64_t{kKept} + own >= p.tokens) continue;
    (count == 1 ? p.sums : p.token_partials)[(first + own) * count + span] = sum[r];
  }
  if (count == 1 || !is_last_block(&p.tickets[blockIdx.x], gridDim.y)) return;
  if (int64_t{token_tile} * kKept + threadIdx.x >= p.tokens) return;
  const volatile float* spans = p.token_partials + (first + threadIdx.x) * count;  // others have written them
  float total = 0.0f;
  for (int s = 0; s < count; ++s) total += spans[s];
  p.sums[first + threadIdx.x] = total;
}

// An element in each thread.
__global__ void __launch_bounds__(kCopyThreads)
    copy_kernel(Tokens from, Tokens to, int64_t heads, int64_t tokens, int64_t head_dim, int64_t elements) {
  const int64_t i = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x;
  if (i >= elements) return;
  const int64_t token = i / head_dim, head = token / tokens, channel = i % head_dim;
  Raw<1> raw;
  float x;
  load(from.at(head / heads, head % heads, token % tokens), from.dtype, channel, raw);
  decode(raw, from.dtype, &x);
  store(encode<1>(&x, to.dtype), to.dtype, to.data, i);
}

// Tokens as tiles take them, aligned to 16 bytes and of this dtype: the same, or a copy.
Tokens as_lines(const Tokens& x, int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim, DType dtype,
                const Gpu& gpu) {
  const int64_t elements = batch * heads * tokens * head_dim;
  if ((are_vectors(x) && x.dtype == dtype) || elements == 0) return x;
  const int64_t of_head = tokens * head_dim;
  const Tokens copy = {gpu.allocate(elements * size_of(dtype)), dtype, heads * of_head, of_head, head_dim};
  const dim3 blocks(static_cast<unsigned>((elements + kCopyThreads - 1) / kCopyThreads));
  launch(&copy_kernel, blocks, dim3(kCopyThreads), 0, gpu, x, copy, heads, tokens, head_dim, elements);
  return copy;
}

// Numbers of lines alone decide on spans, so that results are the same bits on every GPU.
Spans spans_of(int64_t lines, int64_t most) {
  const int64_t span = std::max(kLeastSpan, (lines + most - 1) / most);
  const int rounded = tiles_of(span, kSpanUnit) * kSpanUnit;
  return {std::max(1, tiles_of(lines, rounded)), rounded};
}

template <int kParts>
DeviceSaliency on_device(const Saliency& p, const Gpu& gpu) {
  DeviceSaliency d = {};
  static_cast<Saliency&>(d) = p;
  const DType dtype = kParts == 1 ? p.k.dtype : DType::kFloat32;
  d.q = as_lines(p.q, p.batch, p.heads * p.group_size, p.probes, p.head_dim, dtype, gpu);
  d.k = as_lines(p.k, p.batch, p.heads, p.tokens, p.head_dim, dtype, gpu);
  d.rows = p.group_size * p.probes;
  d.probes = std::max<int64_t>(p.probes, 1);  // rows are divided by it, even if there are none
  d.next_heads = static_cast<int>(kLines<kParts> / d.probes);
  d.next_probes = static_cast<int>(kLines<kParts> % d.probes);
  d.flip = p.scale >= 0.0f ? 0u : kParts == 1 ? 0x80008000u : 0x80000000u;
  const float scale = std::fabs(p.scale);
  if (p.softcap > 0.0f) d.before_cap = scale / p.softcap;
  d.factor = std::max(kLog2E * (p.softcap > 0.0f ? p.softcap : scale), FLT_MIN);  // -inf times it stays -inf
  d.lse_factor = kLog2E;
  d.key_spans = spans_of(p.tokens, kMaxKeySpans);
  d.row_spans = spans_of(d.rows, kMaxRowSpans);
  return d;
}

template <class T>
T* allocate(const Gpu& gpu, int64_t count) {
  return static_cast<T*>(gpu.allocate(count * static_cast<int64_t>(sizeof(T))));
}

template <int kParts, DType kDType, bool kWhole>
void launch_passes(const Saliency& p, const Gpu& gpu) {
  DeviceSaliency d = on_device<kParts>(p, gpu);
  const int64_t heads = p.batch * p.heads, rows = heads * d.rows, tokens = heads * p.tokens;
  const int64_t row_tiles = heads * tiles_of(d.rows, kKept), token_tiles = heads * tiles_of(p.tokens, kKept);
  d.tickets = gpu.tickets(std::max(row_tiles, token_tiles));
  if (d.row_spans.count > 1) d.token_partials = allocate<float>(gpu, tokens * d.row_spans.count);
  const auto start = [&](auto kernel, int64_t tiles, const Spans& spans) {
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(spans.count));
    launch(kernel, grid, dim3(kSaliencyThreads), 0, gpu, d);
  };
  if (p.lse == nullptr && rows > 0) {
    d.row_partials = allocate<float2>(gpu, rows * d.key_spans.count);
    d.made_lse = allocate<float>(gpu, rows);
    start(&sums_kernel<kParts, kDType, kWhole>, row_tiles, d.key_spans);
    d.lse = d.made_lse;
    d.lse_factor = 1.0f;
  }
  start(&columns_kernel<kParts, kDType, kWhole>, token_tiles, d.row_spans);
}

template <DType kDType>
void launch_of(const Saliency& p, const Gpu& gpu) {
  if (p.head_dim <= kChannels<1>) return launch_passes<1, kDType, true>(p, gpu);
  launch_passes<1, kDType, false>(p, gpu);
}

}  // namespace

void saliency(const Saliency& p, const Gpu& gpu) {
  if (p.batch * p.heads * p.tokens == 0) return;
  const int64_t rows = p.group_size * p.probes;
  if (std::max(rows, p.tokens) > kMostLines) {
    throw std::runtime_error(std::string(gpu.op) + ": expected at most " + std::to_string(kMostLines) +
                             " tokens, and rows of a head; got " + std::to_string(p.tokens) + " and " +
                             std::to_string(rows) + ". Give fewer probes at a time.");
  }
  // Float32 takes three parts, and so do q and k of different dtypes, which have no MMA of their own.
  if (p.q.dtype != p.k.dtype || p.q.dtype == DType::kFloat32) return launch_passes<3, DType::kBFloat16, false>(p, gpu);
  if (p.q.dtype == DType::kBFloat16) return launch_of<DType::kBFloat16>(p, gpu);
  launch_of<DType::kFloat16>(p, gpu);
}

}  // namespace singlepass::kv
