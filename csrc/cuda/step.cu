// Launches of step.cuh, step_options.cuh and step_norm.cuh.
#include "launch.cuh"
#include "step.cuh"
#include "step_norm.cuh"
#include "step_options.cuh"

namespace fused_rnn {
namespace cuda {

const char* step_forward(CellKind kind, DType dtype, int64_t hidden_size, const StepForward* directions, int count,
                         void* stream) {
  launch_step(kind, dtype, hidden_size, directions, count, units_for_vectors, OnStream(stream));
  return last_error();
}

const char* step_backward(CellKind kind, DType dtype, int64_t hidden_size, const StepBackward* directions, int count,
                          void* stream) {
  launch_step(kind, dtype, hidden_size, directions, count, units_for_vectors, OnStream(stream));
  return last_error();
}

const char* step_forward_with_options(CellKind kind, DType dtype, int64_t hidden_size, const StepForward* directions,
                                      const ForwardOptions* options, const Within& within, int count, void* stream) {
  launch_step_with_options(kind, dtype, hidden_size, directions, options, within, count, OnStream(stream));
  return last_error();
}

const char* step_backward_with_options(CellKind kind, DType dtype, int64_t hidden_size, const StepBackward* directions,
                                       const BackwardOptions* options, const Within& within, int count, void* stream) {
  launch_step_with_options(kind, dtype, hidden_size, directions, options, within, count, OnStream(stream));
  return last_error();
}

const char* reset_forward(DType dtype, int64_t hidden_size, const StepForward* directions,
                          const ForwardOptions* options, const Within& within, int count, void* stream) {
  launch_reset(dtype, hidden_size, directions, options, within, count, OnStream(stream));
  return last_error();
}

const char* reset_backward(DType dtype, int64_t hidden_size, const StepBackward* directions,
                           const BackwardOptions* options, const Within& within, int count, void* stream) {
  launch_reset(dtype, hidden_size, directions, options, within, count, OnStream(stream));
  return last_error();
}

const char* step_forward_with_norm(CellKind kind, DType dtype, int64_t hidden_size, const StepForward* directions,
                                   const ForwardOptions* options, const ForwardNorm* norms, const Within& within,
                                   int count, void* stream) {
  launch_step_with_norm(kind, dtype, hidden_size, directions, options, norms, within, count, OnStream(stream));
  return last_error();
}

const char* step_backward_with_norm(CellKind kind, DType dtype, int64_t hidden_size, const StepBackward* directions,
                                    const BackwardOptions* options, const BackwardNorm* norms, const Within& within,
                                    int count, void* stream) {
  launch_step_with_norm(kind, dtype, hidden_size, directions, options, norms, within, count, OnStream(stream));
  return last_error();
}

const char* projected_forward(DType dtype, int64_t state_size, const ProjectedForward* directions, int count,
                              void* stream) {
  launch_states(dtype, state_size, directions, count, OnStream(stream));
  return last_error();
}

const char* projected_backward(DType dtype, int64_t state_size, const ProjectedBackward* directions, int count,
                               void* stream) {
  launch_states(dtype, state_size, directions, count, OnStream(stream));
  return last_error();
}

const char* hand_back(DType dtype, int64_t state_size, int64_t cell_size, const HandedBack* directions, int count,
                      void* stream) {
  launch_hand_back(dtype, state_size, cell_size, directions, count, OnStream(stream));
  return last_error();
}

int64_t column_sums_workspace(DType dtype, int64_t rows, int64_t columns) {
  return sum_chunks(rows) * columns * int64_t(dtype == DType::float64 ? sizeof(double) : sizeof(float));
}

const char* column_sums(DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride, void* out,
                        void* again, void* workspace, void* stream) {
  launch_column_sums(dtype, data, rows, columns, stride, out, again, workspace, OnStream(stream));
  return last_error();
}

}  // namespace cuda
}  // namespace fused_rnn
