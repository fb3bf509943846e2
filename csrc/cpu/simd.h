// SIMD values on the vector extensions of GCC and Clang: one source for AVX-512, AVX2 and the portable build.
//
// Included only by the sources of one instruction set, which define before it
//   FRNN_ISA            the namespace of that instruction set's code (no two instruction sets share a symbol)
//   FRNN_VECTOR_BYTES   64, 32 or 16
// Everything here is always inlined, so that no function compiled for one instruction set can be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../cells/math.h"
#include "element.h"

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
typedef uint32_t WordLanes __attribute__((vector_size(FRNN_VECTOR_BYTES)));

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

  static FRNN_INLINE V splat(A x) { return V{} + x; }

  static FRNN_INLINE V load(const A* p) { return load_bytes<V>(p); }
  static FRNN_INLINE void store(A* p, V v) { store_bytes(p, v); }

  static FRNN_INLINE V load(const BFloat16* p) {
    return (V)(__builtin_convertvector(load_bytes<HalfLanes>(p), WordLanes) << 16);
  }
  static FRNN_INLINE void store(BFloat16* p, V v) { store_bytes(p, to_bfloat16(v)); }

  static FRNN_INLINE V load(const Half* p) {
#if FRNN_VECTOR_BYTES == 64
    // The unmasked form reads an undefined register, which GCC warns of.
    return (V)_mm512_maskz_cvtph_ps((__mmask16)0xffff, load_bytes<__m256i>(p));
#elif FRNN_VECTOR_BYTES == 32
    return (V)_mm256_cvtph_ps(load_bytes<__m128i>(p));
#else
    V v;
    for (int i = 0; i < width; ++i) v[i] = to_float(p[i]);
    return v;
#endif
  }
  static FRNN_INLINE void store(Half* p, V v) {
#if FRNN_VECTOR_BYTES == 64
    store_bytes(p, _mm512_maskz_cvtps_ph((__mmask16)0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif FRNN_VECTOR_BYTES == 32
    store_bytes(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
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

  // v as it reads back after it was stored as T.
  template <class T>
  static FRNN_INLINE V rounded(V v) {
    alignas(64) T lanes[width];
    store(lanes, v);
    return load(lanes);
  }

  // Round to nearest even; NaN becomes the quiet NaN.
  static FRNN_INLINE HalfLanes to_bfloat16(V v) {
    const WordLanes bits = (WordLanes)v;
    const WordLanes even = bits + 0x7fffu + ((bits >> 16) & 1u);
    const WordLanes result = v == v ? even : WordLanes{} + 0x7fc00000u;
    return __builtin_convertvector(result >> 16, HalfLanes);
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

}  // namespace FRNN_ISA

namespace detail {
template <class S, class Vector, class IntVector>
struct VectorLanes {
  using Scalar = S;
  using Int = IntVector;
  static FRNN_INLINE Int bits(Vector x) { return (Int)x; }
  static FRNN_INLINE Vector from_bits(Int i) { return (Vector)i; }
  template <class Mask>
  static FRNN_INLINE Vector select(Mask mask, Vector a, Vector b) {
    return mask ? a : b;
  }
};
}  // namespace detail

template <>
struct Lanes<FRNN_ISA::VectorTypes<float>::Vector>
    : detail::VectorLanes<float, FRNN_ISA::VectorTypes<float>::Vector, FRNN_ISA::VectorTypes<float>::Int> {};

template <>
struct Lanes<FRNN_ISA::VectorTypes<double>::Vector>
    : detail::VectorLanes<double, FRNN_ISA::VectorTypes<double>::Vector, FRNN_ISA::VectorTypes<double>::Int> {};

}  // namespace fused_rnn
