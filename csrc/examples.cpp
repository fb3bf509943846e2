// Gradients of the parameters for each of several examples in a batch, on the CPU: the operator rnn_backward_each,
// which vmap of a gradient is, and Opacus asks for (fused_rnn/opacus.py).
//
// One backward pass over the whole batch gives the gradients of the sums of every step, and what else gradients of
// parameters are made of (StepGradients). Row b of each step is of example b % groups; what is left for a parameter is
// one product, or one sum, for all examples. Where the batch is run as pieces (pieces.h), rows go back to where they
// stand in it first, and zeros to masked steps; so they do in a packed batch that does not end for all examples at
// once.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "cpu_backend.h"
#include "derivatives.h"

namespace fused_rnn {

namespace {

// As fused_rnn/ops.py says before it asks: has_gradients_of_examples().
void check_has_kernels(const Tensor& input, Integers settings, Numbers numbers) {
  const Settings s = Settings::restore(settings, numbers);
  const bool is_accurate = input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble;
  TORCH_CHECK(is_accurate && !is_custom(s.kind), "settings: no kernel for gradients of the examples of this call");
}

class GradientsOfExamples {
 public:
  // pieces: those that the stack's batch is made of, or null.
  GradientsOfExamples(const Stack& stack, const BackwardInput& given, const c10::List<bool>& needs,
                      const Pieces* pieces, int64_t groups)
      : stack_(stack),
        given_(given),
        needs_(needs),
        pieces_(pieces),
        groups_(groups),
        D_(stack.D),
        N_(stack.N),
        H_(stack.H),
        P_(stack.P) {
    const int64_t rows = pieces ? pieces->batch() : stack.B;
    TORCH_CHECK(groups >= 1 && rows % groups == 0, "groups: expected a number that divides the batch of ", rows,
                ", got ", groups);
    for (const int64_t size : pieces ? std::vector<int64_t>() : stack.sizes) pads_ = pads_ || size % groups != 0;
  }

  BackwardResult run(Cpu& backend) {
    const int64_t L = stack_.num_layers(), B = stack_.B;
    const std::vector<int64_t> of_h{L * D_, B, P_}, of_c{L * D_, B, H_};
    const bool anew = stack_.reset.defined();  // in the kernels, not as pieces
    const size_t behind = 3 + stack_.params.size();
    grad_input_ = needs_[0] ? make_rows(stack_.input.sizes()) : make(false, {});
    grad_h0_ = make(needs_[1] && stack_.h0.defined(), of_h);
    grad_c0_ = make(needs_[2] && stack_.c0.defined(), of_c);
    grad_reset_h_ = make(anew && stack_.reset_h.defined() && needs_[behind], of_h);
    grad_reset_c_ = make(anew && stack_.reset_c.defined() && needs_[behind + 1], of_c);
    for (size_t i = 0; i < stack_.params.size(); ++i) {
      std::vector<int64_t> shape = parameter_shape(i);
      shape.insert(shape.begin(), groups_);
      grad_params_.push_back(N_ == 0 ? make(needs_[3 + i], shape) : make(false, {}));
    }
    Tensor grad_y = given_.grad_output;
    for (int64_t l = L - 1; l >= 0 && N_ > 0; --l) {
      const Tensor below = l > 0 ? make_rows({N_, D_ * P_}) : grad_input_;
      run_layer(backend, l, grad_y, l > 0 || needs_[0] ? below : Tensor());
      if (l > 0) grad_y = stack_.dropout.empty() ? below : below.mul_(stack_.dropout[l - 1]);
    }
    if (stack_.reset_h.defined()) grad_params_.push_back(grad_reset_h_);
    if (stack_.reset_c.defined()) grad_params_.push_back(grad_reset_c_);
    return {grad_input_, grad_h0_, grad_c0_, grad_params_};
  }

 private:
  // Zeros where no step writes them.
  Tensor make(bool needed, at::IntArrayRef shape) const {
    const auto options = stack_.input.options();
    return needed ? (N_ == 0 ? make_zeros(shape, options) : make_empty(shape, options)) : make_empty({0}, options);
  }
  // A gradient of a layer's input, to which its directions add.
  Tensor make_rows(at::IntArrayRef shape) const {
    return D_ > 1 ? make_zeros(shape, stack_.input.options()) : make(true, shape);
  }

  // Of w_hh as it is stored, whatever blocks the kernels have of it.
  std::vector<int64_t> parameter_shape(size_t i) const {
    std::vector<int64_t> shape = stack_.params[i].sizes().vec();
    if (i % stack_.params_per_direction() == 1) shape[1] = P_ / stack_.settings.within.num_heads;
    return shape;
  }

  // Of a direction, (N, .); undefined where its parameters have no need of it: see StepGradients.
  struct Rows {
    Tensor sums, projected, hidden, seen_c, normal, before_norms, normal_c, of_normal_c;

    Rows(const Stack& stack) {
      const Within& within = stack.settings.within;
      const bool is_lstm = stack.kind() == CellKind::lstm;
      const int64_t H = stack.H, G = gate_count(stack.kind());
      const auto make = [&](bool needed, int64_t features) {
        return needed ? make_empty({stack.N, features}, stack.input.options()) : Tensor();
      };
      sums = make(true, (stack.kind() == CellKind::gru ? 4 : G) * H);
      projected = make(stack.projects(), stack.P);
      hidden = make(stack.projects(), H);
      seen_c = make(within.peephole, H);
      normal = make(within.layer_norm, 2 * G * H);
      before_norms = make(within.layer_norm, 2 * G * H);
      normal_c = make(within.layer_norm && is_lstm, H);
      of_normal_c = make(within.layer_norm && is_lstm, H);
    }

    StepGradients wanted() const {
      StepGradients to;
      to.sums = mutable_data_or_null(sums);
      to.projected = mutable_data_or_null(projected);
      to.hidden = mutable_data_or_null(hidden);
      to.seen_c = mutable_data_or_null(seen_c);
      to.normal = mutable_data_or_null(normal);
      to.before_norms = mutable_data_or_null(before_norms);
      to.normal_c = mutable_data_or_null(normal_c);
      to.of_normal_c = mutable_data_or_null(of_normal_c);
      return to;
    }
  };

  void run_layer(Cpu& backend, int64_t l, const Tensor& grad_y, const Tensor& grad_x) {
    const Tensor x = stack_.layer_input(l, given_.hidden);
    const Tensor y = l == stack_.num_layers() - 1 ? given_.output : given_.hidden.select(0, l);
    std::vector<Rows> rows;
    StepGradients exchanged[2];
    LayerBackward layer;
    layer.sizes = stack_.layer_sizes(l);
    layer.steps = stack_.steps();
    layer.x = stack_.sequence(x);
    layer.y = stack_.sequence(y);
    layer.grad_y = stack_.sequence(grad_y);
    if (given_.grad_hidden.defined()) layer.grad_h = stack_.sequence(given_.grad_hidden.select(0, l));
    layer.grad_x = stack_.sequence(grad_x);
    stack_.put_options(layer);
    layer.plain_gates = false;
    layer.step_gradients = exchanged;
    for (int64_t d = 0; d < D_; ++d) {
      const int64_t i = l * D_ + d;
      exchanged[d] = rows.emplace_back(stack_).wanted();
      DirectionBackward& dir = layer.direction[d];
      put_given(dir, stack_, given_, l, d);
      dir.h0 = const_slice(stack_.h0, i);
      dir.c0 = const_slice(stack_.c0, i);
      dir.grad_h0 = mutable_slice(grad_h0_, i);
      dir.grad_c0 = mutable_slice(grad_c0_, i);
      dir.grad_reset_h = mutable_slice(grad_reset_h_, i);
      dir.grad_reset_c = mutable_slice(grad_reset_c_, i);
    }
    backend.backward(layer);
    for (int64_t d = 0; d < D_; ++d) {
      of_input_side(l, d, rows[d], x);
      of_state_side(l, d, rows[d], y);
      of_cell(l, d, rows[d]);
    }
  }

  // Parameter k of a direction: whether its gradient is wanted, and where it goes.
  bool wants(int64_t l, int64_t d, int64_t k) const { return needs_[3 + stack_.first_param(l, d) + k]; }
  Tensor& result(int64_t l, int64_t d, int64_t k) { return grad_params_[stack_.first_param(l, d) + k]; }

  // The gradient of a matrix from those of what it gives, both (groups, rows, .): (groups, outputs, inputs).
  static Tensor outer(const Tensor& grads, const Tensor& inputs) { return grads.transpose(1, 2).bmm(inputs); }

  // W_ih, b_ih and the gain of W_ih x.
  void of_input_side(int64_t l, int64_t d, const Rows& rows, const Tensor& x) {
    const bool has_norm = stack_.settings.within.layer_norm, has_biases = stack_.settings.has_biases;
    const int64_t gain = stack_.first_norm(), GH = gate_count(stack_.kind()) * H_;
    const bool wants_bias = has_biases && wants(l, d, 2), wants_gain = has_norm && wants(l, d, gain);
    if (wants_bias || wants_gain || (!has_norm && wants(l, d, 0))) {
      const Tensor grads = of_examples(gradients_of_input(stack_.kind(), rows.sums));
      if (wants_bias) result(l, d, 2) = grads.sum(1);
      if (wants_gain) result(l, d, gain) = (grads * of_examples(rows.normal.narrow(1, 0, GH))).sum(1);
      if (!has_norm && wants(l, d, 0)) result(l, d, 0) = outer(grads, of_examples(x));
    }
    if (has_norm && wants(l, d, 0))
      result(l, d, 0) = outer(of_examples(rows.before_norms.narrow(1, 0, GH)), of_examples(x));
  }

  // W_hh, b_hh and the gain of W_hh h.
  void of_state_side(int64_t l, int64_t d, const Rows& rows, const Tensor& y) {
    const bool has_norm = stack_.settings.within.layer_norm, has_biases = stack_.settings.has_biases;
    const int64_t gain = stack_.first_norm() + 1, GH = gate_count(stack_.kind()) * H_;
    const bool wants_bias = has_biases && wants(l, d, 3), wants_gain = has_norm && wants(l, d, gain);
    if (wants_bias || wants_gain || (!has_norm && wants(l, d, 1))) {
      const Tensor grads = of_examples(gradients_of_state(stack_.kind(), rows.sums));
      if (wants_bias) result(l, d, 3) = grads.sum(1);
      if (wants_gain) result(l, d, gain) = (grads * of_examples(rows.normal.narrow(1, GH, GH))).sum(1);
      if (!has_norm && wants(l, d, 1)) result(l, d, 1) = of_heads(grads, of_examples(states_before(l, d, y)));
    }
    if (has_norm && wants(l, d, 1)) {
      const Tensor grads = of_examples(rows.before_norms.narrow(1, GH, GH));
      result(l, d, 1) = of_heads(grads, of_examples(states_before(l, d, y)));
    }
  }

  // outer() for W_hh, as it is stored.
  Tensor of_heads(const Tensor& grads, const Tensor& before) const {
    const int64_t heads = stack_.settings.within.num_heads, K = H_ / heads, G = gate_count(stack_.kind());
    if (heads == 1) return outer(grads, before);
    const int64_t rows = before.size(1);
    const Tensor gates = grads.unflatten(2, {G, heads, K}).permute({0, 3, 2, 4, 1});  // (., heads, G, K, rows)
    const Tensor states = before.unflatten(2, {heads, K}).transpose(1, 2);            // (., heads, rows, K)
    const Tensor blocks = gates.reshape({groups_ * heads, G * K, rows}).bmm(states.reshape({-1, rows, K}));
    return blocks.view({groups_, heads, G, K, K}).transpose(1, 2).reshape({groups_, G * H_, K});
  }

  // An LSTM's projection, peepholes, and gain and bias of c.
  void of_cell(int64_t l, int64_t d, const Rows& rows) {
    if (rows.projected.defined() && wants(l, d, stack_.projection()))
      result(l, d, stack_.projection()) = outer(of_examples(rows.projected), of_examples(rows.hidden));
    if (rows.seen_c.defined() && wants(l, d, stack_.peephole())) {
      const Tensor grads = of_examples(rows.sums), before = of_examples(cells_before(l, d));
      const Tensor of_o = grads.narrow(2, 3 * H_, H_) * of_examples(rows.seen_c);
      const Tensor of_i_and_f = grads.narrow(2, 0, 2 * H_).unflatten(2, {2, H_}) * before.unsqueeze(2);
      result(l, d, stack_.peephole()) = at::cat({of_i_and_f.sum(1).flatten(1), of_o.sum(1)}, 1);
    }
    if (!rows.normal_c.defined()) return;
    const int64_t gain = stack_.first_norm() + 2;
    const Tensor grads = of_examples(rows.of_normal_c);
    if (wants(l, d, gain)) result(l, d, gain) = (grads * of_examples(rows.normal_c)).sum(1);
    if (stack_.settings.has_biases && wants(l, d, gain + 1)) result(l, d, gain + 1) = grads.sum(1);
  }

  // Rows of all steps as (groups, rows of an example, features).
  Tensor of_examples(const Tensor& rows) const {
    const Tensor all = pieces_           ? pieces_->unpack(rows.contiguous()).flatten(0, 1)
                       : pads_           ? padded(rows.contiguous())
                       : rows.dim() == 3 ? rows.flatten(0, 1)
                                         : rows;
    return all.unflatten(0, {all.size(0) / groups_, groups_}).transpose(0, 1);
  }

  // (T * B, features) of a packed batch, zeros behind the ends of its rows.
  Tensor padded(const Tensor& rows) const {
    const Tensor result = make_zeros({stack_.T * stack_.B, rows.size(1)}, rows.options());
    const int64_t bytes = rows.size(1) * rows.element_size();
    const auto* from = static_cast<const char*>(rows.const_data_ptr());
    auto* to = static_cast<char*>(result.mutable_data_ptr());
    for (int64_t t = 0; t < stack_.T; ++t)
      std::memcpy(to + t * stack_.B * bytes, from + stack_.offsets[t] * bytes, stack_.sizes[t] * bytes);
    return result;
  }

  // What W_hh was multiplied with in each step: h before it, after recurrent dropout; (N, P).
  Tensor states_before(int64_t l, int64_t d, const Tensor& y) const {
    const Steps steps = stack_.steps();
    const Sequence of_y = stack_.sequence(y);
    const Extras extras = stack_.extras(l * D_ + d);
    const int64_t size = y.element_size();
    const auto earlier = [&](int64_t t, int64_t b) {
      return static_cast<const char*>(of_y.data) + (steps.step(of_y, t) + b * of_y.batch_stride + d * P_) * size;
    };
    const Tensor result = before(d, P_, const_slice(stack_.h0, l * D_ + d), extras.reset_h, earlier);
    if (!extras.dropout) return result;
    const Tensor factors = stack_.recurrent_dropout.select(0, l * D_ + d);  // (B, P)
    for (int64_t t = 0, first = 0; t < steps.T; first += steps.rows(t++))
      result.narrow(0, first, steps.rows(t)).mul_(factors.narrow(0, 0, steps.rows(t)));
    return result;
  }

  // c before each step, (N, H).
  Tensor cells_before(int64_t l, int64_t d) const {
    const Steps steps = stack_.steps();
    const auto* cells = static_cast<const char*>(const_slice(given_.cells, l * D_ + d));
    const auto earlier = [&](int64_t t, int64_t b) {
      return cells + (steps.first_row(t) + b) * H_ * given_.cells.element_size();
    };
    return before(d, H_, const_slice(stack_.c0, l * D_ + d), stack_.extras(l * D_ + d).reset_c, earlier);
  }

  // A state before each step, (N, features): that of earlier(t, b), or those that rows begin with, null for zeros.
  template <class Earlier>
  Tensor before(int64_t d, int64_t features, const void* initial, const void* anew, Earlier earlier) const {
    const Tensor result = make_zeros({N_, features}, stack_.input.options());
    const Steps steps = stack_.steps();
    const int64_t bytes = features * result.element_size();
    const auto row = [&](const void* states, int64_t b) {
      return states ? static_cast<const char*>(states) + b * bytes : nullptr;
    };
    char* to = static_cast<char*>(result.mutable_data_ptr());
    for (int64_t t = 0; t < steps.T; ++t) {
      const int64_t from = d == 0 ? t - 1 : t + 1;
      for (int64_t b = 0; b < steps.rows(t); ++b, to += bytes) {
        const char* state;
        if (steps.reset && steps.begins_anew(t, b, d == 1)) {
          state = row(anew, b);
        } else if (from < 0 || from >= steps.T || b >= steps.rows(from)) {
          state = row(initial, b);
        } else {
          state = earlier(from, b);
        }
        if (state) std::memcpy(to, state, bytes);
      }
    }
    return result;
  }

  const Stack& stack_;
  const BackwardInput& given_;
  const c10::List<bool>& needs_;
  const Pieces* pieces_;
  const int64_t groups_, D_, N_, H_, P_;
  bool pads_ = false;  // a packed batch in which examples end at different steps
  Tensor grad_input_, grad_h0_, grad_c0_, grad_reset_h_, grad_reset_c_;
  std::vector<Tensor> grad_params_;
};

BackwardResult rnn_backward_each(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                 const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                                 const OptionalTensor& grad_hidden, const Tensor& input, const OptionalTensor& h0,
                                 const OptionalTensor& c0, at::TensorList params, at::TensorList controls,
                                 const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                                 Integers settings, Numbers numbers, const c10::List<bool>& needs, int64_t groups) {
  check_has_kernels(input, settings, numbers);
  const auto run = [&](Cpu& backend, const Stack& stack, const BackwardInput& given, const c10::List<bool>& needed,
                       const Pieces* pieces) {
    return GradientsOfExamples(stack, given, needed, pieces, groups).run(backend);
  };
  return rnn_backward_by<Cpu>(run, grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, params,
                              controls, output, gates, cells, hidden, settings, numbers, needs);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "rnn_backward_each(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, Tensor? "
      "grad_hidden, Tensor input, Tensor? h0, Tensor? c0, Tensor[] params, Tensor[] controls, Tensor output, Tensor "
      "gates, Tensor cells, Tensor hidden, int[] settings, float[] numbers, bool[] needs, int groups) -> (Tensor "
      "grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_params)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) { m.impl("rnn_backward_each", &rnn_backward_each); }

}  // namespace fused_rnn
