// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "optim/grad_norm.h"
#include "optim/rules.h"
#include "optim/step.h"
#include "torch/arguments.h"

// The optimizer ops: arguments are checked, and turned into records. Nothing is changed before all of them are checked.
namespace singlepass::registration {

using optim::TensorRecord;

// What an engine needs of a step. `kept` owns gradients that had to be copied to their parameters' layout.
struct Step {
  std::vector<TensorRecord> records;
  optim::StepOptions options = {};
  Tensors kept;
};

struct StepArguments {
  const std::string& op;
  const Tensors& params;
  const Tensors& grads;
  std::vector<const Tensors*> states;
  const Tensors* scales;
  const Tensors& steps;
  std::optional<int64_t> seed;
  const std::vector<int64_t>& ids;
  const std::vector<int64_t>& offsets;
};

// What steps share whose tensors are given and steps whose addresses are; `like` is any of the parameters.
struct OptionArguments {
  const std::string& op;
  const Tensor& like;
  const Tensor& lr;
  bool maximize;
  std::optional<int64_t> seed;
  const std::optional<Tensor>& grad_scale;
  const std::optional<Tensor>& found_inf;
};

inline void check_count(const StepArguments& a, const char* role, size_t count) {
  if (count != a.params.size())
    fail(a.op, "as many ", role, " as parameters, ", a.params.size(), "; got ", count, ". Pass one for each.");
}

inline void check_strided(const StepArguments& a, const char* role, const Tensor& t) {
  if (!is_strided(t)) {
    fail(a.op, "strided ", role,
         "; got a sparse one. Use torch.Tensor.to_dense, or an optimizer for sparse gradients.");
  }
}

// The gradient in the parameter's memory order.
inline const Tensor& aligned_grad(const StepArguments& a, size_t i, Step& step) {
  const Tensor& p = a.params[i];
  const Tensor& g = a.grads[i];
  check_strided(a, "gradients", g);
  check_device(a.op, "gradients", g, p);
  if (!same_shape(p, g)) {
    fail(a.op, "gradients of their parameters' shapes; got ", shape_of(g), " for ", shape_of(p), ". Reshape them.");
  }
  if (same_order(p, g)) return g;
  Tensor copy = new_like(p);
  if (copy.scalar_type() != g.scalar_type()) copy = torch::stable::to(copy, g.scalar_type());
  step.kept.push_back(torch::stable::copy_(copy, g));
  return step.kept.back();
}

inline void check_state(const StepArguments& a, const Tensor& p, const Tensor& s) {
  check_device(a.op, "states", s, p);
  if (!same_shape(p, s) || !same_order(p, s)) {
    fail(a.op, "states of their parameters' shapes and strides; got ", shape_of(s), " for ", shape_of(p),
         ", or other strides. Create states by torch.zeros_like(parameter).");
  }
}

inline float* scalar_of_tensor(const StepArguments& a, const char* role, const Tensors& list, size_t i) {
  const float* value = scalar_pointer(a.op, role, std::optional<Tensor>(list[i]), a.params[i]);
  return const_cast<float*>(value);
}

inline optim::Scalar lr_of(const OptionArguments& a) {
  if (a.lr.numel() != 1) fail(a.op, "lr as one number; got ", a.lr.numel(), ". Use a tensor of no dimensions.");
  check_memory(a.op, "lr", a.lr);
  if (!a.lr.is_cpu()) return {0.0, scalar_pointer(a.op, "lr", std::optional<Tensor>(a.lr), a.like)};
  if (a.lr.scalar_type() == ScalarType::Double) return {*static_cast<const double*>(a.lr.const_data_ptr()), nullptr};
  if (a.lr.scalar_type() == ScalarType::Float) return {*static_cast<const float*>(a.lr.const_data_ptr()), nullptr};
  fail(a.op, "lr of float32 or float64; got ", torch::headeronly::toString(a.lr.scalar_type()), ". Convert it.");
}

inline optim::StepOptions options_of(const OptionArguments& a) {
  optim::StepOptions options = {};
  options.lr = lr_of(a);
  options.grad_scale = scalar_pointer(a.op, "grad_scale", a.grad_scale, a.like);
  options.found_inf = scalar_pointer(a.op, "found_inf", a.found_inf, a.like);
  options.seed = static_cast<uint64_t>(a.seed.value_or(0));
  options.maximize = a.maximize;
  options.stochastic_rounding = a.seed.has_value();
  return options;
}

// Zeros, padding too: records are compared byte by byte.
inline std::vector<TensorRecord> empty_records(size_t count) {
  std::vector<TensorRecord> records(count);
  if (count > 0) std::memset(static_cast<void*>(records.data()), 0, count * sizeof(TensorRecord));
  return records;
}

inline Step make_step(const StepArguments& a) {
  Step step;
  check_count(a, "gradients", a.grads.size());
  for (const Tensors* list : a.states) check_count(a, "states", list->size());
  if (a.scales != nullptr) check_count(a, "scales", a.scales->size());
  if (!a.steps.empty() || a.seed.has_value()) check_count(a, "steps", a.steps.size());
  if (a.seed.has_value()) check_count(a, "ids", a.ids.size());
  if (a.seed.has_value() && !a.offsets.empty()) check_count(a, "offsets", a.offsets.size());

  step.records = empty_records(a.params.size());
  step.kept.reserve(a.params.size());
  for (size_t i = 0; i < a.params.size(); ++i) {
    const Tensor& p = a.params[i];
    TensorRecord& r = step.records[i];
    check_strided(a, "parameters", p);
    check_device(a.op, "parameters", p, a.params[0]);
    if (!is_dense(p)) {
      fail(a.op, "dense parameters without overlap; got strides that leave gaps. Use backend=\"eager\".");
    }
    const Tensor& g = aligned_grad(a, i, step);
    check_memory(a.op, "parameters", p);
    check_memory(a.op, "gradients", g);
    r.param = p.data_ptr();
    r.grad = g.data_ptr();
    r.numel = p.numel();
    r.param_dtype = dtype_of(a.op, "parameters", p);
    r.grad_dtype = dtype_of(a.op, "gradients", g);
    for (size_t k = 0; k < a.states.size(); ++k) {
      const Tensor& s = (*a.states[k])[i];
      check_state(a, p, s);
      check_memory(a.op, "states", s);
      r.state[k] = s.data_ptr();
      r.state_dtype[k] = dtype_of(a.op, "states", s);
    }
    if (a.scales != nullptr) r.scale = scalar_of_tensor(a, "scales", *a.scales, i);
    if (!a.steps.empty()) r.step = scalar_of_tensor(a, "steps", a.steps, i);
    if (a.seed.has_value()) {
      r.id = static_cast<uint32_t>(a.ids[i]);
      r.offset = a.offsets.empty() ? 0 : a.offsets[i];
      if (r.offset < 0) {
        fail(a.op, "offsets of 0 or more; got ", r.offset, ". Count elements from the whole tensor's first.");
      }
    }
  }
  return step;
}

// The address of a tensor, from what stands for it.
using Reader = void* (*)(void*);

// The tensors of a step as whoever calls keeps them: list after list, as many in each as `layout` has columns.
class Addresses {
 public:
  Addresses(const std::string& op, int64_t tensors, const Tensor& layout, int64_t reader)
      : words_(reinterpret_cast<void* const*>(tensors)), reader_(reinterpret_cast<Reader>(reader)) {
    const bool fits = layout.is_cpu() && layout.scalar_type() == ScalarType::Long && layout.dim() == 2 &&
                      layout.size(0) == kRows && layout.is_contiguous();
    if (!fits) {
      fail(op, "a contiguous int64 layout of shape (", int{kRows}, ", tensors) on the CPU; got ",
           torch::headeronly::toString(layout.scalar_type()), " of shape ", shape_of(layout), ". Pass lists instead.");
    }
    layout_ = static_cast<const int64_t*>(layout.const_data_ptr());
    count_ = layout.size(1);
  }

  // As make_step: parameters, gradients, `states` states, scales if `scaled`, steps if `counted`.
  std::vector<TensorRecord> records(const std::string& op, int states, bool scaled, bool counted) const {
    std::vector<TensorRecord> records = empty_records(count_);
    for (int64_t i = 0; i < count_; ++i) {
      TensorRecord& r = records[i];
      int64_t list = 0;
      r.numel = row(kElements)[i];
      const auto next = [&](int64_t elements) { return at(op, list++, i, elements); };
      r.param = next(r.numel);
      r.grad = next(r.numel);
      for (int k = 0; k < states; ++k) r.state[k] = next(r.numel);
      if (scaled) r.scale = static_cast<const float*>(next(1));
      if (counted) r.step = static_cast<float*>(next(1));
      r.id = static_cast<uint32_t>(row(kIds)[i]);
      r.offset = row(kOffsets)[i];
      const uint64_t dtypes = static_cast<uint64_t>(row(kDTypes)[i]);
      r.param_dtype = static_cast<DType>(dtypes & 0xff);
      r.grad_dtype = static_cast<DType>(dtypes >> 8 & 0xff);
      for (int k = 0; k < states; ++k) r.state_dtype[k] = static_cast<DType>(dtypes >> (16 + 8 * k) & 0xff);
    }
    return records;
  }

 private:
  enum { kElements, kIds, kOffsets, kDTypes, kRows };

  const int64_t* row(int which) const { return layout_ + which * count_; }

  void* at(const std::string& op, int64_t list, int64_t i, int64_t elements) const {
    void* const word = words_[list * count_ + i];
    void* const address = reader_ == nullptr ? word : reader_(word);
    if (address == nullptr && elements > 0) {
      fail(op, "tensors with memory; got one whose memory was freed. Call the op before that.");
    }
    return address;
  }

  void* const* words_;
  Reader reader_;
  const int64_t* layout_;
  int64_t count_;
};

// The passes to make of a rule without norms: all.
inline optim::Phase phase_of(const std::string&, const Tensor&, size_t) {
  return {};
}

// Of a rule with norms: all in phase 0, one in phases 1 and 2, where `norms` is what the first writes for the second.
inline optim::Phase phase_of(const std::string& op, const Tensor& like, size_t tensors,
                             const std::optional<Tensor>& norms, int64_t phase) {
  if (phase < 0 || phase > 2) fail(op, "phase 0, 1 or 2; got ", phase, ". Leave it at 0 for a whole step.");
  if (norms.has_value() != (phase != 0)) {
    fail(op, "norms in phases 1 and 2, and only there; got ", norms.has_value() ? "some" : "none", " in phase ", phase,
         ". Pass one tensor to both.");
  }
  if (phase == 0) return {};
  const int64_t count = static_cast<int64_t>(tensors);
  check_device(op, "norms", *norms, like);
  check_memory(op, "norms", *norms);
  if (norms->scalar_type() != ScalarType::Double || norms->dim() != 2 || norms->size(0) != count ||
      norms->size(1) != optim::kNorms || !norms->is_contiguous()) {
    fail(op, "contiguous float64 norms of shape (", count, ", ", optim::kNorms, "); got ",
         torch::headeronly::toString(norms->scalar_type()), " of shape ", shape_of(*norms), ". Use torch.empty.");
  }
  return {phase == 1, phase == 2, static_cast<double*>(norms->data_ptr())};
}

template <class Rule>
std::string op_name() {
  return std::string(Rule::kName) + "_step_";
}

template <size_t>
struct ListArgument {
  using Type = Tensors;
};

// What the schemas of rules with norms have in the end.
template <class Rule>
using PhaseTypes = std::conditional_t<optim::kHasNorms<Rule>, std::tuple<std::optional<Tensor>, int64_t>, std::tuple<>>;

template <class Rule>
inline constexpr bool kHasPlain = requires { typename Rule::Plain; };

template <class Rule>
inline constexpr size_t kLists = Rule::kStates + (Rule::kScaled ? 1 : 0);

// The op of a rule, with the argument list of its schema.
template <class Backend, class Rule, class Lists = std::make_index_sequence<kLists<Rule>>,
          class HyperTypes = typename Rule::HyperTypes, class Phased = PhaseTypes<Rule>>
struct StepOp;

template <class Backend, class Rule, size_t... K, class... H, class... P>
struct StepOp<Backend, Rule, std::index_sequence<K...>, std::tuple<H...>, std::tuple<P...>> {
  static void call(Tensors params, Tensors grads, typename ListArgument<K>::Type... lists, Tensors steps, Tensor lr,
                   H... hyper, bool maximize, std::optional<int64_t> seed, std::vector<int64_t> ids,
                   std::vector<int64_t> offsets, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                   P... phased) {
    std::vector<const Tensors*> states = {&lists...};
    const Tensors* scales = nullptr;
    if constexpr (Rule::kScaled) {
      scales = states.back();
      states.pop_back();
    }
    bool plain = false;
    if constexpr (kHasPlain<Rule>) {
      plain = states.back()->empty();
      if (plain) states.pop_back();
    }
    const std::string op = op_name<Rule>();
    Step step = make_step({op, params, grads, states, scales, steps, seed, ids, offsets});
    if (step.records.empty()) return;
    step.options = options_of({op, params[0], lr, maximize, seed, grad_scale, found_inf});
    run(op, params[0], step, phase_of(op, params[0], params.size(), phased...), plain, hyper...);
  }

  // The same for `lists` lists of tensors that are like those of a step that was checked: whoever calls answers for it.
  // Rules that may be plain count steps, so the number of lists says which are there.
  static void call_at(Tensor like, Tensor layout, Tensor lr, int64_t tensors, int64_t lists, H... hyper, int64_t reader,
                      bool maximize, std::optional<int64_t> seed, std::optional<Tensor> grad_scale,
                      std::optional<Tensor> found_inf, P... phased) {
    const std::string op = op_name<Rule>();
    constexpr int64_t kAll = 3 + static_cast<int64_t>(kLists<Rule>);
    const bool one_less = lists == kAll - 1;
    if (lists != kAll && !one_less) fail(op, kAll - 1, " or ", int64_t{kAll}, " lists; got ", lists, ". Pass tensors.");
    const bool plain = kHasPlain<Rule> && one_less;
    const int states = plain ? Rule::kStates - 1 : Rule::kStates;
    Step step;
    step.records = Addresses(op, tensors, layout, reader).records(op, states, Rule::kScaled, plain || !one_less);
    if (step.records.empty()) return;
    step.options = options_of({op, like, lr, maximize, seed, grad_scale, found_inf});
    run(op, like, step, phase_of(op, like, step.records.size(), phased...), plain, hyper...);
  }

  // `plain` where the state is missing that the rule has and its plain one has not.
  static void run(const std::string& op, const Tensor& like, const Step& step, const optim::Phase& phase,
                  [[maybe_unused]] bool plain, H... hyper) {
    const Backend on(op.c_str(), like);
    if constexpr (kHasPlain<Rule>) {
      if (plain) return run_rule<typename Rule::Plain>(on, step, {hyper...}, phase);
    }
    run_rule<Rule>(on, step, {hyper...}, phase);
  }

  template <class R>
  static void run_rule(const Backend& on, const Step& step, const typename R::Hyper& hyper, const optim::Phase& phase) {
    optim::step<R>(on.table(step.records, R::kStates), hyper, step.options, on.where(), phase);
  }
};

// Records of gradients alone.
inline std::vector<TensorRecord> grad_records(const char* op, const Tensors& grads, Tensors& kept) {
  if (grads.empty()) fail(op, "at least one gradient; got none. Leave out the call.");
  std::vector<TensorRecord> records = empty_records(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check_device(op, "gradients", grads[i], grads[0]);
    if (!is_strided(grads[i])) {
      fail(op, "strided gradients; got a sparse one. Use torch.Tensor.to_dense.");
    }
    check_memory(op, "gradients", grads[i]);
    kept.push_back(is_dense(grads[i]) ? grads[i] : torch::stable::contiguous(grads[i]));
    records[i].grad = kept[i].data_ptr();
    records[i].grad_dtype = dtype_of(op, "gradients", kept[i]);
    records[i].numel = kept[i].numel();
  }
  return records;
}

template <class Backend>
Tensor grad_squares(Tensors grads) {
  Tensors kept;
  const std::vector<TensorRecord> records = grad_records("grad_squares", grads, kept);
  const Backend on("grad_squares", grads[0]);
  Tensor result = new_tensor(grads[0], {1}, ScalarType::Double);
  optim::grad_squares(on.table(records, 0), static_cast<double*>(result.data_ptr()), on.where());
  return result;
}

template <class Backend>
Tensor grad_norm(Tensors grads, double max_norm, double eps, std::optional<Tensor> grad_scale) {
  Tensors kept;
  const std::vector<TensorRecord> records = grad_records("grad_norm", grads, kept);
  const float* scale = scalar_pointer("grad_norm", "grad_scale", grad_scale, grads[0]);
  const Backend on("grad_norm", grads[0]);
  Tensor result = new_tensor(grads[0], {3}, ScalarType::Float);
  optim::grad_norm(on.table(records, 0), {max_norm, eps, scale}, static_cast<optim::GradNorm*>(result.data_ptr()),
                   on.where());
  return result;
}

template <class Backend, class Rule, class Library>
void register_step(Library& m) {
  if constexpr (kHasPlain<Rule>) {
    if constexpr (std::is_same_v<Rule, typename Rule::Plain>) return;  // runs under the op of the rule with a maximum
  }
  m.impl(op_name<Rule>().c_str(), TORCH_BOX((&StepOp<Backend, Rule>::call)));
  m.impl((op_name<Rule>() + ".at").c_str(), TORCH_BOX((&StepOp<Backend, Rule>::call_at)));
}

template <class Backend, class Library>
void register_optim(Library& m) {
#define SINGLEPASS_REGISTER(...) register_step<Backend, __VA_ARGS__>(m);
  SINGLEPASS_FOR_EACH_RULE(SINGLEPASS_REGISTER)
#undef SINGLEPASS_REGISTER
  m.impl("grad_squares", TORCH_BOX(&grad_squares<Backend>));
  m.impl("grad_norm", TORCH_BOX(&grad_norm<Backend>));
}

}  // namespace singlepass::registration
