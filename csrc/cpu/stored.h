// Products of float32 rows with weights that are stored in fewer bits (WeightFormat of ../problem.h).
//
// bfloat16 and float16 are read as float32 where they are multiplied. int8 weights have a scale a row of the matrix, a
// column here. A row of activations is quantized when it is multiplied, over the range of its own values and zero:
// value = scale * (q - zero), q in -128 ... 127. Sums are exact in int32, so every instruction set has the same ones:
//   sum of value * weight = scale * scale of the column * (sum of q * w - zero * sum of w).
#pragma once

#include <cstring>

#include "byte_tiles.h"
#include "pack.h"

namespace fused_rnn {
namespace FRNN_ISA {

template <>
struct VectorTypes<int32_t> {
  typedef int32_t Vector __attribute__((vector_size(FRNN_VECTOR_BYTES)));
  using Int = Vector;
};

typedef int8_t ByteLanes __attribute__((vector_size(FRNN_VECTOR_BYTES / 4)));
typedef int8_t Bytes __attribute__((vector_size(FRNN_VECTOR_BYTES)));

// How the products of these formats are named: what is multiplied, and with what instructions.
struct BFloat16Weights {};
struct Float16Weights {};
struct Int8ByDots {};  // vpdpbusd

// Registers that what turns a format into products takes (Operand::work).
#if defined(FRNN_NEON)
inline constexpr int work_of_bfloat16 = 1, work_of_float16 = 1, work_of_int8 = 3, work_of_dots = 0;
#elif FRNN_VECTOR_BYTES == 64
inline constexpr int work_of_bfloat16 = 1, work_of_float16 = 0, work_of_int8 = 4, work_of_dots = 0;
#elif FRNN_VECTOR_BYTES == 32
inline constexpr int work_of_bfloat16 = 1, work_of_float16 = 0, work_of_int8 = 4, work_of_dots = 0;
#else
inline constexpr int work_of_bfloat16 = 1, work_of_float16 = 7, work_of_int8 = 6;
#endif

template <class W, int registers>
struct StoredOperand {
  using Row = float;
  using Stored = W;
  using Acc = float;
  using V = Simd<float>::V;
  using Columns = V;
  static constexpr int group = 1;
  static constexpr bool whole_groups = true;
  static constexpr bool is_statement = false;
  static constexpr int work = registers;
  static FRNN_INLINE Columns columns(const W* b) { return Simd<float>::load(b); }
  static FRNN_INLINE Columns broadcast(const float* a) { return Simd<float>::splat(*a); }
  static constexpr bool by_lanes = true;
  static FRNN_INLINE Columns lanes(const float* a) { return Simd<float>::load(a); }
#if defined(FRNN_NEON)
  template <int lane>
  static FRNN_INLINE V multiply_add_lane(V acc, Columns row, Columns b) {
    return FRNN_ISA::multiply_add_lane<lane>(acc, row, b);
  }
#endif
  static FRNN_INLINE V multiply_add(V acc, Columns a, Columns b) { return acc + a * b; }
};
template <>
struct Operand<BFloat16Weights> : StoredOperand<BFloat16, work_of_bfloat16> {};
template <>
struct Operand<Float16Weights> : StoredOperand<Half, work_of_float16> {};

// Four k of each column side by side. K is a multiple of four, so that nothing is left over.
struct Int8Operand {
  using Row = Int8;
  using Stored = Int8;
  using Acc = int32_t;
  using V = Simd<int32_t>::V;
  using Columns = Bytes;
  static constexpr int group = 4;
  static constexpr bool whole_groups = true;
  static FRNN_INLINE Columns columns(const Int8* b) { return load_bytes<Bytes>(b); }
  static FRNN_INLINE Columns broadcast(const Int8* a) {
    int32_t four;
    __builtin_memcpy(&four, a, sizeof four);
    return (Bytes)Simd<int32_t>::splat(four);
  }
};

template <>
struct Operand<Int8> : Int8Operand {
  static constexpr bool is_statement = false;
  static constexpr bool by_lanes = false;
  static constexpr int work = work_of_int8;
  // Sums of two products in 16 bits: |a| <= 128 and |b| <= 127, so they are 32512 at most.
  static FRNN_INLINE V multiply_add(V acc, Columns a, Columns b) {
#if FRNN_VECTOR_BYTES == 64
    const __m512i rows = (__m512i)a;
    const __m512i with_sign = _mm512_mask_sub_epi8((__m512i)b, _mm512_movepi8_mask(rows), __m512i{}, (__m512i)b);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(rows), with_sign);
    return acc + (V)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif FRNN_VECTOR_BYTES == 32
    const __m256i rows = (__m256i)a;
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(rows), _mm256_sign_epi8((__m256i)b, rows));
    return acc + (V)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__aarch64__)
    const int8x16_t rows = (int8x16_t)a, columns = (int8x16_t)b;
    const int16x8_t low = vmull_s8(vget_low_s8(rows), vget_low_s8(columns)), high = vmull_high_s8(rows, columns);
    return (V)vpadalq_s16((int32x4_t)acc, vpaddq_s16(low, high));
#elif defined(__SSE2__)
    // Bytes as 16-bit numbers: above themselves, and shifted down.
    const __m128i rows = (__m128i)a, columns = (__m128i)b;
    const auto low = [](__m128i x) { return _mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8); };
    const auto high = [](__m128i x) { return _mm_srai_epi16(_mm_unpackhi_epi8(x, x), 8); };
    const __m128i first = _mm_madd_epi16(low(rows), low(columns));  // two sums of each of the first two columns
    const __m128i second = _mm_madd_epi16(high(rows), high(columns));
    const __m128i even = (__m128i)_mm_shuffle_ps((__m128)first, (__m128)second, _MM_SHUFFLE(2, 0, 2, 0));
    const __m128i odd = (__m128i)_mm_shuffle_ps((__m128)first, (__m128)second, _MM_SHUFFLE(3, 1, 3, 1));
    return acc + (V)even + (V)odd;
#else
    const auto byte = [](Bytes x, int i) __attribute__((always_inline)) { return ((V)x << (24 - 8 * i)) >> 24; };
    for (int i = 0; i < 4; ++i) acc += byte(a, i) * byte(b, i);
    return acc;
#endif
  }
};

// Where the instruction set has a later one's instruction for it, and whether that multiplies a row without a sign,
// q + 128; whoever calls this asks for the instruction first.
#if FRNN_VECTOR_BYTES >= 32
#define FRNN_BYTE_DOTS
inline constexpr uint8_t flipped_by_dots = 0x80;
#elif defined(FRNN_NEON)
#define FRNN_BYTE_DOTS
inline constexpr uint8_t flipped_by_dots = 0;
#else
inline constexpr uint8_t flipped_by_dots = 0;
#endif

#if defined(FRNN_BYTE_DOTS)
template <>
struct Operand<Int8ByDots> : Int8Operand {
  static constexpr bool is_statement = true;
  static constexpr int work = work_of_dots;
  static constexpr bool by_lanes = true;
  static FRNN_INLINE Columns lanes(const Int8* a) { return columns(a); }
#if defined(FRNN_NEON)
  template <int lane>
  static FRNN_INLINE V multiply_add_lane(V acc, Columns row, Columns b) {
    __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(b), "w"(row), "i"(lane));
    return acc;
  }
#endif
  static FRNN_INLINE V multiply_add(V acc, Columns a, Columns b) {
#if FRNN_VECTOR_BYTES == 64
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
#elif FRNN_VECTOR_BYTES == 32
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
#else
    __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
#endif
    return acc;
  }
};
#endif

// How a row of activations was quantized.
struct RowScale {
  float scale = 0;  // NaN: of a row with an infinity or a NaN, whose products are all NaN
  int32_t zero = 0;
};

// x (K) to q, which has room for whole vectors of floats; those behind K stand for zeros.
inline RowScale quantize_row(const float* x, int64_t K, uint8_t flipped, Int8* q) {
  using F = Simd<float>;
  using V = F::V;
  using I = Simd<int32_t>;
  constexpr int width = F::width;
  V low{}, high{}, wrong{};
  for (int64_t k = 0; k < K; k += width) {
    const V v = F::load_n(x + k, K - k);
    low = v < low ? v : low;
    high = v > high ? v : high;
    wrong = wrong + (v - v);  // 0, or NaN
  }
  float least = 0, most = 0, sum = 0;
  for (int i = 0; i < width; ++i) {
    least = low[i] < least ? low[i] : least;
    most = high[i] > most ? high[i] : most;
    sum += wrong[i];
  }
  RowScale result;
  result.scale = most / 255 - least / 255;  // the difference itself may be more than a float holds
  if (sum != sum || result.scale == 0) {
    result.scale = sum;
    std::memset(q, flipped, size_t(round_up(K, width)));
    result.zero = flipped;
    return result;
  }
  // To the nearest integer, even: a number this large has no fraction.
  constexpr float large = 12582912.0f;
  const auto nearest = [](float v) { return int32_t((v + large) - large); };
  const float inverse = 1 / result.scale;
  int32_t zero = nearest(-128 - least * inverse);
  zero = zero < -128 ? -128 : zero > 127 ? 127 : zero;
  const V shift = F::splat(large), by = F::splat(inverse);
  const I::V offset = (I::V)shift - I::splat(zero), first = I::splat(-128), last = I::splat(127);
  for (int64_t k = 0; k < K; k += width) {
    const V v = F::load_n(x + k, K - k) * by + shift;
    I::V n = (I::V)v - offset;
    n = n < first ? first : n > last ? last : n;
    store_bytes(q + k, __builtin_convertvector(n ^ I::splat(flipped), ByteLanes));
  }
  result.zero = zero + flipped;
  return result;
}

// sums (rows x panels of NV vectors), int32 in the place of the floats that they become: as product() has its addend.
template <int NV, int NA>
FRNN_INLINE void scale_sums(int64_t rows, int64_t panels, const RowScale* of_rows, const float* scales,
                            const int32_t* column_sums, float* sums, int64_t stride, Addend<float> addend) {
  using F = Simd<float>;
  using I = Simd<int32_t>;
  constexpr int width = F::width;
  for (int64_t r = 0; r < rows; ++r) {
    const F::V scale = F::splat(of_rows[r].scale);
    const I::V zero = I::splat(of_rows[r].zero);
    float* row = sums + r * stride;
    for (int64_t p = 0; p < panels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t column = (p * NV + v) * width;
        const I::V sum = load_bytes<I::V>(row + column) - zero * I::load(column_sums + column);
        F::V value = __builtin_convertvector(sum, F::V) * scale * F::load(scales + column);
        if (v >= NV - NA) {
          value = value + F::load(addend.apart + column);
        } else if (addend.from) {
          value = value + F::load(addend.from + r * addend.stride + column);
        }
        F::store(row + column, value);
      }
    }
  }
}

// Rows of K floats times columns that are stored in another format, and what that needs.
struct StoredWeights {
  WeightFormat format = WeightFormat::same;
  const void* data = nullptr;     // panels, as product() and product_columns() want them
  const float* scales = nullptr;  // of the columns, in their order
  const int32_t* column_sums = nullptr;
};

// Of a call's rows while they are multiplied.
struct QuantizedRows {
  Int8* data = nullptr;  // rows of `stride` bytes
  const Int8** rows = nullptr;
  RowScale* scales = nullptr;
  int64_t stride = 0;
  bool by_dots = false;          // the processor has the instruction
  ByteTiles by_tiles = nullptr;  // and tiles: beside by_dots alone

  // Bits of q that rows hold the other way round: q + 128, without a sign.
  FRNN_INLINE uint8_t flipped() const { return by_dots ? flipped_by_dots : 0; }

  // Fewer rows wait for the weights, which come as fast either way, and would be copied to fill a tile.
  FRNN_INLINE bool on_tiles(int64_t count) const { return by_tiles && count >= 16; }

  FRNN_INLINE void quantize(int64_t count, int64_t K, const float* const* a) const {
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = data + r * stride;
      scales[r] = quantize_row(a[r], K, flipped(), data + r * stride);
    }
  }
};

// c = rows times `panels` panels of NV vectors of columns, the first one at column `first`, plus an addend.
template <int NV, int NA>
__attribute__((noinline)) void product_stored(int64_t rows, int64_t K, const float* const* a, const StoredWeights& w,
                                              int64_t first, int64_t panels, float* c, int64_t c_stride,
                                              Addend<float> addend, const QuantizedRows& quantized) {
  constexpr int64_t columns = NV * Simd<float>::width;
  if (w.format == WeightFormat::bfloat16) {
    const BFloat16* data = static_cast<const BFloat16*>(w.data) + first * K;
    return product<BFloat16Weights, NV, NA>(rows, K, a, data, panels, K * columns, c, c_stride, addend);
  }
  if (w.format == WeightFormat::float16) {
    const Half* data = static_cast<const Half*>(w.data) + first * K;
    return product<Float16Weights, NV, NA>(rows, K, a, data, panels, K * columns, c, c_stride, addend);
  }
  const int64_t depth = padded_depth<Int8>(K);
  const Int8* data = static_cast<const Int8*>(w.data) + first * depth;
  int32_t* sums = reinterpret_cast<int32_t*>(c);
  quantized.quantize(rows, K, a);
#if defined(FRNN_BYTE_DOTS)
  if (quantized.on_tiles(rows)) {
    quantized.by_tiles(columns, rows, depth, quantized.rows, data, panels, sums, c_stride);
  } else if (quantized.by_dots) {
    product<Int8ByDots, NV>(rows, depth, quantized.rows, data, panels, depth * columns, sums, c_stride, {});
  } else
#endif
    product<Int8, NV>(rows, depth, quantized.rows, data, panels, depth * columns, sums, c_stride, {});
  scale_sums<NV, NA>(rows, panels, quantized.scales, w.scales + first, w.column_sums + first, c, c_stride, addend);
}

// The same of all N columns in panels as ColumnPanels has them.
inline void product_stored_columns(int64_t rows, int64_t K, int64_t N, const float* const* a, const StoredWeights& w,
                                   float* c, int64_t c_stride, const QuantizedRows& quantized) {
  using P = ColumnPanels<float>;
  const int64_t vectors = P::padded_columns(N) / P::width, wide = vectors / P::NV, first = wide * P::NV * P::width;
  if (wide > 0) product_stored<P::NV, 0>(rows, K, a, w, 0, wide, c, c_stride, {}, quantized);
  switch (vectors % P::NV) {
    case 1: product_stored<1, 0>(rows, K, a, w, first, 1, c + first, c_stride, {}, quantized); break;
    case 2: product_stored<2, 0>(rows, K, a, w, first, 1, c + first, c_stride, {}, quantized); break;
    case 3: product_stored<3, 0>(rows, K, a, w, first, 1, c + first, c_stride, {}, quantized); break;
  }
}

// How many k stand side by side in a format.
constexpr int64_t group_of(WeightFormat format) { return format == WeightFormat::int8 ? 4 : 1; }

// Row `row` of K numbers of a matrix as column `column` of a panel of `columns`.
template <class T>
void pack_stored_row(const void* matrix, int64_t row, int64_t K, int64_t group, int64_t column, int64_t columns,
                     void* panel) {
  const T* from = static_cast<const T*>(matrix) + row * K;
  T* to = static_cast<T*>(panel) + column * group;
  for (int64_t k = 0; k < K; ++k) to[k / group * columns * group + k % group] = from[k];
}
inline void pack_stored_row(WeightFormat format, const void* matrix, int64_t row, int64_t K, int64_t column,
                            int64_t columns, void* panel) {
  if (format == WeightFormat::int8) {
    pack_stored_row<int8_t>(matrix, row, K, group_of(format), column, columns, panel);
  } else {
    pack_stored_row<uint16_t>(matrix, row, K, group_of(format), column, columns, panel);
  }
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
