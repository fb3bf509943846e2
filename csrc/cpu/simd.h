// SIMD values on the vector extensions of GCC and Clang: one source for AVX-512, AVX2, NEON and the portable build.
//
// Included only by the sources of one instruction set, which define before it
//   FRNN_ISA            the namespace of that instruction set's code (no two instruction sets share a symbol)
//   FRNN_VECTOR_BYTES   64, 32 or 16
//   FRNN_NEON           where they are NEON's, of 16 bytes, and may use what it has beyond the extensions
// Everything here is always inlined, so that no function compiled for one instruction set can be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(FRNN_NEON)
#include <arm_neon.h>
#endif

#include "../cells/math.h"
#include "element.h"

// Whether bfloat16 is multiplied as it is: two k at a time, summed as float32.
#if defined(FRNN_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FRNN_NEON_DOTS
#endif

#define FRNN_INLINE inline __attribute__((always_inline))

namespace fused_rnn {
namespace FRNN_ISA {

template <class Scalar>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  typedef float Vector __attribute__((vector_size(FRNN_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(FRNN_VECTOR_BYTES)));
};

template <>
struct VectorTypes<double> {
  typedef double Vector __attribute__((vector_size(FRNN_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(FRNN_VECTOR_BYTES)));
};

typedef uint16_t HalfLanes __attribute__((vector_size(FRNN_VECTOR_BYTES / 2)));
typedef uint16_t HalfWords __attribute__((vector_size(FRNN_VECTOR_BYTES)));
typedef uint32_t WordLanes __attribute__((vector_size(FRNN_VECTOR_BYTES)));
typedef int32_t SignedWords __attribute__((vector_size(FRNN_VECTOR_BYTES)));

template <class V>
FRNN_INLINE V load_bytes(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
FRNN_INLINE void store_bytes(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Vectors of the accumulation type A (float or double), loaded from and stored to any storage type.
template <class A>
struct Simd {
  using V = typename VectorTypes<A>::Vector;
  using Int = typename VectorTypes<A>::Int;
  static constexpr int width = FRNN_VECTOR_BYTES / sizeof(A);

  // x - 0 is x, also for -0, so this is one broadcast from memory; 0 + x would be an addition and a shuffle.
  static FRNN_INLINE V splat(A x) { return x - V{}; }

  static FRNN_INLINE V load(const A* p) { return load_bytes<V>(p); }
  static FRNN_INLINE void store(A* p, V v) { store_bytes(p, v); }

  static FRNN_INLINE V load(const BFloat16* p) {
#if defined(FRNN_NEON)
    return (V)vshll_n_u16(load_bytes<uint16x4_t>(p), 16);
#else
    return (V)(__builtin_convertvector(load_bytes<HalfLanes>(p), WordLanes) << 16);
#endif
  }
  static FRNN_INLINE void store(BFloat16* p, V v) { store_bytes(p, to_bfloat16(v)); }

  static FRNN_INLINE V load(const Half* p) {
#if FRNN_VECTOR_BYTES == 64
    // The unmasked form reads an undefined register, which GCC warns of.
    return (V)_mm512_maskz_cvtph_ps((__mmask16)0xffff, load_bytes<__m256i>(p));
#elif FRNN_VECTOR_BYTES == 32
    return (V)_mm256_cvtph_ps(load_bytes<__m128i>(p));
#elif defined(FRNN_NEON)
    return (V)vcvt_f32_f16((float16x4_t)load_bytes<HalfLanes>(p));
#else
    // to_float(), of all lanes at once.
    const SignedWords half = __builtin_convertvector(load_bytes<HalfLanes>(p), SignedWords), magnitude = half & 0x7fff;
    const SignedWords shifted = magnitude << 13;
    const SignedWords subnormal = (SignedWords)(__builtin_convertvector(magnitude, V) * 5.9604644775390625e-8f);
    const SignedWords finite = magnitude < 0x0400 ? subnormal : shifted + (112 << 23);
    const SignedWords value = magnitude < 0x7c00 ? finite : shifted | 0x7f800000;
    return (V)(value | (half & 0x8000) << 16);
#endif
  }
  static FRNN_INLINE void store(Half* p, V v) {
#if FRNN_VECTOR_BYTES == 64
    store_bytes(p, _mm512_maskz_cvtps_ph((__mmask16)0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif FRNN_VECTOR_BYTES == 32
    store_bytes(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(FRNN_NEON)
    store_bytes(p, vcvt_f16_f32((float32x4_t)v));
#else
    for (int i = 0; i < width; ++i) p[i] = to_half(v[i]);
#endif
  }

  // The first n lanes, 0 < n <= width; the others are zero, and their memory is not touched.
  template <class T>
  static FRNN_INLINE V load_n(const T* p, int64_t n) {
    if (__builtin_expect(n >= width, 1)) return load(p);
    alignas(64) T lanes[width];
    for (int i = 0; i < width; ++i) lanes[i] = i < n ? p[i] : T{};
    return load(lanes);
  }
  template <class T>
  static FRNN_INLINE void store_n(T* p, V v, int64_t n) {
    if (__builtin_expect(n >= width, 1)) return store(p, v);
    alignas(64) T lanes[width];
    store(lanes, v);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }

  // A store past the caches, of a whole line: p is aligned to a vector, which is a cache line.
  static FRNN_INLINE void store_past_caches(A* p, V v) {
#if FRNN_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#else
    store(p, v);
#endif
  }

  // Two vectors to a line of bfloat16, to which p is aligned, past the caches.
  static FRNN_INLINE void store_past_caches(BFloat16* p, V v, V next) {
#if FRNN_VECTOR_BYTES == 64
    // The unmasked forms, casts among them, read an undefined register, which GCC warns of.
    __m512i line = _mm512_maskz_inserti64x4((__mmask8)0xff, _mm512_setzero_si512(), (__m256i)to_bfloat16(v), 0);
    line = _mm512_maskz_inserti64x4((__mmask8)0xff, line, (__m256i)to_bfloat16(next), 1);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
#else
    store(p, v);
    store(p + width, next);
#endif
  }

  // v as it reads back after it was stored as T.
  template <class T>
  static FRNN_INLINE V rounded(V v) {
    alignas(64) T lanes[width];
    store(lanes, v);
    return load(lanes);
  }

  // Round to nearest even; NaN becomes the quiet NaN.
  static FRNN_INLINE HalfLanes to_bfloat16(V v) {
#if defined(__AVX512BF16__)
    return (HalfLanes)_mm512_cvtneps_pbh((__m512)v);  // subnormal numbers become 0, as in the dot product
#elif defined(FRNN_NEON_DOTS)
    return (HalfLanes)vcvt_bf16_f32((float32x4_t)v);  // in a task subnormal numbers become 0
#else
    const WordLanes bits = (WordLanes)v;
    const WordLanes even = bits + 0x7fffu + ((bits >> 16) & 1u);
    const WordLanes result = v == v ? even : WordLanes{} + 0x7fc00000u;
    return __builtin_convertvector(result >> 16, HalfLanes);
#endif
  }
};

template <>
template <>
FRNN_INLINE Simd<float>::V Simd<float>::rounded<float>(V v) {
  return v;
}

template <>
template <>
FRNN_INLINE Simd<double>::V Simd<double>::rounded<double>(V v) {
  return v;
}

#if FRNN_VECTOR_BYTES == 64
template <>
template <>
FRNN_INLINE Simd<float>::V Simd<float>::load_n<float>(const float* p, int64_t n) {
  if (__builtin_expect(n >= width, 1)) return load(p);
  return (V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
}
template <>
template <>
FRNN_INLINE void Simd<float>::store_n<float>(float* p, V v, int64_t n) {
  if (__builtin_expect(n >= width, 1)) return store(p, v);
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), (__m512)v);
}
#endif

// Orders stores past the caches before whatever another thread is told afterwards.
FRNN_INLINE void wait_for_stores_past_caches() {
#if FRNN_VECTOR_BYTES == 64
  _mm_sfence();
#endif
}

// Several vectors as one value. A gate formula is a long chain of dependent operations; applied to a Pack, the chains
// of N vectors run interleaved and hide each other's latency. rough: tanh and sigmoid may be as inexact as bfloat16
// lets pass.
template <class V, int N, bool rough = false>
struct Pack {
  V v[N];
};

// Whether the gates of layers that store S are computed roughly.
template <class S>
inline constexpr bool rough_gates = std::is_same_v<S, BFloat16>;

#define FRNN_PACK_EACH(result_type, expression)                                     \
  Pack<result_type, N, rough> result;                                               \
  _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i) { result.v[i] = expression; } \
  return result;

#define FRNN_PACK_OPERATOR(op)                                                            \
  template <class V, int N, bool rough>                                                   \
  FRNN_INLINE auto operator op(const Pack<V, N, rough>& a, const Pack<V, N, rough>& b) {  \
    using R = decltype(a.v[0] op b.v[0]);                                                 \
    FRNN_PACK_EACH(R, a.v[i] op b.v[i])                                                   \
  }                                                                                       \
  template <class V, int N, bool rough>                                                   \
  FRNN_INLINE auto operator op(const Pack<V, N, rough>& a, decltype(V{}[0] + V{}[0]) b) { \
    using R = decltype(a.v[0] op b);                                                      \
    FRNN_PACK_EACH(R, a.v[i] op b)                                                        \
  }                                                                                       \
  template <class V, int N, bool rough>                                                   \
  FRNN_INLINE auto operator op(decltype(V{}[0] + V{}[0]) a, const Pack<V, N, rough>& b) { \
    using R = decltype(a op b.v[0]);                                                      \
    FRNN_PACK_EACH(R, a op b.v[i])                                                        \
  }
FRNN_PACK_OPERATOR(+)
FRNN_PACK_OPERATOR(-)
FRNN_PACK_OPERATOR(*)
FRNN_PACK_OPERATOR(/)
FRNN_PACK_OPERATOR(&)
FRNN_PACK_OPERATOR(|)
FRNN_PACK_OPERATOR(<)
FRNN_PACK_OPERATOR(>)
FRNN_PACK_OPERATOR(<=)
#undef FRNN_PACK_OPERATOR

template <class V, int N, bool rough>
FRNN_INLINE Pack<V, N, rough> operator-(const Pack<V, N, rough>& a) {
  FRNN_PACK_EACH(V, -a.v[i])
}
template <class V, int N, bool rough>
FRNN_INLINE Pack<V, N, rough> operator~(const Pack<V, N, rough>& a) {
  FRNN_PACK_EACH(V, ~a.v[i])
}
template <class V, int N, bool rough>
FRNN_INLINE Pack<V, N, rough> operator<<(const Pack<V, N, rough>& a, int bits) {
  FRNN_PACK_EACH(V, a.v[i] << bits)
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn

#include "activations.h"

namespace fused_rnn {
namespace detail {
template <class S, class Vector, class IntVector>
struct VectorLanes {
  using Scalar = S;
  using Int = IntVector;
  static constexpr bool own_activations = false;
  static FRNN_INLINE Int bits(Vector x) { return (Int)x; }
  static FRNN_INLINE Vector from_bits(Int i) { return (Vector)i; }
  template <class Mask>
  static FRNN_INLINE Vector select(Mask mask, Vector a, Vector b) {
    return mask ? a : b;
  }
  static FRNN_INLINE Int shift_right(Int i, int n) { return i >> n; }
  static FRNN_INLINE Vector times_power(Vector x, Vector n) { return plain_times_power(x, n); }
  static FRNN_INLINE Vector quotient(Vector a, Vector a_low, Vector b, Vector b_low) {
    return plain_quotient(a, a_low, b, b_low);
  }
};
}  // namespace detail

template <>
struct Lanes<FRNN_ISA::VectorTypes<float>::Vector>
    : detail::VectorLanes<float, FRNN_ISA::VectorTypes<float>::Vector, FRNN_ISA::VectorTypes<float>::Int> {
  using V = FRNN_ISA::VectorTypes<float>::Vector;
#if FRNN_VECTOR_BYTES == 32
  // The quotient from an approximate reciprocal: the residual of a first result, exact thanks to fma, corrects both
  // that and the low parts. Half the time of a division, and one rounding less.
  static FRNN_INLINE V quotient(V a, V a_low, V b, V b_low) {
    const V guess = (V)_mm256_rcp_ps((__m256)b);
    const V reciprocal = guess + guess * (1.0f - guess * b);
    const V q = a * reciprocal;
    const V residual = (a - q * b) + (a_low - q * b_low);
    return q + residual * reciprocal;
  }
#elif defined(FRNN_NEON)
  // As above; the first reciprocal has 8 bits, the next one 16.
  static FRNN_INLINE V quotient(V a, V a_low, V b, V b_low) {
    const V guess = (V)vrecpeq_f32((float32x4_t)b);
    const V reciprocal = guess * (V)vrecpsq_f32((float32x4_t)guess, (float32x4_t)b);
    const V q = a * reciprocal;
    const V residual = (a - q * b) + (a_low - q * b_low);
    return q + residual * reciprocal;
  }
#elif FRNN_VECTOR_BYTES == 64
  static constexpr bool own_activations = true;
  static FRNN_INLINE V tanh(V x) { return FRNN_ISA::tanh_by_table(x); }
  static FRNN_INLINE V sigmoid(V x) { return FRNN_ISA::sigmoid_by_exponential(x); }
  static FRNN_INLINE V rough_tanh(V x) { return FRNN_ISA::rough_tanh_by_table(x); }
  static FRNN_INLINE V rough_sigmoid(V x) { return FRNN_ISA::rough_sigmoid(x); }
#endif
};

template <>
struct Lanes<FRNN_ISA::VectorTypes<double>::Vector>
    : detail::VectorLanes<double, FRNN_ISA::VectorTypes<double>::Vector, FRNN_ISA::VectorTypes<double>::Int> {};

template <class V, int N, bool rough>
struct Lanes<FRNN_ISA::Pack<V, N, rough>> {
  using P = FRNN_ISA::Pack<V, N, rough>;
  using One = Lanes<V>;
  using Scalar = typename One::Scalar;
  using Int = FRNN_ISA::Pack<typename One::Int, N, rough>;
  static constexpr bool own_activations = One::own_activations;
  template <class R, class F>
  static FRNN_INLINE FRNN_ISA::Pack<R, N, rough> each(F f) {
    FRNN_ISA::Pack<R, N, rough> result;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) result.v[i] = f(i);
    return result;
  }
  static FRNN_INLINE P tanh(const P& x) {
    return each<V>([&](int i)
                       __attribute__((always_inline)) { return rough ? One::rough_tanh(x.v[i]) : One::tanh(x.v[i]); });
  }
  static FRNN_INLINE P sigmoid(const P& x) {
    return each<V>([&](int i) __attribute__((always_inline)) {
      return rough ? One::rough_sigmoid(x.v[i]) : One::sigmoid(x.v[i]);
    });
  }
  static FRNN_INLINE Int bits(const P& x) {
    return each<typename One::Int>([&](int i) __attribute__((always_inline)) { return One::bits(x.v[i]); });
  }
  static FRNN_INLINE P from_bits(const Int& x) {
    return each<V>([&](int i) __attribute__((always_inline)) { return One::from_bits(x.v[i]); });
  }
  template <class Mask>
  static FRNN_INLINE P select(const Mask& mask, const P& a, const P& b) {
    return each<V>([&](int i) __attribute__((always_inline)) { return One::select(mask.v[i], a.v[i], b.v[i]); });
  }
  static FRNN_INLINE Int shift_right(const Int& x, int n) {
    return each<typename One::Int>([&](int i) __attribute__((always_inline)) { return One::shift_right(x.v[i], n); });
  }
  static FRNN_INLINE P times_power(const P& x, const P& n) {
    return each<V>([&](int i) __attribute__((always_inline)) { return One::times_power(x.v[i], n.v[i]); });
  }
  static FRNN_INLINE P quotient(const P& a, const P& a_low, const P& b, const P& b_low) {
    return each<V>(
        [&](int i) __attribute__((always_inline)) { return One::quotient(a.v[i], a_low.v[i], b.v[i], b_low.v[i]); });
  }
};

}  // namespace fused_rnn
