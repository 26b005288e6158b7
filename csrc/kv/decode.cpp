// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "common/convert.h"
#include "common/math.h"
#include "common/prefetch.h"
#include "common/vector.h"
#include "kv/integer_tiles.h"
#include "kv/problem.h"
#include "kv/tiles.h"
#include "kv/token_tiles.h"

// Decode attention on the CPU. A task is one split of one head: an online softmax of all rows (queries of the query
// heads that share the head of keys) over the split's slots. Then the splits of each head are merged in their order.
//
// Scales (steps s and minima m) are applied to rows of queries and of weights, not to elements:
//
//   keys k^ = n s + m with scales per channel:   q . k^ = (q s) . n + q . m
//   keys k^ = s_t n + m_t with scales per token: q . k^ = s_t (q . n) + m_t sum(q)
//   values v^ = c (n s_t + m_t):                 sum_t p_t v^_t = c (sum_t (p_t s_t) n_t + sum_t p_t m_t)
//
// Where queries have 16 bits, q s and p s are rounded to integers for each block of tokens (kv/integers.h), and the
// codes n multiplied as integers; where they are float32, as floats, which a few tokens become at a time. Tokens with
// several groups of channels are restored first. Those of the window are read as they are stored.
namespace singlepass::kv {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPiece = 128;  // tokens of a block that share one step of the online softmax
constexpr int64_t kStep = 16;    // tokens whose keys are multiplied while as many of the next piece come
// A sequence is cut in about so many splits, for threads to share, whose slots are within these bounds. The number of
// threads does not matter, nor other sequences, so that the sums are the same whatever these are.
constexpr int64_t kSplits = 16, kFewestSlots = 256, kMostSlots = 2048;

// Slots of a segment, or, if segment is -1, of the window.
struct Span {
  int64_t segment, begin, end;
};

std::vector<Span> spans_of(const Decode& p) {
  int64_t slots = p.window_slots;
  for (const Segment& s : p.segments) slots += s.slots;
  const int64_t pieces = (slots + kSplits * kPiece - 1) / (kSplits * kPiece);
  const int64_t size = std::clamp(pieces * kPiece, kFewestSlots, kMostSlots);
  std::vector<Span> splits;
  const auto cut = [&](int64_t segment, int64_t its) {
    for (int64_t begin = 0; begin < its; begin += size) splits.push_back({segment, begin, std::min(begin + size, its)});
  };
  for (size_t s = 0; s < p.segments.size(); ++s) cut(static_cast<int64_t>(s), p.segments[s].slots);
  cut(-1, p.window_slots);
  if (splits.empty()) splits.push_back({-1, 0, 0});  // results are written all the same
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

// What codes are multiplied by: rows x * steps as floats or, with a step of their own, as integers; and x . minima.
struct Factors {
  int64_t rows, stride;  // stride: between rows, of x as well
  std::vector<float> floats;
  std::vector<int16_t> integers;
  std::vector<Folded> folded;

  Factors(int64_t rows, int64_t stride, bool as_integers)
      : rows(rows),
        stride(stride),
        floats(rows * stride),
        integers(as_integers ? rows * stride + kIntegerPad : 0),
        folded(rows) {}

  void fold(const float* x, const float* steps, const float* minima, int64_t n, float largest) {
    if (!integers.empty()) {
      return fold_to_integers(x, steps, minima, n, rows, stride, largest, floats.data(), integers.data(),
                              folded.data());
    }
    for (int64_t r = 0; r < rows; ++r) {
      folded[r] = {1.0f, kv::fold(x + r * stride, steps, minima, n, &floats[r * stride])};
    }
  }
};

class Worker {
 public:
  explicit Worker(const Decode& p)
      : p_(p),
        as_integers_(p.q.dtype != DType::kFloat32),
        q_(p.rows() * p.head_dim),
        scores_(p.rows() * kPiece),
        shifts_(p.rows()),
        tokens_(kTile * std::max(p.head_dim, p.value_dim)),
        steps_(std::max(p.head_dim, kPiece)),
        minima_(std::max(p.head_dim, kPiece)),
        channels_(p.value_dim),
        sums_(p.rows() * p.value_dim),
        queries_(p.rows(), p.head_dim, as_integers_),
        weights_(p.rows(), kPiece, as_integers_),
        integer_sums_(as_integers_ ? p.rows() * std::max(kPiece, p.value_dim) : 0) {}

  void run(int64_t b, int64_t h, const Span& split, Partial to) {
    clear(p_, to);
    if (b != b_ || h != h_) read_queries(b, h);
    if (split.segment < 0) {
      if (p_.added.k.data != nullptr) store_added(split);
      run_window(split, to);
    } else {
      run_segment(split, to);
    }
  }

 private:
  // Those of a head, as floats and scaled.
  void read_queries(int64_t b, int64_t h) {
    b_ = b;
    h_ = h;
    for (int64_t r = 0; r < p_.rows(); ++r) {
      float* q = &q_[r * p_.head_dim];
      widen(p_.q.at(b, h * p_.group_size + r / p_.queries, r % p_.queries), p_.q.dtype, q, p_.head_dim);
      for (int64_t d = 0; d < p_.head_dim; ++d) q[d] *= p_.scale;
    }
  }

  // Goes through the blocks of tokens that the split meets, piece by piece.
  void run_segment(const Span& split, Partial& to) {
    const Segment& s = p_.segments[static_cast<size_t>(split.segment)];
    const int32_t* starts = s.blocks.starts;
    const int64_t seen = p_.first == nullptr ? 0 : p_.first[(split.segment * p_.batch + b_) * p_.heads + h_];
    if (per_token(s.keys)) fold_queries(s.keys, nullptr);
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

  // Whether one step belongs to all channels of a token.
  static bool per_token(const Packed& packed) { return packed.axis == Axis::kToken && packed.groups == 1; }

  // One step of the online softmax: n compressed tokens of one block. Scores are (rows, kPiece).
  void piece(const Segment& s, int64_t block, int64_t slot, int64_t n, Partial& to) {
    if (s.keys.axis == Axis::kChannel) {
      fold_queries(s.keys, s.keys.scales_at(b_, h_, slot, block));
      multiply_keys(s, slot, n);
    } else if (per_token(s.keys)) {
      multiply_keys(s, slot, n);
      read_steps(s.keys, slot, n);
      for (int64_t r = 0; r < p_.rows(); ++r) {
        apply_steps(&scores_[r * kPiece], steps_.data(), minima_.data(), queries_.folded[r].bias, n);
      }
    } else {
      for (int64_t t = 0; t < n; t += kTile) {
        const int64_t count = std::min(kTile, n - t);
        const TokenRows tokens = restored(s.keys, slot + t, count);
        dot(q_.data(), p_.rows(), tokens, count, p_.head_dim, &scores_[t], kPiece);
      }
    }
    cap_scores(n);
    weigh(scores_.data(), p_.rows(), n, kPiece, to.row_max, to.row_sum, shifts_.data());
    weighted_values(s.values, block, slot, n, to);
  }

  // Steps, minima or factors as floats. Asks for those a page further on.
  static void read_scales(const uint16_t* from, int64_t n, float* to) {
    prefetch_ahead(from, n * static_cast<int64_t>(sizeof(uint16_t)));
    widen(from, DType::kFloat16, to, n);
  }

  // The codes of some tokens. Asks for as many of the next piece: little by little, since processors wait where too
  // much is asked for.
  Rows read_codes(const Packed& from, int64_t slot, int64_t count) const {
    prefetch(reinterpret_cast<uintptr_t>(from.codes_at(b_, h_, slot + kPiece)), count * from.bytes());
    return {from.codes_at(b_, h_, slot), from.bits};
  }

  // q s and q . m, with the scales of a block's channels; without them, s = m = 1.
  void fold_queries(const Packed& keys, const uint16_t* scales) {
    if (scales == nullptr) {
      std::fill(steps_.begin(), steps_.end(), 1.0f);
      std::fill(minima_.begin(), minima_.end(), 1.0f);
    } else {
      read_scales(scales, p_.head_dim, steps_.data());
      read_scales(scales + p_.head_dim, p_.head_dim, minima_.data());
    }
    const float largest = largest_integer(keys.bits, p_.head_dim);
    queries_.fold(q_.data(), steps_.data(), minima_.data(), p_.head_dim, largest);
  }

  // scores_ = (q s) . n of n tokens, and q . m added where that is the same for all of them.
  void multiply_keys(const Segment& s, int64_t slot, int64_t n) {
    const Packed& keys = s.keys;
    for (int64_t t = 0; t < n; t += kStep) {
      const int64_t count = std::min(kStep, n - t);
      if (as_integers_) {
        const Rows codes = read_codes(keys, slot + t, count);
        dot(queries_.integers.data(), p_.rows(), codes, count, p_.head_dim, &integer_sums_[t], kPiece);
      } else {
        const TokenRows codes = unpacked(keys, slot + t, count);
        dot(queries_.floats.data(), p_.rows(), codes, count, p_.head_dim, &scores_[t], kPiece);
      }
    }
    for (int64_t r = 0; r < p_.rows(); ++r) {
      const float bias = keys.axis == Axis::kChannel ? queries_.folded[r].bias : 0.0f;
      float* scores = &scores_[r * kPiece];
      if (as_integers_) {
        from_integers(&integer_sums_[r * kPiece], n, queries_.folded[r].step, bias, scores);
      } else {
        for (int64_t t = 0; t < n; ++t) scores[t] += bias;
      }
    }
  }

  // The steps and minima of n tokens.
  void read_steps(const Packed& packed, int64_t slot, int64_t n) {
    float pairs[2 * kPiece];
    read_scales(packed.scales_at(b_, h_, slot, 0), 2 * n, pairs);
    separate(pairs, n, steps_.data(), minima_.data());
  }

  // Codes of up to kTile tokens as floats.
  TokenRows unpacked(const Packed& packed, int64_t slot, int64_t count) {
    unpack(read_codes(packed, slot, count).codes, packed.bits, count, packed.head_dim, tokens_.data());
    return {tokens_.data(), DType::kFloat32, packed.head_dim};
  }

  // Up to kTile tokens with scales per token.
  TokenRows restored(const Packed& packed, int64_t slot, int64_t count) {
    const TokenRows tokens = unpacked(packed, slot, count);
    for (int64_t t = 0; t < count; ++t) {
      restore(packed.scales_at(b_, h_, slot + t, 0), packed.groups, packed.head_dim, &tokens_[t * packed.head_dim]);
    }
    return tokens;
  }

  void cap_scores(int64_t n) {
    for (int64_t r = 0; p_.softcap > 0.0f && r < p_.rows(); ++r) cap(&scores_[r * kPiece], n, p_.softcap);
  }

  // Adds the weighted values of n tokens to the result. Scales that belong to whole tokens go into the weights (p s)
  // and the bias (p . m).
  void weighted_values(const Packed& values, int64_t block, int64_t slot, int64_t n, Partial& to) {
    if (values.channels.data != nullptr) {
      read_scales(values.channels_at(b_, h_, block), p_.value_dim, channels_.data());
    } else {
      std::fill(channels_.begin(), channels_.end(), 1.0f);
    }
    if (!per_token(values)) {
      std::fill(sums_.begin(), sums_.end(), 0.0f);
      for (int64_t t = 0; t < n; t += kTile) {
        const int64_t count = std::min(kTile, n - t);
        const TokenRows tokens = restored(values, slot + t, count);
        accumulate(&scores_[t], kPiece, p_.rows(), tokens, count, p_.value_dim, sums_.data());
      }
      return add_sums(to);
    }
    read_steps(values, slot, n);
    const float largest = largest_integer(values.bits, kPiece);
    weights_.fold(scores_.data(), steps_.data(), minima_.data(), n, largest);
    if (!as_integers_) {
      std::fill(sums_.begin(), sums_.end(), 0.0f);
      for (int64_t t = 0; t < n; t += kTile) {
        const int64_t count = std::min(kTile, n - t);
        const TokenRows codes = unpacked(values, slot + t, count);
        accumulate(&weights_.floats[t], kPiece, p_.rows(), codes, count, p_.value_dim, sums_.data());
      }
      return add_sums(to, weights_.folded.data());
    }
    std::fill_n(integer_sums_.begin(), p_.rows() * p_.value_dim, 0);
    for (int64_t t = 0; t < n; t += kTile) {
      const int64_t count = std::min(kTile, n - t);
      const Rows codes = read_codes(values, slot + t, count);
      accumulate(&weights_.integers[t], kPiece, p_.rows(), codes, count, p_.value_dim, integer_sums_.data());
    }
    for (int64_t r = 0; r < p_.rows(); ++r) {
      const int64_t row = r * p_.value_dim;
      add_integers(&integer_sums_[row], p_.value_dim, weights_.folded[r].step, weights_.folded[r].bias,
                   channels_.data(), shifts_[r], to.out + row);
    }
  }

  // out = out * shift + c (sums + bias) for all rows.
  void add_sums(Partial& to, const Folded* folded = nullptr) {
    for (int64_t r = 0; r < p_.rows(); ++r) {
      const int64_t row = r * p_.value_dim;
      add_piece(to.out + row, shifts_[r], channels_.data(), &sums_[row], folded == nullptr ? 0.0f : folded[r].bias,
                p_.value_dim);
    }
  }

  // Writes the new tokens whose slots the split has.
  void store_added(const Span& split) {
    const int64_t first = p_.window[b_ * p_.window_stride + 1] - p_.queries;
    const int64_t begin = std::max(first, split.begin), end = std::min(first + p_.queries, split.end);
    for (int64_t slot = begin; slot < end; ++slot) {
      copy(p_.added.k, slot - first, p_.window_k, slot, p_.head_dim);
      copy(p_.added.v, slot - first, p_.window_v, slot, p_.value_dim);
    }
  }

  // A token of the head.
  void copy(const Tokens& from, int64_t token, const Tokens& to, int64_t slot, int64_t channels) const {
    std::memcpy(to.at(b_, h_, slot), from.at(b_, h_, token), channels * size_of(to.dtype));
  }

  // Attends to slots of the window, whose tokens are not compressed.
  void run_window(const Span& split, Partial& to) {
    const int64_t begin = p_.window[b_ * p_.window_stride], newest = p_.window[b_ * p_.window_stride + 1];
    const int64_t end = std::min(newest, split.end);
    std::fill(channels_.begin(), channels_.end(), 1.0f);
    for (int64_t slot = std::max(begin, split.begin); slot < end; slot += kPiece) {
      const int64_t n = std::min(kPiece, end - slot);
      for (int64_t t = 0; t < n; t += kStep) {
        const int64_t count = std::min(kStep, n - t);
        const TokenRows tokens = read_tokens(p_.window_k, slot + t, count, p_.head_dim);
        dot(q_.data(), p_.rows(), tokens, count, p_.head_dim, &scores_[t], kPiece);
      }
      cap_scores(n);
      for (int64_t r = 0; r < p_.rows(); ++r) {  // masks tokens newer than the query's own
        const int64_t visible = std::max<int64_t>(newest - (p_.queries - 1 - r % p_.queries) - slot, 0);
        for (int64_t t = visible; t < n; ++t) scores_[r * kPiece + t] = -kInfinity;
      }
      weigh(scores_.data(), p_.rows(), n, kPiece, to.row_max, to.row_sum, shifts_.data());
      std::fill(sums_.begin(), sums_.end(), 0.0f);
      for (int64_t t = 0; t < n; t += kStep) {
        const int64_t count = std::min(kStep, n - t);
        const TokenRows tokens = read_tokens(p_.window_v, slot + t, count, p_.value_dim);
        accumulate(&scores_[t], kPiece, p_.rows(), tokens, count, p_.value_dim, sums_.data());
      }
      add_sums(to);
    }
  }

  // Tokens of the window. Asks for as many of the next piece.
  TokenRows read_tokens(const Tokens& from, int64_t slot, int64_t count, int64_t head_dim) const {
    for (int64_t t = slot + kPiece; t < slot + kPiece + count; ++t) {
      prefetch(reinterpret_cast<uintptr_t>(from.at(b_, h_, t)), head_dim * size_of(from.dtype));
    }
    return {from.at(b_, h_, slot), from.dtype, from.token_stride};
  }

  const Decode& p_;
  const bool as_integers_;
  int64_t b_ = -1, h_ = -1;  // whose queries are in q_
  std::vector<float> q_, scores_, shifts_, tokens_, steps_, minima_, channels_, sums_;
  Factors queries_, weights_;
  std::vector<int32_t> integer_sums_;  // (rows, kPiece or value_dim)
};

// Merges the splits of one head, adds the sinks, and writes results and lse, and the copy of the queries.
template <class Part>
void merge(const Decode& p, int64_t b, int64_t h, int64_t splits, const Part& part_of) {
  std::vector<float> out(p.value_dim);
  for (int64_t r = 0; r < p.rows(); ++r) {
    const int64_t head = h * p.group_size + r / p.queries, query = r % p.queries;
    float row_max = p.sinks == nullptr ? -kInfinity : p.sinks[head];
    for (int64_t split = 0; split < splits; ++split) row_max = maximum(part_of(split).row_max[r], row_max);
    std::fill(out.begin(), out.end(), 0.0f);
    float sum = p.sinks == nullptr || row_max == -kInfinity ? 0.0f : expf(p.sinks[head] - row_max);
    for (int64_t split = 0; split < splits; ++split) {
      const Partial part = part_of(split);
      if (part.row_max[r] == -kInfinity) continue;
      const float factor = expf(part.row_max[r] - row_max);
      sum += part.row_sum[r] * factor;
      for (int64_t d = 0; d < p.value_dim; ++d) out[d] += part.out[r * p.value_dim + d] * factor;
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < p.value_dim; ++d) out[d] *= inverse;
    narrow(out.data(), p.out.at(b, head, query), p.out.dtype, p.value_dim);
    if (p.added.kept.data != nullptr) {
      std::memcpy(p.added.kept.at(b, head, query), p.q.at(b, head, query), p.head_dim * size_of(p.q.dtype));
    }
    p.lse[(b * p.heads * p.group_size + head) * p.queries + query] = sum == 0.0f ? -kInfinity : row_max + logf(sum);
  }
}

}  // namespace

void decode(const Decode& p, const ParallelFor& parallel_for) {
  const std::vector<Span> splits = spans_of(p);
  const int64_t num_splits = static_cast<int64_t>(splits.size()), heads = p.batch * p.heads;
  const auto memory = std::make_unique_for_overwrite<float[]>(heads * num_splits * Partial::size(p));
  const auto partial = [&](int64_t head, int64_t split) {
    return Partial(p, &memory[(head * num_splits + split) * Partial::size(p)]);
  };
  std::vector<std::atomic<int64_t>> open(heads);  // splits of a head that are not done
  for (std::atomic<int64_t>& left : open) left.store(num_splits, std::memory_order_relaxed);
  int64_t slots = kPiece;  // what a call costs besides, as slots
  for (const Span& split : splits) slots += split.end - split.begin;
  const int64_t elements = heads * slots * (p.head_dim + p.value_dim);
  parallel_for_elements(parallel_for, heads * num_splits, elements, [&](int64_t begin, int64_t end) {
    Worker worker(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / num_splits, split = task % num_splits;
      worker.run(head / p.heads, head % p.heads, splits[static_cast<size_t>(split)], partial(head, split));
      if (open[head].fetch_sub(1) == 1) {  // the last of its head
        merge(p, head / p.heads, head % p.heads, num_splits, [&](int64_t its) { return partial(head, its); });
      }
    }
  });
}

}  // namespace singlepass::kv
