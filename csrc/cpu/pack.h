// Packing of the B operand of product.h, and the transposition of gate gradients.
//
//   pack_gates    forward weights (G * H, K), transposed: a panel holds all gates of U vectors of units
//   pack_columns  rows of K x N as they are: panels of four vectors of columns, the last one perhaps of fewer
//   transpose     K x M gate gradients to M x K, the A operand of the weight gradients
#pragma once

#include <type_traits>

#include "product.h"

namespace fused_rnn {
namespace FRNN_ISA {

inline constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#if defined(__clang__)
template <int distance, class V>
FRNN_INLINE void exchange(V& a, V& b) {
  for (int l = 0; l < int(sizeof(V) / sizeof(a[0])); ++l) {
    if ((l & distance) != 0) continue;
    const auto t = a[l + distance];
    a[l + distance] = b[l];
    b[l] = t;
  }
}
#else
// Swaps the odd blocks of a with the even blocks of b, blocks being `distance` lanes.
template <int distance, class V, class Int>
FRNN_INLINE void exchange(V& a, V& b, Int) {
  constexpr int width = sizeof(V) / sizeof(a[0]);
  Int low, high;
#pragma GCC unroll 16
  for (int l = 0; l < width; ++l) {
    low[l] = (l & distance) == 0 ? l : width + l - distance;
    high[l] = (l & distance) == 0 ? l + distance : width + l;
  }
  const V x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
  a = x;
  b = y;
}
#endif

// rows[i][j] <-> rows[j][i], all in registers.
template <class A>
FRNN_INLINE void transpose_square(typename Simd<A>::V* rows) {
  constexpr int width = Simd<A>::width;
  const auto stage = [&](auto distance) __attribute__((always_inline)) {
    constexpr int d = decltype(distance)::value;
    if constexpr (d < width) {
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) {
#if defined(__clang__)
        if ((i & d) == 0) exchange<d>(rows[i], rows[i | d]);
#else
        if ((i & d) == 0) exchange<d>(rows[i], rows[i | d], typename Simd<A>::Int{});
#endif
      }
    }
  };
  stage(std::integral_constant<int, 8>{});
  stage(std::integral_constant<int, 4>{});
  stage(std::integral_constant<int, 2>{});
  stage(std::integral_constant<int, 1>{});
}

// Groups of `group` elements along k move as one word of the accumulation type: load_words gives the next
// `width` of them from a row of S, of which `left` elements exist.
template <class E, class S>
FRNN_INLINE typename Simd<typename Operand<E>::Acc>::V load_words(const S* row, int64_t left) {
  using A = typename Operand<E>::Acc;
  constexpr int width = Simd<A>::width;
  if constexpr (Operand<E>::group == 1) {
    return Simd<A>::load_n(row, left);
  } else {
    static_assert(sizeof(S) * Operand<E>::group == sizeof(A), "a group is one word");
    constexpr int64_t elements = width * Operand<E>::group;
    if (left >= elements) return load_bytes<typename Simd<A>::V>(row);
    alignas(64) S padded[elements] = {};
    for (int64_t i = 0; i < left; ++i) padded[i] = row[i];
    return load_bytes<typename Simd<A>::V>(padded);
  }
}

// One vector of units (rows first_row + lane of w, `units` of them real) of one gate, for all k:
// dst[(k / group) * panel_columns * group + lane * group + k % group].
template <class E, class S>
void pack_unit_vector(const S* w, int64_t K, int64_t units, E* dst, int64_t panel_columns) {
  using A = typename Operand<E>::Acc;
  constexpr int width = Simd<A>::width;
  constexpr int group = Operand<E>::group;
  typename Simd<A>::V rows[width];
  for (int64_t k = 0; k < K; k += width * group) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) {
      rows[i] = typename Simd<A>::V{};
      if (i < units) rows[i] = load_words<E>(w + i * K + k, K - k);
    }
    transpose_square<A>(rows);
    const int64_t words = (K - k + group - 1) / group;
    for (int i = 0; i < width && i < words; ++i) store_bytes(dst + (k / group + i) * panel_columns * group, rows[i]);
  }
}

// Panel p of w (G * H, K): units [p * U * width, ...) of every gate, columns ordered gate, then unit.
template <class E, int G, int U, class S>
void pack_gates(const S* w, int64_t H, int64_t K, int64_t p, E* panel) {
  constexpr int width = Simd<typename Operand<E>::Acc>::width;
  constexpr int64_t columns = int64_t(G) * U * width;
  for (int g = 0; g < G; ++g) {
    for (int u = 0; u < U; ++u) {
      const int64_t unit = (p * U + u) * width;
      const int64_t real = H - unit < width ? (H - unit > 0 ? H - unit : 0) : width;
      pack_unit_vector<E>(w + (g * H + unit) * K, K, real, panel + (g * U + u) * width * Operand<E>::group, columns);
    }
  }
}

// The sums over lanes of `width` vectors, as the lanes of one.
template <class A>
FRNN_INLINE typename Simd<A>::V sum_lanes(typename Simd<A>::V* v) {
  constexpr int width = Simd<A>::width;
  const auto stage = [&](auto distance) __attribute__((always_inline)) {
    constexpr int d = decltype(distance)::value;
    if constexpr (d < width) {
#pragma GCC unroll 8
      for (int i = 0; i < d; ++i) {
#if defined(__clang__)
        exchange<d>(v[i], v[i + d]);
#else
        exchange<d>(v[i], v[i + d], typename Simd<A>::Int{});
#endif
        v[i] = v[i] + v[i + d];
      }
    }
  };
  stage(std::integral_constant<int, 8>{});
  stage(std::integral_constant<int, 4>{});
  stage(std::integral_constant<int, 2>{});
  stage(std::integral_constant<int, 1>{});
  return v[0];
}

// Panels of columns, four vectors wide; the last one is as wide as there are vectors left.
template <class E>
struct ColumnPanels {
  static constexpr int NV = 4;
  static constexpr int width = Simd<typename Operand<E>::Acc>::width;
  const typename Operand<E>::Stored* data;
  int64_t K;
  int64_t N;

  static int64_t count(int64_t N) { return (N + NV * width - 1) / (NV * width); }
  static int64_t padded_columns(int64_t N) { return round_up(N, width); }
  static size_t elements(int64_t K, int64_t N) { return size_t(padded_depth<E>(K) * padded_columns(N)); }
  static int64_t panel_stride(int64_t K) { return padded_depth<E>(K) * NV * width; }
};

// C = A B over panels [first, last) of B, in this order or descending (product); c points at column 0.
template <class E>
void product_columns(int64_t rows, const typename Operand<E>::Row* const* a, const ColumnPanels<E>& b, int64_t first,
                     int64_t last, typename Operand<E>::Acc* c, int64_t c_stride, bool accumulate,
                     bool descending = false) {
  using P = ColumnPanels<E>;
  constexpr int64_t columns = P::NV * P::width;
  const int64_t stride = P::panel_stride(b.K);
  const int64_t vectors = (b.N + P::width - 1) / P::width;
  const int64_t wide = vectors / P::NV;  // panels that have all their vectors
  const int64_t end = last < wide ? last : wide;
  using A = typename Operand<E>::Acc;
  Addend<A> addend;
  if (accumulate) addend = {c, c_stride, nullptr};
  const auto multiply_wide = [&] {
    if (end <= first) return;
    auto addend_here = addend;
    if (accumulate) addend_here.from += first * columns;
    product<E, P::NV>(rows, b.K, a, b.data + first * stride, end - first, stride, c + first * columns, c_stride,
                      addend_here, nullptr, descending);
  };
  if (!descending) multiply_wide();
  if (last > wide) {
    const typename Operand<E>::Stored* narrow = b.data + wide * stride;
    auto addend_here = addend;
    if (accumulate) addend_here.from += wide * columns;
    A* target = c + wide * columns;
    switch (vectors % P::NV) {
      case 1: product<E, 1>(rows, b.K, a, narrow, 1, stride, target, c_stride, addend_here); break;
      case 2: product<E, 2>(rows, b.K, a, narrow, 1, stride, target, c_stride, addend_here); break;
      case 3: product<E, 3>(rows, b.K, a, narrow, 1, stride, target, c_stride, addend_here); break;
    }
  }
  if (descending) multiply_wide();
}

#if FRNN_VECTOR_BYTES == 64
// Columns [0, 16) or, upper, [16, 32) of two rows of 16-bit numbers, each two above each other as a word.
template <bool upper>
FRNN_INLINE __m512i paired(__m512i row, __m512i below) {
  HalfWords index;
#pragma GCC unroll 16
  for (int l = 0; l < 16; ++l) {
    index[2 * l] = uint16_t(l + (upper ? 16 : 0));
    index[2 * l + 1] = uint16_t(l + (upper ? 48 : 32));
  }
  return _mm512_permutex2var_epi16(row, (__m512i)index, below);
}
#endif

// Panel p of the K x N matrix whose rows begin at row[k] (null: a row of zeros).
template <class E, class S>
void pack_column_panel(const S* const* row, int64_t K, int64_t N, int64_t p, E* panel) {
  using P = ColumnPanels<E>;
  using A = typename Operand<E>::Acc;
  constexpr int width = P::width;
  constexpr int group = Operand<E>::group;
  const int64_t first = p * P::NV * width;
  const int64_t vectors = (N - first + width - 1) / width < P::NV ? (N - first + width - 1) / width : P::NV;
  int64_t v = 0;
#if FRNN_VECTOR_BYTES == 64
  if constexpr (group == 2) {
    for (; N - first - v * width >= 2 * width && v + 2 <= vectors; v += 2) {
      E* dst = panel + v * width * group;
      const auto load_row = [&](int64_t k) __attribute__((always_inline)) {
        if (k >= K || !row[k]) return __m512i{};
        __builtin_prefetch(row[k] + first + (v + P::NV) * width, 0, 2);  // of the next panel
        return load_bytes<__m512i>(row[k] + first + v * width);
      };
      for (int64_t k = 0; k < K; k += group) {
        const __m512i above = load_row(k), below = load_row(k + 1);
        store_bytes(dst + k * vectors * width, paired<false>(above, below));
        store_bytes(dst + k * vectors * width + width * group, paired<true>(above, below));
      }
    }
  }
#endif
  for (; v < vectors; ++v) {
    const int64_t column = first + v * width;
    const int64_t left = N - column;
    E* dst = panel + v * width * group;
    for (int64_t k = 0; k < K; k += group) {
      if constexpr (group == 1) {
        typename Simd<A>::V x{};
        if (row[k]) x = Simd<A>::load_n(row[k] + column, left);
        Simd<A>::store(dst + k * vectors * width, x);
      } else {
        const auto lanes = [&](int64_t i) __attribute__((always_inline)) {
          HalfLanes x{};
          if (i < K && row[i]) {
            if (left >= width) {
              x = load_bytes<HalfLanes>(row[i] + column);
            } else {
              for (int64_t l = 0; l < left; ++l) x[l] = row[i][column + l].bits;
            }
          }
          return __builtin_convertvector(x, WordLanes);
        };
        store_bytes(dst + k * vectors * width, lanes(k) | (lanes(k + 1) << 16));
      }
    }
  }
}

// The same where it stands among all panels.
template <class E, class S>
void pack_columns(const S* const* row, int64_t K, int64_t N, int64_t p, E* data) {
  pack_column_panel<E>(row, K, N, p, data + p * ColumnPanels<E>::panel_stride(K));
}

// dst[m * dst_stride + k] = src[k * src_stride + m], m < M, k < K. dst rows are padded to whole vectors of words.
template <class E>
void transpose(const E* src, int64_t src_stride, int64_t K, int64_t M, E* dst, int64_t dst_stride) {
  using A = typename Operand<E>::Acc;
  using V = typename Simd<A>::V;
  constexpr int width = Simd<A>::width;
  constexpr int group = Operand<E>::group;
  V block[width];
  for (int64_t k = 0; k < K; k += width * group) {
    int64_t m = 0;
#if FRNN_VECTOR_BYTES == 64
    if constexpr (group == 2) {
      const auto transpose_half = [&](auto upper) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
          const E* row = src + (k + i * group) * src_stride + m;
          block[i] = (V)paired<decltype(upper)::value>(load_bytes<__m512i>(row), load_bytes<__m512i>(row + src_stride));
        }
        transpose_square<A>(block);
        E* to = dst + (m + (upper ? width : 0)) * dst_stride + k;
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) store_bytes(to + i * dst_stride, block[i]);
      };
      for (; k + width * group <= K && m + 2 * width <= M; m += 2 * width) {
        transpose_half(std::false_type{});
        transpose_half(std::true_type{});
      }
    }
#endif
    for (; m < M; m += width) {
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) {
        block[i] = V{};
        const int64_t row = k + i * group;
        if (row >= K) continue;
        if constexpr (group == 1) {
          block[i] = Simd<A>::load_n(src + row * src_stride + m, M - m);
        } else {
          const auto lanes = [&](int64_t j) __attribute__((always_inline)) {
            HalfLanes x{};
            if (j < K) {
              if (M - m >= width) {
                x = load_bytes<HalfLanes>(src + j * src_stride + m);
              } else {
                for (int64_t l = 0; l < M - m; ++l) x[l] = src[j * src_stride + m + l].bits;
              }
            }
            return __builtin_convertvector(x, WordLanes);
          };
          block[i] = (V)(lanes(row) | (lanes(row + 1) << 16));
        }
      }
      transpose_square<A>(block);
      for (int i = 0; i < width && m + i < M; ++i) store_bytes(dst + (m + i) * dst_stride + k, block[i]);
    }
  }
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
