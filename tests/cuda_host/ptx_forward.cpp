// persistent_forward with what nvcc made of the kernels: the file of environment variable FRNN_PTX.
#define FRNN_ALL_REGISTERS
#include "cuda/persistent.cuh"
#include "ptx.h"

namespace fused_rnn {
namespace cuda {

template <Multiply multiply, bool wavefront>
ForwardKernel interpreted_forward_kernel(CellKind kind, int shape) {
  const auto compiled = forward_kernel<multiply, wavefront>(kind, shape);
  return compiled ? cuda_host::interpreted(compiled) : nullptr;
}

}  // namespace cuda
}  // namespace fused_rnn

#define forward_kernel interpreted_forward_kernel
#include "persistent_forward.cpp"
