// The product on tiles against the sums written down, on emulated tiles, so that it runs on any processor:
// every number of vectors in a panel, odd sizes of K and of rows, rows anywhere and at one distance, nothing added, a
// bias, what stood there, or rows of their own with the last vector of a panel apart.
// Values are small integers, with which every order of summation gives the same float32. Exits with 1 at a difference.
#define FRNN_ISA isa_tiles
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
  product_of_tiles<NV, NA>(rows, K, a_rows.data(), b.data(), panels, panel_stride, c.data(), c_stride, from,
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
        std::printf("NV %d NA %d rows %ld K %ld panels %ld form %d regular %d: row %ld column %ld: %g, expected %g\n", NV, NA,
                    long(rows), long(K), long(panels), int(form), int(regular), long(r), long(n), double(found), double(expected));
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

}  // namespace

int main() {
  int count = 0;
  if (check_all<1>(count) || check_all<2>(count) || check_all<3>(count) || check_all<4>(count)) return 1;
  std::printf("%d products are right\n", count);
  return 0;
}
