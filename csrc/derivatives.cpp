// Forward mode, and derivatives of the backward pass, on the CPU: the operators rnn_tangent and rnn_backward_tangent.
//
// The tangents of a layer obey a recurrence that is linear (cells/linearised.h), with the recurrent weights of the layer
// and coefficients of each step that was computed; so do the gradients, backwards, and how these change along a
// direction. Each is a scan of the layer's own loops over a linear cell. What does not go through time is a product over
// all steps at once, of which x and W_ih', h and W_hh' (the tangents of weights) are stacked on the input of the scan.
//
// A direction that runs backwards is turned around first, so that there is only the other here.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "derivatives.h"
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

Tensor product(const Tensor& a, const Tensor& b) { return at::matmul(a, b); }

// a + b, of which either may be undefined.
Tensor sum(const Tensor& a, const Tensor& b) {
  if (!a.defined()) return b;
  return b.defined() ? a + b : a;
}

Tensor or_zeros(const Tensor& t, at::IntArrayRef shape, const Tensor& like) {
  return t.defined() ? t : at::zeros(shape, like.options());
}

// What changes with the input, the states and the parameters of a call; undefined where nothing does.
struct Direction {
  Tensor input, h0, c0;
  std::vector<Tensor> params;
};

// The forward pass of a direction of a layer in its own order of time, and its derivative.
struct Course {
  Tensor x, h, h_prev, saved, c, c_prev;  // (T, B, .), as all below but the weights
  Tensor w_ih, w_hh;
  Tensor coefficients;
  Tensor x_t, h_t, h_prev_t, c_t, c_prev_t, sums_t;
  Tensor w_ih_t, w_hh_t;
};

// Gradients of a direction of a layer.
struct Gradients {
  Tensor sums, h, c;  // of the sums, and of h and c after each step
  Tensor h0, c0;
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
        sums_(kind_ == CellKind::gru ? 4 : gate_count(kind_)),
        has_cell_(has_cell_state(kind_)),
        output_(output),
        gates_(gates),
        cells_(cells),
        hidden_(hidden),
        courses_(L_ * D_) {}

  Tensor output_t, h_n_t, c_n_t;

  void forward() {
    const auto options = stack_.input.options();
    h_n_t = at::empty({L_ * D_, B_, H_}, options);
    c_n_t = at::empty(has_cell_ ? std::vector<int64_t>{L_ * D_, B_, H_} : std::vector<int64_t>{0}, options);
    Tensor x = stack_.input, x_t = along_.input;
    for (int64_t l = 0; l < L_; ++l) {
      const Tensor y = l == L_ - 1 ? output_ : hidden_.select(0, l).view({T_, B_, D_ * H_});
      output_t = at::empty({T_, B_, D_ * H_}, options);
      for (int64_t d = 0; d < D_; ++d) {
        Course& course = courses_[l * D_ + d];
        course.x = turned(x, d);
        course.x_t = turned(x_t, d);
        course.h = of_direction(y, d);
        scan_tangents(course, l, d);
        output_t.narrow(2, d * H_, H_).copy_(turned(course.h_t, d));
        h_n_t[l * D_ + d].copy_(course.h_t[T_ - 1]);
        if (has_cell_) c_n_t[l * D_ + d].copy_(course.c_t[T_ - 1]);
      }
      x = dropped(y, l);
      x_t = dropped(output_t, l);
    }
  }

  // Gradients of a forward pass, and what comes of them: undefined for zeros.
  struct Seeds {
    Tensor output, h_n, c_n;
  };

  // How the gradients of input, h0, c0 and params change, of those that `needs` asks for.
  BackwardResult backward(const Seeds& seeds, const Seeds& seeds_t, const c10::List<bool>& needs) {
    const auto options = stack_.input.options();
    const auto make = [&](bool needed, at::IntArrayRef shape) {
      return at::empty(needed ? shape : at::IntArrayRef{0}, options);
    };
    Tensor grad_input = make(false, {});
    const Tensor grad_h0 = make(needs[1] && stack_.h0.defined(), {L_ * D_, B_, H_});
    const Tensor grad_c0 = make(needs[2] && stack_.c0.defined(), {L_ * D_, B_, H_});
    std::vector<Tensor> grad_params(stack_.params.size());
    Tensor grad = seeds.output, grad_t = seeds_t.output;
    for (int64_t l = L_ - 1; l >= 0; --l) {
      Tensor below, below_t;
      for (int64_t d = 0; d < D_; ++d) {
        const int64_t i = l * D_ + d;
        const Course& course = courses_[i];
        const auto seed = [&](const Tensor& t) { return t.defined() ? t[i] : Tensor(); };
        const Gradients own =
            scan_gradients(course, of_direction(grad, d), seed(seeds.h_n), seed(seeds.c_n), nullptr, false, false);
        const Tensor to_state = of_state(own.sums);
        const Changes changes = changed_gradients(course, own);
        Tensor grad_y_t = of_direction(grad_t, d), grad_h0_t;
        const bool wants_h0 = grad_h0.numel() > 0;
        if (course.w_hh_t.defined()) {  // what goes through the change of W_hh to the state before
          grad_y_t = grad_y_t.defined() ? grad_y_t.clone() : at::zeros({T_, B_, H_}, options);
          if (T_ > 1) grad_y_t.narrow(0, 0, T_ - 1).add_(product(to_state.narrow(0, 1, T_ - 1), course.w_hh_t));
          if (wants_h0) grad_h0_t = product(to_state[0], course.w_hh_t);
        }
        const Gradients change = scan_gradients(course, grad_y_t, seed(seeds_t.h_n), seed(seeds_t.c_n), &changes,
                                                wants_h0, grad_c0.numel() > 0);
        if (wants_h0) grad_h0[i].copy_(sum(change.h0, grad_h0_t));
        if (grad_c0.numel() > 0) grad_c0[i].copy_(change.c0);
        const Tensor to_input = of_input(own.sums), to_input_t = of_input(change.sums);
        if (l > 0 || needs[0]) {
          Tensor part = product(to_input_t, course.w_ih);
          if (course.w_ih_t.defined()) part = part + product(to_input, course.w_ih_t);
          below_t = sum(below_t, turned(part, d));
          if (l > 0) below = sum(below, turned(product(to_input, course.w_ih), d));
        }
        const int64_t p = stack_.first_param(l, d);
        const auto wants = [&](int64_t k) { return bool(needs[3 + p + k]); };
        const auto outer = [](const Tensor& a, const Tensor& b) { return a.flatten(0, 1).t().mm(b.flatten(0, 1)); };
        const auto of_weight = [&](const Tensor& change_of_grad, const Tensor& rows, const Tensor& of_grad,
                                   const Tensor& rows_t) {
          const Tensor result = outer(change_of_grad, rows);
          return rows_t.defined() ? result + outer(of_grad, rows_t) : result;
        };
        if (wants(0)) grad_params[p] = of_weight(to_input_t, course.x, to_input, course.x_t);
        const Tensor to_state_t = of_state(change.sums);
        if (wants(1)) grad_params[p + 1] = of_weight(to_state_t, course.h_prev, to_state, course.h_prev_t);
        if (stack_.settings.has_biases) {
          if (wants(2)) grad_params[p + 2] = to_input_t.flatten(0, 1).sum(0);
          if (wants(3)) grad_params[p + 3] = to_state_t.flatten(0, 1).sum(0);
        }
      }
      if (l == 0) {
        if (needs[0]) grad_input = below_t;
      } else {
        grad = dropped(below, l - 1);
        grad_t = dropped(below_t, l - 1);
      }
    }
    for (Tensor& t : grad_params)
      if (!t.defined()) t = at::empty({0}, options);
    return {grad_input, grad_h0, grad_c0, grad_params};
  }

 private:
  // Of the gradients of the sums (N, sums * H), of h_prev and of c_prev; undefined where the cell has none.
  struct Changes {
    Tensor sums, h, c;
  };

  // (T, B, .) in the order of direction d.
  static Tensor turned(const Tensor& t, int64_t d) { return d == 1 && t.defined() ? t.flip(0) : t; }

  // Direction d of (T, B, D * H), in its own order.
  Tensor of_direction(const Tensor& t, int64_t d) const {
    return t.defined() ? turned(t.narrow(2, d * H_, H_), d).contiguous() : t;
  }

  // What layer l gives the one above, or gets from it.
  Tensor dropped(const Tensor& t, int64_t l) const {
    if (!t.defined() || l >= int64_t(stack_.dropout.size())) return t;
    return t * stack_.dropout[l].reshape({T_, B_, D_ * H_});
  }

  // (T, B, .) one step later, behind the initial state; undefined if both are.
  Tensor later(const Tensor& t, const Tensor& initial) const {
    if (!t.defined() && !initial.defined()) return {};
    const Tensor first = or_zeros(initial, {B_, H_}, stack_.input).unsqueeze(0);
    return at::cat({first, t.narrow(0, 0, T_ - 1)});
  }

  // The rows of a weight or a bias of the input, or of the state, as those of the sums.
  Tensor rows_of_sums(const Tensor& w, bool of_state) const {
    if (kind_ != CellKind::gru || !w.defined()) return w;
    const std::vector<Tensor> gates = w.chunk(3);
    const Tensor none = at::zeros_like(gates[2]);
    return of_state ? at::cat({none, gates[0], gates[1], gates[2]}) : at::cat({gates[2], gates[0], gates[1], none});
  }
  // The gradients of the sums (T, B, sums * H) as those of the rows of W_ih, or of W_hh.
  Tensor of_input(const Tensor& t) const {
    if (kind_ != CellKind::gru) return t;
    return at::cat({t.narrow(2, H_, 2 * H_), t.narrow(2, 0, H_)}, 2);
  }
  Tensor of_state(const Tensor& t) const {
    return kind_ != CellKind::gru ? t : t.narrow(2, H_, 3 * H_).contiguous();
  }

  LayerSizes sizes(int64_t input_size) const {
    LayerSizes s;
    s.kind = kind_;
    s.dtype = dtype_of(stack_.input, "input");
    s.input_size = input_size;
    s.hidden_size = s.state_size = H_;
    return s;
  }
  Steps steps() const {
    Steps s;
    s.T = T_;
    s.B = B_;
    return s;
  }
  Sequence sequence(const Tensor& t) const { return stack_.sequence(t); }

  KnownSteps known(const Course& course) const {
    KnownSteps s;
    s.kind = kind_;
    s.dtype = dtype_of(stack_.input, "input");
    s.H = H_;
    s.saved = data_or_null(course.saved);
    s.h = data_or_null(course.h);
    s.h_prev = data_or_null(course.h_prev);
    s.c = data_or_null(course.c);
    s.c_prev = data_or_null(course.c_prev);
    return s;
  }

  template <class F>
  void for_rows(F f) const {
    const int64_t rows = T_ * B_, grain = std::max<int64_t>(1, 16384 / H_);
    if (rows <= grain || team_is_late() || usable_threads(at::get_num_threads()) == 1) {
      f(0, rows);
    } else {
      at::parallel_for(0, rows, grain, f);
    }
  }

  void scan_tangents(Course& course, int64_t l, int64_t d) const {
    const auto options = stack_.input.options();
    const int64_t i = l * D_ + d, p = stack_.first_param(l, d);
    const auto at_index = [&](const Tensor& t) { return t.defined() ? t[i] : Tensor(); };
    const auto steps_of = [&](const Tensor& saved, at::IntArrayRef shape) {
      return turned(saved.select(0, i).view(shape), d).contiguous();
    };
    const int64_t saved = saved_gate_count(kind_);
    if (saved > 0) course.saved = steps_of(gates_, {T_, B_, saved * H_});
    if (has_cell_) {
      course.c = steps_of(cells_, {T_, B_, H_});
      course.c_prev = later(course.c, at_index(stack_.c0));
    }
    course.h_prev = later(course.h, at_index(stack_.h0));
    course.w_ih = stack_.params[p];
    course.w_hh = rows_of_sums(stack_.params[p + 1], true);
    course.w_ih_t = along_.params[p];
    course.w_hh_t = along_.params[p + 1];

    const int64_t values = kind_ == CellKind::lstm ? 6 : kind_ == CellKind::gru ? 5 : 1;
    course.coefficients = at::empty({T_, B_, values * H_}, options);
    const KnownSteps steps_known = known(course);
    void* const coefficients = course.coefficients.mutable_data_ptr();
    for_rows(
        [&](int64_t begin, int64_t end) { kernels().derivatives->coefficients(steps_known, begin, end, coefficients); });

    c10::SmallVector<Tensor, 3> inputs, weights;
    const auto add = [&](const Tensor& rows, const Tensor& weight) {
      inputs.push_back(rows);
      weights.push_back(weight);
    };
    if (course.x_t.defined()) add(course.x_t, rows_of_sums(course.w_ih, false));
    if (course.w_ih_t.defined()) add(course.x, rows_of_sums(course.w_ih_t, false));
    if (course.w_hh_t.defined()) add(course.h_prev, rows_of_sums(course.w_hh_t, true));
    if (inputs.empty()) add(at::zeros({T_, B_, 1}, options), at::zeros({sums_ * H_, 1}, options));
    const bool one = inputs.size() == 1;
    const Tensor x = one ? with_contiguous_rows(inputs[0]) : at::cat(inputs, 2);
    const Tensor w = one ? weights[0].contiguous() : at::cat(weights, 1);
    Tensor b_ih, b_hh;
    if (stack_.settings.has_biases) {
      b_ih = rows_of_sums(along_.params[p + 2], false);
      b_hh = rows_of_sums(along_.params[p + 3], true);
    }
    if (b_ih.defined() != b_hh.defined()) {
      b_ih = or_zeros(b_ih, {sums_ * H_}, x);
      b_hh = or_zeros(b_hh, {sums_ * H_}, x);
    }
    course.h_t = at::empty({T_, B_, H_}, options);
    course.sums_t = at::empty({T_, B_, sums_ * H_}, options);
    const Tensor c_n = has_cell_ ? at::empty({B_, H_}, options) : Tensor();
    if (has_cell_) course.c_t = at::empty({T_, B_, H_}, options);

    LayerForward layer;
    layer.sizes = sizes(x.size(2));
    layer.steps = steps();
    layer.x = sequence(x);
    layer.y = sequence(course.h_t);
    layer.coefficients = coefficients;
    DirectionForward& dir = layer.direction[0];
    dir.weights.w_ih = w.const_data_ptr();
    dir.weights.w_hh = course.w_hh.const_data_ptr();
    dir.weights.b_ih = data_or_null(b_ih);
    dir.weights.b_hh = data_or_null(b_hh);
    const Tensor h0 = at_index(along_.h0), c0 = at_index(along_.c0);
    dir.h0 = data_or_null(h0);
    dir.c0 = data_or_null(c0);
    dir.c_n = mutable_data_or_null(c_n);
    dir.gates = course.sums_t.mutable_data_ptr();
    dir.cells = mutable_data_or_null(course.c_t);
    run_layer(layer, kernels().derivatives->forward, false);
    course.h_prev_t = later(course.h_t, h0);
    if (has_cell_) course.c_prev_t = later(course.c_t, c0);
  }

  // The gradients of a direction's steps: with `changes`, how they change.
  Gradients scan_gradients(const Course& course, const Tensor& grad_y, const Tensor& grad_h_n, const Tensor& grad_c_n,
                           const Changes* changes, bool wants_h0, bool wants_c0) const {
    const auto options = stack_.input.options();
    const auto make = [&](bool wanted, at::IntArrayRef shape) { return wanted ? at::empty(shape, options) : Tensor(); };
    Gradients result;
    result.sums = at::empty({T_, B_, sums_ * H_}, options);
    result.h = make(!changes, {T_, B_, H_});
    result.c = make(!changes && has_cell_, {T_, B_, H_});
    result.h0 = make(wants_h0, {B_, H_});
    result.c0 = make(wants_c0, {B_, H_});
    LayerBackward layer;
    layer.sizes = sizes(1);
    layer.steps = steps();
    layer.y = sequence(course.h);
    layer.grad_y = sequence(grad_y);
    DirectionBackward& dir = layer.direction[0];
    dir.weights.w_hh = course.w_hh.const_data_ptr();
    dir.gates = course.coefficients.const_data_ptr();
    dir.grad_h_n = data_or_null(grad_h_n);
    dir.grad_c_n = data_or_null(grad_c_n);
    dir.grad_h0 = mutable_data_or_null(result.h0);
    dir.grad_c0 = mutable_data_or_null(result.c0);
    if (changes) {
      layer.linear.more_of_sums = data_or_null(changes->sums);
      layer.linear.more_of_h = data_or_null(changes->h);
      layer.linear.more_of_c = data_or_null(changes->c);
    }
    layer.linear.sums = result.sums.mutable_data_ptr();
    layer.linear.grad_h = mutable_data_or_null(result.h);
    layer.linear.grad_c = mutable_data_or_null(result.c);
    run_layer(layer, kernels().derivatives->backward, true);
    return result;
  }

  // How the gradients of steps change with the steps, those of their h and c staying as they are.
  Changes changed_gradients(const Course& course, const Gradients& own) const {
    const auto options = stack_.input.options();
    Changes changes;
    changes.sums = at::empty({T_, B_, sums_ * H_}, options);
    if (kind_ == CellKind::gru) changes.h = at::empty({T_, B_, H_}, options);
    if (has_cell_) changes.c = at::empty({T_, B_, H_}, options);
    KnownSteps s = known(course);
    s.sums_t = course.sums_t.const_data_ptr();
    s.h_t = course.h_t.const_data_ptr();
    s.h_prev_t = course.h_prev_t.const_data_ptr();
    s.c_t = data_or_null(course.c_t);
    s.c_prev_t = data_or_null(course.c_prev_t);
    s.grad_h = own.h.const_data_ptr();
    s.grad_c = data_or_null(own.c);
    void *const of_sums = changes.sums.mutable_data_ptr(), *const of_h = mutable_data_or_null(changes.h),
                *const of_c = mutable_data_or_null(changes.c);
    for_rows([&](int64_t begin, int64_t end) {
      kernels().derivatives->gradient_changes(s, begin, end, of_sums, of_h, of_c);
    });
    return changes;
  }

  const Stack& stack_;
  const Direction& along_;
  const CellKind kind_;
  const int64_t L_, D_, T_, B_, H_, sums_;
  const bool has_cell_;
  const Tensor output_, gates_, cells_, hidden_;
  std::vector<Course> courses_;
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
  Tensor in_callers_order(const Tensor& t) const {
    return stack.batch_first && t.dim() == 3 ? t.transpose(0, 1) : t;
  }
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

BackwardTangentResult rnn_backward_tangent(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const OptionalTensor& grad_output_t, const OptionalTensor& grad_h_n_t, const OptionalTensor& grad_c_n_t,
    const OptionalTensor& input_t, const OptionalTensor& h0_t, const OptionalTensor& c0_t, at::TensorList params_t,
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
    at::TensorList controls, const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
    Integers settings, Numbers numbers, const c10::List<bool>& needs) {
  const Given given(input_t, h0_t, c0_t, params_t, input, h0, c0, params, controls, output, gates, cells, hidden,
                    settings, numbers);
  const Stack& stack = given.stack;
  TORCH_CHECK(needs.size() == 3 + params.size(), "needs: expected ", 3 + params.size(), " values, got ", needs.size());
  const bool has_cell = has_cell_state(stack.kind());
  const std::vector<int64_t> states{stack.num_layers() * stack.D, stack.B, stack.H};
  TORCH_CHECK(has_cell || (!grad_c_n && !grad_c_n_t), "grad_c_n: expected none without a cell state");
  const auto seeds = [&](const OptionalTensor& y, const OptionalTensor& h, const OptionalTensor& c) {
    return StackDerivatives::Seeds{y ? given.in_time(*y, stack.output_shape(), "grad_output") : Tensor(),
                                   given_tensor(h, input, states, "grad_h_n"),
                                   given_tensor(c, input, states, "grad_c_n")};
  };
  StackDerivatives derivatives(stack, given.along, given.output, gates, cells, hidden);
  derivatives.forward();
  auto [grad_input, grad_h0, grad_c0, grad_params] =
      derivatives.backward(seeds(grad_output, grad_h_n, grad_c_n), seeds(grad_output_t, grad_h_n_t, grad_c_n_t), needs);
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
