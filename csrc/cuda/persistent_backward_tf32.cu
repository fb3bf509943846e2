#include "persistent_backward.cuh"

namespace fused_rnn {
namespace cuda {

template BackwardKernel backward_kernel<Multiply::tf32, false>(CellKind kind, int shape);

}  // namespace cuda
}  // namespace fused_rnn
