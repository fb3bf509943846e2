// tanh and sigmoid of AVX-512 vectors of float32; all other vectors use the formulas of cells/math.h.
//
// tanh is a polynomial of degree 5 around the centre of one of 32 intervals, whose coefficients are looked up in
// registers: half the instructions of a formula with an exponential and a quotient, and 1.0 ulp of error instead
// of 1.7. The centres are numbers whose tanh is almost a float32, so that the constant coefficient is almost exact.
//
// The rough functions are for layers in bfloat16, which keeps 8 bits of every gate: theirs have 13, in half the
// instructions. NaN stays NaN in all of them.
#pragma once

#if FRNN_VECTOR_BYTES == 64
#include <immintrin.h>

#include "tanh_table.h"

namespace fused_rnn {
namespace FRNN_ISA {

using FloatVector = VectorTypes<float>::Vector;

// The unmasked intrinsics read an undefined register, which GCC warns of. Where an operand is NaN, b is the result.
FRNN_INLINE FloatVector smaller(FloatVector a, FloatVector b) {
  return (FloatVector)_mm512_maskz_min_ps((__mmask16)0xffff, (__m512)a, (__m512)b);
}
FRNN_INLINE FloatVector larger(FloatVector a, FloatVector b) {
  return (FloatVector)_mm512_maskz_max_ps((__mmask16)0xffff, (__m512)a, (__m512)b);
}
FRNN_INLINE FloatVector splat_float(float x) { return x - FloatVector{}; }

// x * 2^floor(n)
FRNN_INLINE FloatVector scaled(FloatVector x, FloatVector n) {
  return (FloatVector)_mm512_maskz_scalef_ps((__mmask16)0xffff, (__m512)x, (__m512)n);
}

// 1 / x to 14 bits.
FRNN_INLINE FloatVector reciprocal_14(FloatVector x) {
  return (FloatVector)_mm512_maskz_rcp14_ps((__mmask16)0xffff, (__m512)x);
}

template <int degree>
FRNN_INLINE FloatVector tanh_by_table(FloatVector x, const float (&table)[degree + 2][32]) {
  const WordLanes sign = (WordLanes)x & 0x80000000u;
  const FloatVector magnitude = smaller(splat_float(tanh_limit), (FloatVector)((WordLanes)x ^ sign));
  const WordLanes column = (WordLanes)larger(splat_float(tanh_lowest), magnitude) >> 21;
  const auto look_up = [&](int row) __attribute__((always_inline)) {
    return (FloatVector)_mm512_permutex2var_ps(_mm512_load_ps(table[row]), (__m512i)column,
                                               _mm512_load_ps(table[row] + 16));
  };
  const FloatVector t = magnitude - look_up(0);
  FloatVector p = look_up(degree + 1);
#pragma GCC unroll 8
  for (int power = degree - 1; power >= 0; --power) p = p * t + look_up(power + 1);
  return (FloatVector)((WordLanes)p | sign);
}

FRNN_INLINE FloatVector tanh_by_table(FloatVector x) { return tanh_by_table<5>(x, tanh_table); }
FRNN_INLINE FloatVector rough_tanh_by_table(FloatVector x) { return tanh_by_table<3>(x, rough_tanh_table); }

// 2^n / (2^n + e^-r), x = n ln 2 + r. The smaller of 2^n and 1 is added to e^-r - 1 first, so that little is rounded
// away; nothing overflows, and a small result keeps its relative accuracy.
FRNN_INLINE FloatVector sigmoid_by_exponential(FloatVector x) {
  using F = FloatFormat<float>;
  const FloatVector one = splat_float(1.0f);
  const FloatVector y = larger(splat_float(-F::sigmoid_limit), smaller(splat_float(30.0f), x));
  const FloatVector n = (y * F::log2_e + F::round_magic) - F::round_magic;
  FloatVector r = n * F::ln2_high - y;
  r = n * F::ln2_low + r;
  FloatVector q = r * 0.0013926213f + 0.008363203f;  // tools/fit_expm1.py
  q = q * r + 0.041666556f;
  q = q * r + 0.16666576f;
  q = q * r + 0.5f;
  const FloatVector p = r + (r * r) * q;
  const FloatVector power = scaled(one, n);
  const FloatVector sum = (p + smaller(power, one)) + larger(power, one);
  const FloatVector guess = reciprocal_14(sum);
  return (guess + guess * (1.0f - sum * guess)) * power;
}

// 1 / (1 + 2^z), z = -x log2 e; 2^(z - floor(z)) by a polynomial. Infinities come out right without a limit.
FRNN_INLINE FloatVector rough_sigmoid(FloatVector x) {
  const FloatVector z = x * -FloatFormat<float>::log2_e;
  const FloatVector r = (FloatVector)_mm512_maskz_reduce_ps((__mmask16)0xffff, (__m512)z, 9);  // z - floor(z)
  FloatVector q = r * 0.01367031f + 0.051744998f;
  q = q * r + 0.24160436f;
  q = q * r + 0.69297292f;
  q = q * r + 1.0000035f;
  return reciprocal_14(1.0f + scaled(q, z));
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
#endif
