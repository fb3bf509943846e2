// The passes of a layer of one cell, in the shape that suits it.
#pragma once

#include "backward.h"
#include "forward.h"

namespace fused_rnn {
namespace FRNN_ISA {

// Whether a panel of a cell of one gate has two vectors of units: but for the smallest layers, which fit one.
template <class S>
bool has_wide_panels(int64_t hidden_size, int64_t heads) {
  constexpr int width = Simd<typename Accumulator<S>::type>::width;
  return hidden_size > width && (heads == 1 || hidden_size / heads % (2 * width) == 0);
}

template <class Cell, class S>
bool run_forward(const LayerForward& layer, const Plan& plan) {
  if constexpr (Cell::gates == 1 && gates_apart<Cell>() == 0) {
    if (has_wide_panels<S>(layer.sizes.hidden_size, layer.sizes.heads))
      return ForwardPass<Cell, S, 2>(layer, plan).run();
  }
  return ForwardPass<Cell, S, 1>(layer, plan).run();
}

template <class Cell, class S>
bool run_backward(const LayerBackward& layer, const Plan& plan) {
  // In place, few rows are multiplied in the accumulation type whatever the weights are stored in.
  using A = typename Accumulator<S>::type;
  using InPlace = BackwardPass<Cell, S, A>;
  if (InPlace::in_place(layer) && layer.steps.total_rows() < least_rows_in_lanes<A>) return InPlace(layer, plan).run();
  return BackwardPass<Cell, S, typename ProductElement<S>::type>(layer, plan).run();
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
