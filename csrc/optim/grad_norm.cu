// SPDX-License-Identifier: Apache-2.0
#include "optim/cuda_engine.h"
#include "optim/grad_norm.h"

namespace singlepass::optim {
namespace {

// Writes the sum of squares to `sum_alone`, if it is not null, else what follows from it to `result`.
__global__ void __launch_bounds__(kThreads)
    grad_norm_kernel(const DeviceTable table, const ClipOptions options, GradNorm* result, double* sum_alone) {
  const Chunk chunk = table.chunks[blockIdx.x];
  const TensorRecord& t = table.records[chunk.tensor];
  const int64_t begin = static_cast<int64_t>(chunk.index) * table.shape.chunk;
  const int64_t end = begin + table.shape.chunk < t.numel ? begin + table.shape.chunk : t.numel;
  const bool aligned = reinterpret_cast<uintptr_t>(t.grad) % 16 == 0;
  const Vectors vectors = {t.grad_dtype == DType::kFloat32};
  const int64_t vectors_end = aligned ? end - (end - begin) % vectors.unit() : begin;

  double squares = 0.0;
  for (int64_t i = begin + vectors.first(); i < vectors_end; i += blockDim.x * kVector) {
    Raw<kVector> raw;
    float values[kVector];
    load(t.grad, t.grad_dtype, i, raw, vectors.apart());
    decode(raw, t.grad_dtype, values);
    for (int k = 0; k < kVector; ++k) squares = add_product(squares, values[k], values[k]);
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += blockDim.x) {
    Raw<1> raw;
    float value;
    load(t.grad, t.grad_dtype, i, raw);
    decode(raw, t.grad_dtype, &value);
    squares = add_product(squares, value, value);
  }

  squares = block_sum(squares);
  if (threadIdx.x == 0) table.partials[blockIdx.x] = squares;
  if (!is_last_block(&table.tickets[table.tensor_count], gridDim.x)) return;
  const double sum = sum_partials(table.partials, table.chunk_count);
  if (threadIdx.x != 0) return;
  if (sum_alone != nullptr) {
    *sum_alone = sum;
  } else {
    *result = finish_grad_norm(sum, options);
  }
}

void launch_grad_norm(const DeviceTable& table, const ClipOptions& options, GradNorm* result, double* sum_alone,
                      const Gpu& gpu) {
  launch(&grad_norm_kernel, dim3(static_cast<unsigned>(table.chunk_count)), dim3(table.shape.threads), 0, gpu, table,
         options, result, sum_alone);
}

}  // namespace

void grad_squares(const DeviceTable& table, double* result, const Gpu& gpu) {
  launch_grad_norm(table, {}, nullptr, result, gpu);
}

void grad_norm(const DeviceTable& table, const ClipOptions& options, GradNorm* result, const Gpu& gpu) {
  launch_grad_norm(table, options, result, nullptr, gpu);
}

}  // namespace singlepass::optim
