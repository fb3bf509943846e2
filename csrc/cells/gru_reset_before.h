// GRU with the reset gate before the recurrent product (Cho et al. 2014), gates in the order r, z, n:
//   n = tanh(x_n + W_hn (r * h) + b_hn)        h' = (1 - z) * n + z * h
//
// W_hn waits for r, so a step has two parts with a product between them: reset(), W_hn (r * h), forward(). Backward in
// reverse: backward(), the gradient of n's sum times W_hn, reset_backward().
#pragma once

#include "cell.h"

namespace fused_rnn {

struct GruResetBefore {
  static constexpr CellKind kind = CellKind::gru;
  static constexpr int gates = 3;
  // r, z, n after their activations, as forward() gives them; then r * h as it was multiplied, from before forward().
  static constexpr int saved = 4;
  // Of r, from reset_backward(), and of z and n. The fourth is nobody's: with it they can stand where the saved values
  // do, and r * h, which the gradient of W_hn is made of, stays there.
  static constexpr int grad_gates = 4;
  static constexpr int states = 0;
  static constexpr bool has_cell = states > 0;
  static constexpr bool reads_h = true;
  static constexpr bool hidden_bias_apart(int) { return false; }
  static constexpr GateGrads input_grads = {0, {0, 1, 2}};
  static constexpr GateGrads hidden_grads = {0, {0, 1, 2}};
  // Of the gates those whose W_hh multiplies h; that of the others multiplies r * h.
  static constexpr int gates_of_h = 2;

  // r, from its sums over x and h.
  template <class V, class Options>
  static FRNN_HOST_DEVICE V reset(V x, V r, const Options& options) {
    return options.template gate<V>(x + r);
  }

  template <class V, class Options>
  static FRNN_HOST_DEVICE void forward(const V* x, const V* r, V h_prev, V, V& h, V&, V* saved_values,
                                       const Options& options) {
    const V update = options.template gate<V>(x[1] + r[1]);
    const V candidate = options.template state<V>(x[2] + r[2]);
    h = candidate + update * (h_prev - candidate);
    saved_values[0] = reset<V>(x[0], r[0], options);
    saved_values[1] = update;
    saved_values[2] = candidate;
  }

  template <class V, class Options>
  static FRNN_HOST_DEVICE void backward(const V* saved_values, V, V h_prev, V, V, V dh, V, V* grads, V& dh_prev, V&,
                                        const Options& options) {
    using S = typename Lanes<V>::Scalar;
    const V update = saved_values[1], candidate = saved_values[2];
    grads[1] = options.template gate_gradient<V>(dh * (h_prev - candidate), update);
    grads[2] = options.template state_gradient<V>(dh * (S(1) - update), candidate);
    dh_prev = dh * update;
  }

  // The gradient of r's sum from that of r * h.
  template <class V, class Options>
  static FRNN_HOST_DEVICE V reset_backward(V reset, V h, V gradient, const Options& options) {
    return options.template gate_gradient<V>(gradient * h, reset);
  }
};

}  // namespace fused_rnn
