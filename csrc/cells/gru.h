// GRU in the form of torch.nn and cuDNN (reset gate after the recurrent product), gates in the order r, z, n:
//   n = tanh(x_n + r * (W_hn h + b_hn))        h' = (1 - z) * n + z * h
#pragma once

#include "cell.h"

namespace fused_rnn {

struct Gru {
  static constexpr CellKind kind = CellKind::gru;
  static constexpr int gates = 3;
  static constexpr int saved = 4;       // r, z, n after their activations, and W_hn h + b_hn
  static constexpr int grad_gates = 4;  // of x_n, r, z, and W_hn h: the candidate's two parts differ by the factor r
  static constexpr int states = 0;
  static constexpr bool has_cell = states > 0;
  static constexpr bool reads_h = true;
  static constexpr bool hidden_bias_apart(int gate) { return gate == 2; }
  static constexpr GateGrads input_grads = {0, {2, 0, 1, 0}};
  static constexpr GateGrads hidden_grads = {1, {0, 1, 2, 0}};

  template <class V, class Options = PlainGates>
  static FRNN_HOST_DEVICE void forward(const V* x, const V* r, V h_prev, V, V& h, V&, V* saved_values,
                                       const Options& options = {}) {
    V gates[2] = {x[0] + r[0], x[1] + r[1]};
    if constexpr (Options::plain) {
      gates[0] = sigmoid<V>(gates[0]);
      gates[1] = sigmoid<V>(gates[1]);
    } else {
      options.template gates<V>(gates, 2);
    }
    const V reset = gates[0], update = gates[1];
    const V candidate = options.template state<V>(x[2] + reset * r[2]);
    h = candidate + update * (h_prev - candidate);
    saved_values[0] = reset;
    saved_values[1] = update;
    saved_values[2] = candidate;
    saved_values[3] = r[2];
  }

  template <class V, class Options = PlainGates>
  static FRNN_HOST_DEVICE void backward(const V* saved_values, V, V h_prev, V, V, V dh, V, V* grads, V& dh_prev, V&,
                                        const Options& options = {}) {
    using S = typename Lanes<V>::Scalar;
    const V reset = saved_values[0], update = saved_values[1], candidate = saved_values[2], hidden = saved_values[3];
    const V dcandidate = options.template state_gradient<V>(dh * (S(1) - update), candidate);
    grads[0] = dcandidate;
    grads[1] = options.template gate_gradient<V>(dcandidate * hidden, reset);
    grads[2] = options.template gate_gradient<V>(dh * (h_prev - candidate), update);
    grads[3] = dcandidate * reset;
    dh_prev = dh * update;
  }
};

}  // namespace fused_rnn
