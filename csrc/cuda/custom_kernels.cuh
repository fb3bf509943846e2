// The kernels of one custom cell for one dtype and architecture, those of a step (step.cuh) and those of a step with
// options (step_options.cuh). fused_rnn/compiling.py makes a library of a source that has the cell and this macro.
#pragma once

#include "../cells/functions.h"
#include "custom.h"
#include "launch.cuh"
#include "step_options.cuh"

namespace fused_rnn {
namespace cuda {

template <class Cell, class S, class Step, class Options>
const char* custom_step(int64_t hidden_size, const Step* directions, const Options* options, const Within& within,
                        int count, void* stream) {
  if (options) {
    launch_step_with_options_of<Cell, S>(hidden_size, directions, options, within, count, OnStream(stream));
  } else {
    launch_step_of<Cell, S>(hidden_size, directions, count, units_for_vectors, OnStream(stream));
  }
  return last_error();
}

template <class Cell, class S>
CustomKernels custom_kernels_of(CellKind kind, DType dtype, int arch) {
  return {sizes_of_steps(),
          kind,
          dtype,
          arch,
          Cell::gates,
          Cell::saved,
          Cell::states,
          Cell::grad_gates,
          Cell::input_grads,
          Cell::hidden_grads,
          &custom_step<Cell, S, StepForward, ForwardOptions>,
          &custom_step<Cell, S, StepBackward, BackwardOptions>};
}

}  // namespace cuda
}  // namespace fused_rnn

// The library's one visible function.
#define FRNN_CUSTOM_CUDA(Cell, Element, number, dtype, arch)                                          \
  extern "C" FRNN_EXPORT const fused_rnn::cuda::CustomKernels* fused_rnn_custom_cuda_kernels() {      \
    using namespace fused_rnn;                                                                        \
    static const auto kernels =                                                                       \
        fused_rnn::cuda::custom_kernels_of<Cell, Element>(CellKind(number), DType::dtype, int(arch)); \
    return &kernels;                                                                                  \
  }
