// Gates of 16-bit and TF32 layers: float32 with sigmoid and tanh from the hardware's exponential and reciprocal.
//
// The functions of cells/math.h are right to 2 ulp of float32 and take some 40 instructions each. These take 4 and 11,
// without a branch, and are right to a few 1e-7 (tanh: 2e-6 relative just above |x| = 0.12, calculated from the
// manual's bounds of both instructions), far below what rounding to 16 bits or a product in TF32 loses. In a persistent
// kernel their latency, and for wide batches their issue slots, stand in every step.
#pragma once

#include "../cells/math.h"
#include "device.h"

namespace fused_rnn {

namespace cuda {

struct Approximate {
  float value;

  FRNN_HOST_DEVICE Approximate() : value(0) {}
  FRNN_HOST_DEVICE Approximate(float x) : value(x) {}
  FRNN_HOST_DEVICE explicit operator float() const { return value; }
  friend FRNN_HOST_DEVICE Approximate operator+(Approximate a, Approximate b) { return a.value + b.value; }
  friend FRNN_HOST_DEVICE Approximate operator-(Approximate a, Approximate b) { return a.value - b.value; }
  friend FRNN_HOST_DEVICE Approximate operator*(Approximate a, Approximate b) { return a.value * b.value; }
  FRNN_HOST_DEVICE Approximate operator-() const { return -value; }
  friend FRNN_HOST_DEVICE bool operator<=(Approximate a, Approximate b) { return a.value <= b.value; }
  friend FRNN_HOST_DEVICE bool operator>(Approximate a, Approximate b) { return a.value > b.value; }
};

}  // namespace cuda

template <>
struct Lanes<cuda::Approximate> {
  using Scalar = cuda::Approximate;
  static FRNN_HOST_DEVICE Scalar select(bool mask, Scalar a, Scalar b) { return mask ? a : b; }
};

template <>
FRNN_HOST_DEVICE cuda::Approximate sigmoid<cuda::Approximate>(cuda::Approximate x) {
  return cuda::approximate_reciprocal(1.0f + cuda::approximate_exp(-x.value));
}

// 1 - 2 / (1 + e^2x) loses what is small beside 1, so that small x have their series.
template <>
FRNN_HOST_DEVICE cuda::Approximate tanh<cuda::Approximate>(cuda::Approximate x) {
  const float large = 1.0f - 2.0f * cuda::approximate_reciprocal(1.0f + cuda::approximate_exp(2.0f * x.value));
  const float square = x.value * x.value;
  const float series = x.value + x.value * square * (square * 0.13333333f - 0.33333333f);
  return square < 0.0144f ? series : large;
}

}  // namespace fused_rnn
