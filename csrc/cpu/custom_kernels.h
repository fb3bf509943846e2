// The kernels of one custom cell for one instruction set and dtype. fused_rnn/compiling.py makes a library of two
// sources, one for each pass, so that two processors share the work. They define FRNN_ISA, FRNN_VECTOR_BYTES and
// FRNN_ISA_TEXT first.
#pragma once

#pragma GCC diagnostic ignored "-Wignored-attributes"

#include "../cells/functions.h"
#include "custom.h"
#include "run.h"

namespace fused_rnn {
bool custom_backward(const LayerBackward& layer, const Plan& plan);
}

#define FRNN_CUSTOM_BACKWARD(Cell, Element)                                       \
  bool fused_rnn::custom_backward(const LayerBackward& layer, const Plan& plan) { \
    return FRNN_ISA::run_backward<Cell, Element>(layer, plan);                    \
  }

// And the library's one visible function.
#define FRNN_CUSTOM_FORWARD(Cell, Element, number, dtype)                                                      \
  extern "C" FRNN_EXPORT const fused_rnn::CustomKernels* fused_rnn_custom_kernels() {                          \
    using namespace fused_rnn;                                                                                 \
    static const CustomKernels kernels = {                                                                     \
        sizes_of_layers, CellKind(number), FRNN_ISA_TEXT, DType::dtype, &FRNN_ISA::run_forward<Cell, Element>, \
        &custom_backward};                                                                                     \
    return &kernels;                                                                                           \
  }
