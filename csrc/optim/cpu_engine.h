// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "common/convert.h"
#include "common/philox.h"
#include "common/sums.h"
#include "optim/step.h"
#include "optim/table.h"

// One CPU engine for every rule. Threads take chunks of tensors; a chunk whose tensors are all float32 runs the rule
// straight on memory, any other goes through float tiles that stay in the first-level cache.
namespace singlepass::optim {

inline constexpr int64_t kCpuChunk = 32768;
inline constexpr int64_t kTile = 1024;

// The random bits of one tensor at one step, from its element `start` (a multiple of 8) on.
struct RandomStream {
  uint64_t seed;
  uint32_t id, step;
  uint64_t start;
};

SINGLEPASS_TARGET_CLONES void narrow_stochastic(const float* from, void* to, int64_t n, const RandomStream& random);

template <class Rule, Pass pass, size_t... K>
SINGLEPASS_HD void run_elements(const typename Rule::Coefficients& coefficients, float factor, int64_t n, float* p,
                                const float* g, float* const* states, float* terms0, float* terms1,
                                std::index_sequence<K...>) {
  const typename Rule::Coefficients c = coefficients;
  constexpr Access kAccess = access<Rule, pass>();
  float* const s[kMaxStates] = {states[0], states[1], states[2], states[3]};
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float param = 0.0f, grad = 0.0f, state[kMaxStates] = {};
    if constexpr (kAccess.reads & kParam) param = p[i];
    if constexpr (kAccess.reads & kGrad) grad = g[i] * factor;
    (((kAccess.reads & (kState << K)) ? (void)(state[K] = s[K][i]) : (void)0), ...);
    if constexpr (pass == kNormPass) {
      float terms[kNorms];
      Rule::norm_terms(c, param, grad, state, terms);
      terms0[i] = terms[0];
      terms1[i] = terms[1];
    } else {
      Rule::update(c, param, grad, state);
    }
    if constexpr (kAccess.writes & kParam) p[i] = param;
    (((kAccess.writes & (kState << K)) ? (void)(s[K][i] = state[K]) : (void)0), ...);
  }
}

template <class Rule, Pass pass>
SINGLEPASS_TARGET_CLONES void run_elements(const typename Rule::Coefficients& c, float factor, int64_t n, float* p,
                                           const float* g, float* const* states, float* terms0, float* terms1) {
  run_elements<Rule, pass>(c, factor, n, p, g, states, terms0, terms1, std::make_index_sequence<Rule::kStates>{});
}

inline void* at(void* base, DType dtype, int64_t i) {
  return static_cast<char*>(base) + i * size_of(dtype);
}

// One tensor of a tile: its place in memory, and the floats that the rule works on.
struct TileView {
  void* memory;
  DType dtype;
  float* values;

  TileView(void* base, DType dtype, int64_t start, int64_t n, float* buffer, bool read)
      : memory(at(base, dtype, start)), dtype(dtype), values(buffer) {
    if (dtype == DType::kFloat32) {
      values = static_cast<float*>(memory);
    } else if (read) {
      widen(memory, dtype, buffer, n);
    }
  }
  bool buffered() const { return dtype != DType::kFloat32; }
};

template <class Rule, Pass pass>
void run_chunk(const TensorRecord& t, const typename Rule::Coefficients& c, const StepOptions& options, int64_t index,
               double* squares) {
  constexpr Access kAccess = access<Rule, pass>();
  const float factor = grad_factor(options.maximize, options.grad_scale);
  const int64_t begin = index * kCpuChunk;
  const int64_t end = std::min(t.numel, begin + kCpuChunk);
  constexpr bool kTerms = pass == kNormPass && !norms_of_inputs<Rule>();  // whether terms are written down first
  const int64_t tile = !kTerms && all_float32(t, Rule::kStates) ? kCpuChunk : kTile;
  alignas(64) float buffers[2 + kMaxStates][kTile];
  alignas(64) float terms[kNorms][kTerms ? kTile : 1];

  for (int64_t start = begin; start < end; start += tile) {
    const int64_t n = std::min(tile, end - start);
    TileView p(t.param, t.param_dtype, start, n, buffers[0], kAccess.reads & kParam);
    TileView g(const_cast<void*>(t.grad), t.grad_dtype, start, n, buffers[1], kAccess.reads & kGrad);
    float* states[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k) {
      states[k] =
          TileView(t.state[k], t.state_dtype[k], start, n, buffers[2 + k], kAccess.reads & (kState << k)).values;
    }
    if constexpr (pass == kUpdatePass || kTerms) {
      run_elements<Rule, pass>(c, factor, n, p.values, g.values, states, terms[0], terms[1]);
    }
    if constexpr (kTerms) {
      for (int i = 0; i < kNorms; ++i) squares[i] += sum_of_squares(terms[i], n);
    } else if constexpr (pass == kNormPass) {
      squares[0] += sum_of_squares(p.values, n);
      squares[1] += sum_of_squares(g.values, n) * factor * factor;
    }
    for (int k = 0; k < Rule::kStates; ++k) {
      if ((kAccess.writes & (kState << k)) && t.state_dtype[k] != DType::kFloat32) {
        narrow(states[k], at(t.state[k], t.state_dtype[k], start), t.state_dtype[k], n);
      }
    }
    if ((kAccess.writes & kParam) && p.buffered()) {
      if (options.stochastic_rounding && p.dtype == DType::kBFloat16) {
        const RandomStream random = {options.seed, t.id, static_cast<uint32_t>(*t.step), static_cast<uint64_t>(start)};
        narrow_stochastic(p.values, p.memory, n, random);
      } else {
        narrow(p.values, p.memory, p.dtype, n);
      }
    }
  }
}

template <class Rule>
typename Rule::Coefficients coefficients_of(const TensorRecord& t, const typename Rule::Hyper& hyper, double lr) {
  const double step = t.step == nullptr ? 1.0 : static_cast<double>(*t.step) + 1.0;
  return Rule::coefficients(hyper, lr, step, t.scale == nullptr ? 1.0 : static_cast<double>(*t.scale));
}

// Rules with norms go through their tensors in waves small enough that the update pass finds in the cache what the
// norm pass read; a larger tensor is a wave of its own.
inline constexpr int64_t kWave = 1 << 19;

inline int64_t element_count(const std::vector<TensorRecord>& tensors, int64_t first, int64_t last) {
  int64_t count = 0;
  for (int64_t t = first; t < last; ++t) count += tensors[t].numel;
  return count;
}

template <class Rule>
int64_t end_of_wave(const std::vector<TensorRecord>& tensors, int64_t first) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  if (!kHasNorms<Rule>) return count;
  int64_t last = first;
  for (int64_t total = 0; last < count; ++last) {
    total += tensors[last].numel;
    if (total > kWave && last > first) break;
  }
  return last;
}

template <class Rule>
void step(const std::vector<TensorRecord>& tensors, const typename Rule::Hyper& hyper, const StepOptions& options,
          const ParallelFor& parallel_for) {
  if (options.found_inf != nullptr && *options.found_inf != 0.0f) return;
  const double lr = options.lr.device == nullptr ? options.lr.value : static_cast<double>(*options.lr.device);
  const int64_t count = static_cast<int64_t>(tensors.size());

  for (int64_t first = 0, last = 0; first < count; first = last) {
    last = end_of_wave<Rule>(tensors, first);
    const std::vector<Chunk> chunks = make_chunks(tensors.data(), first, last, kCpuChunk);
    const int64_t n = static_cast<int64_t>(chunks.size());
    const int64_t elements = element_count(tensors, first, last);
    std::vector<double> squares;
    if constexpr (kHasNorms<Rule>) {
      std::vector<double> partials(n * kNorms, 0.0);
      parallel_for_elements(parallel_for, n, elements, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const TensorRecord& t = tensors[chunks[i].tensor];
          run_chunk<Rule, kNormPass>(t, coefficients_of<Rule>(t, hyper, lr), options, chunks[i].index,
                                     &partials[i * kNorms]);
        }
      });
      squares.assign((last - first) * kNorms, 0.0);
      for (int64_t i = 0; i < n; ++i) {
        for (int k = 0; k < kNorms; ++k) squares[(chunks[i].tensor - first) * kNorms + k] += partials[i * kNorms + k];
      }
    }
    parallel_for_elements(parallel_for, n, elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const TensorRecord& t = tensors[chunks[i].tensor];
        typename Rule::Coefficients c = coefficients_of<Rule>(t, hyper, lr);
        if constexpr (kHasNorms<Rule>) {
          Rule::apply_norms(hyper, c, &squares[(chunks[i].tensor - first) * kNorms]);
        }
        run_chunk<Rule, kUpdatePass>(t, c, options, chunks[i].index, nullptr);
      }
    });
  }
  for (const TensorRecord& t : tensors) {
    if (t.step != nullptr) *t.step += 1.0f;
  }
}

}  // namespace singlepass::optim
