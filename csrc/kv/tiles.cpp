// SPDX-License-Identifier: Apache-2.0
#include "kv/tiles.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dtype.h"
#include "common/math.h"
#include "common/vector.h"
#include "kv/by_rows.h"

// Rows of codes are read plane by plane: byte w of a row ("place" w) holds one code for each of 8 / bits planes, and
// that of plane p belongs to channel p * places + w. Floats count as rows with a single plane.
namespace singlepass::kv {
namespace {

// How rows of kBits lie in memory.
template <int kBits>
struct Layout {
  static constexpr int kPlanes = kBits == kFloats ? 1 : 8 / kBits;

  static const uint8_t* row(const void* data, int64_t t, int64_t head_dim) {
    return static_cast<const uint8_t*>(data) + t * head_dim * kBits / 8;
  }
};

// Loads planes [first, first + kNumber) of the eight places from w on, as floats.
template <int kBits, int kNumber>
SINGLEPASS_HD void load_planes(const uint8_t* row, int64_t w, int first, Vector (&to)[kNumber]) {
  if constexpr (kBits == kFloats) {
    to[0] = load_vector(reinterpret_cast<const float*>(row) + w);
  } else {
    const VectorBits byte = load_bytes(row + w);
    for (int p = 0; p < kNumber; ++p) {
      to[p] = __builtin_convertvector((byte >> ((first + p) * kBits)) & ((1 << kBits) - 1), Vector);
    }
  }
}

template <int kBits>
SINGLEPASS_HD float load_one(const uint8_t* row, int64_t w, int plane) {
  if constexpr (kBits == kFloats) {
    return reinterpret_cast<const float*>(row)[w];
  } else {
    return static_cast<float>((row[w] >> (plane * kBits)) & ((1 << kBits) - 1));
  }
}

// Dot products of kRows queries with all tokens, 8 / kRows tokens at a time, so that up to eight sums stay in
// registers. Each sum is a vector over places; its lanes are added at the end.
template <int kRows, int kBits>
SINGLEPASS_TARGET_CLONES SINGLEPASS_FUSED_MULTIPLY_ADD void dot_rows(const float* q, const void* data, int64_t count,
                                                                     int64_t head_dim, float* scores, int64_t stride) {
  constexpr int kTokens = 8 / kRows, kPlanes = Layout<kBits>::kPlanes;
  const int64_t places = head_dim / kPlanes;
  for (int64_t t = 0; t < count; t += kTokens) {
    const uint8_t* rows[kTokens];  // the last token stands in for those after it
    for (int i = 0; i < kTokens; ++i) rows[i] = Layout<kBits>::row(data, t + i < count ? t + i : count - 1, head_dim);
    Vector sums[8] = {};
    int64_t w = 0;
    for (; w + kLanes <= places; w += kLanes) {
      Vector token[kTokens][kPlanes];
      for (int i = 0; i < kTokens; ++i) load_planes<kBits>(rows[i], w, 0, token[i]);
      for (int p = 0; p < kPlanes; ++p) {
        for (int r = 0; r < kRows; ++r) {
          const Vector row = load_vector(q + r * head_dim + p * places + w);
          for (int i = 0; i < kTokens; ++i) sums[r * kTokens + i] = sums[r * kTokens + i] + row * token[i][p];
        }
      }
    }
    Vector result = across_lanes(sums, Add{});
    for (; w < places; ++w) {
      for (int p = 0; p < kPlanes; ++p) {
        for (int k = 0; k < kRows * kTokens; ++k) {
          result[k] += q[k / kTokens * head_dim + p * places + w] * load_one<kBits>(rows[k % kTokens], w, p);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      memcpy(scores + r * stride + t, reinterpret_cast<const float*>(&result) + r * kTokens, kTokens * sizeof(float));
    }
  }
}

// Adds the weighted tokens for kPlanes planes from `first` on and kBlocks * 8 places from w on. These sums of all kRows
// rows stay in registers over all tokens.
template <int kRows, int kBits, int kPlanes, int kBlocks>
SINGLEPASS_HD void accumulate_places(const float* weights, int64_t stride, const void* data, int64_t count,
                                     int64_t head_dim, int first, int64_t w, float* sums) {
  const int64_t places = head_dim / Layout<kBits>::kPlanes;
  Vector sum[kRows][kBlocks][kPlanes];
  float* at[kBlocks][kPlanes];
  for (int k = 0; k < kBlocks; ++k) {
    for (int p = 0; p < kPlanes; ++p) {
      at[k][p] = sums + (first + p) * places + w + k * kLanes;
      for (int r = 0; r < kRows; ++r) sum[r][k][p] = load_vector(at[k][p] + r * head_dim);
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* row = Layout<kBits>::row(data, t, head_dim);
    Vector token[kBlocks][kPlanes];
    for (int k = 0; k < kBlocks; ++k) load_planes<kBits>(row, w + k * kLanes, first, token[k]);
    for (int r = 0; r < kRows; ++r) {
      const Vector weight = broadcast<Vector>(weights[r * stride + t]);
      for (int k = 0; k < kBlocks; ++k) {
        for (int p = 0; p < kPlanes; ++p) sum[r][k][p] = sum[r][k][p] + weight * token[k][p];
      }
    }
  }
  for (int k = 0; k < kBlocks; ++k) {
    for (int p = 0; p < kPlanes; ++p) {
      for (int r = 0; r < kRows; ++r) store_vector(sum[r][k][p], at[k][p] + r * head_dim);
    }
  }
}

// Weighted sums of all tokens for kRows rows. Channels are taken in groups of kPlanes planes and kBlocks * 8 places, so
// that eight vectors of sums stay in registers.
template <int kRows, int kBits>
SINGLEPASS_TARGET_CLONES SINGLEPASS_FUSED_MULTIPLY_ADD void accumulate_rows(const float* weights, int64_t stride,
                                                                            const void* data, int64_t count,
                                                                            int64_t head_dim, float* sums) {
  constexpr int kAll = Layout<kBits>::kPlanes, kVectors = 8 / kRows;
  constexpr int kPlanes = kAll < kVectors ? kAll : kVectors, kBlocks = kVectors / kPlanes;
  const int64_t places = head_dim / kAll;
  for (int first = 0; first < kAll; first += kPlanes) {
    int64_t w = 0;
    for (; w + kBlocks * kLanes <= places; w += kBlocks * kLanes) {
      accumulate_places<kRows, kBits, kPlanes, kBlocks>(weights, stride, data, count, head_dim, first, w, sums);
    }
    for (; w + kLanes <= places; w += kLanes) {
      accumulate_places<kRows, kBits, kPlanes, 1>(weights, stride, data, count, head_dim, first, w, sums);
    }
    for (; w < places; ++w) {
      for (int64_t t = 0; t < count; ++t) {
        const uint8_t* row = Layout<kBits>::row(data, t, head_dim);
        for (int p = first; p < first + kPlanes; ++p) {
          const float token = load_one<kBits>(row, w, p);
          for (int r = 0; r < kRows; ++r) sums[r * head_dim + p * places + w] += weights[r * stride + t] * token;
        }
      }
    }
  }
}

// Codes of all tokens as floats, in the order of channels.
template <int kBits>
SINGLEPASS_TARGET_CLONES void unpack_rows(const uint8_t* codes, int64_t tokens, int64_t head_dim, float* to) {
  constexpr int kPlanes = Layout<kBits>::kPlanes;
  const int64_t places = head_dim / kPlanes;
  for (int64_t t = 0; t < tokens; ++t, codes += places, to += head_dim) {
    int64_t w = 0;
    for (; w + kLanes <= places; w += kLanes) {
      Vector planes[kPlanes];
      load_planes<kBits>(codes, w, 0, planes);
      for (int p = 0; p < kPlanes; ++p) store_vector(planes[p], to + p * places + w);
    }
    for (; w < places; ++w) {
      for (int p = 0; p < kPlanes; ++p) to[p * places + w] = load_one<kBits>(codes, w, p);
    }
  }
}

// by_rows_and_bits, for floats as well.
template <class Body>
void by_rows_of_any_kind(int64_t rows, int bits, const Body& body) {
  if (bits == kFloats) return by_rows(rows, [&]<int kRows>(int64_t r) { body.template operator()<kRows, kFloats>(r); });
  by_rows_and_bits(rows, bits, body);
}

}  // namespace

void unpack(const uint8_t* codes, int bits, int64_t tokens, int64_t head_dim, float* to) {
  switch (bits) {
    case 2:
      return unpack_rows<2>(codes, tokens, head_dim, to);
    case 4:
      return unpack_rows<4>(codes, tokens, head_dim, to);
    default:
      return unpack_rows<8>(codes, tokens, head_dim, to);
  }
}

SINGLEPASS_TARGET_CLONES void restore(const uint16_t* steps, int64_t groups, int64_t head_dim, float* row) {
  const int64_t size = head_dim / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const float step = float16_to_float(steps[g]), minimum = float16_to_float(steps[groups + g]);
#pragma GCC ivdep
    for (int64_t d = g * size; d < (g + 1) * size; ++d) row[d] = row[d] * step + minimum;
  }
}

void dot(const float* q, int64_t rows, const Rows& tokens, int64_t count, int64_t head_dim, float* scores,
         int64_t stride) {
  by_rows_of_any_kind(rows, tokens.bits, [&]<int n, int bits>(int64_t r) {
    dot_rows<n, bits>(q + r * head_dim, tokens.data, count, head_dim, scores + r * stride, stride);
  });
}

void accumulate(const float* weights, int64_t stride, int64_t rows, const Rows& tokens, int64_t count, int64_t head_dim,
                float* sums) {
  by_rows_of_any_kind(rows, tokens.bits, [&]<int n, int bits>(int64_t r) {
    accumulate_rows<n, bits>(weights + r * stride, stride, tokens.data, count, head_dim, sums + r * head_dim);
  });
}

void cap(float* scores, int64_t n, float softcap) {
  for (int64_t i = 0; i < n; ++i) scores[i] = softcap * tanhf(scores[i] / softcap);
}

namespace {

SINGLEPASS_HD float largest_of(const float* scores, int64_t n) {
  Vector most = Vector{} - std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    most = Maximum{}(load_vector(scores + i), most);
  }
  float result = across_lanes(most, Maximum{});
  for (; i < n; ++i) result = maximum(scores[i], result);
  return result;
}

// Exponentials below exp(-87) count as 0. They are summed in a loop of their own, in a fixed order.
SINGLEPASS_HD float exponentials_of(float* scores, int64_t n, float shift) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float below = shift - scores[i];
    scores[i] = below > 87.0f ? 0.0f : exp_negative(below);
  }
  Vector sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load_vector(scores + i);
  float result = across_lanes(sum, Add{});
  for (; i < n; ++i) result += scores[i];
  return result;
}

}  // namespace

SINGLEPASS_TARGET_CLONES float largest(const float* scores, int64_t n) {
  return largest_of(scores, n);
}

SINGLEPASS_TARGET_CLONES SINGLEPASS_FUSED_MULTIPLY_ADD float exponentials(float* scores, int64_t n, float shift) {
  return exponentials_of(scores, n, shift);
}

SINGLEPASS_TARGET_CLONES SINGLEPASS_FUSED_MULTIPLY_ADD void weigh(float* scores, int64_t rows, int64_t n,
                                                                  int64_t stride, float* row_max, float* row_sum,
                                                                  float* shifts) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * stride;
    const float most = maximum(row_max[r], largest_of(row, n));
    shifts[r] = most == row_max[r] ? 1.0f : expf(row_max[r] - most);
    if (most == -std::numeric_limits<float>::infinity()) {
      std::fill(row, row + n, 0.0f);
    } else {
      row_sum[r] = row_sum[r] * shifts[r] + exponentials_of(row, n, most);
    }
    row_max[r] = most;
  }
}

}  // namespace singlepass::kv
