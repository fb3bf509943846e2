// tanh and sigmoid for a scalar (CUDA, portable code) or a SIMD vector (CPU), from one source.
//
// Both rest on e^x = 2^n (1 + p), n = round(x / ln 2), p = e^r - 1 on |r| <= ln 2 / 2 by a polynomial fitted at
// Chebyshev nodes (tools/fit_expm1.py prints the coefficients and their error: 0.009 ulp in float32, 0.005 ulp in float64).
// Written in p, not in e^r, tanh keeps its relative accuracy down to the smallest arguments. Measured maxima stand in
// docs/design.md and are asserted by tests/test_activations.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "../problem.h"

namespace fused_rnn {

// What the formulas need of a value type V: its scalar, integer lanes of the same width, and four primitives that
// operators alone cannot express. The SIMD types add their own specialisations (cpu/simd.h).
template <class V>
struct Lanes;

template <>
struct Lanes<float> {
  using Scalar = float;
  using Int = int32_t;
  static FRNN_HOST_DEVICE Int bits(float x) {
    Int i;
    memcpy(&i, &x, sizeof i);
    return i;
  }
  static FRNN_HOST_DEVICE float from_bits(Int i) {
    float x;
    memcpy(&x, &i, sizeof x);
    return x;
  }
  static FRNN_HOST_DEVICE float select(bool mask, float a, float b) { return mask ? a : b; }
};

template <>
struct Lanes<double> {
  using Scalar = double;
  using Int = int64_t;
  static FRNN_HOST_DEVICE Int bits(double x) {
    Int i;
    memcpy(&i, &x, sizeof i);
    return i;
  }
  static FRNN_HOST_DEVICE double from_bits(Int i) {
    double x;
    memcpy(&x, &i, sizeof x);
    return x;
  }
  static FRNN_HOST_DEVICE double select(bool mask, double a, double b) { return mask ? a : b; }
};

template <class Scalar>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int32_t exponent_bias = 127;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float log2_e = 1.4426950408889634f;
  static constexpr float ln2_high = 0.69140625f;  // few bits, so that n * ln2_high is exact without fma
  static constexpr float ln2_low = 0.0017409306019544601f;
  static constexpr float sigmoid_limit = 104.0f;  // e^-104 is below half the smallest subnormal
  static constexpr float tanh_limit = 20.0f;      // tanh rounds to 1 from 9.02 on
};

template <>
struct FloatFormat<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int64_t exponent_bias = 1023;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.6931471805598903;
  static constexpr double ln2_low = 5.497923018708371e-14;
  static constexpr double sigmoid_limit = 746.0;  // e^-746 is below half the smallest subnormal
  static constexpr double tanh_limit = 40.0;      // tanh rounds to 1 from 19.1 on
};

// (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2.
template <class V>
FRNN_HOST_DEVICE V expm1_tail(V r, float) {
  V q = r * 0.00019891030654370327738f + 0.0013933685862617173589f;
  q = q * r + 0.0083333108895820771937f;
  q = q * r + 0.041666464602026541557f;
  q = q * r + 0.16666666681659179129f;
  return q * r + 0.50000000134981778643f;
}

template <class V>
FRNN_HOST_DEVICE V expm1_tail(V r, double) {
  V q = r * 2.0914717341716375952e-9 + 2.5105259538448493419e-8;
  q = q * r + 2.7557273570102139673e-7;
  q = q * r + 2.7557255297969644392e-6;
  q = q * r + 0.000024801587325605322782;
  q = q * r + 0.00019841269874901259234;
  q = q * r + 0.0013888888888883731828;
  q = q * r + 0.0083333333333261120526;
  q = q * r + 0.041666666666666669767;
  q = q * r + 0.16666666666666671008;
  return q * r + 0.5;
}

// x = n ln 2 + r; returns p = e^r - 1 and n in integer lanes. |x| must stay below 2^(mantissa_bits - 2).
template <class V>
FRNN_HOST_DEVICE V reduced_expm1(V x, typename Lanes<V>::Int& n) {
  using S = typename Lanes<V>::Scalar;
  using F = FloatFormat<S>;
  const V shifted = x * F::log2_e + F::round_magic;
  n = Lanes<V>::bits(shifted) - Lanes<S>::bits(F::round_magic);
  const V rounded = shifted - F::round_magic;
  V r = x - rounded * F::ln2_high;
  r = r - rounded * F::ln2_low;
  return r + (r * r) * expm1_tail(r, S{});
}

// 2^n for exponents of normal numbers.
template <class V>
FRNN_HOST_DEVICE V power_of_two(typename Lanes<V>::Int n) {
  using F = FloatFormat<typename Lanes<V>::Scalar>;
  return Lanes<V>::from_bits((n + F::exponent_bias) << F::mantissa_bits);
}

template <class V>
FRNN_HOST_DEVICE V absolute(V x) {
  using L = Lanes<V>;
  return L::from_bits(L::bits(x) & ~L::bits(V{} * typename L::Scalar(-1)));
}

// 1 / (1 + e^-x). Computed from e^-|x| <= 1, so nothing overflows and small results keep their relative accuracy.
template <class V>
FRNN_HOST_DEVICE V sigmoid(V x) {
  using L = Lanes<V>;
  using S = typename L::Scalar;
  V magnitude = absolute(x);
  // The comparison is false for NaN, which therefore goes through.
  magnitude = L::select(magnitude > FloatFormat<S>::sigmoid_limit, V{} + FloatFormat<S>::sigmoid_limit, magnitude);
  typename L::Int n;
  const V p = reduced_expm1<V>(-magnitude, n);
  // 2^n may be subnormal: two factors that are not.
  const auto half = n >> 1;
  const V e = (p + S(1)) * power_of_two<V>(half) * power_of_two<V>(n - half);
  return L::select(x < S(0), e, V{} + S(1)) / (e + S(1));
}

// -m / (2 + m), m = e^(-2|x|) - 1, with the sign of x.
template <class V>
FRNN_HOST_DEVICE V tanh(V x) {
  using L = Lanes<V>;
  using S = typename L::Scalar;
  const auto sign_bit = L::bits(V{} * S(-1));
  const auto bits = L::bits(x);
  V magnitude = L::from_bits(bits & ~sign_bit);
  magnitude = L::select(magnitude > FloatFormat<S>::tanh_limit, V{} + FloatFormat<S>::tanh_limit, magnitude);
  typename L::Int n;
  const V p = reduced_expm1<V>(magnitude * S(-2), n);
  const V scale = power_of_two<V>(n);
  const V m = scale * p + (scale - S(1));
  const V result = m / (S(-2) - m);
  return L::from_bits((L::bits(result) & ~sign_bit) | (bits & sign_bit));
}

}  // namespace fused_rnn
