#include "persistent_backward.cuh"

namespace fused_rnn {
namespace cuda {

template BackwardKernel backward_kernel<Multiply::bfloat16, false>(CellKind kind, int shape);

}  // namespace cuda
}  // namespace fused_rnn
