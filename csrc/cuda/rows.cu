// Launches of rows.cuh, and what a GPU says of itself.
#include <cuda_runtime_api.h>

#include <string>

#include "cuda.h"
#include "rows.cuh"

namespace fused_rnn {
namespace cuda {

namespace {

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

struct OnStream {
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int blocks, int threads, const Arguments&... arguments) const {
    kernel<<<blocks, threads, 0, stream>>>(arguments...);
  }
};

// Clusters of `size` blocks that are resident together when each block takes all of its SM's shared memory; 0 when
// there can be none.
int resident_clusters(int size, int64_t shared) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(size);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = unsigned(size);
  launch.blockDim = 256;
  launch.dynamicSmemBytes = size_t(shared);
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, occupy, &launch) == cudaSuccess) return clusters;
  cudaGetLastError();  // such a refusal is an answer
  return 0;
}

// Whether the device takes the attribute for `occupy`. A refusal is an answer: it is no error of whoever asks next.
bool takes(cudaFuncAttribute attribute, int value) {
  if (cudaFuncSetAttribute(occupy, attribute, value) == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

// Of the current device. What it refuses costs clusters, or those that need it, and never CUDA.
void read_clusters(DeviceInfo& info) {
  const bool all_memory = takes(cudaFuncAttributeMaxDynamicSharedMemorySize, int(info.shared_per_block));
  // Above 8 blocks a cluster is not portable: some devices have none, and a kernel must ask for them.
  const bool not_portable = takes(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (int i = 0; i < 5; ++i) {
    const int size = 1 << i;
    const bool possible = all_memory && (size <= 8 || not_portable);
    info.resident_clusters[i] = possible ? resident_clusters(size, info.shared_per_block) : 0;
    if (info.resident_clusters[i] > 0) info.max_cluster = size;
  }
}

// What is wrong with a GPU of an architecture that nvcc was not asked for; the text lives until the thread's next one.
const char* no_code_text(int arch) {
  static thread_local std::string text;
  const auto capability = [](int number) { return std::to_string(number / 10) + "." + std::to_string(number % 10); };
  text = "the CUDA kernels were compiled for GPUs of compute capability";
  for (int compiled : {__CUDA_ARCH_LIST__}) text += " " + capability(compiled / 10);
  text += " and what runs their code, got one of " + capability(arch);
  return text.c_str();
}

}  // namespace

const char* read_device(int index, DeviceInfo& info) {
  const auto read = [&](cudaDeviceAttr attribute, auto& value) {
    int number = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&number, attribute, index);
    value = number;
    return error;
  };
  int major = 0, minor = 0, cooperative = 0, clusters = 0;
  cudaError_t error = read(cudaDevAttrComputeCapabilityMajor, major);
  const auto also = [&](cudaDeviceAttr attribute, auto& value) {
    if (error == cudaSuccess) error = read(attribute, value);
  };
  also(cudaDevAttrComputeCapabilityMinor, minor);
  also(cudaDevAttrMultiProcessorCount, info.sms);
  also(cudaDevAttrMaxSharedMemoryPerBlockOptin, info.shared_per_block);
  also(cudaDevAttrMaxSharedMemoryPerMultiprocessor, info.shared_per_sm);
  also(cudaDevAttrMaxRegistersPerMultiprocessor, info.registers_per_sm);
  also(cudaDevAttrL2CacheSize, info.l2_bytes);
  also(cudaDevAttrCooperativeLaunch, cooperative);
  also(cudaDevAttrClusterLaunch, clusters);
  // Drivers may stop telling the clock, without which the planner only takes a usual one.
  if (error == cudaSuccess && read(cudaDevAttrClockRate, info.clock_khz) != cudaSuccess) cudaGetLastError();
  info.index = index;
  info.arch = 10 * major + minor;
  info.cooperative = cooperative != 0;

  int before = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(index);
  if (error != cudaSuccess) return text_of(error);
  cudaFuncAttributes code = {};
  error = cudaFuncGetAttributes(&code, occupy);
  const bool no_code = error == cudaErrorNoKernelImageForDevice;
  // Code for older architectures, translated by the driver, has the kernels without what clusters need (device.h).
  if (error == cudaSuccess && clusters && code.ptxVersion >= 90) read_clusters(info);
  const cudaError_t restored = cudaSetDevice(before);
  if (no_code) {
    cudaGetLastError();  // told here, so not again by the next call
    return no_code_text(info.arch);
  }
  return text_of(error == cudaSuccess ? restored : error);
}

const char* upload_steps(const int64_t* batch_sizes, int64_t T, int64_t* sizes, int64_t* offsets, void* stream) {
  launch_store_steps(batch_sizes, T, sizes, offsets, OnStream{cudaStream_t(stream)});
  return text_of(cudaGetLastError());
}

const char* previous_states(DType dtype, int64_t size, const Steps& steps, int64_t rows, bool reverse,
                            const Sequence& y, const void* h0, void* out, void* stream) {
  launch_previous_states(dtype, size, steps, rows, reverse, y, h0, out, OnStream{cudaStream_t(stream)});
  return text_of(cudaGetLastError());
}

const char* multiplied_states(DType dtype, int64_t size, const Steps& steps, int64_t rows, bool reverse,
                              const Sequence& y, const void* h0, const void* reset_h, const void* dropout, void* out,
                              void* stream) {
  launch_multiplied_states(dtype, size, steps, rows, reverse, y, h0, reset_h, dropout, out,
                           OnStream{cudaStream_t(stream)});
  return text_of(cudaGetLastError());
}

const char* draw_bits(const int64_t* seed, int64_t rows, int64_t units, double rate, uint8_t* bits, void* stream) {
  launch_draw_bits(seed, rows, units, rate, bits, OnStream{cudaStream_t(stream)});
  return text_of(cudaGetLastError());
}

}  // namespace cuda
}  // namespace fused_rnn
