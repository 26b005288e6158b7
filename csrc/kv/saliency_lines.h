// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cuda.h"
#include "kv/problem.h"

// Lines of the two operands of saliency's products: rows, which are the probes of all query heads that share a head of
// keys, one query head after another, and that head's keys. Each line has a bound, and a row sees a key if the sum of
// their bounds is positive: a row's is how many tokens come before its end, a key's minus its place.
namespace singlepass::kv {

inline constexpr float kInfinity = INFINITY, kLog2E = 1.44269504f;

// Lines that go by a thread block.
struct Spans {
  int count, lines;  // lines of each
};

struct DeviceSaliency : Saliency {
  int next_heads, next_probes;  // query heads and probes between a thread's row of a tile and that of the next
  uint32_t flip;                // what makes kept numbers negative, where the scale is
  float before_cap;             // what products are multiplied by for their tangents, where there is a softcap
  float factor;                 // and they, or their tangents, for logits to the base of 2: not negative
  float lse_factor;             // of lse, the same
  int64_t rows;                 // of a head
  Spans key_spans, row_spans;
  float2* row_partials;   // (batch, heads, rows, spans of keys): a logit, and the sum of 2^(logits - it)
  float* token_partials;  // (batch, heads, tokens, spans of rows), unless there is one span
  float* made_lse;        // (batch, heads, rows), to the base of 2, where lse is not given
  unsigned* tickets;      // of tiles of kept lines
};

__device__ __forceinline__ bool is_token(const DeviceSaliency& p, int b, int64_t t) {
  return p.mask == nullptr || p.mask[b * p.mask_stride + t];
}

// Each number is a sum of kParts 16-bit parts: each part is what the parts before it leave, rounded. Three bfloat16
// parts hold a float32 exactly; a 16-bit number needs one part. kSize: bytes of a channel; kLines: lines of a tile.
template <int kParts>
inline constexpr int kSize = kParts == 1 ? 2 : 4;
template <int kParts>
inline constexpr int kLines = kParts == 1 ? 32 : 64;

// A row that a thread is at. What is known of it is loaded on arrival, and waited for where it is used.
template <int kParts>
class QueryLines {
 public:
  static constexpr bool kAreQueries = true;
  static constexpr int kNever = 0;  // the bound of a row that sees nothing

  __device__ __forceinline__ QueryLines(const DeviceSaliency& p, int head, int row)
      : p_(p),
        head_(head),
        b_(head / static_cast<int>(p.heads)),
        queries_(p.q.at(b_, head % p.heads * p.group_size, 0)),
        row_(row),
        query_head_(row / static_cast<int>(p.probes)),
        probe_(row % static_cast<int>(p.probes)) {
    load();
  }

  // To the same line of the next tile. The launcher has divided by the number of probes.
  __device__ __forceinline__ void go_on() {
    row_ += kLines<kParts>;
    query_head_ += p_.next_heads;
    probe_ += p_.next_probes;
    if (probe_ >= static_cast<int>(p_.probes)) probe_ -= static_cast<int>(p_.probes), ++query_head_;
    load();
  }

  __device__ __forceinline__ static int count(const DeviceSaliency& p) { return static_cast<int>(p.rows); }
  __device__ __forceinline__ int number() const { return row_; }
  __device__ __forceinline__ bool exists() const { return row_ < count(p_); }

  // A probe that is padding itself sees nothing.
  __device__ __forceinline__ int bound() const {
    return exists() && is_token(p_, b_, position_) ? position_ + 1 : kNever;
  }

  // To the base of 2; infinite for a row whose sum is empty, so that its weights are 0.
  __device__ __forceinline__ float lse() const { return lse_ == -kInfinity ? kInfinity : lse_ * p_.lse_factor; }

  __device__ __forceinline__ const char* data() const {
    return queries_ + (query_head_ * p_.q.head_stride + probe_ * p_.q.token_stride) * kSize<kParts>;
  }

 private:
  __device__ __forceinline__ void load() {
    if (!exists()) return;
    position_ = static_cast<int>(p_.positions[probe_]);
    if (p_.lse != nullptr) lse_ = p_.lse[head_ * p_.rows + row_];
  }

  const DeviceSaliency& p_;
  const int head_, b_;
  const char* const queries_;
  int row_, query_head_, probe_;
  int position_ = 0;
  float lse_ = -kInfinity;
};

// A key that a thread is at.
template <int kParts>
class KeyLines {
 public:
  static constexpr bool kAreQueries = false;
  static constexpr int kNever = -INT32_MAX;  // the bound of a key that no row sees

  __device__ __forceinline__ KeyLines(const DeviceSaliency& p, int head, int token)
      : p_(p), b_(head / static_cast<int>(p.heads)), keys_(p.k.at(b_, head % p.heads, 0)), token_(token) {}

  __device__ __forceinline__ void go_on() { token_ += kLines<kParts>; }

  __device__ __forceinline__ static int count(const DeviceSaliency& p) { return static_cast<int>(p.tokens); }
  __device__ __forceinline__ int number() const { return token_; }
  __device__ __forceinline__ bool exists() const { return token_ < count(p_); }

  __device__ __forceinline__ int bound() const { return exists() && is_token(p_, b_, token_) ? -token_ : kNever; }

  __device__ __forceinline__ const char* data() const { return keys_ + token_ * p_.k.token_stride * kSize<kParts>; }

 private:
  const DeviceSaliency& p_;
  const int b_;
  const char* const keys_;
  int token_;
};

}  // namespace singlepass::kv
