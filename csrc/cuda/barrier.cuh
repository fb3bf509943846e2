// What blocks wait for when they wait for each other, and nothing else: for measurements (barrier.cu).
#pragma once

#include "device.h"

namespace fused_rnn {
namespace cuda {

__global__ void cluster_barriers(int64_t rounds) {
#if defined(FRNN_CUDA_CLUSTERS)
  for (int64_t r = 0; r < rounds; ++r) {
    cluster_arrive();
    cluster_wait();
  }
#endif
}

constexpr int most_exchanging = 16;  // blocks

struct ExchangedWord {
  uint32_t words[4];
};
struct alignas(16) Exchanged {
  Mbarrier barriers[2];
  ExchangedWord received[2][most_exchanging];
};

// The least that a step of Exchange::counted can be: one warp a block, which sends 16 bytes to every block of the
// cluster and waits for theirs. A barrier of the cluster is no measure of it: its release is a fence of the whole GPU.
// Dynamic shared memory: an Exchanged. last: what came in the last round, (blocks, blocks); null: not wanted.
__global__ void cluster_exchanges(int64_t rounds, uint32_t* last) {
#if defined(FRNN_CUDA_CLUSTERS)
  Exchanged* const own = reinterpret_cast<Exchanged*>(shared_memory());
  const int rank = cluster_rank(), blocks = cluster_size(), lane = lane_index();
  const int bytes = blocks * int(sizeof(ExchangedWord));
  if (lane == 0) {
    for (Mbarrier& barrier : own->barriers) mbarrier_init(&barrier, 1);
    fence_mbarrier_init();
    for (Mbarrier& barrier : own->barriers) mbarrier_arrive_expect(&barrier, bytes);
  }
  sync_warp();
  cluster_arrive();
  cluster_wait();
  const int to = lane < blocks ? lane : 0;
  const RemoteAddress received = remote_address(&own->received[0][rank], to);
  const RemoteAddress barriers = remote_address(&own->barriers[0], to);
  for (int64_t r = 0; r < rounds; ++r) {
    const int parity = int(r & 1);
    if (lane < blocks)
      store_async(received + parity * int64_t(sizeof own->received[0]), ExchangedWord{{uint32_t(r), 0, 0, 0}},
                  barriers + parity * int64_t(sizeof(Mbarrier)));
    mbarrier_wait(&own->barriers[parity], int(r >> 1) & 1, int(r));
    // Before any lane sends again, without which nobody sends for the phase after the next.
    if (lane == 0) mbarrier_arrive_expect(&own->barriers[parity], bytes);
    sync_warp();
  }
  if (last && lane < blocks) last[rank * blocks + lane] = own->received[(rounds - 1) & 1][lane].words[0];
  cluster_arrive();
  cluster_wait();
#endif
}

__global__ void grid_barriers(int64_t rounds, uint32_t* counter) {
  for (int64_t r = 1; r <= rounds; ++r) {
    sync_threads();
    if (thread_index() == 0) {
      add_release(counter, 1);
      wait_until_at_least(counter, uint32_t(r * grid_x()), int(r));
    }
    sync_threads();
  }
}

}  // namespace cuda
}  // namespace fused_rnn
