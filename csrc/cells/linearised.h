// The cells made linear about steps that were computed, and the derivative of their backward steps: what forward mode
// and second derivatives are made of. The formulas are those of the cells: coefficients are what backward() gives for
// gradients of one, second derivatives what it gives for dual numbers.
//
// `sums` are a step's sums before its gates, in the order of the cell's grad_gates: those of a GRU are the candidate's
// input part, r, z, and the candidate's recurrent part, each with weights of its own.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace fused_rnn {

// A value, and its derivative in one direction.
template <class V>
struct Dual {
  using Scalar = typename Lanes<V>::Scalar;
  V value, tangent;

  friend FRNN_HOST_DEVICE Dual operator+(const Dual& a, const Dual& b) {
    return {a.value + b.value, a.tangent + b.tangent};
  }
  friend FRNN_HOST_DEVICE Dual operator-(const Dual& a, const Dual& b) {
    return {a.value - b.value, a.tangent - b.tangent};
  }
  friend FRNN_HOST_DEVICE Dual operator*(const Dual& a, const Dual& b) {
    return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
  }
  friend FRNN_HOST_DEVICE Dual operator+(const Dual& a, Scalar b) { return {a.value + b, a.tangent}; }
  friend FRNN_HOST_DEVICE Dual operator-(Scalar a, const Dual& b) { return {a - b.value, -b.tangent}; }
  friend FRNN_HOST_DEVICE auto operator<=(const Dual& a, Scalar b) { return a.value <= b; }
};

template <class V>
struct Lanes<Dual<V>> {
  using Scalar = typename Lanes<V>::Scalar;
  static constexpr bool own_activations = true;
  static FRNN_HOST_DEVICE Dual<V> tanh(const Dual<V>& x) {
    const V y = fused_rnn::tanh<V>(x.value);
    return {y, PlainGates::state_gradient<V>(x.tangent, y)};
  }
  template <class Mask>
  static FRNN_HOST_DEVICE Dual<V> select(const Mask& mask, const Dual<V>& a, const Dual<V>& b) {
    return {Lanes<V>::select(mask, a.value, b.value), Lanes<V>::select(mask, a.tangent, b.tangent)};
  }
};

// Cells for the loops: forward() of tangents, with the coefficients of its step, saves the sums' tangents; backward()
// gets the coefficients as what was saved, and gives the gradients of the sums.
template <int sums_, int states_, int coefficients_>
struct LinearCell {
  static constexpr CellKind kind = CellKind::custom;
  static constexpr int gates = sums_;
  static constexpr int saved = sums_;
  static constexpr int grad_gates = sums_;
  static constexpr int states = states_;
  static constexpr bool has_cell = states > 0;
  static constexpr int coefficients = coefficients_;
  static constexpr bool hidden_bias_apart(int) { return false; }
  static constexpr GateGrads input_grads = {0, {0, 1, 2, 3}};
  static constexpr GateGrads hidden_grads = {0, {0, 1, 2, 3}};
};

// c' = f c + a_i i + a_f f + a_g g        h' = a_o o + b c'
struct LinearLstm : LinearCell<4, 1, 6> {
  static constexpr bool reads_h = false;
  template <class V>
  static FRNN_HOST_DEVICE void forward(const V* x, const V* r, V, const V* c_prev, const V* k, V& h, V* c, V* sums) {
    for (int g = 0; g < 4; ++g) sums[g] = x[g] + r[g];
    c[0] = k[3] * c_prev[0] + k[0] * sums[0] + k[1] * sums[1] + k[2] * sums[2];
    h = k[4] * sums[3] + k[5] * c[0];
  }
  template <class V>
  static FRNN_HOST_DEVICE void backward(const V* k, V, const V*, const V*, V dh, const V* dc, V* grads, V& dh_prev,
                                        V* dc_prev) {
    const V total = dc[0] + k[5] * dh;
    for (int g = 0; g < 3; ++g) grads[g] = k[g] * total;
    grads[3] = k[4] * dh;
    dh_prev = V{};
    dc_prev[0] = k[3] * total;
  }
};

// h' = a_n x_n + a_r r + a_z z + a_h r_n + z h
struct LinearGru : LinearCell<4, 0, 5> {
  static constexpr bool reads_h = true;
  template <class V>
  static FRNN_HOST_DEVICE void forward(const V* x, const V* r, V h_prev, const V*, const V* k, V& h, V*, V* sums) {
    for (int g = 0; g < 4; ++g) sums[g] = x[g] + r[g];
    h = k[4] * h_prev + k[0] * sums[0] + k[1] * sums[1] + k[2] * sums[2] + k[3] * sums[3];
  }
  template <class V>
  static FRNN_HOST_DEVICE void backward(const V* k, V, const V*, const V*, V dh, const V*, V* grads, V& dh_prev, V*) {
    for (int g = 0; g < 4; ++g) grads[g] = k[g] * dh;
    dh_prev = k[4] * dh;
  }
};

// h' = a x
struct LinearRnn : LinearCell<1, 0, 1> {
  static constexpr bool reads_h = false;
  template <class V>
  static FRNN_HOST_DEVICE void forward(const V* x, const V* r, V, const V*, const V* k, V& h, V*, V* sums) {
    sums[0] = x[0] + r[0];
    h = k[0] * sums[0];
  }
  template <class V>
  static FRNN_HOST_DEVICE void backward(const V* k, V, const V*, const V*, V dh, const V*, V* grads, V& dh_prev, V*) {
    grads[0] = k[0] * dh;
    dh_prev = V{};
  }
};

// What is known of a step: what it saved, and its states before and after.
template <class V>
struct KnownStep {
  V saved[4], h, h_prev, c, c_prev;
};

template <class Cell>
struct Derivatives;

template <>
struct Derivatives<Lstm> {
  using Linear = LinearLstm;
  template <class V>
  static FRNN_HOST_DEVICE void coefficients(const KnownStep<V>& s, V* k) {
    const V one = V{} + typename Lanes<V>::Scalar(1);
    V grads[4], unused;
    Lstm::backward<V>(s.saved, s.h, s.h_prev, s.c, s.c_prev, V{}, one, grads, unused, k[3]);
    for (int g = 0; g < 3; ++g) k[g] = grads[g];
    V of_c;
    Lstm::backward<V>(s.saved, s.h, s.h_prev, s.c, s.c_prev, one, V{}, grads, unused, of_c);
    k[4] = grads[3];
    k[5] = PlainGates::state_gradient<V>(s.saved[3], fused_rnn::tanh<V>(s.c));
  }
  template <class V>
  static FRNN_HOST_DEVICE void saved_tangents(const KnownStep<V>& s, const V* sums, V* tangents) {
    for (int g = 0; g < 4; ++g)
      tangents[g] = g == 2 ? PlainGates::state_gradient<V>(sums[g], s.saved[g])
                           : PlainGates::gate_gradient<V>(sums[g], s.saved[g]);
  }
};

template <>
struct Derivatives<Gru> {
  using Linear = LinearGru;
  template <class V>
  static FRNN_HOST_DEVICE void coefficients(const KnownStep<V>& s, V* k) {
    const V one = V{} + typename Lanes<V>::Scalar(1);
    V unused;
    Gru::backward<V>(s.saved, s.h, s.h_prev, s.c, s.c_prev, one, V{}, k, k[4], unused);
  }
  template <class V>
  static FRNN_HOST_DEVICE void saved_tangents(const KnownStep<V>& s, const V* sums, V* tangents) {
    const V reset = s.saved[0], hidden = s.saved[3];
    tangents[0] = PlainGates::gate_gradient<V>(sums[1], reset);
    tangents[1] = PlainGates::gate_gradient<V>(sums[2], s.saved[1]);
    tangents[2] = PlainGates::state_gradient<V>(sums[0] + tangents[0] * hidden + reset * sums[3], s.saved[2]);
    tangents[3] = sums[3];
  }
};

template <CellKind kind, class Function>
struct Derivatives<Elman<kind, Function>> {
  using Linear = LinearRnn;
  template <class V>
  static FRNN_HOST_DEVICE void coefficients(const KnownStep<V>& s, V* k) {
    V unused, nothing;
    Elman<kind, Function>::template backward<V>(s.saved, s.h, s.h_prev, s.c, s.c_prev,
                                                V{} + typename Lanes<V>::Scalar(1), V{}, k, unused, nothing);
  }
  template <class V>
  static FRNN_HOST_DEVICE void saved_tangents(const KnownStep<V>&, const V*, V*) {}
};

// How the gradients of a step change when the step does while dh and dc stay: those of the sums, of h_prev but through
// the sums, and of c_prev. `change`: of the states; of what was saved it is made here.
template <class Cell, class V>
FRNN_HOST_DEVICE void changed_gradients(const KnownStep<V>& s, KnownStep<V>& change, const V* sums, const V& dh,
                                        const V& dc, V* grads, V& dh_prev, V& dc_prev) {
  Derivatives<Cell>::template saved_tangents<V>(s, sums, change.saved);
  using D = Dual<V>;
  D saved[4], of_sums[4], of_h, of_c;
  for (int g = 0; g < Cell::saved; ++g) saved[g] = {s.saved[g], change.saved[g]};
  Cell::template backward<D>(saved, D{s.h, change.h}, D{s.h_prev, change.h_prev}, D{s.c, change.c},
                             D{s.c_prev, change.c_prev}, D{dh, V{}}, D{dc, V{}}, of_sums, of_h, of_c);
  for (int g = 0; g < Cell::grad_gates; ++g) grads[g] = of_sums[g].tangent;
  dh_prev = of_h.tangent;
  dc_prev = of_c.tangent;
}

}  // namespace fused_rnn
