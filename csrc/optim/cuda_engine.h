// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include "common/math.h"
#include "common/philox.h"
#include "common/raw.h"
#include "common/reduce.h"
#include "optim/step.h"

// One CUDA engine for every rule. A thread block owns one chunk of one tensor. A thread takes eight elements at a
// time and starts all their loads before it converts the first.
namespace singlepass::optim {

inline constexpr int kThreads = 256;

// What stochastic rounding of a tensor draws by. It stays in shared memory, because registers are what bounds a kernel.
struct Rounding {
  uint64_t seed, stream;  // the Philox key, and the counter's high half: tensor and step
  int64_t offset;         // of the tensor's first element in the whole tensor
};

// Of a tensor that counts its steps.
__device__ __forceinline__ Rounding rounding_of(const TensorRecord& t, const StepOptions& options) {
  return {options.seed, static_cast<uint64_t>(*t.step) << 32 | t.id, t.offset};
}

// Rounds to bfloat16 at random. Element i of the whole tensor takes 16 random bits: half i % 2 of word (i % 8) / 2 of
// Philox block i / 8. A spread vector takes half of two blocks, and a neighbouring lane the other halves.
template <int kWidth>
__device__ __forceinline__ void round_stochastic(const float* values, int64_t i, const Rounding& rounding,
                                                 uint16_t* half) {
  i += rounding.offset;
  const bool is_upper = i % kVector >= kVector / 2;  // half of a block
  const int64_t drawn = kWidth > 1 && is_upper ? i + Vectors{true}.apart() : i;
  const Philox4 random = philox4x32(rounding.seed, static_cast<uint64_t>(drawn) / kVector, rounding.stream);
  uint32_t words[4] = {is_upper ? random.word[2] : random.word[0], is_upper ? random.word[3] : random.word[1]};
  if constexpr (kWidth == 1) {
    const uint32_t word = i % 4 < 2 ? words[0] : words[1];
    half[0] = float_to_bfloat16_stochastic(values[0], i % 2 == 0 ? word & 0xffffu : word >> 16);
  } else {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, is_upper ? random.word[k] : random.word[k + 2], 1);
      words[k + 2] = is_upper ? words[k] : other;
      words[k] = is_upper ? other : words[k];
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      half[k] = float_to_bfloat16_stochastic(values[k], k % 2 == 0 ? words[k / 2] & 0xffffu : words[k / 2] >> 16);
    }
  }
}

// Rounds stochastically if that is wanted and the dtype is bfloat16, else to the nearest.
template <int kWidth>
__device__ __forceinline__ Raw<kWidth> encode(const float* values, DType dtype, int64_t i, bool stochastic,
                                              const Rounding& rounding) {
  if (dtype != DType::kBFloat16 || !stochastic) return singlepass::encode<kWidth>(values, dtype);
  uint16_t half[kWidth];
  round_stochastic<kWidth>(values, i, rounding, half);
  return pack<kWidth>(half);
}

// What a thread needs to process elements of its tensor in one pass of a rule, and its sums of squares for the norms.
// kFloat32 makes every dtype a constant.
template <class Rule, Pass pass, bool kFloat32>
struct Tile {
  static constexpr Access kAccess = access<Rule, pass>();
  // Beside states, which may be float32. All lanes of a warp have a vector, or none.
  static constexpr bool kSpread = kFloat32 || kAccess.reads >= kState;
  static_assert(kSpread || kAccess.writes == 0, "only spread vectors are rounded stochastically");
  static constexpr int64_t kApart = Vectors{kSpread}.apart();
  const TensorRecord& t;
  const typename Rule::Coefficients& c;
  float factor;
  bool stochastic;
  const Rounding& rounding;
  double squares[kNorms] = {};

  __device__ __forceinline__ static DType dtype(DType stored) { return kFloat32 ? DType::kFloat32 : stored; }

  // Element i, or the vector that begins there: loads what the pass reads, runs the rule element by element in
  // registers, and stores what the pass writes. K are the states that the pass touches.
  template <int kWidth, size_t... K>
  __device__ __forceinline__ void run(int64_t i, std::index_sequence<K...> states) {
    Raw<kWidth> raw_param, raw_grad, raw_state[kMaxStates];
    if constexpr (kAccess.reads & kParam) load(t.param, dtype(t.param_dtype), i, raw_param, kApart);
    if constexpr (kAccess.reads & kGrad) load(t.grad, dtype(t.grad_dtype), i, raw_grad, kApart);
    (load(t.state[K], dtype(t.state_dtype[K]), i, raw_state[K], kApart), ...);

    float param[kWidth] = {}, grad[kWidth] = {}, state[kMaxStates][kWidth];
    if constexpr (kAccess.reads & kParam) decode(raw_param, dtype(t.param_dtype), param);
    if constexpr (kAccess.reads & kGrad) decode(raw_grad, dtype(t.grad_dtype), grad);
    (decode(raw_state[K], dtype(t.state_dtype[K]), state[K]), ...);

#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      float s[kMaxStates] = {};
      ((s[K] = state[K][k]), ...);
      if constexpr (pass == kNormPass) {
        float terms[kNorms];
        Rule::norm_terms(c, param[k], grad[k] * factor, s, terms);
        for (int n = 0; n < kNorms; ++n) squares[n] = add_product(squares[n], terms[n], terms[n]);
      } else {
        Rule::update(c, param[k], grad[k] * factor, s);
      }
      ((state[K][k] = s[K]), ...);
    }

    if constexpr (kAccess.writes & kParam) {
      store(encode<kWidth>(param, dtype(t.param_dtype), i, stochastic, rounding), dtype(t.param_dtype), t.param, i,
            kApart);
    }
    if constexpr (kAccess.writes >= kState) {
      (store(singlepass::encode<kWidth>(state[K], dtype(t.state_dtype[K])), dtype(t.state_dtype[K]), t.state[K], i,
             kApart),
       ...);
    }
  }
};

// The states that a pass touches: all of the rule's, or none. The norm pass of LARS, for one, needs no momentum.
template <class Rule, Pass pass>
using TouchedStates = std::make_index_sequence<(access<Rule, pass>().reads >= kState) ? Rule::kStates : 0>;

// Whether all tensors of the record allow vector accesses, and vectors of random numbers.
template <class Rule>
__device__ bool is_aligned(const TensorRecord& t) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad);
  for (int k = 0; k < Rule::kStates; ++k) bits |= reinterpret_cast<uintptr_t>(t.state[k]);
  return bits % 16 == 0 && t.offset % kVector == 0;
}

// The rule's coefficients. Learning rate, step and scale may stand in device memory.
template <class Rule>
__device__ typename Rule::Coefficients device_coefficients(const TensorRecord& t, const typename Rule::Hyper& hyper,
                                                           const StepOptions& options) {
  const double lr = options.lr.device == nullptr ? options.lr.value : static_cast<double>(*options.lr.device);
  const double step = t.step == nullptr ? 1.0 : static_cast<double>(*t.step) + 1.0;
  return Rule::coefficients(hyper, lr, step, t.scale == nullptr ? 1.0 : static_cast<double>(*t.scale));
}

// Writes the thread block's sums to `partials`, (chunks, kNorms). The last thread block of a tensor to get here adds
// the sums of all its chunks, in an order that does not depend on which thread block that is.
__device__ inline void reduce_norms(const DeviceTable& table, const Chunk& chunk, unsigned block, unsigned blocks,
                                    const double* squares) {
  double* partials = table.partials + static_cast<int64_t>(block) * kNorms;
  for (int n = 0; n < kNorms; ++n) {
    const double sum = block_sum(squares[n]);
    if (threadIdx.x == 0) partials[n] = sum;
  }
  if (!is_last_block(&table.tickets[chunk.tensor], blocks)) return;
  const double* first = table.partials + static_cast<int64_t>(block - chunk.index) * kNorms;
  for (int n = 0; n < kNorms; ++n) {
    const double sum = sum_partials(first + n, blocks, kNorms);
    if (threadIdx.x == 0) table.norms[chunk.tensor * kNorms + n] = sum;
  }
}

// One pass over all tensors, on a grid of one thread block for each chunk of the table.
template <class Rule, Pass pass, bool kFloat32>
__global__ void __launch_bounds__(kThreads, 2)
    step_kernel(const DeviceTable table, const typename Rule::Hyper hyper, const StepOptions options) {
  if (options.found_inf != nullptr && *options.found_inf != 0.0f) {
    if constexpr (pass == kNormPass) {  // whoever adds up shards reads them all the same
      const Chunk chunk = table.chunks[blockIdx.x];
      if (chunk.index == 0 && threadIdx.x < kNorms)
        table.norms[static_cast<int64_t>(chunk.tensor) * kNorms + threadIdx.x] = 0.0;
    }
    return;
  }
  // The update pass of a rule with norms goes backwards, because the cache holds what the norm pass touched last.
  const unsigned block = pass == kUpdatePass && kHasNorms<Rule> ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const Chunk chunk = table.chunks[block];
  const TensorRecord t = table.records[chunk.tensor];

  // Stage 1: the coefficients take double precision, so one thread computes them.
  SINGLEPASS_SHARED(typename Rule::Coefficients, shared_coefficients);
  SINGLEPASS_SHARED(Rounding, rounding);
  if (threadIdx.x == 0) {
    typename Rule::Coefficients c = device_coefficients<Rule>(t, hyper, options);
    if constexpr (pass == kUpdatePass && kHasNorms<Rule>) {
      Rule::apply_norms(hyper, c, table.norms + static_cast<int64_t>(chunk.tensor) * kNorms);
    }
    shared_coefficients = c;
    if (options.stochastic_rounding) rounding = rounding_of(t, options);
  }
  __syncthreads();
  const typename Rule::Coefficients c = shared_coefficients;

  // Stage 2: the chunk's elements. Vectors come first, if all tensors are aligned, then what is left, one by one.
  Tile<Rule, pass, kFloat32> tile = {t, c, grad_factor(options.maximize, options.grad_scale),
                                     options.stochastic_rounding, rounding};
  constexpr TouchedStates<Rule, pass> kStatesTouched = {};
  const int64_t begin = static_cast<int64_t>(chunk.index) * table.shape.chunk;
  const int64_t end = begin + table.shape.chunk < t.numel ? begin + table.shape.chunk : t.numel;
  constexpr bool kSpread = Tile<Rule, pass, kFloat32>::kSpread;
  const int64_t vectors_end = is_aligned<Rule>(t) ? end - (end - begin) % Vectors{kSpread}.unit() : begin;
  for (int64_t i = begin + Vectors{kSpread}.first(); i < vectors_end; i += blockDim.x * kVector) {
    tile.template run<kVector>(i, kStatesTouched);
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += blockDim.x) tile.template run<1>(i, kStatesTouched);

  // Stage 3: the norm pass sums squares over the tensor. In the update pass, the tensor's last thread block counts the
  // step, because no other thread block reads the count any more.
  const unsigned blocks = static_cast<unsigned>(chunk_count(t.numel, table.shape.chunk));
  if constexpr (pass == kNormPass) {
    reduce_norms(table, chunk, block, blocks, tile.squares);
  } else if (t.step != nullptr && is_last_block(&table.tickets[chunk.tensor], blocks)) {
    if (threadIdx.x == 0) *t.step += 1.0f;
  }
}

template <class Rule, Pass pass>
void launch_pass(const DeviceTable& table, const typename Rule::Hyper& hyper, const StepOptions& options,
                 const Gpu& gpu) {
  const auto kernel = table.all_float32 ? &step_kernel<Rule, pass, true> : &step_kernel<Rule, pass, false>;
  launch(kernel, dim3(static_cast<unsigned>(table.chunk_count)), dim3(table.shape.threads), 0, gpu, table, hyper,
         options);
}

template <class Rule>
void step(const DeviceTable& table, const typename Rule::Hyper& hyper, const StepOptions& options, const Gpu& gpu,
          const Phase& phase) {
  if (table.chunk_count == 0) return;
  DeviceTable placed = table;
  if (phase.norms != nullptr) placed.norms = phase.norms;
  if constexpr (kHasNorms<Rule>) {
    if (phase.norm_pass) launch_pass<Rule, kNormPass>(placed, hyper, options, gpu);
  }
  if (phase.update_pass) launch_pass<Rule, kUpdatePass>(placed, hyper, options, gpu);
}

}  // namespace singlepass::optim
