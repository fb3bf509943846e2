// Bits that are 1 with a given probability, from a seed and their place alone: the same on any number of threads, any
// instruction set, and on a GPU.
//
// Each row has two words from the seed and its number (splitmix64). A unit's word is its number plus the one, mixed by
// multiplications and shifts (the function that Wellons found by search, whose bias is the lowest known of such), with
// the other added, and mixed again.
#pragma once

#include "../problem.h"

namespace fused_rnn {

FRNN_HOST_DEVICE uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Word: uint32_t, or a vector of such.
template <class Word>
FRNN_HOST_DEVICE Word mixed_words(Word x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// What the draws of a row begin from.
struct RowOfDraws {
  uint32_t first, second;

  FRNN_HOST_DEVICE RowOfDraws(uint64_t seed, int64_t row) {
    const uint64_t key = mixed(seed ^ mixed(uint64_t(row)));
    first = uint32_t(key);
    second = uint32_t(key >> 32);
  }
  // number: of the unit.
  template <class Word>
  FRNN_HOST_DEVICE Word drawn(Word number) const {
    return mixed_words<Word>(mixed_words<Word>(number + first) + second);
  }
};

// Words below it are 1 with probability `rate`; `all` where that is every word.
struct DrawThreshold {
  bool all;
  uint32_t below;

  FRNN_HOST_DEVICE explicit DrawThreshold(double rate) {
    const double scaled = rate * 4294967296.0 + 0.5;
    all = scaled >= 4294967296.0;
    below = all ? 0 : uint32_t(scaled);
  }
};

}  // namespace fused_rnn
