// What the kernels of NEON compute in instructions of their own, against the same written down in plain C++, bit for
// bit: products of every shape of tile (each sum in the order of k, whatever the tile), conversions of float16 and
// bfloat16, products of words for fingerprints, bits of comparisons. Exits with 1 at a difference. Compiled with what
// csrc/cpu/isa_neon.cpp or isa_neon_bf16.cpp defines.
#pragma GCC diagnostic ignored "-Wignored-attributes"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/draw.h"
#include "cpu/fingerprint.h"
#include "cpu/pack.h"

using namespace fused_rnn;
using namespace fused_rnn::FRNN_ISA;

namespace {

std::mt19937 bits(1);

[[noreturn]] void differs(const char* what, int64_t a, int64_t b, double found, double expected) {
  std::printf("%s %ld %ld: %.9g, expected %.9g\n", what, long(a), long(b), found, expected);
  std::exit(1);
}

template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b);
}

float value_of(BFloat16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// A number of float32 precision and of moderate size.
float draw() { return std::ldexp(float(int32_t(bits())), -31) * float(1 + bits() % 8); }

template <class E>
E drawn() {
  if constexpr (std::is_same_v<E, BFloat16>) {
    const float value = draw();
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return {uint16_t(word >> 16)};
  } else {
    return E(draw()) * (1 + E(bits()) * E(std::is_same_v<E, double> ? 1e-12 : 0));
  }
}

// a + b as the dot product of bfloat16 rounds it: bits that float32 does not hold are dropped, and where there were any
// the lowest is set.
[[maybe_unused]] float odd_sum(float x, float y) {
  const double a = x, b = y;
  double sum = a + b;
  const double part = sum - a, error = (a - (sum - part)) + (b - part);  // of the sum, exactly
  uint64_t word;
  std::memcpy(&word, &sum, sizeof word);
  if (error != 0) {
    if ((error < 0) == (sum > 0)) --word;  // it was rounded away from zero
    word |= 1;
  }
  constexpr uint64_t lost = (uint64_t(1) << 29) - 1;
  const bool inexact = (word & lost) != 0;
  word &= ~lost;
  std::memcpy(&sum, &word, sizeof sum);
  float result = float(sum);
  uint32_t narrow;
  std::memcpy(&narrow, &result, sizeof narrow);
  narrow |= inexact;
  std::memcpy(&result, &narrow, sizeof result);
  return result;
}

template <class E>
typename Operand<E>::Acc multiply_add(typename Operand<E>::Acc sum, const E* a, const E* b, int64_t left) {
  if constexpr (Operand<E>::group == 1) {
    (void)left;
    return std::fma(*a, *b, sum);
  } else {
    const float first = value_of(a[0]) * value_of(b[0]);
    return odd_sum(sum, odd_sum(first, left > 1 ? value_of(a[1]) * value_of(b[1]) : 0.0f));
  }
}

enum class Form { nothing, bias, accumulate, apart };

template <class E, int NV, int NA>
void check_product(int64_t rows, int64_t K, int64_t panels, Form form) {
  using A = typename Operand<E>::Acc;
  constexpr int group = Operand<E>::group;
  constexpr int64_t width = Simd<A>::width, columns = NV * width;
  const int64_t depth = padded_depth<E>(K), panel_stride = depth * columns + 8, c_stride = panels * columns + 3;
  // Behind the last k of an odd K stands zero, as packing leaves it; rows end with their K.
  std::vector<E> b(size_t(panels * panel_stride), E{});
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < columns; ++n)
        b[size_t(p * panel_stride + k / group * group * columns + n * group + k % group)] = drawn<E>();
    }
  }
  std::vector<std::vector<E>> a{size_t(rows), std::vector<E>(size_t(K))};
  std::vector<const E*> a_rows;
  for (auto& row : a) {
    for (E& x : row) x = drawn<E>();
    a_rows.push_back(row.data());
  }
  std::vector<A> c(size_t(rows * c_stride)), own(c.size()), bias(size_t(panels * columns));
  for (A& x : c) x = draw();
  for (A& x : own) x = draw();
  for (A& x : bias) x = draw();
  const std::vector<A> before = c;
  Addend<A> addend;
  if (form == Form::bias) addend = {bias.data(), 0, nullptr};
  if (form == Form::accumulate) addend = {c.data(), c_stride, nullptr};
  if (form == Form::apart) addend = {own.data(), c_stride, bias.data()};
  product<E, NV, NA>(rows, K, a_rows.data(), b.data(), panels, panel_stride, c.data(), c_stride, addend);
  const int64_t block = panel_block_bytes / (columns * int64_t(sizeof(E)));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < c_stride; ++n) {
      const int64_t at = r * c_stride + n;
      A expected = before[size_t(at)];
      if (n < panels * columns) {
        A added = form == Form::bias ? bias[size_t(n)] : form == Form::accumulate ? expected : own[size_t(at)];
        if (form == Form::apart && n % columns >= (NV - NA) * width) added = bias[size_t(n)];
        for (int64_t k = 0; k < K; k += block) {
          A sum = 0;
          for (int64_t i = k; i < K && i < k + block; i += group) {
            const E* element = &b[size_t(n / columns * panel_stride + i * columns + n % columns * group)];
            sum = multiply_add(sum, &a[size_t(r)][size_t(i)], element, K - i);
          }
          expected = k == 0 && form == Form::nothing ? sum : sum + (k == 0 ? added : expected);
        }
      }
      if (!same(c[size_t(at)], expected)) {
        std::printf("NV %d NA %d rows %ld K %ld panels %ld form %d\n", NV, NA, long(rows), long(K), long(panels),
                    int(form));
        differs("row, column", r, n, double(c[size_t(at)]), double(expected));
      }
    }
  }
}

template <class E, int NV>
void check_products(int& count) {
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17}) {
    for (const int64_t K : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 30, 67}) {
      for (const int64_t panels : {1, 2, 31}) {
        if (panels == 31 && rows > 2) continue;  // where rows take several panels at once
        for (const Form form : {Form::nothing, Form::bias, Form::accumulate}) {
          check_product<E, NV, 0>(rows, K, panels, form);
        }
        count += 3;
        if constexpr (NV == 3) {  // as a GRU has it
          check_product<E, NV, 1>(rows, K, panels, Form::apart);
          ++count;
        }
      }
    }
  }
  // Deeper than a block of k, the last of which is no whole number of lanes.
  const int64_t block = panel_block_bytes / (NV * Simd<typename Operand<E>::Acc>::width * int64_t(sizeof(E)));
  for (const int64_t rows : {1, 2, 7}) check_product<E, NV, 0>(rows, block + 11, 2, Form::bias);
  count += 3;
}

template <class E>
void check_products() {
  int count = 0;
  check_products<E, 1>(count);
  check_products<E, 2>(count);
  check_products<E, 3>(count);
  check_products<E, 4>(count);
  std::printf("%d products are right\n", count);
}

[[maybe_unused]] void check_half() {
  using S = Simd<float>;
  for (uint32_t word = 0; word < 0x10000; word += S::width) {
    Half given[S::width], back[S::width];
    for (int i = 0; i < S::width; ++i) given[i] = {uint16_t(word + uint32_t(i))};
    const S::V value = S::load(given);
    S::store(back, value);
    for (int i = 0; i < S::width; ++i) {
      if (!same(float(value[i]), to_float(given[i])))
        differs("from float16", word + uint32_t(i), 0, value[i], to_float(given[i]));
      const bool is_nan = value[i] != value[i];
      if (!is_nan && back[i].bits != given[i].bits) differs("float16", word + uint32_t(i), back[i].bits, value[i], 0);
      if (is_nan && (back[i].bits & 0x7fff) <= 0x7c00)
        differs("NaN in float16", word + uint32_t(i), back[i].bits, 0, 0);
    }
  }
  for (int n = 0; n < 200000; ++n) {
    // Any bits, and numbers in between two of float16.
    uint32_t word = bits();
    if (n % 2) word = (word & 0x9fffffffu) | 0x30000000u;
    if (n % 4 == 3) word &= ~0xfffu;
    float x;
    std::memcpy(&x, &word, sizeof x);
    Half found[S::width];
    S::store(found, S::splat(x));
    const Half expected = to_half(x);
    if (found[0].bits != expected.bits && x == x) differs("to float16", word, found[0].bits, x, to_float(expected));
  }
}

void check_bfloat16() {
  using S = Simd<float>;
  for (int n = 0; n < 200000; ++n) {
    uint32_t word = bits();
    if (n % 4 == 3) word = (word & 0xffff0000u) | 0x8000u;  // between two
    float x;
    std::memcpy(&x, &word, sizeof x);
    if (std::fpclassify(x) == FP_SUBNORMAL) continue;  // the kernels' conversion may flush them
    BFloat16 found[S::width];
    S::store(found, S::splat(x));
    const uint16_t expected = uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    if (x == x ? found[0].bits != expected : value_of(found[0]) == value_of(found[0]))
      differs("to bfloat16", word, found[0].bits, x, value_of({expected}));
    if (x == x && !same(float(S::load(found)[0]), value_of(found[0]))) differs("from bfloat16", word, 0, 0, 0);
  }
}

[[maybe_unused]] void check_words() {
  for (int n = 0; n < 10000; ++n) {
    Words words;
    WordLanes marks;
    uint32_t expected_bits = 0;
    for (int i = 0; i < 4; ++i) {
      words[i] = bits();
      marks[i] = bits() % 2 ? 0xffffffffu : 0;
      expected_bits |= (marks[i] & 1u) << i;
    }
    const Pairs found = multiply_pairs(words);
    for (int i = 0; i < 2; ++i) {
      if (found[i] != uint64_t(words[2 * i]) * words[2 * i + 1]) differs("pairs", n, i, 0, 0);
    }
    if (bits_of_lanes(marks) != expected_bits) differs("bits of lanes", n, 0, bits_of_lanes(marks), expected_bits);
  }
}

}  // namespace

int main() {
#if defined(FRNN_BFLOAT16_ONLY)
  check_products<BFloat16>();
#else
  check_products<float>();
  check_products<double>();
  check_half();
  check_words();
#endif
  check_bfloat16();
  return 0;
}
