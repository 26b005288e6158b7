// SPDX-License-Identifier: Apache-2.0
#include "stepper.h"

#include <limits>
#include <type_traits>

#include "optim/grad_norm.h"
#include "optim/rules.h"
#include "optim/step.h"

namespace singlepass::pybind {
namespace {

template <class Rule>
typename Rule::Hyper hyper_from(const py::tuple& values) {
  if (values.size() != std::tuple_size_v<typename Rule::HyperTypes>)
    throw py::value_error(std::string(Rule::kName) + ": expected " +
                          std::to_string(std::tuple_size_v<typename Rule::HyperTypes>) + " hyperparameters; got " +
                          std::to_string(values.size()) + ". Pass them in the order of the rule's Hyper.");
  return std::apply([](auto... value) { return typename Rule::Hyper{value...}; },
                    values.cast<typename Rule::HyperTypes>());
}

// The variant of a rule that keeps a maximum has a name of its own here.
template <class Rule>
std::string name_of() {
  if constexpr (requires { typename Rule::Plain; }) {
    if (!std::is_same_v<Rule, typename Rule::Plain>) return std::string(Rule::kName) + "_amsgrad";
  }
  return Rule::kName;
}

template <class Rule>
RuleEntry entry() {
  return {name_of<Rule>(),
          Rule::kStates,
          Rule::kScaled,
          optim::kHasNorms<Rule>,
          [](const std::vector<optim::TensorRecord>& records, const py::tuple& hyper, const optim::StepOptions& options,
             const ParallelFor& parallel_for) {
            optim::step<Rule>(records, hyper_from<Rule>(hyper), options, parallel_for);
          },
          [](const optim::DeviceTable& table, const py::tuple& hyper, const optim::StepOptions& options,
             const Gpu& gpu) { optim::step<Rule>(table, hyper_from<Rule>(hyper), options, gpu); }};
}

const RuleEntry& find_rule(const std::string& name) {
  for (const RuleEntry& rule : rules())
    if (rule.name == name) return rule;
  throw py::value_error("Stepper: expected a rule of singlepass_core.rules(); got '" + name + "'. Check its spelling.");
}

optim::DeviceTable upload(const std::vector<optim::TensorRecord>& records, int states, const Placement& placement,
                          const Gpu& gpu) {
  const optim::HostTable table = optim::make_table(records, states, {placement.threads, placement.chunk});
  void* const workspace = gpu.allocate(table.workspace_size);
  optim::upload_table(table, workspace, gpu);
  return optim::place_table(table, workspace);
}

}  // namespace

const std::vector<RuleEntry>& rules() {
#define SINGLEPASS_ENTRY(...) entry<__VA_ARGS__>(),
  static const std::vector<RuleEntry> rules = {SINGLEPASS_FOR_EACH_RULE(SINGLEPASS_ENTRY)};
#undef SINGLEPASS_ENTRY
  return rules;
}

Stepper::Stepper(const std::string& rule, Placement placement, const std::vector<py::array>& params,
                 const std::vector<py::array>& grads, const std::vector<std::vector<py::array>>& states,
                 const std::vector<float>& scales, const std::vector<std::uint32_t>& ids, Misalignment misalignment)
    : rule_(find_rule(rule)), placement_(std::move(placement)) {
  placement_.check();
  const std::size_t count = params.size();
  if (grads.size() != count || states.size() != count || ids.size() != count ||
      scales.size() != (rule_.scaled ? count : 0))
    throw py::value_error(
        "Stepper: expected one gradient, list of states, id and, for a scaled rule, scale per parameter.");
  const auto [param_offset, grad_offset, state_offset] = misalignment;
  for (std::size_t t = 0; t < count; ++t) {
    params_.emplace_back(params[t], param_offset);
    grads_.emplace_back(grads[t], grad_offset);
    states_.emplace_back();
    steps_.emplace_back();
    if (rule_.scaled) scales_.emplace_back(scales[t]);
    optim::TensorRecord record = {};
    record.param = params_[t].data();
    record.grad = grads_[t].data();
    record.step = steps_[t].get();
    record.scale = rule_.scaled ? scales_[t].get() : nullptr;
    record.numel = params_[t].numel();
    record.id = ids[t];
    record.param_dtype = params_[t].dtype();
    record.grad_dtype = grads_[t].dtype();
    bool sizes_match = grads_[t].numel() == record.numel && states[t].size() == static_cast<std::size_t>(rule_.states);
    for (std::size_t k = 0; sizes_match && k < states[t].size(); ++k) {
      const DeviceArray& state = states_[t].emplace_back(states[t][k], state_offset);
      record.state[k] = state.data();
      record.state_dtype[k] = state.dtype();
      sizes_match = state.numel() == record.numel;
    }
    if (!sizes_match)
      throw py::value_error("Stepper: expected " + std::to_string(rule_.states) +
                            " states, and a gradient and states of their parameter's size, at index " +
                            std::to_string(t) + ".");
    records_.push_back(record);
  }
  if (placement_.device == "simt") table_ = upload(records_, rule_.states, placement_, gpu_.where("Stepper"));
}

void Stepper::set_grads(const std::vector<py::array>& grads) {
  if (grads.size() != grads_.size()) throw py::value_error("Stepper.set_grads: expected one gradient per parameter.");
  for (std::size_t t = 0; t < grads.size(); ++t) grads_[t].assign(grads[t]);
}

void Stepper::step(const py::tuple& hyper, double lr, bool lr_on_device, std::optional<float> grad_scale,
                   std::optional<float> found_inf, std::uint64_t seed, bool maximize, bool stochastic_rounding) {
  const DeviceFloat device_lr(static_cast<float>(lr)), device_scale(grad_scale.value_or(1.0f)),
      device_found_inf(found_inf.value_or(0.0f));
  optim::StepOptions options = {};
  // Where the device holds the rate, the host's must not matter.
  options.lr = lr_on_device ? optim::Scalar{std::numeric_limits<double>::quiet_NaN(), device_lr.get()}
                            : optim::Scalar{lr, nullptr};
  options.grad_scale = grad_scale ? device_scale.get() : nullptr;
  options.found_inf = found_inf ? device_found_inf.get() : nullptr;
  options.seed = seed;
  options.maximize = maximize;
  options.stochastic_rounding = stochastic_rounding;
  if (table_) {
    rule_.step_on_gpu(*table_, hyper, options, gpu_.where("Stepper"));
  } else {
    rule_.step_on_cpu(records_, hyper, options, parallel_for(placement_.workers));
  }
  if (!device_lr.intact() || !device_scale.intact() || !device_found_inf.intact()) guards_overwritten("scalars");
  check_guards();
}

void Stepper::check_guards() const {
  for (std::size_t t = 0; t < params_.size(); ++t) {
    if (!params_[t].intact()) guards_overwritten("parameters");
    if (!grads_[t].intact()) guards_overwritten("gradients");
    if (!steps_[t].intact()) guards_overwritten("steps");
    for (const DeviceArray& state : states_[t])
      if (!state.intact()) guards_overwritten("states");
  }
  gpu_.check_guards();
}

std::vector<py::array> Stepper::params() const {
  std::vector<py::array> arrays;
  for (const DeviceArray& param : params_) arrays.push_back(param.to_numpy());
  return arrays;
}

std::vector<py::array> Stepper::grads() const {
  std::vector<py::array> arrays;
  for (const DeviceArray& grad : grads_) arrays.push_back(grad.to_numpy());
  return arrays;
}

std::vector<std::vector<py::array>> Stepper::states() const {
  std::vector<std::vector<py::array>> arrays(states_.size());
  for (std::size_t t = 0; t < states_.size(); ++t)
    for (const DeviceArray& state : states_[t]) arrays[t].push_back(state.to_numpy());
  return arrays;
}

std::vector<float> Stepper::steps() const {
  std::vector<float> values;
  for (const DeviceFloat& step : steps_) values.push_back(*step.get());
  return values;
}

std::tuple<float, float, float> grad_norm(Placement placement, const std::vector<py::array>& grads, double max_norm,
                                          double eps, std::optional<float> grad_scale, int misalignment) {
  placement.check();
  std::deque<DeviceArray> arrays;
  std::vector<optim::TensorRecord> records;
  for (const py::array& grad : grads) {
    const DeviceArray& array = arrays.emplace_back(grad, misalignment);
    optim::TensorRecord record = {};
    record.grad = array.data();
    record.grad_dtype = array.dtype();
    record.numel = array.numel();
    records.push_back(record);
  }
  const DeviceFloat device_scale(grad_scale.value_or(1.0f));
  const optim::ClipOptions options = {max_norm, eps, grad_scale ? device_scale.get() : nullptr};
  simt::GuardedMemory result(sizeof(optim::GradNorm));
  auto* norm = reinterpret_cast<optim::GradNorm*>(result.data());
  if (placement.device == "simt") {
    SimtGpu gpu;
    optim::grad_norm(upload(records, 0, placement, gpu.where("grad_norm")), options, norm, gpu.where("grad_norm"));
    gpu.check_guards();
  } else {
    optim::grad_norm(records, options, norm, parallel_for(placement.workers));
  }
  if (!result.intact()) guards_overwritten("results");
  return {norm->norm, norm->divisor, norm->found_inf};
}

}  // namespace singlepass::pybind
