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

// The random bits of one tensor at one step, from element `start` of the whole tensor on.
struct RandomStream {
  uint64_t seed;
  uint32_t id, step;
  uint64_t start;
};

// At most kTile elements.
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

// Rounds elements [start, start + n) of a parameter to its dtype, from floats: stochastically if that is wanted and the
// dtype is bfloat16, else to the nearest.
inline void narrow_param(const float* from, const TensorRecord& t, int64_t start, int64_t n,
                         const StepOptions& options) {
  void* const to = at(t.param, t.param_dtype, start);
  if (!options.stochastic_rounding || t.param_dtype != DType::kBFloat16) return narrow(from, to, t.param_dtype, n);
  for (int64_t i = 0; i < n; i += kTile) {
    const RandomStream random = {options.seed, t.id, static_cast<uint32_t>(*t.step),
                                 static_cast<uint64_t>(t.offset + start + i)};
    narrow_stochastic(from + i, at(to, t.param_dtype, i), std::min(kTile, n - i), random);
  }
}

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
    if ((kAccess.writes & kParam) && p.buffered()) narrow_param(p.values, t, start, n, options);
  }
}

template <class Rule>
typename Rule::Coefficients coefficients_of(const TensorRecord& t, const typename Rule::Hyper& hyper, double lr) {
  const double step = t.step == nullptr ? 1.0 : static_cast<double>(*t.step) + 1.0;
  return Rule::coefficients(hyper, lr, step, t.scale == nullptr ? 1.0 : static_cast<double>(*t.scale));
}

// Rules with norms go through their tensors in waves of so many elements for each thread, and at least twice as many:
// few enough that the update pass finds in the caches what the norm pass read. A larger tensor is a wave of its own.
inline constexpr int64_t kWave = 1 << 18;

inline int64_t element_count(const std::vector<TensorRecord>& tensors, int64_t first, int64_t last) {
  int64_t count = 0;
  for (int64_t t = first; t < last; ++t) count += tensors[t].numel;
  return count;
}

// Some tensors that are stepped together, and their chunks.
struct Wave {
  const std::vector<TensorRecord>& tensors;
  int64_t first, last;
  std::vector<Chunk> chunks;

  Wave(const std::vector<TensorRecord>& tensors, int64_t first, int64_t last)
      : tensors(tensors), first(first), last(last), chunks(make_chunks(tensors.data(), first, last, kCpuChunk)) {}

  // Threads call body(index of a chunk, its tensor) for all chunks.
  template <class Body>
  void for_each_chunk(const ParallelFor& parallel_for, const Body& body) const {
    parallel_for_elements(parallel_for, static_cast<int64_t>(chunks.size()), element_count(tensors, first, last),
                          [&](int64_t begin, int64_t end) {
                            for (int64_t i = begin; i < end; ++i) body(i, tensors[chunks[i].tensor]);
                          });
  }
};

inline int64_t end_of_wave(const std::vector<TensorRecord>& tensors, int64_t first, int64_t threads) {
  const int64_t count = static_cast<int64_t>(tensors.size()), most = kWave * std::max<int64_t>(threads, 2);
  int64_t last = first;
  for (int64_t total = 0; last < count; ++last) {
    total += tensors[last].numel;
    if (total > most && last > first) break;
  }
  return last;
}

// Writes kNorms sums of squares for each tensor of the wave.
template <class Rule>
void norm_pass(const Wave& wave, const typename Rule::Hyper& hyper, double lr, const StepOptions& options,
               const ParallelFor& parallel_for, double* squares) {
  std::vector<double> partials(wave.chunks.size() * kNorms, 0.0);
  wave.for_each_chunk(parallel_for, [&](int64_t i, const TensorRecord& t) {
    run_chunk<Rule, kNormPass>(t, coefficients_of<Rule>(t, hyper, lr), options, wave.chunks[i].index,
                               &partials[i * kNorms]);
  });
  std::fill_n(squares, (wave.last - wave.first) * kNorms, 0.0);
  for (size_t i = 0; i < wave.chunks.size(); ++i) {
    for (int k = 0; k < kNorms; ++k)
      squares[(wave.chunks[i].tensor - wave.first) * kNorms + k] += partials[i * kNorms + k];
  }
}

// `squares` as norm_pass wrote them; null for rules without norms.
template <class Rule>
void update_pass(const Wave& wave, const typename Rule::Hyper& hyper, double lr, const StepOptions& options,
                 const ParallelFor& parallel_for, const double* squares) {
  wave.for_each_chunk(parallel_for, [&](int64_t i, const TensorRecord& t) {
    typename Rule::Coefficients c = coefficients_of<Rule>(t, hyper, lr);
    if constexpr (kHasNorms<Rule>) {
      Rule::apply_norms(hyper, c, squares + (wave.chunks[i].tensor - wave.first) * kNorms);
    }
    run_chunk<Rule, kUpdatePass>(t, c, options, wave.chunks[i].index, nullptr);
  });
}

template <class Rule>
void step(const std::vector<TensorRecord>& tensors, const typename Rule::Hyper& hyper, const StepOptions& options,
          const ParallelFor& parallel_for, const Phase& phase) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  if (options.found_inf != nullptr && *options.found_inf != 0.0f) {
    if (!phase.update_pass) std::fill_n(phase.norms, count * kNorms, 0.0);
    return;
  }
  const double lr = options.lr.device == nullptr ? options.lr.value : static_cast<double>(*options.lr.device);
  const bool in_waves = kHasNorms<Rule> && phase.norm_pass && phase.update_pass;

  for (int64_t first = 0, last = 0; first < count; first = last) {
    last = in_waves ? end_of_wave(tensors, first, parallel_for.threads()) : count;
    const Wave wave(tensors, first, last);
    double* squares = phase.norms;
    if constexpr (kHasNorms<Rule>) {
      std::vector<double> own(in_waves ? (last - first) * kNorms : 0);
      if (in_waves) squares = own.data();
      if (phase.norm_pass) norm_pass<Rule>(wave, hyper, lr, options, parallel_for, squares);
      if (phase.update_pass) update_pass<Rule>(wave, hyper, lr, options, parallel_for, squares);
    } else {
      update_pass<Rule>(wave, hyper, lr, options, parallel_for, squares);
    }
  }
  if (!phase.update_pass) return;
  for (const TensorRecord& t : tensors) {
    if (t.step != nullptr) *t.step += 1.0f;
  }
}

}  // namespace singlepass::optim
