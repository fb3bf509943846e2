// Derivatives of steps that were computed, along a direction in which everything may change: how a step's results
// change (its tangents), and how its gradients do. They follow from the cell's backward(): a step is a linear function
// of small changes, whose coefficients are what backward() gives for gradients of one; and for dual numbers backward()
// gives how gradients change.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace fused_rnn {

// A value, and its derivative along the direction.
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

// What is known of a step, or how that changes: what it saved, and its states before and after.
template <class V>
struct KnownStep {
  V saved[4], h, h_prev, c, c_prev;
};

// tangents(step, x, r, change): x and r are how the projections and the recurrent products change; change holds those
// of the states before the step and gets the others.
template <class Cell>
struct StepDerivatives;

template <>
struct StepDerivatives<Lstm> {
  template <class V>
  static FRNN_HOST_DEVICE void tangents(const KnownStep<V>& s, const V* x, const V* r, KnownStep<V>& change) {
    using One = PlainGates;
    const V one = V{} + typename Lanes<V>::Scalar(1);
    V sums[4], k[4], unused, of_c_prev;
    for (int g = 0; g < 4; ++g) sums[g] = x[g] + r[g];
    Lstm::backward<V>(s.saved, s.h, s.h_prev, s.c, s.c_prev, V{}, one, k, unused, of_c_prev);
    change.c = of_c_prev * change.c_prev + k[0] * sums[0] + k[1] * sums[1] + k[2] * sums[2];
    // h = o tanh(c), of which the change of c is known now.
    const V tanh_c = fused_rnn::tanh<V>(s.c), o = s.saved[3];
    for (int g = 0; g < 4; ++g)
      change.saved[g] =
          g == 2 ? One::state_gradient<V>(sums[g], s.saved[g]) : One::gate_gradient<V>(sums[g], s.saved[g]);
    change.h = change.saved[3] * tanh_c + One::state_gradient<V>(o, tanh_c) * change.c;
  }
};

template <>
struct StepDerivatives<Gru> {
  template <class V>
  static FRNN_HOST_DEVICE void tangents(const KnownStep<V>& s, const V* x, const V* r, KnownStep<V>& change) {
    using One = PlainGates;
    const V reset = s.saved[0], hidden = s.saved[3];
    V k[4], of_h_prev, unused;
    Gru::backward<V>(s.saved, s.h, s.h_prev, s.c, s.c_prev, V{} + typename Lanes<V>::Scalar(1), V{}, k, of_h_prev,
                     unused);
    const V sums[4] = {x[2], x[0] + r[0], x[1] + r[1], r[2]};
    change.h = of_h_prev * change.h_prev + k[0] * sums[0] + k[1] * sums[1] + k[2] * sums[2] + k[3] * sums[3];
    change.saved[0] = One::gate_gradient<V>(sums[1], reset);
    change.saved[1] = One::gate_gradient<V>(sums[2], s.saved[1]);
    change.saved[2] = One::state_gradient<V>(sums[0] + change.saved[0] * hidden + reset * sums[3], s.saved[2]);
    change.saved[3] = sums[3];
  }
};

template <CellKind kind, class Function>
struct StepDerivatives<Elman<kind, Function>> {
  template <class V>
  static FRNN_HOST_DEVICE void tangents(const KnownStep<V>& s, const V* x, const V* r, KnownStep<V>& change) {
    V unused, nothing;
    Elman<kind, Function>::template backward<V>(s.saved, s.h, s.h_prev, s.c, s.c_prev, x[0] + r[0], V{}, &change.h,
                                                unused, nothing);
  }
};

// How the gradients of a step change while dh and dc stay: those of the sums (grad_gates), of h_prev but through the
// sums, and of c_prev.
template <class Cell, class V>
FRNN_HOST_DEVICE void changed_gradients(const KnownStep<V>& s, const KnownStep<V>& change, const V& dh, const V& dc,
                                        V* grads, V& dh_prev, V& dc_prev) {
  using D = Dual<V>;
  D saved[4]{}, of_sums[4]{}, of_h{}, of_c{};
  for (int g = 0; g < Cell::saved; ++g) saved[g] = {s.saved[g], change.saved[g]};
  Cell::template backward<D>(saved, D{s.h, change.h}, D{s.h_prev, change.h_prev}, D{s.c, change.c},
                             D{s.c_prev, change.c_prev}, D{dh, V{}}, D{dc, V{}}, of_sums, of_h, of_c);
  for (int g = 0; g < Cell::grad_gates; ++g) grads[g] = of_sums[g].tangent;
  dh_prev = of_h.tangent;
  dc_prev = of_c.tangent;
}

}  // namespace fused_rnn
