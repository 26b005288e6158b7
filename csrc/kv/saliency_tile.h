// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "common/async_copy.h"
#include "common/math.h"
#include "common/mma.h"
#include "common/raw.h"
#include "common/reduce.h"
#include "kv/saliency_lines.h"

// Products of lines, on tensor cores. A thread block keeps kKept lines of one operand, of which each warp has 32 in
// registers, as long as they fit; tiles of the other operand go through shared memory, where one is computed with while
// the next one is copied. So of what tensor cores take, only half comes from shared memory, and each load there is used
// for two groups of 16 lines.
namespace singlepass::kv {

inline constexpr int kSaliencyThreads = 128, kWarps = kSaliencyThreads / kWarp;
inline constexpr int kKept = kSaliencyThreads;  // each thread finds out about one
inline constexpr int kOwn = 4;                  // kept lines of a lane's products: g + 8 i of its warp's
inline constexpr int kUnits = 4;                // in shared memory at a time
inline constexpr int kRunBytes = 16;            // of a line: neighbouring channels that a lane has
inline constexpr int kRuns = 4;                 // of a unit, which as many lanes share
inline constexpr int kLeastUnit = 16;           // channels of an MMA; there are always a multiple of it

template <int kParts>
inline constexpr int kRun = kRunBytes / kSize<kParts>;
template <int kParts>
inline constexpr int kUnit = kRun<kParts> * kRuns;
template <int kParts>
inline constexpr int kChannels = kUnit<kParts> * kUnits;  // of a step
template <int kParts>
inline constexpr int kMmas = kUnit<kParts> / kLeastUnit;

// Thread blocks per multiprocessor, at least; registers are limited to fit them.
template <int kParts>
inline constexpr int kBlocks = kParts == 1 ? 3 : 2;

template <int kParts>
struct SaliencyShared {
  // Two tiles. What is added to a line makes neighbours lie in different banks.
  alignas(16) char lines[2][kLines<kParts>][(kUnits + 1) * kRuns * kRunBytes];
  alignas(8) int bounds[2][kLines<kParts>];
  alignas(8) float lse[2][kLines<kParts>];
  const char* kept[kKept];
  int kept_bounds[kKept];
  alignas(16) int highest[kWarps];  // bound of each warp's kept lines
};

// A run of channels as MMAs take it: pairs of 16-bit numbers.
template <int kParts>
struct Operand {
  uint32_t pairs[kParts][2 * kMmas<kParts>];
};

template <int kParts, DType kDType>
__device__ __forceinline__ Operand<kParts> load_operand(const char* from, uint32_t flip = 0) {
  uint32_t words[4];
  load_four(from, words);
  Operand<kParts> run;
#pragma unroll
  for (int k = 0; k < 4; ++k) words[k] ^= flip;
#pragma unroll
  for (int k = 0; k < 2 * kMmas<kParts>; ++k) {
    if constexpr (kParts == 1) {
      run.pairs[0][k] = words[k];
    } else {
      float first = bit_cast<float>(words[2 * k]), second = bit_cast<float>(words[2 * k + 1]);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t pair = run.pairs[part][k] = pack_pair(first, second, kDType);
        first -= element_of(pair, 0, kDType);
        second -= element_of(pair, 1, kDType);
      }
    }
  }
  return run;
}

// Of a warp, for lane (g, t) = (lane / 4, lane % 4): [m][c][i] belongs to the warp's kept line 16 m + g + 8 (i / 2),
// the lane's own line 2 m + i / 2, and to the tile's line 8 c + 2 t + i % 2.
template <int kParts>
using Products = float[2][kLines<kParts> / 8][4];

// Kept and Other are QueryLines and KeyLines, or KeyLines and QueryLines. kWhole: one step takes all channels, so that
// kept lines stay in registers from one tile to the next. All threads of the thread block call a function together.
template <int kParts, DType kDType, bool kWhole, class Kept, class Other>
class SaliencyTiles {
 public:
  // The first tile is the one that run() begins with.
  __device__ __forceinline__ SaliencyTiles(const DeviceSaliency& p, SaliencyShared<kParts>& shared, int head,
                                           int kept_tile, int first_tile)
      : p_(p),
        shared_(shared),
        g_(static_cast<int>(threadIdx.x) % kWarp / 4),
        t_(static_cast<int>(threadIdx.x) % 4),
        line_(static_cast<int>(threadIdx.x) / kSharers),
        other_(p, head, first_tile * kLines<kParts> + line_) {
    const int i = static_cast<int>(threadIdx.x), warp = i / kWarp;
    // The last line stands in for those that do not exist, which see nothing.
    const int number = kept_tile * kKept + i, last = Kept::count(p) - 1;
    const Kept kept(p, head, std::min(number, last));
    shared.kept[i] = kept.data();
    highest_ = lowest_ = shared.kept_bounds[i] = number <= last ? kept.bound() : Kept::kNever;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      highest_ = std::max(highest_, __shfl_xor_sync(kAllLanes, highest_, offset));
      lowest_ = std::min(lowest_, __shfl_xor_sync(kAllLanes, lowest_, offset));
    }
    if (i % kWarp == 0) shared.highest[warp] = highest_;
    __syncthreads();
    highest_of_all_ = shared.highest[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) highest_of_all_ = std::max(highest_of_all_, shared.highest[w]);
  }

  // Of all kept lines.
  __device__ __forceinline__ int highest_bound() const { return highest_of_all_; }

  // The kept line of the thread block that is the lane's own number i.
  __device__ __forceinline__ int own(int i) const { return static_cast<int>(threadIdx.x) / kWarp * kWarp + g_ + 8 * i; }

  // Calls use(products, lse) for each tile before `end` in which lines of the warp see each other; p.factor makes
  // logits to the base of 2 of products. These are -inf where lines do not see each other. lse: of the lane's pairs of
  // lines.
  template <class Use>
  __device__ __forceinline__ void run(int end, const Use& use) {
    bool is_next = begin_tile(end, 0);
    if (kWhole && is_next) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) kept_[unit] = load_kept(unit * kUnit<kParts>);
    }
    for (int slot = 0; is_next; slot ^= 1) {
      Products<kParts> x = {};
      Sight sight;
      int channel = 0;
      do {
        wait_for_copies();
        stage_ ^= 1;
        if (!kWhole && channel + kChannels<kParts> < head_dim()) {
          __syncthreads();
          bring(channel + kChannels<kParts>);
        } else {
          is_next = begin_tile(end, slot ^ 1);
        }
        sight = look(slot);
        if (sight.any) multiply(channel, x);
        channel += kChannels<kParts>;
      } while (!kWhole && channel < head_dim());
      if (sight.any) {
        cap(x);
        if (!sight.all) mask(slot, x);
        use(x, &shared_.lse[slot][2 * t_]);
      }
    }
  }

 private:
  static constexpr int kPitch = sizeof(SaliencyShared<kParts>::lines[0][0]);
  static constexpr int kSharers = kSaliencyThreads / kLines<kParts>;  // threads that bring a line together

  // A unit of channels of the kept lines, for MMAs.
  struct Unit {
    uint32_t words[2][kParts][kMmas<kParts>][4];
  };

  __device__ __forceinline__ int head_dim() const { return static_cast<int>(p_.head_dim); }

  // Finds the next tile of which a line and a kept one see each other, and begins to bring it. Returns whether there is
  // one before `end`. It is also a barrier.
  __device__ __forceinline__ bool begin_tile(int end, int slot) {
    const int lines = end * kLines<kParts>;
    int bound = 0;
    const auto is_found = [&] {
      bound = other_.bound();
      return __syncthreads_or(other_.number() >= lines || bound + highest_of_all_ > 0) != 0;
    };
    bool found = is_found();
    while (!found) {
      other_.go_on();
      found = is_found();
    }
    if (other_.number() >= lines) return false;
    if (threadIdx.x % kSharers == 0) {
      shared_.bounds[slot][line_] = bound;
      if constexpr (Other::kAreQueries) shared_.lse[slot][line_] = other_.lse();
    }
    source_ = other_.data();
    channels_ = other_.exists() ? head_dim() : 0;
    bring(0);
    other_.go_on();
    return true;
  }

  // Begins to bring channels of a tile to the stage that is not computed with. Lines that do not exist are zeros, and
  // so are channels.
  __device__ __forceinline__ void bring(int first) {
    char* const to = shared_.lines[stage_ ^ 1][line_];
    const int turn = kSharers == 2 ? line_ & 2 : 0;  // so that lines whose pieces are written together differ in banks
#pragma unroll
    for (int i = 0; i < kUnits * kRuns / kSharers; ++i) {
      const int run = (static_cast<int>(threadIdx.x) % kSharers + kSharers * i) ^ turn;
      const int channel = first + run * kRun<kParts>;
      copy_async(to + run * kRunBytes, source_ + channel * kSize<kParts>, channel < channels_);
    }
  }

  // Whether any or all of the warp's kept lines and of a tile's lines see each other.
  struct Sight {
    bool any, all;
  };
  __device__ __forceinline__ Sight look(int slot) const {
    int highest = -INT32_MAX, lowest = INT32_MAX;
#pragma unroll
    for (int i = 0; i < kLines<kParts>; i += kWarp) {
      const int bound = shared_.bounds[slot][static_cast<int>(threadIdx.x) % kWarp + i];
      highest = std::max(highest, bound);
      lowest = std::min(lowest, bound);
    }
    return {__any_sync(kAllLanes, highest + highest_ > 0) != 0, __all_sync(kAllLanes, lowest + lowest_ > 0) != 0};
  }

  // Of the kept lines, from a channel on: pairs of line g and of line g + 8 by turns.
  __device__ __forceinline__ Unit load_kept(int channel) const {
    channel += t_ * kRun<kParts>;
    Unit unit;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const char* const from = shared_.kept[own(i)] + channel * kSize<kParts>;
      Operand<kParts> run = {};
      if (kUnit<kParts> == kLeastUnit || channel < head_dim())
        run = load_operand<kParts, kDType>(global_memory(from), p_.flip);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int k = 0; k < 2 * kMmas<kParts>; ++k) {
          unit.words[i / 2][part][k / 2][k % 2 * 2 + i % 2] = run.pairs[part][k];
        }
      }
    }
    return unit;
  }

  // Adds the products of a step's channels. Those of a whole step are one piece of code.
  __device__ __forceinline__ void multiply(int first, Products<kParts>& x) const {
    const int units = (head_dim() - first + kUnit<kParts> - 1) / kUnit<kParts>;
    if constexpr (!kWhole) {
#pragma unroll 1
      for (int unit = 0; unit < std::min(units, int{kUnits}); ++unit) {
        multiply(unit, load_kept(first + unit * kUnit<kParts>), x);
      }
    } else if (units == kUnits) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) multiply(unit, kept_[unit], x);
    } else {
#pragma unroll
      for (int unit = 0; unit < kUnits - 1; ++unit) {
        if (unit < units) multiply(unit, kept_[unit], x);
      }
    }
  }

  // The same of a unit. Which of its channels an MMA takes does not matter, as it is the same of both operands. Parts i
  // and j are multiplied only if i + j < kParts: the other products are below the precision of float32. They are added
  // in the same order in both passes, so that logits are the same bits.
  __device__ __forceinline__ void multiply(int unit, const Unit& kept, Products<kParts>& x) const {
    const char* const lines = &shared_.lines[stage_][g_][(unit * kRuns + t_) * kRunBytes];
#pragma unroll
    for (int c = 0; c < kLines<kParts> / 8; ++c) {
      const Operand<kParts> run = load_operand<kParts, kDType>(lines + 8 * c * kPitch);
#pragma unroll
      for (int key = 0; key < kParts; ++key) {
#pragma unroll
        for (int query = 0; query < kParts - key; ++query) {
          const int kept_part = Kept::kAreQueries ? query : key, part = Kept::kAreQueries ? key : query;
#pragma unroll
          for (int k = 0; k < kMmas<kParts>; ++k) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              multiply_accumulate<kDType>(x[m][c], kept.words[m][kept_part][k], run.pairs[part][2 * k],
                                          run.pairs[part][2 * k + 1]);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void cap(Products<kParts>& x) const {
    if (p_.softcap <= 0.0f) return;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int c = 0; c < kLines<kParts> / 8; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][c][i] = tanhf(x[m][c][i] * p_.before_cap);
      }
    }
  }

  __device__ __forceinline__ void mask(int slot, Products<kParts>& x) const {
#pragma unroll
    for (int c = 0; c < kLines<kParts> / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& product = x[i / 4][c][i % 4];
        const bool seen = shared_.kept_bounds[own(i / 2)] + shared_.bounds[slot][8 * c + 2 * t_ + i % 2] > 0;
        product = seen ? product : -kInfinity;
      }
    }
  }

  const DeviceSaliency& p_;
  SaliencyShared<kParts>& shared_;
  const int g_, t_, line_;        // line_: of a tile, which the thread brings with others
  Other other_;                   // that line of the next tile to find
  int highest_, lowest_;          // bounds of the warp's kept lines
  int highest_of_all_;            // and of the thread block's
  int stage_ = 1;                 // that is computed with
  const char* source_ = nullptr;  // the line of the tile that is brought
  int channels_ = 0;              // that there are of it
  Unit kept_[kWhole ? kUnits : 1];
};

}  // namespace singlepass::kv
