// persistent_forward with what nvcc made of the kernels: the file of environment variable FRNN_PTX.
#define FRNN_ALL_REGISTERS
#define forward_kernel compiled_forward_kernel
#include "cuda/persistent_forward.cuh"
#undef forward_kernel

#include "ptx.cpp"

namespace fused_rnn {
namespace cuda {

template <Multiply multiply, bool wavefront = false>
ForwardKernel forward_kernel(CellKind kind, int shape) {
  const auto compiled = compiled_forward_kernel<multiply, wavefront>(kind, shape);
  return compiled ? cuda_host::interpreted(compiled) : nullptr;
}

}  // namespace cuda
}  // namespace fused_rnn

#include "persistent_forward.cpp"
