// SPDX-License-Identifier: Apache-2.0
// One warp's collectives: what its lanes ask for, whether they meet, and what each of them gets.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <string>

namespace simt {

constexpr unsigned kWarpSize = 32;

enum class WarpOp { kSync, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kBallot };

struct WarpRequest {
  WarpOp op;
  unsigned mask;
  std::uint64_t value;  // what the lane offers
  unsigned argument;    // source lane, delta or lane mask
  unsigned width;
};

class Warp {
 public:
  std::uint64_t order = 0;  // among the warps of the block, until the next barrier
  unsigned absent = 0;      // lanes that have exited, or that the block does not have

  // A lane comes to a collective. Whether it is the last one, with which all that its mask names have their results.
  // Calls fail(what), which throws, where lanes break a rule.
  template <class Fail>
  bool meet(unsigned lane, const WarpRequest& request, const Fail& fail) {
    requests_[lane] = request;
    if (!names(request.mask, lane)) fail("a warp collective's mask leaves out the lane that calls it");
    if (const unsigned missing = request.mask & absent; missing != 0)
      fail("a warp collective's mask names lane " + std::to_string(std::countr_zero(missing)) + ", which is not there");
    waiting_ |= 1u << lane;
    // Only the last lane to come looks at the others' requests: if each did, that would be most of what kernels cost.
    if ((request.mask & ~waiting_) != 0 || !all_meet(lane, fail)) return false;
    for (unsigned i = 0; i < kWarpSize; ++i)
      if (names(request.mask, i)) results_[i] = result_of(i, fail);
    waiting_ &= ~request.mask;
    return true;
  }

  // Of the collective that a lane met the others at.
  std::uint64_t result(unsigned lane) const { return results_[lane]; }

 private:
  static bool names(unsigned mask, unsigned lane) { return (mask >> lane & 1u) != 0; }

  // Whether the lanes that one lane's mask names, all of which wait, wait in the same collective.
  template <class Fail>
  bool all_meet(unsigned own_lane, const Fail& fail) const {
    const WarpRequest& own = requests_[own_lane];
    bool all = true;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!names(own.mask, lane)) continue;
      const WarpRequest& other = requests_[lane];
      const bool meets = other.op == own.op && other.mask == own.mask;
      if (!meets && names(other.mask, own_lane)) fail("lanes of one warp wait for each other in different collectives");
      all &= meets;
    }
    return all;
  }

  template <class Fail>
  std::uint64_t result_of(unsigned lane, const Fail& fail) const {
    const WarpRequest& request = requests_[lane];
    const unsigned last = lane | (request.width - 1);  // of the segment of `width` lanes
    const unsigned first = last - (request.width - 1);
    unsigned source = lane;
    switch (request.op) {
      case WarpOp::kSync:
        return 0;
      case WarpOp::kBallot: {
        std::uint64_t ballot = 0;
        for (unsigned i = 0; i < kWarpSize; ++i)
          if (names(request.mask, i)) ballot |= static_cast<std::uint64_t>(requests_[i].value != 0) << i;
        return ballot;
      }
      case WarpOp::kShuffle:
        source = first + request.argument % request.width;
        break;
      case WarpOp::kShuffleUp:
        if (lane >= first + request.argument) source = lane - request.argument;
        break;
      case WarpOp::kShuffleDown:
        if (lane + request.argument <= last) source = lane + request.argument;
        break;
      case WarpOp::kShuffleXor:
        if ((lane ^ request.argument) <= last) source = lane ^ request.argument;
        break;
    }
    if (!names(request.mask, source))
      fail("a shuffle reads lane " + std::to_string(source) + ", which its mask leaves out");
    return requests_[source].value;
  }

  unsigned waiting_ = 0;  // lanes in a collective
  std::array<WarpRequest, kWarpSize> requests_;
  std::array<std::uint64_t, kWarpSize> results_;
};

}  // namespace simt
