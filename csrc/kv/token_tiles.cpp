// SPDX-License-Identifier: Apache-2.0
#include "kv/token_tiles.h"

#include <cstring>

#include "common/floats.h"
#include "common/math.h"
#include "kv/by_rows.h"

namespace singlepass::kv {
namespace {

template <DType kType>
SINGLEPASS_HD const char* row_of(const TokenRows& tokens, int64_t t) {
  return static_cast<const char*>(tokens.data) + t * tokens.stride * size_of(kType);
}

// Dot products of kRows queries with all tokens, some tokens at a time, so that their sums stay in registers: as many
// as a vector has lanes. Each sum is a vector, whose lanes are added at the end.
template <class Floats, int kRows, DType kType>
SINGLEPASS_HD void dot_rows(const float* q, const TokenRows& tokens, int64_t count, int64_t head_dim, float* scores,
                            int64_t stride) {
  using Vector = typename Floats::Floats;
  constexpr int kTokens = Floats::kSums / (kRows == 3 ? 4 : kRows);
  for (int64_t t = 0; t < count; t += kTokens) {
    const char* rows[kTokens];  // the last token stands in for those after it
    for (int i = 0; i < kTokens; ++i) rows[i] = row_of<kType>(tokens, t + i < count ? t + i : count - 1);
    Vector sums[Floats::kSums] = {};
    for (int64_t d = 0; d < head_dim; d += Floats::kLanes) {
      Vector token[kTokens];
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) token[i] = Floats::template load<kType>(rows[i] + d * size_of(kType));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vector row = load_vector<Vector>(q + r * head_dim + d);
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i) sums[r * kTokens + i] = sums[r * kTokens + i] + row * token[i];
      }
    }
    const Vector result = across_lanes(sums, Add{});
    for (int r = 0; r < kRows; ++r) {
      memcpy(scores + r * stride + t, reinterpret_cast<const float*>(&result) + r * kTokens, kTokens * sizeof(float));
    }
  }
}

// Adds the weighted tokens for kBlocks vectors of channels from d on. The sums of all kRows rows stay in registers over
// all tokens.
template <class Floats, int kRows, DType kType, int kBlocks>
SINGLEPASS_HD void accumulate_channels(const float* weights, int64_t stride, const TokenRows& tokens, int64_t count,
                                       int64_t head_dim, int64_t d, float* to) {
  using Vector = typename Floats::Floats;
  Vector sums[kRows][kBlocks];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < kBlocks; ++k) sums[r][k] = load_vector<Vector>(to + r * head_dim + d + k * Floats::kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    const char* row = row_of<kType>(tokens, t) + d * size_of(kType);
    Vector token[kBlocks];
#pragma GCC unroll 8
    for (int k = 0; k < kBlocks; ++k) {
      token[k] = Floats::template load<kType>(row + k * Floats::kLanes * size_of(kType));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vector weight = broadcast<Vector>(weights[r * stride + t]);
#pragma GCC unroll 8
      for (int k = 0; k < kBlocks; ++k) sums[r][k] = sums[r][k] + weight * token[k];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < kBlocks; ++k) store_vector(sums[r][k], to + r * head_dim + d + k * Floats::kLanes);
  }
}

// Weighted sums of all tokens for kRows rows, kBlocks vectors of channels at a time, then fewer.
template <class Floats, int kRows, DType kType, int kBlocks>
SINGLEPASS_HD void accumulate_rows(const float* weights, int64_t stride, const TokenRows& tokens, int64_t count,
                                   int64_t head_dim, float* to, int64_t d = 0) {
  for (; d + kBlocks * Floats::kLanes <= head_dim; d += kBlocks * Floats::kLanes) {
    accumulate_channels<Floats, kRows, kType, kBlocks>(weights, stride, tokens, count, head_dim, d, to);
  }
  if constexpr (kBlocks > 1) {
    accumulate_rows<Floats, kRows, kType, kBlocks / 2>(weights, stride, tokens, count, head_dim, to, d);
  }
}

template <class Floats, int kRows>
inline constexpr int kBlocksAtOnce = Floats::kSums / (kRows == 1   ? 2
                                                      : kRows == 3 ? 4
                                                                   : kRows);

// The two loops for a kind of processor.
#define SINGLEPASS_KV_LOOPS(name, target, Floats)                                                                    \
  template <int kRows, DType kType>                                                                                  \
  target SINGLEPASS_FUSED_MULTIPLY_ADD void dot_##name(const float* q, const TokenRows& tokens, int64_t count,       \
                                                       int64_t head_dim, float* scores, int64_t stride) {            \
    dot_rows<Floats, kRows, kType>(q, tokens, count, head_dim, scores, stride);                                      \
  }                                                                                                                  \
  template <int kRows, DType kType>                                                                                  \
  target SINGLEPASS_FUSED_MULTIPLY_ADD void accumulate_##name(                                                       \
      const float* weights, int64_t stride, const TokenRows& tokens, int64_t count, int64_t head_dim, float* sums) { \
    accumulate_rows<Floats, kRows, kType, kBlocksAtOnce<Floats, kRows>>(weights, stride, tokens, count, head_dim,    \
                                                                        sums);                                       \
  }

SINGLEPASS_KV_LOOPS(plain, , PlainFloats)
#if defined(SINGLEPASS_HAS_TARGETS)
SINGLEPASS_KV_LOOPS(avx2, SINGLEPASS_TARGET_AVX2, Avx2Floats)
SINGLEPASS_KV_LOOPS(avx512, SINGLEPASS_TARGET_AVX512, Avx512Floats)

#define SINGLEPASS_KV_LOOP(name, ...) \
  choose(name##_plain<__VA_ARGS__>, name##_avx2<__VA_ARGS__>, name##_avx512<__VA_ARGS__>)
#else
#define SINGLEPASS_KV_LOOP(name, ...) name##_plain<__VA_ARGS__>
#endif

// Calls body.template operator()<kRows, kType>(row), as by_rows does.
template <class Body>
void by_rows_and_dtype(int64_t rows, DType dtype, const Body& body) {
  by_rows(rows, [&]<int kRows>(int64_t r) {
    switch (dtype) {
      case DType::kBFloat16:
        return body.template operator()<kRows, DType::kBFloat16>(r);
      case DType::kFloat16:
        return body.template operator()<kRows, DType::kFloat16>(r);
      default:
        return body.template operator()<kRows, DType::kFloat32>(r);
    }
  });
}

}  // namespace

void dot(const float* q, int64_t rows, const TokenRows& tokens, int64_t count, int64_t head_dim, float* scores,
         int64_t stride) {
  by_rows_and_dtype(rows, tokens.dtype, [&]<int n, DType dtype>(int64_t r) {
    SINGLEPASS_KV_LOOP(dot, n, dtype)(q + r * head_dim, tokens, count, head_dim, scores + r * stride, stride);
  });
}

void accumulate(const float* weights, int64_t stride, int64_t rows, const TokenRows& tokens, int64_t count,
                int64_t head_dim, float* sums) {
  by_rows_and_dtype(rows, tokens.dtype, [&]<int n, DType dtype>(int64_t r) {
    SINGLEPASS_KV_LOOP(accumulate, n, dtype)
    (weights + r * stride, stride, tokens, count, head_dim, sums + r * head_dim);
  });
}

}  // namespace singlepass::kv
