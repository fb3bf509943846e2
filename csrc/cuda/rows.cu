// Launches of rows.cuh, and what a GPU says of itself.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda.h"
#include "rows.cuh"

namespace fused_rnn {
namespace cuda {

namespace {

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

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
  also(cudaDevAttrClockRate, info.clock_khz);
  also(cudaDevAttrCooperativeLaunch, cooperative);
  also(cudaDevAttrClusterLaunch, clusters);
  info.index = index;
  info.arch = 10 * major + minor;
  info.cooperative = cooperative != 0;
  // Every architecture with clusters has 8 blocks; 16, which data centre parts have, a kernel must ask for.
  info.max_cluster = !clusters ? 1 : major == 9 || major == 10 ? 16 : 8;
  return text_of(error);
}

const char* upload_steps(const int64_t* batch_sizes, int64_t T, int64_t* sizes, int64_t* offsets, void* stream) {
  int64_t row = 0;
  for (int64_t first = 0; first < T; first += step_chunk) {
    StepSizes chunk;
    const int count = int(std::min<int64_t>(step_chunk, T - first));
    std::copy_n(batch_sizes + first, count, chunk.sizes);
    store_steps<<<1, 256, 0, cudaStream_t(stream)>>>(chunk, first, count, row, sizes, offsets);
    for (int i = 0; i < count; ++i) row += chunk.sizes[i];
  }
  return text_of(cudaGetLastError());
}

template <class E>
static void launch_previous_states(int64_t size, const Steps& steps, bool reverse, const Sequence& y, const void* h0,
                                   void* out, int64_t rows, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>((rows + 3) / 4, 1 << 20);
  gather_previous_states<E>
      <<<unsigned(blocks), 128, 0, stream>>>(size, steps, reverse, y, static_cast<const E*>(h0), static_cast<E*>(out));
}

const char* previous_states(DType dtype, int64_t size, const Steps& steps, int64_t rows, bool reverse,
                            const Sequence& y, const void* h0, void* out, void* stream) {
  switch (dtype) {
    case DType::float64:
      launch_previous_states<uint64_t>(size, steps, reverse, y, h0, out, rows, cudaStream_t(stream));
      break;
    case DType::float32:
      launch_previous_states<uint32_t>(size, steps, reverse, y, h0, out, rows, cudaStream_t(stream));
      break;
    default: launch_previous_states<uint16_t>(size, steps, reverse, y, h0, out, rows, cudaStream_t(stream));
  }
  return text_of(cudaGetLastError());
}

}  // namespace cuda
}  // namespace fused_rnn
