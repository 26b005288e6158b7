// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <vector>

#include "singlepass/common/convert.h"
#include "singlepass/common/vector.h"
#include "singlepass/kv/codec.h"
#include "singlepass/kv/cpu.h"
#include "singlepass/kv/tiles.h"

// A task is a block of one head: its tokens are read once from memory and, where steps belong to channels, again from
// the cache.
namespace singlepass::kv {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kAhead = 4;  // tokens

// What a block's channels need. Sums of x * 0 become NaN where x is not finite.
struct ChannelStatistics {
  std::vector<float> low, high, zeros;

  explicit ChannelStatistics(int64_t width) : low(width, kInfinity), high(width, -kInfinity), zeros(width, 0.0f) {}
};

SINGLEPASS_TARGET_CLONES void extend(const float* x, int64_t n, float* low, float* high, float* zeros) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) {
    const float y = clamped(x[d]);
    low[d] = y < low[d] ? y : low[d];
    high[d] = y > high[d] ? y : high[d];
    zeros[d] += x[d] * 0.0f;
  }
}

// Magnitudes of what is finite.
SINGLEPASS_TARGET_CLONES void extend_magnitudes(const float* x, int64_t n, float* most) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) {
    const float y = x[d] * 0.0f == 0.0f ? fabsf(clamped(x[d])) : 0.0f;
    most[d] = y > most[d] ? y : most[d];
  }
}

SINGLEPASS_TARGET_CLONES void scale_channels(const float* x, const float* factors, int64_t n, float* y) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) y[d] = clamped(x[d]) * factors[d];
}

SINGLEPASS_TARGET_CLONES void encode_channels(const float* x, const float* minima, const float* inverses, float levels,
                                              int64_t n, uint8_t* codes) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d)
    codes[d] = static_cast<uint8_t>(encode(clamped(x[d]), minima[d], inverses[d], levels));
}

SINGLEPASS_TARGET_CLONES void encode_group(const float* y, float minimum, float inverse, float levels, int64_t n,
                                           uint8_t* codes) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) codes[d] = static_cast<uint8_t>(encode(y[d], minimum, inverse, levels));
}

SINGLEPASS_TARGET_CLONES void pack(const uint8_t* codes, int bits, int64_t bytes, uint8_t* to) {
  if (bits == 8) {
    memcpy(to, codes, static_cast<size_t>(bytes));
  } else if (bits == 4) {
#pragma GCC ivdep
    for (int64_t w = 0; w < bytes; ++w) to[w] = static_cast<uint8_t>(codes[w] | codes[bytes + w] << 4);
  } else {
#pragma GCC ivdep
    for (int64_t w = 0; w < bytes; ++w) {
      to[w] = static_cast<uint8_t>(codes[w] | codes[bytes + w] << 2 | codes[2 * bytes + w] << 4 |
                                   codes[3 * bytes + w] << 6);
    }
  }
}

SINGLEPASS_TARGET_CLONES void multiply(float* x, const float* factors, int64_t n) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) x[d] *= factors[d];
}

struct Extremes {
  float low, high;
  bool finite;
};

// Of a group: x as it came, y as it is stored.
SINGLEPASS_TARGET_CLONES Extremes extremes(const float* x, const float* y, int64_t n) {
  Vector low = Vector{} + kInfinity, high = -low, zeros = {};
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    const Vector v = load_vector(y + d);
    low = v < low ? v : low;
    high = v > high ? v : high;
    zeros += load_vector(x + d) * 0.0f;
  }
  Extremes found = {kInfinity, -kInfinity, true};
  const auto extend = [&](float least, float most, float zero) {
    found.low = least < found.low ? least : found.low;
    found.high = most > found.high ? most : found.high;
    found.finite = found.finite && zero == 0.0f;
  };
  for (int k = 0; k < kLanes; ++k) extend(low[k], high[k], zeros[k]);
  for (; d < n; ++d) extend(y[d], y[d], x[d] * 0.0f);
  return found;
}

// Where a task's block stands.
struct Place {
  int64_t b, h, block, begin, count, end;  // slots from begin on, of which count hold a token

  Place(const Codec& p, int64_t task) {
    block = task % p.blocks.number;
    h = task / p.blocks.number % p.heads;
    b = task / p.blocks.number / p.heads;
    begin = p.blocks.starts[block];
    end = p.blocks.starts[block + 1];
    count = p.blocks.count(b, block);
  }
};

class Quantizer {
 public:
  explicit Quantizer(const Codec& p)
      : p_(p), width_(p.packed.width), row_(width_), inverses_(width_), minima_(width_), codes_(width_) {}

  void run(const Place& place) {
    if (p_.packed.axis == Axis::kChannel) {
      by_channels(place);
    } else {
      by_tokens(place);
    }
    for (int64_t slot = place.begin + place.count; slot < place.end; ++slot) {
      memset(p_.packed.codes_at(place.b, place.h, slot), 0, static_cast<size_t>(p_.packed.bytes()));
      if (p_.packed.axis == Axis::kToken) {
        memset(p_.packed.scales_at(place.b, place.h, slot, 0), 0, static_cast<size_t>(4 * p_.packed.groups));
      }
    }
  }

 private:
  // The first time that a block's token is read: those of an index stand where the processor does not expect them.
  const float* read_ahead(const Place& place, int64_t slot) {
    if (slot + kAhead < place.begin + place.count) {
      const char* ahead = p_.plain.at(place.b, place.h, p_.token(place.b, place.h, slot + kAhead));
      for (int64_t byte = 0; byte < width_ * size_of(p_.plain.dtype); byte += 64) __builtin_prefetch(ahead + byte);
    }
    return read(place, slot);
  }

  const float* read(const Place& place, int64_t slot) {
    const char* from = p_.plain.at(place.b, place.h, p_.token(place.b, place.h, slot));
    if (p_.plain.dtype == DType::kFloat32) return reinterpret_cast<const float*>(from);
    widen(from, p_.plain.dtype, row_.data(), width_);
    return row_.data();
  }

  void store(const Place& place, int64_t slot) {
    pack(codes_.data(), p_.packed.bits, p_.packed.bytes(), p_.packed.codes_at(place.b, place.h, slot));
  }

  void by_channels(const Place& place) {
    ChannelStatistics found(width_);
    const int64_t end = place.begin + place.count;
    for (int64_t slot = place.begin; slot < end; ++slot) {
      extend(read_ahead(place, slot), width_, found.low.data(), found.high.data(), found.zeros.data());
    }
    uint16_t* scales = p_.packed.scales_at(place.b, place.h, 0, place.block);
    for (int64_t d = 0; d < width_; ++d) {
      const bool empty = place.count == 0;
      const Steps s =
          steps(empty ? 0.0f : found.low[d], empty ? 0.0f : found.high[d], found.zeros[d] == 0.0f, p_.packed.bits);
      scales[d] = s.step;
      scales[width_ + d] = s.minimum;
      inverses_[d] = inverse(s.step);
      minima_[d] = float16_to_float(s.minimum);
    }
    for (int64_t slot = place.begin; slot < end; ++slot) {
      encode_channels(read(place, slot), minima_.data(), inverses_.data(), levels(), width_, codes_.data());
      store(place, slot);
    }
  }

  void by_tokens(const Place& place) {
    const int64_t end = place.begin + place.count, groups = p_.packed.groups, size = width_ / groups;
    std::vector<float> factors(width_, 1.0f), y(width_);
    if (p_.packed.channels.data != nullptr) find_factors(place, factors);
    for (int64_t slot = place.begin; slot < end; ++slot) {
      const float* x = read(place, slot);
      scale_channels(x, factors.data(), width_, y.data());
      uint16_t* scales = p_.packed.scales_at(place.b, place.h, slot, 0);
      for (int64_t g = 0; g < groups; ++g) {
        const Extremes found = extremes(x + g * size, y.data() + g * size, size);
        const Steps s = steps(found.low, found.high, found.finite, p_.packed.bits);
        scales[g] = s.step;
        scales[groups + g] = s.minimum;
        encode_group(y.data() + g * size, float16_to_float(s.minimum), inverse(s.step), levels(), size,
                     codes_.data() + g * size);
      }
      store(place, slot);
    }
  }

  void find_factors(const Place& place, std::vector<float>& factors) {
    std::vector<float> most(width_, 0.0f);
    for (int64_t slot = place.begin; slot < place.begin + place.count; ++slot) {
      extend_magnitudes(read_ahead(place, slot), width_, most.data());
    }
    uint16_t* channels = p_.packed.channels_at(place.b, place.h, place.block);
    for (int64_t d = 0; d < width_; ++d) {
      channels[d] = channel_factor(most[d]);
      factors[d] = 1.0f / float16_to_float(channels[d]);
    }
  }

  float levels() const { return static_cast<float>((1 << p_.packed.bits) - 1); }

  const Codec& p_;
  const int64_t width_;
  std::vector<float> row_, inverses_, minima_;
  std::vector<uint8_t> codes_;
};

class Dequantizer {
 public:
  explicit Dequantizer(const Codec& p) : p_(p), width_(p.packed.width), row_(width_), steps_(width_), minima_(width_) {}

  void run(const Place& place) {
    const bool by_channels = p_.packed.axis == Axis::kChannel;
    if (by_channels) {
      const uint16_t* scales = p_.packed.scales_at(place.b, place.h, 0, place.block);
      widen(scales, DType::kFloat16, steps_.data(), width_);
      widen(scales + width_, DType::kFloat16, minima_.data(), width_);
    } else if (p_.packed.channels.data != nullptr) {
      widen(p_.packed.channels_at(place.b, place.h, place.block), DType::kFloat16, steps_.data(), width_);
    }
    for (int64_t slot = place.begin; slot < place.begin + place.count; ++slot) {
      unpack(p_.packed.codes_at(place.b, place.h, slot), p_.packed.bits, 1, width_, row_.data());
      if (by_channels) {
        for (int64_t d = 0; d < width_; ++d) row_[d] = row_[d] * steps_[d] + minima_[d];
      } else {
        restore(p_.packed.scales_at(place.b, place.h, slot, 0), p_.packed.groups, width_, row_.data());
        if (p_.packed.channels.data != nullptr) multiply(row_.data(), steps_.data(), width_);
      }
      write(place, slot);
    }
  }

 private:
  void write(const Place& place, int64_t slot) {
    char* to = p_.plain.at(place.b, place.h, p_.token(place.b, place.h, slot));
    if (p_.plain.dtype == DType::kFloat32) {
      memcpy(to, row_.data(), static_cast<size_t>(width_) * sizeof(float));
    } else {
      narrow(row_.data(), to, p_.plain.dtype, width_);
    }
  }

  const Codec& p_;
  const int64_t width_;
  std::vector<float> row_, steps_, minima_;
};

template <class Worker>
void for_each_block(const Codec& p, const ParallelFor& parallel_for) {
  const int64_t tasks = p.batch * p.heads * p.blocks.number;
  const int64_t elements = p.batch * p.heads * p.packed.width * p.blocks.starts[p.blocks.number];
  parallel_for_elements(parallel_for, tasks, elements, [&](int64_t begin, int64_t end) {
    Worker worker(p);
    for (int64_t task = begin; task < end; ++task) worker.run(Place(p, task));
  });
}

}  // namespace

void quantize_cpu(const Codec& p, const ParallelFor& parallel_for) {
  for_each_block<Quantizer>(p, parallel_for);
}

void dequantize_cpu(const Codec& p, const ParallelFor& parallel_for) {
  for_each_block<Dequantizer>(p, parallel_for);
}

}  // namespace singlepass::kv
