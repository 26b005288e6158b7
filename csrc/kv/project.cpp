// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "common/convert.h"
#include "common/vector.h"
#include "kv/problem.h"
#include "kv/tiles.h"
#include "kv/token_tiles.h"

// Rows of a task are up to kTile tokens, of all heads of x that share a basis: it is read once for them.
namespace singlepass::kv {
namespace {

// The halves of a row turned against each other.
SINGLEPASS_TARGET_CLONES void rotate(float* row, const float* cos, const float* sin, int64_t channels) {
  const int64_t half = channels / 2;
#pragma GCC ivdep
  for (int64_t d = 0; d < half; ++d) {
    const float first = row[d], second = row[half + d];
    row[d] = first * cos[d] - second * sin[d];
    row[half + d] = second * cos[half + d] + first * sin[half + d];
  }
}

class Projector {
 public:
  explicit Projector(const Projection& p)
      : p_(p), rows_(kTile * kMaxHeadDim), sums_(kTile * kMaxHeadDim), turns_(2 * kMaxHeadDim) {}

  // Rows [begin, end) of a sequence and a head: the tokens of its first head of x, then those of the next.
  void run(int64_t b, const Projected& to, int64_t begin, int64_t end) {
    const int64_t width = p_.sources[to.source].head_dim;
    for (int64_t row = begin; row < end; ++row) load(b, to, row, rows_.data() + (row - begin) * width);
    std::fill_n(sums_.begin(), (end - begin) * to.rank, 0.0f);
    const TokenRows basis = {to.basis, DType::kFloat32, to.rank};
    accumulate(rows_.data(), width, end - begin, basis, width, to.rank, sums_.data());
    for (int64_t row = begin; row < end; ++row) {
      const int64_t head = to.place * p_.group_size + row / p_.tokens;
      narrow(sums_.data() + (row - begin) * to.rank, to.out.at(b, head, row % p_.tokens), to.out.dtype, to.rank);
    }
  }

 private:
  void load(int64_t b, const Projected& to, int64_t row, float* x) {
    const Source& source = p_.sources[to.source];
    const int64_t token = row % p_.tokens;
    widen(source.x.at(b, to.head * p_.group_size + row / p_.tokens, token), source.x.dtype, x, source.head_dim);
    if (to.source > 0 || p_.cos.data == nullptr) return;
    float *cos = turns_.data(), *sin = cos + p_.rotated;
    widen(p_.cos.at(b, 0, token), p_.cos.dtype, cos, p_.rotated);
    widen(p_.sin.at(b, 0, token), p_.sin.dtype, sin, p_.rotated);
    rotate(x, cos, sin, p_.rotated);
  }

  const Projection& p_;
  std::vector<float> rows_, sums_, turns_;
};

}  // namespace

void project(const Projection& p, const ParallelFor& parallel_for) {
  const int64_t heads = static_cast<int64_t>(p.heads.size()), rows = p.group_size * p.tokens;
  const int64_t tiles = (rows + kTile - 1) / kTile, tasks = p.batch * heads * tiles;
  int64_t products = 0;
  for (const Projected& to : p.heads) products += p.batch * rows * p.sources[to.source].head_dim * to.rank;
  parallel_for_elements(parallel_for, tasks, products, [&](int64_t begin, int64_t end) {
    Projector projector(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tiles * kTile, head = task / tiles % heads;
      projector.run(task / tiles / heads, p.heads[static_cast<size_t>(head)], first, std::min(first + kTile, rows));
    }
  });
}

}  // namespace singlepass::kv
