// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kv/problem.h"

// Into how many splits the slots of a head are cut, so that thread blocks fill a GPU for as long as it works.
namespace singlepass::kv {

// Slots that are cut by themselves, in units: those of a segment, or of the window. Each split has `fewest` units, the
// first `more` of them one more.
struct Stretch {
  int64_t slots, unit;
  int64_t cost;  // of a slot
  int splits = 0, fewest = 0, more = 0;

  SINGLEPASS_HD int64_t units() const { return (slots + unit - 1) / unit; }
  // The first slot of a split.
  SINGLEPASS_HD int64_t begin(int split) const { return (split * fewest + (split < more ? split : more)) * unit; }
  // Costs of the longest of so many splits.
  double longest(int among) const {
    return among == 0 ? 0.0 : static_cast<double>((units() + among - 1) / among * unit * cost);
  }
};

inline constexpr int kMostSplits = 512;

// Gives each stretch its splits, and returns their number. A GPU takes `columns` times as many thread blocks as there
// are splits, in waves of cut.places. To the work of the waves comes the start of their blocks; a part of the longest
// split, as blocks do not end together, most of all for sequences of different lengths; and what is merged at the end.
// Splits are added one by one where they are longest, and the number that costs least is taken.
inline int cut_stretches(Stretch* stretches, int count, int64_t columns, const DecodeCut& cut) {
  constexpr double kTail = 0.25;
  const double places = static_cast<double>(cut.places), blocks = static_cast<double>(columns);
  int splits = 0, own[kMaxSegments + 1], taken[kMaxSegments + 1];
  double lengths[kMaxSegments + 1], work = 0.0, least = INFINITY;
  for (int i = 0; i < count; ++i) {
    splits += taken[i] = own[i] = stretches[i].slots > 0 ? 1 : 0;
    work += lengths[i] = stretches[i].longest(own[i]);
  }
  if (splits == 0) splits = taken[count - 1] = 1;  // which has nothing to do but to say so
  for (int all = splits;; ++all) {
    const double longest = *std::max_element(lengths, lengths + count);
    int next = -1;  // the one with the longest splits that can be shorter
    for (int i = 0; i < count; ++i)
      if (own[i] < stretches[i].units() && (next < 0 || lengths[i] > lengths[next])) next = i;
    const double waves = std::ceil(all * blocks / places);
    const double added = waves * static_cast<double>(cut.start) + static_cast<double>(all * cut.merge);
    const double cost = added + waves * work / all + kTail * longest;
    if (cost < least) {
      least = cost, splits = all;
      if (all > 1) std::copy_n(own, count, taken);
    }
    if (added + work * blocks / places >= least || all == kMostSplits || next < 0) break;
    lengths[next] = stretches[next].longest(++own[next]);
  }
  for (int i = 0; i < count; ++i) {
    Stretch& s = stretches[i];
    s.splits = taken[i];
    s.fewest = s.splits == 0 ? 0 : static_cast<int>(s.units() / s.splits);
    s.more = s.splits == 0 ? 0 : static_cast<int>(s.units() % s.splits);
  }
  return splits;
}

}  // namespace singlepass::kv
