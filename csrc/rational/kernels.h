// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.h"
#include "rational/grid.h"

namespace singlepass::rational {

inline constexpr int kThreads = 256;

// What a kernel is compiled for. kDType is -1 if the dtype is only known at run time; kFused is false if there is no
// bias, gate or dropout.
template <Form kForm, int kM, int kN, int kWidth, int kDType, bool kFused>
struct Variant {
  static constexpr Form form = kForm;
  static constexpr int M = kM, N = kN, width = kWidth;
  static constexpr bool fused = kFused;
  static constexpr bool spread = kDType >= 0 && spreads(static_cast<DType>(kDType), kWidth);
  __device__ __forceinline__ static DType dtype(const Problem& p) {
    return kDType < 0 ? p.dtype : static_cast<DType>(kDType);
  }
  __device__ __forceinline__ static Vectors vectors(const Grid& g) { return {spread, g.run}; }
};

// A thread's place in the grid: the first channel of its vector, the group of this channel, and the items (vectors
// along the free direction) that it takes. Threads that are not active have nothing to do.
struct Place {
  bool active;
  int column, row;
  int64_t first_group;     // of the thread block
  int64_t group, channel;  // of the thread
  int part;                // which of the thread blocks that share the group
  int items;               // how many the thread takes
  int64_t outer, vector;   // of an item, the first to begin with: its plane, and which vector of the plane it is

  __device__ Place(const Problem& p, const Grid& g) {
    const int thread = static_cast<int>(threadIdx.x), tile = static_cast<int>(blockIdx.x);
    column = thread % g.columns;
    row = thread / g.columns;
    active = row < g.rows;
    part = tile % g.parts;
    const int64_t item = static_cast<int64_t>(blockIdx.y) * g.rows + row;
    if (g.planes) {
      channel = tile;
      group = first_group = tile / g.parts;
      outer = item / g.plane_vectors;
      vector = item % g.plane_vectors;
    } else {
      first_group = static_cast<int64_t>(tile / g.parts) * g.groups_per_tile;
      group = first_group + column / g.span;
      const int64_t of_group = static_cast<int64_t>(part) * g.columns + column % g.span;
      channel = group * g.run + of_group * g.step;
      active = active && group < p.groups() && of_group < g.group_vectors;
      outer = item;
      vector = 0;
    }
    items = active ? g.rounds + (item < g.rest ? 1 : 0) : 0;
  }

  // The number of the item's first element.
  __device__ __forceinline__ uint64_t element(const Problem& p, const Grid& g) const {
    return static_cast<uint64_t>((outer * p.channels + channel) * p.inner + vector * g.step);
  }
};

// The thread's vectors of one tensor. From item to item its address moves on by additions alone.
template <class V>
class Stream {
 public:
  __device__ __forceinline__ Stream(const Problem& p, const Grid& g, const Place& place, const View& view)
      : dtype_(V::dtype(p)), apart_(V::vectors(g).apart()), view_(view), address_(static_cast<char*>(view.data)) {
    if (view.data == nullptr) return;
    address_ += size_of(dtype_) *
                (place.outer * view.outer_stride + place.channel * view.channel_stride + place.vector * g.step);
  }

  __device__ __forceinline__ void read(float* values) const {
    Raw<V::width> raw;
    load(address_, dtype_, 0, raw, apart_);
    decode(raw, dtype_, values);
  }

  __device__ __forceinline__ void write(const float* values) const {
    store(encode_any_nan<V::width>(values, dtype_), dtype_, address_, 0, apart_);
  }

  __device__ __forceinline__ void next() { address_ += view_.step; }
  __device__ __forceinline__ void skip_plane() { address_ += view_.skip; }

 private:
  const DType dtype_;
  const int64_t apart_;
  const View& view_;
  char* address_;
};

// Goes on to the thread's next item. It may be one plane later than the steps say.
template <class... Streams>
__device__ __forceinline__ void next_item(const Grid& g, Place& place, Streams&... streams) {
  if (g.planes) {
    SINGLEPASS_APART(0);  // else both cases take the additions of planes, times zero
    place.vector += g.inner_step;
    if (place.vector >= g.plane_vectors) {
      SINGLEPASS_APART(1);
      place.vector -= g.plane_vectors;
      ++place.outer;
      (streams.skip_plane(), ...);
    }
  }
  --place.items;
  place.outer += g.outer_step;
  (streams.next(), ...);
}

// Loads the bias of the thread's channels; 0 without a bias. A vector along a plane has a single channel.
template <class V>
__device__ __forceinline__ void read_bias(const Problem& p, const Grid& g, const Place& place, float* bias) {
#pragma unroll
  for (int k = 0; k < V::width; ++k) {
    const bool present = V::fused && place.active && p.bias.data != nullptr;
    bias[k] = present ? table_entry(p.bias, 0, place.channel + (g.planes ? 0 : V::vectors(g).offset(k))) : 0.0f;
  }
}

// Draws the dropout factors (0 or the scale) of kCount neighbours from `element` on. Eight elements share one block of
// Philox: element i takes 16 bits, half i % 2 of word i % 8 / 2.
template <int kCount>
__device__ __forceinline__ void draw_factors(const Dropout& dropout, uint64_t element, float* factors) {
  const Philox4 random = philox4x32(dropout.seed, element / kVector, 0);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int lane = k + (kCount == kVector ? 0 : static_cast<int>(element % kVector));
    const uint32_t low = lane < 2 ? random.word[0] : random.word[1];
    const uint32_t high = lane < 6 ? random.word[2] : random.word[3];
    const uint32_t word = lane < 4 ? low : high;
    factors[k] = (lane % 2 == 0 ? word & 0xffffu : word >> 16) < dropout.threshold ? 0.0f : dropout.scale;
  }
}

// Those of a vector.
template <class V>
__device__ __forceinline__ void draw_factors(const Dropout& dropout, const Grid& g, uint64_t element, float* factors) {
  if constexpr (V::spread) {
    draw_factors<kVector / 2>(dropout, element, factors);
    draw_factors<kVector / 2>(dropout, element + V::vectors(g).apart(), factors + kVector / 2);
  } else {
    draw_factors<V::width>(dropout, element, factors);
  }
}

// A dropped element is 0 even if its value is NaN or infinite.
__device__ __forceinline__ float keep(float value, float factor) {
  return factor == 0.0f ? 0.0f : value * factor;
}

// f(x) of one element.
template <class V>
__device__ __forceinline__ float evaluate(const Coefficients<float, V::M, V::N>& c, float x, uint64_t seed,
                                          uint64_t element) {
  if constexpr (V::form == Form::kD) {
    return noisy_value(c, x, seed, element);
  } else {
    return value<V::form>(c, x);
  }
}

// y = gate * dropout(f(x + bias)), on a grid of (tiles, splits). A thread keeps its group's coefficients in registers
// and goes through its items, one vector at a time.
template <class V>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Problem p, const Grid g) {
  Place place(p, g);
  if (!place.active) return;
  const Coefficients<float, V::M, V::N> c = coefficients<V::M, V::N>(p, place.group);
  const Dropout dropout = V::fused ? p.dropout() : Dropout{};
  float bias[V::width];
  read_bias<V>(p, g, place, bias);

  Stream<V> x_stream(p, g, place, p.x), gate_stream(p, g, place, p.gate), y_stream(p, g, place, p.y);
  const bool gated = V::fused && p.gate.data != nullptr;
  while (place.items > 0) {
    float x[V::width], gate[V::width], y[V::width];
    x_stream.read(x);
    if (gated) gate_stream.read(gate);
#pragma unroll
    for (int k = 0; k < V::width; ++k) {
      const float z = V::fused && p.bias.data != nullptr ? x[k] + bias[k] : x[k];
      y[k] = evaluate<V>(c, z, dropout.seed, place.element(p, g) + k);
    }
    if (V::fused && dropout.threshold > 0) {
      float factors[V::width];
      draw_factors<V>(dropout, g, place.element(p, g), factors);
#pragma unroll
      for (int k = 0; k < V::width; ++k) y[k] = keep(y[k], factors[k]);
    }
    if (gated) {
#pragma unroll
      for (int k = 0; k < V::width; ++k) y[k] *= gate[k];
    }
    y_stream.write(y);
    next_item(g, place, x_stream, gate_stream, y_stream);
  }
}

// (sums, threads): the partial sums of all threads of a thread block.
template <int kCount>
struct BlockSums {
  float value[kCount][kThreads];
};

// Adds the partial sums of the threads of each group that the thread block covers. A warp computes one sum after
// another, in a fixed order. partials: (kCount, groups, slots), where slot (part, split) is this thread block's.
template <int kCount>
__device__ void reduce_groups(const Problem& p, const Grid& g, const Place& place, const BlockSums<kCount>& block,
                              double* partials) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const unsigned members = static_cast<unsigned>(g.span * g.rows), span = static_cast<unsigned>(g.span);
  const int64_t slot = place.part * g.splits + blockIdx.y;
  for (int task = warp; task < kCount * g.groups_per_tile; task += warps) {
    const int index = task % kCount, local = task / kCount;
    double sum = 0.0;
    for (unsigned member = lane; member < members; member += kWarp) {
      sum += block.value[index][member / span * g.columns + local * span + member % span];
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(kAllLanes, sum, offset);
    const int64_t group = place.first_group + local;
    if (lane == 0 && group < p.groups()) {
      double* const own = partials + (index * p.groups() + group) * g.slots + slot;
      *own = sum;
      if (slot + 2 == g.slots && g.parts * g.splits < g.slots) own[1] = 0.0;
    }
  }
}

// Adds the bias gradients of every channel that the thread block covers. partials: (splits, channels). With planes, all
// threads have the same channel. Otherwise, the first row of threads adds up its columns in shared memory.
template <class V, int kCount>
__device__ void reduce_bias(const Problem& p, const Grid& g, const Place& place, BlockSums<kCount>& block,
                            const float* grad_bias, double* partials) {
  double* const row = partials + static_cast<int64_t>(blockIdx.y) * p.channels;
  if (g.planes) {
    double sum = 0.0;
    for (int k = 0; k < V::width; ++k) sum += grad_bias[k];
    sum = block_sum(sum);
    if (threadIdx.x == 0) row[place.channel] = sum;
    return;
  }
  static_assert(V::width <= kCount);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < V::width; ++k) block.value[k][threadIdx.x] = grad_bias[k];
  __syncthreads();
  if (!place.active || place.row != 0) return;
  for (int k = 0; k < V::width; ++k) {
    double sum = 0.0;
    for (int r = 0; r < g.rows; ++r) sum += block.value[k][r * g.columns + place.column];
    row[place.channel + V::vectors(g).offset(k)] = sum;
  }
}

// Writes grad_x and grad_gate, and the partial sums of the gradients of coefficients and bias, on a grid of (tiles,
// splits). A thread keeps coefficients and sums in registers. Threads without work stay for the barriers.
template <class V>
__global__ void __launch_bounds__(kThreads, V::fused ? 2 : 3)
    backward_kernel(const Problem p, const Grid g, double* partials, double* bias_partials) {
  Place place(p, g);
  Coefficients<float, V::M, V::N> c = {};
  if (place.active) c = coefficients<V::M, V::N>(p, place.group);
  const Dropout dropout = V::fused || V::form == Form::kD ? p.dropout() : Dropout{};
  float bias[V::width], grad_bias[V::width] = {};
  read_bias<V>(p, g, place, bias);
  Sums<float, V::M, V::N> sums = {};

  // Stage 1: each thread goes through its items. The gradient of y first goes back through dropout and gate; f(x),
  // which grad_gate needs, is computed again.
  Stream<V> x_stream(p, g, place, p.x), grad_stream(p, g, place, p.grad), grad_x_stream(p, g, place, p.grad_x);
  Stream<V> gate_stream(p, g, place, p.gate), grad_gate_stream(p, g, place, p.grad_gate);
  const bool gated = V::fused && p.gate.data != nullptr;
  while (place.items > 0) {
    float x[V::width], grad[V::width], grad_x[V::width];
    x_stream.read(x);
    grad_stream.read(grad);
    if (V::fused && p.bias.data != nullptr) {
#pragma unroll
      for (int k = 0; k < V::width; ++k) x[k] += bias[k];
    }
    if (V::fused && dropout.threshold > 0) {
      float factors[V::width];
      draw_factors<V>(dropout, g, place.element(p, g), factors);
#pragma unroll
      for (int k = 0; k < V::width; ++k) grad[k] = keep(grad[k], factors[k]);
    }
    if (gated) {
      float gate[V::width], grad_gate[V::width];
      gate_stream.read(gate);
#pragma unroll
      for (int k = 0; k < V::width; ++k) {
        grad_gate[k] = grad[k] * evaluate<V>(c, x[k], dropout.seed, place.element(p, g) + k);
        grad[k] *= gate[k];
      }
      grad_gate_stream.write(grad_gate);
    }
    // Each vector is summed by itself before it is added to the thread's sums: shorter chains of additions round less.
    Sums<float, V::M, V::N> own = {};
#pragma unroll
    for (int k = 0; k < V::width; ++k) {
      if constexpr (V::form == Form::kD) {
        grad_x[k] = noisy_gradients(c, x[k], grad[k], dropout.seed, place.element(p, g) + k, own);
      } else {
        grad_x[k] = gradients<V::form>(c, x[k], grad[k], own);
      }
      if constexpr (V::fused) grad_bias[k] += grad_x[k];
    }
#pragma unroll
    for (int k = 0; k <= V::M; ++k) sums.a[k] += own.a[k];
#pragma unroll
    for (int k = 0; k <= V::N; ++k) sums.b[k] += own.b[k];
    grad_x_stream.write(grad_x);
    next_item(g, place, x_stream, grad_stream, grad_x_stream, gate_stream, grad_gate_stream);
  }

  // Stage 2: sums over the thread block, through shared memory.
  constexpr int kCount = kSums<V::M, V::N>;
  SINGLEPASS_SHARED(BlockSums<kCount>, block);
#pragma unroll
  for (int k = 0; k <= V::M; ++k) block.value[k][threadIdx.x] = sums.a[k];
#pragma unroll
  for (int k = 0; k <= V::N; ++k) block.value[V::M + 1 + k][threadIdx.x] = sums.b[k];
  __syncthreads();
  reduce_groups<kCount>(p, g, place, block, partials);
  if (V::fused && p.bias.data != nullptr) reduce_bias<V, kCount>(p, g, place, block, grad_bias, bias_partials);
}

// Adds the partial sums of all thread blocks in a fixed order and writes the gradients. The first thread blocks take
// one coefficient each; in the others, each thread takes the bias of one channel.
__global__ void __launch_bounds__(kThreads) reduce_kernel(const Problem p, const Grid g, int numerator_sums,
                                                          const double* partials, const double* bias_partials) {
  const int64_t numerators = p.numerator.rows * p.numerator.columns;
  const int64_t coefficients = numerators + p.denominator.rows * p.denominator.columns;
  const int64_t block = blockIdx.x;
  if (block >= coefficients) {
    const int64_t c = (block - coefficients) * blockDim.x + threadIdx.x;
    if (c >= p.channels) return;
    double sum = 0.0;
    for (int64_t s = 0; s < g.splits; ++s) sum += bias_partials[s * p.channels + c];
    store_scalar(static_cast<float>(sum), p.grad_bias.data, p.grad_bias.dtype, c);
    return;
  }
  const bool is_numerator = block < numerators;
  const Table& table = is_numerator ? p.numerator : p.denominator;
  const int64_t entry = is_numerator ? block : block - numerators;
  const int64_t row = entry / table.columns;
  const int64_t column = entry % table.columns;
  const int first = is_numerator ? 0 : numerator_sums + (p.form == Form::kC ? 0 : 1);
  // A row of coefficients that all groups share gets the sums of all groups, which follow each other.
  const int64_t count = table.rows == 1 ? p.groups() * g.slots : g.slots;
  const double* const own = partials + ((first + column) * p.groups() + row) * g.slots;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = 2 * threadIdx.x; i < count; i += 2 * blockDim.x) {
    const double2 two = *reinterpret_cast<const double2*>(own + i);
    sum += two.x + two.y;
  }
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  // Form A takes the absolute value of b, so the gradient is multiplied by the sign of b.
  const Table& grad = is_numerator ? p.grad_numerator : p.grad_denominator;
  const float b = p.form == Form::kA && !is_numerator ? table_entry(table, row, column) : 1.0f;
  store_scalar(with_sign_of(b, static_cast<float>(sum)), grad.data, grad.dtype, entry);
}

}  // namespace singlepass::rational
