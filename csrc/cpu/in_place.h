// Products for calls of few rows, which read the weights where they stand: each weight is used once or a few times, and
// packing it would cost more than the product.
//
//   product_by_dots     forward, a few rows: dot products along k
//   product_in_lanes    forward, more rows: the rows stand in the lanes, and every weight is one broadcast; those that
//   are
//                       left over, and would leave most lanes of another vector idle, are dot products again
//   product_of_columns  backward: gradients times a weight, whose rows are added up
#pragma once

#include "kernels.h"
#include "pack.h"

namespace fused_rnn {
namespace FRNN_ISA {

// From this many rows on the rows stand in the lanes. With fewer, lanes are idle and dot products take 0.55 to 0.85 of
// the time; with more, those have as many multiply-adds and add up the lanes of their sums besides. Eight rows that
// fill eight lanes are about as fast either way.
template <class A>
inline constexpr int64_t least_rows_in_lanes = Simd<A>::width == 8 ? 9 : Simd<A>::width;

// Of so many rows, those that stand in lanes: all, unless few are left over for the last vector, of which up to 11 of
// 16 take less time as dot products than the vector does. (Not where a vector has 8 lanes: its product is the faster
// the more vectors there are.)
template <class A>
int64_t rows_in_lanes(int64_t rows) {
  constexpr int width = Simd<A>::width;
  constexpr int64_t most_left_over = FRNN_VECTOR_BYTES == 64 ? width * 11 / 16 : 0;
  const int64_t left_over = rows % width;
  return left_over <= most_left_over ? rows - left_over : rows;
}

// Where an instruction multiplies pairs of k, and so wants the weight in an order of its own, more rows than dot
// products take are worth that order: a panel of the weight at a time, which is in the second-level cache until it is
// multiplied, and in no memory.
template <class E>
inline constexpr bool packs_as_it_goes = Operand<E>::group > 1;

// Rows (null: none) of K numbers as columns: panels of a K x N matrix as ColumnPanels describes them.
template <class A, class S>
void pack_transposed(const S* const* row, int64_t N, int64_t K, A* data) {
  using P = ColumnPanels<A>;
  using V = typename Simd<A>::V;
  constexpr int width = Simd<A>::width;
  for (int64_t n = 0; n < N; n += width) {
    const int64_t panel = n / (P::NV * width), column = n % (P::NV * width);
    const int64_t left = round_up(N - panel * P::NV * width, width);
    const int64_t stride = left < P::NV * width ? left : P::NV * width;
    A* dst = data + panel * P::panel_stride(K) + column;
    for (int64_t k = 0; k < K; k += width) {
      V block[width];
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) {
        block[i] = V{};
        if (n + i < N) block[i] = Simd<A>::load_n(row[n + i] + k, K - k);
      }
      transpose_square<A>(block);
      for (int i = 0; i < width && k + i < K; ++i) Simd<A>::store(dst + (k + i) * stride, block[i]);
    }
  }
}

// What product_in_lanes works in, of one thread.
template <class A>
struct LaneScratch {
  A* rows;     // the rows, packed by pack_transposed
  A* weights;  // (width, K) weights in another type than A
  A* sums;     // (width, padded rows)

  static int64_t row_elements(int64_t rows, int64_t K) { return int64_t(ColumnPanels<A>::elements(K, rows)); }
  static int64_t sum_elements(int64_t rows) { return Simd<A>::width * (round_up(rows, Simd<A>::width) + 16); }
};

// Rows of a weight that NR rows are multiplied with at once: as many as leave all sums in registers, but no more than
// there are streams of memory that a core follows by itself.
template <int NR>
constexpr int dots_at_once() {
  constexpr int sums = vector_registers == 32 ? 24 : product_registers > 0 ? 9 : 12;
  constexpr int streams = vector_registers == 32 ? 16 : 8;
  return NR == 1 ? streams : sums / NR;
}
inline constexpr int most_rows_of_dots = 6;

// Whether the rows behind those of a weight of so many bytes (0: which a cache holds) are fetched ahead, where NR rows
// are multiplied at once. A processor that follows the streams by itself does without, but for few streams of what no
// cache holds.
template <int NR>
bool fetches_weights(int64_t bytes) {
  constexpr int64_t cached_bytes = 8 * 1024 * 1024;
  return bytes > 0 && (!follows_streams() || (NR > 2 && bytes > cached_bytes));
}

// The compiler would load a value anew from memory for each of its uses.
template <class V>
FRNN_INLINE void keep_in_register(V& v) {
#if defined(__x86_64__)
#if FRNN_VECTOR_BYTES == 64
  __asm__("" : "+v"(v));
#else
  __asm__("" : "+x"(v));
#endif
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  (void)v;
#endif
}

// NR rows times dots_at_once<NR>() rows w of a weight; `rows` times `columns` of them are wanted, and go to c. fetch:
// the rows of the weight behind these are brought nearer.
template <class E, int NR, bool fetch, class S>
__attribute__((noinline)) void dots(int64_t rows, int64_t columns, int64_t K, const E* const* a, const S* const* w,
                                    typename Operand<E>::Acc* c, int64_t c_stride) {
  using A = typename Operand<E>::Acc;
  using V = typename Simd<A>::V;
  constexpr int width = Simd<A>::width;
  constexpr int NW = dots_at_once<NR>(), padded = (NR * NW + width - 1) / width * width;
  constexpr int64_t line = 64 / sizeof(S);
  V acc[padded];
#pragma GCC unroll 32
  for (int i = 0; i < padded; ++i) acc[i] = V{};
  const auto multiply = [&](auto load, int64_t k) __attribute__((always_inline)) {
    if constexpr (NW >= NR) {
      V x[NR];
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) x[r] = load(a[r] + k);
#pragma GCC unroll 16
      for (int i = 0; i < NW; ++i) {
        V weight = load(w[i] + k);
        if (NR > 1) keep_in_register(weight);
#pragma GCC unroll 8
        for (int r = 0; r < NR; ++r) acc[r * NW + i] = acc[r * NW + i] + x[r] * weight;
      }
    } else {
      V weight[NW];
#pragma GCC unroll 8
      for (int i = 0; i < NW; ++i) {
        weight[i] = load(w[i] + k);
        keep_in_register(weight[i]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
        V x = load(a[r] + k);
        keep_in_register(x);
#pragma GCC unroll 8
        for (int i = 0; i < NW; ++i) acc[r * NW + i] = acc[r * NW + i] + x * weight[i];
      }
    }
  };
  int64_t k = 0;
  for (; k + width <= K; k += width) {
    if (fetch && (width % line == 0 || k % line == 0)) {
#pragma GCC unroll 16
      for (int i = 0; i < NW; ++i) __builtin_prefetch(w[i] + NW * K + k, 0, 2);
    }
    multiply([](const auto* p) __attribute__((always_inline)) { return Simd<A>::load(p); }, k);
  }
  if (k < K) multiply([&](const auto* p) __attribute__((always_inline)) { return Simd<A>::load_n(p, K - k); }, k);
  alignas(64) A sums[padded];
#pragma GCC unroll 8
  for (int i = 0; i < padded; i += width) Simd<A>::store(sums + i, sum_lanes<A>(acc + i));
  for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(c + r * c_stride, sums + r * NW, size_t(columns) * sizeof(A));
}

// All rows times `columns` rows of a weight: what a part of it is multiplied with next finds it in the first-level
// cache. w: as many more as a tile has, that repeat one.
template <class E, int NR, class S>
void all_dots(int64_t rows, int64_t columns, int64_t K, bool fetch, const E* const* a, const S* const* w,
              typename Operand<E>::Acc* c, int64_t c_stride) {
  constexpr int NW = dots_at_once<NR>();
  for (int64_t first = 0; first < columns; first += NW) {
    const int64_t count = columns - first < NW ? columns - first : NW;
    for (int64_t r = 0; r < rows; r += NR) {
      const int64_t left = rows - r < NR ? rows - r : NR;
      const E* row[NR];
      for (int i = 0; i < NR; ++i) row[i] = a[r + (i < left ? i : left - 1)];
      typename Operand<E>::Acc* target = c + r * c_stride + first;
      if (fetch && r == 0) {
        dots<E, NR, true>(left, count, K, row, w + first, target, c_stride);
      } else {
        dots<E, NR, false>(left, count, K, row, w + first, target, c_stride);
      }
    }
  }
}

// The same for any number of rows, in as few tiles as there can be, of like size. bytes: as fetches_weights has it.
template <class E, class S>
void dots_of_rows(int64_t rows, int64_t columns, int64_t K, int64_t bytes, const E* const* a, const S* const* w,
                  typename Operand<E>::Acc* c, int64_t c_stride) {
  using A = typename Operand<E>::Acc;
  constexpr int64_t most =
      most_rows_of_dots < least_rows_in_lanes<A> - 1 ? most_rows_of_dots : least_rows_in_lanes<A> - 1;
  const int64_t tiles = (rows + most - 1) / most;
  const auto multiply = [&](auto n) __attribute__((always_inline)) {
    constexpr int NR = decltype(n)::value;
    if constexpr (NR <= most) all_dots<E, NR>(rows, columns, K, fetches_weights<NR>(bytes), a, w, c, c_stride);
  };
  switch ((rows + tiles - 1) / tiles) {
    case 1: multiply(std::integral_constant<int, 1>{}); break;
    case 2: multiply(std::integral_constant<int, 2>{}); break;
    case 3: multiply(std::integral_constant<int, 3>{}); break;
    case 4: multiply(std::integral_constant<int, 4>{}); break;
    case 5: multiply(std::integral_constant<int, 5>{}); break;
    default: multiply(std::integral_constant<int, 6>{}); break;
  }
}

// The product of panel p of a forward weight (pack_gates) without packing it. Arguments as pack_gates and product.
template <class E, int G, int U, int NA, class S>
void product_by_dots(int64_t rows, int64_t K, const E* const* a, const S* w, int64_t H, int64_t p,
                     typename Operand<E>::Acc* c, int64_t c_stride, Addend<typename Operand<E>::Acc> addend) {
  using A = typename Operand<E>::Acc;
  constexpr int width = Simd<A>::width;
  constexpr int columns = G * U * width;
  const S* weight[columns + dots_at_once<1>()];
  // Lanes past the last unit, and what fills the last tile, repeat one: their sums are not read.
  for (int i = 0; i < columns + dots_at_once<1>(); ++i) {
    const int column = i < columns ? i : columns - 1;
    const int64_t unit = p * U * width + column % (U * width);
    weight[i] = w + (column / (U * width) * H + (unit < H ? unit : H - 1)) * K;
  }
  dots_of_rows(rows, columns, K, G * H * K * int64_t(sizeof(S)), a, weight, c, c_stride);
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < G * U; ++v) {
      const A* added = v >= G * U - NA ? addend.apart : addend.from + r * addend.stride;
      A* sums = c + r * c_stride + v * width;
      Simd<A>::store(sums, Simd<A>::load(sums) + Simd<A>::load(added + v * width));
    }
  }
}

// The product of panel p with `rows` rows, of which the first rows_in_lanes stand in scratch.rows. Arguments as
// product_by_dots.
template <class A, int G, int U, int NA, class S>
void product_in_lanes(int64_t rows, int64_t K, const A* const* a, const S* w, int64_t H, int64_t p, A* c,
                      int64_t c_stride, Addend<A> addend, const LaneScratch<A>& scratch) {
  using V = typename Simd<A>::V;
  constexpr int width = Simd<A>::width, most = dots_at_once<1>();
  const int64_t in_lanes = rows_in_lanes<A>(rows), stride = round_up(in_lanes, width) + 16;
  const ColumnPanels<A> lanes{scratch.rows, K, in_lanes};
  for (int g = 0; g < G; ++g) {
    for (int u = 0; u < U; ++u) {
      const int64_t unit = (p * U + u) * width, column = (g * U + u) * width;
      const int64_t units = H - unit < width ? H - unit : width;
      if (units <= 0) continue;
      const S* stored[width + most];  // what fills the last tile of dot products repeats a row
      for (int64_t i = 0; i < width + most; ++i) stored[i] = w + (g * H + unit + (i < units ? i : units - 1)) * K;
      const A* weight[width];
      for (int64_t i = 0; i < units; ++i) {
        if constexpr (sizeof(S) == sizeof(A)) {
          weight[i] = stored[i];
        } else {
          A* copy = scratch.weights + i * (round_up(K, width) + 16);
          for (int64_t k = 0; k < K; k += width) Simd<A>::store(copy + k, Simd<A>::load_n(stored[i] + k, K - k));
          weight[i] = copy;
        }
      }
      product_columns<A>(units, weight, lanes, 0, ColumnPanels<A>::count(in_lanes), scratch.sums, stride, false);
      const bool apart = g * U + u >= G * U - NA;
      const auto store = [&](int64_t row, V sum) __attribute__((always_inline)) {
        const A* added = apart ? addend.apart : addend.from + row * addend.stride;
        Simd<A>::store(c + row * c_stride + column, sum + Simd<A>::load(added + column));
      };
      for (int64_t r = 0; r < in_lanes; r += width) {
        V block[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) block[i] = Simd<A>::load(scratch.sums + i * stride + r);
        transpose_square<A>(block);
        for (int i = 0; i < width && r + i < in_lanes; ++i) store(r + i, block[i]);
      }
      if (in_lanes == rows) continue;
      A* sums = c + in_lanes * c_stride + column;
      if constexpr (sizeof(S) == sizeof(A)) {
        dots_of_rows<A>(rows - in_lanes, width, K, 0, a + in_lanes, stored, sums, c_stride);
      } else {
        const A* copied[width + most];
        for (int64_t i = 0; i < width + most; ++i) copied[i] = weight[i < units ? i : units - 1];
        dots_of_rows<A>(rows - in_lanes, width, K, 0, a + in_lanes, copied, sums, c_stride);
      }
      for (int64_t r = in_lanes; r < rows; ++r) store(r, Simd<A>::load(c + r * c_stride + column));
    }
  }
}

// The same where an instruction multiplies pairs of k: the block is packed for it. Its sums are added to C, so it is as
// deep as the second-level cache allows.
inline constexpr int64_t rows_of_packed_block = 512;

template <class E, class S>
void packed_product_of_columns(int64_t rows, int64_t K, const E* const* a, int64_t a_first, const S* b, int64_t N,
                               int64_t first, int64_t last, typename Operand<E>::Acc* c, int64_t c_stride,
                               bool accumulate, E* block, const E** a_block, const S** b_block) {
  using P = ColumnPanels<E>;
  using A = typename Operand<E>::Acc;
  constexpr int64_t columns = P::NV * P::width;
  if (rows <= 0) return;
  for (int64_t k = 0; k < K; k += rows_of_packed_block) {
    const int64_t depth = K - k < rows_of_packed_block ? K - k : rows_of_packed_block;
    for (int64_t r = 0; r < rows; ++r) a_block[r] = a[r] + a_first + k;
    for (int64_t i = 0; i < depth; ++i) b_block[i] = b + (k + i) * N;
    for (int64_t p = first; p < last; ++p) {
      pack_column_panel<E>(b_block, depth, N, p, block);
      A* target = c + (p - first) * columns;
      const Addend<A> addend =
          accumulate || k > 0 ? Addend<A>{target, c_stride, nullptr} : Addend<A>{nullptr, 0, nullptr};
      const int64_t vectors = (N - p * columns + P::width - 1) / P::width;
      switch (vectors) {
        case 1: product<E, 1>(rows, depth, a_block, block, 1, 0, target, c_stride, addend); break;
        case 2: product<E, 2>(rows, depth, a_block, block, 1, 0, target, c_stride, addend); break;
        case 3: product<E, 3>(rows, depth, a_block, block, 1, 0, target, c_stride, addend); break;
        default: product<E, 4>(rows, depth, a_block, block, 1, 0, target, c_stride, addend); break;
      }
    }
  }
}

// Rows of a weight that product_of_columns takes together. Their part of one panel is copied into the first-level cache
// for all rows that it is multiplied with: in place, rows of a power of two would share its sets.
inline constexpr int64_t rows_of_block = 64;

template <class E>
inline constexpr int64_t column_block_elements =
    (packs_as_it_goes<E> ? rows_of_packed_block : rows_of_block) * ColumnPanels<E>::NV * ColumnPanels<E>::width;

// C = A B, or C + A B, for column panels [first, last) of B, which stands as K x N; c points at the first of them. Row
// r of A begins at a[r] + a_first. block: of column_block_elements; a_block: of as many pointers as there are rows.
template <class A, class S>
void product_of_columns(int64_t rows, int64_t K, const A* const* a, int64_t a_first, const S* b, int64_t N,
                        int64_t first, int64_t last, A* c, int64_t c_stride, bool accumulate, A* block,
                        const A** a_block) {
  using P = ColumnPanels<A>;
  constexpr int width = Simd<A>::width;
  constexpr int64_t columns = P::NV * width;
  if (rows <= 0) return;
  for (int64_t k = 0; k < K; k += rows_of_block) {
    const int64_t depth = K - k < rows_of_block ? K - k : rows_of_block;
    for (int64_t r = 0; r < rows; ++r) a_block[r] = a[r] + a_first + k;
    for (int64_t p = first; p < last; ++p) {
      const int64_t column = p * columns;
      const int64_t left = N - column < columns ? N - column : columns;
      const int64_t stride = round_up(left, width);
      for (int64_t i = 0; i < depth; ++i) {
        const S* row = b + (k + i) * N + column;
        for (int64_t v = 0; v < left; v += width) {
          __builtin_prefetch(row + columns + v, 0, 2);
          Simd<A>::store(block + i * stride + v, Simd<A>::load_n(row + v, left - v));
        }
      }
      A* target = c + (p - first) * columns;
      const Addend<A> addend =
          accumulate || k > 0 ? Addend<A>{target, c_stride, nullptr} : Addend<A>{nullptr, 0, nullptr};
      switch (stride / width) {
        case 1: product<A, 1>(rows, depth, a_block, block, 1, 0, target, c_stride, addend); break;
        case 2: product<A, 2>(rows, depth, a_block, block, 1, 0, target, c_stride, addend); break;
        case 3: product<A, 3>(rows, depth, a_block, block, 1, 0, target, c_stride, addend); break;
        default: product<A, 4>(rows, depth, a_block, block, 1, 0, target, c_stride, addend); break;
      }
    }
  }
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
