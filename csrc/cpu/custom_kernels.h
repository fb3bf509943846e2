// The kernels of one custom cell for one instruction set, as a library that a process adds to those it has. Included by
// sources that fused_rnn/custom.py writes, which define FRNN_ISA, FRNN_VECTOR_BYTES and FRNN_ISA_TEXT first.
#pragma once

#pragma GCC diagnostic ignored "-Wignored-attributes"

#include "../cells/functions.h"
#include "custom.h"
#include "run.h"

namespace fused_rnn {
namespace FRNN_ISA {

template <class Cell>
bool custom_forward(const LayerForward& layer, const Plan& plan) {
  switch (layer.sizes.dtype) {
    case DType::float64: return run_forward<Cell, double>(layer, plan);
    case DType::bfloat16: return run_forward<Cell, BFloat16>(layer, plan);
    case DType::float16: return run_forward<Cell, Half>(layer, plan);
    case DType::float32: break;
  }
  return run_forward<Cell, float>(layer, plan);
}

template <class Cell>
bool custom_backward(const LayerBackward& layer, const Plan& plan) {
  switch (layer.sizes.dtype) {
    case DType::float64: return run_backward<Cell, double>(layer, plan);
    case DType::bfloat16: return run_backward<Cell, BFloat16>(layer, plan);
    case DType::float16: return run_backward<Cell, Half>(layer, plan);
    case DType::float32: break;
  }
  return run_backward<Cell, float>(layer, plan);
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn

#define FRNN_CUSTOM_CELL(Cell, number)                                                                               \
  extern "C" FRNN_EXPORT const fused_rnn::CustomCell* fused_rnn_custom_cell() {                                      \
    using namespace fused_rnn;                                                                                       \
    static const CustomCell cell = {sizes_of_layers, CellKind(number), FRNN_ISA_TEXT, Cell::gates,                   \
                                    Cell::saved,     Cell::states,     &FRNN_ISA::custom_forward<Cell>,              \
                                    &FRNN_ISA::custom_backward<Cell>};                                               \
    return &cell;                                                                                                    \
  }
