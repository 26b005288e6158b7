// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "optim/rule.h"

namespace singlepass::optim {

// One parameter with its gradient and states: dense memory in the same order, `numel` elements each.
struct TensorRecord {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  float* step;         // counts finished steps; null for rules that don't count them
  const float* scale;  // the rule's scalar of this tensor; null where Rule::kScaled is false
  int64_t numel;
  int64_t columns;  // of rows that a step may not cut; 0 where it may cut anywhere
  int64_t offset;   // of its first element in the whole tensor, of which it may be a shard: for random numbers
  uint32_t id;      // names the tensor's stream of random numbers
  DType param_dtype, grad_dtype, state_dtype[kMaxStates];
};

// A value that the caller knows, or that stands in device memory, where the host must not look.
struct Scalar {
  double value;
  const float* device;  // not null: read this instead
};

// What every rule shares. The gradient is divided by *grad_scale; a non-zero *found_inf makes the step change nothing.
struct StepOptions {
  Scalar lr;
  const float* grad_scale;
  const float* found_inf;
  uint64_t seed;
  bool maximize;
  bool stochastic_rounding;  // of bfloat16 parameters
};

// Which passes of a rule with norms a step makes. One of them alone writes or reads `norms`, kNorms sums of squares for
// each tensor on the tensors' device, so that the sums of shards can be added in between.
struct Phase {
  bool norm_pass = true, update_pass = true;
  double* norms = nullptr;
};

struct Chunk {
  int32_t tensor;
  int32_t index;  // counts the tensor's chunks
};

SINGLEPASS_HD int64_t chunk_count(int64_t numel, int64_t chunk_size) {
  // An empty tensor has one empty chunk, which counts its step.
  return numel == 0 ? 1 : (numel + chunk_size - 1) / chunk_size;
}

// Elements of the tensor's chunks: `chunk`, or the whole rows that have no more, one at least.
SINGLEPASS_HD int64_t chunk_size(const TensorRecord& t, int64_t chunk) {
  if (t.columns == 0) return chunk;
  return t.columns < chunk ? chunk / t.columns * t.columns : t.columns;
}

// The chunks of tensors [first, last).
inline std::vector<Chunk> make_chunks(const TensorRecord* tensors, int64_t first, int64_t last, int64_t chunk_size) {
  int64_t total = 0;
  for (int64_t t = first; t < last; ++t) total += chunk_count(tensors[t].numel, chunk_size);
  std::vector<Chunk> chunks;
  chunks.reserve(total);
  for (int64_t t = first; t < last; ++t) {
    const int64_t count = chunk_count(tensors[t].numel, chunk_size);
    for (int64_t i = 0; i < count; ++i) chunks.push_back({static_cast<int32_t>(t), static_cast<int32_t>(i)});
  }
  return chunks;
}

inline bool all_float32(const TensorRecord& t, int states) {
  bool all = t.param_dtype == DType::kFloat32 && t.grad_dtype == DType::kFloat32;
  for (int k = 0; k < states; ++k) all = all && t.state_dtype[k] == DType::kFloat32;
  return all;
}

// Sign, maximize and the loss scale in one factor.
SINGLEPASS_HD float grad_factor(bool maximize, const float* grad_scale) {
  const float unscale = grad_scale == nullptr ? 1.0f : 1.0f / *grad_scale;
  return maximize ? -unscale : unscale;
}

}  // namespace singlepass::optim
