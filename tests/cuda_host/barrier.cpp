// barrier: the kernels of csrc/cuda/barrier.cuh, which are there to be timed, in clusters of every size and under
// several seeds. Nobody must wait for ever, and what is exchanged must arrive.
#include "cuda/barrier.cuh"

#include <cstdio>
#include <vector>

#include "engine.h"

namespace fused_rnn {
namespace cuda_host {

using namespace fused_rnn::cuda;

int run() {
  for (const uint64_t seed : {0, 1, 2, 3, 4, 5}) {
    for (const int blocks : {2, 4, 8, 16}) {
      for (const int64_t rounds : {1, 2, 3, 8}) {
        Launch l;
        l.grid_x = l.cluster = blocks;
        l.shared_bytes = sizeof(Exchanged);
        l.seed = seed;
        std::vector<uint32_t> last(size_t(blocks * blocks), ~0u);
        launch(l, [&] { cluster_exchanges(rounds, last.data()); });
        for (const uint32_t word : last) {
          if (word == uint32_t(rounds - 1)) continue;
          printf("%d blocks, seed %d: word %u in round %d\n", blocks, int(seed), word, int(rounds));
          return 1;
        }
        launch(l, [&] { cluster_barriers(rounds); });
      }
    }
    Launch l;
    l.grid_x = 6;
    l.threads = 64;
    l.cooperative = true;
    l.seed = seed;
    uint32_t counter = 0;
    launch(l, [&] { grid_barriers(5, &counter); });
    if (counter != 30) return 1;
  }
  return 0;
}

}  // namespace cuda_host
}  // namespace fused_rnn

int main() {
  try {
    return fused_rnn::cuda_host::run();
  } catch (const fused_rnn::cuda_host::Failure& failure) {
    printf("%s\n", failure.what());
    return 2;
  }
}
