// SPDX-License-Identifier: Apache-2.0
// singlepass_core: the torch-free core over NumPy arrays. It tests the mathematics, the CPU engines, and the CUDA
// kernels and launchers on the CPU; no wheel carries it.
#include <pybind11/stl.h>

#include "common/dtype.h"
#include "common/philox.h"
#include "kv.h"
#include "rational.h"
#include "simt/simt.h"
#include "spectral.h"
#include "stepper.h"

namespace singlepass::pybind {
namespace {

void define_common(py::module_& m) {
  m.def("bfloat16_to_float", py::vectorize([](std::uint16_t h) { return bfloat16_to_float(h); }));
  m.def("float_to_bfloat16", py::vectorize([](float x) { return float_to_bfloat16(x); }));
  m.def("float_to_bfloat16_stochastic",
        py::vectorize([](float x, std::uint32_t random) { return float_to_bfloat16_stochastic(x, random); }),
        py::arg("x"), py::arg("random"), "Rounds up where `random`, 16 uniform bits, exceeds what is discarded.");
  m.def("float16_to_float", py::vectorize([](std::uint16_t h) { return float16_to_float(h); }));
  m.def("float_to_float16", py::vectorize([](float x) { return float_to_float16(x); }));
  m.def(
      "philox4x32",
      [](std::uint64_t key, std::uint64_t counter_low, std::uint64_t counter_high) {
        const Philox4 random = philox4x32(key, counter_low, counter_high);
        return std::vector<std::uint32_t>(random.word, random.word + 4);
      },
      py::arg("key"), py::arg("counter_low"), py::arg("counter_high"), "Philox4x32-10: four 32-bit words.");
}

void define_simt(py::module_& m) {
  m.def("set_seed", &simt::set_seed, py::arg("seed"), "Chooses the schedule of the launches that follow.");
  m.def("launches", &simt::launches, "Kernel launches since the module was loaded.");
}

void define_optim(py::module_& m) {
  m.def(
      "rules",
      [] {
        py::dict result;
        for (const RuleEntry& rule : rules()) {
          py::dict entry;
          entry["states"] = rule.states;
          entry["scaled"] = rule.scaled;
          entry["norms"] = rule.norms;
          result[rule.name.c_str()] = entry;
        }
        return result;
      },
      "The optimizer rules: number of states, whether each parameter has a scalar, whether norms come first.");

  py::class_<Stepper>(m, "Stepper",
                      "Parameters, gradients and states in guarded memory, stepped by the C++ engine (device 'cpu') or "
                      "by the CUDA launchers on the CPU (device 'simt').")
      .def(py::init([](const std::string& rule, const std::string& device, const std::vector<py::array>& params,
                       const std::vector<py::array>& grads, const std::vector<std::vector<py::array>>& states,
                       const std::vector<float>& scales, const std::vector<std::uint32_t>& ids, int threads, int chunk,
                       int workers, Misalignment misalignment) {
             return std::make_unique<Stepper>(rule, Placement{device, threads, chunk, workers}, params, grads, states,
                                              scales, ids, misalignment);
           }),
           py::arg("rule"), py::arg("device"), py::kw_only(), py::arg("params"), py::arg("grads"), py::arg("states"),
           py::arg("scales"), py::arg("ids"), py::arg("threads"), py::arg("chunk"), py::arg("workers"),
           py::arg("misalignment"))
      .def("set_grads", &Stepper::set_grads, py::arg("grads"))
      .def("step", &Stepper::step, py::arg("hyper"), py::kw_only(), py::arg("lr"), py::arg("lr_on_device") = false,
           py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none(), py::arg("seed") = 0,
           py::arg("maximize") = false, py::arg("stochastic_rounding") = false)
      .def("params", &Stepper::params)
      .def("grads", &Stepper::grads)
      .def("states", &Stepper::states)
      .def("steps", &Stepper::steps);

  m.def(
      "grad_norm",
      [](const std::string& device, const std::vector<py::array>& grads, double max_norm, double eps,
         std::optional<float> grad_scale, int threads, int chunk, int workers, int misalignment) {
        return grad_norm({device, threads, chunk, workers}, grads, max_norm, eps, grad_scale, misalignment);
      },
      py::arg("device"), py::arg("grads"), py::kw_only(), py::arg("max_norm"), py::arg("eps"), py::arg("grad_scale"),
      py::arg("threads"), py::arg("chunk"), py::arg("workers"), py::arg("misalignment"),
      "(norm, divisor, found_inf) of one read of the gradients.");
}

}  // namespace
}  // namespace singlepass::pybind

PYBIND11_MODULE(singlepass_core, m, pybind11::mod_gil_not_used()) {
  singlepass::pybind::define_common(m);
  singlepass::pybind::define_simt(m);
  singlepass::pybind::define_optim(m);
  singlepass::pybind::define_kv(m);
  singlepass::pybind::define_rational(m);
  singlepass::pybind::define_spectral(m);
}
