// Layer normalisation of a row (Ba et al. 2016): of all gates of W_ih x, and of W_hh h, and of the units of an LSTM's
// c.
//
// The mean is that of the differences to the row's first value, plus that value, and the variance that of what the mean
// leaves: a large mean costs no digits, and a constant row is exactly 0. A row is one thread's, and its sums run in one
// order, so the result is the same bits for any number of threads.
#pragma once

#include "../cells/options.h"
#include "pack.h"

namespace fused_rnn {
namespace FRNN_ISA {

// By halves, whose additions do not wait for one another.
template <class A>
FRNN_INLINE A sum_of_lanes(typename Simd<A>::V v) {
  alignas(64) A lanes[Simd<A>::width];
  Simd<A>::store(lanes, v);
#pragma GCC unroll 4
  for (int half = Simd<A>::width / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// v with zeros behind its first n lanes.
template <class A>
FRNN_INLINE typename Simd<A>::V first_lanes(typename Simd<A>::V v, int64_t n) {
  if (__builtin_expect(n >= Simd<A>::width, 1)) return v;
  alignas(64) A lanes[Simd<A>::width];
  Simd<A>::store(lanes, v);
  return Simd<A>::load_n(lanes, n);
}

// 1 / sqrt(variance + epsilon) from a sum of squares over `count` values.
template <class A>
FRNN_INLINE A inverse_deviation(A squares, int64_t count) {
  const A variance = squares / A(count) + A(layer_norm_epsilon);
  if constexpr (std::is_same_v<A, double>) {
    return 1 / __builtin_sqrt(variance);
  } else {
    return 1 / __builtin_sqrtf(variance);
  }
}

// N sums over units, or over those of several gates, in four chains of additions, each of which waits for the last.
template <class A, int N>
struct UnitSums {
  using V = typename Simd<A>::V;
  static constexpr int width = Simd<A>::width, chains = 4;
  V partial[chains][N] = {};

  // Over H units: f(unit, n, terms) gives the terms of a vector of units, of which n exist, zeros for the others.
  template <class F>
  FRNN_INLINE void add(int64_t H, F f) {
    const auto add_vector = [&](int chain, int64_t unit) __attribute__((always_inline)) {
      V terms[N];
      f(unit, H - unit, terms);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) partial[chain][i] = partial[chain][i] + terms[i];
    };
    int64_t unit = 0;
    for (; unit + chains * width <= H; unit += chains * width) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) add_vector(chain, unit + chain * width);
    }
    for (int chain = 0; unit < H; ++chain, unit += width) add_vector(chain, unit);
  }

  FRNN_INLINE A total(int i) const {
    return sum_of_lanes<A>((partial[0][i] + partial[1][i]) + (partial[2][i] + partial[3][i]));
  }
};

// A row of sums in panels of G gates of U vectors of units: calls f(column, v, gate, unit, n) for each vector of which
// n units exist; v: its place in the panel.
template <class A, int G, int U, class F>
FRNN_INLINE void each_vector_of_panels(int64_t H, F f) {
  constexpr int width = Simd<A>::width;
  constexpr int64_t units = U * width, columns = G * units;
  int64_t column = 0, first = 0;
  for (; first + units <= H; first += units, column += columns) {
#pragma GCC unroll 4
    for (int v = 0; v < G * U; ++v)
      f(column + v * width, v, v / U, first + v % U * width, std::integral_constant<int, width>());
  }
  if (first >= H) return;
  for (int v = 0; v < G * U; ++v) {
    const int64_t unit = first + v % U * width;
    if (unit < H) f(column + v * width, v, v / U, unit, H - unit);
  }
}

// values = (values - mean) / deviation * gain + added(column, v), of a row in panels. centred: where the values less
// their mean are kept, gate by gate (G * H); null: nowhere.
template <class S, int G, int U, class Added>
void normalise_panels(typename Accumulator<S>::type* values, int64_t H, const typename Accumulator<S>::type* gain,
                      S* centred, Added added) {
  using A = typename Accumulator<S>::type;
  using V = typename Simd<A>::V;
  // Chains of additions, by gate or by the unit's vector, so that their sums do not depend on U.
  constexpr int width = Simd<A>::width, chains = G == 1 ? 2 : G;
  const auto chain_of = [](int gate, int64_t unit)
                            __attribute__((always_inline)) { return G == 1 ? int(unit / width % 2) : gate; };
  const int64_t count = G * H;
  const auto total = [](const V* partial) __attribute__((always_inline)) {
    V sum = partial[0];
    for (int chain = 1; chain < chains; ++chain) sum = sum + partial[chain];
    return sum_of_lanes<A>(sum);
  };
  V sums[chains] = {}, squares[chains] = {};
  const A first = values[0];
  each_vector_of_panels<A, G, U>(
      H, [&](int64_t column, int, int gate, int64_t unit, auto n) __attribute__((always_inline)) {
        V& sum = sums[chain_of(gate, unit)];
        sum = sum + first_lanes<A>(Simd<A>::load_n(values + column, n) - first, n);
      });
  const A mean = first + total(sums) / A(count);
  each_vector_of_panels<A, G, U>(
      H, [&](int64_t column, int, int gate, int64_t unit, auto n) __attribute__((always_inline)) {
        const V value = first_lanes<A>(Simd<A>::load_n(values + column, n) - mean, n);
        Simd<A>::store(values + column, value);
        V& sum = squares[chain_of(gate, unit)];
        sum = sum + value * value;
        if (centred) Simd<A>::store_n(centred + gate * H + unit, value, n);
      });
  const A scale = inverse_deviation<A>(total(squares), count);
  each_vector_of_panels<A, G, U>(H, [&](int64_t column, int v, int, int64_t, auto n) __attribute__((always_inline)) {
    const V value = Simd<A>::load_n(values + column, n) * scale;
    Simd<A>::store(values + column, value * Simd<A>::load(gain + column) + added(column, v));
  });
}

// values -= mean, of H units; returns 1 / deviation.
template <class A>
A centre_units(A* values, int64_t H) {
  using V = typename Simd<A>::V;
  const A first = values[0];
  UnitSums<A, 1> sum, squares;
  sum.add(H, [&](int64_t u, int64_t n, V* terms) __attribute__((always_inline)) {
    terms[0] = first_lanes<A>(Simd<A>::load_n(values + u, n) - first, n);
  });
  const A mean = first + sum.total(0) / A(H);
  squares.add(H, [&](int64_t u, int64_t n, V* terms) __attribute__((always_inline)) {
    const V value = first_lanes<A>(Simd<A>::load_n(values + u, n) - mean, n);
    Simd<A>::store_n(values + u, value, n);
    terms[0] = value * value;
  });
  return inverse_deviation<A>(squares.total(0), H);
}

// Gradients of G * H values before their normalisation, from those after it times the gain, which stand in the order of
// `order`, and from the values less their mean, which stand gate by gate: with g = grads * gain and
// z = values less their mean over their deviation, (g - mean(g) - z mean(g z)) / deviation. Returns 1 / deviation.
template <class S, class E, int G>
typename Accumulator<S>::type gradient_through_norm(const E* grads, const int* order, const S* centred, const S* gain,
                                                    int64_t H, E* result) {
  using A = typename Accumulator<S>::type;
  using V = typename Simd<A>::V;
  constexpr int width = Simd<A>::width;
  const int64_t count = G * H;
  UnitSums<A, 3> sums;  // of squares of the values, of g, and of their products
  for (int j = 0; j < G; ++j) {
    const E* of_gate = grads + j * H;
    const S *values = centred + order[j] * H, *gains = gain + order[j] * H;
    sums.add(H, [&](int64_t u, int64_t n, V* terms) __attribute__((always_inline)) {
      const V value = Simd<A>::load_n(values + u, n);
      const V g = Simd<A>::load_n(of_gate + u, n) * Simd<A>::load_n(gains + u, n);
      terms[0] = value * value;
      terms[1] = g;
      terms[2] = g * value;
    });
  }
  const A scale = inverse_deviation<A>(sums.total(0), count);
  const V factor = Simd<A>::splat(scale), mean = Simd<A>::splat(sums.total(1) / A(count));
  const V slope = Simd<A>::splat(sums.total(2) / A(count) * scale * scale);
  for (int j = 0; j < G; ++j) {
    for (int64_t u = 0; u < H; u += width) {
      const int64_t n = H - u;
      const V value = Simd<A>::load_n(centred + order[j] * H + u, n);
      const V g = Simd<A>::load_n(grads + j * H + u, n) * Simd<A>::load_n(gain + order[j] * H + u, n);
      Simd<A>::store_n(result + j * H + u, (g - mean - value * slope) * factor, n);
    }
  }
  return scale;
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
