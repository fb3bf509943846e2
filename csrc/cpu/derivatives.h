// What forward mode and second derivatives need beside scans: the coefficients of a cell made linear about steps that
// were computed, and how the gradients of those steps change (cells/linearised.h). Rows are independent here, over all
// steps.
#pragma once

#include "../cells/linearised.h"
#include "options.h"
#include "run.h"

namespace fused_rnn {
namespace FRNN_ISA {

// One vector of units of a row as values of a cell.
template <class S>
struct UnitsOfRow {
  using Values = Pack<typename Simd<S>::V, 1>;
  int64_t H, row, unit, n;

  FRNN_INLINE Values load(const void* data, int count = 1, int j = 0) const {
    if (!data) return {};
    return {{Simd<S>::load_n(rows_of<S>(data) + (row * count + j) * H + unit, n)}};
  }
  FRNN_INLINE void store(void* data, const Values& value, int count = 1, int j = 0) const {
    if (data) Simd<S>::store_n(rows_of<S>(data) + (row * count + j) * H + unit, value.v[0], n);
  }
  template <class Cell>
  FRNN_INLINE KnownStep<Values> known(const KnownSteps& s) const {
    KnownStep<Values> step{};
    for (int g = 0; g < Cell::saved; ++g) step.saved[g] = load(s.saved, Cell::saved, g);
    step.h = load(s.h);
    step.h_prev = load(s.h_prev);
    step.c = load(s.c);
    step.c_prev = load(s.c_prev);
    return step;
  }
};

template <class S, class F>
void each_vector_of_units(int64_t H, int64_t begin, int64_t end, F f) {
  constexpr int width = Simd<S>::width;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t unit = 0; unit < H; unit += width) f(UnitsOfRow<S>{H, row, unit, H - unit});
  }
}

// Rows [begin, end) of the coefficients, (N, coefficients * H).
template <class Cell, class S>
void coefficients_of(const KnownSteps& steps, int64_t begin, int64_t end, void* coefficients) {
  constexpr int count = Derivatives<Cell>::Linear::coefficients;
  each_vector_of_units<S>(steps.H, begin, end, [&](const UnitsOfRow<S>& at) __attribute__((always_inline)) {
    using Values = typename UnitsOfRow<S>::Values;
    Values k[count];
    Derivatives<Cell>::template coefficients<Values>(at.template known<Cell>(steps), k);
    for (int j = 0; j < count; ++j) at.store(coefficients, k[j], count, j);
  });
}

// Rows [begin, end) of how gradients change: of the sums (N, grad_gates * H), of h before the step, of c before it.
template <class Cell, class S>
void changes_of(const KnownSteps& steps, int64_t begin, int64_t end, void* of_sums, void* of_h, void* of_c) {
  constexpr int count = Cell::grad_gates;
  each_vector_of_units<S>(steps.H, begin, end, [&](const UnitsOfRow<S>& at) __attribute__((always_inline)) {
    using Values = typename UnitsOfRow<S>::Values;
    Values sums[count], grads[count], grad_h, grad_c;
    for (int g = 0; g < count; ++g) sums[g] = at.load(steps.sums_t, count, g);
    KnownStep<Values> change{};
    change.h = at.load(steps.h_t);
    change.h_prev = at.load(steps.h_prev_t);
    change.c = at.load(steps.c_t);
    change.c_prev = at.load(steps.c_prev_t);
    changed_gradients<Cell, Values>(at.template known<Cell>(steps), change, sums, at.load(steps.grad_h),
                                    at.load(steps.grad_c), grads, grad_h, grad_c);
    for (int g = 0; g < count; ++g) at.store(of_sums, grads[g], count, g);
    at.store(of_h, grad_h);
    if constexpr (Cell::has_cell) at.store(of_c, grad_c);
  });
}

// f(cell, element) of a kind and a dtype, which is float32 or float64.
template <class F>
auto with_cell_of(CellKind kind, DType dtype, F f) {
  const auto with = [&](auto cell) { return dtype == DType::float64 ? f(cell, double()) : f(cell, float()); };
  switch (kind) {
    case CellKind::rnn_tanh: return with(RnnTanh());
    case CellKind::rnn_relu: return with(RnnRelu());
    case CellKind::gru: return with(Gru());
    case CellKind::lstm:
    case CellKind::custom: break;
  }
  return with(Lstm());
}

inline bool linear_forward(const LayerForward& layer, const Plan& plan) {
  return with_cell_of(layer.sizes.kind, layer.sizes.dtype, [&](auto cell, auto element) {
    return run_forward<typename Derivatives<decltype(cell)>::Linear, decltype(element)>(layer, plan);
  });
}

inline bool linear_backward(const LayerBackward& layer, const Plan& plan) {
  return with_cell_of(layer.sizes.kind, layer.sizes.dtype, [&](auto cell, auto element) {
    using S = decltype(element);
    return BackwardPass<typename Derivatives<decltype(cell)>::Linear, S, S>(layer, plan).run();
  });
}

inline void coefficients(const KnownSteps& steps, int64_t begin, int64_t end, void* result) {
  with_cell_of(steps.kind, steps.dtype, [&](auto cell, auto element) {
    coefficients_of<decltype(cell), decltype(element)>(steps, begin, end, result);
  });
}

inline void gradient_changes(const KnownSteps& steps, int64_t begin, int64_t end, void* of_sums, void* of_h,
                             void* of_c) {
  with_cell_of(steps.kind, steps.dtype, [&](auto cell, auto element) {
    changes_of<decltype(cell), decltype(element)>(steps, begin, end, of_sums, of_h, of_c);
  });
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
