// How long a barrier takes: the part of a persistent kernel's step that no arithmetic hides. For
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

}  // namespace

const char* run_cluster_barriers(int64_t rounds, const DeviceInfo& device, void* stream) {
  if (device.max_cluster < 2) return "this GPU has no clusters";
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(device.max_cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = unsigned(device.max_cluster);
  launch.blockDim = barrier_threads;
  launch.stream = cudaStream_t(stream);
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  cudaError_t error = cudaFuncSetAttribute(cluster_barriers, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&launch, cluster_barriers, rounds);
  return text_of(error);
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
