// What the multiply-add units of one thread reach at best, to which benchmarks compare the rates of layers.
#pragma once

#include <chrono>

#include "product.h"

namespace fused_rnn {
namespace FRNN_ISA {

// Floating-point operations a second, a multiply-add being two: independent chains of the instruction that products of
// type E are made of, all in registers, for about `seconds`.
template <class E>
double multiply_add_rate(double seconds) {
  using V = typename Operand<E>::V;
  using Clock = std::chrono::steady_clock;
  // Two units of latency 4 need 8 chains, and more where a multiply-add is two instructions; 14 and the two operands
  // fill the registers of AVX2. Four units (Arm) need 16.
  constexpr int chains = independent_sums > 8 ? 24 : 14;
  constexpr int64_t repeats = 4096;  // some microseconds between looks at the clock
  constexpr double operations = 2.0 * chains * Operand<E>::group * Simd<typename Operand<E>::Acc>::width;

  // A value that the compiler does not know. The sums stay at 1, with the dot product at 0.5.
  volatile typename Operand<E>::Acc scale = 0.5;
  volatile typename Operand<E>::Acc sink;
  V sums[chains];
  for (V& sum : sums) sum = V{} + scale;
  [[maybe_unused]] const V half = V{} + scale;
  [[maybe_unused]] const typename Operand<E>::Columns zero{};

  int64_t rounds = 0;
  const Clock::time_point start = Clock::now();
  double elapsed;
  do {
    for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 24
      for (int c = 0; c < chains; ++c) {
        if constexpr (Operand<E>::group == 1) {
          sums[c] = sums[c] * half + half;
        } else {
          sums[c] = Operand<E>::multiply_add(sums[c], zero, zero);
        }
      }
    }
    ++rounds;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  for (const V& sum : sums) sink = sum[0];
  (void)sink;
  return operations * double(rounds * repeats) / elapsed;
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
