#include "persistent_forward.cuh"

namespace fused_rnn {
namespace cuda {

template ForwardKernel forward_kernel<Multiply::float16, false>(CellKind kind, int shape);

}  // namespace cuda
}  // namespace fused_rnn
