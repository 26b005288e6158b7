// SPDX-License-Identifier: Apache-2.0
#include "kv/integer_tiles.h"

#include <cmath>
#include <cstring>

#include "common/floats.h"
#include "common/integers.h"
#include "common/math.h"
#include "common/vector.h"
#include "kv/by_rows.h"

// Rows of codes are read plane by plane: byte w of a row ("place" w) holds one code for each of 8 / bits planes, and
// that of plane p belongs to channel p * places + w. The number of places is a multiple of four.
namespace singlepass::kv {
namespace {

template <class V, class T>
SINGLEPASS_HD V load_lanes(const T* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

// n bytes, a multiple of four below 16, with zeros after them.
template <class Bytes>
SINGLEPASS_HD Bytes load_bytes(const uint8_t* from, int64_t n) {
  uint64_t first = 0, second = 0;
  if (n < 8) {
    memcpy(&first, from, 4);
  } else {
    memcpy(&first, from, 8);
    if (n > 8) memcpy(&second, from + 8, 4);
  }
  return Bytes{first, second};
}

// The codes of plane p in lanes that hold a byte of codes each.
template <int kBits, class V>
SINGLEPASS_HD V plane_of(V bytes, int p) {
  return (bytes >> static_cast<int16_t>(p * kBits)) & static_cast<int16_t>((1 << kBits) - 1);
}

// Those of planes p and p + 1 in lanes that hold a row of codes twice.
template <int kBits, class V>
SINGLEPASS_HD V two_planes_of(V bytes, int p) {
  V shifts;
  constexpr int kCount = sizeof(V) / sizeof(int16_t);
  for (int i = 0; i < kCount; ++i) shifts[i] = static_cast<int16_t>((p + i / (kCount / 2)) * kBits);
  return (bytes >> shifts) & static_cast<int16_t>((1 << kBits) - 1);
}

// Adds the products of kRows queries with kTokens tokens, for the places that lanes of `bytes` hold.
template <class Integers, int kRows, int kBits, int kTokens>
SINGLEPASS_HD void add_places(const int16_t* q, int64_t head_dim, int64_t places,
                              const typename Integers::Words (&bytes)[kTokens],
                              typename Integers::Sums (&sums)[Integers::kSums]) {
  using Words = typename Integers::Words;
  for (int p = 0; p < 8 / kBits; ++p) {
    Words tokens[kTokens];
    for (int i = 0; i < kTokens; ++i) tokens[i] = plane_of<kBits>(bytes[i], p);
    for (int r = 0; r < kRows; ++r) {
      const Words row = load_lanes<Words>(q + r * head_dim + p * places);
      for (int i = 0; i < kTokens; ++i) {
        sums[r * kTokens + i] = Integers::add_products(sums[r * kTokens + i], tokens[i], row);
      }
    }
  }
}

// The same where a row fills half of the lanes, and stands in both halves: two planes at a time, whose channels follow
// one another.
template <class Integers, int kRows, int kBits, int kTokens>
SINGLEPASS_HD void add_short_rows(const int16_t* q, int64_t head_dim, const typename Integers::Words (&bytes)[kTokens],
                                  typename Integers::Sums (&sums)[Integers::kSums]) {
  using Words = typename Integers::Words;
  for (int p = 0; p < 8 / kBits; p += 2) {
    Words tokens[kTokens];
    for (int i = 0; i < kTokens; ++i) tokens[i] = two_planes_of<kBits>(bytes[i], p);
    for (int r = 0; r < kRows; ++r) {
      const Words row = load_lanes<Words>(q + r * head_dim + p * Integers::kWords / 2);
      for (int i = 0; i < kTokens; ++i) {
        sums[r * kTokens + i] = Integers::add_products(sums[r * kTokens + i], tokens[i], row);
      }
    }
  }
}

// Dot products of kRows queries with all tokens, some tokens at a time, so that their sums stay in registers: as many
// as a vector has lanes. Each sum is a vector, whose lanes are added at the end.
template <class Integers, int kRows, int kBits>
SINGLEPASS_HD void dot_rows(const int16_t* q, const uint8_t* codes, int64_t count, int64_t head_dim, int32_t* to,
                            int64_t stride) {
  using Bytes = typename Integers::Bytes;
  constexpr int kTokens = Integers::kSums / (kRows == 3 ? 4 : kRows);
  constexpr int64_t kPlaces = Integers::kWords;
  const int64_t places = head_dim * kBits / 8;
  for (int64_t t = 0; t < count; t += kTokens) {
    const uint8_t* rows[kTokens];  // the last token stands in for those after it
    for (int i = 0; i < kTokens; ++i) rows[i] = codes + (t + i < count ? t + i : count - 1) * places;
    typename Integers::Sums sums[Integers::kSums] = {};
    typename Integers::Words bytes[kTokens];
    int64_t w = 0;
    if (kBits < 8 && places == kPlaces / 2) {
      for (int i = 0; i < kTokens; ++i) bytes[i] = Integers::words_twice(rows[i]);
      add_short_rows<Integers, kRows, kBits, kTokens>(q, head_dim, bytes, sums);
      w = places;
    }
    for (; w + kPlaces <= places; w += kPlaces) {
      for (int i = 0; i < kTokens; ++i) bytes[i] = Integers::words(rows[i] + w);
      add_places<Integers, kRows, kBits, kTokens>(q + w, head_dim, places, bytes, sums);
    }
    for (; w < places; w += 16) {
      for (int i = 0; i < kTokens; ++i) {
        Bytes part;
        if (w + 16 <= places) {
          uint64_t both[2];
          memcpy(both, rows[i] + w, 16);
          part = Bytes{both[0], both[1]};
        } else {
          part = load_bytes<Bytes>(rows[i] + w, places - w);
        }
        bytes[i] = Integers::words(part);
      }
      add_places<Integers, kRows, kBits, kTokens>(q + w, head_dim, places, bytes, sums);
    }
    const typename Integers::Sums result = across_lanes(sums, Add{});
    for (int r = 0; r < kRows; ++r) {
      memcpy(to + r * stride + t, reinterpret_cast<const int32_t*>(&result) + r * kTokens, kTokens * sizeof(int32_t));
    }
  }
}

// Adds the weighted tokens for kPlanes planes from kFirst on and kBlocks * kSums places from w on; with kPart for the
// `part` places that are left. These sums of all kRows rows stay in registers over all tokens, which are taken two at a
// time.
template <class Integers, int kRows, int kBits, int kFirst, int kPlanes, int kBlocks, bool kPart>
SINGLEPASS_HD void accumulate_places(const int16_t* weights, int64_t stride, const uint8_t* codes, int64_t count,
                                     int64_t head_dim, int64_t w, int64_t part, int32_t* to) {
  using Sums = typename Integers::Sums;
  using Words = typename Integers::Words;
  constexpr int kSums = Integers::kSums;
  const int64_t places = head_dim * kBits / 8;
  const size_t size = kPart ? static_cast<size_t>(part) * sizeof(int32_t) : sizeof(Sums);
  Sums sums[kRows][kBlocks][kPlanes];
  const auto place = [&](int r, int k, int p) __attribute__((always_inline)) {
    return to + r * head_dim + (kFirst + p) * places + w + k * kSums;
  };
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < kBlocks; ++k) {
#pragma GCC unroll 8
      for (int p = 0; p < kPlanes; ++p) {
        if constexpr (kPart) sums[r][k][p] = Sums{};
        memcpy(&sums[r][k][p], place(r, k, p), size);
      }
    }
  }
  for (int64_t t = 0; t < count; t += 2) {
    const uint8_t* one = codes + t * places + w;
    const uint8_t* other = t + 1 < count ? one + places : one;
    Words bytes[kBlocks];  // those of the two tokens by turns
#pragma GCC unroll 8
    for (int k = 0; k < kBlocks; ++k) {
      Sums low, high;
      if constexpr (kPart) {
        low = Integers::sums(load_bytes<typename Integers::Bytes>(one, part));
        high = Integers::sums(load_bytes<typename Integers::Bytes>(other, part));
      } else {
        low = Integers::sums(one + k * kSums);
        high = Integers::sums(other + k * kSums);
      }
      bytes[k] = bit_cast<Words>(low | high << 16);
    }
    Words pair[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t two;
      memcpy(&two, weights + r * stride + t, sizeof(two));
      pair[r] = bit_cast<Words>(Sums{} + two);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kBlocks; ++k) {
#pragma GCC unroll 8
      for (int p = 0; p < kPlanes; ++p) {
        const Words tokens = plane_of<kBits>(bytes[k], kFirst + p);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sums[r][k][p] = Integers::add_products(sums[r][k][p], tokens, pair[r]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kBlocks; ++k) {
#pragma GCC unroll 8
    for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        memcpy(place(r, k, p), &sums[r][k][p], size);
      }
    }
  }
}

// Weighted sums of all tokens for kRows rows and the planes from kFirst on. Channels are taken in groups of kPlanes
// planes and kBlocks * kSums places, so that kSums vectors of sums stay in registers.
template <class Integers, int kRows, int kBits, int kFirst = 0>
SINGLEPASS_HD void accumulate_rows(const int16_t* weights, int64_t stride, const uint8_t* codes, int64_t count,
                                   int64_t head_dim, int32_t* to) {
  constexpr int kAll = 8 / kBits, kSums = Integers::kSums, kVectors = kSums / (kRows == 3 ? 4 : kRows);
  constexpr int kPlanes = kAll < kVectors ? kAll : kVectors, kBlocks = kVectors / kPlanes;
  const int64_t places = head_dim / kAll;
  const auto add = [&]<int blocks, bool part>(int64_t w) __attribute__((always_inline)) {
    accumulate_places<Integers, kRows, kBits, kFirst, kPlanes, blocks, part>(weights, stride, codes, count, head_dim, w,
                                                                             places - w, to);
  };
  int64_t w = 0;
  for (; w + kBlocks * kSums <= places; w += kBlocks * kSums) add.template operator()<kBlocks, false>(w);
  for (; w + kSums <= places; w += kSums) add.template operator()<1, false>(w);
  if (w < places) add.template operator()<1, true>(w);
  if constexpr (kFirst + kPlanes < kAll) {
    accumulate_rows<Integers, kRows, kBits, kFirst + kPlanes>(weights, stride, codes, count, head_dim, to);
  }
}

// The first n floats from there on, up to as many as a vector has, with zeros after them.
template <class V>
SINGLEPASS_HD V load_up_to(const float* from, int64_t n) {
  constexpr int64_t kCount = sizeof(V) / sizeof(float);
  return n >= kCount ? load_vector<V>(from) : load_part<V>(from, n > 0 ? n : 0);
}

// Eight lanes of what `op` makes of two halves of sixteen, or all eight.
template <class Eight, class V, class Op>
SINGLEPASS_HD Eight halves_of(V v, const Op& op) {
  if constexpr (sizeof(V) == sizeof(Eight)) return v;
  Eight halves[sizeof(V) / sizeof(Eight)];
  memcpy(halves, &v, sizeof(v));
  return op(halves[0], halves[1]);
}

// Rows are taken four at a time, so that steps and minima are read once for them.
template <class Floats, int kRows>
SINGLEPASS_HD void fold_rows(const float* x, const float* steps, const float* minima, int64_t n, int64_t stride,
                             float largest, float* products, int16_t* to, Folded* results) {
  using Wide = typename Floats::Floats;
  using WideBits = typename IntegerLanes<Floats::kLanes>::Sums;
  using Bits = IntegerLanes<kLanes>::Sums;
  const auto larger = [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; };
  Wide sums[kRows] = {};
  WideBits tops[kRows] = {};  // magnitudes, which are in the order of their bits, NaN after infinity
  const int64_t end = (n + kFoldPad - 1) / kFoldPad * kFoldPad;
  for (int64_t i = 0; i < end; i += Floats::kLanes) {
    const Wide step = load_up_to<Wide>(steps + i, n - i), minimum = load_up_to<Wide>(minima + i, n - i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Wide v = load_up_to<Wide>(x + r * stride + i, n - i), product = v * step;
      sums[r] = sums[r] + v * minimum;
      tops[r] = larger(bit_cast<WideBits>(absolute(product)), tops[r]);
      store_vector(product, products + r * stride + i);
    }
  }
  Vector all_sums[8] = {};
  Bits all_tops[8] = {};
  for (int r = 0; r < kRows; ++r) {
    all_sums[r] = halves_of<Vector>(sums[r], Add{});
    all_tops[r] = halves_of<Bits>(tops[r], larger);
  }
  const Vector biases = across_lanes(all_sums, Add{}), top = bit_cast<Vector>(across_lanes(all_tops, larger));
  const Vector zero = {}, no_number = zero + std::numeric_limits<float>::quiet_NaN(), usual = top / largest;
  const Vector row_steps = top < 0x1p-100f ? zero : top < std::numeric_limits<float>::infinity() ? usual : no_number;
  const Vector ups = row_steps > 0.0f ? largest / top : zero;
  for (int r = 0; r < kRows; ++r) {
    const float* row = products + r * stride;
    const float up = ups[r];
    results[r] = {row_steps[r], biases[r]};
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the lower bits.
    for (int64_t i = 0; i < end; i += Floats::kLanes) {
      Floats::store_words(bit_cast<WideBits>(load_vector<Wide>(row + i) * up + 12582912.0f), to + r * stride + i);
    }
  }
}

// The loops for a kind of processor.
#define SINGLEPASS_KV_LOOPS(name, target, Integers)                                                            \
  template <int kRows, int kBits>                                                                              \
  target void dot_##name(const int16_t* q, const uint8_t* codes, int64_t count, int64_t head_dim, int32_t* to, \
                         int64_t stride) {                                                                     \
    dot_rows<Integers, kRows, kBits>(q, codes, count, head_dim, to, stride);                                   \
  }                                                                                                            \
  template <int kRows, int kBits>                                                                              \
  target void accumulate_##name(const int16_t* weights, int64_t stride, const uint8_t* codes, int64_t count,   \
                                int64_t head_dim, int32_t* to) {                                               \
    accumulate_rows<Integers, kRows, kBits>(weights, stride, codes, count, head_dim, to);                      \
  }
#define SINGLEPASS_KV_FOLD(name, target, Floats)                                                                   \
  template <int kRows>                                                                                             \
  target SINGLEPASS_FUSED_MULTIPLY_ADD void fold_##name(const float* x, const float* steps, const float* minima,   \
                                                        int64_t n, int64_t stride, float largest, float* products, \
                                                        int16_t* to, Folded* results) {                            \
    fold_rows<Floats, kRows>(x, steps, minima, n, stride, largest, products, to, results);                         \
  }

SINGLEPASS_KV_LOOPS(plain, , PlainIntegers)
SINGLEPASS_KV_FOLD(plain, , PlainFloats)
#if defined(SINGLEPASS_HAS_TARGETS)
SINGLEPASS_KV_LOOPS(avx2, SINGLEPASS_TARGET_AVX2, Avx2Integers)
SINGLEPASS_KV_FOLD(avx2, SINGLEPASS_TARGET_AVX2, Avx2Floats)
SINGLEPASS_KV_LOOPS(avx512, SINGLEPASS_TARGET_AVX512, VnniIntegers)
SINGLEPASS_KV_FOLD(avx512, SINGLEPASS_TARGET_AVX512, Avx512Floats)

bool has_vnni() {
  return __builtin_cpu_supports("avx512vnni");
}

#define SINGLEPASS_KV_LOOP(name, ...) \
  choose(name##_plain<__VA_ARGS__>, name##_avx2<__VA_ARGS__>, name##_avx512<__VA_ARGS__>, has_vnni())
#else
#define SINGLEPASS_KV_LOOP(name, ...) name##_plain<__VA_ARGS__>
#endif

}  // namespace

void fold_to_integers(const float* x, const float* steps, const float* minima, int64_t n, int64_t rows, int64_t stride,
                      float largest, float* products, int16_t* to, Folded* results) {
  by_rows(rows, [&]<int kRows>(int64_t r) {
    SINGLEPASS_KV_LOOP(fold, kRows)
    (x + r * stride, steps, minima, n, stride, largest, products + r * stride, to + r * stride, results + r);
  });
}

SINGLEPASS_TARGET_CLONES void from_integers(const int32_t* sums, int64_t n, float step, float bias, float* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(sums[i]) * step + bias;
}

SINGLEPASS_TARGET_CLONES void add_integers(const int32_t* sums, int64_t n, float step, float bias,
                                           const float* channels, float factor, float* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    out[i] = out[i] * factor + channels[i] * (static_cast<float>(sums[i]) * step + bias);
  }
}

void dot(const int16_t* q, int64_t rows, const Rows& tokens, int64_t count, int64_t head_dim, int32_t* sums,
         int64_t stride) {
  by_rows_and_bits(rows, tokens.bits, [&]<int n, int bits>(int64_t r) {
    SINGLEPASS_KV_LOOP(dot, n, bits)(q + r * head_dim, tokens.codes, count, head_dim, sums + r * stride, stride);
  });
}

void accumulate(const int16_t* weights, int64_t stride, int64_t rows, const Rows& tokens, int64_t count,
                int64_t head_dim, int32_t* sums) {
  by_rows_and_bits(rows, tokens.bits, [&]<int n, int bits>(int64_t r) {
    SINGLEPASS_KV_LOOP(accumulate, n, bits)(weights + r * stride, stride, tokens.codes, count, head_dim,
                                            sums + r * head_dim);
  });
}

}  // namespace singlepass::kv
