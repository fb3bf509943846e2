// csrc/cuda/launch.cuh on the CPU: kernels run on the engine of engine.h. With FRNN_INTERPRETED what nvcc made of them
// runs in their place (ptx.h).
#pragma once

#include "cuda/step.cuh"
#include "engine.h"
#if defined(FRNN_INTERPRETED)
#include "ptx.h"
#endif

namespace fused_rnn {
namespace cuda {

class OnStream {
 public:
  explicit OnStream(void*) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), StepGrid grid, int threads, int shared_bytes,
                  const Arguments&... arguments) const {
    cuda_host::Launch launch;
    launch.grid_x = int(grid.x);
    launch.grid_y = int(grid.y);
    launch.grid_z = int(grid.z);
    launch.threads = threads;
    launch.shared_bytes = size_t(shared_bytes);
#if defined(FRNN_INTERPRETED)
    const auto run = cuda_host::interpreted(kernel);
#else
    const auto run = kernel;
#endif
    cuda_host::launch(launch, [&] { run(arguments...); });
  }
};

inline const char* last_error() { return nullptr; }

}  // namespace cuda
}  // namespace fused_rnn
