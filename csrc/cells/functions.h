// Functions that the formulas of a custom cell may use beside tanh, sigmoid and absolute; the cells here do without.
#pragma once

#include <limits>

#include "math.h"

namespace fused_rnn {

template <class V>
FRNN_HOST_DEVICE V splat(typename Lanes<V>::Scalar x) {
  return V{} + x;
}

// e^x, 0 or infinity beyond the range.
template <class V>
FRNN_HOST_DEVICE V exponential(V x) {
  using L = Lanes<V>;
  using S = typename L::Scalar;
  using F = FloatFormat<S>;
  constexpr S most = sizeof(S) == 4 ? S(89) : S(710);  // e to this is infinite
  // Comparisons are false for NaN, which therefore goes through.
  V limited = L::select(x > most, splat<V>(most), x);
  limited = L::select(limited <= -F::sigmoid_limit, splat<V>(-F::sigmoid_limit), limited);
  const V n = (limited * F::log2_e + F::round_magic) - F::round_magic;
  V unused;
  const V p = reduced_expm1<CentredTail, V>(limited, n, unused);
  return L::times_power(p + S(1), n);
}

// Coefficients of (log(1 + x) - 2 s) / s^3 in powers of s^2, s = x / (2 + x): 2 / 3, 2 / 5, ...
template <class V>
FRNN_HOST_DEVICE V odd_tail(V square) {
  using S = typename Lanes<V>::Scalar;
  constexpr int terms = sizeof(S) == 4 ? 5 : 11;
  V sum = splat<V>(S(2) / S(2 * terms + 1));
  for (int k = terms - 1; k >= 1; --k) sum = sum * square + S(2) / S(2 * k + 1);
  return sum;
}

// The natural logarithm: -infinity at 0 and for subnormal numbers, NaN below.
template <class V>
FRNN_HOST_DEVICE V logarithm(V x) {
  using L = Lanes<V>;
  using S = typename L::Scalar;
  using F = FloatFormat<S>;
  using Limits = std::numeric_limits<S>;
  const auto exponent_bits = L::bits(splat<V>(Limits::infinity()));
  const auto bits = L::bits(x);
  // x = 2^n mantissa. The exponent, moved to the lowest bits of round_magic, is a whole number to be read off.
  const auto exponent = L::shift_right(bits & exponent_bits, F::mantissa_bits);
  V n = (L::from_bits(exponent | L::bits(splat<V>(F::round_magic))) - F::round_magic) - S(F::exponent_bias);
  V mantissa = L::from_bits((bits & ~exponent_bits) | L::bits(splat<V>(S(1))));
  const auto large = mantissa > S(1.4142135623730951);
  mantissa = L::select(large, mantissa * S(0.5), mantissa);
  n = L::select(large, n + S(1), n);
  const V s = (mantissa - S(1)) / (mantissa + S(1));
  const V square = s * s;
  V result = n * F::ln2_high + (n * F::ln2_low + (s * S(2) + s * square * odd_tail<V>(square)));
  result = L::select(x < Limits::min(), splat<V>(-Limits::infinity()), result);
  result = L::select(x < S(0), splat<V>(Limits::quiet_NaN()), result);
  return L::select(x <= Limits::max(), result, x);  // infinity and NaN are their own
}

// log(1 + e^x), without overflow.
template <class V>
FRNN_HOST_DEVICE V softplus(V x) {
  using L = Lanes<V>;
  using S = typename L::Scalar;
  const V e = exponential<V>(-absolute<V>(x));  // 0 to 1
  // log(1 + e) without losing what is small in e: e log(u) / (u - 1) for u = 1 + e as it is rounded.
  const V u = e + S(1);
  const V d = u - S(1);
  const V tail = L::select(d <= S(0), e, logarithm<V>(u) * (e / d));
  return tail + L::select(x <= S(0), V{}, x);
}

}  // namespace fused_rnn
