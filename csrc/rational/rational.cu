// SPDX-License-Identifier: Apache-2.0
#include "rational/dispatch.h"
#include "rational/kernels.h"

namespace singlepass::rational {
namespace {

// There are two kinds of kernels. Tuned ones are compiled for a dtype and for KAT's degrees, and access vectors. The
// general one of each form takes any dtype and any degrees, element by element.
bool is_tuned(const Problem& p) {
  return p.form != Form::kD && has_tuned_degrees(p) && fits_vectors(p);
}

bool is_fused(const Problem& p) {
  return p.bias.data != nullptr || p.gate.data != nullptr || p.dropout_threshold > 0;
}

// Elements that a thread takes at a time.
int width(const Problem& p) {
  return is_tuned(p) ? kVector : 1;
}

// Sums that the chosen kernel makes for each group: those of the numerator, and all of them.
int numerator_sums(const Problem& p) {
  return (is_tuned(p) ? kTunedNumerator : kMaxNumerator) + 1;
}

int sums(const Problem& p) {
  return is_tuned(p) ? kSums<kTunedNumerator, kTunedDenominator> : kSums<kMaxNumerator, kMaxDenominator>;
}

using ForwardKernel = void (*)(Problem, Grid);
using BackwardKernel = void (*)(Problem, Grid, double*, double*);

template <template <class> class Pick, Form form, bool fused>
auto tuned_dtype(DType dtype) {
  constexpr int M = kTunedNumerator, N = kTunedDenominator;
  switch (dtype) {
    case DType::kFloat32:
      return Pick<Variant<form, M, N, kVector, 0, fused>>::kernel;
    case DType::kBFloat16:
      return Pick<Variant<form, M, N, kVector, 1, fused>>::kernel;
    default:
      return Pick<Variant<form, M, N, kVector, 2, fused>>::kernel;
  }
}

template <template <class> class Pick, Form form>
auto pick_form(const Problem& p) {
  if constexpr (form != Form::kD) {
    if (is_tuned(p))
      return is_fused(p) ? tuned_dtype<Pick, form, true>(p.dtype) : tuned_dtype<Pick, form, false>(p.dtype);
  }
  return Pick<Variant<form, kMaxNumerator, kMaxDenominator, 1, -1, true>>::kernel;
}

template <template <class> class Pick>
auto pick(const Problem& p) {
  switch (p.form) {
    case Form::kA:
      return pick_form<Pick, Form::kA>(p);
    case Form::kB:
      return pick_form<Pick, Form::kB>(p);
    case Form::kC:
      return pick_form<Pick, Form::kC>(p);
    default:
      return pick_form<Pick, Form::kD>(p);
  }
}

template <class V>
struct PickForward {
  static constexpr ForwardKernel kernel = &forward_kernel<V>;
};

template <class V>
struct PickBackward {
  static constexpr BackwardKernel kernel = &backward_kernel<V>;
};

}  // namespace

void forward(const Problem& p, const Gpu& gpu, const LaunchShape& shape) {
  if (p.numel() == 0) return;
  const Grid g = forward_grid(p, width(p), shape);
  const dim3 blocks(static_cast<unsigned>(g.tiles), static_cast<unsigned>(g.splits));
  launch(pick<PickForward>(p), blocks, dim3(g.threads), 0, gpu, with_steps(p, g), g);
}

void backward(const Problem& p, const Gpu& gpu, const LaunchShape& shape) {
  Grid g = backward_grid(p, width(p), sums(p), shape);
  const int64_t count = sums(p) * p.groups() * g.slots, bias_count = p.bias.data == nullptr ? 0 : g.splits * p.channels;
  double* const partials = static_cast<double*>(gpu.allocate((count + bias_count) * int64_t{sizeof(double)}));
  double* const bias_partials = partials + count;
  if (p.numel() == 0) {
    g.splits = g.slots = 0;  // reduce_kernel then writes zeros
  } else {
    const dim3 blocks(static_cast<unsigned>(g.tiles), static_cast<unsigned>(g.splits));
    launch(pick<PickBackward>(p), blocks, dim3(g.threads), 0, gpu, with_steps(p, g), g, partials, bias_partials);
  }
  const int64_t coefficients = p.numerator.rows * p.numerator.columns + p.denominator.rows * p.denominator.columns;
  const int64_t channels = p.bias.data == nullptr ? 0 : ceil_div(p.channels, shape.threads);
  launch(&reduce_kernel, dim3(static_cast<unsigned>(coefficients + channels)), dim3(shape.threads), 0, gpu, p, g,
         numerator_sums(p), partials, bias_partials);
}

}  // namespace singlepass::rational
