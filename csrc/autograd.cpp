// Gradients of the operators: their Autograd kernels. PyTorch's dispatcher calls these for plain eager mode, for each
// level of torch.func, and while torch.compile traces.
//
// Reverse mode needs no Python between forward and backward. Tensors with forward-mode tangents, and the gradient of a
// backward pass, go to the operators of derivatives.cpp where those take the call and nobody asks for a derivative of
// the result; else through the formulas in Python (fused_rnn/ops.py), which are differentiable to any order and in any
// nesting.
#include <ATen/FuncTorchTLS.h>
#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/core/AutogradState.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>

#include "cpu/plan.h"
#include "derivatives.h"
#include "ops.h"

namespace py = pybind11;

namespace fused_rnn {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Predicate>
bool any(const Predicate& holds, const Tensor& t) {
  return t.defined() && holds(t);
}
template <class Predicate>
bool any(const Predicate& holds, const OptionalTensor& t) {
  return t && any(holds, *t);
}
template <class Predicate>
bool any(const Predicate& holds, at::ArrayRef<OptionalTensor> list) {
  return std::any_of(list.begin(), list.end(), [&](const OptionalTensor& t) { return any(holds, t); });
}
template <class Predicate>
bool any(const Predicate& holds, at::TensorList list) {
  return std::any_of(list.begin(), list.end(), [&](const Tensor& t) { return any(holds, t); });
}

template <class... Tensors>
bool is_recorded(const Tensors&... tensors) {
  const auto holds = [](const Tensor& t) { return t.requires_grad(); };
  return at::GradMode::is_enabled() && (any(holds, tensors) || ...);
}

// Whether one has a tangent of forward-mode differentiation.
template <class... Tensors>
bool is_dual(const Tensors&... tensors) {
  const auto holds = [](const Tensor& t) { return t._fw_grad(0).defined(); };
  return c10::AutogradState::get_tls_state().get_fw_grad_mode() && (any(holds, tensors) || ...);
}

// The tangent of forward-mode differentiation, or none.
OptionalTensor tangent_of(const Tensor& t) {
  const Tensor tangent = t.defined() ? t._fw_grad(0) : Tensor();
  return tangent.defined() ? OptionalTensor(tangent) : std::nullopt;
}
OptionalTensor tangent_of(const OptionalTensor& t) { return t ? tangent_of(*t) : std::nullopt; }

// Whether no transform, mode or tracer is at work in this thread.
bool is_plain_mode() { return c10::impl::tls_local_dispatch_key_set().included_ == c10::default_included_set; }

// Whether transforms of torch.func around the one that this call is of take derivatives, too: of what it computes.
bool is_derived_again() {
  if (!torch_func_is_active()) return false;
  py::gil_scoped_acquire gil;
  return py::module_::import("fused_rnn.ops").attr("is_derived_again")().cast<bool>();
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Whether this backward pass is the last to read a saved CUDA tensor, which nobody has but the context and its caller.
bool is_last_use(const Tensor& saved) {
  return saved.is_cuda() && saved.numel() > 0 && saved.use_count() <= 2 && !at::GradMode::is_enabled() &&
         !torch_func_is_active() && !at::isTensorSubclassLike(saved) &&
         !torch::autograd::get_current_graph_task_keep_graph();
}

// PyTorch refuses a C++ Function at a level of torch.func, because one that calls operators in its forward would see
// all levels at once. Those here only record, at the level for which the dispatcher called the kernel, as its own do:
// in the lifetime of this object nothing is computed, and the levels are out of sight.
class Recording {
 public:
  Recording() : levels_(std::move(at::functorch::functorchTLSAccessor())) {}
  ~Recording() { at::functorch::functorchTLSAccessor() = std::move(levels_); }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

 private:
  std::unique_ptr<at::functorch::FuncTorchTLSBase> levels_;
};

// What of a call has no gradient.
struct Constants {
  const Settings::Integers settings;
  const Settings::Numbers numbers;
  const std::vector<Tensor> controls;

  Constants(Integers settings_, Numbers numbers_, at::TensorList controls_)
      : settings(settings_.begin(), settings_.end()),
        numbers(numbers_.begin(), numbers_.end()),
        controls(controls_.vec()) {}

  // With other tensors to save, before the controls.
  void record(AutogradContext* ctx, variable_list saved) const {
    saved.insert(saved.end(), controls.begin(), controls.end());
    ctx->save_for_backward(std::move(saved));
    std::vector<int64_t> integers(settings.begin(), settings.end());
    integers.push_back(int64_t(controls.size()));
    ctx->saved_data["integers"] = std::move(integers);
    if (!numbers.empty()) ctx->saved_data["numbers"] = std::vector<double>(numbers.begin(), numbers.end());
    ctx->set_materialize_grads(false);
  }

  // As they were recorded; takes the controls off what was saved.
  static Constants recorded(AutogradContext* ctx, variable_list& saved) {
    std::vector<int64_t> integers = ctx->saved_data.at("integers").toIntVector();
    const auto count = size_t(integers.back());
    integers.pop_back();
    const auto found = ctx->saved_data.find("numbers");
    const std::vector<double> numbers =
        found == ctx->saved_data.end() ? std::vector<double>() : found->second.toDoubleVector();
    Constants constants(integers, numbers, at::TensorList(saved).slice(saved.size() - count));
    saved.resize(saved.size() - count);
    return constants;
  }

  bool has_cell() const { return has_cell_state(CellKind(settings[0])); }
  // Whether there are kernels for derivatives of such a call.
  bool has_derivatives(const Tensor& input, at::TensorList params) const {
    return has_derivative_kernels(input, params, controls, settings, numbers);
  }
  bool returns_states() const { return Settings::returns_states(settings, numbers); }
};

py::object to_python(const Tensor& t) { return t.defined() ? py::cast(t) : py::none(); }
py::object to_python(const OptionalTensor& t) { return t ? to_python(*t) : py::none(); }

template <class Tensors>
py::list list_of(const Tensors& tensors) {
  py::list result;
  for (const auto& t : tensors) result.append(to_python(t));
  return result;
}

variable_list from_python(const py::object& tensors) {
  variable_list result;
  for (const py::handle& t : tensors) result.push_back(t.is_none() ? Tensor() : t.cast<Tensor>());
  return result;
}

// fused_rnn.ops.<function>(cell, settings, numbers, controls, ...), with the GIL.
template <class... Arguments>
variable_list call_formulas(const char* function, bool cell, const Constants& constants,
                            const Arguments&... arguments) {
  const auto cast = [](const auto& values) {
    py::list list;
    for (const auto& value : values) list.append(py::cast(value));
    return list;
  };
  return from_python(py::module_::import("fused_rnn.ops")
                         .attr(function)(cell, cast(constants.settings), cast(constants.numbers),
                                         list_of(constants.controls), arguments...));
}

// t where torch.autograd.grad was given several gradients at once (is_grads_batched): those are tensors of PyTorch's
// older vmap, which batches operators and knows no Function, with a level for each vmap.
const at::BatchedTensorImpl* batched(const Tensor& t) { return t.defined() ? at::maybeGetBatchedImpl(t) : nullptr; }

Tensor example_of(const Tensor& t, int64_t level, int64_t index) {
  const at::BatchedTensorImpl* impl = batched(t);
  if (!impl || impl->bdims().back().level() != level) return t;
  const int64_t dim = impl->bdims().back().dim();
  at::BatchDims others;
  for (const at::BatchDim& other : impl->bdims().slice(0, impl->bdims().size() - 1))
    others.emplace_back(other.level(), other.dim() - (other.dim() > dim ? 1 : 0));
  const Tensor value = impl->value().select(dim, index);
  return others.empty() ? value : at::makeBatched(value, others);
}

// compute(grads, true), a backward pass; of a batch of gradients for one after the other, with false. Autograd sees
// each by itself, as that vmap has it, so that what is recorded holds no batch.
template <class Compute>
variable_list for_each_example(const variable_list& grads, const Compute& compute, bool alone = true) {
  int64_t level = -1, examples = 0;
  for (const Tensor& grad : grads) {
    const at::BatchedTensorImpl* impl = batched(grad);
    if (!impl || impl->bdims().back().level() <= level) continue;
    level = impl->bdims().back().level();
    examples = impl->value().size(impl->bdims().back().dim());
  }
  if (level < 0) return compute(grads, alone);
  std::vector<variable_list> results;
  for (int64_t i = 0; i < examples; ++i) {
    variable_list one;
    for (const Tensor& grad : grads) one.push_back(example_of(grad, level, i));
    results.push_back(for_each_example(one, compute, false));
  }
  variable_list stacked;
  for (size_t r = 0; !results.empty() && r < results[0].size(); ++r) {
    variable_list all;
    for (const variable_list& result : results) all.push_back(result[r]);
    stacked.push_back(all[0].defined() ? at::addBatchDim(at::stack(all), level, 0) : Tensor());
  }
  return stacked;
}

// Which arguments need a gradient: the context counts only those that are tensors.
class Needs {
 public:
  explicit Needs(AutogradContext* ctx) : ctx_(ctx) {}
  void add(bool given) { values.push_back(given && ctx_->needs_input_grad(edge_++)); }
  std::vector<bool> values;

  c10::List<bool> list() const {
    c10::List<bool> result;
    result.reserve(values.size());
    for (const bool value : values) result.push_back(value);
    return result;
  }

 private:
  AutogradContext* ctx_;
  size_t edge_ = 0;
};

// Places of tensors among the results of a call, or among the gradients that come to them.
using Places = c10::SmallVector<size_t, 5>;

// A call along a direction: changes of input, h, c and params, of which some are none, and what the call computed.
struct Along {
  OptionalTensor input_t, h_t, c_t;
  variable_list params_t;  // (0,) for none; or empty
  const Tensor& input;
  OptionalTensor h, c;
  at::TensorList params;
  const Constants& constants;

  // changes: of input, h, c and params; undefined for none.
  static Along of(const variable_list& changes, const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                  at::TensorList params, const Constants& constants) {
    Along along{optional(changes[0]), optional(changes[1]), optional(changes[2]), {}, input, h, c, params, constants};
    const bool any_param = std::any_of(changes.begin() + 3, changes.end(), [](const Tensor& t) { return t.defined(); });
    for (size_t i = 3; any_param && i < changes.size(); ++i)
      along.params_t.push_back(changes[i].defined() ? changes[i] : at::empty({0}, input.options()));
    return along;
  }
  // Of tensors with tangents.
  static Along of_tangents(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c, at::TensorList params,
                           const Constants& constants) {
    variable_list changes;
    const auto add = [&](const OptionalTensor& tangent) { changes.push_back(tangent.value_or(Tensor())); };
    add(tangent_of(input));
    add(tangent_of(h));
    add(tangent_of(c));
    for (const Tensor& p : params) add(tangent_of(p));
    return of(changes, input, h, c, params, constants);
  }
};

// A derivative of the gradients of a call: of the results, and of the gradients of input, h, c and params.
struct BackwardAlong {
  variable_list results, gradients;
};

// The two kinds of calls. Results are `outputs` that have a gradient, the last of them only for a cell with a cell
// state, and then what is saved, of which layers return the states with a gradient where the call asks for them. A
// backward pass gets what is saved, for layers the first output before it, `kept` tensors together, and `seeds`
// gradients: of the outputs and, for layers, of those states.

struct Layers {
  using Results = ForwardResult;
  static constexpr bool is_cell = false;
  static constexpr size_t outputs = 3, kept = 4, seeds = 5;

  // Of the results that have a gradient; and of that gradient among the seeds.
  static Places with_gradient(const Constants& constants) {
    Places places{0, 1};
    if (constants.has_cell()) places.push_back(2);
    if (!constants.returns_states()) return places;
    if (constants.has_cell()) places.push_back(4);
    places.push_back(5);
    return places;
  }
  static size_t seed_of(size_t result) { return result < outputs ? result : result - 1; }

  static Results forward(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c, at::TensorList params,
                         at::TensorList controls, Integers settings, Numbers numbers, bool save) {
    return rnn_forward_operator().call(input, h, c, params, controls, settings, numbers, save);
  }
  static BackwardResult backward(const OptionalTensor* seeds, const Tensor& input, const OptionalTensor& h,
                                 const OptionalTensor& c, at::TensorList params, const Tensor* saved,
                                 const Constants& constants, const c10::List<bool>& needs, bool reuse_gates) {
    return rnn_backward_operator().call(seeds[0], seeds[1], seeds[2], seeds[3], seeds[4], input, h, c, params,
                                        constants.controls, saved[0], saved[1], saved[2], saved[3], constants.settings,
                                        constants.numbers, needs, reuse_gates);
  }
  // How output, h_n and c_n change. saved: output, gates, cells, hidden.
  static variable_list tangents(const Along& a, const Tensor* saved) {
    auto [output_t, h_n_t, c_n_t] = rnn_tangent_operator().call(
        a.input_t, a.h_t, a.c_t, a.params_t, a.input, a.h, a.c, a.params, a.constants.controls, saved[0], saved[1],
        saved[2], saved[3], a.constants.settings, a.constants.numbers);
    return {output_t, h_n_t, c_n_t};
  }
  // seeds, and how they change, of output, h_n and c_n.
  static BackwardAlong backward_tangents(const OptionalTensor* seeds, const OptionalTensor* seeds_t, const Along& a,
                                         const Tensor* saved, const c10::List<bool>& needs) {
    auto [output_t, h_n_t, c_n_t, input, h, c, params] = rnn_backward_tangent_operator().call(
        seeds[0], seeds[1], seeds[2], seeds_t[0], seeds_t[1], seeds_t[2], a.input_t, a.h_t, a.c_t, a.params_t, a.input,
        a.h, a.c, a.params, a.constants.controls, saved[0], saved[1], saved[2], saved[3], a.constants.settings,
        a.constants.numbers, needs);
    variable_list gradients{input, h, c};
    gradients.insert(gradients.end(), params.begin(), params.end());
    return {{output_t, h_n_t, c_n_t}, gradients};
  }
  // What a call computed, of all its results, as backward() and these want it.
  static variable_list saved_of(const variable_list& results) {
    return {results[0], results[3], results[4], results[5]};
  }
  static variable_list list(Results&& r) {
    auto& [output, h_n, c_n, gates, cells, hidden] = r;
    return {std::move(output), std::move(h_n), std::move(c_n), std::move(gates), std::move(cells), std::move(hidden)};
  }
  static Results results(const variable_list& r) { return {r[0], r[1], r[2], r[3], r[4], r[5]}; }
  static constexpr const char* if_changed =
      " A backward pass through a layer needs its output as it was: change a copy of it, output.clone().";
};

struct Cell {
  using Results = CellResult;
  static constexpr bool is_cell = true;
  static constexpr size_t outputs = 2, kept = 2, seeds = 2;

  static Places with_gradient(const Constants& constants) { return constants.has_cell() ? Places{0, 1} : Places{0}; }
  static size_t seed_of(size_t result) { return result; }

  static Results forward(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c, at::TensorList params,
                         at::TensorList, Integers settings, Numbers numbers, bool save) {
    return cell_forward_operator().call(input, *h, c, params, settings, numbers, save);
  }
  static BackwardResult backward(const OptionalTensor* seeds, const Tensor& input, const OptionalTensor& h,
                                 const OptionalTensor& c, at::TensorList params, const Tensor* saved,
                                 const Constants& constants, const c10::List<bool>& needs, bool) {
    return cell_backward_operator().call(seeds[0], seeds[1], input, *h, c, params, saved[0], saved[1],
                                         constants.settings, constants.numbers, needs);
  }
  // A cell's step is a stack of one layer over one step.
  static variable_list tangents(const Along& a, const Tensor* saved) {
    const variable_list of_layer = saved_of_layer(a, saved);
    const Tensor input = a.input.unsqueeze(0);
    variable_list tangents = Layers::tangents(layer(a, input), of_layer.data());
    return {tangents[0].squeeze(0), a.constants.has_cell() ? tangents[2].squeeze(0) : tangents[2]};
  }
  static BackwardAlong backward_tangents(const OptionalTensor* seeds, const OptionalTensor* seeds_t, const Along& a,
                                         const Tensor* saved, const c10::List<bool>& needs) {
    const variable_list of_layer = saved_of_layer(a, saved);
    const Tensor input = a.input.unsqueeze(0);
    const OptionalTensor of_output[] = {expand(seeds[0]), std::nullopt, expand(seeds[1])};
    const OptionalTensor of_output_t[] = {expand(seeds_t[0]), std::nullopt, expand(seeds_t[1])};
    BackwardAlong found = Layers::backward_tangents(of_output, of_output_t, layer(a, input), of_layer.data(), needs);
    for (size_t i = 0; i < 3; ++i)
      if (found.gradients[i].dim() == 3) found.gradients[i] = found.gradients[i].squeeze(0);
    const Tensor c_t = found.results[2];
    return {{found.results[0].squeeze(0), a.constants.has_cell() ? c_t.squeeze(0) : c_t}, found.gradients};
  }
  static OptionalTensor expand(const OptionalTensor& t) { return t ? OptionalTensor(t->unsqueeze(0)) : std::nullopt; }
  static Along layer(const Along& a, const Tensor& input) {
    return {expand(a.input_t), expand(a.h_t), expand(a.c_t), a.params_t, input,
            expand(a.h),       expand(a.c),   a.params,      a.constants};
  }
  // The plain recurrence keeps its h in place of gates; of the others nobody reads the output.
  static variable_list saved_of_layer(const Along& a, const Tensor* saved) {
    const Tensor nothing = at::empty({0}, a.input.options());
    if (saved_gate_count(CellKind(a.constants.settings[0])) > 0)
      return {a.h->unsqueeze(0), saved[0], saved[1], nothing};
    return {saved[0].squeeze(2), nothing, saved[1], nothing};
  }
  static variable_list saved_of(const variable_list& results) { return {results[2], results[3]}; }
  static variable_list list(Results&& r) {
    auto& [h_next, c_next, gates, cells] = r;
    return {std::move(h_next), std::move(c_next), std::move(gates), std::move(cells)};
  }
  static Results results(const variable_list& r) { return {r[0], r[1], r[2], r[3]}; }

  static constexpr const char* if_changed = "";
};

// Gradients as autograd has them: undefined where nobody asked.
variable_list list_of_gradients(BackwardResult&& result) {
  auto& [grad_input, grad_h, grad_c, grad_params] = result;
  variable_list list{std::move(grad_input), std::move(grad_h), std::move(grad_c)};
  list.insert(list.end(), std::make_move_iterator(grad_params.begin()), std::make_move_iterator(grad_params.end()));
  return list;
}

// What a forward pass computed: hidden from apply(), which takes any tensor among its arguments for an input.
struct Computed {
  variable_list results;
};

template <class Call>
class Gradient {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& h,
                               const OptionalTensor& c, at::TensorList params, const Constants& constants,
                               const Computed& computed) {
    const variable_list& results = computed.results;
    variable_list saved;
    saved.reserve(Call::kept + 3 + params.size() + constants.controls.size());
    if (!Call::is_cell) saved.push_back(results[0]);
    saved.insert(saved.end(), results.begin() + Call::outputs, results.end());
    saved.push_back(input);
    saved.push_back(h.value_or(Tensor()));
    saved.push_back(c.value_or(Tensor()));
    saved.insert(saved.end(), params.begin(), params.end());
    constants.record(ctx, std::move(saved));
    variable_list outputs;
    for (const size_t place : Call::with_gradient(constants)) outputs.push_back(results[place]);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return for_each_example(grads,
                            [&](const variable_list& one, bool alone) { return backward_of_one(ctx, one, alone); });
  }

 private:
  static variable_list backward_of_one(AutogradContext* ctx, const variable_list& grads, bool alone) {
    variable_list saved;
    try {
      saved = ctx->get_saved_variables();
    } catch (const c10::Error& error) {
      TORCH_CHECK(false, error.what_without_backtrace(), Call::if_changed);
    }
    const Constants constants = Constants::recorded(ctx, saved);
    const at::ArrayRef<Tensor> all(saved), inputs = all.slice(Call::kept);
    Needs needs(ctx);
    for (const Tensor& t : inputs) needs.add(t.defined());
    std::array<OptionalTensor, Call::seeds> seeds;
    const Places places = Call::with_gradient(constants);
    for (size_t i = 0; i < places.size(); ++i) seeds[Call::seed_of(places[i])] = optional(grads[i]);
    const bool reuse_gates = !Call::is_cell && alone && is_last_use(all[1]);
    const OptionalTensor h = optional(inputs[1]), c = optional(inputs[2]);
    // The operator's Autograd kernel has nothing to do for a plain backward pass.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (is_plain_mode() && !at::GradMode::is_enabled() && !is_dual(at::ArrayRef<OptionalTensor>(seeds), inputs))
      below_autograd.emplace();
    variable_list result = list_of_gradients(Call::backward(seeds.data(), inputs[0], h, c, inputs.slice(3), all.data(),
                                                            constants, needs.list(), reuse_gates));
    for (size_t i = 0; i < result.size(); ++i)
      if (!needs.values[i]) result[i] = Tensor();
    result.resize(result.size() + 2);  // of the constants and of what was computed
    return result;
  }
};

template <class Call>
class GradientOfBackward {
 public:
  static variable_list forward(AutogradContext* ctx, const OptionalTensor& seed0, const OptionalTensor& seed1,
                               const OptionalTensor& seed2, const OptionalTensor& seed3, const OptionalTensor& seed4,
                               const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                               at::TensorList params, const Constants& constants, const Computed& computed,
                               const std::vector<bool>& needs, const variable_list& results) {
    variable_list saved = computed.results;
    for (const OptionalTensor* seed : {&seed0, &seed1, &seed2, &seed3, &seed4})
      saved.push_back(seed->value_or(Tensor()));
    saved.push_back(input);
    saved.push_back(h.value_or(Tensor()));
    saved.push_back(c.value_or(Tensor()));
    saved.insert(saved.end(), params.begin(), params.end());
    constants.record(ctx, std::move(saved));
    c10::List<bool> needed;
    for (const bool value : needs) needed.push_back(value);
    ctx->saved_data["needs"] = needed;
    variable_list unneeded;
    for (size_t i = 0; i < results.size(); ++i)
      if (results[i].numel() == 0) unneeded.push_back(results[i]);
    ctx->mark_non_differentiable(unneeded);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return for_each_example(grads, [&](const variable_list& one, bool) { return backward_of_one(ctx, one); });
  }

 private:
  static constexpr size_t most_seeds = Layers::seeds;

  static variable_list backward_of_one(AutogradContext* ctx, const variable_list& grads) {
    variable_list saved = ctx->get_saved_variables();
    const Constants constants = Constants::recorded(ctx, saved);
    const at::ArrayRef<Tensor> all(saved), seeds = all.slice(Call::kept, most_seeds);
    const at::ArrayRef<Tensor> inputs = all.slice(Call::kept + most_seeds);
    const c10::List<bool> needed = ctx->saved_data["needs"].toBoolList();
    variable_list result;
    if (!at::GradMode::is_enabled() && !is_dual(seeds, inputs, at::TensorList(grads)) &&
        constants.has_derivatives(inputs[0], inputs.slice(3))) {
      result = by_kernels(all.data(), seeds, inputs, needed, grads, constants);
    } else {
      py::gil_scoped_acquire gil;
      py::list needs;
      for (const bool value : needed) needs.append(value);
      result = call_formulas("second_derivative", Call::is_cell, constants, needs, list_of(seeds.slice(0, Call::seeds)),
                             list_of(inputs), list_of(grads));
    }
    // One for each seed, of which a cell has fewer, and for each input; then of what is no tensor.
    result.insert(result.begin() + Call::seeds, most_seeds - Call::seeds, Tensor());
    result.resize(most_seeds + inputs.size() + 4);
    return result;
  }

  // The gradients of a linear function of the seeds, whose own gradients are its tangents, and of the inputs.
  static variable_list by_kernels(const Tensor* saved, at::ArrayRef<Tensor> seeds, at::ArrayRef<Tensor> inputs,
                                  const c10::List<bool>& needed, const variable_list& grads,
                                  const Constants& constants) {
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (is_plain_mode()) below_autograd.emplace();
    c10::List<bool> needs;
    variable_list changes;
    for (size_t i = 0; i < inputs.size(); ++i) {
      needs.push_back(inputs[i].defined());
      changes.push_back(needed[i] ? grads[i] : Tensor());
    }
    std::array<OptionalTensor, most_seeds> given, none;
    for (size_t i = 0; i < Call::seeds; ++i) given[i] = optional(seeds[i]);
    const Along along =
        Along::of(changes, inputs[0], optional(inputs[1]), optional(inputs[2]), inputs.slice(3), constants);
    BackwardAlong found = Call::backward_tangents(given.data(), none.data(), along, saved, needs);
    variable_list result = std::move(found.results);
    result.resize(Call::seeds);
    for (size_t i = 0; i < Call::seeds; ++i)
      if (!seeds[i].defined()) result[i] = Tensor();
    for (size_t i = 0; i < inputs.size(); ++i) result.push_back(inputs[i].defined() ? found.gradients[i] : Tensor());
    return result;
  }
};

}  // namespace

// What autograd shows as grad_fn of a result, and spells out for every pass: short, and outside of the unnamed
// namespace.
struct RnnGradient : Gradient<Layers>, torch::autograd::Function<RnnGradient> {
  static constexpr bool is_traceable = true;  // by compiled autograd: backward calls operators only
};
struct CellGradient : Gradient<Cell>, torch::autograd::Function<CellGradient> {
  static constexpr bool is_traceable = true;
};
struct RnnSecondGradient : GradientOfBackward<Layers>, torch::autograd::Function<RnnSecondGradient> {};
struct CellSecondGradient : GradientOfBackward<Cell>, torch::autograd::Function<CellSecondGradient> {};

namespace {

Tensor nothing_like(const Tensor& t) { return at::empty({0}, t.options()); }

template <class Call>
typename Call::Results forward(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                               at::TensorList params, at::TensorList controls, Integers settings, Numbers numbers,
                               bool save) {
  const bool dual = is_dual(input, h, c, params);
  const bool recorded = is_recorded(input, h, c, params);
  const auto compute = [&](bool saves) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return Call::forward(input, h, c, params, controls, settings, numbers, saves);
  };
  if (!dual && !recorded) return compute(save);
  const bool by_kernels =
      dual && !recorded && !is_derived_again() && has_derivative_kernels(input, params, controls, settings, numbers);
  Computed computed{Call::list(compute(save || !dual || by_kernels))};
  variable_list& results = computed.results;
  const Constants constants(settings, numbers, controls);
  const Places places = Call::with_gradient(constants);
  const auto keep_what_is_asked_for = [&] {
    if (save) return;
    for (size_t i = Call::outputs; i < results.size(); ++i)
      if (std::find(places.begin(), places.end(), i) == places.end()) results[i] = nothing_like(results[i]);
  };
  if (by_kernels) {
    variable_list tangents;
    {
      const Along along = Along::of_tangents(input, h, c, params, constants);
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      tangents = Call::tangents(along, Call::saved_of(results).data());
    }
    for (const size_t place : places) results[place] = at::_make_dual(results[place], tangents[place], 0);
    keep_what_is_asked_for();
    return Call::results(results);
  }
  if (dual) {
    py::gil_scoped_acquire gil;
    const variable_list outputs = call_formulas("forward_by_formulas", Call::is_cell, constants, to_python(input),
                                                to_python(h), to_python(c), list_of(params));
    for (const size_t place : places) results[place] = outputs[Call::seed_of(place)];
    return Call::results(results);
  }
  {
    const Recording recording;
    using Gradient = std::conditional_t<Call::is_cell, CellGradient, RnnGradient>;
    const variable_list recorded = Gradient::apply(input, h, c, params, constants, computed);
    for (size_t i = 0; i < places.size(); ++i) results[places[i]] = recorded[i];
  }
  keep_what_is_asked_for();
  return Call::results(results);
}

// Gradients of input, h, c and params, through the formulas and PyTorch's own gradients of them: of tensors with
// tangents. Recorded at the level of the operator's call, for a kernel may open no level of torch.func.
template <class Call>
variable_list backward_by_formulas(const OptionalTensor* seeds, const Tensor& input, const OptionalTensor& h,
                                   const OptionalTensor& c, at::TensorList params, const Constants& constants,
                                   const c10::List<bool>& needs, bool recorded) {
  variable_list primals{input, h.value_or(Tensor()), c.value_or(Tensor())};
  primals.insert(primals.end(), params.begin(), params.end());
  variable_list wanted, outputs, given;
  {
    const at::AutoGradMode grad_mode(true);
    for (size_t i = 0; i < primals.size(); ++i) {
      if (!primals[i].defined() || !needs[i]) continue;
      primals[i] = primals[i].view_as(primals[i]);  // keeps the tangent
      primals[i].set_requires_grad(true);
      wanted.push_back(primals[i]);
    }
    py::gil_scoped_acquire gil;
    outputs =
        call_formulas("forward_by_formulas", Call::is_cell, constants, to_python(primals[0]), to_python(primals[1]),
                      to_python(primals[2]), list_of(at::ArrayRef<Tensor>(primals).slice(3)));
  }
  variable_list seeded;
  for (size_t i = 0; i < std::min(outputs.size(), Call::seeds); ++i) {
    if (!seeds[i]) continue;
    seeded.push_back(outputs[i]);
    given.push_back(*seeds[i]);
  }
  variable_list found(wanted.size());
  if (!seeded.empty() && !wanted.empty()) {
    // Without a graph autograd turns recording off in this thread, and with it at the levels of torch.func below this
    // one, which may need it; what is recorded at this one goes with the level.
    const bool create_graph = recorded || torch_func_is_active();
    // Called from a mode in Python, as while torch.compile traces, this thread has the GIL, with which the engine
    // refuses to run.
    std::optional<py::gil_scoped_release> no_gil;
    if (PyGILState_Check()) no_gil.emplace();
    found = torch::autograd::grad(seeded, wanted, given, /*retain_graph=*/std::nullopt, create_graph,
                                  /*allow_unused=*/true);
  }
  variable_list gradients;
  size_t next = 0;
  for (size_t i = 0; i < primals.size(); ++i) {
    const bool is_wanted = primals[i].defined() && needs[i];
    if (!is_wanted) {
      gradients.push_back(at::empty({0}, input.options()));
    } else {
      const Tensor& gradient = found[next++];
      gradients.push_back(gradient.defined() ? gradient : at::zeros_like(primals[i]));
    }
  }
  return gradients;
}

template <class Call>
BackwardResult backward(const OptionalTensor* seeds, const Tensor& input, const OptionalTensor& h,
                        const OptionalTensor& c, at::TensorList params, const Tensor* saved, const Constants& constants,
                        const c10::List<bool>& needs, bool reuse_gates) {
  const at::ArrayRef<OptionalTensor> all(seeds, Call::seeds);
  const bool dual = is_dual(all, input, h, c, params);
  const bool recorded = is_recorded(all, input, h, c, params);
  const bool by_kernels = dual && !recorded && !is_derived_again() && constants.has_derivatives(input, params);
  BackwardResult result;
  if (!dual || by_kernels) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = Call::backward(seeds, input, h, c, params, saved, constants, needs, reuse_gates && !recorded && !dual);
    if (!recorded && !dual) return result;
  }
  variable_list gradients;
  if (by_kernels) {
    gradients = list_of_gradients(std::move(result));
    BackwardAlong found;
    {
      std::array<OptionalTensor, Call::seeds> seeds_t;
      for (size_t i = 0; i < Call::seeds; ++i) seeds_t[i] = tangent_of(seeds[i]);
      const Along along = Along::of_tangents(input, h, c, params, constants);
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      found = Call::backward_tangents(seeds, seeds_t.data(), along, saved, needs);
    }
    for (size_t i = 0; i < gradients.size(); ++i)
      if (gradients[i].numel() > 0) gradients[i] = at::_make_dual(gradients[i], found.gradients[i], 0);
  } else if (dual) {
    gradients = backward_by_formulas<Call>(seeds, input, h, c, params, constants, needs, recorded);
  } else {
    gradients = list_of_gradients(std::move(result));
    const std::vector<bool> needed(needs.begin(), needs.end());
    const Recording recording;
    using SecondGradient = std::conditional_t<Call::is_cell, CellSecondGradient, RnnSecondGradient>;
    const auto seed = [&](size_t i) { return i < Call::seeds ? seeds[i] : std::nullopt; };
    const Computed computed{variable_list(saved, saved + Call::kept)};
    gradients = SecondGradient::apply(seed(0), seed(1), seed(2), seed(3), seed(4), input, h, c, params, constants,
                                      computed, needed, gradients);
  }
  return {gradients[0], gradients[1], gradients[2], {gradients.begin() + 3, gradients.end()}};
}

ForwardResult rnn_forward(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                          at::TensorList params, at::TensorList controls, Integers settings, Numbers numbers,
                          bool save) {
  return forward<Layers>(input, h0, c0, params, controls, settings, numbers, save);
}

BackwardResult rnn_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                            const OptionalTensor& grad_hidden, const Tensor& input, const OptionalTensor& h0,
                            const OptionalTensor& c0, at::TensorList params, at::TensorList controls,
                            const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                            Integers settings, Numbers numbers, const c10::List<bool>& needs, bool reuse_gates) {
  const OptionalTensor seeds[] = {grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden};
  const Tensor saved[] = {output, gates, cells, hidden};
  return backward<Layers>(seeds, input, h0, c0, params, saved, Constants(settings, numbers, controls), needs,
                          reuse_gates);
}

CellResult cell_forward(const Tensor& input, const Tensor& h, const OptionalTensor& c, at::TensorList params,
                        Integers settings, Numbers numbers, bool save) {
  return forward<Cell>(input, h, c, params, {}, settings, numbers, save);
}

BackwardResult cell_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& input,
                             const Tensor& h, const OptionalTensor& c, at::TensorList params, const Tensor& gates,
                             const Tensor& cells, Integers settings, Numbers numbers, const c10::List<bool>& needs) {
  const OptionalTensor seeds[] = {grad_h, grad_c};
  const Tensor saved[] = {gates, cells};
  return backward<Cell>(seeds, input, h, c, params, saved, Constants(settings, numbers, {}), needs, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_rnn, Autograd, m) {
  m.impl("rnn_forward", &rnn_forward);
  m.impl("rnn_backward", &rnn_backward);
  m.impl("cell_forward", &cell_forward);
  m.impl("cell_backward", &cell_backward);
}

}  // namespace fused_rnn
