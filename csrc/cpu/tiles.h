// bfloat16 products on AMX's matrix tiles: what product.h computes, where the processor has them.
//
// A tile holds 16 rows of 64 bytes. One instruction adds the product of 16 rows x 32 k of A and 32 k x 16 columns of B
// to 16 x 16 sums in float32. Panels are packed for it already: pairs of k side by side (product.h) are the order in
// which it wants B. The rows of A may stand anywhere, so 32 k of 16 of them are copied together first; rows and k that
// do not exist are zeros there, and in the copy of B's last block, behind which another panel may hold a NaN.
//
// Every element is summed in the order of k whatever rows are beside it, then what is to be added to it is. Few rows
// take tiles like many: a tile of weights passes as fast as L2 delivers it.
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

// The eight tiles: sums in 0 to 3, A in 4, B in 5, all 16 rows of 64 bytes.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
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

template <int v>
FRNN_HOST_DEVICE void multiply_tile(const BFloat16* b, int64_t stride) {
  _tile_loadd(5, b, stride);
  if constexpr (v == 0) _tile_dpbf16ps(0, 4, 5);
  if constexpr (v == 1) _tile_dpbf16ps(1, 4, 5);
  if constexpr (v == 2) _tile_dpbf16ps(2, 4, 5);
  if constexpr (v == 3) _tile_dpbf16ps(3, 4, 5);
}

// f(std::integral_constant<int, v>) for v = 0 ... NV - 1.
template <int NV, class F>
FRNN_HOST_DEVICE void each_column_tile(F f) {
  f(std::integral_constant<int, 0>{});
  if constexpr (NV > 1) f(std::integral_constant<int, 1>{});
  if constexpr (NV > 2) f(std::integral_constant<int, 2>{});
  if constexpr (NV > 3) f(std::integral_constant<int, 3>{});
}

// As product() of product.h, whose Addend is from, from_stride and apart here.
template <int NV, int NA>
void product_of_tiles(int64_t rows, int64_t K, const BFloat16* const* a, const BFloat16* b, int64_t panels,
                      int64_t panel_stride, float* c, int64_t c_stride, const float* from, int64_t from_stride,
                      const float* apart) {
  constexpr int64_t columns = NV * tile_columns;
  constexpr int64_t first_apart = (NV - NA) * tile_columns;
  constexpr int64_t b_bytes = columns * 2 * int64_t(sizeof(BFloat16));  // from one pair of k to the next
  constexpr int64_t sums_bytes = columns * int64_t(sizeof(float));
  if (rows <= 0 || panels <= 0) return;
  alignas(64) BFloat16 a_tile[tile_height * tile_depth];
  alignas(64) BFloat16 b_last[tile_height * columns * 2];
  alignas(64) float sums[tile_height * columns];
  const int64_t whole = K / tile_depth * tile_depth, left = K - whole;
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  for (int64_t p = 0; p < panels; ++p) {
    const BFloat16* panel = b + p * panel_stride;
    if (left > 0) {
      memset(b_last, 0, sizeof b_last);
      memcpy(b_last, panel + whole * columns, size_t((left + 1) / 2 * b_bytes));
    }
    for (int64_t r = 0; r < rows; r += tile_height) {
      const int64_t count = rows - r < tile_height ? rows - r : tile_height;
      each_column_tile<NV>([&](auto v) __attribute__((always_inline)) { clear_sums<decltype(v)::value>(); });
      memset(a_tile, 0, sizeof a_tile);
      for (int64_t k = 0; k < K; k += tile_depth) {
        const bool last = k == whole;
        if (last) memset(a_tile, 0, sizeof a_tile);
        for (int64_t i = 0; i < count; ++i)
          memcpy(a_tile + i * tile_depth, a[r + i] + k, size_t(last ? left : tile_depth) * sizeof(BFloat16));
        _tile_loadd(4, a_tile, tile_depth * int64_t(sizeof(BFloat16)));
        const BFloat16* block = last ? b_last : panel + k * columns;
        each_column_tile<NV>([&](auto v) __attribute__((always_inline)) {
          multiply_tile<decltype(v)::value>(block + decltype(v)::value * tile_columns * 2, b_bytes);
        });
      }
      each_column_tile<NV>([&](auto v) __attribute__((always_inline)) {
        store_sums<decltype(v)::value>(sums + decltype(v)::value * tile_columns, sums_bytes);
      });
      for (int64_t i = 0; i < count; ++i) {
        const float* sum = sums + i * columns;
        const float* added = from ? from + (r + i) * from_stride + p * columns : nullptr;
        float* to = c + (r + i) * c_stride + p * columns;
        for (int64_t n = 0; n < first_apart; ++n) to[n] = added ? sum[n] + added[n] : sum[n];
        for (int64_t n = first_apart; n < columns; ++n) to[n] = sum[n] + apart[p * columns + n];
      }
    }
  }
  _tile_release();
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
