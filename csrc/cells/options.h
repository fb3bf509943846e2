// What a cell's functions are given beside its values: which functions its gates have, and what options change.
//
//   plain                            true where only the cell's own formulas are wanted
//   state(a), gate(a)                the function of the state (tanh), of a gate (sigmoid)
//   gates(a, count)                  the latter of several values, in place; not of PlainGates
//   state_gradient(d, y), gate_gradient(d, y)
//                                    the gradient of a from that of y = state(a) or gate(a)
#pragma once

#include "math.h"

namespace fused_rnn {

struct PlainGates {
  static constexpr bool plain = true;
  template <class V>
  static FRNN_HOST_DEVICE V state(V a) {
    return tanh<V>(a);
  }
  template <class V>
  static FRNN_HOST_DEVICE V gate(V a) {
    return sigmoid<V>(a);
  }
  template <class V>
  static FRNN_HOST_DEVICE V state_gradient(V d, V y) {
    return d * (typename Lanes<V>::Scalar(1) - y * y);
  }
  template <class V>
  static FRNN_HOST_DEVICE V gate_gradient(V d, V y) {
    return d * y * (typename Lanes<V>::Scalar(1) - y);
  }
};

// Of layer normalisation: added to the variance, as in torch.nn.functional.layer_norm.
inline constexpr double layer_norm_epsilon = 1e-5;

// limit must not be negative. NaN stays NaN.
template <class V>
FRNN_HOST_DEVICE V clamped(V x, typename Lanes<V>::Scalar limit) {
  using L = Lanes<V>;
  const V high = L::select(x > limit, V{} + limit, x);
  return L::select(high <= -limit, V{} - limit, high);
}

template <class V>
FRNN_HOST_DEVICE V activate(Activation which, V a) {
  using L = Lanes<V>;
  using S = typename L::Scalar;
  switch (which) {
    case Activation::tanh: return tanh<V>(a);
    case Activation::sigmoid: return sigmoid<V>(a);
    case Activation::relu: return L::select(a <= S(0), V{}, a);
    case Activation::hard_sigmoid: {
      const V shifted = a + S(3);
      const V high = L::select(shifted > S(6), V{} + S(6), shifted);
      return L::select(high <= S(0), V{}, high) * S(1.0 / 6.0);
    }
    case Activation::softsign: return a / (absolute(a) + S(1));
    case Activation::identity: break;
  }
  return a;
}

// The gradient of a from d, that of y = activate(which, a).
template <class V>
FRNN_HOST_DEVICE V activation_gradient(Activation which, V d, V y) {
  using L = Lanes<V>;
  using S = typename L::Scalar;
  switch (which) {
    case Activation::tanh: return PlainGates::state_gradient<V>(d, y);
    case Activation::sigmoid: return PlainGates::gate_gradient<V>(d, y);
    case Activation::relu: return L::select(y <= S(0), V{}, d);
    case Activation::hard_sigmoid: {
      const V inside = L::select(y <= S(0), V{}, d * S(1.0 / 6.0));
      return L::select(V{} + S(1) <= y, V{}, inside);
    }
    case Activation::softsign: {
      const V rest = S(1) - absolute(y);
      return d * rest * rest;
    }
    case Activation::identity: break;
  }
  return d;
}

// own: the functions are the cell's own; else Functions::activate(which, values, count) computes several values at
// once, so that a target may choose how that is called.
template <class V, bool own, class Functions = void>
struct OptionalGates {
  static constexpr bool plain = false;
  const Within& within;
  V peephole[3];  // of i, f, o, where within.peephole is set

  template <class>
  FRNN_HOST_DEVICE V state(V a) const {
    if constexpr (own) {
      return PlainGates::state<V>(a);
    } else {
      Functions::activate(within.activation, &a, 1);
      return a;
    }
  }
  template <class>
  FRNN_HOST_DEVICE V gate(V a) const {
    gates<V>(&a, 1);
    return a;
  }
  template <class>
  FRNN_HOST_DEVICE void gates(V* a, int count) const {
    if constexpr (own) {
      for (int k = 0; k < count; ++k) a[k] = PlainGates::gate<V>(a[k]);
    } else {
      Functions::activate(within.recurrent_activation, a, count);
    }
  }
  template <class>
  FRNN_HOST_DEVICE V state_gradient(const V& d, const V& y) const {
    if constexpr (own) return PlainGates::state_gradient<V>(d, y);
    return activation_gradient<V>(within.activation, d, y);
  }
  template <class>
  FRNN_HOST_DEVICE V gate_gradient(const V& d, const V& y) const {
    if constexpr (own) return PlainGates::gate_gradient<V>(d, y);
    return activation_gradient<V>(within.recurrent_activation, d, y);
  }
};

}  // namespace fused_rnn
