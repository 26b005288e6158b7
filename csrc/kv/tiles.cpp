// SPDX-License-Identifier: Apache-2.0
#include "kv/tiles.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/floats.h"
#include "common/math.h"
#include "common/vector.h"

// Rows of codes are read plane by plane: byte w of a row ("place" w) holds one code for each of 8 / bits planes, and
// that of plane p belongs to channel p * places + w.
namespace singlepass::kv {
namespace {

// Codes of all tokens as floats, in the order of channels.
template <class Floats, int kBits>
SINGLEPASS_HD void unpack_rows(const uint8_t* codes, int64_t tokens, int64_t places, float* to) {
  constexpr int kPlanes = 8 / kBits;
  constexpr uint32_t kMask = (1 << kBits) - 1;
  for (int64_t t = 0; t < tokens; ++t, codes += places, to += kPlanes * places) {
    int64_t w = 0;
    for (; w + Floats::kLanes <= places; w += Floats::kLanes) {
      const auto bytes = Floats::bytes(codes + w);
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; ++p) {
        store_vector(Floats::from_words((bytes >> (p * kBits)) & kMask), to + p * places + w);
      }
    }
    for (; w < places; ++w) {
      for (int p = 0; p < kPlanes; ++p) to[p * places + w] = static_cast<float>((codes[w] >> (p * kBits)) & kMask);
    }
  }
}

#define SINGLEPASS_KV_UNPACK(name, target, Floats)                                                       \
  target void unpack_##name(const uint8_t* codes, int bits, int64_t tokens, int64_t places, float* to) { \
    if (bits == 2) return unpack_rows<Floats, 2>(codes, tokens, places, to);                             \
    if (bits == 4) return unpack_rows<Floats, 4>(codes, tokens, places, to);                             \
    unpack_rows<Floats, 8>(codes, tokens, places, to);                                                   \
  }

SINGLEPASS_KV_UNPACK(plain, , PlainFloats)
#if defined(SINGLEPASS_HAS_TARGETS)
SINGLEPASS_KV_UNPACK(avx2, SINGLEPASS_TARGET_AVX2, Avx2Floats)
SINGLEPASS_KV_UNPACK(avx512, SINGLEPASS_TARGET_AVX512, Avx512Floats)
#endif

}  // namespace

void unpack(const uint8_t* codes, int bits, int64_t tokens, int64_t head_dim, float* to) {
  const int64_t places = head_dim * bits / 8;
#if defined(SINGLEPASS_HAS_TARGETS)
  if (has_avx512() && places % Avx512Floats::kLanes == 0) return unpack_avx512(codes, bits, tokens, places, to);
  if (has_avx2()) return unpack_avx2(codes, bits, tokens, places, to);
#endif
  unpack_plain(codes, bits, tokens, places, to);
}

SINGLEPASS_TARGET_CLONES void restore(const uint16_t* steps, int64_t groups, int64_t head_dim, float* row) {
  const int64_t size = head_dim / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const float step = float16_to_float(steps[g]), minimum = float16_to_float(steps[groups + g]);
#pragma GCC ivdep
    for (int64_t d = g * size; d < (g + 1) * size; ++d) row[d] = row[d] * step + minimum;
  }
}

SINGLEPASS_TARGET_CLONES float fold(const float* x, const float* steps, const float* minima, int64_t n, float* to) {
  Vector sums = {};
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    const Vector v = load_vector(x + d);
    sums += v * load_vector(minima + d);
    store_vector(v * load_vector(steps + d), to + d);
  }
  float sum = across_lanes(sums, Add{});
  for (; d < n; ++d) {
    sum += x[d] * minima[d];
    to[d] = x[d] * steps[d];
  }
  return sum;
}

SINGLEPASS_TARGET_CLONES void add_piece(float* out, float factor, const float* channels, const float* sums, float shift,
                                        int64_t n) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) out[d] = out[d] * factor + channels[d] * (sums[d] + shift);
}

SINGLEPASS_TARGET_CLONES void apply_steps(float* scores, const float* steps, const float* minima, float sum,
                                          int64_t n) {
#pragma GCC ivdep
  for (int64_t t = 0; t < n; ++t) scores[t] = scores[t] * steps[t] + minima[t] * sum;
}

SINGLEPASS_TARGET_CLONES void separate(const float* pairs, int64_t n, float* first, float* second) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    first[i] = pairs[2 * i];
    second[i] = pairs[2 * i + 1];
  }
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
