// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "kv/decode.h"
#include "kv/decode_queries.h"
#include "kv/decode_softmax.h"
#include "kv/tf32.h"

// Attention on tensor cores over the window, whose tokens are not compressed. Queries and weights are sums of two TF32,
// tokens are one if they have 16 bits.
//
// In each MMA the tokens are the 16-row matrix: logits are (tokens, parts of rows), results (channels, parts of rows).
// Column 2 r has the leading parts of row r, column 2 r + 1 the rest. Lane (g, t) = (lane / 4, lane % 4) of a warp
// holds row t of each group of four rows, for eight tokens or channels. Each warp goes through a stretch of tokens by
// itself.
namespace singlepass::kv {

// Shared memory. After this struct come the columns of the queries, (8 * kGroups, head_dim) in float32, each four
// floats longer than needed: lanes that read four floats of a column of their own then meet different banks.
template <int kGroups>
struct WindowShared : SoftmaxShared<kGroups> {
  static constexpr int kColumns = 8 * kGroups;

  __device__ __forceinline__ float* column(int64_t head_dim, int i) {
    return reinterpret_cast<float*>(this + 1) + i * (static_cast<int>(head_dim) + 4);
  }
  static size_t bytes(const DecodeArguments& p) {
    return sizeof(WindowShared) + std::max(4 * kColumns * (p.head_dim + 4), WindowShared::sums_bytes);
  }
};

// kWidth: 128, if keys and values have as many channels, and 0 in general.
template <int kWidth, int kGroups>
class WindowAttention {
 public:
  using Shared = WindowShared<kGroups>;

  __device__ __forceinline__ WindowAttention(const DeviceDecode& p, const Work& work, Shared& shared)
      : p_(p),
        work_(work),
        shared_(shared),
        g_(threadIdx.x % kWarp / 4),
        t_(threadIdx.x % 4),
        head_dim_(width_of<kWidth>(p.head_dim)) {
    const int newest = p.window[work.b * p.window_stride + 1], queries = static_cast<int>(p.queries);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int seen = newest - (queries - 1 - (work.tile * kRows + 4 * group + t_) % queries);
      end_[group] = seen < work.end ? seen : work.end;
    }
  }

  __device__ __forceinline__ void run() {
    for_each_query_run<kRows>(p_, work_, [&](int row, int channel, const float (&x)[kVector]) {
#pragma unroll
      for (int k = 0; k < kVector; k += 4) {
        const Tf32Parts a(x[k]), b(x[k + 1]), c(x[k + 2]), d(x[k + 3]);
        const auto at = [&](int i) { return reinterpret_cast<float4*>(shared_.column(head_dim_, i) + channel + k); };
        *at(2 * row) = {a.leading, b.leading, c.leading, d.leading};
        *at(2 * row + 1) = {a.rest, b.rest, c.rest, d.rest};
      }
    });
    __syncthreads();
    const Share share(work_);
    for (int first = share.begin; first < share.end; first += kChunk) attend(first, share.end - 1);
    write();
  }

 private:
  static constexpr int kRows = 4 * kGroups;

  // One step of the online softmax: kChunk tokens from `first` on. The last token stands in for those beyond it, whose
  // slots may hold anything.
  __device__ __forceinline__ void attend(int first, int last) {
    float weights[kGroups][4], columns[kGroups][4][2];
    with(p_.window_k.dtype, [&](auto dtype) { logits<dtype.value>(first, last, weights); });
#pragma unroll
    for (int k = 0; k < 4 * kGroups; ++k) {
      if (first + 8 * (k % 4) + g_ >= end_[k / 4]) weights[k / 4][k % 4] = -INFINITY;
    }
    softmax_.weigh(weights);
    arrange(weights, columns);
    with(p_.window_v.dtype, [&](auto dtype) { add_values<dtype.value>(first, last, columns); });
  }

  // Calls body with a constant for the dtype. All threads take the same branch.
  template <class Body>
  __device__ __forceinline__ static void with(DType dtype, const Body& body) {
    if (dtype == DType::kFloat32) {
      body(std::integral_constant<DType, DType::kFloat32>{});
    } else if (dtype == DType::kBFloat16) {
      body(std::integral_constant<DType, DType::kBFloat16>{});
    } else {
      body(std::integral_constant<DType, DType::kFloat16>{});
    }
  }

  // Where the head's tokens first, first + apart and so on stand.
  template <DType kDType, int kCount>
  __device__ __forceinline__ void find_tokens(const Tokens& tokens, int first, int apart, int last,
                                              const char* (&to)[kCount]) const {
    const int64_t head = work_.b * tokens.batch_stride + work_.h * tokens.head_stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int slot = first + i * apart;
      const int64_t element = head + static_cast<unsigned>(slot < last ? slot : last) * tokens.token_stride;
      to[i] = static_cast<const char*>(tokens.data) + element * Channels<kDType>::kSize;
    }
  }

  // The same channels of some tokens, zeros if these do not exist.
  template <DType kDType, int kCount>
  __device__ __forceinline__ static void load_channels(const char* const (&tokens)[kCount], int channel, bool any,
                                                       bool vectors, Channels<kDType> (&to)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = {};
    if (!any) return;
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        load_four(global_memory(tokens[i]) + channel * Channels<kDType>::kSize, to[i].bits);
      }
    } else {
      SINGLEPASS_APART(0);  // else vectors wait for what single elements do not load
#pragma unroll 1            // unrolled, they would be most of the code
      for (int k = 0; k < Channels<kDType>::kCount; ++k) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          Raw<1> one;
          load(tokens[i], kDType, channel + k, one);
          to[i].push(one.bits[0]);
        }
      }
    }
  }

  // Stage 1: to[group][j] is the logit of token 8 j + g. Of four vectors of channels lane t has one.
  template <DType kDType>
  __device__ __forceinline__ void logits(int first, int last, float (&to)[kGroups][4]) const {
    constexpr int kCount = Channels<kDType>::kCount;
    const char* tokens[4];
    find_tokens<kDType>(p_.window_k, first + g_, 8, last, tokens);
    Tf32Sums<kDType> sums[kGroups][2];
    for (int begin = 0; begin < head_dim_; begin += 4 * kCount) {
      const int channel = begin + kCount * t_;
      const bool any = kWidth > 0 || channel < head_dim_;
      Channels<kDType> keys[4];
      load_channels(tokens, channel, any, p_.vector_keys, keys);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const float* const q = shared_.column(head_dim_, 8 * group + g_) + (any ? channel : 0);
#pragma unroll
        for (int k = 0; k < kCount; k += 4) {
          const float4 four = *reinterpret_cast<const float4*>(q + k);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const Channels<kDType>&one = keys[2 * i], &other = keys[2 * i + 1];
            sums[group][i].add({one[k], other[k], one[k + 1], other[k + 1]}, four.x, four.y);
            sums[group][i].add({one[k + 2], other[k + 2], one[k + 3], other[k + 3]}, four.z, four.w);
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 4 * kGroups; ++k) to[k / 4][k % 4] = p_.scale * sums[k / 4][k % 4 / 2].of(k % 2);
    if (p_.softcap > 0.0f) {
      for (int k = 0; k < 4 * kGroups; ++k) to[k / 4][k % 4] = capped(p_, to[k / 4][k % 4]);
    }
  }

  // Stage 2: the columns of weights. to[group][s] are tokens 8 s + t and 8 s + t + 4 of column g.
  __device__ __forceinline__ void arrange(const float (&weights)[kGroups][4], float (&to)[kGroups][4][2]) const {
#pragma unroll
    for (int k = 0; k < 8 * kGroups; ++k) {
      const int group = k / 8, s = k / 2 % 4, half = k % 2;
      const Tf32Parts parts(__shfl_sync(kAllLanes, weights[group][s], 4 * (t_ + 4 * half) + g_ / 2));
      to[group][s][half] = g_ % 2 == 0 ? parts.leading : parts.rest;
    }
  }

  // Stage 3: adds the weighted values. Of eight vectors of channels lane g has one.
  template <DType kDType>
  __device__ __forceinline__ void add_values(int first, int last, const float (&columns)[kGroups][4][2]) {
    constexpr int kCount = Channels<kDType>::kCount;
    [[maybe_unused]] constexpr int kUnrolled =                // by compilers that ignore the pragma
        kDType == DType::kFloat32 ? 1 : 4 * kParts / kCount;  // float32, which is rarer, saves code
    const int channels = kWidth > 0 ? kWidth : static_cast<int>(work_.channels(p_));
    const char* tokens[8];
    find_tokens<kDType>(p_.window_v, first + t_, 4, last, tokens);
#pragma unroll kUnrolled
    for (int begin = 0; begin < 8 * 4 * kParts; begin += 8 * kCount, softmax_.template rotate<kCount>()) {
      if (begin >= channels) continue;
      const int channel = begin + kCount * g_;
      Channels<kDType> values[8];
      load_channels(tokens, work_.first_channel() + channel, channel < channels, p_.vector_values, values);
#pragma unroll
      for (int k = 0; k < kCount; k += 2) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          Tf32Sums<kDType> sums;
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            const Channels<kDType>&one = values[2 * s], &other = values[2 * s + 1];
            sums.add({one[k], one[k + 1], other[k], other[k + 1]}, columns[group][s][0], columns[group][s][1]);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) softmax_.add(group, k + i, 1.0f, sums.of(i));
        }
      }
    }
  }

  __device__ __forceinline__ void write() {
    const Partial to(p_, work_);
    const int count = 16 / static_cast<int>(size_of(p_.window_v.dtype));  // channels of a vector
    softmax_.merge(shared_, work_, to, [&](int group, int part, const float4& sum) {
      const int row = 4 * group + t_, channel = 4 * part / count * 8 * count + count * g_ + 4 * part % count;
      if (row >= work_.rows(p_) || channel >= work_.channels(p_)) return;
      *reinterpret_cast<float4*>(to.out + row * p_.value_dim + work_.first_channel() + channel) = sum;
    });
  }

  const DeviceDecode& p_;
  const Work& work_;
  Shared& shared_;
  const int g_, t_, head_dim_;
  int end_[kGroups];  // of the slots that the lane's row sees
  Softmax<kGroups> softmax_;
};

}  // namespace singlepass::kv
