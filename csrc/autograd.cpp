// Gradients of the operators in plain eager mode, without Python between forward and backward: the Autograd kernels.
//
// Everything else a derivative can be asked for has its formulas in fused_rnn/ops.py: torch.func, forward mode,
// torch.compile; and so has the derivative of a backward pass, which is asked for there when it is recorded itself.
#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/plan.h"
#include "ops.h"

namespace py = pybind11;

namespace fused_rnn {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool needs_gradient(const Tensor& t) { return t.requires_grad(); }
bool needs_gradient(const OptionalTensor& t) { return t && t->requires_grad(); }
bool needs_gradient(at::TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return t.requires_grad(); });
}
template <class... Tensors>
bool is_recorded(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (needs_gradient(tensors) || ...);
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Whether the backward pass under way is to be differentiated, or batched by torch.func.vmap.
bool backward_is_transformed() { return at::GradMode::is_enabled() || torch_func_is_active(); }

// Whether this backward pass is the last to read a saved CUDA tensor, which nobody has but the context and its caller.
bool is_last_use(const Tensor& saved) {
  return saved.is_cuda() && saved.numel() > 0 && saved.use_count() <= 2 && !torch_func_is_active() &&
         !at::isTensorSubclassLike(saved) && !torch::autograd::get_current_graph_task_keep_graph();
}

py::object to_python(const Tensor& t) { return t.defined() ? py::cast(t) : py::none(); }

py::tuple to_python(at::ArrayRef<Tensor> tensors) {
  py::tuple result(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) result[i] = to_python(tensors[i]);
  return result;
}

// fused_rnn.ops.<function>(settings, needs, tensors): gradients that can be differentiated, None for one not needed.
variable_list differentiable_backward(const char* function, const py::tuple& settings, const std::vector<bool>& needs,
                                      const py::tuple& tensors) {
  const py::tuple grads =
      py::module_::import("fused_rnn.ops").attr(function)(settings, py::tuple(py::cast(needs)), tensors);
  variable_list result;
  for (const py::handle& grad : grads) result.push_back(grad.is_none() ? Tensor() : grad.cast<Tensor>());
  return result;
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

  c10::List<bool> list(size_t count) const {
    c10::List<bool> result;
    result.reserve(count);
    for (size_t i = 0; i < count; ++i) result.push_back(values[i]);
    return result;
  }

 private:
  AutogradContext* ctx_;
  size_t edge_ = 0;
};

}  // namespace

// What of a call is no differentiable tensor.
struct RnnCall {
  at::TensorList dropout;
  const OptionalTensor& batch_sizes;
  const OptionalTensor& mask;
  int64_t kind;
  bool has_biases;
  int64_t num_layers;
  bool bidirectional, batch_first, recompute;
  Tensor c_n, gates, cells, hidden;  // results without a gradient
};

// The name is what autograd shows as the grad_fn of a result, so it stands outside of the unnamed namespace.
class RnnGradient : public torch::autograd::Function<RnnGradient> {
 public:
  static constexpr bool is_traceable = true;  // by compiled autograd: backward calls operators only

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& h0,
                               const OptionalTensor& c0, at::TensorList params, RnnCall& call) {
    Tensor output, h_n;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      std::tie(output, h_n, call.c_n, call.gates, call.cells, call.hidden) = rnn_forward_operator().call(
          input, h0, c0, params, call.dropout, call.batch_sizes, call.kind, call.has_biases, call.num_layers,
          call.bidirectional, call.batch_first, true, call.recompute, call.mask);
    }
    variable_list saved{output,
                        call.gates,
                        call.cells,
                        call.hidden,
                        call.mask.value_or(Tensor()),
                        input,
                        h0.value_or(Tensor()),
                        c0.value_or(Tensor())};
    saved.insert(saved.end(), call.dropout.begin(), call.dropout.end());
    saved.insert(saved.end(), params.begin(), params.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["settings"] =
        std::vector<int64_t>{call.kind,          call.has_biases,  call.num_layers,
                             call.bidirectional, call.batch_first, int64_t(call.dropout.size())};
    if (call.batch_sizes) ctx->saved_data["batch_sizes"] = *call.batch_sizes;
    ctx->set_materialize_grads(false);
    if (has_cell_state(CellKind(call.kind))) return {output, h_n, call.c_n};
    return {output, h_n};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    grads.resize(3);
    return for_each_example(grads,
                            [&](const variable_list& one, bool alone) { return backward_of_one(ctx, one, alone); });
  }

 private:
  static variable_list backward_of_one(AutogradContext* ctx, const variable_list& grads, bool alone) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> settings = ctx->saved_data["settings"].toIntVector();
    const auto batch_sizes = ctx->saved_data.find("batch_sizes");
    const Tensor sizes = batch_sizes == ctx->saved_data.end() ? Tensor() : batch_sizes->second.toTensor();
    const size_t dropout = settings[5];
    const at::ArrayRef<Tensor> all(saved), inputs = all.slice(5, 3), params = all.slice(8 + dropout);
    Needs needs(ctx);
    for (const Tensor& t : inputs) needs.add(t.defined());
    for (const Tensor& t : params) needs.add(t.defined());
    variable_list result;
    if (backward_is_transformed()) {
      py::gil_scoped_acquire gil;
      std::vector<bool> with_dropout = needs.values;
      with_dropout.insert(with_dropout.begin() + 3, dropout, false);
      const py::tuple described = py::make_tuple(settings[0], bool(settings[1]), settings[2], bool(settings[3]),
                                                 bool(settings[4]), dropout, to_python(sizes));
      result = differentiable_backward("differentiable_rnn_backward", described, with_dropout,
                                       py::tuple(to_python(grads) + to_python(all)));
      result.erase(result.begin() + 3, result.begin() + 3 + dropout);
    } else {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      auto [grad_input, grad_h0, grad_c0, grad_params] = rnn_backward_operator().call(
          optional(grads[0]), optional(grads[1]), optional(grads[2]), inputs[0], optional(inputs[1]),
          optional(inputs[2]), params, all.slice(8, dropout), optional(sizes), all[0], all[1], all[2], all[3],
          settings[0], settings[1], settings[2], settings[3], settings[4], needs.list(needs.values.size()),
          alone && is_last_use(all[1]), optional(all[4]));
      result = {std::move(grad_input), std::move(grad_h0), std::move(grad_c0)};
      for (Tensor& grad : grad_params) result.push_back(std::move(grad));
      for (size_t i = 0; i < result.size(); ++i)
        if (!needs.values[i]) result[i] = Tensor();
    }
    result.emplace_back();  // of the RnnCall
    return result;
  }
};

struct CellCall {
  int64_t kind;
  Tensor c_next, gates, cells;  // results without a gradient
};

class CellGradient : public torch::autograd::Function<CellGradient> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& h, const OptionalTensor& c,
                               const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, CellCall& call) {
    Tensor h_next;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      std::tie(h_next, call.c_next, call.gates, call.cells) =
          cell_forward_operator().call(input, h, c, w_ih, w_hh, b_ih, b_hh, call.kind, true);
    }
    ctx->save_for_backward({h_next, call.gates, call.cells, input, h, c.value_or(Tensor()), w_ih, w_hh,
                            b_ih.value_or(Tensor()), b_hh.value_or(Tensor())});
    ctx->saved_data["kind"] = call.kind;
    ctx->set_materialize_grads(false);
    if (has_cell_state(CellKind(call.kind))) return {h_next, call.c_next};
    return {h_next};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    grads.resize(2);
    return for_each_example(grads, [&](const variable_list& one, bool) { return backward_of_one(ctx, one); });
  }

 private:
  static variable_list backward_of_one(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t kind = ctx->saved_data["kind"].toInt();
    const at::ArrayRef<Tensor> all(saved), inputs = all.slice(3);
    Needs needs(ctx);
    for (const Tensor& t : inputs) needs.add(t.defined());
    variable_list result;
    if (backward_is_transformed()) {
      py::gil_scoped_acquire gil;
      result = differentiable_backward("differentiable_cell_backward", py::make_tuple(kind), needs.values,
                                       py::tuple(to_python(grads) + to_python(all)));
    } else {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      auto [grad_input, grad_h, grad_c, grad_params] = cell_backward_operator().call(
          optional(grads[0]), optional(grads[1]), inputs[0], inputs[1], optional(inputs[2]), inputs[3], inputs[4],
          optional(inputs[5]), optional(inputs[6]), all[0], all[1], all[2], kind,
          needs.list(inputs[5].defined() ? 7 : 5));
      result = {std::move(grad_input), std::move(grad_h), std::move(grad_c)};
      for (Tensor& grad : grad_params) result.push_back(std::move(grad));
      result.resize(7);
      for (size_t i = 0; i < result.size(); ++i)
        if (!needs.values[i]) result[i] = Tensor();
    }
    result.resize(8);  // the last is the CellCall's
    return result;
  }
};

namespace {

Tensor nothing_like(const Tensor& t) { return at::empty({0}, t.options()); }

ForwardResult rnn_forward(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                          at::TensorList params, at::TensorList dropout_masks, const OptionalTensor& batch_sizes,
                          int64_t kind, bool has_biases, int64_t num_layers, bool bidirectional, bool batch_first,
                          bool save, bool recompute, const OptionalTensor& mask) {
  if (!is_recorded(input, h0, c0, params)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rnn_forward_operator().call(input, h0, c0, params, dropout_masks, batch_sizes, kind, has_biases, num_layers,
                                       bidirectional, batch_first, save, recompute, mask);
  }
  RnnCall call{dropout_masks, batch_sizes, mask, kind, has_biases, num_layers, bidirectional,
               batch_first,   recompute,   {},   {},   {},         {}};
  const variable_list results = RnnGradient::apply(input, h0, c0, params, call);
  const Tensor& c_n = results.size() == 3 ? results[2] : call.c_n;
  if (!save) {
    call.gates = nothing_like(call.gates);
    call.cells = nothing_like(call.cells);
    call.hidden = nothing_like(call.hidden);
  }
  return {results[0], results[1], c_n, call.gates, call.cells, call.hidden};
}

CellResult cell_forward(const Tensor& input, const Tensor& h, const OptionalTensor& c, const Tensor& w_ih,
                        const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh, int64_t kind,
                        bool save) {
  if (!is_recorded(input, h, c, w_ih, w_hh, b_ih, b_hh)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return cell_forward_operator().call(input, h, c, w_ih, w_hh, b_ih, b_hh, kind, save);
  }
  CellCall call{kind, {}, {}, {}};
  const variable_list results = CellGradient::apply(input, h, c, w_ih, w_hh, b_ih, b_hh, call);
  if (!save) {
    call.gates = nothing_like(call.gates);
    call.cells = nothing_like(call.cells);
  }
  return {results[0], results.size() == 2 ? results[1] : call.c_next, call.gates, call.cells};
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_rnn, Autograd, m) {
  m.impl("rnn_forward", &rnn_forward);
  m.impl("cell_forward", &cell_forward);
}

}  // namespace fused_rnn
