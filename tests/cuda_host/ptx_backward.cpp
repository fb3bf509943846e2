// persistent_backward with what nvcc made of the kernels: the file of environment variable FRNN_PTX.
#define FRNN_ALL_REGISTERS
#define backward_kernel compiled_backward_kernel
#include "cuda/persistent_backward.cuh"
#undef backward_kernel

#include "ptx.cpp"

namespace fused_rnn {
namespace cuda {

template <Multiply multiply, bool wavefront = false>
BackwardKernel backward_kernel(CellKind kind, int shape) {
  const auto compiled = compiled_backward_kernel<multiply, wavefront>(kind, shape);
  return compiled ? cuda_host::interpreted(compiled) : nullptr;
}

}  // namespace cuda
}  // namespace fused_rnn

#include "persistent_backward.cpp"
