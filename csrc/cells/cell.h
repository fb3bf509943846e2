// What a cell is to the loops of cpu/ and cuda/. A new cell is one header with a struct of this shape, and one function
// in fused_rnn/reference.py.
//
//   kind                 its CellKind
//   gates                products per unit and step: rows of w_ih and w_hh are gate-major, (gates * H)
//   saved                values per unit and step that the backward pass wants back (0: h alone is enough)
//   grad_gates           gradients per unit and step that go into the weight products
//   states               private states beside h, as an LSTM's c, one value each per unit; has_cell: whether any
//   reads_h              whether h_prev is wanted but for its product
//   hidden_bias_apart(g) true where b_hh of gate g must stay with the recurrent product instead of joining b_ih
//   input_grads, hidden_grads
//                        which of the grad_gates belong to w_ih and w_hh: `gates` of them from `first` on, the j-th
//                        being the gradient of weight gate `gate[j]`
//
//   forward(x, r, h_prev, c_prev, h, c, saved, options)
//       x[gates]: input projections with their biases; r[gates]: recurrent products (with b_hh where it is apart)
//   backward(saved, h, h_prev, c, c_prev, dh, dc, grads, dh_prev, dc_prev, options)
//       dh, dc: gradients of this step's h and c; grads[grad_gates]; dh_prev: the part of the gradient of h_prev that
//       does not go through w_hh; dc_prev: the gradient of c_prev
//   options: PlainGates where a call leaves them out, or what options.h describes. h and c are those of the cell's own
//       formulas: zoneout, resets and dropout are for the loops.
//
// V is a scalar or a SIMD vector (cells/math.h, Lanes).
#pragma once

#include "../problem.h"
#include "math.h"
#include "options.h"

namespace fused_rnn {

// Which weight gates a run of grad_gates belongs to.
struct GateGrads {
  int first;
  int gate[8];
};

// Gates at the end of those of a cell whose b_hh stays with the recurrent product.
template <class Cell>
constexpr int gates_apart() {
  int count = 0;
  for (int g = 0; g < Cell::gates; ++g) count += Cell::hidden_bias_apart(g);
  return count;
}

}  // namespace fused_rnn
