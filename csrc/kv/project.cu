// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/mma.h"
#include "common/reduce.h"
#include "kv/problem.h"
#include "kv/runs.h"

// Tokens times bases, on tensor cores: numbers are sums of bfloat16 parts, three of which hold a float32. A thread
// block computes a tile of rows and columns of one head. Rows are the tokens of all heads of x that share its basis, of
// all sequences, so that few blocks read a basis; blocks of the same rows follow one another, so that x comes from
// memory once.
//
// Products may be added in any order: lane (g, t) = (lane / 4, lane % 4) holds channels 8 t to 8 t + 7 of every kStep,
// which it reads at once, where its two MMAs have 2 t and the like. Of every 16 columns it gets 4 t to 4 t + 3, which
// it writes at once, where two MMAs have 2 t and 2 t + 1.
namespace singlepass::kv {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kBlocks = 4;     // thread blocks per multiprocessor; registers are limited to fit them
constexpr int kMaxHeads = 32;  // of a launch, whose arguments they are
constexpr int kParts = 3;
constexpr int kStep = 32;  // channels of two MMAs
constexpr int kRun = 8;    // channels of a lane's vector

// A head of one source, and where it goes to.
struct Head {
  Tokens x, out;  // from the first of its heads on
  const float* basis;
  int head_dim, rank, rotated;
  int parts;  // that a number of x, rotated or not, is a sum of
  bool x_vectors, basis_vectors, out_vectors, turn_vectors;
};

struct DeviceProjection {
  int64_t rows, group_size, tokens;
  unsigned column_tiles;
  Tokens cos, sin;
  Head heads[kMaxHeads];
};
static_assert(sizeof(DeviceProjection) <= 4096, "more than a kernel's parameters");

// How warps share a tile of kTile rows and columns. Each has kWide groups of 16 rows and of 16 columns; those that
// share them have channels of their own, and add up in the end.
template <int kTile>
struct Cut {
  static constexpr int kWide = kTile / 16 < 2 ? kTile / 16 : 2, kAcross = kTile / 16 / kWide;
  static constexpr int kSplits = kWarps / (kAcross * kAcross);
  static constexpr int kChannels = 2048 / kTile;  // in shared memory at a time
};

// The place of a column in shared memory: neighbours, and those four apart, are in different banks.
__device__ __forceinline__ int place(int column) {
  return column ^ (column / 4 % 2);
}

struct Row {
  const char *x, *cos, *sin;
  char* out;
};

// Parts of both operands: of x what a lane's two MMAs take of 16 rows, of the basis columns of pairs of channels.
template <int kTile>
struct Shared {
  static constexpr int kSteps = Cut<kTile>::kChannels / kStep;
  alignas(16) uint32_t x[kSteps][kParts][kTile / 16][2][kWarp][4];
  alignas(16) uint32_t basis[kSteps][kParts][kTile][kStep / 2];
  Row rows[kTile];
  float sums[Cut<kTile>::kSplits][8][kWarp];
};

// Takes the leading 8 bits of two numbers, as a pair of bfloat16; the rest stays. Truncated, because numbers that are
// rounded may become infinite.
__device__ __forceinline__ uint32_t take_leading(float& first, float& second) {
  constexpr uint32_t kLeading = 0xffff0000u;
  const uint32_t low = bit_cast<uint32_t>(first), high = bit_cast<uint32_t>(second);
  first -= bit_cast<float>(low & kLeading);
  second -= bit_cast<float>(high & kLeading);
  return low >> 16 | (high & kLeading);
}

// Channels of a row as they lie in memory: converted at once, each load would be waited for before the next.
__device__ __forceinline__ Raw<kRun> load_channels(const char* row, DType dtype, bool vectors, int first) {
  Raw<kRun> raw = {};
  if (vectors) {
    load(row, dtype, first, raw);
    return raw;
  }
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    Raw<1> one;
    load(row, dtype, first + k, one);
    if (dtype == DType::kFloat32) {
      raw.bits[k] = one.bits[0];
    } else {
      raw.bits[k / 2] |= one.bits[0] << (16 * (k % 2));
    }
  }
  return raw;
}

__device__ __forceinline__ float element(const char* row, DType dtype, int channel) {
  Raw<1> raw;
  float x;
  load(row, dtype, channel, raw);
  decode(raw, dtype, &x);
  return x;
}

// Channels of a row from `first` on, turned against their partners in the other half of what is rotated.
__device__ __forceinline__ void rotate(const Head& head, const Row& row, DType turns, int first, float (&x)[kRun]) {
  if (first >= head.rotated) return;
  const int half = head.rotated / 2;
  const auto turned = [half](int channel, float own, float partner, float cos, float sin) {
    return own * cos + (channel < half ? -partner : partner) * sin;
  };
  if (head.turn_vectors) {
    const int other = first < half ? first + half : first - half;
    const Raw<kRun> raw[3] = {load_channels(row.x, head.x.dtype, true, other),
                              load_channels(row.cos, turns, true, first), load_channels(row.sin, turns, true, first)};
    float partner[kRun], cos[kRun], sin[kRun];
    decode(raw[0], head.x.dtype, partner);
    decode(raw[1], turns, cos);
    decode(raw[2], turns, sin);
#pragma unroll
    for (int k = 0; k < kRun; ++k) x[k] = turned(first, x[k], partner[k], cos[k], sin[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    const int channel = first + k, other = channel < half ? channel + half : channel - half;
    if (channel >= head.rotated) break;
    x[k] = turned(channel, x[k], element(row.x, head.x.dtype, other), element(row.cos, turns, channel),
                  element(row.sin, turns, channel));
  }
}

// A tile of one head. The stages are called by all threads of the thread block together.
template <int kTile>
class Tile {
 public:
  using C = Cut<kTile>;

  __device__ __forceinline__ Tile(const DeviceProjection& p, const Head& head, Shared<kTile>& shared)
      : p_(p),
        head_(head),
        shared_(shared),
        row_(static_cast<int64_t>(blockIdx.x / p.column_tiles) * kTile),
        column_(static_cast<int>(blockIdx.x % p.column_tiles) * kTile),
        split_(threadIdx.x / kWarp / (C::kAcross * C::kAcross)),
        own_row_(threadIdx.x / kWarp / C::kAcross % C::kAcross * C::kWide * 16),
        own_column_(threadIdx.x / kWarp % C::kAcross * C::kWide * 16),
        g_(threadIdx.x % kWarp / 4),
        t_(threadIdx.x % 4) {}

  // Stage 1: where rows are. The last stands in for those that do not exist, and which are not written.
  __device__ __forceinline__ void find_rows() {
    if (threadIdx.x >= kTile) return;
    const int64_t wanted = row_ + threadIdx.x, row = wanted < p_.rows ? wanted : p_.rows - 1;
    const int64_t token = row % p_.tokens, h = row / p_.tokens % p_.group_size, b = row / p_.tokens / p_.group_size;
    shared_.rows[threadIdx.x] = {head_.x.at(b, h, token), p_.cos.at(b, 0, token), p_.sin.at(b, 0, token),
                                 head_.out.at(b, h, token)};
  }

  // Stage 2: brings both operands, from channel `begin` on, to shared memory. Channels beyond head_dim are zeros.
  __device__ __forceinline__ void bring(int begin) {
    const Raw<kRun> x[2] = {load_tokens(Run(0), begin), load_tokens(Run(1), begin)};
    float basis[2][2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_basis(Patch(i), begin, basis[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) share_basis(Patch(i), basis[i]);
    share_tokens(begin, x);
  }

  // Stage 3: adds the products of these channels.
  __device__ __forceinline__ void multiply(int begin) {
    if (row_ + own_row_ >= p_.rows) return;
    for (int step = split_; step < C::kChannels / kStep && begin + step * kStep < head_.head_dim; step += C::kSplits) {
#pragma unroll 1
      for (int part = 0; part < head_.parts; ++part) {
        multiply_part(part, shared_.x[step][part], shared_.basis[step]);
      }
    }
  }

  // Stage 4: adds up the warps' sums, and writes them.
  __device__ __forceinline__ void write() {
    if constexpr (C::kSplits > 1) {
      static_assert(C::kWide == 1);
      const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
      for (int k = 0; k < 8; ++k) shared_.sums[split_][k][lane] = sums_[0][0][k / 4][k % 4];
      __syncthreads();
      if (split_ > 0) return;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        for (int s = 1; s < C::kSplits; ++s) sums_[0][0][k / 4][k % 4] += shared_.sums[s][k][lane];
      }
    }
#pragma unroll
    for (int k = 0; k < 2 * C::kWide; ++k) {
      const int row = own_row_ + 8 * k + g_;
      if (row_ + row >= p_.rows) return;
#pragma unroll
      for (int q = 0; q < C::kWide; ++q) {
        const int column = column_ + own_column_ + 16 * q;
        if (column >= head_.rank) break;
        const auto& s = sums_[k / 2][q];
        const float y[4] = {s[0][k % 2 * 2], s[0][k % 2 * 2 + 1], s[1][k % 2 * 2], s[1][k % 2 * 2 + 1]};
        char* to = shared_.rows[row].out + (column + 4 * t_) * size_of(head_.out.dtype);
        store_run<4>(y, head_.out.dtype, head_.out_vectors, to);
      }
    }
  }

 private:
  static_assert(kTile * C::kChannels == 2 * kRun * kThreads);

  // A thread's part of x: what a lane's two MMAs take, of which this is row g or g + 8.
  struct Run {
    int t, row, step;

    __device__ __forceinline__ explicit Run(int i) {
      const int warp = static_cast<int>(threadIdx.x) / kWarp;
      t = threadIdx.x % 4, row = warp % (kTile / 16) * 16 + threadIdx.x % kWarp / 4 + 8 * i, step = warp / (kTile / 16);
    }
    __device__ __forceinline__ int channel() const { return step * kStep + t * kRun; }
  };

  // A thread's part of the basis: two channels of four columns. A warp has eight columns, whole sectors.
  struct Patch {
    int pair, column, step;

    __device__ __forceinline__ explicit Patch(int i) {
      const int index = static_cast<int>(threadIdx.x) + i * kThreads;
      pair = index % 16, column = index / 16 * 4 % kTile, step = index / 16 * 4 / kTile;
    }
    __device__ __forceinline__ int channel() const { return step * kStep + 2 * pair; }
  };

  __device__ __forceinline__ Raw<kRun> load_tokens(const Run& run, int begin) {
    const int channel = begin + run.channel();
    if (channel >= head_.head_dim) return {};
    return load_channels(shared_.rows[run.row].x, head_.x.dtype, head_.x_vectors, channel);
  }

  __device__ __forceinline__ void load_basis(const Patch& patch, int begin, float (&x)[2][4]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k / 4][k % 4] = 0.0f;
    const int channel = begin + patch.channel(), column = column_ + patch.column;
    if (channel >= head_.head_dim || column >= head_.rank) return;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float* from = head_.basis + static_cast<int64_t>(channel + k) * head_.rank + column;
      load_run<4>(reinterpret_cast<const char*>(from), DType::kFloat32, head_.basis_vectors, x[k]);
    }
  }

  __device__ __forceinline__ void share_tokens(int begin, const Raw<kRun> (&raw)[2]) {
    float x[2][kRun];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Run run(i);
      decode(raw[i], head_.x.dtype, x[i]);
      rotate(head_, shared_.rows[run.row], p_.cos.dtype, begin + run.channel(), x[i]);
    }
    const Run run(0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part >= head_.parts) break;
#pragma unroll
      for (int k = 0; k < kRun; k += 4) {
        const uint32_t words[4] = {take_leading(x[0][k], x[0][k + 1]), take_leading(x[1][k], x[1][k + 1]),
                                   take_leading(x[0][k + 2], x[0][k + 3]), take_leading(x[1][k + 2], x[1][k + 3])};
        store_four(words, bytes(shared_.x[run.step][part][run.row / 16][k / 4][threadIdx.x % kWarp]));
      }
    }
  }

  __device__ __forceinline__ void share_basis(const Patch& patch, float (&x)[2][4]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      auto& to = shared_.basis[patch.step][part];
#pragma unroll
      for (int k = 0; k < 4; ++k) to[place(patch.column + k)][patch.pair] = take_leading(x[0][k], x[1][k]);
    }
  }

  __device__ __forceinline__ static char* bytes(uint32_t* words) { return reinterpret_cast<char*>(words); }

  // A part of x times the parts of the basis, of which those are left out whose products are below float32's precision.
  __device__ __forceinline__ void multiply_part(int part, uint32_t (&x)[kTile / 16][2][kWarp][4],
                                                uint32_t (&basis)[kParts][kTile][kStep / 2]) {
    uint32_t a[C::kWide][2][4];
#pragma unroll
    for (int m = 0; m < 2 * C::kWide; ++m) {
      load_four(bytes(x[own_row_ / 16 + m / 2][m % 2][threadIdx.x % kWarp]), a[m / 2][m % 2]);
    }
    const int column = own_column_ + place(g_ / 2 * 4 + g_ % 2);  // and the one 2 above
#pragma unroll
    for (int n = 0; n < 2 * C::kWide; ++n) {
      if (column_ + own_column_ + n / 2 * 16 >= head_.rank) break;
#pragma unroll
      for (int other = 0; other < kParts; ++other) {
        if (part + other >= kParts) break;
        uint32_t b[4];
        load_four(bytes(&basis[other][column + n / 2 * 16 + n % 2 * 2][4 * t_]), b);
#pragma unroll
        for (int m = 0; m < 2 * C::kWide; ++m) {
          multiply_accumulate<DType::kBFloat16>(sums_[m / 2][n / 2][n % 2], a[m / 2][m % 2], b[m % 2 * 2],
                                                b[m % 2 * 2 + 1]);
        }
      }
    }
  }

  const DeviceProjection& p_;
  const Head& head_;
  Shared<kTile>& shared_;
  const int64_t row_;
  const int column_;
  const int split_, own_row_, own_column_, g_, t_;  // of the warp and of the lane
  float sums_[C::kWide][C::kWide][2][4] = {};       // of groups of rows and of columns, and of two MMAs
};

template <int kTile>
__global__ void __launch_bounds__(kThreads, kBlocks) project_kernel(const __grid_constant__ DeviceProjection p) {
  SINGLEPASS_SHARED(Shared<kTile>, shared);
  const Head& head = p.heads[blockIdx.y];
  if (blockIdx.x % p.column_tiles * kTile >= static_cast<unsigned>(head.rank)) return;
  Tile<kTile> tile(p, head, shared);
  tile.find_rows();
  for (int begin = 0; begin < head.head_dim; begin += Cut<kTile>::kChannels) {
    __syncthreads();
    tile.bring(begin);
    __syncthreads();
    tile.multiply(begin);
  }
  tile.write();
}

Head head_of(const Projection& p, const Projected& of) {
  const Source& source = p.sources[of.source];
  Head head = {};
  head.x = source.x;
  head.out = of.out;
  head.basis = of.basis;
  head.x.data = source.x.at(0, of.head * p.group_size, 0);
  head.out.data = of.out.at(0, of.place * p.group_size, 0);
  head.head_dim = static_cast<int>(source.head_dim);
  head.rank = static_cast<int>(of.rank);
  head.rotated = of.source == 0 && p.cos.data != nullptr ? static_cast<int>(p.rotated) : 0;
  // Float16 has 11 bits; what is rotated is float32.
  head.parts = source.x.dtype == DType::kFloat32 || head.rotated > 0 ? 3 : source.x.dtype == DType::kFloat16 ? 2 : 1;
  head.x_vectors = are_vectors(head.x);
  head.basis_vectors = are_vectors(of.basis, 4, {of.rank});
  head.out_vectors = are_vectors(head.out);
  head.turn_vectors = head.x_vectors && are_vectors(p.cos) && are_vectors(p.sin) && head.rotated % (2 * kRun) == 0;
  return head;
}

template <int kTile>
void launch_tiles(const Projection& p, const Gpu& gpu) {
  DeviceProjection d = {};
  d.rows = p.batch * p.group_size * p.tokens;
  d.group_size = p.group_size;
  d.tokens = p.tokens;
  d.cos = p.cos;
  d.sin = p.sin;
  for (size_t first = 0; first < p.heads.size(); first += kMaxHeads) {
    const size_t heads = std::min<size_t>(kMaxHeads, p.heads.size() - first);
    d.column_tiles = 0;
    for (size_t i = 0; i < heads; ++i) {
      d.heads[i] = head_of(p, p.heads[first + i]);
      d.column_tiles = std::max(d.column_tiles, static_cast<unsigned>(d.heads[i].rank + kTile - 1) / kTile);
    }
    const int64_t tiles = (d.rows + kTile - 1) / kTile * d.column_tiles;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(heads));
    launch(&project_kernel<kTile>, grid, dim3(kThreads), 0, gpu, d);
  }
}

}  // namespace

void project(const Projection& p, const Gpu& gpu) {
  if (p.batch * p.group_size * p.tokens == 0) return;
  // A sequence's shape alone decides, so that results are the same bits in every batch.
  if (p.group_size * p.tokens <= 16) return launch_tiles<16>(p, gpu);
  launch_tiles<64>(p, gpu);
}

}  // namespace singlepass::kv
