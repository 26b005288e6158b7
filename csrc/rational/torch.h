// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <tuple>

#include "rational/problem.h"
#include "torch/arguments.h"

// The rational ops: arguments are checked, and turned into a Problem.
namespace singlepass::registration {

using rational::Problem;
using rational::Table;
using rational::View;

struct RationalArguments {
  const char* op;
  const Tensor& x;
  const Tensor& numerator;
  const Tensor& denominator;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& gate;
  int64_t form, channel_dim;
  double dropout;
  const std::optional<Tensor>& seed;
};

// The dimensions in the order of the result's memory: those before the channels, the channels, those after them.
struct Order {
  std::vector<int64_t> outer, inner;
  int64_t channel;

  Order(const Tensor& y, int64_t channel_dim) : channel(channel_dim) {
    std::vector<int64_t> dims;
    for (int64_t d = 0; d < y.dim(); ++d) {
      if (d == channel_dim || y.size(d) != 1) dims.push_back(d);
    }
    std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return y.stride(a) > y.stride(b); });
    const auto place = std::find(dims.begin(), dims.end(), channel_dim);
    // One channel alone stands anywhere: in front of all others, it leaves the longest runs.
    if (y.size(channel_dim) != 1) outer.assign(dims.begin(), place);
    if (y.size(channel_dim) == 1) inner.assign(dims.begin(), place);
    inner.insert(inner.end(), place + 1, dims.end());
  }

  static int64_t count(const Tensor& t, const std::vector<int64_t>& dims) {
    int64_t product = 1;
    for (const int64_t d : dims) product *= t.size(d);
    return product;
  }

  // Whether elements along these dimensions stand at multiples of the last one's stride.
  static bool collapses(const Tensor& t, const std::vector<int64_t>& dims) {
    for (size_t k = 1; k < dims.size(); ++k) {
      if (t.stride(dims[k - 1]) != t.stride(dims[k]) * t.size(dims[k])) return false;
    }
    return true;
  }

  bool fits(const Tensor& t) const {
    if (!collapses(t, outer) || !collapses(t, inner)) return false;
    if (!inner.empty()) return t.stride(inner.back()) == 1;
    return t.size(channel) == 1 || t.stride(channel) == 1;
  }

  View view(const Tensor& t) const {
    return {const_cast<void*>(t.const_data_ptr()), outer.empty() ? 0 : t.stride(outer.back()),
            inner.empty() ? 1 : t.stride(channel)};
  }
};

// What an engine runs. `kept` owns copies of tensors whose strides a View can't express.
struct RationalCall {
  Problem problem = {};
  Order order;
  Tensor y;  // of the result's layout; also x's gradient
  Tensors kept;

  View view(const Tensor& t) {
    if (order.fits(t)) return order.view(t);
    Tensor copy = new_like(y);
    torch::stable::copy_(copy, t);
    kept.push_back(copy);
    return order.view(kept.back());
  }
};

inline Table table_of(const char* op, const char* role, const Tensor& t, const Tensor& x, int64_t rows, int64_t fewest,
                      int64_t most) {
  check_device(op, role, t, x);
  check_memory(op, role, t);
  const int64_t columns = t.size(t.dim() - 1);
  if (!t.is_contiguous() || columns < fewest || columns > most) {
    fail(op, "a contiguous ", role, " of ", fewest, " to ", most, " columns; got shape ", shape_of(t),
         ". Call .contiguous(), or choose other degrees.");
  }
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(op, role, t), rows, columns};
}

inline void check_like_x(const RationalArguments& a, const char* role, const Tensor& t) {
  check_device(a.op, role, t, a.x);
  if (!same_shape(t, a.x) || t.scalar_type() != a.x.scalar_type()) {
    fail(a.op, role, " of x's shape and dtype, ", shape_of(a.x), "; got ", shape_of(t), " of ",
         torch::headeronly::toString(t.scalar_type()), ". Convert it.");
  }
  check_memory(a.op, role, t);
}

inline void check_tables(const RationalArguments& a, int64_t channels) {
  if (a.numerator.dim() != 2 || a.denominator.dim() != 2) {
    fail(a.op, "numerator and denominator of two dimensions; got ", shape_of(a.numerator), " and ",
         shape_of(a.denominator), ". Pass (groups, coefficients).");
  }
  const int64_t rows = a.numerator.size(0), other = a.denominator.size(0);
  const int64_t groups = std::max(rows, other);
  if (groups < 1 || (rows != 1 && rows != groups) || (other != 1 && other != groups) || channels % groups != 0) {
    fail(a.op, "groups that divide the ", channels, " channels, and as many in both tables or one; got ", rows, " and ",
         other, ". Change the groups.");
  }
}

inline RationalCall rational_call(const RationalArguments& a) {
  if (a.channel_dim < -a.x.dim() || a.channel_dim >= a.x.dim()) {
    fail(a.op, "channel_dim among x's ", a.x.dim(), " dimensions; got ", a.channel_dim, ". Count from 0 or from -1.");
  }
  const int64_t channel_dim = a.channel_dim < 0 ? a.channel_dim + a.x.dim() : a.channel_dim;
  const int64_t channels = a.x.size(channel_dim);
  if (a.form < 0 || a.form > 3) fail(a.op, "form 0 to 3; got ", a.form, ". Choose one.");
  if (!(a.dropout >= 0.0 && a.dropout < 1.0)) fail(a.op, "0 <= dropout < 1; got ", a.dropout, ". Choose one.");
  check_tables(a, channels);

  Tensor y = new_like(a.x);
  RationalCall call{{}, Order(y, channel_dim), y, {}};
  Problem& p = call.problem;
  p.outer = Order::count(y, call.order.outer);
  p.channels = channels;
  p.inner = Order::count(y, call.order.inner);
  p.dtype = dtype_of(a.op, "x", a.x);
  check_memory(a.op, "x", a.x);
  p.form = static_cast<rational::Form>(a.form);
  p.dropout_threshold = std::min(static_cast<uint32_t>(a.dropout * 65536.0 + 0.5), 65535u);
  const int64_t constant = p.form == rational::Form::kC ? 1 : 0;
  p.numerator = table_of(a.op, "numerator", a.numerator, a.x, a.numerator.size(0), 2, rational::kMaxNumerator + 1);
  p.denominator = table_of(a.op, "denominator", a.denominator, a.x, a.denominator.size(0), 1 + constant,
                           rational::kMaxDenominator + constant);
  if (a.bias.has_value()) {
    if (a.bias->dim() != 1) fail(a.op, "a bias of one dimension; got ", shape_of(*a.bias), ". Flatten it.");
    p.bias = table_of(a.op, "bias", *a.bias, a.x, 1, channels, channels);
  }
  p.x = call.view(a.x);
  if (a.gate.has_value()) {
    check_like_x(a, "gate", *a.gate);
    p.gate = call.view(*a.gate);
  }
  if (a.seed.has_value()) check_memory(a.op, "seed", *a.seed);
  if (p.needs_seed()) {
    if (!a.seed.has_value() || a.seed->numel() != 1 || a.seed->scalar_type() != ScalarType::Long) {
      fail(a.op, "a seed of one int64 for form D and for dropout; got ", a.seed.has_value() ? "another" : "none",
           ". Pass torch.tensor([number]).");
    }
    check_device(a.op, "seed", *a.seed, a.x);
    p.seed = static_cast<const int64_t*>(a.seed->const_data_ptr());
  }
  p.y = call.order.view(y);
  return call;
}

using RationalGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Table like_table(const Table& table, const Tensor& t) {
  return {t.data_ptr(), table.dtype, table.rows, table.columns};
}

// Allocates the gradients and enters them into the call.
inline RationalGradients rational_gradients(const RationalArguments& a, const Tensor& grad, RationalCall& call) {
  check_like_x(a, "grad", grad);
  Problem& p = call.problem;
  RationalGradients result{call.y, new_like(a.numerator), new_like(a.denominator),
                           a.bias.has_value() ? new_like(*a.bias) : new_tensor(a.x, {0}, a.x.scalar_type()),
                           a.gate.has_value() ? new_like(a.x) : new_tensor(a.x, {0}, a.x.scalar_type())};
  p.grad = call.view(grad);
  p.grad_x = p.y;
  p.grad_numerator = like_table(p.numerator, std::get<1>(result));
  p.grad_denominator = like_table(p.denominator, std::get<2>(result));
  if (a.bias.has_value()) p.grad_bias = like_table(p.bias, std::get<3>(result));
  if (a.gate.has_value()) p.grad_gate = call.order.view(std::get<4>(result));
  return result;
}

template <class Backend>
Tensor rational_forward(Tensor x, Tensor numerator, Tensor denominator, std::optional<Tensor> bias,
                        std::optional<Tensor> gate, int64_t form, int64_t channel_dim, double dropout,
                        std::optional<Tensor> seed) {
  const Backend on("rational", x);
  const RationalCall call =
      rational_call({"rational", x, numerator, denominator, bias, gate, form, channel_dim, dropout, seed});
  rational::forward(call.problem, on.where());
  return call.y;
}

template <class Backend>
RationalGradients rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator,
                                    std::optional<Tensor> bias, std::optional<Tensor> gate, int64_t form,
                                    int64_t channel_dim, double dropout, std::optional<Tensor> seed) {
  const Backend on("rational_backward", x);
  const RationalArguments arguments = {"rational_backward", x,       numerator, denominator, bias, gate, form,
                                       channel_dim,         dropout, seed};
  RationalCall call = rational_call(arguments);
  const RationalGradients result = rational_gradients(arguments, grad, call);
  rational::backward(call.problem, on.where());
  return result;
}

template <class Backend, class Library>
void register_rational(Library& m) {
  m.impl("rational", TORCH_BOX(&rational_forward<Backend>));
  m.impl("rational_backward", TORCH_BOX(&rational_backward<Backend>));
}

}  // namespace singlepass::registration
