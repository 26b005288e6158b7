// SPDX-License-Identifier: Apache-2.0
#include "optim/cpu_engine.h"
#include "optim/grad_norm.h"
#include "optim/rules.h"

namespace singlepass::optim {

namespace {

// The half of a random word that element i of the whole tensor takes.
SINGLEPASS_HD uint32_t half_of(uint32_t word, int64_t i) {
  return i % 2 == 0 ? word & 0xffffu : word >> 16;
}

}  // namespace

void narrow_stochastic(const float* from, void* to, int64_t n, const RandomStream& random) {
  const uint64_t high = static_cast<uint64_t>(random.step) << 32 | random.id;
  uint16_t* half = static_cast<uint16_t*>(to);
  if (const int lane = static_cast<int>(random.start % 8); lane != 0) {  // begins with what is left of a Philox block
    const Philox4 bits = philox4x32(random.seed, random.start / 8, high);
    const int64_t left = std::min<int64_t>(8 - lane, n);
    for (int64_t i = 0; i < left; ++i) {
      half[i] = float_to_bfloat16_stochastic(from[i], half_of(bits.word[(lane + i) / 2], lane + i));
    }
    from += left, half += left, n -= left;
  }
  alignas(64) uint16_t random_halves[kTile];  // by element, so that the last loop vectorises
  const int64_t groups = (n + 7) / 8;
  const uint64_t first = (random.start + 7) / 8;
#pragma GCC ivdep
  for (int64_t i = 0; i < groups; ++i) {
    const Philox4 bits = philox4x32(random.seed, first + i, high);
    for (int64_t j = 0; j < 8; ++j) random_halves[8 * i + j] = half_of(bits.word[j / 2], j);
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) half[i] = float_to_bfloat16_stochastic(from[i], random_halves[i]);
}

void grad_squares(const std::vector<TensorRecord>& tensors, double* result, const ParallelFor& parallel_for) {
  const std::vector<Chunk> chunks = make_chunks(tensors.data(), 0, static_cast<int64_t>(tensors.size()), kCpuChunk);
  const int64_t n = static_cast<int64_t>(chunks.size());
  std::vector<double> partials(n, 0.0);
  parallel_for_elements(parallel_for, n, element_count(tensors, 0, static_cast<int64_t>(tensors.size())),
                        [&](int64_t begin, int64_t end) {
                          alignas(64) float buffer[kTile];
                          for (int64_t i = begin; i < end; ++i) {
                            const TensorRecord& t = tensors[chunks[i].tensor];
                            const int64_t stop = std::min(t.numel, (chunks[i].index + 1) * kCpuChunk);
                            for (int64_t start = chunks[i].index * kCpuChunk; start < stop; start += kTile) {
                              const int64_t count = std::min(kTile, stop - start);
                              const TileView g(const_cast<void*>(t.grad), t.grad_dtype, start, count, buffer, true);
                              partials[i] += sum_of_squares(g.values, count);
                            }
                          }
                        });
  *result = 0.0;
  for (const double partial : partials) *result += partial;
}

void grad_norm(const std::vector<TensorRecord>& tensors, const ClipOptions& options, GradNorm* result,
               const ParallelFor& parallel_for) {
  double squares = 0.0;
  grad_squares(tensors, &squares, parallel_for);
  *result = finish_grad_norm(squares, options);
}

#define SINGLEPASS_INSTANTIATE(...)                                                                     \
  template void step<__VA_ARGS__>(const std::vector<TensorRecord>&, const typename __VA_ARGS__::Hyper&, \
                                  const StepOptions&, const ParallelFor&, const Phase&);
SINGLEPASS_FOR_EACH_RULE(SINGLEPASS_INSTANTIATE)

}  // namespace singlepass::optim
