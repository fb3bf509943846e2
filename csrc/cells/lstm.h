// LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers 1999), gates in torch.nn's order i, f, g, o:
//   c' = sigmoid(f) * c + sigmoid(i) * tanh(g)        h' = sigmoid(o) * tanh(c')
#pragma once

#include "cell.h"

namespace fused_rnn {

struct Lstm {
  static constexpr CellKind kind = CellKind::lstm;
  static constexpr int gates = 4;
  static constexpr int saved = 4;  // i, f, g, o after their activations
  static constexpr int grad_gates = 4;
  static constexpr bool has_cell = true;
  static constexpr bool hidden_bias_apart(int) { return false; }
  static constexpr GateGrads input_grads = {0, {0, 1, 2, 3}};
  static constexpr GateGrads hidden_grads = {0, {0, 1, 2, 3}};

  template <class V>
  static FRNN_HOST_DEVICE void forward(const V* x, const V* r, V, V c_prev, V& h, V& c, V* saved_values) {
    const V i = sigmoid<V>(x[0] + r[0]);
    const V f = sigmoid<V>(x[1] + r[1]);
    const V g = tanh<V>(x[2] + r[2]);
    const V o = sigmoid<V>(x[3] + r[3]);
    c = f * c_prev + i * g;
    h = o * tanh<V>(c);
    saved_values[0] = i;
    saved_values[1] = f;
    saved_values[2] = g;
    saved_values[3] = o;
  }

  // h before a projection, from what was saved.
  template <class V>
  static FRNN_HOST_DEVICE V hidden(const V* saved_values, V c) {
    return saved_values[3] * tanh<V>(c);
  }

  template <class V>
  static FRNN_HOST_DEVICE void backward(const V* saved_values, V, V, V c, V c_prev, V dh, V dc, V* grads, V& dh_prev,
                                        V& dc_prev) {
    using S = typename Lanes<V>::Scalar;
    const V i = saved_values[0], f = saved_values[1], g = saved_values[2], o = saved_values[3];
    const V tanh_c = tanh<V>(c);
    const V dc_total = dc + dh * o * (S(1) - tanh_c * tanh_c);
    grads[0] = dc_total * g * i * (S(1) - i);
    grads[1] = dc_total * c_prev * f * (S(1) - f);
    grads[2] = dc_total * i * (S(1) - g * g);
    grads[3] = dh * tanh_c * o * (S(1) - o);
    dh_prev = V{};
    dc_prev = dc_total * f;
  }
};

}  // namespace fused_rnn
