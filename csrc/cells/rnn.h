// The plain recurrence (Elman 1990): h' = tanh(x + W_hh h) or max(0, x + W_hh h), or another
// function, which the options say then.
#pragma once

#include "cell.h"

namespace fused_rnn {

struct Tanh {
  template <class V>
  static FRNN_HOST_DEVICE V value(V a) {
    return tanh<V>(a);
  }
  // The derivative, from the value.
  template <class V>
  static FRNN_HOST_DEVICE V slope(V h) {
    return typename Lanes<V>::Scalar(1) - h * h;
  }
};

struct Relu {
  template <class V>
  static FRNN_HOST_DEVICE V value(V a) {
    return Lanes<V>::select(a <= typename Lanes<V>::Scalar(0), V{}, a);  // NaN compares false and stays
  }
  template <class V>
  static FRNN_HOST_DEVICE V slope(V h) {
    using S = typename Lanes<V>::Scalar;
    return Lanes<V>::select(h <= S(0), V{}, V{} + S(1));
  }
};

template <CellKind kind_, class Function>
struct Elman {
  static constexpr CellKind kind = kind_;
  static constexpr int gates = 1;
  static constexpr int saved = 0;
  static constexpr int grad_gates = 1;
  static constexpr int states = 0;
  static constexpr bool has_cell = states > 0;
  static constexpr bool reads_h = false;
  static constexpr bool hidden_bias_apart(int) { return false; }
  static constexpr GateGrads input_grads = {0, {0, 0, 0, 0}};
  static constexpr GateGrads hidden_grads = {0, {0, 0, 0, 0}};

  template <class V, class Options = PlainGates>
  static FRNN_HOST_DEVICE void forward(const V* x, const V* r, V, V, V& h, V&, V*, const Options& options = {}) {
    if constexpr (Options::plain) {
      h = Function::template value<V>(x[0] + r[0]);
    } else {
      h = options.template state<V>(x[0] + r[0]);
    }
  }

  template <class V, class Options = PlainGates>
  static FRNN_HOST_DEVICE void backward(const V*, V h, V, V, V, V dh, V, V* grads, V& dh_prev, V&,
                                        const Options& options = {}) {
    if constexpr (Options::plain) {
      grads[0] = dh * Function::template slope<V>(h);
    } else {
      grads[0] = options.template state_gradient<V>(dh, h);
    }
    dh_prev = V{};
  }
};

using RnnTanh = Elman<CellKind::rnn_tanh, Tanh>;
using RnnRelu = Elman<CellKind::rnn_relu, Relu>;

}  // namespace fused_rnn
