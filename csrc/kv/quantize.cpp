// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/convert.h"
#include "common/vector.h"
#include "kv/blocks.h"
#include "kv/codec.h"
#include "kv/problem.h"
#include "kv/tiles.h"

// Quantisation on the CPU. The tokens of a block are read from memory once and, where something belongs to channels, a
// second time from the cache. Loops read them in their own dtype and convert in registers. A block is "tame" if nothing
// in it is NaN, infinite or beyond float16; then most checks are skipped.
namespace singlepass::kv {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kTogether = 4;  // tokens for which the extremes of channels are loaded and stored once

template <DType dtype>
using Bits = std::conditional_t<dtype == DType::kFloat32, int32_t, int16_t>;

template <DType dtype>
using TokenRows = std::array<const Bits<dtype>*, kTogether>;

template <DType dtype>
SINGLEPASS_HD float to_float(Bits<dtype> bits) {
  if constexpr (dtype == DType::kFloat32) {
    return bit_cast<float>(bits);
  } else if constexpr (dtype == DType::kBFloat16) {
    return bfloat16_to_float(static_cast<uint16_t>(bits));
  } else {
    return float16_to_float(static_cast<uint16_t>(bits));
  }
}

// The bits of 65504, the largest float16; in bfloat16, of 65280, the next number below. Larger magnitudes are clamped.
template <DType dtype>
constexpr Bits<dtype> kTameBits = dtype == DType::kFloat32    ? 0x477fe000
                                  : dtype == DType::kBFloat16 ? 0x477f
                                                              : 0x7bff;

// Maps the bits of a float to an integer such that integers have the order of the floats; it is its own inverse. NaNs
// come out beyond the infinities, so the extremes tell whether everything is finite.
template <class Integer>
SINGLEPASS_HD Integer ordered(Integer bits) {
  return static_cast<Integer>(bits ^ ((bits >> (8 * sizeof(Integer) - 1)) & std::numeric_limits<Integer>::max()));
}

// Extends the extremes of n channels, as ordered integers, by four tokens.
template <DType dtype>
SINGLEPASS_TARGET_CLONES void extend(const TokenRows<dtype>& rows, int64_t n, Bits<dtype>* low, Bits<dtype>* high) {
  const Bits<dtype>*x0 = rows[0], *x1 = rows[1], *x2 = rows[2], *x3 = rows[3];
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) {
    const Bits<dtype> a = ordered(x0[d]), b = ordered(x1[d]), c = ordered(x2[d]), e = ordered(x3[d]);
    low[d] = std::min(std::min(low[d], std::min(a, b)), std::min(c, e));
    high[d] = std::max(std::max(high[d], std::max(a, b)), std::max(c, e));
  }
}

// Whether no number between these extremes is NaN or has to be clamped.
template <DType dtype>
SINGLEPASS_TARGET_CLONES bool is_tame(const Bits<dtype>* low, const Bits<dtype>* high, int64_t n) {
  Bits<dtype> least = 0, most = 0;
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) {
    least = std::min(least, low[d]);
    most = std::max(most, high[d]);
  }
  return least >= ~kTameBits<dtype> && most <= kTameBits<dtype>;
}

template <DType dtype>
SINGLEPASS_TARGET_CLONES void to_floats(const Bits<dtype>* in_order, int64_t n, float* to) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) to[d] = to_float<dtype>(ordered(in_order[d]));
}

// The bits without the sign. If not `tame`, those of NaN and infinity become 0.
template <DType dtype, bool tame>
SINGLEPASS_HD Bits<dtype> magnitude(Bits<dtype> bits) {
  constexpr Bits<dtype> kInfiniteBits = dtype == DType::kFloat32    ? 0x7f800000
                                        : dtype == DType::kBFloat16 ? 0x7f80
                                                                    : 0x7c00;
  const Bits<dtype> unsigned_bits = bits & std::numeric_limits<Bits<dtype>>::max();
  return tame || unsigned_bits < kInfiniteBits ? unsigned_bits : 0;
}

template <DType dtype, bool tame>
SINGLEPASS_TARGET_CLONES void extend_magnitudes(const TokenRows<dtype>& rows, int64_t n, Bits<dtype>* most) {
  const Bits<dtype>*x0 = rows[0], *x1 = rows[1], *x2 = rows[2], *x3 = rows[3];
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) {
    const Bits<dtype> a = std::max(magnitude<dtype, tame>(x0[d]), magnitude<dtype, tame>(x1[d]));
    const Bits<dtype> b = std::max(magnitude<dtype, tame>(x2[d]), magnitude<dtype, tame>(x3[d]));
    most[d] = std::max(most[d], std::max(a, b));
  }
}

// Computes the divisor of each channel (its factor c) from its largest magnitude, and 1 / c.
template <DType dtype>
SINGLEPASS_TARGET_CLONES void find_factors(const Bits<dtype>* most, int64_t n, float* divisors, float* factors) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) {
    divisors[d] = channel_factor(clamped(to_float<dtype>(most[d])));
    factors[d] = 1.0f / divisors[d];
  }
}

SINGLEPASS_HD float lowest(Vector v) {
  const auto least = [](Vector a, Vector b) { return a < b ? a : b; };
  v = least(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = least(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  v = least(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
  return v[0];
}

SINGLEPASS_HD float lane_sum(Vector v) {
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  return v[0];
}

template <DType dtype>
SINGLEPASS_HD Vector load_floats(const Bits<dtype>* from) {
  float lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = to_float<dtype>(from[k]);
  return load_vector(lanes);
}

// y = x * factors for one token, with the extremes of each group. If x need not be tame, it is clamped (NaN as well),
// so that y is finite, and `low` is NaN for a group that was not finite.
template <DType dtype, bool tame>
SINGLEPASS_TARGET_CLONES void scale_row(const Bits<dtype>* x, const float* factors, int64_t groups, int64_t size,
                                        Bits<DType::kFloat32>* y, float* low, float* high) {
  const Vector most = Vector{} + kLargest;
  for (int64_t g = 0; g < groups; ++g, x += size, y += size, factors += size) {
    Vector least = Vector{} + kInfinity, greatest = -least, zeros = {};
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) {
      Vector v = load_floats<dtype>(x + d);
      if constexpr (!tame) {
        zeros += v * 0.0f;
        v = v > -most ? v : -most;
        v = v < most ? v : most;
      }
      v *= load_vector(factors + d);
      least = v < least ? v : least;
      greatest = v > greatest ? v : greatest;
      memcpy(y + d, &v, sizeof(v));
    }
    float zero = tame ? 0.0f : lane_sum(zeros);
    low[g] = lowest(least);
    high[g] = -lowest(-greatest);
    for (; d < size; ++d) {
      const float v = to_float<dtype>(x[d]), above = v > -kLargest ? v : -kLargest;
      const float scaled = (above < kLargest ? above : kLargest) * factors[d];
      zero += v * 0.0f;
      low[g] = scaled < low[g] ? scaled : low[g];
      high[g] = scaled > high[g] ? scaled : high[g];
      y[d] = bit_cast<Bits<DType::kFloat32>>(scaled);
    }
    low[g] += zero;
  }
}

// Computes step, minimum and 1 / step of n groups from their extremes.
SINGLEPASS_TARGET_CLONES void find_steps(const float* low, const float* high, int64_t n, int bits, float* step,
                                         float* minimum, float* inverses) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const bool finite = is_finite(low[i]) & is_finite(high[i]);
    const Steps s = steps(clamped(low[i]), clamped(high[i]), finite, bits);
    step[i] = s.step;
    minimum[i] = s.minimum;
    inverses[i] = inverse(s.step);
  }
}

// Encodes one token. Minima and 1 / step are given for each channel, or one for all of them (`shared`). x lies between
// its group's extremes, so codes need no clamping; a group that was not finite has NaN as minimum, which gives 0.
template <DType dtype, int bits, bool shared>
SINGLEPASS_TARGET_CLONES void encode_row(const Bits<dtype>* x, const float* minima, const float* inverses,
                                         int64_t head_dim, uint8_t* to) {
  constexpr int kPlanes = 8 / bits;
  const int64_t places = head_dim / kPlanes;
  uint32_t bytes[kMaxHeadDim / kPlanes];
#pragma GCC ivdep
  for (int64_t w = 0; w < places; ++w) {
    bytes[w] = 0;
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const int64_t d = p * places + w, at = shared ? 0 : d;
      bytes[w] |= nearest_in_low_bits((to_float<dtype>(x[d]) - minima[at]) * inverses[at]) << (p * bits);
    }
  }
  // A loop of its own: in the loop above, compilers would narrow each plane.
#pragma GCC ivdep
  for (int64_t w = 0; w < places; ++w) to[w] = static_cast<uint8_t>(bytes[w]);
}

template <DType dtype>
class Quantizer {
 public:
  explicit Quantizer(const CodecCall& p)
      : p_(p),
        width_(p.packed.head_dim),
        groups_(p.packed.groups),
        most_(width_),
        least_(width_),
        y_(kTile * width_),
        factors_(width_, 1.0f),
        divisors_(width_),
        low_(std::max(width_, kTile * groups_)),
        high_(low_.size()),
        steps_(low_.size()),
        minima_(low_.size()),
        inverses_(low_.size()),
        row_minima_(width_),
        row_inverses_(width_),
        tile_steps_(kTile * groups_),
        tile_minima_(kTile * groups_) {}

  void run(const BlockRange& place) {
    if (p_.packed.axis == Axis::kChannel) {
      by_channels(place);
    } else {
      by_tokens(place);
    }
    for (int64_t slot = place.begin + place.count; slot < place.end; ++slot) {
      memset(codes_at(place, slot), 0, static_cast<size_t>(p_.packed.bytes()));
      if (p_.packed.axis == Axis::kToken) {
        memset(p_.packed.scales_at(place.b, place.h, slot, 0), 0, static_cast<size_t>(4 * groups_));
      }
    }
  }

 private:
  const Bits<dtype>* token_at(const BlockRange& place, int64_t slot) const {
    return reinterpret_cast<const Bits<dtype>*>(p_.plain.at(place.b, place.h, p_.token(place.b, place.h, slot)));
  }

  uint8_t* codes_at(const BlockRange& place, int64_t slot) const { return p_.packed.codes_at(place.b, place.h, slot); }

  // Calls body with kTogether tokens of a block at a time; the last token stands in for missing ones. An index puts
  // tokens where the processor does not expect them, so the next ones are prefetched.
  template <class Body>
  void for_each_rows(const BlockRange& place, const Body& body) const {
    const int64_t last = place.begin + place.count - 1;
    for (int64_t slot = place.begin; slot <= last; slot += kTogether) {
      TokenRows<dtype> rows;
      for (int64_t i = 0; i < kTogether; ++i) {
        rows[i] = token_at(place, std::min(slot + i, last));
        const char* ahead = reinterpret_cast<const char*>(token_at(place, std::min(slot + kTogether + i, last)));
        for (int64_t byte = 0; byte < width_ * size_of(dtype); byte += 64) __builtin_prefetch(ahead + byte);
      }
      body(rows);
    }
  }

  template <DType of, bool shared>
  void encode_as(const Bits<of>* x, const float* minima, const float* inverses, uint8_t* to) const {
    switch (p_.packed.bits) {
      case 2:
        return encode_row<of, 2, shared>(x, minima, inverses, width_, to);
      case 4:
        return encode_row<of, 4, shared>(x, minima, inverses, width_, to);
      default:
        return encode_row<of, 8, shared>(x, minima, inverses, width_, to);
    }
  }

  // Scales per channel: extremes of all channels first, then codes.
  void by_channels(const BlockRange& place) {
    uint16_t* scales = p_.packed.scales_at(place.b, place.h, 0, place.block);
    if (place.count == 0) {
      memset(scales, 0, static_cast<size_t>(4 * width_));
      return;
    }
    std::fill(least_.begin(), least_.end(), std::numeric_limits<Bits<dtype>>::max());
    std::fill(most_.begin(), most_.end(), std::numeric_limits<Bits<dtype>>::min());
    for_each_rows(place,
                  [&](const TokenRows<dtype>& rows) { extend<dtype>(rows, width_, least_.data(), most_.data()); });
    const bool tame = is_tame<dtype>(least_.data(), most_.data(), width_);
    to_floats<dtype>(least_.data(), width_, low_.data());
    to_floats<dtype>(most_.data(), width_, high_.data());
    find_steps(low_.data(), high_.data(), width_, p_.packed.bits, steps_.data(), minima_.data(), inverses_.data());
    narrow(steps_.data(), scales, DType::kFloat16, width_);
    narrow(minima_.data(), scales + width_, DType::kFloat16, width_);
    for (int64_t slot = place.begin; slot < place.begin + place.count; ++slot) {
      const Bits<dtype>* x = token_at(place, slot);
      uint8_t* codes = codes_at(place, slot);
      if (tame) {
        encode_as<dtype, false>(x, minima_.data(), inverses_.data(), codes);
      } else {
        scale_row<dtype, false>(x, factors_.data(), 1, width_, y_.data(), low_.data(), high_.data());
        encode_as<DType::kFloat32, false>(y_.data(), minima_.data(), inverses_.data(), codes);
      }
    }
  }

  // Scales per token: channel factors first, if there are any, then tiles of tokens.
  void by_tokens(const BlockRange& place) {
    bool tame = false;
    if (p_.packed.channels.data != nullptr) {
      find_magnitudes<true>(place);
      tame = is_tame<dtype>(most_.data(), most_.data(), width_);
      if (!tame) find_magnitudes<false>(place);
      find_factors<dtype>(most_.data(), width_, divisors_.data(), factors_.data());
      narrow(divisors_.data(), p_.packed.channels_at(place.b, place.h, place.block), DType::kFloat16, width_);
    }
    const int64_t end = place.begin + place.count;
    for (int64_t slot = place.begin; slot < end; slot += kTile) {
      const int64_t n = std::min(kTile, end - slot);
      if (tame) {
        tile<true>(place, slot, n);
      } else {
        tile<false>(place, slot, n);
      }
    }
  }

  template <bool tame>
  void find_magnitudes(const BlockRange& place) {
    std::fill(most_.begin(), most_.end(), Bits<dtype>{0});
    for_each_rows(place,
                  [&](const TokenRows<dtype>& rows) { extend_magnitudes<dtype, tame>(rows, width_, most_.data()); });
  }

  // Encodes n tokens. The scales of all their groups are computed together, in loops long enough for vectors.
  template <bool tame>
  void tile(const BlockRange& place, int64_t first, int64_t n) {
    for (int64_t t = 0; t < n; ++t) {
      scale_row<dtype, tame>(token_at(place, first + t), factors_.data(), groups_, width_ / groups_, &y_[t * width_],
                             &low_[t * groups_], &high_[t * groups_]);
    }
    const int64_t groups = n * groups_;
    find_steps(low_.data(), high_.data(), groups, p_.packed.bits, steps_.data(), minima_.data(), inverses_.data());
    narrow(steps_.data(), tile_steps_.data(), DType::kFloat16, groups);
    narrow(minima_.data(), tile_minima_.data(), DType::kFloat16, groups);
    for (int64_t t = 0; t < n; ++t) {
      uint16_t* scales = p_.packed.scales_at(place.b, place.h, first + t, 0);
      std::copy_n(&tile_steps_[t * groups_], groups_, scales);
      std::copy_n(&tile_minima_[t * groups_], groups_, scales + groups_);
      encode_scaled(t, codes_at(place, first + t));
    }
  }

  // Encodes token t of the tile.
  void encode_scaled(int64_t t, uint8_t* to) {
    const Bits<DType::kFloat32>* y = &y_[t * width_];
    const float *minima = &minima_[t * groups_], *inverses = &inverses_[t * groups_];
    if (groups_ == 1) return encode_as<DType::kFloat32, true>(y, minima, inverses, to);
    const int64_t size = width_ / groups_;
    for (int64_t g = 0; g < groups_; ++g) {
      std::fill_n(&row_minima_[g * size], size, minima[g]);
      std::fill_n(&row_inverses_[g * size], size, inverses[g]);
    }
    encode_as<DType::kFloat32, false>(y, row_minima_.data(), row_inverses_.data(), to);
  }

  const CodecCall& p_;
  const int64_t width_, groups_;
  std::vector<Bits<dtype>> most_, least_;
  std::vector<Bits<DType::kFloat32>> y_;  // scaled tokens, (kTile, head_dim)
  std::vector<float> factors_, divisors_, low_, high_, steps_, minima_, inverses_, row_minima_, row_inverses_;
  std::vector<uint16_t> tile_steps_, tile_minima_;
};

}  // namespace

void quantize(const CodecCall& p, const ParallelFor& parallel_for) {
  switch (p.plain.dtype) {
    case DType::kFloat32:
      return for_each_block<Quantizer<DType::kFloat32>>(p, parallel_for);
    case DType::kBFloat16:
      return for_each_block<Quantizer<DType::kBFloat16>>(p, parallel_for);
    case DType::kFloat16:
      return for_each_block<Quantizer<DType::kFloat16>>(p, parallel_for);
  }
}

}  // namespace singlepass::kv
