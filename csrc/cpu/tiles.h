// Products on AMX's matrix tiles, where the processor has them: of bfloat16, as product.h computes them, and of bytes,
// as stored.h does.
//
// A tile holds 16 rows of 64 bytes. One instruction adds the product of 16 rows x 32 k of A and 32 k x 16 columns of B
// to 16 x 16 sums in float32; of bytes 64 k, and the sums are int32. Panels are packed for it already: pairs of k side
// by side (product.h), or four bytes (stored.h), are the order in which it wants B. Rows of A at one distance are
// loaded where they stand; others, and fewer than 16, are copied together first. Rows and k that do not exist are zeros
// in the copies, also in that of B's last block, behind which another panel may hold a NaN.
//
// Four tiles hold sums: of 32 rows and two vectors of columns, so that every tile that is loaded is multiplied twice,
// or of 16 rows and four. Every element is summed in the order of k whatever rows are beside it, then what is to be
// added to it is. Few rows take tiles like many: a tile of weights passes as fast as L2 delivers it.
#pragma once

#include <cstring>
#include <type_traits>

#include "../problem.h"
#include "byte_tiles.h"
#include "element.h"

#if defined(FRNN_EMULATE_TILES)
#include FRNN_EMULATE_TILES
#else
#include <immintrin.h>
#endif

namespace fused_rnn {
namespace FRNN_ISA {

inline constexpr int64_t tile_height = 16;   // rows of A and of the sums, groups of k of B
inline constexpr int64_t tile_columns = 16;  // sums
template <class E>
inline constexpr int64_t tile_depth = 64 / sizeof(E);
template <class E>
inline constexpr int64_t tile_group = 4 / sizeof(E);  // k side by side
template <class E>
using TileSum = std::conditional_t<std::is_same_v<E, Int8>, int32_t, float>;

// The eight tiles: sums in 0 to 3, A in 4 and 5, B in 6 and 7, all 16 rows of 64 bytes, or for k of `bytes` at a time.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  explicit TileConfiguration(int64_t bytes) {
    row_bytes[4] = row_bytes[5] = uint16_t(bytes);
    rows[6] = rows[7] = uint8_t(bytes / 4);
  }
};

// The instructions take their tiles' numbers as literals.
template <int v>
FRNN_HOST_DEVICE void clear_sums() {
  if constexpr (v == 0) _tile_zero(0);
  if constexpr (v == 1) _tile_zero(1);
  if constexpr (v == 2) _tile_zero(2);
  if constexpr (v == 3) _tile_zero(3);
}

template <int v>
FRNN_HOST_DEVICE void store_sums(void* sums, int64_t stride) {
  if constexpr (v == 0) _tile_stored(0, sums, stride);
  if constexpr (v == 1) _tile_stored(1, sums, stride);
  if constexpr (v == 2) _tile_stored(2, sums, stride);
  if constexpr (v == 3) _tile_stored(3, sums, stride);
}

template <int r>
FRNN_HOST_DEVICE void load_a(const void* a, int64_t stride) {
  if constexpr (r == 0) _tile_loadd(4, a, stride);
  if constexpr (r == 1) _tile_loadd(5, a, stride);
}

template <int v>
FRNN_HOST_DEVICE void load_b(const void* b, int64_t stride) {
  if constexpr (v % 2 == 0) _tile_loadd(6, b, stride);
  if constexpr (v % 2 == 1) _tile_loadd(7, b, stride);
}

// sums += rows r times the tile of B of column tile v. Bytes of A have no sign, those of B have one.
template <class E, int sums, int r, int v>
FRNN_HOST_DEVICE void multiply_tiles() {
  constexpr int which = sums * 4 + r * 2 + v % 2;
  static_assert(which == 0 || which == 5 || which == 8 || which == 13 || which == 6 || which == 10 || which == 15);
  if constexpr (std::is_same_v<E, Int8>) {
    if constexpr (which == 0) _tile_dpbusd(0, 4, 6);
    if constexpr (which == 5) _tile_dpbusd(1, 4, 7);
    if constexpr (which == 8) _tile_dpbusd(2, 4, 6);
    if constexpr (which == 13) _tile_dpbusd(3, 4, 7);
    if constexpr (which == 6) _tile_dpbusd(1, 5, 6);
    if constexpr (which == 10) _tile_dpbusd(2, 5, 6);
    if constexpr (which == 15) _tile_dpbusd(3, 5, 7);
  } else {
    if constexpr (which == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (which == 5) _tile_dpbf16ps(1, 4, 7);
    if constexpr (which == 8) _tile_dpbf16ps(2, 4, 6);
    if constexpr (which == 13) _tile_dpbf16ps(3, 4, 7);
    if constexpr (which == 6) _tile_dpbf16ps(1, 5, 6);
    if constexpr (which == 10) _tile_dpbf16ps(2, 5, 6);
    if constexpr (which == 15) _tile_dpbf16ps(3, 5, 7);
  }
}

// f(std::integral_constant<int, v>) for v = 0 ... N - 1.
template <int N, class F>
FRNN_HOST_DEVICE void each_tile(F f) {
  f(std::integral_constant<int, 0>{});
  if constexpr (N > 1) f(std::integral_constant<int, 1>{});
  if constexpr (N > 2) f(std::integral_constant<int, 2>{});
  if constexpr (N > 3) f(std::integral_constant<int, 3>{});
}

// 16 rows of A: where they stand, or copies of a block of k of those that there are.
template <class E>
class TileRows {
 public:
  TileRows(const E* const* rows, int64_t count) : rows_(rows), count_(count) {
    bool regular = count == tile_height;
    stride_ = regular ? rows[1] - rows[0] : 0;
    for (int64_t i = 1; regular && i < count; ++i) regular = rows[i] - rows[0] == i * stride_;
    if (!regular) stride_ = 0;
  }

  FRNN_HOST_DEVICE bool few() const { return count_ < tile_height; }

  template <int r>
  FRNN_HOST_DEVICE void load(int64_t k, int64_t depth, bool whole, E* copy) const {
    if (stride_ != 0 && whole) return load_a<r>(rows_[0] + k, stride_ * int64_t(sizeof(E)));
    if (!whole) memset(copy, 0, size_t(tile_height * tile_depth<E>) * sizeof(E));
    for (int64_t i = 0; i < count_; ++i) memcpy(copy + i * tile_depth<E>, rows_[i] + k, size_t(depth) * sizeof(E));
    load_a<r>(copy, tile_depth<E> * int64_t(sizeof(E)));
  }

 private:
  const E* const* rows_;
  int64_t count_, stride_;  // 0: at no one distance
};

// A panel of NV vectors of columns, and a copy of its last k if those are no whole block.
template <class E, int NV>
struct TilePanel {
  static constexpr int64_t columns = NV * tile_columns;
  static constexpr int64_t stride = columns * 4;  // bytes from one group of k to the next
  const E* panel;
  const E* last;
};

// sums of R * 16 rows, `sums_stride` apart, and column tiles first ... first + C - 1, over all k, `step` at a time.
template <int R, int C, int first, class E, int NV>
FRNN_HOST_DEVICE void sum_tiles(int64_t K, int64_t step, const TileRows<E>* rows, TilePanel<E, NV> b, TileSum<E>* sums,
                                int64_t sums_stride) {
  alignas(64) E copies[R][tile_height * tile_depth<E>];
  for (int r = 0; r < R; ++r) {
    if (rows[r].few()) memset(copies[r], 0, sizeof copies[r]);  // what rows that do not exist keep
  }
  constexpr int64_t columns = TilePanel<E, NV>::columns;
  each_tile<R * C>([&](auto i) __attribute__((always_inline)) { clear_sums<decltype(i)::value>(); });
  for (int64_t k = 0; k < K; k += step) {
    const bool whole = K - k >= step;
    const int64_t depth = whole ? step : K - k;
    const E* block = (!whole ? b.last : b.panel + k * columns) + first * tile_columns * tile_group<E>;
    each_tile<R>([&](auto r) __attribute__((always_inline)) {
      rows[r].template load<decltype(r)::value>(k, depth, whole, copies[r]);
    });
    each_tile<C>([&](auto v) __attribute__((always_inline)) {
      constexpr int column = decltype(v)::value;
      load_b<column>(block + column * tile_columns * tile_group<E>, TilePanel<E, NV>::stride);
      each_tile<R>([&](auto r) __attribute__((always_inline)) {
        constexpr int row = decltype(r)::value;
        multiply_tiles<E, row * C + column, row, column>();
      });
    });
  }
  each_tile<R * C>([&](auto i) __attribute__((always_inline)) {
    constexpr int which = decltype(i)::value, row = which / C, column = first + which % C;
    store_sums<which>(sums + row * tile_height * sums_stride + column * tile_columns,
                      sums_stride * int64_t(sizeof(TileSum<E>)));
  });
}

// As product() of product.h, whose Addend is from, from_stride and apart here.
template <class E, int NV, int NA>
void product_of_tiles(int64_t rows, int64_t K, const E* const* a, const E* b, int64_t panels, int64_t panel_stride,
                      TileSum<E>* c, int64_t c_stride, const TileSum<E>* from, int64_t from_stride,
                      const TileSum<E>* apart) {
  constexpr int64_t columns = NV * tile_columns, group = tile_group<E>;
  constexpr int64_t first_apart = (NV - NA) * tile_columns;
  if (rows <= 0 || panels <= 0) return;
  alignas(64) E last[tile_height * columns * group];
  alignas(64) TileSum<E> sums[2 * tile_height * columns];
  // In equal blocks of k where there are any, of groups.
  const int64_t blocks = (K + tile_depth<E> - 1) / tile_depth<E>;
  const int64_t step = K > 0 && K % (group * blocks) == 0 ? K / blocks : tile_depth<E>;
  const int64_t whole = K / step * step, left = K - whole;
  const TileConfiguration configuration(step * int64_t(sizeof(E)));
  _tile_loadconfig(&configuration);
  for (int64_t p = 0; p < panels; ++p) {
    const TilePanel<E, NV> panel{b + p * panel_stride, last};
    if (left > 0) {
      memset(last, 0, sizeof last);
      memcpy(last, panel.panel + whole * columns, size_t((left + group - 1) / group * TilePanel<E, NV>::stride));
    }
    for (int64_t r = 0; r < rows;) {
      const int64_t count = rows - r < 2 * tile_height ? rows - r : 2 * tile_height;
      TileSum<E>* to = c + r * c_stride + p * columns;
      const bool directly = NA == 0 && !from && count % tile_height == 0;
      TileSum<E>* target = directly ? to : sums;
      const int64_t stride = directly ? c_stride : columns;
      if (count > tile_height) {
        const TileRows<E> two[2] = {{a + r, tile_height}, {a + r + tile_height, count - tile_height}};
        sum_tiles<2, NV == 1 ? 1 : 2, 0>(K, step, two, panel, target, stride);
        if constexpr (NV > 2) sum_tiles<2, NV - 2, 2>(K, step, two, panel, target, stride);
      } else {
        const TileRows<E> one(a + r, count);
        sum_tiles<1, NV, 0>(K, step, &one, panel, target, stride);
      }
      for (int64_t i = 0; !directly && i < count; ++i, to += c_stride) {
        const TileSum<E>* sum = sums + i * columns;
        const TileSum<E>* added = from ? from + (r + i) * from_stride + p * columns : nullptr;
        for (int64_t n = 0; n < first_apart; ++n) to[n] = added ? sum[n] + added[n] : sum[n];
        for (int64_t n = first_apart; n < columns; ++n) to[n] = sum[n] + apart[p * columns + n];
      }
      r += count;
    }
  }
  _tile_release();
}

// ByteTiles of byte_tiles.h.
inline void product_of_byte_tiles(int64_t columns, int64_t rows, int64_t depth, const Int8* const* a, const Int8* b,
                                  int64_t panels, int32_t* c, int64_t c_stride) {
  const auto multiply = [&](auto vectors) {
    product_of_tiles<Int8, decltype(vectors)::value, 0>(rows, depth, a, b, panels, depth * columns, c, c_stride,
                                                        nullptr, 0, nullptr);
  };
  switch (columns / tile_columns) {
    case 1: return multiply(std::integral_constant<int, 1>{});
    case 2: return multiply(std::integral_constant<int, 2>{});
    case 3: return multiply(std::integral_constant<int, 3>{});
    case 4: return multiply(std::integral_constant<int, 4>{});
  }
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
