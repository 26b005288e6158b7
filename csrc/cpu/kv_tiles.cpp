// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "singlepass/common/dtype.h"
#include "singlepass/common/math.h"
#include "singlepass/common/vector.h"
#include "singlepass/kv/tiles.h"

namespace singlepass::kv {
namespace {

// kRows rows at once with so many tokens, or with so many vectors of channels, that eight sums fill registers.
template <int kRows>
SINGLEPASS_TARGET_CLONES SINGLEPASS_FUSED_MULTIPLY_ADD void dot_rows(const float* q, const float* tokens, int64_t count,
                                                                     int64_t width, float* scores, int64_t stride) {
  constexpr int kTokens = 8 / kRows;
  for (int64_t t = 0; t < count; t += kTokens) {
    Vector sums[8] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      Vector row[kRows];
      for (int r = 0; r < kRows; ++r) row[r] = load_vector(q + r * width + d);
      for (int i = 0; i < kTokens; ++i) {
        const Vector token = load_vector(tokens + (t + i) * width + d);
        for (int r = 0; r < kRows; ++r) sums[r * kTokens + i] = sums[r * kTokens + i] + row[r] * token;
      }
    }
    const Vector result = lane_sums(sums);
    for (int r = 0; r < kRows; ++r) {
      memcpy(scores + r * stride + t, reinterpret_cast<const float*>(&result) + r * kTokens, kTokens * sizeof(float));
    }
  }
}

template <int kRows, int kVectors>
SINGLEPASS_HD void accumulate_vectors(const float* weights, int64_t stride, const float* tokens, int64_t count,
                                      int64_t width, float* sums) {
  Vector sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kVectors; ++k) sum[r][k] = load_vector(sums + r * width + k * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    Vector token[kVectors];
    for (int k = 0; k < kVectors; ++k) token[k] = load_vector(tokens + t * width + k * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vector weight = broadcast<Vector>(weights[r * stride + t]);
      for (int k = 0; k < kVectors; ++k) sum[r][k] = sum[r][k] + weight * token[k];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kVectors; ++k) store_vector(sum[r][k], sums + r * width + k * kLanes);
  }
}

template <int kRows>
SINGLEPASS_TARGET_CLONES SINGLEPASS_FUSED_MULTIPLY_ADD void accumulate_rows(const float* weights, int64_t stride,
                                                                            const float* tokens, int64_t count,
                                                                            int64_t width, float* sums) {
  constexpr int kVectors = 8 / kRows;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= width; d += kVectors * kLanes) {
    accumulate_vectors<kRows, kVectors>(weights, stride, tokens + d, count, width, sums + d);
  }
  for (; d < width; d += kLanes) accumulate_vectors<kRows, 1>(weights, stride, tokens + d, count, width, sums + d);
}

// Calls body.template operator()<n>(row) for n = 4, 2 or 1 rows at a time.
template <class Body>
void by_rows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body.template operator()<4>(r);
  if (r + 2 <= rows) {
    body.template operator()<2>(r);
    r += 2;
  }
  if (r < rows) body.template operator()<1>(r);
}

template <int kBits>
SINGLEPASS_TARGET_CLONES void unpack_rows(const uint8_t* codes, int64_t tokens, int64_t width, float* to) {
  constexpr int kPlanes = 8 / kBits;
  const int64_t bytes = width / kPlanes;
  for (int64_t t = 0; t < tokens; ++t, codes += bytes, to += width) {
    int64_t w = 0;
    for (; w + kLanes <= bytes; w += kLanes) {
      const VectorBits byte = load_bytes(codes + w);
      for (int p = 0; p < kPlanes; ++p) {
        const VectorBits code = (byte >> (p * kBits)) & ((1 << kBits) - 1);
        store_vector(__builtin_convertvector(code, Vector), to + p * bytes + w);
      }
    }
    for (; w < bytes; ++w) {
      for (int p = 0; p < kPlanes; ++p) {
        to[p * bytes + w] = static_cast<float>((codes[w] >> (p * kBits)) & ((1 << kBits) - 1));
      }
    }
  }
}

}  // namespace

void unpack(const uint8_t* codes, int bits, int64_t tokens, int64_t width, float* to) {
  switch (bits) {
    case 2:
      return unpack_rows<2>(codes, tokens, width, to);
    case 4:
      return unpack_rows<4>(codes, tokens, width, to);
    default:
      return unpack_rows<8>(codes, tokens, width, to);
  }
}

SINGLEPASS_TARGET_CLONES void restore(const uint16_t* steps, int64_t groups, int64_t width, float* row) {
  const int64_t size = width / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const float step = float16_to_float(steps[g]), minimum = float16_to_float(steps[groups + g]);
#pragma GCC ivdep
    for (int64_t d = g * size; d < (g + 1) * size; ++d) row[d] = row[d] * step + minimum;
  }
}

void dot(const float* q, int64_t rows, const float* tokens, int64_t count, int64_t width, float* scores,
         int64_t stride) {
  by_rows(rows,
          [&]<int n>(int64_t r) { dot_rows<n>(q + r * width, tokens, count, width, scores + r * stride, stride); });
}

void accumulate(const float* weights, int64_t stride, int64_t rows, const float* tokens, int64_t count, int64_t width,
                float* sums) {
  by_rows(rows, [&]<int n>(int64_t r) {
    accumulate_rows<n>(weights + r * stride, stride, tokens, count, width, sums + r * width);
  });
}

void cap(float* scores, int64_t n, float softcap) {
  for (int64_t i = 0; i < n; ++i) scores[i] = softcap * tanhf(scores[i] / softcap);
}

SINGLEPASS_TARGET_CLONES float largest(const float* scores, int64_t n) {
  Vector most = Vector{} - std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vector s = load_vector(scores + i);
    most = ((s > most) | (s != s)) ? s : most;
  }
  float result = -std::numeric_limits<float>::infinity();
  for (int k = 0; k < kLanes; ++k) result = maximum(most[k], result);
  for (; i < n; ++i) result = maximum(scores[i], result);
  return result;
}

SINGLEPASS_TARGET_CLONES float exponentials(float* scores, int64_t n, float shift) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float below = shift - scores[i];
    scores[i] = below > 87.0f ? 0.0f : exp_negative(below);
  }
  Vector sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load_vector(scores + i);
  float result = 0.0f;
  for (int k = 0; k < kLanes; ++k) result += sum[k];
  for (; i < n; ++i) result += scores[i];
  return result;
}

}  // namespace singlepass::kv
