// SPDX-License-Identifier: Apache-2.0
#include "rational.h"

#include <pybind11/stl.h>

#include <deque>
#include <optional>

#include "placement.h"
#include "rational/problem.h"

namespace singlepass::pybind {
namespace {

using rational::Problem;
using OptionalArray = std::optional<py::array>;

// What the caller chooses beside the arrays.
struct Options {
  Placement placement;
  rational::LaunchShape shape;
  int form;
  int64_t channels, inner;
  std::uint32_t dropout_threshold;
  std::int64_t seed;
  int misalignment;
};

// A problem over guarded memory. Arrays of x's kind are (outer, pitch): each row holds channels * inner elements, and a
// gap that nothing may touch.
class Call {
 public:
  Call(const py::array& x, const py::array& numerator, const py::array& denominator, const OptionalArray& bias,
       const OptionalArray& gate, const Options& options)
      : options_(options), seed_(sizeof(std::int64_t)) {
    options.placement.check();
    *reinterpret_cast<std::int64_t*>(seed_.data()) = options.seed;
    problem.outer = x.shape(0);
    problem.channels = options.channels;
    problem.inner = options.inner;
    problem.dtype = dtype_of(x);
    problem.form = static_cast<rational::Form>(options.form);
    problem.numerator = table(numerator);
    problem.denominator = table(denominator);
    if (bias) problem.bias = table(*bias);
    problem.x = view(x);
    if (gate) problem.gate = view(*gate);
    problem.seed = reinterpret_cast<const std::int64_t*>(seed_.data());
    problem.dropout_threshold = options.dropout_threshold;
  }

  rational::View view(const py::array& array) {
    if (array.ndim() != 2 || array.shape(1) < options_.channels * options_.inner)
      throw py::value_error("rational: expected arrays of shape (outer, pitch), pitch >= channels * inner.");
    return {add(array, options_.misalignment).data(), array.shape(1), options_.inner};
  }

  rational::Table table(const py::array& array) {
    const int64_t rows = array.ndim() == 2 ? array.shape(0) : 1;
    return {add(array, 0).data(), dtype_of(array), rows, array.shape(array.ndim() - 1)};
  }

  // A result of the kind of `array`, which gives it its first contents.
  const DeviceArray& add(const py::array& array, int misalignment) { return arrays_.emplace_back(array, misalignment); }

  py::array last() const { return arrays_.back().to_numpy(); }
  py::array at(std::size_t i) const { return arrays_[i].to_numpy(); }
  std::size_t count() const { return arrays_.size(); }

  void forward() {
    if (options_.placement.device == "simt") {
      rational::forward(problem, SimtGpu().where("rational"), options_.shape);
    } else {
      rational::forward(problem, parallel_for(options_.placement.workers));
    }
    check_guards();
  }

  void backward() {
    if (options_.placement.device == "simt") {
      SimtGpu gpu;
      rational::backward(problem, gpu.where("rational_backward"), options_.shape);
      gpu.check_guards();
    } else {
      rational::backward(problem, parallel_for(options_.placement.workers));
    }
    check_guards();
  }

  Problem problem = {};

 private:
  void check_guards() const {
    for (const DeviceArray& array : arrays_)
      if (!array.intact()) guards_overwritten("tensors");
  }

  const Options options_;
  simt::GuardedMemory seed_;
  std::deque<DeviceArray> arrays_;
};

py::array rational_forward(const py::array& x, const py::array& numerator, const py::array& denominator,
                           const OptionalArray& bias, const OptionalArray& gate, const py::array& y,
                           const Options& options) {
  Call call(x, numerator, denominator, bias, gate, options);
  call.problem.y = call.view(y);
  call.forward();
  return call.last();
}

// Gradients of x, numerator, denominator and, where given, bias and gate.
std::vector<py::array> rational_backward(const py::array& grad, const py::array& x, const py::array& numerator,
                                         const py::array& denominator, const OptionalArray& bias,
                                         const OptionalArray& gate, const py::array& y, const Options& options) {
  Call call(x, numerator, denominator, bias, gate, options);
  Problem& p = call.problem;
  p.grad = call.view(grad);
  const std::size_t first = call.count();
  p.grad_x = call.view(y);
  p.grad_numerator = call.table(numerator);
  p.grad_denominator = call.table(denominator);
  if (bias) p.grad_bias = call.table(*bias);
  if (gate) p.grad_gate = call.view(y);
  call.backward();
  std::vector<py::array> grads;
  for (std::size_t i = first; i < call.count(); ++i) grads.push_back(call.at(i));
  return grads;
}

Options options(const std::string& device, int threads, int items, int blocks, int64_t partial_bytes, int workers,
                int form, int64_t channels, int64_t inner, std::uint32_t dropout_threshold, std::int64_t seed,
                int misalignment) {
  return {{device, threads, 0, workers},
          {threads, items, items, blocks, partial_bytes},
          form,
          channels,
          inner,
          dropout_threshold,
          seed,
          misalignment};
}

}  // namespace

void define_rational(py::module_& m) {
  py::class_<Options>(m, "RationalOptions", "How and on what a rational function is evaluated.")
      .def(py::init(&options), py::arg("device"), py::kw_only(), py::arg("threads"), py::arg("items"),
           py::arg("blocks"), py::arg("partial_bytes"), py::arg("workers"), py::arg("form"), py::arg("channels"),
           py::arg("inner"), py::arg("dropout_threshold"), py::arg("seed"), py::arg("misalignment"));
  m.def("rational", &rational_forward, py::arg("x"), py::arg("numerator"), py::arg("denominator"), py::arg("bias"),
        py::arg("gate"), py::arg("y"), py::arg("options"), "The result, written over a copy of `y`.");
  m.def("rational_backward", &rational_backward, py::arg("grad"), py::arg("x"), py::arg("numerator"),
        py::arg("denominator"), py::arg("bias"), py::arg("gate"), py::arg("y"), py::arg("options"),
        "Gradients of x, numerator, denominator, bias and gate; those like x written over copies of `y`.");
}

}  // namespace singlepass::pybind
