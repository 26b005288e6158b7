// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/convert.h"
#include "common/math.h"
#include "kv/problem.h"
#include "kv/tiles.h"

// Attention that tokens receive from probes, in two passes over the keys. The first pass computes lse, the logarithm of
// each row's sum of exp, unless lse is given. The second pass sums exp(logit - lse) over the rows, for each token.
// Scores are computed in tiles of (kRows rows, kTile tokens) and never stored beyond a tile. Rows are the probes of all
// query heads that share a head of keys, one query head after another.
namespace singlepass::kv {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 64;

class Pass {
 public:
  explicit Pass(const Saliency& p)
      : p_(p),
        rows_(p.group_size * p.probes),
        q_(p.batch * p.heads * rows_ * p.head_dim),
        lse_(p.batch * p.heads * rows_) {}

  // Converts the queries to float32 and scales them; copies lse if it is given.
  void prepare(const ParallelFor& parallel_for) {
    const int64_t tasks = p_.batch * p_.heads * rows_;
    parallel_for_elements(parallel_for, tasks, tasks * p_.head_dim, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / (p_.heads * rows_), row = task % (p_.heads * rows_);
        float* q = &q_[task * p_.head_dim];
        widen(p_.q.at(b, row / p_.probes, row % p_.probes), p_.q.dtype, q, p_.head_dim);
        for (int64_t d = 0; d < p_.head_dim; ++d) q[d] *= p_.scale;
      }
    });
    if (p_.lse != nullptr) std::copy(p_.lse, p_.lse + lse_.size(), lse_.begin());
  }

  // First pass. A task is kRows rows of one head.
  void log_sums(const ParallelFor& parallel_for) {
    const int64_t chunks = (rows_ + kRows - 1) / kRows, tasks = p_.batch * p_.heads * chunks;
    parallel_for_elements(parallel_for, tasks, multiplications(), [&](int64_t begin, int64_t end) {
      Buffers buffers(p_);
      for (int64_t task = begin; task < end; ++task) log_sums(task / chunks, task % chunks * kRows, buffers);
    });
  }

  // Second pass. A task is kTile tokens of one head.
  void column_sums(const ParallelFor& parallel_for) {
    const int64_t tiles = (p_.tokens + kTile - 1) / kTile, tasks = p_.batch * p_.heads * tiles;
    parallel_for_elements(parallel_for, tasks, multiplications(), [&](int64_t begin, int64_t end) {
      Buffers buffers(p_);
      for (int64_t task = begin; task < end; ++task) column_sums(task / tiles, task % tiles * kTile, buffers);
    });
  }

 private:
  struct Buffers {
    std::vector<float> tokens, scores;  // (kTile, head_dim), (kRows, kTile)
    explicit Buffers(const Saliency& p) : tokens(kTile * p.head_dim), scores(kRows * kTile) {}
  };

  int64_t multiplications() const { return p_.batch * p_.heads * rows_ * p_.tokens * p_.head_dim; }

  bool is_token(int64_t b, int64_t t) const { return p_.mask == nullptr || p_.mask[b * p_.mask_stride + t]; }

  // A row sees the tokens before this one that are not padding.
  int64_t visible(int64_t b, int64_t row) const {
    const int64_t position = p_.positions[row % p_.probes];
    return is_token(b, position) ? position + 1 : 0;
  }

  // Converts a tile of keys to float32.
  void load(int64_t head, int64_t first, Buffers& to) const {
    const int64_t count = std::min(kTile, p_.tokens - first);
    for (int64_t t = 0; t < count; ++t) {
      const char* token = p_.k.at(head / p_.heads, head % p_.heads, first + t);
      widen(token, p_.k.dtype, &to.tokens[t * p_.head_dim], p_.head_dim);
    }
  }

  // Computes the logits of n rows and of the loaded tokens, the first of which is `first`. Logits of tokens that a row
  // does not see are -inf.
  void score(int64_t head, int64_t row, int64_t n, int64_t first, Buffers& to) const {
    const int64_t count = std::min(kTile, p_.tokens - first), b = head / p_.heads;
    dot(&q_[(head * rows_ + row) * p_.head_dim], n, {to.tokens.data(), kFloats}, count, p_.head_dim, to.scores.data(),
        kTile);
    for (int64_t i = 0; i < n; ++i) {
      float* scores = &to.scores[i * kTile];
      if (p_.softcap > 0.0f) cap(scores, count, p_.softcap);
      const int64_t seen = visible(b, row + i);
      for (int64_t t = 0; t < count; ++t) {
        if (first + t >= seen || !is_token(b, first + t)) scores[t] = -kInfinity;
      }
    }
  }

  // Online softmax of up to kRows rows over the tokens that any of them sees.
  void log_sums(int64_t head, int64_t row, Buffers& buffers) {
    const int64_t n = std::min(kRows, rows_ - row);
    std::vector<float> most(n, -kInfinity), sum(n, 0.0f);
    int64_t end = 0;
    for (int64_t i = 0; i < n; ++i) end = std::max(end, visible(head / p_.heads, row + i));
    for (int64_t first = 0; first < end; first += kTile) {
      const int64_t count = std::min(kTile, p_.tokens - first);
      load(head, first, buffers);
      score(head, row, n, first, buffers);
      for (int64_t i = 0; i < n; ++i) {
        float* scores = &buffers.scores[i * kTile];
        const float now = maximum(most[i], largest(scores, count));
        if (now == -kInfinity) continue;
        sum[i] = sum[i] * (now == most[i] ? 1.0f : expf(most[i] - now)) + exponentials(scores, count, now);
        most[i] = now;
      }
    }
    for (int64_t i = 0; i < n; ++i) lse_[head * rows_ + row + i] = sum[i] == 0.0f ? -kInfinity : most[i] + logf(sum[i]);
  }

  // Sums of a tile of tokens over all rows of the head. Rows that see nothing are left out.
  void column_sums(int64_t head, int64_t first, Buffers& buffers) {
    const int64_t count = std::min(kTile, p_.tokens - first);
    float sums[kTile] = {};
    load(head, first, buffers);
    for (int64_t row = 0; row < rows_; row += kRows) {
      const int64_t n = std::min(kRows, rows_ - row);
      score(head, row, n, first, buffers);
      for (int64_t i = 0; i < n; ++i) {
        const float lse = lse_[head * rows_ + row + i];
        if (lse == -kInfinity) continue;
        float* scores = &buffers.scores[i * kTile];
        exponentials(scores, count, lse);
        for (int64_t t = 0; t < count; ++t) sums[t] += scores[t];
      }
    }
    std::copy(sums, sums + count, p_.sums + head * p_.tokens + first);
  }

  const Saliency& p_;
  const int64_t rows_;
  std::vector<float> q_, lse_;
};

}  // namespace

void saliency(const Saliency& p, const ParallelFor& parallel_for) {
  Pass pass(p);
  pass.prepare(parallel_for);
  if (p.lse == nullptr) pass.log_sums(parallel_for);
  pass.column_sums(parallel_for);
}

}  // namespace singlepass::kv
