// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/convert.h"
#include "common/math.h"
#include "common/vector.h"
#include "kv/cpu.h"
#include "kv/tiles.h"

// A task is a span of one head's slots. Its result is merged with those of the head's other spans, in their order.
//
// Steps and minima never meet an element. With keys k^ = n s + m per channel, q . k^ = (q s) . n + q . m; with values
// v^ = c (n s_t + m_t), sum_t p_t v^_t = c (sum_t (p_t s_t) n_t + sum_t p_t m_t). Other layouts are restored first.
namespace singlepass::kv {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPiece = 128;  // tokens of a block that are worked on together
constexpr int64_t kSpan = 2048;  // slots of a task

// Slots of a segment, or, if segment is -1, the window.
struct Span {
  int64_t segment, begin, end;
};

std::vector<Span> spans_of(const Decode& p) {
  std::vector<Span> spans;
  for (size_t s = 0; s < p.segments.size(); ++s) {
    for (int64_t begin = 0; begin < p.segments[s].slots; begin += kSpan) {
      spans.push_back({static_cast<int64_t>(s), begin, std::min(begin + kSpan, p.segments[s].slots)});
    }
  }
  spans.push_back({-1, 0, 0});
  return spans;
}

// A softmax that is not finished: sums of exp(logit - most) and of values weighted by them.
struct Partial {
  float* most;  // (rows,)
  float* sum;   // (rows,)
  float* out;   // (rows, value_width)

  static int64_t size(const Decode& p) { return p.rows() * (2 + p.value_width); }
  Partial(const Decode& p, float* memory) : most(memory), sum(most + p.rows()), out(sum + p.rows()) {}
};

void clear(const Decode& p, Partial& to) {
  std::fill(to.most, to.most + p.rows(), -kInfinity);
  std::fill(to.sum, to.sum + p.rows() * (1 + p.value_width), 0.0f);
}

// to = x * steps, which may be x itself. Returns x . minima.
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
        q_(p.rows() * p.width),
        folded_(p.rows() * p.width),
        bias_(p.rows()),
        scores_(p.rows() * kPiece),
        shifts_(p.rows()),
        tokens_(kTile * std::max(p.width, p.value_width)),
        steps_(std::max({p.width, p.value_width, kPiece})),
        minima_(std::max(p.width, kPiece)),
        channels_(p.value_width),
        sums_(p.rows() * p.value_width) {}

  void run(int64_t b, int64_t h, const Span& span, Partial to) {
    b_ = b;
    h_ = h;
    clear(p_, to);
    for (int64_t r = 0; r < p_.rows(); ++r) {  // scaled queries
      float* q = &q_[r * p_.width];
      widen(p_.q.at(b, h * p_.group + r / p_.queries, r % p_.queries), p_.q.dtype, q, p_.width);
      for (int64_t d = 0; d < p_.width; ++d) q[d] *= p_.scale;
    }
    if (span.segment < 0) {
      run_window(to);
    } else {
      run_segment(span, to);
    }
  }

 private:
  void run_segment(const Span& span, Partial& to) {
    const Segment& s = p_.segments[static_cast<size_t>(span.segment)];
    const int32_t* starts = s.blocks.starts;
    const int64_t seen = p_.first == nullptr ? 0 : p_.first[(span.segment * p_.batch + b_) * p_.heads + h_];
    int64_t block = std::upper_bound(starts, starts + s.blocks.number + 1, span.begin) - starts - 1;
    for (; block < s.blocks.number && starts[block] < span.end; ++block) {
      const int64_t end = std::min<int64_t>(span.end, starts[block] + s.blocks.count(b_, block));
      for (int64_t slot = std::max({span.begin, static_cast<int64_t>(starts[block]), seen}); slot < end;) {
        const int64_t n = std::min(kPiece, end - slot);
        piece(s, block, slot, n, to);
        slot += n;
      }
    }
  }

  // n compressed tokens of one block.
  void piece(const Segment& s, int64_t block, int64_t slot, int64_t n, Partial& to) {
    const bool by_channels = s.keys.axis == Axis::kChannel;
    if (by_channels) {
      fold_queries(s.keys.scales_at(b_, h_, slot, block));
      dot(folded_.data(), p_.rows(), {s.keys.codes_at(b_, h_, slot), s.keys.bits}, n, p_.width, scores_.data(), kPiece);
    } else {
      for (int64_t t = 0; t < n; t += kTile) {
        const Rows rows = restored(s.keys, slot + t, std::min(kTile, n - t), p_.width);
        dot(q_.data(), p_.rows(), rows, std::min(kTile, n - t), p_.width, &scores_[t], kPiece);
      }
    }
    for (int64_t r = 0; by_channels && r < p_.rows(); ++r) {
      for (int64_t t = 0; t < n; ++t) scores_[r * kPiece + t] += bias_[r];
    }
    cap_scores(n);
    weigh(n, to);
    weighted_values(s.values, block, slot, n, to);
  }

  void fold_queries(const uint16_t* scales) {
    widen(scales, DType::kFloat16, steps_.data(), p_.width);
    widen(scales + p_.width, DType::kFloat16, minima_.data(), p_.width);
    for (int64_t r = 0; r < p_.rows(); ++r) {
      bias_[r] = fold(&q_[r * p_.width], steps_.data(), minima_.data(), p_.width, &folded_[r * p_.width]);
    }
  }

  // Tokens whose steps differ within a row.
  Rows restored(const Packed& packed, int64_t slot, int64_t count, int64_t width) {
    unpack(packed.codes_at(b_, h_, slot), packed.bits, count, width, tokens_.data());
    for (int64_t t = 0; t < count; ++t) {
      restore(packed.scales_at(b_, h_, slot + t, 0), packed.groups, width, &tokens_[t * width]);
    }
    return {tokens_.data(), kFloats};
  }

  void cap_scores(int64_t n) {
    for (int64_t r = 0; p_.softcap > 0.0f && r < p_.rows(); ++r) cap(&scores_[r * kPiece], n, p_.softcap);
  }

  // Turns the scores of n tokens into weights relative to the largest logit yet, and scales the sums by the change.
  void weigh(int64_t n, Partial& to) {
    for (int64_t r = 0; r < p_.rows(); ++r) {
      float* scores = &scores_[r * kPiece];
      const float most = maximum(to.most[r], largest(scores, n));
      shifts_[r] = most == to.most[r] ? 1.0f : expf(to.most[r] - most);
      if (most == -kInfinity) {
        std::fill(scores, scores + n, 0.0f);
      } else {
        to.sum[r] = to.sum[r] * shifts_[r] + exponentials(scores, n, most);
      }
      to.most[r] = most;
    }
  }

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
      accumulate(scores_.data(), kPiece, p_.rows(), rows, n, p_.value_width, sums_.data());
    } else {
      for (int64_t t = 0; t < n; t += kTile) {
        const Rows rows = restored(values, slot + t, std::min(kTile, n - t), p_.value_width);
        accumulate(&scores_[t], kPiece, p_.rows(), rows, std::min(kTile, n - t), p_.value_width, sums_.data());
      }
    }
    if (values.channels.data != nullptr) {
      widen(values.channels_at(b_, h_, block), DType::kFloat16, channels_.data(), p_.value_width);
    } else {
      std::fill(channels_.begin(), channels_.end(), 1.0f);
    }
    add_sums(to);
  }

  void add_sums(Partial& to) {
    for (int64_t r = 0; r < p_.rows(); ++r) {
      const int64_t row = r * p_.value_width;
      add_piece(to.out + row, shifts_[r], channels_.data(), &sums_[row], bias_[r], p_.value_width);
    }
  }

  void run_window(Partial& to) {
    const int64_t begin = p_.window[b_ * p_.window_stride], end = p_.window[b_ * p_.window_stride + 1];
    std::fill(bias_.begin(), bias_.end(), 0.0f);
    std::fill(channels_.begin(), channels_.end(), 1.0f);
    for (int64_t slot = begin; slot < end; slot += kPiece) {
      const int64_t n = std::min(kPiece, end - slot);
      for (int64_t t = 0; t < n; t += kTile) {
        const int64_t count = std::min(kTile, n - t);
        const Rows tokens = read_rows(p_.window_k, slot + t, count, p_.width);
        dot(q_.data(), p_.rows(), tokens, count, p_.width, &scores_[t], kPiece);
      }
      cap_scores(n);
      for (int64_t r = 0; r < p_.rows(); ++r) {  // what is newer than the query's own token
        const int64_t visible = std::max<int64_t>(end - (p_.queries - 1 - r % p_.queries) - slot, 0);
        for (int64_t t = visible; t < n; ++t) scores_[r * kPiece + t] = -kInfinity;
      }
      weigh(n, to);
      std::fill(sums_.begin(), sums_.end(), 0.0f);
      for (int64_t t = 0; t < n; t += kTile) {
        const int64_t count = std::min(kTile, n - t);
        const Rows tokens = read_rows(p_.window_v, slot + t, count, p_.value_width);
        accumulate(&scores_[t], kPiece, p_.rows(), tokens, count, p_.value_width, sums_.data());
      }
      add_sums(to);
    }
  }

  Rows read_rows(const Tokens& from, int64_t slot, int64_t count, int64_t width) {
    for (int64_t t = 0; t < count; ++t) widen(from.at(b_, h_, slot + t), from.dtype, &tokens_[t * width], width);
    return {tokens_.data(), kFloats};
  }

  const Decode& p_;
  int64_t b_ = 0, h_ = 0;
  std::vector<float> q_, folded_, bias_, scores_, shifts_, tokens_, steps_, minima_, channels_, sums_;
};

// One head's spans to its results.
void merge(const Decode& p, int64_t b, int64_t h, const std::vector<Partial>& parts) {
  std::vector<float> out(p.value_width);
  for (int64_t r = 0; r < p.rows(); ++r) {
    const int64_t head = h * p.group + r / p.queries, query = r % p.queries;
    float most = p.sinks == nullptr ? -kInfinity : p.sinks[head];
    for (const Partial& part : parts) most = maximum(part.most[r], most);
    std::fill(out.begin(), out.end(), 0.0f);
    float sum = p.sinks == nullptr || most == -kInfinity ? 0.0f : expf(p.sinks[head] - most);
    for (const Partial& part : parts) {
      if (part.most[r] == -kInfinity) continue;
      const float factor = expf(part.most[r] - most);
      sum += part.sum[r] * factor;
      for (int64_t d = 0; d < p.value_width; ++d) out[d] += part.out[r * p.value_width + d] * factor;
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < p.value_width; ++d) out[d] *= inverse;
    narrow(out.data(), p.out.at(b, head, query), p.out.dtype, p.value_width);
    p.lse[(b * p.heads * p.group + head) * p.queries + query] = sum == 0.0f ? -kInfinity : most + logf(sum);
  }
}

}  // namespace

void decode_cpu(const Decode& p, const ParallelFor& parallel_for) {
  const std::vector<Span> spans = spans_of(p);
  const int64_t number = static_cast<int64_t>(spans.size()), heads = p.batch * p.heads;
  std::vector<float> memory(heads * number * Partial::size(p));
  const auto partial = [&](int64_t head, int64_t span) {
    return Partial(p, &memory[(head * number + span) * Partial::size(p)]);
  };
  int64_t slots = 0;
  for (const Segment& s : p.segments) slots += s.slots;
  const int64_t elements = heads * (slots + kPiece) * (p.width + p.value_width);
  parallel_for_elements(parallel_for, heads * number, elements, [&](int64_t begin, int64_t end) {
    Worker worker(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / number, span = task % number;
      worker.run(head / p.heads, head % p.heads, spans[static_cast<size_t>(span)], partial(head, span));
    }
  });
  for (int64_t head = 0; head < heads; ++head) {
    std::vector<Partial> parts;
    for (int64_t span = 0; span < number; ++span) parts.push_back(partial(head, span));
    merge(p, head / p.heads, head % p.heads, parts);
  }
}

}  // namespace singlepass::kv
