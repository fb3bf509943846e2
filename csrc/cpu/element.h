// Storage types of the kernels and what each is accumulated in.
#pragma once

#include <cstdint>
#include <cstring>

namespace fused_rnn {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// Of a matrix of bytes, or of a row that was quantized.
struct Int8 {
  int8_t value;
};

template <class S>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

inline __attribute__((always_inline)) float to_float(Half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x0400u) {  // normal: rebias the exponent by 127 - 15
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: magnitude * 2^-24, exact in float
    value = float(magnitude) * 5.9604644775390625e-8f;
    memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even.
inline __attribute__((always_inline)) Half to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                                    // below 2^-14: let the float adder round
    float a;
    memcpy(&a, &magnitude, sizeof a);
    a += 0.5f;  // ulp of 0.5 is 2^-24, the spacing of subnormal halves
    uint32_t shifted;
    memcpy(&shifted, &a, sizeof shifted);
    return {uint16_t(sign | (shifted - 0x3f000000u))};
  }
  const uint32_t even = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {uint16_t(sign | ((even - (112u << 23)) >> 13))};
}

}  // namespace fused_rnn
