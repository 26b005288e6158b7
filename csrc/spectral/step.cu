// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "optim/cuda_engine.h"
#include "spectral/step.h"

// AdamW with a constraint. A thread block owns a chunk: whole rows, which become unit vectors, or singular values. It
// updates a row, holds the new elements in shared memory in float32, adds up their squares, and writes the elements
// divided by their norm. Each thread owns the same elements of a row from beginning to end, so barriers are only needed
// around sums, and between rows, which may be divided among threads differently (as vectors, or element by element).
namespace singlepass::spectral {
namespace {

using optim::TensorRecord;

constexpr bool kSpread = true;  // vectors stand beside states, which may be float32

struct LaunchOptions {
  StepOptions step;
  int held;  // elements of a row that shared memory has room for: all, or a multiple of Vectors::unit()
};

// One row, or a chunk of singular values: all elements of `t`, which begins with element `first` of its tensor.
template <bool kFloat32, bool kStochastic>
class Span {
 public:
  __device__ __forceinline__ Span(const TensorRecord& t, int64_t first, const Rule::Coefficients& c, float factor,
                                  int held, const optim::Rounding& rounding)
      : t_(t), first_(first), c_(c), factor_(factor), held_(held), rounding_(rounding) {
    const bool has_vectors = optim::is_aligned<Rule>(t) && (!kStochastic || first % kVector == 0);
    vectors_end_ = has_vectors ? t.numel - t.numel % Vectors{kSpread}.unit() : 0;
  }

  // Projects the gradient: from here on, update() subtracts its part along the row, (g . p) p.
  __device__ __forceinline__ void project() {
    double sum = 0.0;
    for_each([&]<int kWidth>(int64_t i) {
      Raw<kWidth> raw_p, raw_g;
      load(t_.param, dtype(t_.param_dtype), i, raw_p, kApart);
      load(t_.grad, dtype(t_.grad_dtype), i, raw_g, kApart);
      float p[kWidth], g[kWidth];
      decode(raw_p, dtype(t_.param_dtype), p);
      decode(raw_g, dtype(t_.grad_dtype), g);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum = add_product(sum, g[k] * factor_, p[k]);
    });
    along_ = static_cast<float>(shared_sum(sum));
    projects_ = true;
  }

  // Updates a row and divides it by its norm.
  __device__ __forceinline__ void make_unit() {
    __syncthreads();  // all threads have read the previous row from shared memory
    // Stage 1: new elements and their squares. Elements beyond held_ are not kept, and their states are not written
    // yet, so that stage 2 can update them again.
    double squares = 0.0;
    for_each([&]<int kWidth>(int64_t i) {
      Element<kWidth> e;
      update(i, e);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) squares = add_product(squares, e.p[k], e.p[k]);
      if (i >= held_) return;
      write_states(i, e);
      hold(i, e);
    });
    // Stage 2: elements divided by the norm.
    const float factor = inverse_norm(shared_sum(squares));
    for_each([&]<int kWidth>(int64_t i) {
      Element<kWidth> e;
      if (i < held_) {
        give_back(i, e);
      } else {
        update(i, e);
        write_states(i, e);
      }
#pragma unroll
      for (int k = 0; k < kWidth; ++k) e.p[k] *= factor;
      write_param(i, e);
    });
  }

  // Updates singular values; those below zero become zero.
  __device__ __forceinline__ void make_not_negative() {
    for_each([&]<int kWidth>(int64_t i) {
      Element<kWidth> e;
      update(i, e);
      write_states(i, e);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) e.p[k] = not_negative(e.p[k]);
      write_param(i, e);
    });
  }

 private:
  static constexpr int64_t kApart = Vectors{kSpread}.apart();

  // The elements of a vector, or one.
  template <int kWidth>
  struct Element {
    float p[kWidth], states[Rule::kStates][kWidth];
  };

  __device__ __forceinline__ static DType dtype(DType stored) { return kFloat32 ? DType::kFloat32 : stored; }

  // Parameter and gradient of 16 bits, beside states of 32.
  __device__ __forceinline__ bool is_mixed() const {
    return size_of(t_.param_dtype) == 2 && size_of(t_.grad_dtype) == 2 && size_of(t_.state_dtype[0]) == 4 &&
           size_of(t_.state_dtype[1]) == 4;
  }

  // Sum over the thread block, returned to every thread. The last barrier lets the next call write `sum` again.
  __device__ __forceinline__ static double shared_sum(double value) {
    SINGLEPASS_SHARED(double, sum);
    value = block_sum(value);
    if (threadIdx.x == 0) sum = value;
    __syncthreads();
    value = sum;
    __syncthreads();
    return value;
  }

  // Calls body for the thread's elements: vectors first, where the row is aligned, then single elements.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    for (int64_t i = Vectors{kSpread}.first(); i < vectors_end_; i += blockDim.x * kVector) {
      body.template operator()<kVector>(i);
    }
    for (int64_t i = vectors_end_ + threadIdx.x; i < t_.numel; i += blockDim.x) body.template operator()<1>(i);
  }

  // Starts all loads before it converts the first, and computes the update in registers. Nothing is written. Where each
  // dtype chooses between two loads, those of one width wait for those of the other, because either may write a
  // register: what is usual has a branch of its own.
  template <int kWidth>
  __device__ __forceinline__ void update(int64_t i, Element<kWidth>& e) const {
    Raw<kWidth> raw_p, raw_g, raw_m, raw_v;
    const auto load_all = [&](DType param, DType grad, DType first, DType second) {
      load(t_.param, param, i, raw_p, kApart);
      load(t_.grad, grad, i, raw_g, kApart);
      load(t_.state[0], first, i, raw_m, kApart);
      load(t_.state[1], second, i, raw_v, kApart);
    };
    if (!kFloat32 && kWidth > 1 && is_mixed()) {
      load_all(DType::kBFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat32);
    } else {
      load_all(dtype(t_.param_dtype), dtype(t_.grad_dtype), dtype(t_.state_dtype[0]), dtype(t_.state_dtype[1]));
    }
    float g[kWidth];
    decode(raw_p, dtype(t_.param_dtype), e.p);
    decode(raw_g, dtype(t_.grad_dtype), g);
    decode(raw_m, dtype(t_.state_dtype[0]), e.states[0]);
    decode(raw_v, dtype(t_.state_dtype[1]), e.states[1]);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      float s[Rule::kStates] = {e.states[0][k], e.states[1][k]};
      const float grad = g[k] * factor_;
      Rule::update(c_, e.p[k], projects_ ? grad - along_ * e.p[k] : grad, s);
      e.states[0][k] = s[0];
      e.states[1][k] = s[1];
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void write_states(int64_t i, const Element<kWidth>& e) const {
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) {
      const DType to = dtype(t_.state_dtype[s]);
      store(encode<kWidth>(e.states[s], to), to, t_.state[s], i, kApart);
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void write_param(int64_t i, const Element<kWidth>& e) const {
    const DType to = dtype(t_.param_dtype);
    store(optim::encode<kWidth>(e.p, to, first_ + i, kStochastic, rounding_), to, t_.param, i, kApart);
  }

  template <int kWidth>
  __device__ __forceinline__ void hold(int64_t i, const Element<kWidth>& e) const {
    float* at = dynamic_shared<float>() + i;
    if constexpr (kWidth == 1) {
      *at = e.p[0];
    } else {
      *reinterpret_cast<float4*>(at) = {e.p[0], e.p[1], e.p[2], e.p[3]};
      *reinterpret_cast<float4*>(at + kApart) = {e.p[4], e.p[5], e.p[6], e.p[7]};
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void give_back(int64_t i, Element<kWidth>& e) const {
    const float* at = dynamic_shared<float>() + i;
    if constexpr (kWidth == 1) {
      e.p[0] = *at;
    } else {
      const float4 low = *reinterpret_cast<const float4*>(at);
      const float4 high = *reinterpret_cast<const float4*>(at + kApart);
      e.p[0] = low.x, e.p[1] = low.y, e.p[2] = low.z, e.p[3] = low.w;
      e.p[4] = high.x, e.p[5] = high.y, e.p[6] = high.z, e.p[7] = high.w;
    }
  }

  const TensorRecord& t_;
  const int64_t first_;
  const Rule::Coefficients& c_;
  const float factor_;
  const int held_;
  const optim::Rounding& rounding_;
  int64_t vectors_end_;
  bool projects_ = false;
  float along_ = 0.0f;
};

// Moves the pointers of a record forward.
__device__ __forceinline__ void move(TensorRecord& t, int64_t elements) {
  t.param = static_cast<char*>(t.param) + elements * size_of(t.param_dtype);
  t.grad = static_cast<const char*>(t.grad) + elements * size_of(t.grad_dtype);
#pragma unroll
  for (int s = 0; s < Rule::kStates; ++s) {
    t.state[s] = static_cast<char*>(t.state[s]) + elements * size_of(t.state_dtype[s]);
  }
}

// A thread block takes one chunk of one tensor and goes through its rows. kFloat32 makes every dtype a constant. What
// rounds stochastically is compiled apart, because it takes registers.
template <bool kFloat32, bool kStochastic>
__global__ void __launch_bounds__(kStepShape.threads, kFloat32      ? 6
                                                      : kStochastic ? 3
                                                                    : 4)
    unit_step_kernel(const optim::DeviceTable table, const Rule::Hyper hyper, const LaunchOptions options) {
  const optim::StepOptions& shared = options.step.shared;
  if (shared.found_inf != nullptr && *shared.found_inf != 0.0f) return;
  const optim::Chunk chunk = table.chunks[blockIdx.x];
  const TensorRecord& t = table.records[chunk.tensor];

  // The coefficients take double precision, so one thread computes them.
  SINGLEPASS_SHARED(Rule::Coefficients, shared_coefficients);
  SINGLEPASS_SHARED(optim::Rounding, rounding);
  if (threadIdx.x == 0) {
    shared_coefficients = optim::device_coefficients<Rule>(t, hyper, shared);
    if constexpr (kStochastic) rounding = optim::rounding_of(t, shared);
  }
  __syncthreads();
  const Rule::Coefficients c = shared_coefficients;

  // Rows of the chunk, one after another; singular values (columns = 0) are updated all at once.
  const float factor = optim::grad_factor(shared.maximize, shared.grad_scale);
  const int64_t size = optim::chunk_size(t, table.shape.chunk), begin = chunk.index * size;
  const int64_t end = begin + size < t.numel ? begin + size : t.numel, step = t.columns > 0 ? t.columns : size;
  TensorRecord part = t;
  move(part, begin);
  for (int64_t first = begin; first < end; first += step, move(part, step)) {
    part.numel = end - first < step ? end - first : step;
    Span<kFloat32, kStochastic> span(part, first, c, factor, options.held, rounding);
    if (t.columns == 0) {
      span.make_not_negative();
    } else {
      if (options.step.project) span.project();
      span.make_unit();
    }
  }

  // The last thread block of a tensor counts its step, because no other reads the count any more.
  const unsigned blocks = static_cast<unsigned>(optim::chunk_count(t.numel, size));
  if (is_last_block(&table.tickets[chunk.tensor], blocks) && threadIdx.x == 0) *t.step += 1.0f;
}

}  // namespace

void step(const optim::DeviceTable& table, const Rule::Hyper& hyper, const StepOptions& options, const Gpu& gpu,
          int64_t held) {
  if (table.chunk_count == 0) return;
  const auto round_up = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; };
  const int64_t row = round_up(table.longest_row, kVector), unit = Vectors{kSpread}.unit();
  // No more threads than the longest row has vectors, in whole warps; all threads if there are only singular values.
  const int64_t useful = row == 0 ? table.shape.threads : round_up(row / kVector, kWarp);
  const dim3 threads(static_cast<unsigned>(std::min<int64_t>(table.shape.threads, useful)));
  const LaunchOptions launch_options = {options, static_cast<int>(row <= held ? row : held - held % unit)};
  const auto kernel = table.all_float32                    ? &unit_step_kernel<true, false>
                      : options.shared.stochastic_rounding ? &unit_step_kernel<false, true>
                                                           : &unit_step_kernel<false, false>;
  launch(kernel, dim3(static_cast<unsigned>(table.chunk_count)), threads, launch_options.held * sizeof(float), gpu,
         table, hyper, launch_options);
}

}  // namespace singlepass::spectral
