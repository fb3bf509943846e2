// The description of a custom cell's library: its one visible function, which calls those of custom_kernels.h.
#pragma once

#include "custom.h"

namespace fused_rnn {

#define FRNN_CUSTOM_DTYPE(Element)                                            \
  bool custom_forward_##Element(const LayerForward& layer, const Plan& plan); \
  bool custom_backward_##Element(const LayerBackward& layer, const Plan& plan);
FRNN_CUSTOM_DTYPE(float)
FRNN_CUSTOM_DTYPE(double)
FRNN_CUSTOM_DTYPE(BFloat16)
FRNN_CUSTOM_DTYPE(Half)
#undef FRNN_CUSTOM_DTYPE

inline bool custom_forward(const LayerForward& layer, const Plan& plan) {
  switch (layer.sizes.dtype) {
    case DType::float64: return custom_forward_double(layer, plan);
    case DType::bfloat16: return custom_forward_BFloat16(layer, plan);
    case DType::float16: return custom_forward_Half(layer, plan);
    case DType::float32: break;
  }
  return custom_forward_float(layer, plan);
}

inline bool custom_backward(const LayerBackward& layer, const Plan& plan) {
  switch (layer.sizes.dtype) {
    case DType::float64: return custom_backward_double(layer, plan);
    case DType::bfloat16: return custom_backward_BFloat16(layer, plan);
    case DType::float16: return custom_backward_Half(layer, plan);
    case DType::float32: break;
  }
  return custom_backward_float(layer, plan);
}

}  // namespace fused_rnn

#define FRNN_CUSTOM_CELL(number, isa, gates, saved, states)                                       \
  extern "C" FRNN_EXPORT const fused_rnn::CustomCell* fused_rnn_custom_cell() {                   \
    using namespace fused_rnn;                                                                    \
    static const CustomCell cell = {sizes_of_layers, CellKind(number), isa, gates, saved, states, \
                                    &custom_forward, &custom_backward};                           \
    return &cell;                                                                                 \
  }
