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

// Decode attention on the CPU. A task is one split of one head: an online softmax of all rows (queries of the query
// heads that share the head of keys) over the split's slots. Then the splits of each head are merged in their order.
//
// Scales (steps s and minima m) are applied to rows of queries and of weights, not to elements. With keys k^ = n s + m,
// scales per channel, q . k^ = (q s) . n + q . m. With values v^ = c (n s_t + m_t), sum_t p_t v^_t = c (sum_t (p_t s_t)
// n_t + sum_t p_t m_t). Tokens in other layouts are restored to float32 first.
namespace singlepass::kv {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPiece = 128;  // tokens of a block that share one step of the online softmax
constexpr int64_t kSpan = 2048;  // slots of a split

// Slots of a segment, or, if segment is -1, the window.
struct Span {
  int64_t segment, begin, end;
};

std::vector<Span> spans_of(const Decode& p) {
  std::vector<Span> splits;
  for (size_t s = 0; s < p.segments.size(); ++s) {
    for (int64_t begin = 0; begin < p.segments[s].slots; begin += kSpan) {
      splits.push_back({static_cast<int64_t>(s), begin, std::min(begin + kSpan, p.segments[s].slots)});
    }
  }
  splits.push_back({-1, 0, 0});
  return splits;
}

// The unfinished softmax of a split: row max, sum of exp(logit - row_max), and sum of the values weighted by these.
struct Partial {
  float* row_max;  // (rows,)
  float* row_sum;  // (rows,)
  float* out;      // (rows, value_dim)

  static int64_t size(const Decode& p) { return p.rows() * (2 + p.value_dim); }
  Partial(const Decode& p, float* memory) : row_max(memory), row_sum(row_max + p.rows()), out(row_sum + p.rows()) {}
};

void clear(const Decode& p, Partial& to) {
  std::fill(to.row_max, to.row_max + p.rows(), -kInfinity);
  std::fill(to.row_sum, to.row_sum + p.rows() * (1 + p.value_dim), 0.0f);
}

// to = x * steps, where `to` may be x. Returns x . minima.
SINGLEPASS_TARGET_CLONES float fold(const float* x, const float* steps, const float* minima, int64_t n, float* to) {
  Vector sums = {};
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    const Vector v = load_vector(x + d);
    sums += v * load_vector(minima + d);
    store_vector(v * load_vector(steps + d), to + d);
  }
  float sum = 0.0f;
  for (int k = 0; k < kLanes; ++k) sum += sums[k];
  for (; d < n; ++d) {
    sum += x[d] * minima[d];
    to[d] = x[d] * steps[d];
  }
  return sum;
}

// out = out * factor + channels * (sums + shift).
SINGLEPASS_TARGET_CLONES void add_piece(float* out, float factor, const float* channels, const float* sums, float shift,
                                        int64_t n) {
#pragma GCC ivdep
  for (int64_t d = 0; d < n; ++d) out[d] = out[d] * factor + channels[d] * (sums[d] + shift);
}

class Worker {
 public:
  explicit Worker(const Decode& p)
      : p_(p),
        q_(p.rows() * p.head_dim),
        folded_(p.rows() * p.head_dim),
        bias_(p.rows()),
        scores_(p.rows() * kPiece),
        shifts_(p.rows()),
        tokens_(kTile * std::max(p.head_dim, p.value_dim)),
        steps_(std::max({p.head_dim, p.value_dim, kPiece})),
        minima_(std::max(p.head_dim, kPiece)),
        channels_(p.value_dim),
        sums_(p.rows() * p.value_dim) {}

  void run(int64_t b, int64_t h, const Span& split, Partial to) {
    b_ = b;
    h_ = h;
    clear(p_, to);
    for (int64_t r = 0; r < p_.rows(); ++r) {  // converts and scales the queries
      float* q = &q_[r * p_.head_dim];
      widen(p_.q.at(b, h * p_.group_size + r / p_.queries, r % p_.queries), p_.q.dtype, q, p_.head_dim);
      for (int64_t d = 0; d < p_.head_dim; ++d) q[d] *= p_.scale;
    }
    if (split.segment < 0) {
      run_window(to);
    } else {
      run_segment(split, to);
    }
  }

 private:
  // Goes through the blocks of tokens that the split meets, piece by piece.
  void run_segment(const Span& split, Partial& to) {
    const Segment& s = p_.segments[static_cast<size_t>(split.segment)];
    const int32_t* starts = s.blocks.starts;
    const int64_t seen = p_.first == nullptr ? 0 : p_.first[(split.segment * p_.batch + b_) * p_.heads + h_];
    int64_t block = std::upper_bound(starts, starts + s.blocks.num_blocks + 1, split.begin) - starts - 1;
    for (; block < s.blocks.num_blocks && starts[block] < split.end; ++block) {
      const int64_t end = std::min<int64_t>(split.end, starts[block] + s.blocks.count(b_, h_, block));
      for (int64_t slot = std::max({split.begin, static_cast<int64_t>(starts[block]), seen}); slot < end;) {
        const int64_t n = std::min(kPiece, end - slot);
        piece(s, block, slot, n, to);
        slot += n;
      }
    }
  }

  // One step of the online softmax: n compressed tokens of one block. Scores are (rows, kPiece).
  void piece(const Segment& s, int64_t block, int64_t slot, int64_t n, Partial& to) {
    const bool by_channels = s.keys.axis == Axis::kChannel;
    if (by_channels) {
      fold_queries(s.keys.scales_at(b_, h_, slot, block));
      dot(folded_.data(), p_.rows(), {s.keys.codes_at(b_, h_, slot), s.keys.bits}, n, p_.head_dim, scores_.data(),
          kPiece);
    } else {
      for (int64_t t = 0; t < n; t += kTile) {
        const Rows rows = restored(s.keys, slot + t, std::min(kTile, n - t), p_.head_dim);
        dot(q_.data(), p_.rows(), rows, std::min(kTile, n - t), p_.head_dim, &scores_[t], kPiece);
      }
    }
    for (int64_t r = 0; by_channels && r < p_.rows(); ++r) {
      for (int64_t t = 0; t < n; ++t) scores_[r * kPiece + t] += bias_[r];
    }
    cap_scores(n);
    weigh(n, to);
    weighted_values(s.values, block, slot, n, to);
  }

  // folded_ = q s and bias_ = q . m, with the scales of the block's channels.
  void fold_queries(const uint16_t* scales) {
    widen(scales, DType::kFloat16, steps_.data(), p_.head_dim);
    widen(scales + p_.head_dim, DType::kFloat16, minima_.data(), p_.head_dim);
    for (int64_t r = 0; r < p_.rows(); ++r) {
      bias_[r] = fold(&q_[r * p_.head_dim], steps_.data(), minima_.data(), p_.head_dim, &folded_[r * p_.head_dim]);
    }
  }

  // Restores up to kTile tokens with scales per token to float32.
  Rows restored(const Packed& packed, int64_t slot, int64_t count, int64_t head_dim) {
    unpack(packed.codes_at(b_, h_, slot), packed.bits, count, head_dim, tokens_.data());
    for (int64_t t = 0; t < count; ++t) {
      restore(packed.scales_at(b_, h_, slot + t, 0), packed.groups, head_dim, &tokens_[t * head_dim]);
    }
    return {tokens_.data(), kFloats};
  }

  void cap_scores(int64_t n) {
    for (int64_t r = 0; p_.softcap > 0.0f && r < p_.rows(); ++r) cap(&scores_[r * kPiece], n, p_.softcap);
  }

  // Updates each row's max, turns the scores of n tokens into weights exp(score - row_max), and adds them to the row's
  // sum. What was summed before must be multiplied by shifts_.
  void weigh(int64_t n, Partial& to) {
    for (int64_t r = 0; r < p_.rows(); ++r) {
      float* scores = &scores_[r * kPiece];
      const float row_max = maximum(to.row_max[r], largest(scores, n));
      shifts_[r] = row_max == to.row_max[r] ? 1.0f : expf(to.row_max[r] - row_max);
      if (row_max == -kInfinity) {
        std::fill(scores, scores + n, 0.0f);
      } else {
        to.row_sum[r] = to.row_sum[r] * shifts_[r] + exponentials(scores, n, row_max);
      }
      to.row_max[r] = row_max;
    }
  }

  // Adds the weighted values of n tokens to the result. Scales that belong to whole tokens go into the weights (p s)
  // and the bias (p . m).
  void weighted_values(const Packed& values, int64_t block, int64_t slot, int64_t n, Partial& to) {
    const bool plain = values.groups == 1;
    std::fill(bias_.begin(), bias_.end(), 0.0f);
    if (plain) {
      for (int64_t t = 0; t < n; ++t) {
        const uint16_t* scales = values.scales_at(b_, h_, slot + t, 0);
        steps_[t] = float16_to_float(scales[0]);
        minima_[t] = float16_to_float(scales[1]);
      }
      for (int64_t r = 0; r < p_.rows(); ++r) {
        float* weights = &scores_[r * kPiece];
        bias_[r] = fold(weights, steps_.data(), minima_.data(), n, weights);
      }
    }
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    if (plain) {
      const Rows rows = {values.codes_at(b_, h_, slot), values.bits};
      accumulate(scores_.data(), kPiece, p_.rows(), rows, n, p_.value_dim, sums_.data());
    } else {
      for (int64_t t = 0; t < n; t += kTile) {
        const Rows rows = restored(values, slot + t, std::min(kTile, n - t), p_.value_dim);
        accumulate(&scores_[t], kPiece, p_.rows(), rows, std::min(kTile, n - t), p_.value_dim, sums_.data());
      }
    }
    if (values.channels.data != nullptr) {
      widen(values.channels_at(b_, h_, block), DType::kFloat16, channels_.data(), p_.value_dim);
    } else {
      std::fill(channels_.begin(), channels_.end(), 1.0f);
    }
    add_sums(to);
  }

  // out = out * shift + c (sums + bias) for all rows.
  void add_sums(Partial& to) {
    for (int64_t r = 0; r < p_.rows(); ++r) {
      const int64_t row = r * p_.value_dim;
      add_piece(to.out + row, shifts_[r], channels_.data(), &sums_[row], bias_[r], p_.value_dim);
    }
  }

  // Attends to the window, whose tokens are not compressed.
  void run_window(Partial& to) {
    const int64_t begin = p_.window[b_ * p_.window_stride], end = p_.window[b_ * p_.window_stride + 1];
    std::fill(bias_.begin(), bias_.end(), 0.0f);
    std::fill(channels_.begin(), channels_.end(), 1.0f);
    for (int64_t slot = begin; slot < end; slot += kPiece) {
      const int64_t n = std::min(kPiece, end - slot);
      for (int64_t t = 0; t < n; t += kTile) {
        const int64_t count = std::min(kTile, n - t);
        const Rows tokens = read_rows(p_.window_k, slot + t, count, p_.head_dim);
        dot(q_.data(), p_.rows(), tokens, count, p_.head_dim, &scores_[t], kPiece);
      }
      cap_scores(n);
      for (int64_t r = 0; r < p_.rows(); ++r) {  // masks tokens newer than the query's own
        const int64_t visible = std::max<int64_t>(end - (p_.queries - 1 - r % p_.queries) - slot, 0);
        for (int64_t t = visible; t < n; ++t) scores_[r * kPiece + t] = -kInfinity;
      }
      weigh(n, to);
      std::fill(sums_.begin(), sums_.end(), 0.0f);
      for (int64_t t = 0; t < n; t += kTile) {
        const int64_t count = std::min(kTile, n - t);
        const Rows tokens = read_rows(p_.window_v, slot + t, count, p_.value_dim);
        accumulate(&scores_[t], kPiece, p_.rows(), tokens, count, p_.value_dim, sums_.data());
      }
      add_sums(to);
    }
  }

  Rows read_rows(const Tokens& from, int64_t slot, int64_t count, int64_t head_dim) {
    for (int64_t t = 0; t < count; ++t) widen(from.at(b_, h_, slot + t), from.dtype, &tokens_[t * head_dim], head_dim);
    return {tokens_.data(), kFloats};
  }

  const Decode& p_;
  int64_t b_ = 0, h_ = 0;
  std::vector<float> q_, folded_, bias_, scores_, shifts_, tokens_, steps_, minima_, channels_, sums_;
};

// Merges the splits of one head, adds the sinks, and writes results and lse.
void merge(const Decode& p, int64_t b, int64_t h, const std::vector<Partial>& parts) {
  std::vector<float> out(p.value_dim);
  for (int64_t r = 0; r < p.rows(); ++r) {
    const int64_t head = h * p.group_size + r / p.queries, query = r % p.queries;
    float row_max = p.sinks == nullptr ? -kInfinity : p.sinks[head];
    for (const Partial& part : parts) row_max = maximum(part.row_max[r], row_max);
    std::fill(out.begin(), out.end(), 0.0f);
    float sum = p.sinks == nullptr || row_max == -kInfinity ? 0.0f : expf(p.sinks[head] - row_max);
    for (const Partial& part : parts) {
      if (part.row_max[r] == -kInfinity) continue;
      const float factor = expf(part.row_max[r] - row_max);
      sum += part.row_sum[r] * factor;
      for (int64_t d = 0; d < p.value_dim; ++d) out[d] += part.out[r * p.value_dim + d] * factor;
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < p.value_dim; ++d) out[d] *= inverse;
    narrow(out.data(), p.out.at(b, head, query), p.out.dtype, p.value_dim);
    p.lse[(b * p.heads * p.group_size + head) * p.queries + query] = sum == 0.0f ? -kInfinity : row_max + logf(sum);
  }
}

}  // namespace

void decode(const Decode& p, const ParallelFor& parallel_for) {
  const std::vector<Span> splits = spans_of(p);
  const int64_t num_splits = static_cast<int64_t>(splits.size()), heads = p.batch * p.heads;
  std::vector<float> memory(heads * num_splits * Partial::size(p));
  const auto partial = [&](int64_t head, int64_t split) {
    return Partial(p, &memory[(head * num_splits + split) * Partial::size(p)]);
  };
  int64_t slots = 0;
  for (const Segment& s : p.segments) slots += s.slots;
  const int64_t elements = heads * (slots + kPiece) * (p.head_dim + p.value_dim);
  parallel_for_elements(parallel_for, heads * num_splits, elements, [&](int64_t begin, int64_t end) {
    Worker worker(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / num_splits, split = task % num_splits;
      worker.run(head / p.heads, head % p.heads, splits[static_cast<size_t>(split)], partial(head, split));
    }
  });
  for (int64_t head = 0; head < heads; ++head) {
    std::vector<Partial> parts;
    for (int64_t split = 0; split < num_splits; ++split) parts.push_back(partial(head, split));
    merge(p, head / p.heads, head % p.heads, parts);
  }
}

}  // namespace singlepass::kv
