// Products on tiles against the sums written down, on emulated tiles, so that they run on any processor, or without
// FRNN_EMULATE_TILES on those of this one. bfloat16: every number of vectors in a panel, odd sizes of K and of rows,
// rows anywhere and at one distance, nothing added, a bias, what stood there, or rows of their own with the last vector
// of a panel apart; values are small integers, with which every order of summation gives the same float32. Bytes: the
// largest and the least of both operands, up to sums that fill 32 bits. Exits with 1 at a difference.
#define FRNN_ISA isa_tiles
#if !defined(FRNN_EMULATE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdio>
#include <random>
#include <vector>

#include "cpu/tiles.h"

using namespace fused_rnn;
using namespace fused_rnn::isa_tiles;

namespace {

std::mt19937 random_bits(1);

BFloat16 small_integer() {
  const float value = float(int(random_bits() % 9) - 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return {uint16_t(bits >> 16)};
}

float value_of(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

constexpr float untouched = 12345;

enum class Form { nothing, bias, accumulate, apart };

template <int NV, int NA>
int check(int64_t rows, int64_t K, int64_t panels, Form form, bool regular) {
  constexpr int64_t columns = NV * 16;
  const int64_t padded = (K + 1) / 2 * 2, panel_stride = padded * columns, c_stride = panels * columns + 5;
  const BFloat16 nan{0x7fc0};
  // Behind the last panel, and in the row's padding, stands what must not be read.
  std::vector<BFloat16> b(size_t(panels * panel_stride + 4096), nan);
  const int64_t distance = K + 7;
  std::vector<BFloat16> all(size_t(rows * distance), nan);
  std::vector<const BFloat16*> a_rows;
  for (int64_t r = 0; r < rows; ++r) {
    // In the order of memory, or every second row at the place of the one before or behind it.
    const int64_t place = regular || (r ^ 1) >= rows ? r : r ^ 1;
    for (int64_t k = 0; k < K; ++k) all[size_t(place * distance + k)] = small_integer();
    a_rows.push_back(all.data() + place * distance);
  }
  const auto weight = [&](int64_t p, int64_t k, int64_t n) -> BFloat16& {
    return b[size_t(p * panel_stride + k / 2 * 2 * columns + n * 2 + k % 2)];
  };
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t k = 0; k < padded; ++k)
      for (int64_t n = 0; n < columns; ++n) weight(p, k, n) = k < K ? small_integer() : BFloat16{0};
  }
  const size_t width = size_t(panels * columns);
  std::vector<float> bias(width), own(size_t(rows) * width), c(size_t(rows * c_stride), untouched);
  for (float& x : bias) x = value_of(small_integer());
  for (float& x : own) x = value_of(small_integer());
  if (form == Form::accumulate) {
    for (int64_t r = 0; r < rows; ++r)
      for (size_t n = 0; n < width; ++n) c[size_t(r * c_stride) + n] = value_of(small_integer());
  }
  const std::vector<float> before = c;
  const float* from = form == Form::nothing      ? nullptr
                      : form == Form::bias       ? bias.data()
                      : form == Form::accumulate ? c.data()
                                                 : own.data();
  const int64_t from_stride = form == Form::accumulate ? c_stride : form == Form::apart ? int64_t(width) : 0;
  product_of_tiles<BFloat16, NV, NA>(rows, K, a_rows.data(), b.data(), panels, panel_stride, c.data(), c_stride, from,
                                     from_stride, bias.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < c_stride; ++n) {
      float expected = before[size_t(r * c_stride + n)];
      if (n < panels * columns) {
        if (form == Form::nothing) expected = 0;
        if (form == Form::bias || n % columns >= (NV - NA) * 16) {
          expected = bias[size_t(n)];
        } else if (form == Form::apart) {
          expected = own[size_t(r) * width + size_t(n)];
        }
        for (int64_t k = 0; k < K; ++k)
          expected += value_of(a_rows[size_t(r)][k]) * value_of(weight(n / columns, k, n % columns));
      }
      const float found = c[size_t(r * c_stride + n)];
      if (found != expected) {
        std::printf("NV %d NA %d rows %ld K %ld panels %ld form %d regular %d: row %ld column %ld: %g, expected %g\n",
                    NV, NA, long(rows), long(K), long(panels), int(form), int(regular), long(r), long(n), double(found),
                    double(expected));
        return 1;
      }
    }
  }
  return 0;
}

template <int NV>
int check_all(int& count) {
  for (const int64_t rows : {1, 2, 15, 16, 17, 32, 33, 48}) {
    for (const int64_t K : {1, 2, 7, 12, 31, 32, 33, 34, 48, 63, 64, 65, 130}) {
      for (const int64_t panels : {1, 3}) {
        for (const bool regular : {false, true}) {
          for (const Form form : {Form::nothing, Form::bias, Form::accumulate}) {
            if (check<NV, 0>(rows, K, panels, form, regular)) return 1;
          }
          if (check<NV, 1>(rows, K, panels, Form::apart, regular)) return 1;
          count += 4;
        }
      }
    }
  }
  return 0;
}

// How bytes are chosen: all of them, or of the rows (0 or 255) and the weights (-127 or 127) the ends alone, or the one
// that gives the largest or the least sums.
enum class Values { any, ends, most, least };

int check_bytes(int64_t vectors, int64_t rows, int64_t K, int64_t panels, Values values, bool regular) {
  const int64_t columns = vectors * 16, panel_stride = K * columns, c_stride = panels * columns + 5;
  // What stands behind a row and the last panel must not be read.
  std::vector<Int8> b(size_t(panels * panel_stride + 4096), Int8{101});
  const int64_t distance = K + 13;
  std::vector<Int8> all(size_t(rows * distance), Int8{103});
  std::vector<const Int8*> a;
  const bool constant = values == Values::most || values == Values::least;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = regular || (r ^ 1) >= rows ? r : r ^ 1;
    for (int64_t k = 0; k < K; ++k) {
      const uint8_t any = uint8_t(random_bits() % 256), end = any & 1 ? 255 : 0;
      all[size_t(place * distance + k)] = {int8_t(values == Values::any ? any : constant ? 255 : end)};
    }
    a.push_back(all.data() + place * distance);
  }
  for (int64_t i = 0; i < panels * panel_stride; ++i) {
    const int any = int(random_bits() % 255) - 127, end = any & 1 ? 127 : -127;
    b[size_t(i)] = {int8_t(values == Values::any     ? any
                           : values == Values::most  ? 127
                           : values == Values::least ? -127
                                                     : end)};
  }
  constexpr int32_t nothing = 1234567;
  std::vector<int32_t> c(size_t(rows * c_stride), nothing);
  product_of_byte_tiles(columns, rows, K, a.data(), b.data(), panels, c.data(), c_stride);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < c_stride; ++n) {
      int64_t expected = n < panels * columns ? 0 : nothing;
      for (int64_t k = 0; n < panels * columns && k < K; ++k) {
        const int64_t row = n / columns * panel_stride + k / 4 * columns * 4;
        expected += int64_t(uint8_t(a[size_t(r)][k].value)) * b[size_t(row + n % columns * 4 + k % 4)].value;
      }
      const int32_t found = c[size_t(r * c_stride + n)];
      if (found != expected) {
        std::printf(
            "bytes: vectors %ld rows %ld K %ld panels %ld values %d regular %d: row %ld column %ld: %ld, expected "
            "%ld\n",
            long(vectors), long(rows), long(K), long(panels), int(values), int(regular), long(r), long(n), long(found),
            long(expected));
        return 1;
      }
    }
  }
  return 0;
}

int check_all_bytes(int& count) {
  for (const int64_t vectors : {1, 2, 3, 4}) {
    for (const int64_t rows : {1, 15, 16, 17, 31, 32, 33, 64}) {
      for (const int64_t K : {4, 12, 60, 64, 68, 76, 128, 132, 196, 260}) {
        for (const Values values : {Values::any, Values::ends}) {
          if (check_bytes(vectors, rows, K, 1 + K / 4 % 2, values, (rows + K) % 8 < 4)) return 1;
          ++count;
        }
      }
      if (check_bytes(vectors, rows, 256, 1, Values::most, true)) return 1;
      if (check_bytes(vectors, rows, 100, 1, Values::least, false)) return 1;
      count += 2;
    }
  }
  // The deepest that the operator takes.
  for (const Values values : {Values::most, Values::least}) {
    if (check_bytes(1, 17, 65536, 1, values, true)) return 1;
    ++count;
  }
  return 0;
}

}  // namespace

int main() {
#if !defined(FRNN_EMULATE_TILES)
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    std::printf("the system does not let this process use tiles\n");
    return 1;
  }
#endif
  int count = 0;
  if (check_all<1>(count) || check_all<2>(count) || check_all<3>(count) || check_all<4>(count)) return 1;
  if (check_all_bytes(count)) return 1;
  std::printf("%d products are right\n", count);
  return 0;
}
