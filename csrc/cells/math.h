// tanh and sigmoid for a scalar (CUDA, portable code) or a SIMD vector (CPU), from one source.
//
// Both rest on e^x = 2^n (1 + p), p = e^r - 1 by a polynomial in r = x - n ln 2 fitted at Chebyshev nodes
// (tools/fit_expm1.py prints the coefficients and their error, under 0.02 ulp). sigmoid needs 1 + p to a small relative
// error, so its r is centred, |r| <= ln 2 / 2. tanh needs e^x - 1 = 2^n p + (2^n - 1) without cancellation, so its n is
// rounded up: -ln 2 <= r <= 0, and both summands are negative. Each divides by a sum between 1 and 2,
// and what that sum (and in tanh also p) lost by rounding goes into the division.
// The measured maximum errors stand in docs/design.md; tests/test_activations.py asserts that they stay below 2 ulp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../problem.h"

namespace fused_rnn {

// What the formulas need of a value type V: its scalar, integer lanes of the same width, and primitives that operators
// alone cannot express. The SIMD types have specialisations of their own (cpu/simd.h).
//   times_power(x, n)    x * 2^n for whole n from -150 (float64: -1080) to 128 (1024)
//   quotient(a, a_low, b, b_low)
//                        (a + a_low) / (b + b_low), where 1 <= b <= 2 and the low parts are roundings of a and b
//   shift_right(i, n)    bits of a value without a sign, moved down
//   own_activations      true where it brings tanh(x) and sigmoid(x) of its own (cpu/activations.h)
template <class V>
struct Lanes;

namespace detail {
template <class V>
FRNN_HOST_DEVICE V plain_times_power(V x, V n);

// One division, then its result corrected by what was rounded away before it.
template <class V>
FRNN_HOST_DEVICE V plain_quotient(V a, V a_low, V b, V b_low) {
  const V q = a / b;
  // Exactly 1 / b stands where the constant is.
  return q + (a_low - q * b_low) * typename Lanes<V>::Scalar(0.75);
}
}  // namespace detail

template <>
struct Lanes<float> {
  using Scalar = float;
  static constexpr bool own_activations = false;
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
  static FRNN_HOST_DEVICE Int shift_right(Int i, int n) { return i >> n; }
  static FRNN_HOST_DEVICE float times_power(float x, float n) { return detail::plain_times_power(x, n); }
  static FRNN_HOST_DEVICE float quotient(float a, float a_low, float b, float b_low) {
#if defined(__CUDA_ARCH__)
    // Division branches, and what branches does not overlap with its neighbours. b needs none of its special cases, and
    // the correction makes up for the reciprocal's last bits.
    const float r = __fdividef(1.0f, b);
    const float q = a * r;
    return q + (fmaf(-q, b, a) + (a_low - q * b_low)) * r;
#else
    return detail::plain_quotient(a, a_low, b, b_low);
#endif
  }
};

template <>
struct Lanes<double> {
  using Scalar = double;
  static constexpr bool own_activations = false;
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
  static FRNN_HOST_DEVICE Int shift_right(Int i, int n) { return i >> n; }
  static FRNN_HOST_DEVICE double times_power(double x, double n) { return detail::plain_times_power(x, n); }
  static FRNN_HOST_DEVICE double quotient(double a, double a_low, double b, double b_low) {
    return detail::plain_quotient(a, a_low, b, b_low);
  }
};

template <class Scalar>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int32_t exponent_bias = 127;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float below_half = 0.49999997f;   // the largest float below 1/2
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
  static constexpr double below_half = 0.49999999999999994;
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.6931471805598903;
  static constexpr double ln2_low = 5.497923018708371e-14;
  static constexpr double sigmoid_limit = 746.0;  // e^-746 is below half the smallest subnormal
  static constexpr double tanh_limit = 40.0;      // tanh rounds to 1 from 19.1 on
};

// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2.
struct CentredTail {
  template <class V>
  static FRNN_HOST_DEVICE V value(V r, float) {
    V q = r * 0.00019891030654370327738f + 0.0013933685862617173589f;
    q = q * r + 0.0083333108895820771937f;
    q = q * r + 0.041666464602026541557f;
    q = q * r + 0.16666666681659179129f;
    return q * r + 0.50000000134981778643f;
  }
  template <class V>
  static FRNN_HOST_DEVICE V value(V r, double) {
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
};

// The same for -ln 2 <= r <= 0.
struct NegativeTail {
  template <class V>
  static FRNN_HOST_DEVICE V value(V r, float) {
    V q = r * 0.00015356793724868728264f + 0.0013555333417847766773f;
    q = q * r + 0.0083216092397866657561f;
    q = q * r + 0.041664784110924197263f;
    q = q * r + 0.16666655545851884469f;
    return q * r + 0.49999999893046831208f;
  }
  template <class V>
  static FRNN_HOST_DEVICE V value(V r, double) {
    V q = r * 1.5607445099962728554e-9 + 2.4228654378056027928e-8;
    q = q * r + 2.7482668009906672457e-7;
    q = q * r + 2.7553071923519134722e-6;
    q = q * r + 0.000024801431232360907734;
    q = q * r + 0.00019841266146878679053;
    q = q * r + 0.0013888888834262275722;
    q = q * r + 0.0083333333328614807982;
    q = q * r + 0.041666666666645742341;
    q = q * r + 0.16666666666666630446;
    return q * r + 0.49999999999999999896;
  }
};

// x = n ln 2 + r, where n + round_magic = shifted; returns p = e^r - 1, and in `low` what its last addition rounded
// away. |x| must stay below 2^(mantissa_bits - 2).
template <class Tail, class V>
FRNN_HOST_DEVICE V reduced_expm1(V x, V n, V& low) {
  using S = typename Lanes<V>::Scalar;
  using F = FloatFormat<S>;
  V r = x - n * F::ln2_high;
  r = r - n * F::ln2_low;
  const V tail = (r * r) * Tail::template value<V>(r, S{});
  const V p = r + tail;
  low = tail - (p - r);  // where nobody uses it, nothing computes it
  return p;
}

namespace detail {
// For a signed scalar C++17 defines the shift only where no bit is lost.
template <class Int>
FRNN_HOST_DEVICE Int shift_left(Int x, int bits) {
  if constexpr (std::is_integral_v<Int>) {
    return Int(std::make_unsigned_t<Int>(x) << bits);
  } else {
    return x << bits;
  }
}
}  // namespace detail

// 2^n for the exponent n of a normal number, from n + round_magic: n is in the lowest bits of its mantissa.
template <class V>
FRNN_HOST_DEVICE V power_of_two(V shifted) {
  using F = FloatFormat<typename Lanes<V>::Scalar>;
  return Lanes<V>::from_bits(detail::shift_left(Lanes<V>::bits(shifted) + F::exponent_bias, F::mantissa_bits));
}

template <class V>
FRNN_HOST_DEVICE V detail::plain_times_power(V x, V n) {
  using F = FloatFormat<typename Lanes<V>::Scalar>;
  // 2^n may be subnormal: two factors that are not.
  const V half = n * typename Lanes<V>::Scalar(0.5) + F::round_magic;
  const V rest = (n - (half - F::round_magic)) + F::round_magic;
  return x * power_of_two<V>(half) * power_of_two<V>(rest);
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
  if constexpr (L::own_activations) {
    return L::sigmoid(x);
  } else {
    using S = typename L::Scalar;
    using F = FloatFormat<S>;
    V magnitude = absolute(x);
    // The comparison is false for NaN, which therefore goes through.
    magnitude = L::select(magnitude > F::sigmoid_limit, V{} + F::sigmoid_limit, magnitude);
    const V n = (magnitude * -F::log2_e + F::round_magic) - F::round_magic;
    V unused;
    const V p = reduced_expm1<CentredTail, V>(-magnitude, n, unused);
    const V e = L::times_power(p + S(1), n);
    const V sum = e + S(1);
    return L::quotient(L::select(x < S(0), e, V{} + S(1)), V{}, sum, e - (sum - S(1)));
  }
}

// -m / (2 + m), m = e^(-2|x|) - 1, with the sign of x.
template <class V>
FRNN_HOST_DEVICE V tanh(V x) {
  using L = Lanes<V>;
  if constexpr (L::own_activations) {
    return L::tanh(x);
  } else {
    using S = typename L::Scalar;
    using F = FloatFormat<S>;
    const auto sign_bit = L::bits(V{} * S(-1));
    const auto bits = L::bits(x);
    V magnitude = L::from_bits(bits & ~sign_bit);
    magnitude = L::select(magnitude > F::tanh_limit, V{} + F::tanh_limit, magnitude);
    const V shifted = (magnitude * (S(-2) * F::log2_e) + F::below_half) + F::round_magic;
    V low;
    const V p = reduced_expm1<NegativeTail, V>(magnitude * S(-2), shifted - F::round_magic, low);
    const V scale = power_of_two<V>(shifted);
    const V m = scale * p + (scale - S(1));
    low = scale * low;
    const V sum = m + S(2);
    const V result = L::quotient(-m, -low, sum, low + (m - (sum - S(2))));
    return L::from_bits((L::bits(result) & ~sign_bit) | (bits & sign_bit));
  }
}

}  // namespace fused_rnn
