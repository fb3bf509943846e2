// bfloat16 products on AMX's matrix tiles: what product.h computes, where the processor has them.
//
// A tile holds 16 rows of 64 bytes. One instruction adds the product of 16 rows x 32 k of A and 32 k x 16 columns of B
// to 16 x 16 sums in float32. Panels are packed for it already: pairs of k side by side (product.h) are the order in
// which it wants B. Rows of A at one distance are loaded where they stand; others, and fewer than 16, are copied
// together first. Rows and k that do not exist are zeros in the copies, also in that of B's last block, behind which
// another panel may hold a NaN.
//
// Four tiles hold sums: of 32 rows and two vectors of columns, so that every tile that is loaded is multiplied twice,
// or of 16 rows and four. Every element is summed in the order of k whatever rows are beside it, then what is to be
// added to it is. Few rows take tiles like many: a tile of weights passes as fast as L2 delivers it.
#pragma once

#include <cstring>
#include <type_traits>

#include "../problem.h"
#include "element.h"

#if defined(FRNN_EMULATE_TILES)
#include FRNN_EMULATE_TILES
#else
#include <immintrin.h>
#endif

namespace fused_rnn {
namespace FRNN_ISA {

inline constexpr int64_t tile_height = 16;   // rows of A and of the sums, pairs of k of B
inline constexpr int64_t tile_columns = 16;  // float32 sums
inline constexpr int64_t tile_depth = 32;    // bfloat16

// The eight tiles: sums in 0 to 3, A in 4 and 5, B in 6 and 7, all 16 rows of 64 bytes, or for `depth` k at a time.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  explicit TileConfiguration(int64_t depth) {
    row_bytes[4] = row_bytes[5] = uint16_t(depth * int64_t(sizeof(BFloat16)));
    rows[6] = rows[7] = uint8_t(depth / 2);
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
FRNN_HOST_DEVICE void store_sums(float* sums, int64_t stride) {
  if constexpr (v == 0) _tile_stored(0, sums, stride);
  if constexpr (v == 1) _tile_stored(1, sums, stride);
  if constexpr (v == 2) _tile_stored(2, sums, stride);
  if constexpr (v == 3) _tile_stored(3, sums, stride);
}

template <int r>
FRNN_HOST_DEVICE void load_a(const BFloat16* a, int64_t stride) {
  if constexpr (r == 0) _tile_loadd(4, a, stride);
  if constexpr (r == 1) _tile_loadd(5, a, stride);
}

template <int v>
FRNN_HOST_DEVICE void load_b(const BFloat16* b, int64_t stride) {
  if constexpr (v % 2 == 0) _tile_loadd(6, b, stride);
  if constexpr (v % 2 == 1) _tile_loadd(7, b, stride);
}

// sums += rows r times the tile of B of column tile v.
template <int sums, int r, int v>
FRNN_HOST_DEVICE void multiply_tiles() {
  constexpr int which = sums * 4 + r * 2 + v % 2;
  if constexpr (which == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (which == 5) _tile_dpbf16ps(1, 4, 7);
  if constexpr (which == 8) _tile_dpbf16ps(2, 4, 6);
  if constexpr (which == 13) _tile_dpbf16ps(3, 4, 7);
  if constexpr (which == 6) _tile_dpbf16ps(1, 5, 6);
  if constexpr (which == 10) _tile_dpbf16ps(2, 5, 6);
  if constexpr (which == 15) _tile_dpbf16ps(3, 5, 7);
  static_assert(which == 0 || which == 5 || which == 8 || which == 13 || which == 6 || which == 10 || which == 15);
}

// f(std::integral_constant<int, v>) for v = 0 ... N - 1.
template <int N, class F>
FRNN_HOST_DEVICE void each_tile(F f) {
  f(std::integral_constant<int, 0>{});
  if constexpr (N > 1) f(std::integral_constant<int, 1>{});
  if constexpr (N > 2) f(std::integral_constant<int, 2>{});
  if constexpr (N > 3) f(std::integral_constant<int, 3>{});
}

// 16 rows of A: where they stand, or copies of 32 k of those that there are.
class TileRows {
 public:
  TileRows(const BFloat16* const* rows, int64_t count) : rows_(rows), count_(count) {
    bool regular = count == tile_height;
    stride_ = regular ? rows[1] - rows[0] : 0;
    for (int64_t i = 1; regular && i < count; ++i) regular = rows[i] - rows[0] == i * stride_;
    if (!regular) stride_ = 0;
  }

  FRNN_HOST_DEVICE bool few() const { return count_ < tile_height; }

  template <int r>
  FRNN_HOST_DEVICE void load(int64_t k, int64_t depth, bool whole, BFloat16* copy) const {
    if (stride_ != 0 && whole) return load_a<r>(rows_[0] + k, stride_ * int64_t(sizeof(BFloat16)));
    if (!whole) memset(copy, 0, size_t(tile_height * tile_depth) * sizeof(BFloat16));
    for (int64_t i = 0; i < count_; ++i) memcpy(copy + i * tile_depth, rows_[i] + k, size_t(depth) * sizeof(BFloat16));
    load_a<r>(copy, tile_depth * int64_t(sizeof(BFloat16)));
  }

 private:
  const BFloat16* const* rows_;
  int64_t count_, stride_;  // 0: at no one distance
};

// A panel of NV vectors of columns, and a copy of its last k if those are no whole block.
template <int NV>
struct TilePanel {
  static constexpr int64_t columns = NV * tile_columns;
  static constexpr int64_t stride = columns * 2 * int64_t(sizeof(BFloat16));  // from one pair of k to the next
  const BFloat16* panel;
  const BFloat16* last;
};

// sums of R * 16 rows, `sums_stride` apart, and column tiles first ... first + C - 1, over all k, `step` at a time.
template <int R, int C, int first, int NV>
FRNN_HOST_DEVICE void sum_tiles(int64_t K, int64_t step, const TileRows* rows, TilePanel<NV> b, float* sums,
                                int64_t sums_stride) {
  alignas(64) BFloat16 copies[R][tile_height * tile_depth];
  for (int r = 0; r < R; ++r) {
    if (rows[r].few()) memset(copies[r], 0, sizeof copies[r]);  // what rows that do not exist keep
  }
  constexpr int64_t columns = TilePanel<NV>::columns;
  each_tile<R * C>([&](auto i) __attribute__((always_inline)) { clear_sums<decltype(i)::value>(); });
  for (int64_t k = 0; k < K; k += step) {
    const bool whole = K - k >= step;
    const int64_t depth = whole ? step : K - k;
    const BFloat16* block = (!whole ? b.last : b.panel + k * columns) + first * tile_columns * 2;
    each_tile<R>([&](auto r) __attribute__((always_inline)) {
      rows[r].template load<decltype(r)::value>(k, depth, whole, copies[r]);
    });
    each_tile<C>([&](auto v) __attribute__((always_inline)) {
      constexpr int column = decltype(v)::value;
      load_b<column>(block + column * tile_columns * 2, TilePanel<NV>::stride);
      each_tile<R>([&](auto r) __attribute__((always_inline)) {
        constexpr int row = decltype(r)::value;
        multiply_tiles<row * C + column, row, column>();
      });
    });
  }
  each_tile<R * C>([&](auto i) __attribute__((always_inline)) {
    constexpr int which = decltype(i)::value, row = which / C, column = first + which % C;
    store_sums<which>(sums + row * tile_height * sums_stride + column * tile_columns,
                      sums_stride * int64_t(sizeof(float)));
  });
}

// As product() of product.h, whose Addend is from, from_stride and apart here.
template <int NV, int NA>
void product_of_tiles(int64_t rows, int64_t K, const BFloat16* const* a, const BFloat16* b, int64_t panels,
                      int64_t panel_stride, float* c, int64_t c_stride, const float* from, int64_t from_stride,
                      const float* apart) {
  constexpr int64_t columns = NV * tile_columns;
  constexpr int64_t first_apart = (NV - NA) * tile_columns;
  if (rows <= 0 || panels <= 0) return;
  alignas(64) BFloat16 last[tile_height * columns * 2];
  alignas(64) float sums[2 * tile_height * columns];
  // In equal blocks of k where there are any, of pairs.
  const int64_t blocks = (K + tile_depth - 1) / tile_depth;
  const int64_t step = K > 0 && K % (2 * blocks) == 0 ? K / blocks : tile_depth;
  const int64_t whole = K / step * step, left = K - whole;
  const TileConfiguration configuration(step);
  _tile_loadconfig(&configuration);
  for (int64_t p = 0; p < panels; ++p) {
    const TilePanel<NV> panel{b + p * panel_stride, last};
    if (left > 0) {
      memset(last, 0, sizeof last);
      memcpy(last, panel.panel + whole * columns, size_t((left + 1) / 2 * TilePanel<NV>::stride));
    }
    for (int64_t r = 0; r < rows;) {
      const int64_t count = rows - r < 2 * tile_height ? rows - r : 2 * tile_height;
      float* to = c + r * c_stride + p * columns;
      const bool directly = NA == 0 && !from && count % tile_height == 0;
      float* target = directly ? to : sums;
      const int64_t stride = directly ? c_stride : columns;
      if (count > tile_height) {
        const TileRows two[2] = {TileRows(a + r, tile_height), TileRows(a + r + tile_height, count - tile_height)};
        sum_tiles<2, NV == 1 ? 1 : 2, 0, NV>(K, step, two, panel, target, stride);
        if constexpr (NV > 2) sum_tiles<2, NV - 2, 2, NV>(K, step, two, panel, target, stride);
      } else {
        const TileRows one(a + r, count);
        sum_tiles<1, NV, 0, NV>(K, step, &one, panel, target, stride);
      }
      for (int64_t i = 0; !directly && i < count; ++i, to += c_stride) {
        const float* sum = sums + i * columns;
        const float* added = from ? from + (r + i) * from_stride + p * columns : nullptr;
        for (int64_t n = 0; n < first_apart; ++n) to[n] = added ? sum[n] + added[n] : sum[n];
        for (int64_t n = first_apart; n < columns; ++n) to[n] = sum[n] + apart[p * columns + n];
      }
      r += count;
    }
  }
  _tile_release();
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
