// How long blocks take to hear of each other: the part of a persistent kernel's step that no arithmetic hides. For
// fused_rnn/bench/gpu.py.
#include <cuda_runtime_api.h>

#include "cuda.h"
#include "device.h"

namespace fused_rnn {
namespace cuda {

namespace {

constexpr int barrier_threads = 256;  // as in the persistent kernels

__global__ void cluster_barriers(int64_t rounds) {
#if defined(FRNN_CUDA_CLUSTERS)
  for (int64_t r = 0; r < rounds; ++r) {
    cluster_arrive();
    cluster_wait();
  }
#endif
}

// The least that a step of Exchange::counted can be: one warp a block, which sends a word to every block of the cluster
// and waits for theirs. A barrier of the cluster is no measure of it: its release is a fence of the whole GPU.
struct Received {
  Mbarrier barriers[2];
  uint4 words[2][16];
};

__global__ void cluster_exchanges(int64_t rounds) {
#if defined(FRNN_CUDA_CLUSTERS)
  Received* const own = reinterpret_cast<Received*>(shared_memory());
  const int rank = cluster_rank(), blocks = cluster_size(), lane = lane_index();
  const int bytes = blocks * int(sizeof(uint4));
  if (lane == 0) {
    for (Mbarrier& barrier : own->barriers) mbarrier_init(&barrier, 1);
    fence_mbarrier_init();
    for (Mbarrier& barrier : own->barriers) mbarrier_arrive_expect(&barrier, bytes);
  }
  sync_warp();
  cluster_arrive();
  cluster_wait();
  const int to = lane < blocks ? lane : 0;
  const RemoteAddress words = remote_address(&own->words[0][rank], to);
  const RemoteAddress barriers = remote_address(&own->barriers[0], to);
  for (int64_t r = 0; r < rounds; ++r) {
    const int parity = int(r & 1);
    if (lane < blocks)
      store_async(words + parity * int64_t(sizeof own->words[0]), uint4{uint32_t(r), 0, 0, 0},
                  barriers + parity * int64_t(sizeof(Mbarrier)));
    mbarrier_wait(&own->barriers[parity], int(r >> 1) & 1, int(r));
    // Before any lane sends again, without which nobody sends for the phase after the next.
    if (lane == 0) mbarrier_arrive_expect(&own->barriers[parity], bytes);
    sync_warp();
  }
  cluster_arrive();
  cluster_wait();
#endif
}

__global__ void grid_barriers(int64_t rounds, uint32_t* counter) {
  for (int64_t r = 1; r <= rounds; ++r) {
    sync_threads();
    if (thread_index() == 0) {
      add_release(counter, 1);
      wait_until_at_least(counter, uint32_t(r * grid_x()));
    }
    sync_threads();
  }
}

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // told here, so not again by the next call
  return cudaGetErrorString(error);
}

// One cluster of the most blocks.
const char* run_cluster(void (*kernel)(int64_t), int64_t rounds, int threads, int64_t shared, const DeviceInfo& device,
                        void* stream) {
  if (device.max_cluster < 2) return "this GPU has no clusters";
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(device.max_cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = unsigned(device.max_cluster);
  launch.blockDim = unsigned(threads);
  launch.dynamicSmemBytes = size_t(shared);
  launch.stream = cudaStream_t(stream);
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  cudaError_t error = cudaSuccess;
  if (device.max_cluster > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&launch, kernel, rounds);
  return text_of(error);
}

}  // namespace

const char* run_cluster_barriers(int64_t rounds, const DeviceInfo& device, void* stream) {
  return run_cluster(cluster_barriers, rounds, barrier_threads, 0, device, stream);
}

const char* run_cluster_exchanges(int64_t rounds, const DeviceInfo& device, void* stream) {
  return run_cluster(cluster_exchanges, rounds, warp_size, sizeof(Received), device, stream);
}

const char* run_grid_barriers(int64_t rounds, const DeviceInfo& device, uint32_t* counter, void* stream) {
  if (!device.cooperative) return "this GPU has no cooperative launches";
  if (rounds * device.sms > INT32_MAX) return "the counter has 32 bits";
  cudaError_t error = cudaMemsetAsync(counter, 0, sizeof *counter, cudaStream_t(stream));
  void* arguments[] = {&rounds, &counter};
  if (error == cudaSuccess) {
    error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(grid_barriers), dim3(unsigned(device.sms)),
                                        dim3(barrier_threads), arguments, 0, cudaStream_t(stream));
  }
  return text_of(error);
}

}  // namespace cuda
}  // namespace fused_rnn
