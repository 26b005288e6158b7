// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/convert.h"
#include "common/math.h"
#include "common/vector.h"
#include "kv/problem.h"
#include "kv/tiles.h"

// Attention that tokens receive from probes. Rows are the probes of all query heads that share a head of keys, one
// query head after another. Keys are multiplied once: a task computes the logits of kChunk rows with all tokens, turns
// them into weights while they are in its cache, and adds the rows up; the sums of the chunks are added in their order.
//
// For the products keys lie in panels of kPanel tokens, transposed: a row's channel is multiplied by that of all tokens
// of a panel, and no sums over lanes are needed. A panel is made once and read by all chunks.
namespace singlepass::kv {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPanel = 32;             // tokens: two vectors of sixteen lanes, or twice two of eight
constexpr int64_t kChunk = 48;             // rows
constexpr int64_t kWorkspace = 8LL << 20;  // floats of panels and sums; more where a single head needs more

// scores[r * stride + t] = q_r . token_t for kRows rows and the tokens of a panel. A sum is a chain of multiply-adds in
// the order of channels, whatever the width of the vectors.
template <class V, int kRows>
SINGLEPASS_HD void multiply_rows(const float* q, int64_t head_dim, const float* panel, float* scores, int64_t stride) {
  constexpr int kVectors = 2, kWidth = sizeof(V) / sizeof(float);
  for (int64_t t = 0; t < kPanel; t += kVectors * kWidth) {
    V sums[kRows][kVectors] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
      V tokens[kVectors];
      for (int i = 0; i < kVectors; ++i) tokens[i] = load_vector<V>(panel + d * kPanel + t + i * kWidth);
      for (int r = 0; r < kRows; ++r) {
        const V row = broadcast<V>(q[r * head_dim + d]);
        for (int i = 0; i < kVectors; ++i) sums[r][i] = sums[r][i] + row * tokens[i];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kVectors; ++i) store_vector(sums[r][i], scores + r * stride + t + i * kWidth);
    }
  }
}

// The same for n rows. As many sums as registers hold are kept at a time: twelve of sixteen, or sixteen of 32.
template <class V, int kRows>
SINGLEPASS_HD void multiply_panel(const float* q, int64_t n, int64_t head_dim, const float* panel, float* scores,
                                  int64_t stride) {
  int64_t r = 0;
  for (; r + kRows <= n; r += kRows) {
    multiply_rows<V, kRows>(q + r * head_dim, head_dim, panel, scores + r * stride, stride);
  }
  for (; r + 2 <= n; r += 2) {
    multiply_rows<V, 2>(q + r * head_dim, head_dim, panel, scores + r * stride, stride);
  }
  if (r < n) multiply_rows<V, 1>(q + r * head_dim, head_dim, panel, scores + r * stride, stride);
}

SINGLEPASS_TARGET_AVX512 SINGLEPASS_FUSED_MULTIPLY_ADD void multiply_wide(const float* q, int64_t n, int64_t head_dim,
                                                                          const float* panel, float* scores,
                                                                          int64_t stride) {
  multiply_panel<Lanes<16>::Floats, 8>(q, n, head_dim, panel, scores, stride);
}

SINGLEPASS_TARGET_CLONES_TO_AVX2 SINGLEPASS_FUSED_MULTIPLY_ADD void multiply_narrow(const float* q, int64_t n,
                                                                                    int64_t head_dim,
                                                                                    const float* panel, float* scores,
                                                                                    int64_t stride) {
  multiply_panel<Lanes<8>::Floats, 6>(q, n, head_dim, panel, scores, stride);
}

// to += factor * from.
SINGLEPASS_TARGET_CLONES SINGLEPASS_FUSED_MULTIPLY_ADD void add_weighted(const float* from, float factor, int64_t n,
                                                                         float* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = to[i] + factor * from[i];
}

class Sums {
 public:
  explicit Sums(const Saliency& p)
      : p_(p),
        rows_(p.group_size * p.probes),
        chunks_((rows_ + kChunk - 1) / kChunk),
        panels_((p.tokens + kPanel - 1) / kPanel),
        head_floats_(panels_ * kPanel * (p.head_dim + chunks_)) {}

  void run(const ParallelFor& parallel_for) {
    const int64_t heads = p_.batch * p_.heads;
    const int64_t together = std::clamp<int64_t>(kWorkspace / std::max<int64_t>(head_floats_, 1), 1, heads);
    keys_.resize(together * panels_ * kPanel * p_.head_dim);
    sums_.resize(together * chunks_ * p_.tokens);
    for (int64_t first = 0; first < heads; first += together) {
      run(first, std::min(together, heads - first), parallel_for);
    }
  }

 private:
  void run(int64_t first_head, int64_t heads, const ParallelFor& parallel_for) {
    const int64_t keys = heads * p_.tokens * p_.head_dim;
    parallel_for_elements(parallel_for, heads * panels_, keys, [&](int64_t begin, int64_t end) {
      std::vector<float> token(p_.head_dim);
      for (int64_t i = begin; i < end; ++i) pack(first_head, i / panels_, i % panels_, token.data());
    });
    parallel_for_elements(parallel_for, heads * chunks_, keys * rows_, [&](int64_t begin, int64_t end) {
      std::vector<float> q(kChunk * p_.head_dim), scores(kChunk * panels_ * kPanel);
      for (int64_t i = begin; i < end; ++i) {
        add_chunk(first_head + i / chunks_, i % chunks_ * kChunk, panels_of(i / chunks_), q.data(), scores.data(),
                  &sums_[i * p_.tokens]);
      }
    });
    parallel_for_elements(parallel_for, heads, heads * chunks_ * p_.tokens, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        float* to = p_.sums + (first_head + head) * p_.tokens;
        std::fill(to, to + p_.tokens, 0.0f);
        for (int64_t c = 0; c < chunks_; ++c) {
          add_weighted(&sums_[(head * chunks_ + c) * p_.tokens], 1.0f, p_.tokens, to);
        }
      }
    });
  }

  float* panels_of(int64_t head) { return &keys_[head * panels_ * kPanel * p_.head_dim]; }

  // Transposes a panel of keys. Tokens beyond the last are zeros.
  void pack(int64_t first_head, int64_t head, int64_t panel, float* token) {
    float* to = panels_of(head) + panel * kPanel * p_.head_dim;
    const int64_t b = (first_head + head) / p_.heads, h = (first_head + head) % p_.heads;
    for (int64_t t = 0; t < kPanel; ++t) {
      const int64_t place = panel * kPanel + t;
      if (place < p_.tokens) {
        widen(p_.k.at(b, h, place), p_.k.dtype, token, p_.head_dim);
      } else {
        std::fill(token, token + p_.head_dim, 0.0f);
      }
      for (int64_t d = 0; d < p_.head_dim; ++d) to[d * kPanel + t] = token[d];
    }
  }

  bool is_token(int64_t b, int64_t t) const { return p_.mask == nullptr || p_.mask[b * p_.mask_stride + t]; }

  // A row sees the tokens before this one that are not padding.
  int64_t visible(int64_t b, int64_t row) const {
    const int64_t position = p_.positions[row % p_.probes];
    return is_token(b, position) ? position + 1 : 0;
  }

  // Sums of the weights of up to kChunk rows, for each token. Rows that see nothing are left out.
  void add_chunk(int64_t head, int64_t row, const float* panels, float* q, float* scores, float* sums) const {
    const int64_t b = head / p_.heads, n = std::min(kChunk, rows_ - row), stride = panels_ * kPanel;
    int64_t end = 0;
    for (int64_t i = 0; i < n; ++i) {
      end = std::max(end, visible(b, row + i));
      const int64_t query_head = head % p_.heads * p_.group_size + (row + i) / p_.probes;
      widen(p_.q.at(b, query_head, (row + i) % p_.probes), p_.q.dtype, q + i * p_.head_dim, p_.head_dim);
      for (int64_t d = 0; d < p_.head_dim; ++d) q[i * p_.head_dim + d] *= p_.scale;
    }
    const auto multiply = has_avx512() ? multiply_wide : multiply_narrow;
    for (int64_t first = 0; first < end; first += kPanel) {
      multiply(q, n, p_.head_dim, panels + first * p_.head_dim, scores + first, stride);
    }
    std::fill(sums, sums + p_.tokens, 0.0f);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t seen = visible(b, row + i);
      float* logits = scores + i * stride;
      if (p_.softcap > 0.0f) cap(logits, seen, p_.softcap);
      for (int64_t t = 0; p_.mask != nullptr && t < seen; ++t) {
        if (!is_token(b, t)) logits[t] = -kInfinity;
      }
      const float shift = p_.lse == nullptr ? largest(logits, seen) : p_.lse[head * rows_ + row + i];
      if (shift == -kInfinity) continue;
      const float sum = exponentials(logits, seen, shift);
      add_weighted(logits, p_.lse == nullptr ? 1.0f / sum : 1.0f, seen, sums);
    }
  }

  const Saliency& p_;
  const int64_t rows_, chunks_, panels_, head_floats_;
  std::vector<float> keys_, sums_;  // panels (head, panel, channel, token); (head, chunk, token)
};

}  // namespace

void saliency(const Saliency& p, const ParallelFor& parallel_for) {
  if (p.batch * p.heads * p.tokens > 0) Sums(p).run(parallel_for);
}

}  // namespace singlepass::kv
