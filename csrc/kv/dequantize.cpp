// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "common/convert.h"
#include "kv/blocks.h"
#include "kv/problem.h"
#include "kv/tiles.h"

namespace singlepass::kv {
namespace {

SINGLEPASS_TARGET_CLONES void multiply(float* x, const float* factors, int64_t n) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) x[d] *= factors[d];
}

class Dequantizer {
 public:
  explicit Dequantizer(const CodecCall& p)
      : p_(p), width_(p.packed.head_dim), row_(width_), steps_(width_), minima_(width_) {}

  void run(const BlockRange& place) {
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
      narrow(row_.data(), p_.plain.at(place.b, place.h, p_.token(place.b, place.h, slot)), p_.plain.dtype, width_);
    }
  }

 private:
  const CodecCall& p_;
  const int64_t width_;
  std::vector<float> row_, steps_, minima_;
};

}  // namespace

void dequantize(const CodecCall& p, const ParallelFor& parallel_for) {
  for_each_block<Dequantizer>(p, parallel_for);
}

}  // namespace singlepass::kv
