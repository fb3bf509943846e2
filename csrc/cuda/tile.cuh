// Products of the persistent kernels, in pieces that do not care what the numbers are.
//
// A chunk is 16 bytes along k: 8 numbers of 16 bits or 4 of 32. A slab is 4 chunks along k. A row tile is 16 rows of
// the resident matrix, as two half tiles of 8 (rows g and g + 8 of lane 4 g + i). A column tile is 8 columns of the
// batch.
//
// Lane 4 g + i of a warp multiplies chunk i of a slab: two 16-byte loads give it its share of a row tile, one that of a
// column tile, from shared memory without bank conflicts, since consecutive lanes read consecutive chunks. That is not
// the order of k in which the matrix instructions are documented, but any order will do as long as both factors have
// it.
#pragma once

#include "approximate.cuh"
#include "device.h"
#include "plan.h"

namespace fused_rnn {
namespace cuda {

struct alignas(16) Chunk {
  uint32_t word[4];
};

// Two neighbouring columns.
struct alignas(8) Pair {
  float v[2];
  friend FRNN_DEVICE Pair operator+(const Pair& a, const Pair& b) { return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}}; }
};

// Where chunk `chunk` of column `column` of a column tile stands.
FRNN_DEVICE int chunk_offset(int chunk, int column) {
  return (chunk / slab_chunks) * slab_bytes + (column * slab_chunks + chunk % slab_chunks) * chunk_bytes;
}

// A lane's share of 16 x 8 sums: rows g and g + 8, columns 2 i and 2 i + 1.
struct TileSums {
  Pair row[2];
};

// --- How numbers are multiplied. Each has
//   Storage                 the dtype in global memory
//   Real                    what the cell's formulas are computed in
//   per_chunk               numbers in a chunk
//   word(value)             how a 32-bit number is handed to add
//   is_straight             few enough instructions to be written out for every number of slabs
//   lane_offset()           where in a slab of a column tile this lane finds what it multiplies
//   Operand                 what a lane holds of a slab; operand(slab + lane_offset(), loads). `loads`: the column of
//                           lane 4 g + i, which is g, has a row of the batch. What others hold is anything: an
//                           element of a product depends on its own column alone, and nobody looks at theirs. So they
//                           need not load, which is a pass over shared memory for each quarter of a warp that does
//   Sums                    running sums of a row tile times a column tile; add(a, b, columns), add(other), result()
//                           a: chunk i of rows g and g + 8, word by word in turn, as the matrix instructions want it

// bfloat16 and float16 on the matrix units.
template <class S>
struct HalfProduct {
  using Storage = S;
  using Real = Approximate;
  static constexpr int per_chunk = 8;
  using Operand = Chunk;

  static constexpr bool is_straight = true;
  static FRNN_DEVICE int lane_offset() { return lane_index() * chunk_bytes; }
  static FRNN_DEVICE Operand operand(const char* at, bool loads) {
    Chunk chunk;
    load_shared_if(loads, chunk.word, at);
    return chunk;
  }

  struct Sums {
    float sum[4] = {};

    FRNN_DEVICE void add(const uint32_t (&a)[8], const Operand& b, int) {
      multiply_add<S>(sum, {a[0], a[1], a[2], a[3]}, {b.word[0], b.word[1]});
      multiply_add<S>(sum, {a[4], a[5], a[6], a[7]}, {b.word[2], b.word[3]});
    }
    FRNN_DEVICE void add(const Sums& other) {
      FRNN_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] += other.sum[i];
    }
    FRNN_DEVICE TileSums result() const { return {{{{sum[0], sum[1]}}, {{sum[2], sum[3]}}}}; }
  };
};

// float32 rounded to TF32 on the matrix units.
struct Tf32Product {
  using Storage = float;
  using Real = Approximate;
  static constexpr int per_chunk = 4;
  using Operand = Chunk;

  static FRNN_DEVICE uint32_t word(float value) { return to_tf32(value); }
  static constexpr bool is_straight = true;
  static FRNN_DEVICE int lane_offset() { return lane_index() * chunk_bytes; }
  static FRNN_DEVICE Operand operand(const char* at, bool loads) {
    Chunk chunk;
    load_shared_if(loads, chunk.word, at);
    return chunk;
  }

  struct Sums {
    float sum[4] = {};

    FRNN_DEVICE void add(const uint32_t (&a)[8], const Operand& b, int) {
      multiply_add_tf32(sum, {a[0], a[1], a[2], a[3]}, {b.word[0], b.word[1]});
      multiply_add_tf32(sum, {a[4], a[5], a[6], a[7]}, {b.word[2], b.word[3]});
    }
    FRNN_DEVICE void add(const Sums& other) {
      FRNN_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] += other.sum[i];
    }
    FRNN_DEVICE TileSums result() const { return {{{{sum[0], sum[1]}}, {{sum[2], sum[3]}}}}; }
  };
};

// float32 as it is: lane 4 g + i multiplies its chunk of rows g and g + 8 by all columns, and the four lanes of a row
// add up at the end.
struct FloatProduct {
  using Storage = float;
  using Real = float;
  static constexpr int per_chunk = 4;
  using Operand = const char*;

  static FRNN_DEVICE uint32_t word(float value) { return uint32_t(Lanes<float>::bits(value)); }
  static constexpr bool is_straight = false;
  static FRNN_DEVICE int lane_offset() { return lane_index() % 4 * chunk_bytes; }
  static FRNN_DEVICE Operand operand(const char* at, bool) { return at; }

  struct Sums {
    float sum[2][tile_columns] = {};

    FRNN_DEVICE void add(const uint32_t (&a)[8], const Operand& b, int columns) {
      float row[8];
      memcpy(row, a, sizeof row);
      FRNN_UNROLL
      for (int column = 0; column < tile_columns; ++column) {
        if (column >= columns) break;
        const Chunk chunk = *reinterpret_cast<const Chunk*>(b + column * slab_chunks * chunk_bytes);
        float value[4];
        memcpy(value, chunk.word, sizeof value);
        FRNN_UNROLL
        for (int k = 0; k < 4; ++k) {
          sum[0][column] += row[2 * k] * value[k];
          sum[1][column] += row[2 * k + 1] * value[k];
        }
      }
    }
    FRNN_DEVICE TileSums result() const {
      TileSums result;
      const bool upper = lane_index() & 2, odd = lane_index() & 1;
      FRNN_UNROLL
      for (int r = 0; r < 2; ++r) {
        float half[4];
        FRNN_UNROLL
        for (int c = 0; c < 4; ++c) {
          const float kept = upper ? sum[r][4 + c] : sum[r][c];
          half[c] = kept + shuffle_xor(upper ? sum[r][c] : sum[r][4 + c], 2);
        }
        FRNN_UNROLL
        for (int c = 0; c < 2; ++c)
          result.row[r].v[c] = (odd ? half[2 + c] : half[c]) + shuffle_xor(odd ? half[c] : half[2 + c], 1);
      }
      return result;
    }
  };
};

// A chunk of the numbers value(0), value(1), ...
template <class Product, class Value>
FRNN_DEVICE Chunk make_chunk(const Value& value) {
  Chunk chunk;
  FRNN_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (Product::per_chunk == 8) {
      chunk.word[w] = uint32_t(value(2 * w).bits) | uint32_t(value(2 * w + 1).bits) << 16;
    } else {
      chunk.word[w] = Product::word(value(w));
    }
  }
  return chunk;
}

// Numbers [k, k + per_chunk) of a row of `size`, zeros past its end.
template <class Product>
FRNN_DEVICE Chunk load_row_chunk(const typename Product::Storage* row, int64_t k, int64_t size) {
  using S = typename Product::Storage;
  constexpr int n = Product::per_chunk;
  if (k + n <= size && reinterpret_cast<uintptr_t>(row + k) % chunk_bytes == 0) {
    Chunk chunk = *reinterpret_cast<const Chunk*>(row + k);
    if constexpr (n == 4) {
      FRNN_UNROLL
      for (int w = 0; w < 4; ++w) chunk.word[w] = Product::word(Lanes<float>::from_bits(int32_t(chunk.word[w])));
    }
    return chunk;
  }
  return make_chunk<Product>([&](int e) { return k + e < size ? row[k + e] : S{}; });
}

// The share of a lane in one row tile and one slab of the resident matrix: weight(half, chunk) is the chunk of the
// lane's row in half tile `half`.
template <class Weight>
FRNN_DEVICE void load_tile(uint32_t (&a)[8], const Weight& weight, int row_tile, int slab) {
  const int chunk = slab * slab_chunks + lane_index() % 4;
  const Chunk upper = weight(2 * row_tile, chunk), lower = weight(2 * row_tile + 1, chunk);
  FRNN_UNROLL
  for (int w = 0; w < 4; ++w) {
    a[2 * w] = upper.word[w];
    a[2 * w + 1] = lower.word[w];
  }
}

// The same share in shared memory.
FRNN_DEVICE void store_tile(char* tile, const uint32_t (&a)[8]) {
  Chunk* const chunks = reinterpret_cast<Chunk*>(tile) + lane_index();
  chunks[0] = {{a[0], a[1], a[2], a[3]}};
  chunks[warp_size] = {{a[4], a[5], a[6], a[7]}};
}
FRNN_DEVICE void fetch_tile(uint32_t (&a)[8], const char* tile) {
  uint32_t first[4], second[4];
  load_shared(first, tile + lane_index() * chunk_bytes);
  load_shared(second, tile + (warp_size + lane_index()) * chunk_bytes);
  FRNN_UNROLL
  for (int w = 0; w < 4; ++w) {
    a[w] = first[w];
    a[4 + w] = second[w];
  }
}

// Lanes 4 g + i that differ in g alone hold chunks of the same columns in rows g; with 32 bits, four of them (g / 4 is
// the same) in rows g % 4. Turns rows into columns: such a lane gets number g (g % 4) of each of these chunks.
template <class S>
FRNN_DEVICE Chunk transpose_chunk(Chunk chunk) {
  const auto swap_words = [&](int lanes, int a, int b) {
    const bool upper = lane_index() & lanes;
    const uint32_t received = shuffle_xor(upper ? chunk.word[a] : chunk.word[b], lanes);
    chunk.word[a] = upper ? received : chunk.word[a];
    chunk.word[b] = upper ? chunk.word[b] : received;
  };
  constexpr int widest = sizeof(S) == 2 ? 16 : 8;
  swap_words(widest, 0, 2);
  swap_words(widest, 1, 3);
  swap_words(widest / 2, 0, 1);
  swap_words(widest / 2, 2, 3);
  if constexpr (sizeof(S) == 2) {
    const bool upper = lane_index() & 4;
    FRNN_UNROLL
    for (int w = 0; w < 4; ++w) {
      const uint32_t own = chunk.word[w], other = shuffle_xor(own, 4);
      chunk.word[w] = upper ? other >> 16 | (own & 0xffff0000u) : (own & 0xffffu) | other << 16;
    }
  }
  return chunk;
}

// Eight neighbouring lanes (from a multiple of 8) hold 8 neighbouring units of a column, as bits. Each gets the chunk
// along the units that holds its own. (With 16 bits that is all 8 units, with 32 bits those of lanes 0 to 3 or 4 to 7.)
template <class S>
FRNN_DEVICE Chunk gather_units(uint32_t unit) {
  const int lane = lane_index();
  // Of two lanes' words the first, and the second, by the bit of the lane in which they differ.
  const auto in_order = [&](uint32_t own, uint32_t other, int bit, uint32_t& low, uint32_t& high) {
    low = lane & bit ? other : own;
    high = lane & bit ? own : other;
  };
  Chunk chunk;
  uint32_t low, high;
  if constexpr (sizeof(S) == 2) {
    in_order(unit, shuffle_xor(unit, 1), 1, low, high);
    const uint32_t two = low | high << 16;
    in_order(two, shuffle_xor(two, 2), 2, low, high);
    in_order(low, shuffle_xor(low, 4), 4, chunk.word[0], chunk.word[2]);
    in_order(high, shuffle_xor(high, 4), 4, chunk.word[1], chunk.word[3]);
  } else {
    in_order(unit, shuffle_xor(unit, 1), 1, low, high);
    in_order(low, shuffle_xor(low, 2), 2, chunk.word[0], chunk.word[2]);
    in_order(high, shuffle_xor(high, 2), 2, chunk.word[1], chunk.word[3]);
  }
  return chunk;
}

}  // namespace cuda
}  // namespace fused_rnn
