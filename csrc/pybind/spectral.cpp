// SPDX-License-Identifier: Apache-2.0
#include "spectral.h"

#include <pybind11/stl.h>

#include <cmath>
#include <deque>
#include <limits>
#include <optional>
#include <tuple>

#include "placement.h"
#include "spectral/lorentz.h"
#include "spectral/problem.h"
#include "spectral/step.h"

namespace singlepass::pybind {
namespace {

using Arrays = std::vector<py::array>;

// How and on what an op runs: `blocks` of a product, `held` elements of a step's row, and how far past an aligned
// address arrays lie, in elements.
struct SpectralOptions {
  Placement placement;
  int64_t blocks, held;
  int misalignment;

  bool simt() const { return placement.device == "simt"; }
  ParallelFor workers() const { return parallel_for(placement.workers); }
};

// Arrays that an op works on, in guarded memory.
class Arena {
 public:
  explicit Arena(const SpectralOptions& options) : misalignment_(options.misalignment) { options.placement.check(); }

  const DeviceArray& add(const py::array& array) { return arrays_.emplace_back(array, misalignment_); }

  // Null where there is none.
  DeviceFloat* add(std::optional<float> value) { return value ? &floats_.emplace_back(*value) : nullptr; }

  Gpu where(const char* op) { return gpu_.where(op); }

  void check_guards() const {
    for (const DeviceArray& array : arrays_)
      if (!array.intact()) guards_overwritten("tensors");
    for (const DeviceFloat& value : floats_)
      if (!value.intact()) guards_overwritten("scalars");
    gpu_.check_guards();
  }

 private:
  int misalignment_;
  std::deque<DeviceArray> arrays_;
  std::deque<DeviceFloat> floats_;
  SimtGpu gpu_;
};

py::array floats(int64_t count) {
  return py::array_t<float>(count);
}

std::tuple<py::array, py::array> spectral_scale(const py::array& q, const py::array& t, const py::array& s,
                                                const SpectralOptions& options) {
  Arena arena(options);
  const DeviceArray &device_q = arena.add(q), &device_t = arena.add(t), &sums = arena.add(floats(s.size()));
  spectral::Scale p = {{device_q.data(), device_q.dtype(), q.shape(1)},
                       {device_t.data(), device_t.dtype(), t.shape(1)},
                       static_cast<const float*>(arena.add(s).data()),
                       static_cast<float*>(sums.data()),
                       q.shape(0),
                       s.size()};
  if (options.simt()) {
    spectral::scale(p, arena.where("spectral_scale_"), options.blocks);
  } else {
    spectral::scale(p, options.workers());
  }
  arena.check_guards();
  return {device_q.to_numpy(), sums.to_numpy()};
}

// Tensors of a step: parameters, gradients and states.
struct StepArrays {
  Arrays params, grads, exp_avg, exp_avg_sq;
  std::vector<float> steps;
};

struct StepSettings {
  double lr;
  bool lr_on_device, project, maximize;
  std::optional<float> grad_scale, found_inf;
  std::optional<std::uint64_t> seed;  // rounds bfloat16 parameters stochastically; their ids are their positions
  int repeats;                        // steps over the same gradients and one table
};

std::tuple<Arrays, Arrays, Arrays, std::vector<float>> spectral_step(
    const StepArrays& a, const std::tuple<double, double, double, double>& hyper, const StepSettings& settings,
    const SpectralOptions& options) {
  Arena arena(options);
  std::vector<optim::TensorRecord> records;
  std::vector<const DeviceArray*> written[3];
  std::vector<DeviceFloat*> steps;
  for (std::size_t i = 0; i < a.params.size(); ++i) {
    const DeviceArray &p = arena.add(a.params[i]), &g = arena.add(a.grads[i]), &m = arena.add(a.exp_avg[i]),
                      &v = arena.add(a.exp_avg_sq[i]);
    optim::TensorRecord record = {};
    record.param = p.data();
    record.grad = g.data();
    record.state[0] = m.data();
    record.state[1] = v.data();
    steps.push_back(arena.add(std::optional<float>(a.steps[i])));
    record.step = steps.back()->get();
    record.id = static_cast<std::uint32_t>(i);
    record.numel = p.numel();
    record.columns = p.shape().size() == 2 ? p.shape()[1] : 0;
    record.param_dtype = p.dtype();
    record.grad_dtype = g.dtype();
    record.state_dtype[0] = m.dtype();
    record.state_dtype[1] = v.dtype();
    records.push_back(record);
    for (int k = 0; k < 3; ++k) written[k].push_back(k == 0 ? &p : k == 1 ? &m : &v);
  }
  DeviceFloat* const lr = arena.add(std::optional<float>(static_cast<float>(settings.lr)));
  DeviceFloat* const grad_scale = arena.add(settings.grad_scale);
  DeviceFloat* const found_inf = arena.add(settings.found_inf);
  spectral::StepOptions step = {};
  // Where the device holds the rate, the host's must not matter.
  step.shared.lr = settings.lr_on_device ? optim::Scalar{std::numeric_limits<double>::quiet_NaN(), lr->get()}
                                         : optim::Scalar{settings.lr, nullptr};
  step.shared.grad_scale = grad_scale == nullptr ? nullptr : grad_scale->get();
  step.shared.found_inf = found_inf == nullptr ? nullptr : found_inf->get();
  step.shared.maximize = settings.maximize;
  step.shared.seed = settings.seed.value_or(0);
  step.shared.stochastic_rounding = settings.seed.has_value();
  step.project = settings.project;
  const spectral::Rule::Hyper values = std::make_from_tuple<spectral::Rule::Hyper>(hyper);
  if (options.simt()) {
    const optim::LaunchShape shape = {options.placement.threads, options.placement.chunk};
    const optim::HostTable table = optim::make_table(records, spectral::Rule::kStates, shape);
    const Gpu gpu = arena.where("spectral_step_");
    void* const workspace = gpu.allocate(table.workspace_size);
    optim::upload_table(table, workspace, gpu);
    for (int i = 0; i < settings.repeats; ++i) {
      spectral::step(optim::place_table(table, workspace), values, step, gpu, options.held);
    }
  } else {
    for (int i = 0; i < settings.repeats; ++i) spectral::step(records, values, step, options.workers());
  }
  arena.check_guards();
  Arrays results[3];
  for (int k = 0; k < 3; ++k)
    for (const DeviceArray* array : written[k]) results[k].push_back(array->to_numpy());
  std::vector<float> counts;
  for (const DeviceFloat* count : steps) counts.push_back(*count->get());
  return {results[0], results[1], results[2], counts};
}

Arrays spectral_sample(const Arrays& s, const std::vector<int64_t>& ranks, const std::vector<int64_t>& ids,
                       std::uint64_t seed, std::uint64_t draw, double uniform, const SpectralOptions& options) {
  Arena arena(options);
  std::vector<spectral::Draw> layers;
  std::vector<const DeviceArray*> exchanges;
  for (std::size_t i = 0; i < s.size(); ++i) {
    const DeviceArray& values = arena.add(s[i]);
    exchanges.push_back(&arena.add(py::array_t<int64_t>(ranks[i])));
    layers.push_back({values.data(), values.dtype(), values.numel(), ranks[i], ids[i],
                      static_cast<int64_t*>(exchanges.back()->data())});
  }
  const spectral::DrawOptions draws = {seed, draw, uniform};
  if (options.simt()) {
    spectral::sample(layers, draws, arena.where("spectral_sample"), options.placement.threads);
  } else {
    spectral::sample(layers, draws, options.workers());
  }
  arena.check_guards();
  Arrays results;
  for (const DeviceArray* exchange : exchanges) results.push_back(exchange->to_numpy());
  return results;
}

// Frozen arrays of int8 have factors in `scales`; others leave theirs empty.
std::tuple<Arrays, Arrays, Arrays> spectral_swap(const Arrays& active, const Arrays& frozen, const Arrays& scales,
                                                 const Arrays& exchange, const SpectralOptions& options) {
  Arena arena(options);
  std::vector<spectral::Swap> pairs;
  std::vector<const DeviceArray*> written[3];
  for (std::size_t i = 0; i < active.size(); ++i) {
    const DeviceArray &a = arena.add(active[i]), &f = arena.add(frozen[i]), &factors = arena.add(scales[i]);
    const bool coded = frozen[i].dtype().kind() == 'i';
    pairs.push_back({a.data(), f.data(), coded ? static_cast<float*>(factors.data()) : nullptr,
                     static_cast<const int64_t*>(arena.add(exchange[i]).data()), a.dtype(),
                     coded ? DType::kFloat32 : f.dtype(), active[i].shape(0), frozen[i].shape(0),
                     active[i].ndim() == 2 ? active[i].shape(1) : 1});
    for (int k = 0; k < 3; ++k) written[k].push_back(k == 0 ? &a : k == 1 ? &f : &factors);
  }
  if (options.simt()) {
    spectral::swap(pairs, arena.where("spectral_swap_"), options.placement.threads);
  } else {
    spectral::swap(pairs, options.workers());
  }
  arena.check_guards();
  Arrays results[3];
  for (int k = 0; k < 3; ++k)
    for (const DeviceArray* array : written[k]) results[k].push_back(array->to_numpy());
  return {results[0], results[1], results[2]};
}

std::tuple<py::array, float> lorentz(const std::optional<py::array>& grad, const py::array& z, float log_scale, float k,
                                     float offset, const SpectralOptions& options) {
  Arena arena(options);
  const DeviceArray &device_z = arena.add(z), &out = arena.add(z);
  DeviceFloat* const scale = arena.add(std::optional<float>(log_scale));
  DeviceFloat* const grad_scale = arena.add(std::optional<float>(std::numeric_limits<float>::quiet_NaN()));
  const int64_t rows = z.shape(0);
  spectral::Lorentz p = {device_z.data(),
                         grad ? arena.add(*grad).data() : nullptr,
                         out.data(),
                         grad_scale->get(),
                         scale->get(),
                         device_z.dtype(),
                         std::sqrt(k),
                         offset,
                         rows,
                         z.shape(1)};
  const int threads = options.placement.threads;
  if (options.simt()) {
    const Gpu gpu = arena.where("lorentz");
    grad ? spectral::lorentz_backward(p, gpu, threads) : spectral::lorentz(p, gpu, threads);
  } else {
    grad ? spectral::lorentz_backward(p, options.workers()) : spectral::lorentz(p, options.workers());
  }
  arena.check_guards();
  return {out.to_numpy(), *grad_scale->get()};
}

void define_step(py::module_& m) {
  py::class_<StepArrays>(m, "SpectralTensors", "Parameters, gradients and states of a step.")
      .def(py::init<Arrays, Arrays, Arrays, Arrays, std::vector<float>>(), py::arg("params"), py::arg("grads"),
           py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("steps"));
  py::class_<StepSettings>(m, "SpectralStep", "What a step is to do.")
      .def(py::init<double, bool, bool, bool, std::optional<float>, std::optional<float>, std::optional<std::uint64_t>,
                    int>(),
           py::arg("lr"), py::kw_only(), py::arg("lr_on_device"), py::arg("project"), py::arg("maximize"),
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("seed"), py::arg("repeats"));
  m.def("spectral_step", &spectral_step, py::arg("tensors"), py::arg("hyper"), py::arg("settings"), py::arg("options"),
        "Parameters, both states and steps, of copies of the tensors.");
}

}  // namespace

void define_spectral(py::module_& m) {
  py::class_<SpectralOptions>(m, "SpectralOptions", "How and on what an op of sparse spectral training runs.")
      .def(py::init([](const std::string& device, int threads, int chunk, int workers, int64_t blocks, int64_t held,
                       int misalignment) {
             return SpectralOptions{{device, threads, chunk, workers}, blocks, held, misalignment};
           }),
           py::arg("device"), py::kw_only(), py::arg("threads"), py::arg("chunk"), py::arg("workers"),
           py::arg("blocks"), py::arg("held"), py::arg("misalignment"));
  m.def("spectral_scale", &spectral_scale, py::arg("q"), py::arg("t"), py::arg("s"), py::arg("options"),
        "A copy of q (tokens, pitch) whose columns are scaled, and the column sums of q * t.");
  define_step(m);
  m.def("spectral_sample", &spectral_sample, py::arg("s"), py::arg("ranks"), py::arg("ids"), py::arg("seed"),
        py::arg("draw"), py::arg("uniform"), py::arg("options"), "What comes to each active place of each layer.");
  m.def("spectral_swap", &spectral_swap, py::arg("active"), py::arg("frozen"), py::arg("scales"), py::arg("exchange"),
        py::arg("options"), "Copies of active and frozen rows and of factors, exchanged.");
  m.def("lorentz", &lorentz, py::arg("grad"), py::arg("z"), py::arg("log_scale"), py::arg("k"), py::arg("offset"),
        py::arg("options"), "The map, or with `grad` the gradients of z and of log_scale.");
}

}  // namespace singlepass::pybind
