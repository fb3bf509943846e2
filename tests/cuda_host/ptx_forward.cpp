// persistent_forward with what nvcc made of the kernels: the file of environment variable FRNN_PTX.
#define FRNN_ALL_REGISTERS
#define forward_kernel compiled_forward_kernel
#include "cuda/persistent_forward.cuh"
#undef forward_kernel

#include "ptx.cpp"

namespace fused_rnn {
namespace cuda {

template <Multiply multiply>
ForwardKernel forward_kernel(CellKind kind, int shape) {
  return cuda_host::interpreted(compiled_forward_kernel<multiply>(kind, shape));
}

}  // namespace cuda
}  // namespace fused_rnn

#include "persistent_forward.cpp"
