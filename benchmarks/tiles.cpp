// The rate of the micro-kernel alone, tile by tile: rows of a state times packed weights, as one step of a layer does.
//
//   FLAGS="-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -fno-math-errno -fno-trapping-math"
//   g++ -std=c++17 -O3 $FLAGS -DFRNN_VECTOR_BYTES=64 -Icsrc benchmarks/tiles.cpp -o build/tiles && build/tiles
//
// With -DFRNN_VECTOR_BYTES=32 and without the AVX-512 flags: AVX2; 16 and without -m flags: portable. -DELEMENT=double:
// float64. Prints GFLOP/s of one thread, the best of 30 steps.
#define FRNN_ISA tiles
#pragma GCC diagnostic ignored "-Wignored-attributes"

#include <chrono>
#include <cstdio>
#include <vector>

#include "cpu/pack.h"

#if !defined(ELEMENT)
#define ELEMENT float
#endif

using namespace fused_rnn;
using namespace fused_rnn::tiles;
using Element = ELEMENT;

template <int NV>
double rate(int64_t rows, int64_t H, int64_t gates) {
  constexpr int64_t columns = NV * Simd<Element>::width;
  const int64_t panels = gates * H / columns;
  std::vector<Element> state(rows * (H + 16), Element(0.01)), weights(panels * columns * H, Element(0.001));
  std::vector<Element> sums(rows * columns);
  std::vector<const Element*> a(rows);
  for (int64_t r = 0; r < rows; ++r) a[r] = state.data() + r * (H + 16);
  double best = 0;
  for (int repeat = 0; repeat < 30; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t p = 0; p < panels; ++p)
      product<Element, NV>(rows, H, a.data(), weights.data() + p * columns * H, 1, columns * H, sums.data(), columns,
                           {});
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const double gflops = 2.0 * rows * panels * columns * H / seconds / 1e9;
    if (gflops > best) best = gflops;
  }
  return best;
}

int main() {
  std::printf("%6s %6s %10s %10s %10s %10s\n", "rows", "H", "4 vectors", "3 vectors", "2 vectors", "1 vector");
  for (const int64_t H : {64, 256, 512, 1024}) {
    for (const int64_t rows : {1, 2, 4, 8, 16, 32, 48})
      std::printf("%6d %6d %10.0f %10.0f %10.0f %10.0f\n", int(rows), int(H), rate<4>(rows, H, 4), rate<3>(rows, H, 3),
                  rate<2>(rows, H, 1), rate<1>(rows, H, 1));
  }
}
