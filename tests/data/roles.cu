// Two kinds of warps that hand over to each other, as a persistent kernel has them, for tests/test_cuda_cycles.py. Its
// machine code is roles.sass, without paths:
//
//   nvcc -std=c++17 -O3 -Icsrc -lineinfo -arch=sm_90a -cubin -o roles.cubin tests/data/roles.cu
//   nvdisasm -c -hex -gi roles.cubin | sed -E 's:"[^"]*/:":g; s:[ \t]+: :g' > tests/data/roles.sass
#include "cuda/device.h"

using namespace fused_rnn::cuda;

struct Arguments {
  int steps, blocks;
  float* out;
};

// Warps 0 and 1 multiply, warp 2 has the rest.
extern "C" __global__ void __launch_bounds__(96, 1) roles(const __grid_constant__ Arguments a) {
  float* const h = reinterpret_cast<float*>(shared_memory());
  float* const sums = h + 32;
  Mbarrier* const ready = reinterpret_cast<Mbarrier*>(sums + 64);
  if (thread_index() == 0) {
    mbarrier_init(ready, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(ready, a.blocks * 32 * 4);
  }
  cluster_arrive();
  cluster_wait();
  if (warp_index() == 2) {
    // phase: loop
    for (int s = 0; s < a.steps; ++s) {
      // phase: barrier
      named_barrier(1, 96);
      // phase: gates
      const float x = approximate_reciprocal(sums[lane_index()] + sums[32 + lane_index()]);
      // phase: sends
      for (int rank = 0; rank < a.blocks; ++rank)
        store_async(remote_address(&h[lane_index()], rank), x, remote_address(ready, rank));
      // phase: stores
      if (a.out) a.out[s * 32 + lane_index()] = x;
    }
    // phase: end
  } else {
    // phase: loop
    for (int s = 0; s < a.steps; ++s) {
      // phase: wait
      if (s > 0) {
        mbarrier_wait(ready, (s - 1) & 1);
        if (thread_index() == 0 && s + 1 < a.steps) mbarrier_arrive_expect(ready, a.blocks * 32 * 4);
      }
      // phase: products
      float sum[4] = {};
      const uint32_t tile[4] = {1, 2, 3, 4};
      multiply_add<fused_rnn::BFloat16>(sum, tile, {__float_as_uint(h[lane_index()]), 1});
      sums[thread_index()] = sum[0];
      // phase: barrier
      named_barrier_arrive(1, 96);
    }
    // phase: end
  }
  // No block leaves while others may write into its shared memory.
  cluster_arrive();
  cluster_wait();
}
