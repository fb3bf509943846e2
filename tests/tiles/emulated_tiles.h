// AMX's instructions that csrc/cpu/tiles.h uses, in plain C++, as Intel's manual defines them: tiles of up to 16 rows
// of 64 bytes, whose shapes the configuration gives; rounding and the flushing of denormals aside. What the hardware
// would fault on ends the program.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows = 0, row_bytes = 0;
  unsigned char data[16][64];
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void fault(const char* what) {
  std::fprintf(stderr, "tiles: %s\n", what);
  std::exit(2);
}

inline Tile& tile(int t) {
  if (!configured) fault("used without a configuration");
  if (t < 0 || t > 7 || tiles[t].rows == 0) fault("a tile that is not configured");
  return tiles[t];
}

inline void load_configuration(const void* memory) {
  unsigned char bytes[64];
  std::memcpy(bytes, memory, sizeof bytes);
  if (bytes[0] != 1) fault("palette is not 1");
  for (int i = 1; i < 16; ++i)
    if (bytes[i] != 0) fault("start row or a reserved byte is not 0");
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
    const int rows = bytes[48 + t];
    if (row_bytes > 64 || rows > 16 || (t > 7 && (row_bytes || rows)) || (row_bytes == 0) != (rows == 0))
      fault("shape of a tile");
    if (t > 7) continue;
    tiles[t].rows = rows;
    tiles[t].row_bytes = row_bytes;
    std::memset(tiles[t].data, 0, sizeof tiles[t].data);
  }
  configured = true;
}

inline void release() { configured = false; }

inline void clear(int t) { std::memset(tile(t).data, 0, sizeof tile(t).data); }

inline void load(int t, const void* base, long stride) {
  Tile& to = tile(t);
  std::memset(to.data, 0, sizeof to.data);
  for (int r = 0; r < to.rows; ++r)
    std::memcpy(to.data[r], static_cast<const char*>(base) + r * stride, size_t(to.row_bytes));
}

inline void store(int t, void* base, long stride) {
  const Tile& from = tile(t);
  for (int r = 0; r < from.rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, from.data[r], size_t(from.row_bytes));
}

inline float bfloat16(const unsigned char* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void check_shapes(int sums, int a, int b) {
  const Tile &c = tile(sums), &x = tile(a), &w = tile(b);
  if (x.rows != c.rows || w.row_bytes != c.row_bytes || x.row_bytes / 4 != w.rows || sums == a || sums == b || a == b)
    fault("shapes of a product");
}

// sums[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1]
inline void multiply(int sums, int a, int b) {
  check_shapes(sums, a, b);
  Tile &c = tile(sums), &x = tile(a), &w = tile(b);
  for (int m = 0; m < c.rows; ++m) {
    for (int k = 0; k < x.row_bytes / 4; ++k) {
      for (int n = 0; n < c.row_bytes / 4; ++n) {
        float sum;
        std::memcpy(&sum, c.data[m] + 4 * n, 4);
        sum += bfloat16(x.data[m] + 4 * k) * bfloat16(w.data[k] + 4 * n);
        sum += bfloat16(x.data[m] + 4 * k + 2) * bfloat16(w.data[k] + 4 * n + 2);
        std::memcpy(c.data[m] + 4 * n, &sum, 4);
      }
    }
  }
}

// sums[m][n] += a[m][4k] * b[k][4n] + ... + a[m][4k + 3] * b[k][4n + 3], a without a sign and b with one; a sum that
// does not fit 32 bits wraps.
inline void multiply_bytes(int sums, int a, int b) {
  check_shapes(sums, a, b);
  Tile &c = tile(sums), &x = tile(a), &w = tile(b);
  for (int m = 0; m < c.rows; ++m) {
    for (int k = 0; k < x.row_bytes / 4; ++k) {
      for (int n = 0; n < c.row_bytes / 4; ++n) {
        uint32_t sum;
        std::memcpy(&sum, c.data[m] + 4 * n, 4);
        for (int i = 0; i < 4; ++i)
          sum += uint32_t(int32_t(x.data[m][4 * k + i]) * int32_t(int8_t(w.data[k][4 * n + i])));
        std::memcpy(c.data[m] + 4 * n, &sum, 4);
      }
    }
  }
}

}  // namespace emulated

// The compiler's own, some of which are macros.
#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig(memory) emulated::load_configuration(memory)
#define _tile_zero(t) emulated::clear(t)
#define _tile_release() emulated::release()
#define _tile_loadd(t, base, stride) emulated::load(t, base, stride)
#define _tile_stored(t, base, stride) emulated::store(t, base, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply(sums, a, b)
#define _tile_dpbusd(sums, a, b) emulated::multiply_bytes(sums, a, b)
