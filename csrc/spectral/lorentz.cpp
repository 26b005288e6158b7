// SPDX-License-Identifier: Apache-2.0
#include "spectral/lorentz.h"

#include <algorithm>
#include <vector>

#include "common/convert.h"
#include "common/sums.h"

namespace singlepass::spectral {
namespace {

SINGLEPASS_TARGET_CLONES void scale(const float* from, float factor, float* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
}

SINGLEPASS_TARGET_CLONES void combine(const float* a, float factor_a, const float* b, float factor_b, float* out,
                                      int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * factor_a - b[i] * factor_b;
}

// Rows of z and of the gradient in float, and of the result until it is rounded.
class Rows {
 public:
  explicit Rows(const Lorentz& p) : p_(p), z_(p.columns), grad_(p.grad == nullptr ? 0 : p.columns), out_(p.columns) {}

  void forward(int64_t row) {
    const float* z = read(p_.z, row, z_);
    const int64_t n = p_.columns - 1;
    const LorentzRow x(p_, z[0], sum_of_squares(z + 1, n));
    out_[0] = x.time;
    scale(z + 1, x.root, out_.data() + 1, n);
    write(row);
  }

  // Returns the row's part of the gradient of log_scale.
  double backward(int64_t row) {
    const float* z = read(p_.z, row, z_);
    const float* grad = read(p_.grad, row, grad_);
    const int64_t n = p_.columns - 1;
    const LorentzRow x(p_, z[0], sum_of_squares(z + 1, n));
    const double along = dot(grad + 1, z + 1, n);
    const float grad_time = x.grad_time(grad[0], along);
    out_[0] = x.grad_first(grad_time);
    combine(grad + 1, x.root, z + 1, x.pull(along), out_.data() + 1, n);
    write(row);
    return x.grad_scale(grad_time);
  }

 private:
  const float* read(const void* base, int64_t row, std::vector<float>& buffer) const {
    const char* memory = static_cast<const char*>(base) + row * p_.columns * size_of(p_.dtype);
    if (p_.dtype == DType::kFloat32) return reinterpret_cast<const float*>(memory);
    widen(memory, p_.dtype, buffer.data(), p_.columns);
    return buffer.data();
  }

  void write(int64_t row) {
    narrow(out_.data(), static_cast<char*>(p_.out) + row * p_.columns * size_of(p_.dtype), p_.dtype, p_.columns);
  }

  const Lorentz& p_;
  std::vector<float> z_, grad_, out_;
};

// body(rows, row, block) for every row, blocks of rows spread over threads.
template <class Body>
void for_each_row(const Lorentz& p, const ParallelFor& parallel_for, const Body& body) {
  const int64_t blocks = lorentz_blocks(p.rows);
  parallel_for_elements(parallel_for, blocks, p.rows * p.columns, [&](int64_t begin, int64_t end) {
    Rows rows(p);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(p.rows, (block + 1) * kLorentzRows);
      for (int64_t row = block * kLorentzRows; row < last; ++row) body(rows, row, block);
    }
  });
}

}  // namespace

void lorentz(const Lorentz& p, const ParallelFor& parallel_for) {
  for_each_row(p, parallel_for, [](Rows& rows, int64_t row, int64_t) { rows.forward(row); });
}

void lorentz_backward(const Lorentz& p, const ParallelFor& parallel_for) {
  const int64_t blocks = lorentz_blocks(p.rows);
  std::vector<double> partials(blocks, 0.0);
  for_each_row(p, parallel_for, [&](Rows& rows, int64_t row, int64_t block) { partials[block] += rows.backward(row); });
  double sum = 0.0;
  for (const double partial : partials) sum += partial;
  *p.grad_scale = static_cast<float>(sum);
}

}  // namespace singlepass::spectral
