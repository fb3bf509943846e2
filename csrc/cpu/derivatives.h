// How the gradients of steps change with the steps (cells/derivatives.h), which concerns each row of all steps by
// itself. What goes through time is in the passes: forward.h and backward.h.
#pragma once

#include "../cells/derivatives.h"
#include "forward.h"
#include "kernels.h"

namespace fused_rnn {
namespace FRNN_ISA {

template <class Cell, class S>
void changes_of(const ChangedSteps& s, int64_t begin, int64_t end) {
  using Values = Pack<typename Simd<S>::V, 1>;
  constexpr int width = Simd<S>::width;
  const int64_t H = s.H, last = s.T * s.B;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t before = s.reverse ? row + s.B : row - s.B;
    const KnownPlace at{row, before < last ? before : -1, row % s.B};
    for (int64_t unit = 0; unit < H; unit += width) {
      const int64_t n = H - unit;
      const auto load = [&](const void* data) __attribute__((always_inline)) {
        return data ? Values{{Simd<S>::load_n(rows_of<S>(data) + row * H + unit, n)}} : Values{};
      };
      const auto store = [&](void* data, int64_t place, const Values& value) __attribute__((always_inline)) {
        if (data) Simd<S>::store_n(rows_of<S>(data) + place * H + unit, value.v[0], n);
      };
      KnownStep<Values> step{}, change{};
      load_known<Cell, S>(s.known, at, H, s.h_stride, unit, n, 0, step);
      load_known<Cell, S>(s.change, at, H, s.h_stride, unit, n, 0, change);
      Values grads[Cell::grad_gates], grad_h, grad_c;
      changed_gradients<Cell, Values>(step, change, load(s.grad_h), load(s.grad_c), grads, grad_h, grad_c);
      for (int g = 0; g < Cell::grad_gates; ++g) store(s.sums, row * Cell::grad_gates + g, grads[g]);
      store(s.h, row, grad_h);
      store(s.c, row, grad_c);
    }
  }
}

template <class Cell>
void changes_of_cell(const ChangedSteps& s, int64_t begin, int64_t end) {
  if (s.dtype == DType::float64) return changes_of<Cell, double>(s, begin, end);
  changes_of<Cell, float>(s, begin, end);
}

void gradient_changes(const ChangedSteps& s, int64_t begin, int64_t end) {
  switch (s.kind) {
    case CellKind::rnn_tanh: return changes_of_cell<RnnTanh>(s, begin, end);
    case CellKind::rnn_relu: return changes_of_cell<RnnRelu>(s, begin, end);
    case CellKind::gru: return changes_of_cell<Gru>(s, begin, end);
    case CellKind::lstm:
    case CellKind::custom: break;
  }
  changes_of_cell<Lstm>(s, begin, end);
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
