// The kernels of one custom cell for one instruction set and dtype, of which fused_rnn/compiling.py makes a library
// with those of all dtypes. Its sources define FRNN_ISA, FRNN_VECTOR_BYTES and FRNN_ISA_TEXT first.
#pragma once

#pragma GCC diagnostic ignored "-Wignored-attributes"

#include "../cells/functions.h"
#include "custom.h"
#include "run.h"

// In the source of a dtype: its two functions.
#define FRNN_CUSTOM_KERNELS(Cell, Element)                                       \
  namespace fused_rnn {                                                          \
  bool custom_forward_##Element(const LayerForward& layer, const Plan& plan) {   \
    return FRNN_ISA::run_forward<Cell, Element>(layer, plan);                    \
  }                                                                              \
  bool custom_backward_##Element(const LayerBackward& layer, const Plan& plan) { \
    return FRNN_ISA::run_backward<Cell, Element>(layer, plan);                   \
  }                                                                              \
  }
