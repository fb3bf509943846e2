// Zoneout (Krueger et al. 2017) of one unit, in the kernels of a step and in those of all steps.
#pragma once

#include "device.h"

namespace fused_rnn {
namespace cuda {

// By a bit that was drawn, or all units to the extent of a rate.
template <class A>
struct Zone {
  bool drawn, kept;
  A rate;

  FRNN_DEVICE Zone(bool drawn, bool kept, A rate) : drawn(drawn), kept(kept), rate(rate) {}
  FRNN_DEVICE Zone(const uint8_t* bits, double rate, int64_t row, int64_t unit, int64_t units)
      : drawn(bits), kept(bits && (bits[row * ((units + 7) / 8) + unit / 8] >> (unit % 8) & 1)), rate(A(rate)) {}

  FRNN_DEVICE A applied(A next, A before) const {
    if (drawn) return kept ? before : next;
    return rate > 0 ? (A(1) - rate) * next + rate * before : next;
  }
  // A gradient's part that goes to the step's own result, and the rest, which goes to the state before.
  FRNN_DEVICE void divide(A& own, A& before) const {
    const A all = own;
    if (drawn) {
      own = kept ? A(0) : all;
      before = kept ? all : A(0);
    } else {
      own = rate > 0 ? (A(1) - rate) * all : all;
      before = rate * all;
    }
  }
};

}  // namespace cuda
}  // namespace fused_rnn
