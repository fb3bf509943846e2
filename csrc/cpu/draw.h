// The bits of cells/draw.h for whole rows, a vector of words at a time.
#pragma once

#include "../cells/draw.h"
#include "simd.h"

namespace fused_rnn {
namespace FRNN_ISA {

// One bit for each lane that is not zero in all its bits.
FRNN_INLINE uint32_t bits_of_lanes(WordLanes all_or_nothing) {
#if FRNN_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)all_or_nothing);
#elif FRNN_VECTOR_BYTES == 32
  return uint32_t(_mm256_movemask_ps((__m256)all_or_nothing));
#elif defined(FRNN_NEON)
  return vaddvq_u32((uint32x4_t)(all_or_nothing & WordLanes{1, 2, 4, 8}));
#else
  uint32_t bits = 0;
  for (size_t l = 0; l < sizeof(WordLanes) / 4; ++l) bits |= (all_or_nothing[l] & 1u) << l;
  return bits;
#endif
}

// Rows [first_row, first_row + rows) of (units + 7) / 8 bytes each: bit u % 8 of byte u / 8 is unit u's, and 1 with
// probability rate; those behind the last unit are 0.
inline void draw_bits(uint64_t seed, int64_t first_row, int64_t rows, int64_t units, double rate, uint8_t* bits) {
  constexpr int lanes = sizeof(WordLanes) / 4;
  const int64_t bytes = (units + 7) / 8;
  const DrawThreshold threshold(rate);
  WordLanes number;
  for (int l = 0; l < lanes; ++l) number[l] = uint32_t(l);
  for (int64_t r = 0; r < rows; ++r, bits += bytes) {
    const RowOfDraws row(seed, first_row + r);
    uint32_t word = 0;
    for (int64_t u = 0; u < bytes * 8; u += lanes) {
      const WordLanes drawn = row.drawn<WordLanes>(number + uint32_t(u));
      uint32_t ones = threshold.all ? 0xffffffffu : bits_of_lanes((WordLanes)(drawn < threshold.below));
      const int64_t left = units - u;
      if (left < lanes) ones &= left <= 0 ? 0u : (1u << left) - 1u;
      if constexpr (lanes >= 8) {
        for (int byte = 0; byte < lanes / 8 && u / 8 + byte < bytes; ++byte)
          bits[u / 8 + byte] = uint8_t(ones >> (8 * byte));
      } else {
        const int shift = int(u % 8);
        word = shift == 0 ? ones & ((1u << lanes) - 1u) : word | (ones & ((1u << lanes) - 1u)) << shift;
        if (shift + lanes == 8) bits[u / 8] = uint8_t(word);
      }
    }
  }
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
