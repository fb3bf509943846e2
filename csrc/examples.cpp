// Gradients of the parameters for each of several examples in a batch, on the CPU: the operator rnn_backward_each,
// which vmap of a gradient is.
//
// One backward pass over the whole batch gives the gradients of the sums of every step (StepGradients). Of all these
// rows n is of example n % groups, in a packed batch, too; what is left for a parameter is one product for all
// examples. Where the batch is run as pieces (pieces.h), rows go back to where they stand in it first, and zeros to
// masked steps.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "cpu_backend.h"
#include "derivatives.h"

namespace fused_rnn {

namespace {

// As fused_rnn/ops.py says before it asks: has_gradients_of_examples().
void check_has_kernels(const Tensor& input, at::TensorList params, Integers settings, Numbers numbers) {
  const Settings s = Settings::restore(settings, numbers);
  const Within& within = s.within;
  const int64_t of_direction = s.has_biases ? 4 : 2;  // one more with a projection
  const int64_t states = within.reset_state ? 1 + has_cell_state(s.kind) : 0;
  const bool is_accurate = input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble;
  TORCH_CHECK(is_accurate && !is_custom(s.kind) && !within.layer_norm && !within.peephole &&
                  int64_t(params.size()) == s.num_layers * s.num_directions() * of_direction + states,
              "settings: no kernel for gradients of the examples of this call");
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
        H_(stack.H) {
    const auto check = [&](int64_t rows) {
      TORCH_CHECK(groups >= 1 && rows % groups == 0, "groups: expected a number that divides the batch of ", rows,
                  ", got ", groups);
    };
    check(pieces ? pieces->batch() : stack.B);
    for (const int64_t size : pieces ? std::vector<int64_t>() : stack.sizes) check(size);
  }

  BackwardResult run(Cpu& backend) {
    const int64_t L = stack_.num_layers(), B = stack_.B;
    const std::vector<int64_t> states{L * D_, B, H_};
    const bool anew = stack_.reset.defined();  // in the kernels, not as pieces
    const size_t behind = 3 + stack_.params.size();
    grad_input_ = needs_[0] ? make_rows(stack_.input.sizes()) : make(false, {});
    grad_h0_ = make(needs_[1] && stack_.h0.defined(), states);
    grad_c0_ = make(needs_[2] && stack_.c0.defined(), states);
    grad_reset_h_ = make(anew && stack_.reset_h.defined() && needs_[behind], states);
    grad_reset_c_ = make(anew && stack_.reset_c.defined() && needs_[behind + 1], states);
    for (size_t i = 0; i < stack_.params.size(); ++i) {
      std::vector<int64_t> shape = parameter_shape(i);
      shape.insert(shape.begin(), groups_);
      grad_params_.push_back(N_ == 0 ? make(needs_[3 + i], shape) : make(false, {}));
    }
    Tensor grad_y = given_.grad_output;
    for (int64_t l = L - 1; l >= 0 && N_ > 0; --l) {
      const Tensor below = l > 0 ? make_rows({N_, D_ * H_}) : grad_input_;
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
    if (i % stack_.params_per_direction() == 1) shape[1] = H_ / stack_.settings.within.num_heads;
    return shape;
  }

  void run_layer(Cpu& backend, int64_t l, const Tensor& grad_y, const Tensor& grad_x) {
    const Tensor x = stack_.layer_input(l, given_.hidden);
    const Tensor y = l == stack_.num_layers() - 1 ? given_.output : given_.hidden.select(0, l);
    const int64_t grad_gates = stack_.kind() == CellKind::gru ? 4 : gate_count(stack_.kind());
    Tensor sums[2];
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
      sums[d] = make_empty({N_, grad_gates * H_}, stack_.input.options());
      exchanged[d].sums = sums[d].mutable_data_ptr();
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
    for (int64_t d = 0; d < D_; ++d) multiply(l, d, sums[d], x, y);
  }

  // Gradients of a direction's parameters.
  void multiply(int64_t l, int64_t d, const Tensor& sums, const Tensor& x, const Tensor& y) {
    const int64_t p = stack_.first_param(l, d), heads = stack_.settings.within.num_heads, K = H_ / heads;
    const auto wants = [&](int64_t k) { return k < stack_.params_per_direction() && needs_[3 + p + k]; };
    if (wants(0) || wants(2)) {
      const Tensor to_input = of_examples(gradients_of_input(stack_.kind(), sums));
      if (wants(0)) grad_params_[p] = to_input.transpose(1, 2).bmm(of_examples(x));
      if (wants(2)) grad_params_[p + 2] = to_input.sum(1);
    }
    if (wants(1) || wants(3)) {
      const Tensor to_state = of_examples(gradients_of_state(stack_.kind(), sums));
      if (wants(3)) grad_params_[p + 3] = to_state.sum(1);
      if (!wants(1)) return;
      const Tensor before = of_examples(states_before(l, d, y));
      if (heads == 1) {
        grad_params_[p + 1] = to_state.transpose(1, 2).bmm(before);
        return;
      }
      const int64_t G = gate_count(stack_.kind()), rows = before.size(1);
      const Tensor gates = to_state.unflatten(2, {G, heads, K}).permute({0, 3, 2, 4, 1});  // (., heads, G, K, rows)
      const Tensor states = before.unflatten(2, {heads, K}).transpose(1, 2);               // (., heads, rows, K)
      const Tensor blocks = gates.reshape({groups_ * heads, G * K, rows}).bmm(states.reshape({-1, rows, K}));
      grad_params_[p + 1] = blocks.view({groups_, heads, G, K, K}).transpose(1, 2).reshape({groups_, G * H_, K});
    }
  }

  // Rows of all steps as (groups, rows of an example, features).
  Tensor of_examples(const Tensor& rows) const {
    const Tensor all = pieces_           ? pieces_->unpack(rows.contiguous()).flatten(0, 1)
                       : rows.dim() == 3 ? rows.flatten(0, 1)
                                         : rows;
    return all.unflatten(0, {all.size(0) / groups_, groups_}).transpose(0, 1);
  }

  // What W_hh was multiplied with in each step: h before it, after recurrent dropout; (N, H).
  Tensor states_before(int64_t l, int64_t d, const Tensor& y) const {
    const Tensor result = make_zeros({N_, H_}, stack_.input.options());
    const Steps steps = stack_.steps();
    const Sequence of_y = stack_.sequence(y);
    const Extras extras = stack_.extras(l * D_ + d);
    const Tensor factors = extras.dropout ? make_empty({N_, H_}, stack_.input.options()) : Tensor();
    const int64_t size = y.element_size(), bytes = H_ * size;
    const auto row = [&](const void* data, int64_t place) {
      return data ? static_cast<const char*>(data) + place * size : nullptr;
    };
    char* to = static_cast<char*>(result.mutable_data_ptr());
    char* factor = static_cast<char*>(mutable_data_or_null(factors));
    for (int64_t t = 0; t < steps.T; ++t) {
      const int64_t from = d == 0 ? t - 1 : t + 1;
      for (int64_t b = 0; b < steps.rows(t); ++b, to += bytes) {
        const char* state;
        if (steps.reset && steps.begins_anew(t, b, d == 1)) {
          state = row(extras.reset_h, b * H_);
        } else if (from < 0 || from >= steps.T || b >= steps.rows(from)) {
          state = row(const_slice(stack_.h0, l * D_ + d), b * H_);
        } else {
          state = row(of_y.data, steps.step(of_y, from) + b * of_y.batch_stride + d * H_);
        }
        if (state) std::memcpy(to, state, bytes);
        if (factor) std::memcpy(std::exchange(factor, factor + bytes), row(extras.dropout, b * H_), bytes);
      }
    }
    return factor ? result.mul_(factors) : result;
  }

  const Stack& stack_;
  const BackwardInput& given_;
  const c10::List<bool>& needs_;
  const Pieces* pieces_;
  const int64_t groups_, D_, N_, H_;
  Tensor grad_input_, grad_h0_, grad_c0_, grad_reset_h_, grad_reset_c_;
  std::vector<Tensor> grad_params_;
};

BackwardResult rnn_backward_each(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                 const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                                 const OptionalTensor& grad_hidden, const Tensor& input, const OptionalTensor& h0,
                                 const OptionalTensor& c0, at::TensorList params, at::TensorList controls,
                                 const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                                 Integers settings, Numbers numbers, const c10::List<bool>& needs, int64_t groups) {
  check_has_kernels(input, params, settings, numbers);
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
