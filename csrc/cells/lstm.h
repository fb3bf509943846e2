// LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers 1999), gates in torch.nn's order i, f, g, o:
//   c' = sigmoid(f) * c + sigmoid(i) * tanh(g)        h' = sigmoid(o) * tanh(c')
// With peepholes (Gers & Schmidhuber 2000) i and f see c, o sees c'; coupled, i is 1 - f; c' may be clamped. With layer
// normalisation (Ba et al. 2016) the loops normalise c' before its tanh: forward gives o in place of h, and backward
// gets what comes through h with dc, dh being zero.
#pragma once

#include "cell.h"

namespace fused_rnn {

struct Lstm {
  static constexpr CellKind kind = CellKind::lstm;
  static constexpr int gates = 4;
  static constexpr int saved = 4;  // i, f, g, o after their activations
  static constexpr int grad_gates = 4;
  static constexpr int states = 1;
  static constexpr bool has_cell = states > 0;
  static constexpr bool reads_h = false;
  static constexpr bool hidden_bias_apart(int) { return false; }
  static constexpr GateGrads input_grads = {0, {0, 1, 2, 3}};
  static constexpr GateGrads hidden_grads = {0, {0, 1, 2, 3}};

  template <class V, class Options = PlainGates>
  static FRNN_HOST_DEVICE void forward(const V* x, const V* r, V, V c_prev, V& h, V& c, V* saved_values,
                                       const Options& options = {}) {
    if constexpr (Options::plain) {
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
    } else {
      V gates[3] = {x[0] + r[0], x[1] + r[1], x[3] + r[3]};  // i, f, o
      const bool peephole = options.within.peephole;
      if (peephole) {
        gates[0] = gates[0] + options.peephole[0] * c_prev;
        gates[1] = gates[1] + options.peephole[1] * c_prev;
      }
      options.template gates<V>(gates, peephole ? 2 : 3);
      if (options.within.coupled_gates) gates[0] = typename Lanes<V>::Scalar(1) - gates[1];
      saved_values[0] = gates[0];
      saved_values[1] = gates[1];
      saved_values[2] = options.template state<V>(x[2] + r[2]);
      c = new_cell<V>(gates[0], gates[1], saved_values[2], c_prev, options);
      saved_values[3] = peephole ? options.template gate<V>(gates[2] + options.peephole[2] * c) : gates[2];
      h = saved_values[3];
      if (!options.within.layer_norm) h = h * options.template state<V>(c);
    }
  }

  template <class V, class Options>
  static FRNN_HOST_DEVICE V new_cell(V i, V f, V g, V c_prev, const Options& options) {
    const V c = f * c_prev + i * g;
    if constexpr (!Options::plain) {
      if (options.within.cell_clip > 0) return clamped<V>(c, typename Lanes<V>::Scalar(options.within.cell_clip));
    }
    return c;
  }

  // With cell_clip, where forward() had the plain formulas alone: its c and h with c clamped; and of backward(), which
  // was given the clamped c: what c had let through is nothing where it was clamped.
  template <class V>
  static FRNN_HOST_DEVICE void clip(const V* saved_values, typename Lanes<V>::Scalar limit, V& h, V& c) {
    c = clamped<V>(c, limit);
    h = saved_values[3] * tanh<V>(c);
  }
  template <class V>
  static FRNN_HOST_DEVICE void clip_backward(const V* saved_values, V c_prev, typename Lanes<V>::Scalar limit, V* grads,
                                             V& dc_prev) {
    const V c = saved_values[1] * c_prev + saved_values[0] * saved_values[2];
    const auto clipped = (c > limit) | (-limit > c);
    for (int k = 0; k < 3; ++k) grads[k] = Lanes<V>::select(clipped, V{}, grads[k]);
    dc_prev = Lanes<V>::select(clipped, V{}, dc_prev);
  }

  // c of this step before zoneout, from what was saved; c: after it.
  template <class V, class Options>
  static FRNN_HOST_DEVICE V cell_of(const V* saved_values, V c, V c_prev, const Options& options) {
    if constexpr (Options::plain) return c;
    return new_cell<V>(saved_values[0], saved_values[1], saved_values[2], c_prev, options);
  }

  // h before a projection, from what was saved.
  template <class V, class Options = PlainGates>
  static FRNN_HOST_DEVICE V hidden(const V* saved_values, V c, V c_prev = {}, const Options& options = {}) {
    return saved_values[3] * options.template state<V>(cell_of<V>(saved_values, c, c_prev, options));
  }

  template <class V, class Options = PlainGates>
  static FRNN_HOST_DEVICE void backward(const V* saved_values, V, V, V c, V c_prev, V dh, V dc, V* grads, V& dh_prev,
                                        V& dc_prev, const Options& options = {}) {
    using S = typename Lanes<V>::Scalar;
    const V i = saved_values[0], f = saved_values[1], g = saved_values[2], o = saved_values[3];
    if constexpr (Options::plain) {
      const V tanh_c = tanh<V>(c);
      const V dc_total = dc + dh * o * (S(1) - tanh_c * tanh_c);
      grads[0] = dc_total * g * i * (S(1) - i);
      grads[1] = dc_total * c_prev * f * (S(1) - f);
      grads[2] = dc_total * i * (S(1) - g * g);
      grads[3] = dh * tanh_c * o * (S(1) - o);
      dh_prev = V{};
      dc_prev = dc_total * f;
    } else {
      const bool peephole = options.within.peephole;
      V state{};
      if (!options.within.layer_norm) state = options.template state<V>(cell_of<V>(saved_values, c, c_prev, options));
      grads[3] = options.template gate_gradient<V>(dh * state, o);
      V dc_total = dc + options.template state_gradient<V>(dh * o, state);
      if (peephole) dc_total = dc_total + options.peephole[2] * grads[3];
      if (options.within.cell_clip > 0) {
        const S limit = S(options.within.cell_clip);
        dc_total = Lanes<V>::select(absolute(f * c_prev + i * g) > limit, V{}, dc_total);
      }
      V di = dc_total * g, df = dc_total * c_prev;
      if (options.within.coupled_gates) {
        df = df - di;
        di = V{};
      }
      grads[0] = options.template gate_gradient<V>(di, i);
      grads[1] = options.template gate_gradient<V>(df, f);
      grads[2] = options.template state_gradient<V>(dc_total * i, g);
      dh_prev = V{};
      dc_prev = dc_total * f;
      if (peephole) dc_prev = dc_prev + options.peephole[0] * grads[0] + options.peephole[1] * grads[1];
    }
  }
};

}  // namespace fused_rnn
