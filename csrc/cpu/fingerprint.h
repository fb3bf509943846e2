// Fingerprints of weights: for each block of 4 KiB four sums of 64 bits, each the hash NH (Black, Halevi, Krawczyk,
// Krovetz and Rogaway, UMAC, 1999): pairs of 32-bit words plus random numbers, multiplied. For any two blocks that
// differ, whatever they are, one sum is the same with probability 2^-32 over the random numbers, all four (with the
// numbers shifted from one to the next) with 2^-128.
//
// No sum depends on the lanes' order, but blocks are compared only with those of the same instruction set anyway.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#if defined(FRNN_ISA)
#include "simd.h"
#endif

namespace fused_rnn {

inline constexpr int64_t fingerprint_block = 4096;  // bytes
inline constexpr int fingerprint_sums = 4;
// One for every word of a block, and the shifts by 64 bytes.
inline constexpr int64_t fingerprint_key_words = (fingerprint_block + (fingerprint_sums - 1) * 64) / 4;

FRNN_HOST_DEVICE constexpr int64_t fingerprint_blocks(int64_t bytes) {
  return (bytes + fingerprint_block - 1) / fingerprint_block;
}

#if defined(FRNN_ISA)
namespace FRNN_ISA {

typedef uint32_t Words __attribute__((vector_size(FRNN_VECTOR_BYTES)));
typedef uint64_t Pairs __attribute__((vector_size(FRNN_VECTOR_BYTES)));

// The product of the two words of every pair.
FRNN_INLINE Pairs multiply_pairs(Words w) {
  const Pairs pairs = (Pairs)w;
#if defined(__AVX512F__)
  // GCC 12 warns of the form without a mask.
  return (Pairs)_mm512_maskz_mul_epu32(0xff, (__m512i)pairs, (__m512i)(pairs >> 32));
#elif defined(__AVX2__)
  return (Pairs)_mm256_mul_epu32((__m256i)pairs, (__m256i)(pairs >> 32));
#elif defined(__SSE2__)
  return (Pairs)_mm_mul_epu32((__m128i)pairs, (__m128i)(pairs >> 32));
#elif defined(FRNN_NEON)
  return (Pairs)vmull_u32(vmovn_u64((uint64x2_t)pairs), vshrn_n_u64((uint64x2_t)pairs, 32));
#else
  return (pairs & 0xffffffffu) * (pairs >> 32);
#endif
}

// The fingerprint of one block.
inline void fingerprint(const char* block, const uint32_t* key, uint64_t* sums) {
  Pairs acc[fingerprint_sums] = {};
  for (int64_t i = 0; i < fingerprint_block; i += FRNN_VECTOR_BYTES) {
    const Words words = load_bytes<Words>(block + i);
#pragma GCC unroll 4
    for (int s = 0; s < fingerprint_sums; ++s)
      acc[s] += multiply_pairs(words + load_bytes<Words>(reinterpret_cast<const char*>(key) + i + s * 64));
  }
  for (int s = 0; s < fingerprint_sums; ++s) {
    sums[s] = 0;
    for (size_t lane = 0; lane < sizeof(Pairs) / 8; ++lane) sums[s] += acc[s][lane];
  }
}

// That of block `index` of `bytes` of data; the last one is filled up with zeros.
inline void fingerprint_of(const void* data, int64_t bytes, int64_t index, const uint32_t* key, uint64_t* sums) {
  const char* block = static_cast<const char*>(data) + index * fingerprint_block;
  const int64_t left = bytes - index * fingerprint_block;
  if (left >= fingerprint_block) return fingerprint(block, key, sums);
  alignas(64) char padded[fingerprint_block] = {};
  __builtin_memcpy(padded, block, size_t(left));
  fingerprint(padded, key, sums);
}

}  // namespace FRNN_ISA
#endif

}  // namespace fused_rnn
