#include "persistent_backward.cuh"
#include "persistent_forward.cuh"

namespace fused_rnn {
namespace cuda {

template ForwardKernel forward_kernel<Multiply::float16, true>(CellKind kind, int shape);
template BackwardKernel backward_kernel<Multiply::float16, true>(CellKind kind, int shape);

}  // namespace cuda
}  // namespace fused_rnn
