// What options do to the gates and states of a step; the formulas of the cells are those of cells/.
#pragma once

#include "../cells/options.h"
#include "pack.h"

namespace fused_rnn {
namespace FRNN_ISA {

// Out of line, because it has the code of all functions in it.
template <class Values>
struct CalledFunctions {
  static __attribute__((noinline)) void activate(Activation which, Values* a, int count) {
    switch (which) {
      case Activation::tanh: return each(a, count, [](const Values& v) { return tanh<Values>(v); });
      case Activation::sigmoid: return each(a, count, [](const Values& v) { return sigmoid<Values>(v); });
      default: return each(a, count, [&](const Values& v) { return fused_rnn::activate<Values>(which, v); });
    }
  }
  template <class F>
  static FRNN_INLINE void each(Values* a, int count, F f) {
    for (int k = 0; k < count; ++k) a[k] = f(a[k]);
  }
};

template <class Values, bool own>
using Options = OptionalGates<Values, own, CalledFunctions<Values>>;

// How the gates of a layer are computed: by the cell's own formulas alone, with options beside them, or with options
// among which are other functions. Float64 and float16 have the last for the second, too: it is less code.
enum class Gates { plain, own_functions, any };

template <class S, class F>
FRNN_INLINE void with_gates(Gates gates, F f) {
  if (gates == Gates::plain) return f(std::integral_constant<Gates, Gates::plain>());
  if constexpr (std::is_same_v<S, float> || std::is_same_v<S, BFloat16>) {
    if (gates == Gates::own_functions) return f(std::integral_constant<Gates, Gates::own_functions>());
  }
  f(std::integral_constant<Gates, Gates::any>());
}

template <class Cell, class Layer>
Gates gates_wanted(const Layer& layer) {
  if (layer.plain_gates) return Gates::plain;
  const bool own = layer.within.activation == Activation::tanh &&
                   (Cell::gates == 1 || layer.within.recurrent_activation == Activation::sigmoid);
  return own ? Gates::own_functions : Gates::any;
}

// The peephole weights of units [unit, unit + n) of vector i.
template <class S, class Options>
FRNN_INLINE void load_peephole(Options& options, const void* peephole, int64_t H, int64_t unit, int64_t n, int i) {
  using A = typename Accumulator<S>::type;
  if (!options.within.peephole) return;
  for (int k = 0; k < 3; ++k)
    options.peephole[k].v[i] = Simd<A>::load_n(static_cast<const S*>(peephole) + k * H + unit, n);
}

// Which of the units keep the state before the step (Krueger et al. 2017): by bits that were drawn, where there are
// some, or all to the extent of `rate`.
template <class A>
struct Zoneout {
  using V = typename Simd<A>::V;
  using Int = typename Simd<A>::Int;
  static constexpr int width = Simd<A>::width;

  const uint8_t* bits;  // of the row, from unit 0 on; null: none
  A rate;

  FRNN_INLINE bool any() const { return bits || rate > 0; }

  // All ones in the lanes of units that keep the state; `unit` is a multiple of width.
  FRNN_INLINE Int kept(int64_t unit, int64_t n) const {
    uint32_t word = 0;
    const uint8_t* byte = bits + unit / 8;
    if (width > 8) {
      word = byte[0];
      if (n > 8) word |= uint32_t(byte[1]) << 8;
    } else {
      word = byte[0] >> (unit % 8);
    }
    Int lanes{};
#pragma GCC unroll 16
    for (int l = 0; l < width; ++l) lanes[l] = 1 << l;
    const Int all = Int{} + typename std::remove_reference<decltype(lanes[0])>::type(word);
    return (all & lanes) != 0;
  }

  FRNN_INLINE V applied(V next, V before, int64_t unit, int64_t n) const {
    if (bits) return kept(unit, n) ? before : next;
    return (A(1) - rate) * next + rate * before;
  }

  // A gradient's part that goes to the step's own result, and the rest, which goes to the state before.
  FRNN_INLINE void divide(V& own, V& before, int64_t unit, int64_t n) const {
    const V all = own;
    if (bits) {
      const Int mask = kept(unit, n);
      own = mask ? V{} : all;
      before = mask ? all : V{};
    } else {
      own = (A(1) - rate) * all;
      before = rate * all;
    }
  }
};

FRNN_INLINE const uint8_t* row_of_bits(const uint8_t* bits, int64_t row, int64_t units) {
  return bits ? bits + row * ((units + 7) / 8) : nullptr;
}

// dst[0..n) = src[0..n) * factors[0..n); a null src stands for zeros, null factors for ones.
template <class A, class From, class Factor, class To>
void copy_scaled(const From* src, const Factor* factors, To* dst, int64_t n) {
  constexpr int width = Simd<A>::width;
  for (int64_t i = 0; i < n; i += width) {
    typename Simd<A>::V v{};
    if (src) v = Simd<A>::load_n(src + i, n - i);
    if (src && factors) v = v * Simd<A>::load_n(factors + i, n - i);
    Simd<A>::store_n(dst + i, v, n - i);
  }
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
