// Every kernel of device_functions.cuh as nvcc translated it (the file of environment variable FRNN_PTX), against what
// g++ made of it: the same words. Exit status 1: not the same.
#include <cmath>
#include <cstdio>
#include <random>

#include "device_functions.cuh"
#include "engine.h"
#include "ptx.h"

using namespace fused_rnn;
using namespace fused_rnn::cuda_host;

namespace {

using Kernel = void (*)(const uint32_t*, uint32_t*);

struct Test {
  const char* name;
  Kernel kernel;
  Launch shape;
  bool approximate = false;
  uint32_t (*word)(std::mt19937& random, int k) = nullptr;  // the k-th of a thread; null: any
};

Launch shape(int threads, int blocks = 1, int cluster = 1) {
  Launch l;
  l.grid_x = blocks;
  l.threads = threads;
  l.cluster = cluster;
  l.shared_bytes = 32768;
  return l;
}

// All kinds of float32: any bits, halfway between two narrower numbers, near the ends of the narrower ranges.
uint32_t any_float(std::mt19937& random, int) {
  const uint32_t bits = uint32_t(random());
  switch (random() % 6) {
    case 0: return (bits & ~0xffffu) | 0x8000u;
    case 1: return (bits & ~0x1fffu) | 0x1000u;
    case 2: return (bits & 0x83ffffffu) | (random() % 2 ? 0x38000000u : 0x33000000u);
    case 3: return (bits & 0x80000000u) | 0x7f800000u | (random() % 2 ? bits & 0x7fffffu : 0);
    case 4: return (bits & 0x807fffffu) | uint32_t(100 + random() % 60) << 23;
    default: return bits;
  }
}

uint32_t moderate_float(std::mt19937& random, int) {
  const float x = float(int(random() % 4001) - 2000) / 100;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Small whole numbers, whose sums are exact in any order.
template <class S>
uint32_t small_pair(std::mt19937& random, int) {
  const float low = float(int(random() % 17) - 8), high = float(int(random() % 17) - 8);
  return pack<S>(low, high);
}
uint32_t small_float(std::mt19937& random, int) {
  const float x = float(int(random() % 17) - 8);
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

bool agree(const Test& test, uint32_t a, uint32_t b) {
  if (a == b || (is_nan(a) && is_nan(b))) return true;
  if (!test.approximate) return false;
  float x, y;
  memcpy(&x, &a, sizeof x);
  memcpy(&y, &b, sizeof y);
  return std::fabs(x - y) <= 4e-6f * std::fabs(y);  // e^20, and what its exponent was rounded by
}

}  // namespace

int main() {
  translated();
  Launch together = shape(64, 4);
  together.cooperative = true;
  Launch spread = shape(64, 3);
  spread.grid_y = 2;
  spread.grid_z = 2;
  const Test tests[] = {
      {"places", places, spread},
      {"conversions", conversions, shape(1024, 4), false, any_float},
      {"approximations", approximations, shape(256), true, moderate_float},
      {"predicates", predicates, shape(64)},
      {"exchange_in_warp", exchange_in_warp, shape(64), false, moderate_float},
      {"product_bfloat16", product_bfloat16, shape(32), false, small_pair<BFloat16>},
      {"product_float16", product_float16, shape(32), false, small_pair<Half>},
      {"product_tf32", product_tf32, shape(32), false, small_float},
      {"matrices", matrices, shape(32)},
      {"copies", copies, shape(64)},
      {"global_accesses", global_accesses, shape(64)},
      {"named_barriers", named_barriers, shape(64)},
      {"grid_barriers", grid_barriers, together},
      {"clusters", clusters, shape(32, 8, 4)},
  };
  int wrong = 0;
  for (const Test& test : tests) {
    for (uint64_t seed = 0; seed < 6; ++seed) {
      Launch l = test.shape;
      l.seed = seed;
      std::mt19937 random(unsigned(seed) + 1);
      const size_t threads = size_t(l.grid_x) * size_t(l.threads);
      struct alignas(16) Line {
        uint32_t word[4];
      };
      std::vector<Line> in(threads * words_in / 4 + 1), out[2];
      for (size_t n = 0; n < threads * words_in; ++n)
        in[n / 4].word[n % 4] = test.word ? test.word(random, int(n % words_in)) : uint32_t(random());
      try {
        for (int k = 0; k < 2; ++k) {
          std::vector<Line> read = in;
          out[k].assign(threads * words_out / 4, Line{});
          const Kernel kernel = k == 0 ? test.kernel : interpreted(test.kernel);
          launch(l, [&] { kernel(read[0].word, out[k][0].word); });
        }
      } catch (const Failure& failure) {
        printf("%s, seed %d: %s\n", test.name, int(seed), failure.what());
        ++wrong;
        continue;
      }
      for (size_t n = 0; n < threads * words_out; ++n) {
        const uint32_t expected = out[0][n / 4].word[n % 4], found = out[1][n / 4].word[n % 4];
        if (agree(test, found, expected)) continue;
        printf("%s, seed %d, thread %d, word %d: %08x instead of %08x\n", test.name, int(seed), int(n / words_out),
               int(n % words_out), found, expected);
        ++wrong;
        break;
      }
    }
  }
  printf("%d wrong\n", wrong);
  return wrong > 0;
}
