// Forward mode and derivatives of the backward pass, on the CPU: the operators rnn_tangent and rnn_backward_tangent.
//
// How a layer's results change is a recurrence like the layer's own, with the recurrent weights that it has, whose
// steps are linear; how its gradients change is one like its backward pass. The layer's own passes run them, once they
// are given the steps that were computed (KnownSteps, StepGradients; the formulas are in cells/derivatives.h). What
// does not go through time is a product over all steps at once: of x and a change of W_ih, of h and a change of W_hh.
#include "derivatives.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "operators.h"
#include "run_layer.h"

namespace fused_rnn {

bool has_derivative_kernels(const Tensor& input, at::TensorList params, at::TensorList controls, Integers settings,
                            Numbers numbers) {
  if (!numbers.empty() || !input.is_cpu()) return false;
  if (input.scalar_type() != at::kFloat && input.scalar_type() != at::kDouble) return false;
  const Settings s = Settings::restore(settings, numbers);
  if (s.recompute || is_custom(s.kind)) return false;
  const Controls given = Controls::restore(controls);
  if (given.batch_sizes || given.mask || given.reset || given.recurrent_dropout || given.zoneout || given.zoneout_cell)
    return false;
  const int64_t of_direction = s.has_biases ? 4 : 2;  // one more with a projection
  return int64_t(params.size()) == s.num_layers * s.num_directions() * of_direction;
}

namespace {

// A gradient or a tangent that is there, contiguous; else undefined. (0,) stands for none in lists.
Tensor given_tensor(const OptionalTensor& t, const Tensor& input, at::IntArrayRef shape, const char* name) {
  if (!t || (t->dim() == 1 && t->size(0) == 0 && shape != at::IntArrayRef{0})) return {};
  check_like(*t, input, shape, name);
  return t->contiguous();
}

// (T, B, features) as rows.
Tensor rows(const Tensor& t) { return t.flatten(0, 1); }

// What changes with the input, the states and the parameters of a call; undefined where nothing does.
struct Direction {
  Tensor input, h0, c0;
  std::vector<Tensor> params;
};

// Gradients of a forward pass, or how they change; undefined for zeros.
struct Seeds {
  Tensor output, h_n, c_n;
};

class StackDerivatives {
 public:
  StackDerivatives(const Stack& stack, const Direction& along, const Tensor& output, const Tensor& gates,
                   const Tensor& cells, const Tensor& hidden)
      : stack_(stack),
        along_(along),
        kind_(stack.kind()),
        L_(stack.num_layers()),
        D_(stack.D),
        T_(stack.T),
        B_(stack.B),
        H_(stack.H),
        saved_(saved_gate_count(kind_)),
        has_cell_(has_cell_state(kind_)),
        gates_(gates),
        cells_(cells),
        layers_(L_) {
    for (int64_t l = 0; l < L_; ++l)
      layers_[l].y = l == L_ - 1 ? output.contiguous() : hidden.select(0, l).view({T_, B_, D_ * H_});
  }

  Tensor output_t, h_n_t, c_n_t;

  // How the results change, and all that is kept of them.
  void forward() {
    const std::vector<int64_t> states{L_ * D_, B_, H_};
    h_n_t = make(states);
    c_n_t = make(has_cell_ ? states : std::vector<int64_t>{0});
    gates_t_ = make(saved_ > 0 ? std::vector<int64_t>{L_ * D_, T_ * B_, saved_, H_} : std::vector<int64_t>{0});
    cells_t_ = make(has_cell_ ? std::vector<int64_t>{L_ * D_, T_ * B_, H_} : std::vector<int64_t>{0});
    layers_[0].x = stack_.input;
    layers_[0].x_t = along_.input;
    for (int64_t l = 0; l < L_; ++l) {
      change_layer(l);
      if (l + 1 == L_) break;
      layers_[l + 1].x = dropped(layers_[l].y, l);
      layers_[l + 1].x_t = dropped(layers_[l].y_t, l);
    }
    output_t = layers_[L_ - 1].y_t;
  }

  // How the gradients of input, h0, c0 and params change, of those that `needs` asks for.
  BackwardResult backward(const Seeds& seeds, const Seeds& seeds_t, const c10::List<bool>& needs) const {
    const auto wanted = [&](bool needed, const Tensor& like) {
      return make(needed ? like.sizes() : at::IntArrayRef{0});
    };
    const std::vector<int64_t> states{L_ * D_, B_, H_};
    Gradients found;
    found.h0 = make(needs[1] && stack_.h0.defined() ? states : std::vector<int64_t>{0});
    found.c0 = make(needs[2] && stack_.c0.defined() ? states : std::vector<int64_t>{0});
    for (size_t i = 0; i < stack_.params.size(); ++i) found.params.push_back(wanted(needs[3 + i], stack_.params[i]));
    Tensor grad = seeds.output, grad_t = seeds_t.output;
    for (int64_t l = L_ - 1; l >= 0; --l) {
      const Tensor below = change_gradients(l, grad, seeds, seeds_t, grad_t, l > 0 || needs[0], found);
      grad = dropped(below, l - 1);
      grad_t = dropped(found.x, l - 1);
    }
    return {needs[0] ? found.x : make({0}), found.h0, found.c0, found.params};
  }

 private:
  struct Layer {
    Tensor x, y, x_t, y_t;  // (T, B, features)
  };
  // What a backward pass gives of every step, of each direction.
  struct StepOutputs {
    Tensor sums[2], h[2], c[2];
    StepGradients exchanged[2];
    explicit StepOutputs(const StackDerivatives& of) {
      const int64_t grad_gates = of.kind_ == CellKind::gru ? 4 : gate_count(of.kind_);
      for (int64_t d = 0; d < of.D_; ++d) {
        sums[d] = of.make({of.T_, of.B_, grad_gates * of.H_});
        h[d] = of.make({of.T_, of.B_, of.H_});
        if (of.has_cell_) c[d] = of.make({of.T_, of.B_, of.H_});
        exchanged[d].sums = sums[d].mutable_data_ptr();
        exchanged[d].h = h[d].mutable_data_ptr();
        exchanged[d].c = mutable_data_or_null(c[d]);
      }
    }
  };

  // How gradients change: of a layer's input, and of all else.
  struct Gradients {
    Tensor x, h0, c0;
    std::vector<Tensor> params;
  };

  Tensor make(at::IntArrayRef shape) const { return at::empty(shape, stack_.input.options()); }
  Tensor zeros(at::IntArrayRef shape) const { return at::zeros(shape, stack_.input.options()); }

  // What layer l gives the one above, or gets from it.
  Tensor dropped(const Tensor& t, int64_t l) const {
    if (!t.defined() || l < 0 || stack_.dropout.empty()) return t;
    return t * stack_.dropout[l].reshape({T_, B_, D_ * H_});
  }

  // Of t (T, B, .): the steps that have one before them in direction d, those that are before one, and the first.
  Tensor with_previous(const Tensor& t, int64_t d) const { return t.narrow(0, d == 0 ? 1 : 0, T_ - 1); }
  Tensor previous(const Tensor& t, int64_t d) const { return t.narrow(0, d == 0 ? 0 : 1, T_ - 1); }
  Tensor first(const Tensor& t, int64_t d) const { return t[d == 0 ? 0 : T_ - 1]; }
  Tensor of_direction(const Tensor& t, int64_t d) const { return t.narrow(2, d * H_, H_); }

  Tensor of_input(const Tensor& sums) const { return gradients_of_input(kind_, sums); }
  Tensor of_state(const Tensor& sums) const { return gradients_of_state(kind_, sums); }

  KnownSteps known(int64_t l, int64_t d, const Tensor& saved, const Tensor& y, const Tensor& cells, const Tensor& h0,
                   const Tensor& c0) const {
    const int64_t i = l * D_ + d;
    KnownSteps steps;
    steps.saved = const_slice(saved, i);
    steps.h = static_cast<const char*>(y.const_data_ptr()) + d * H_ * y.element_size();
    steps.c = const_slice(cells, i);
    steps.h0 = const_slice(h0, i);
    steps.c0 = const_slice(c0, i);
    return steps;
  }
  KnownSteps known(int64_t l, int64_t d) const {
    return known(l, d, gates_, layers_[l].y, cells_, stack_.h0, stack_.c0);
  }

  // The recurrent products of h before each step with a change of W_hh, (T, B, G * H).
  Tensor through_change(int64_t l, int64_t d, const Tensor& w_hh_t) const {
    const Tensor result = make({T_, B_, w_hh_t.size(0)}), w = w_hh_t.t();
    if (T_ > 1) {
      Tensor later = rows(with_previous(result, d));
      at::mm_out(later, rows(previous(of_direction(layers_[l].y, d), d)), w);
    }
    Tensor begin = first(result, d);
    if (stack_.h0.defined()) {
      at::mm_out(begin, stack_.h0[l * D_ + d], w);
    } else {
      begin.zero_();
    }
    return result;
  }

  void change_layer(int64_t l) {
    Layer& own = layers_[l];
    const int64_t G = gate_count(kind_), p = stack_.first_param(l, 0), next = stack_.params_per_direction();
    const auto change_of = [&](int64_t d, int64_t k) { return along_.params[p + d * next + k]; };
    bool of_weights = false;
    for (int64_t d = 0; d < D_; ++d) of_weights = of_weights || change_of(d, 0).defined();

    std::vector<Tensor> parts;  // of the input
    if (own.x_t.defined()) parts.push_back(own.x_t);
    if (of_weights) parts.push_back(own.x);
    if (parts.empty()) parts.push_back(zeros({T_, B_, 1}));
    const Tensor x = parts.size() == 1 ? with_contiguous_rows(parts[0]) : at::cat(parts, 2);
    own.y_t = make({T_, B_, D_ * H_});

    std::vector<Tensor> alive;
    KnownSteps steps[2];
    LayerForward layer;
    layer.sizes = stack_.layer_sizes(l);
    layer.sizes.input_size = x.size(2);
    layer.steps = stack_.steps();
    layer.x = stack_.sequence(x);
    layer.y = stack_.sequence(own.y_t);
    stack_.put_options(layer);
    layer.plain_gates = false;
    layer.known = steps;
    for (int64_t d = 0; d < D_; ++d) {
      const int64_t i = l * D_ + d;
      const auto keep = [&](const Tensor& t) {
        alive.push_back(t);
        return t.const_data_ptr();
      };
      const Tensor w_ih = stack_.params[p + d * next];
      std::vector<Tensor> columns;
      if (own.x_t.defined()) columns.push_back(w_ih);
      if (of_weights) columns.push_back(change_of(d, 0).defined() ? change_of(d, 0) : at::zeros_like(w_ih));
      if (columns.empty()) columns.push_back(zeros({G * H_, 1}));
      DirectionForward& dir = layer.direction[d];
      dir.weights.w_ih = keep(columns.size() == 1 ? columns[0].contiguous() : at::cat(columns, 1));
      dir.weights.w_hh = stack_.params[p + d * next + 1].const_data_ptr();
      if (stack_.settings.has_biases && (change_of(d, 2).defined() || change_of(d, 3).defined())) {
        const auto bias = [&](const Tensor& t) { return keep(t.defined() ? t : zeros({G * H_})); };
        dir.weights.b_ih = bias(change_of(d, 2));
        dir.weights.b_hh = bias(change_of(d, 3));
      }
      if (change_of(d, 1).defined()) layer.more_of_sums[d] = keep(through_change(l, d, change_of(d, 1)));
      dir.h0 = const_slice(along_.h0, i);
      dir.c0 = const_slice(along_.c0, i);
      dir.h_n = mutable_slice(h_n_t, i);
      dir.c_n = mutable_slice(c_n_t, i);
      dir.gates = mutable_slice(gates_t_, i);
      dir.cells = mutable_slice(cells_t_, i);
      steps[d] = known(l, d);
    }
    run_layer(layer, kernels().forward, false);
  }

  LayerBackward backward_of(int64_t l, const Tensor& grad_y, const Tensor& grad_x, const Seeds& seeds,
                            const StepGradients* step_gradients) const {
    LayerBackward layer;
    layer.sizes = stack_.layer_sizes(l);
    layer.steps = stack_.steps();
    layer.x = stack_.sequence(layers_[l].x);
    layer.y = stack_.sequence(layers_[l].y);
    layer.grad_y = stack_.sequence(grad_y);
    layer.grad_x = stack_.sequence(grad_x);
    stack_.put_options(layer);
    layer.plain_gates = false;
    layer.step_gradients = step_gradients;
    for (int64_t d = 0; d < D_; ++d) {
      const int64_t i = l * D_ + d;
      DirectionBackward& dir = layer.direction[d];
      dir.weights = stack_.weights(l, d);
      dir.h0 = const_slice(stack_.h0, i);
      dir.c0 = const_slice(stack_.c0, i);
      dir.gates = const_slice(gates_, i);
      dir.cells = const_slice(cells_, i);
      dir.grad_h_n = const_slice(seeds.h_n, i);
      dir.grad_c_n = const_slice(seeds.c_n, i);
    }
    return layer;
  }

  // The directions of a layer add to the gradient of its input.
  Tensor make_grad_x(int64_t l) const {
    const int64_t features = l == 0 ? stack_.I : D_ * H_;
    return D_ > 1 ? zeros({T_, B_, features}) : make({T_, B_, features});
  }

  // How the gradients of layer l change, in `found`; returns the gradient of its input, if there is a layer below.
  Tensor change_gradients(int64_t l, const Tensor& grad, const Seeds& seeds, const Seeds& seeds_t, Tensor grad_t,
                          bool wants_x, Gradients& found) const {
    const Layer& own = layers_[l];
    const int64_t next = stack_.params_per_direction();
    const Tensor below = l > 0 ? make_grad_x(l) : Tensor();
    const StepOutputs gradients(*this);
    const auto& sums = gradients.sums;
    run_layer(backward_of(l, grad, below, seeds, gradients.exchanged), kernels().backward, true);

    // The change of W_hh takes the gradients of the sums to those of the states before.
    bool through_weights = false;
    for (int64_t d = 0; d < D_; ++d) through_weights = through_weights || along_.params[param(l, d) + 1].defined();
    if (through_weights) grad_t = grad_t.defined() ? grad_t.clone() : zeros({T_, B_, D_ * H_});
    Tensor more_of_sums[2], more_of_h[2], more_of_c[2];
    StepGradients exchanged[2];
    for (int64_t d = 0; d < D_; ++d) {
      const Tensor w_hh_t = along_.params[param(l, d) + 1];
      if (w_hh_t.defined() && T_ > 1)
        previous(of_direction(grad_t, d), d)
            .add_(rows(with_previous(of_state(sums[d]), d)).mm(w_hh_t).view({T_ - 1, B_, H_}));
      more_of_sums[d] = make(sums[d].sizes());
      if (kind_ == CellKind::gru) more_of_h[d] = make({T_, B_, H_});
      if (has_cell_) more_of_c[d] = make({T_, B_, H_});
      change_steps(l, d, gradients.h[d], gradients.c[d], more_of_sums[d], more_of_h[d], more_of_c[d]);
      exchanged[d].more_of_sums = more_of_sums[d].const_data_ptr();
      exchanged[d].more_of_h = data_or_null(more_of_h[d]);
      exchanged[d].more_of_c = data_or_null(more_of_c[d]);
    }
    found.x = wants_x ? make_grad_x(l) : Tensor();
    LayerBackward layer = backward_of(l, grad_t, found.x, seeds_t, exchanged);
    for (int64_t d = 0; d < D_; ++d) {
      DirectionBackward& dir = layer.direction[d];
      const int64_t i = l * D_ + d, p = param(l, d);
      const auto gradient = [&](int64_t k) { return mutable_data_or_null_if_empty(found.params[p + k]); };
      dir.grad_w_ih = gradient(0);
      dir.grad_w_hh = gradient(1);
      if (next > 2) {
        dir.grad_b_ih = gradient(2);
        dir.grad_b_hh = gradient(3);
      }
      dir.grad_h0 = mutable_slice(found.h0, i);
      dir.grad_c0 = mutable_slice(found.c0, i);
    }
    run_layer(layer, kernels().backward, true);

    // What the changes of the input, the states and the weights do to gradients that stay.
    for (int64_t d = 0; d < D_; ++d) {
      const int64_t i = l * D_ + d, p = param(l, d);
      const Tensor to_state = of_state(sums[d]), w_ih_t = along_.params[p], w_hh_t = along_.params[p + 1];
      const bool wants_w_ih = found.params[p].numel() > 0, wants_w_hh = found.params[p + 1].numel() > 0;
      Tensor to_input;
      if ((wants_x && w_ih_t.defined()) || (wants_w_ih && own.x_t.defined())) to_input = rows(of_input(sums[d]));
      if (wants_x && w_ih_t.defined()) rows(found.x).addmm_(to_input, w_ih_t);
      if (wants_w_ih && own.x_t.defined()) found.params[p].addmm_(to_input.t(), rows(own.x_t));
      if (wants_w_hh && T_ > 1)
        found.params[p + 1].addmm_(rows(with_previous(to_state, d)).t(), rows(previous(of_direction(own.y_t, d), d)));
      if (wants_w_hh && along_.h0.defined()) found.params[p + 1].addmm_(first(to_state, d).t(), along_.h0[i]);
      if (found.h0.numel() > 0 && w_hh_t.defined()) found.h0[i].addmm_(first(to_state, d), w_hh_t);
    }
    return below;
  }

  int64_t param(int64_t l, int64_t d) const { return stack_.first_param(l, d); }
  static void* mutable_data_or_null_if_empty(const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

  // How the gradients of a direction's steps change with the steps, those of their h and c staying as they are.
  void change_steps(int64_t l, int64_t d, const Tensor& of_h, const Tensor& of_c, const Tensor& sums, const Tensor& h,
                    const Tensor& c) const {
    ChangedSteps steps;
    steps.kind = kind_;
    steps.dtype = dtype_of(stack_.input, "input");
    steps.T = T_;
    steps.B = B_;
    steps.H = H_;
    steps.h_stride = D_ * H_;
    steps.reverse = d == 1;
    steps.known = known(l, d);
    steps.change = known(l, d, gates_t_, layers_[l].y_t, cells_t_, along_.h0, along_.c0);
    steps.grad_h = of_h.const_data_ptr();
    steps.grad_c = data_or_null(of_c);
    steps.sums = sums.mutable_data_ptr();
    steps.h = mutable_data_or_null(h);
    steps.c = mutable_data_or_null(c);
    const int64_t all = T_ * B_, grain = std::max<int64_t>(1, 16384 / H_);
    const auto run = [&](int64_t begin, int64_t end) { kernels().gradient_changes(steps, begin, end); };
    if (all <= grain || team_is_late() || usable_threads(at::get_num_threads()) == 1) {
      run(0, all);
    } else {
      at::parallel_for(0, all, grain, run);
    }
  }

  const Stack& stack_;
  const Direction& along_;
  const CellKind kind_;
  const int64_t L_, D_, T_, B_, H_, saved_;
  const bool has_cell_;
  const Tensor gates_, cells_;
  Tensor gates_t_, cells_t_;
  std::vector<Layer> layers_;
};

// Arguments that both operators have, checked; all in order of time.
struct Given {
  Stack stack;
  Direction along;
  Tensor output;

  Given(const OptionalTensor& input_t, const OptionalTensor& h0_t, const OptionalTensor& c0_t, at::TensorList params_t,
        const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
        at::TensorList controls, const Tensor& output_, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
        Integers settings, Numbers numbers)
      : stack(input, h0, c0, params, Controls::restore(controls), Settings::restore(settings, numbers)) {
    TORCH_CHECK(has_derivative_kernels(input, params, controls, settings, numbers),
                "settings: no kernel for derivatives of this call");
    const int64_t L = stack.num_layers(), D = stack.D, H = stack.H;
    const std::vector<int64_t> states{L * D, stack.B, H};
    output = in_time(output_, stack.output_shape(), "output");
    if (input_t) along.input = in_time(*input_t, stack.input.sizes(), "input_t");
    along.h0 = given_tensor(h0_t, input, states, "h0_t");
    TORCH_CHECK(has_cell_state(stack.kind()) || !c0_t, "c0_t: expected none without a cell state");
    along.c0 = given_tensor(c0_t, input, states, "c0_t");
    TORCH_CHECK(params_t.empty() || params_t.size() == params.size(), "params_t: expected ", params.size(),
                " tensors or none, got ", params_t.size());
    along.params.resize(params.size());
    for (size_t i = 0; i < params_t.size(); ++i)
      along.params[i] = given_tensor(params_t[i], input, stack.params[i].sizes(), "params_t");
    const auto saved = [&](const Tensor& t, bool there, at::IntArrayRef shape, const char* name) {
      check_saved(t, stack.input, there ? shape : at::IntArrayRef{0}, input.scalar_type(), name);
    };
    const int64_t kept = saved_gate_count(stack.kind());
    saved(gates, kept > 0, {L * D, stack.N, kept, H}, "gates");
    saved(cells, has_cell_state(stack.kind()), {L * D, stack.N, H}, "cells");
    saved(hidden, L > 1, {L - 1, stack.N, D * H}, "hidden");
  }

  Tensor in_time(const Tensor& t, at::IntArrayRef shape, const char* name) const {
    TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions, got ", t.dim());
    const Tensor time_major = stack.batch_first ? t.transpose(0, 1) : t;
    check_like(time_major, stack.input, shape, name);
    return with_contiguous_rows(time_major);
  }
  Seeds seeds(const OptionalTensor& of_output, const OptionalTensor& of_h_n, const OptionalTensor& of_c_n,
              const c10::List<bool>& needs) const {
    TORCH_CHECK(needs.size() == 3 + stack.params.size(), "needs: expected ", 3 + stack.params.size(), " values, got ",
                needs.size());
    TORCH_CHECK(has_cell_state(stack.kind()) || !of_c_n, "grad_c_n: expected none without a cell state");
    const std::vector<int64_t> states{stack.num_layers() * stack.D, stack.B, stack.H};
    return {of_output ? in_time(*of_output, stack.output_shape(), "grad_output") : Tensor(),
            given_tensor(of_h_n, stack.input, states, "grad_h_n"),
            given_tensor(of_c_n, stack.input, states, "grad_c_n")};
  }
  Tensor in_callers_order(const Tensor& t) const { return stack.batch_first && t.dim() == 3 ? t.transpose(0, 1) : t; }
};

TangentResult rnn_tangent(const OptionalTensor& input_t, const OptionalTensor& h0_t, const OptionalTensor& c0_t,
                          at::TensorList params_t, const Tensor& input, const OptionalTensor& h0,
                          const OptionalTensor& c0, at::TensorList params, at::TensorList controls,
                          const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                          Integers settings, Numbers numbers) {
  const Given given(input_t, h0_t, c0_t, params_t, input, h0, c0, params, controls, output, gates, cells, hidden,
                    settings, numbers);
  StackDerivatives derivatives(given.stack, given.along, given.output, gates, cells, hidden);
  derivatives.forward();
  return {given.in_callers_order(derivatives.output_t), derivatives.h_n_t, derivatives.c_n_t};
}

BackwardTangentResult rnn_backward_tangent(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                           const OptionalTensor& grad_c_n, const OptionalTensor& grad_output_t,
                                           const OptionalTensor& grad_h_n_t, const OptionalTensor& grad_c_n_t,
                                           const OptionalTensor& input_t, const OptionalTensor& h0_t,
                                           const OptionalTensor& c0_t, at::TensorList params_t, const Tensor& input,
                                           const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                                           at::TensorList controls, const Tensor& output, const Tensor& gates,
                                           const Tensor& cells, const Tensor& hidden, Integers settings,
                                           Numbers numbers, const c10::List<bool>& needs) {
  const Given given(input_t, h0_t, c0_t, params_t, input, h0, c0, params, controls, output, gates, cells, hidden,
                    settings, numbers);
  const Seeds seeds = given.seeds(grad_output, grad_h_n, grad_c_n, needs);
  const Seeds seeds_t = given.seeds(grad_output_t, grad_h_n_t, grad_c_n_t, needs);
  StackDerivatives derivatives(given.stack, given.along, given.output, gates, cells, hidden);
  derivatives.forward();
  auto [grad_input, grad_h0, grad_c0, grad_params] = derivatives.backward(seeds, seeds_t, needs);
  return {given.in_callers_order(derivatives.output_t),
          derivatives.h_n_t,
          derivatives.c_n_t,
          given.in_callers_order(grad_input),
          grad_h0,
          grad_c0,
          grad_params};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "rnn_tangent(Tensor? input_t, Tensor? h0_t, Tensor? c0_t, Tensor[] params_t, Tensor input, Tensor? h0, Tensor? "
      "c0, Tensor[] params, Tensor[] controls, Tensor output, Tensor gates, Tensor cells, Tensor hidden, int[] "
      "settings, float[] numbers) -> (Tensor output_t, Tensor h_n_t, Tensor c_n_t)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rnn_backward_tangent(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_output_t, Tensor? "
      "grad_h_n_t, Tensor? grad_c_n_t, Tensor? input_t, Tensor? h0_t, Tensor? c0_t, Tensor[] params_t, Tensor input, "
      "Tensor? h0, Tensor? c0, Tensor[] params, Tensor[] controls, Tensor output, Tensor gates, Tensor cells, Tensor "
      "hidden, int[] settings, float[] numbers, bool[] needs) -> (Tensor output_t, Tensor h_n_t, Tensor c_n_t, Tensor "
      "grad_input_t, Tensor grad_h0_t, Tensor grad_c0_t, Tensor[] grad_params_t)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("rnn_tangent", &rnn_tangent);
  m.impl("rnn_backward_tangent", &rnn_backward_tangent);
}

}  // namespace fused_rnn
