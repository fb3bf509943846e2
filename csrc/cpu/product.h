// Matrix products of the kernels: C = A B + addend, with B packed into column panels (pack.h).
//
// A is a list of row pointers, so that any layout of time and batch, a packed sequence included, is read in place.
// A panel holds NV vectors of columns for every k: [K / group][NV * width][group], group being the k's that one
// instruction multiplies (2 for the bfloat16 dot products, otherwise 1). Every element of C is summed in the order of
// k, in the same blocks whatever the tile, so a result depends neither on the split of the work over threads nor on the
// rows beside it.
//
// Measured on one AVX-512 core (Zen 5), a tile of 6 rows x 4 vectors or 8 x 3 reaches 98 % of the FMA peak while the
// panel streams from L2. A panel that would not stay there while the tiles of one product pass over it is taken in
// blocks of k, the sums being kept in C between them: docs/performance.md.
#pragma once

#include <type_traits>

#include "simd.h"
#if defined(FRNN_TILES)
#include "tiles.h"
#endif

namespace fused_rnn {
namespace FRNN_ISA {

#if defined(FRNN_NEON)
// acc + columns * the lane of `row` that holds them. NEON multiplies by one lane: a row's numbers are loaded four k at
// a time (float64: two, bfloat16: four pairs), and no instruction copies one to all lanes. From the intrinsics GCC
// would make that copy and use it for all columns, or move sums between registers.
template <int lane>
FRNN_INLINE Simd<float>::V multiply_add_lane(Simd<float>::V acc, Simd<float>::V row, Simd<float>::V columns) {
  __asm__("fmla %0.4s, %1.4s, %2.s[%3]" : "+w"(acc) : "w"(columns), "w"(row), "i"(lane));
  return acc;
}
template <int lane>
FRNN_INLINE Simd<double>::V multiply_add_lane(Simd<double>::V acc, Simd<double>::V row, Simd<double>::V columns) {
  __asm__("fmla %0.2d, %1.2d, %2.d[%3]" : "+w"(acc) : "w"(columns), "w"(row), "i"(lane));
  return acc;
}
#if defined(FRNN_NEON_DOTS)
template <int lane>
FRNN_INLINE Simd<float>::V multiply_add_lane(Simd<float>::V acc, uint16x8_t row, uint16x8_t columns) {
  __asm__("bfdot %0.4s, %1.8h, %2.2h[%3]" : "+w"(acc) : "w"(columns), "w"(row), "i"(lane));
  return acc;
}
#endif
#endif

// How elements of type E are multiplied: rows of Row with panels of Stored. Specialised where the two differ from E, or
// from what they are summed in.
template <class E>
struct Operand {
  using Row = E;
  using Stored = E;
  using Acc = E;
  using V = typename Simd<E>::V;
  using Columns = V;  // `group` k's of one vector of columns
  static constexpr int group = 1;
  static constexpr bool whole_groups = true;   // K is always a multiple of `group`
  static constexpr bool is_statement = false;  // of the assembler, which GCC cannot look into
  static constexpr int work = 0;
  static FRNN_INLINE Columns columns(const E* b) { return Simd<E>::load(b); }
  static FRNN_INLINE Columns broadcast(const E* a) { return Simd<E>::splat(*a); }
  // Several k of a row, of which NEON multiplies by one lane.
  static constexpr bool by_lanes = true;
  static FRNN_INLINE Columns lanes(const E* a) { return columns(a); }
#if defined(FRNN_NEON)
  template <int lane>
  static FRNN_INLINE V multiply_add_lane(V acc, Columns row, Columns b) {
    return FRNN_ISA::multiply_add_lane<lane>(acc, row, b);
  }
#endif
  static FRNN_INLINE V multiply_add(V acc, Columns a, Columns b) { return acc + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  using Row = BFloat16;
  using Stored = BFloat16;
  using Acc = float;
  using V = Simd<float>::V;
  using Columns = __m512i;
  static constexpr int group = 2;
  static constexpr bool whole_groups = false;
  static constexpr bool is_statement = false;
  static constexpr int work = 0;
  static FRNN_INLINE Columns columns(const BFloat16* b) { return load_bytes<__m512i>(b); }
  static FRNN_INLINE Columns broadcast(const BFloat16* a) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  // The last k of an odd K has no partner.
  static FRNN_INLINE Columns broadcast_last(const BFloat16* a, int64_t left) {
    return left == 1 ? _mm512_set1_epi32(a->bits) : broadcast(a);
  }
  static FRNN_INLINE V multiply_add(V acc, Columns a, Columns b) {
    return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

#if defined(FRNN_NEON_DOTS)
// Of each lane both products are added to each other before they are to the sum; each of the two additions keeps the
// bits that float32 holds and, where it drops any, sets the lowest (rounding to odd).
template <>
struct Operand<BFloat16> {
  using Row = BFloat16;
  using Stored = BFloat16;
  using Acc = float;
  using V = Simd<float>::V;
  using Columns = uint16x8_t;
  static constexpr int group = 2;
  static constexpr bool whole_groups = false;
  static constexpr bool is_statement = false;
  static constexpr int work = 0;
  static constexpr bool by_lanes = true;
  static FRNN_INLINE Columns columns(const BFloat16* b) { return load_bytes<Columns>(b); }
  static FRNN_INLINE Columns lanes(const BFloat16* a) { return columns(a); }
  template <int lane>
  static FRNN_INLINE V multiply_add_lane(V acc, Columns row, Columns b) {
    return FRNN_ISA::multiply_add_lane<lane>(acc, row, b);
  }
  static FRNN_INLINE Columns broadcast(const BFloat16* a) {
    uint32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return (Columns)vdupq_n_u32(pair);
  }
  static FRNN_INLINE Columns broadcast_last(const BFloat16* a, int64_t left) {
    return left == 1 ? (Columns)vdupq_n_u32(a->bits) : broadcast(a);
  }
  static FRNN_INLINE V multiply_add(V acc, Columns a, Columns b) {
    return (V)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
  }
};
#endif

// What the products of a layer stored as S are computed from: S itself where this instruction set multiplies it,
// float for the other 16-bit formats.
template <class S>
struct ProductElement {
  using type = typename Accumulator<S>::type;
};
#if defined(__AVX512BF16__) || defined(FRNN_NEON_DOTS)
template <>
struct ProductElement<BFloat16> {
  using type = BFloat16;
};
#endif

template <class E>
constexpr int64_t padded_depth(int64_t K) {
  return (K + Operand<E>::group - 1) / Operand<E>::group * Operand<E>::group;
}

#if FRNN_VECTOR_BYTES == 64 || defined(__aarch64__)
inline constexpr int vector_registers = 32;
#else
inline constexpr int vector_registers = 16;
#endif

// Where multiplying and adding are two instructions, the product stands in a register between them.
#if defined(__FMA__) || defined(__aarch64__)
inline constexpr int product_registers = 0;
#else
inline constexpr int product_registers = 1;
#endif

// Registers of a tile of MR rows and N vectors of columns while it takes one k: the sums; the k's rows or columns,
// `held` of them, of which each meets all of the others; one of the others at a time.
constexpr int tile_registers(int MR, int N, int held) { return MR * N + held + 1 + product_registers; }

// Of a tile's rows and columns those that are held: the fewer; but rows whose lanes hold several k always.
constexpr int tile_held(int MR, int N) {
#if defined(FRNN_NEON)
  (void)N;
  return MR;
#else
  return MR < N ? MR : N;
#endif
}

// Rows of a tile: as many as vector registers hold. One sum too many is stored and loaded for every k, and the tile
// takes twice the time. Their addresses stand in the general registers, hence 8 at most, or 7 where the sum of an
// eighth was stored all the same. For 4, 3, 2 and 1 vectors: 6, 8, 8, 8 where there are 32 registers; 6, 7, 8, 8 with
// NEON; 3, 4, 6, 8 with AVX2; 2, 3, 6, 7 with SSE2. `work`: registers that a multiplication of other elements needs
// besides.
template <int NV, int work = 0>
constexpr int tile_rows() {
  constexpr int most = product_registers == 0 ? 8 : 7;
  int rows = 1;
  while (rows < most && tile_registers(rows + 1, NV, tile_held(rows + 1, NV)) + work <= vector_registers) ++rows;
  return rows;
}

// Rows that product() takes together: those of one pass over a panel.
template <class E, int NV>
constexpr int rows_at_once() {
#if defined(FRNN_TILES)
  if (std::is_same_v<E, BFloat16>) return int(2 * tile_height);
#endif
  return tile_rows<NV, Operand<E>::work>();
}

// The depth, K or a little more, in which a product of packed operands is computed best: k past K hold zeros. A matrix
// tile takes 32 k at most and a multiple of two, and the last of unequal ones would have to be copied.
template <class E>
constexpr int64_t depth_of_product(int64_t K) {
#if defined(FRNN_TILES)
  if (std::is_same_v<E, BFloat16>) {
    const int64_t even = 2 * ((K + tile_depth<BFloat16> - 1) / tile_depth<BFloat16>);
    return even > 0 ? (K + even - 1) / even * even : 0;
  }
#endif
  return K;
}

// Sums that hide the latency of the multiply-add: two units of four cycles. Some Arm cores have four such units.
#if defined(FRNN_NEON)
inline constexpr int independent_sums = 16;
#else
inline constexpr int independent_sums = 8;
#endif

// So many are not there in the smallest layers.
inline constexpr bool has_half_tiles = independent_sums > 8;

// Panels that a tile of few rows takes at once, so that it has as many sums.
template <int MR, int NV, int work = 0>
constexpr int tile_panels() {
  constexpr bool fewer = work > 4 && (vector_registers == 16 || independent_sums > 8);
  constexpr int sums = fewer ? independent_sums / 2 : independent_sums;
  constexpr int wanted = MR > 2 ? 1 : sums / NV / MR;
  return wanted < 1 ? 1 : wanted;
}

// What a tile fetches into L2 for those after it, while it computes: `step` bytes per group of k from `next` on.
struct Ahead {
  const void* next;
  int64_t step;
};

// What is added to a product: rows of `from`, `stride` apart (0: one row, a bias, for all); null: nothing. Its columns
// are those of the result. The last NA vectors of each panel have the row `apart` instead. It is added after the
// products are summed: the sum of two short chains has less error than one long chain, and no tile waits for it to
// begin.
template <class A>
struct Addend {
  const A* from = nullptr;
  int64_t stride = 0;
  const A* apart = nullptr;
};

// MR rows x NP panels. c: row r at c + r * c_stride, panel q at + q * NV * width.
template <class E, int MR, int NV, int NP, int NA>
__attribute__((noinline)) void product_tile(int64_t K, const typename Operand<E>::Row* const* a,
                                            const typename Operand<E>::Stored* b, int64_t panel_stride,
                                            typename Operand<E>::Acc* c, int64_t c_stride,
                                            Addend<typename Operand<E>::Acc> addend, Ahead ahead) {
  using O = Operand<E>;
  using A = typename O::Acc;
  using V = typename O::V;
  constexpr int width = Simd<A>::width;
  constexpr int group = O::group;
  V acc[MR][NP * NV];
  const typename O::Row* row[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    row[i] = a[i];
#pragma GCC unroll 16
    for (int v = 0; v < NP * NV; ++v) {
      acc[i][v] = V{};
    }
  }
  const auto multiply = [&](int64_t k, auto&& broadcast) __attribute__((always_inline)) {
    const auto column = [&](int v) __attribute__((always_inline)) {
      return O::columns(b + v / NV * panel_stride + (k * NV + v % NV * group) * width);
    };
    if constexpr (tile_registers(MR, NP * NV, NP * NV) <= vector_registers) {
      typename O::Columns columns[NP * NV];
#pragma GCC unroll 16
      for (int v = 0; v < NP * NV; ++v) columns[v] = column(v);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const auto x = broadcast(row[i] + k);
#pragma GCC unroll 16
        for (int v = 0; v < NP * NV; ++v) acc[i][v] = O::multiply_add(acc[i][v], x, columns[v]);
      }
    } else {
      typename O::Columns rows[MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) rows[i] = broadcast(row[i] + k);
#pragma GCC unroll 16
      for (int v = 0; v < NP * NV; ++v) {
        const auto x = column(v);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) acc[i][v] = O::multiply_add(acc[i][v], rows[i], x);
      }
    }
  };
  const int64_t whole = K / group * group;
  const char* next = static_cast<const char*>(ahead.next);
  int64_t done = 0;
#if defined(FRNN_NEON)
  if constexpr (O::by_lanes) {
    constexpr int lanes = int(sizeof(V) / (sizeof(typename O::Row) * group));
    for (; K - done >= lanes * group; done += lanes * group) {
      typename O::Columns rows[MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) rows[i] = O::lanes(row[i] + done);
      const auto multiply_lane = [&](auto which) __attribute__((always_inline)) {
        constexpr int lane = decltype(which)::value;
        if constexpr (lane < lanes) {
          if (NP == 1) {
            __builtin_prefetch(next, 0, 2);
            next += ahead.step;
          }
#pragma GCC unroll 16
          for (int v = 0; v < NP * NV; ++v) {
            const auto x =
                O::columns(b + v / NV * panel_stride + ((done + lane * group) * NV + v % NV * group) * width);
#pragma GCC unroll 8
            for (int i = 0; i < MR; ++i) acc[i][v] = O::template multiply_add_lane<lane>(acc[i][v], rows[i], x);
          }
        }
      };
      multiply_lane(std::integral_constant<int, 0>{});
      multiply_lane(std::integral_constant<int, 1>{});
      multiply_lane(std::integral_constant<int, 2>{});
      multiply_lane(std::integral_constant<int, 3>{});
    }
  }
#endif
  if constexpr (O::is_statement) {
    // GCC keeps copies of the sums, which do not fit the registers then, where such a loop is unrolled.
#pragma GCC unroll 1
    for (int64_t k = done; k < whole; k += group) {
      if (NP == 1) {
        __builtin_prefetch(next, 0, 2);
        next += ahead.step;
      }
      multiply(k, [](const typename O::Row* p) { return O::broadcast(p); });
    }
  } else {
#pragma GCC unroll 2
    for (int64_t k = done; k < whole; k += group) {
      if (NP == 1) {
        __builtin_prefetch(next, 0, 2);
        next += ahead.step;
      }
      multiply(k, [](const typename O::Row* p) { return O::broadcast(p); });
    }
  }
  if constexpr (!O::whole_groups) {
    if (whole < K) multiply(whole, [](const typename O::Row* p) { return O::broadcast_last(p, 1); });
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < NP * NV; ++v) {
      V sum = acc[i][v];
      if (v % NV >= NV - NA) {
        sum = sum + Simd<A>::load(addend.apart + v * width);
      } else if (addend.from) {
        sum = sum + Simd<A>::load(addend.from + i * addend.stride + v * width);
      }
      Simd<A>::store(c + i * c_stride + v * width, sum);
    }
  }
}

template <class E, int NV, int NP, int NA>
FRNN_INLINE void product_rows(int rows, int64_t K, const typename Operand<E>::Row* const* a,
                              const typename Operand<E>::Stored* b, int64_t panel_stride, typename Operand<E>::Acc* c,
                              int64_t c_stride, Addend<typename Operand<E>::Acc> addend, Ahead ahead) {
  constexpr int most = tile_rows<NV, Operand<E>::work>();
#define FRNN_ROWS(n)                                                                            \
  case n:                                                                                       \
    if constexpr (n <= most && (NP == 1 || n <= 2))                                             \
      return product_tile<E, n, NV, NP, NA>(K, a, b, panel_stride, c, c_stride, addend, ahead); \
    break;
  switch (rows) {
    FRNN_ROWS(1)
    FRNN_ROWS(2)
    FRNN_ROWS(3)
    FRNN_ROWS(4)
    FRNN_ROWS(5)
    FRNN_ROWS(6)
    FRNN_ROWS(7)
    FRNN_ROWS(8)
  }
#undef FRNN_ROWS
}

// How many panels one call of product() should be given at once when its caller uses the result panel by panel.
template <int NV>
constexpr int64_t panels_at_once(int64_t rows) {
  return rows == 1 ? tile_panels<1, NV>() : rows == 2 ? tile_panels<2, NV>() : 1;
}

// Bytes of a panel that stay in L2 (1 MiB and more) beside the rows they are multiplied with.
inline constexpr int64_t panel_block_bytes = 192 * 1024;

// C (rows x panels * NV * width) = A (rows x K) B + addend. then: the packed weights that the caller multiplies with
// next, fetched towards the end; null: not known, or at hand. descending: the last panel first. Weights that exceed a
// cache somewhat are mostly found there when every second pass over them runs backwards.
template <class E, int NV, int NA = 0>
void product(int64_t rows, int64_t K, const typename Operand<E>::Row* const* a, const typename Operand<E>::Stored* b,
             int64_t panels, int64_t panel_stride, typename Operand<E>::Acc* c, int64_t c_stride,
             Addend<typename Operand<E>::Acc> addend, const typename Operand<E>::Stored* then = nullptr,
             bool descending = false) {
  using A = typename Operand<E>::Acc;
  using Row = typename Operand<E>::Row;
  using Stored = typename Operand<E>::Stored;
  constexpr int64_t columns = NV * Simd<A>::width;
  constexpr int group = Operand<E>::group;
  if (rows <= 0 || panels <= 0) return;
#if defined(FRNN_TILES)
  if constexpr (std::is_same_v<E, BFloat16>) {
    return product_of_tiles<BFloat16, NV, NA>(rows, K, a, b, panels, panel_stride, c, c_stride, addend.from,
                                              addend.stride, addend.apart);
  }
#endif
  const auto addend_of = [&](int64_t row, int64_t p) __attribute__((always_inline)) {
    const int64_t column = p * columns;
    return Addend<A>{addend.from ? addend.from + row * addend.stride + column : nullptr, addend.stride,
                     NA > 0 ? addend.apart + column : nullptr};
  };
  // The same blocks for any number of rows, so that a row's sums do not depend on how many there are.
  // Those of float32 where 16-bit weights are multiplied as such, whose sums are the same then.
  constexpr int64_t block = panel_block_bytes / (columns * int64_t(group == 1 ? sizeof(A) : sizeof(Stored)));
  // One or two rows take several panels at once, half as many where that is still two and fewer are left; what remains
  // are single panels [singles, panels).
  constexpr int work = Operand<E>::work, one = tile_panels<1, NV, work>(), two = tile_panels<2, NV, work>();
  constexpr int half_of_one = has_half_tiles ? one / 2 : 0, half_of_two = has_half_tiles ? two / 2 : 0;
  const int64_t most = rows == 1 ? one : two, half = rows == 1 ? half_of_one : half_of_two;
  int64_t singles = rows <= 2 && most > 1 ? panels / most * most : 0;
  if (rows <= 2 && half > 1) singles += (panels - singles) / half * half;
  const auto together = [&] {
    const auto multiply = [&](auto na, int64_t step, int64_t depth, const Row* const* first, const Stored* panel,
                              A* target, Addend<A> here) __attribute__((always_inline)) {
      constexpr int apart = decltype(na)::value;
      if constexpr (half_of_one > 1) {
        if (rows == 1 && step < one)
          return product_rows<E, NV, half_of_one, apart>(1, depth, first, panel, panel_stride, target, c_stride, here,
                                                         {b, 0});
      }
      if constexpr (half_of_two > 1) {
        if (rows == 2 && step < two)
          return product_rows<E, NV, half_of_two, apart>(2, depth, first, panel, panel_stride, target, c_stride, here,
                                                         {b, 0});
      }
      if (rows == 1) {
        product_rows<E, NV, one, apart>(1, depth, first, panel, panel_stride, target, c_stride, here, {b, 0});
      } else {
        product_rows<E, NV, two, apart>(2, depth, first, panel, panel_stride, target, c_stride, here, {b, 0});
      }
    };
    for (int64_t q = 0, step = most; q < singles; q += step) {
      if (half > 1 && singles - q < most) step = half;
      const int64_t p = descending ? singles - step - q : q;
      A* target = c + p * columns;
      for (int64_t k = 0; k < K; k += block) {
        const int64_t depth = K - k < block ? K - k : block;
        const Row* first[2] = {a[0] + k, a[rows - 1] + k};
        const Stored* panel = b + p * panel_stride + k * columns;
        if (k == 0) {
          multiply(std::integral_constant<int, NA>{}, step, depth, first, panel, target, addend_of(0, p));
        } else {
          multiply(std::integral_constant<int, 0>{}, step, depth, first, panel, target, {target, c_stride, nullptr});
        }
      }
    }
  };
  if (!descending) together();
  // Even tiles: 32 rows are 5 + 5 + 5 + 5 + 6 + 6, not five of 6 and one of 2.
  constexpr int most_rows = tile_rows<NV, work>();
  const int64_t tiles = (rows + most_rows - 1) / most_rows;
  const int64_t low = rows / tiles, more = rows % tiles;
  for (int64_t q = singles; q < panels; ++q) {
    const int64_t p = descending ? panels - 1 - (q - singles) : q;
    for (int64_t k = 0; k < K; k += block) {
      const int64_t depth = K - k < block ? K - k : block;
      const Stored* here = b + p * panel_stride + k * columns;
      // What comes next: the next block, which follows this one in memory but for the padding of an odd K, or the
      // next panel. Every tile fetches its share of it.
      const Stored* after = here + padded_depth<E>(depth) * columns;
      if (k + block >= K) after = q + 1 == panels ? then : b + (descending ? p - 1 : p + 1) * panel_stride;
      const char* next = reinterpret_cast<const char*>(after ? after : here);
      const int64_t share = after ? depth * columns * int64_t(sizeof(Stored)) / tiles : 0;
      int64_t r = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t n = low + (tile < more);
        const Row* first[8];
        for (int64_t i = 0; i < n; ++i) first[i] = a[r + i] + k;
        A* target = c + r * c_stride + p * columns;
        if (addend.stride != 0 && k == 0) {
          const A* wanted = addend.from + r * addend.stride + p * columns;  // at the end of the tile
          for (int64_t i = 0; i < n; ++i) {
            for (int v = 0; v < NV; ++v) __builtin_prefetch(wanted + i * addend.stride + v * 64 / sizeof(A), 1, 3);
          }
        }
        const Ahead ahead{next + tile * share, share * group / depth};
        if (k == 0) {
          product_rows<E, NV, 1, NA>(int(n), depth, first, here, panel_stride, target, c_stride, addend_of(r, p),
                                     ahead);
        } else {
          product_rows<E, NV, 1, 0>(int(n), depth, first, here, panel_stride, target, c_stride,
                                    Addend<A>{target, c_stride, nullptr}, ahead);
        }
        r += n;
      }
    }
  }
  if (descending) together();
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
