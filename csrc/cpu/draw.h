// Bits that are 1 with a given probability, from a seed and their place alone: the same on any number of threads and
// any instruction set.
//
// Each row has two words from the seed and its number (splitmix64). A unit's word is its number plus the one, mixed by
// multiplications and shifts (the function that Wellons found by search, whose bias is the lowest known of such), with
// the other added, and mixed again.
#pragma once

#include "simd.h"

namespace fused_rnn {
namespace FRNN_ISA {

FRNN_INLINE uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

FRNN_INLINE WordLanes mixed(WordLanes x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// One bit for each lane that is not zero in all its bits.
FRNN_INLINE uint32_t bits_of_lanes(WordLanes all_or_nothing) {
#if FRNN_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)all_or_nothing);
#elif FRNN_VECTOR_BYTES == 32
  return uint32_t(_mm256_movemask_ps((__m256)all_or_nothing));
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
  const double scaled = rate * 4294967296.0 + 0.5;
  const bool all = scaled >= 4294967296.0;
  const uint32_t threshold = all ? 0 : uint32_t(scaled);
  WordLanes number;
  for (int l = 0; l < lanes; ++l) number[l] = uint32_t(l);
  for (int64_t r = 0; r < rows; ++r, bits += bytes) {
    const uint64_t key = mixed(seed ^ mixed(uint64_t(first_row + r)));
    const uint32_t first = uint32_t(key), second = uint32_t(key >> 32);
    uint32_t word = 0;
    for (int64_t u = 0; u < bytes * 8; u += lanes) {
      const WordLanes drawn = mixed(mixed(number + (uint32_t(u) + first)) + second);
      uint32_t ones = all ? 0xffffffffu : bits_of_lanes((WordLanes)(drawn < threshold));
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
