// persistent_backward with what nvcc made of the kernels: the file of environment variable FRNN_PTX.
#define FRNN_ALL_REGISTERS
#include "cuda/persistent.cuh"
#include "ptx.h"

namespace fused_rnn {
namespace cuda {

template <Multiply multiply, bool wavefront>
BackwardKernel interpreted_backward_kernel(CellKind kind, int shape) {
  const auto compiled = backward_kernel<multiply, wavefront>(kind, shape);
  return compiled ? cuda_host::interpreted(compiled) : nullptr;
}

}  // namespace cuda
}  // namespace fused_rnn

#define backward_kernel interpreted_backward_kernel
#include "persistent_backward.cpp"
