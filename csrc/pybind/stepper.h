// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "optim/device_table.h"
#include "placement.h"

namespace singlepass::pybind {

// One optimizer rule, its engines' entry points without its type.
struct RuleEntry {
  std::string name;
  int states;
  bool scaled, norms;
  void (*step_on_cpu)(const std::vector<optim::TensorRecord>&, const py::tuple& hyper, const optim::StepOptions&,
                      const ParallelFor&);
  void (*step_on_gpu)(const optim::DeviceTable&, const py::tuple& hyper, const optim::StepOptions&, const Gpu&);
};

const std::vector<RuleEntry>& rules();

// Where the tensors of a Stepper lie, in elements past an aligned address: parameters, gradients, states.
using Misalignment = std::tuple<int, int, int>;

// Parameters with their gradients and states in guarded memory, and what it takes to run steps over them. The table is
// uploaded once, as an optimizer does, so that many steps share it.
class Stepper {
 public:
  Stepper(const std::string& rule, Placement placement, const std::vector<py::array>& params,
          const std::vector<py::array>& grads, const std::vector<std::vector<py::array>>& states,
          const std::vector<float>& scales, const std::vector<std::uint32_t>& ids, Misalignment misalignment);

  void set_grads(const std::vector<py::array>& grads);

  void step(const py::tuple& hyper, double lr, bool lr_on_device, std::optional<float> grad_scale,
            std::optional<float> found_inf, std::uint64_t seed, bool maximize, bool stochastic_rounding);

  std::vector<py::array> params() const;
  std::vector<py::array> grads() const;
  std::vector<std::vector<py::array>> states() const;
  std::vector<float> steps() const;

 private:
  void check_guards() const;

  const RuleEntry& rule_;
  Placement placement_;
  std::deque<DeviceArray> params_, grads_;
  std::deque<std::deque<DeviceArray>> states_;
  std::deque<DeviceFloat> steps_, scales_;
  std::vector<optim::TensorRecord> records_;
  SimtGpu gpu_;
  std::optional<optim::DeviceTable> table_;
};

// (norm, divisor, found_inf) of one read of the gradients.
std::tuple<float, float, float> grad_norm(Placement placement, const std::vector<py::array>& grads, double max_norm,
                                          double eps, std::optional<float> grad_scale, int misalignment);

}  // namespace singlepass::pybind
