// How the kernels of one step are started. With FRNN_CUDA_ON_HOST, tests/cuda_host supplies the same on the CPU.
#pragma once

#if defined(FRNN_CUDA_ON_HOST)
#include "launch_on_host.h"
#else

#include <cuda_runtime_api.h>

#include "step.cuh"

namespace fused_rnn {
namespace cuda {

// Starts kernels on a stream.
class OnStream {
 public:
  explicit OnStream(void* stream) : stream_(cudaStream_t(stream)) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), StepGrid grid, int threads, int shared_bytes,
                  const Arguments&... arguments) const {
    // clang-format off: it takes the last three for ends of templates
    kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared_bytes, stream_>>>(arguments...);
    // clang-format on
  }

 private:
  cudaStream_t stream_;
};

inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace fused_rnn

#endif
