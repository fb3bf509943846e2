// How long blocks take to hear of each other: the part of a persistent kernel's step that no arithmetic hides. For
// fused_rnn/bench/gpu.py.
#include <cuda_runtime_api.h>

#include "barrier.cuh"
#include "cuda.h"

namespace fused_rnn {
namespace cuda {

namespace {

constexpr int barrier_threads = 256;  // as in the persistent kernels

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // told here, so not again by the next call
  return cudaGetErrorString(error);
}

// One cluster of the most blocks.
template <class... Parameters, class... Arguments>
const char* run_cluster(void (*kernel)(Parameters...), int threads, int64_t shared, const DeviceInfo& device,
                        void* stream, Arguments... arguments) {
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
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&launch, kernel, Parameters(arguments)...);
  return text_of(error);
}

}  // namespace

const char* run_cluster_barriers(int64_t rounds, const DeviceInfo& device, void* stream) {
  return run_cluster(cluster_barriers, barrier_threads, 0, device, stream, rounds);
}

const char* run_cluster_exchanges(int64_t rounds, const DeviceInfo& device, void* stream) {
  return run_cluster(cluster_exchanges, warp_size, sizeof(Exchanged), device, stream, rounds, nullptr);
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
