// One step of a layer with options, beside the plain one of step.cuh, which it never slows down: a kernel of its own
// for each cell and dtype, in which every option is a value that all threads branch on alike.
//
// A thread takes one unit of a row, whatever the dtype: neighbouring threads take neighbouring units, so that a warp
// reads whole sectors of memory, and there is one instantiation where vectors would want two. As in step.cuh a thread
// loads all it needs before it stores anything.
#pragma once

#include "../cells/gru_reset_before.h"
#include "../cells/options.h"
#include "step.cuh"
#include "zone.cuh"

namespace fused_rnn {
namespace cuda {

template <class Step, class Options>
struct OptionArguments {
  Step direction[2];
  Options options[2];
  Within within;
  int64_t hidden_size;
  int log2_lanes;
};

// The element at `index`, widened, or zero where p is null.
template <class S>
FRNN_DEVICE typename Accumulator<S>::type load_one(const void* p, int64_t index) {
  return p ? widen(static_cast<const S*>(p)[index]) : typename Accumulator<S>::type(0);
}
template <class S, class A>
FRNN_DEVICE void store_one(void* p, int64_t index, A value) {
  if (p) static_cast<S*>(p)[index] = narrow<S>(value);
}
// As it is once it has been stored.
template <class S, class A>
FRNN_DEVICE A rounded(A value) {
  return widen(narrow<S>(value));
}

// Functions for OptionalGates (cells/options.h): which one is the same for all threads.
template <class V>
struct InlineFunctions {
  static FRNN_HOST_DEVICE void activate(Activation which, V* a, int count) {
    for (int k = 0; k < count; ++k) a[k] = fused_rnn::activate<V>(which, a[k]);
  }
};

template <class S>
FRNN_DEVICE auto options_of(const Within& within, const void* peephole, int64_t hidden_size, int64_t unit) {
  using A = typename Accumulator<S>::type;
  OptionalGates<A, false, InlineFunctions<A>> options{within, {}};
  if (within.peephole) {
    FRNN_UNROLL
    for (int k = 0; k < 3; ++k) options.peephole[k] = load_one<S>(peephole, k * hidden_size + unit);
  }
  return options;
}

// What of a unit's saved values and gradients a step's own kernels write: all, but for those of the kernels before and
// after them where the reset gate is before the product.
template <class Cell>
struct InStep {
  static constexpr int saved = Cell::saved, first_grad = 0, end_grad = Cell::grad_gates;
};
template <>
struct InStep<GruResetBefore> {
  static constexpr int saved = 3, first_grad = 1, end_grad = 3;
};

template <class Cell, class S>
__global__ void __launch_bounds__(step_threads)
    step_forward_with_options_kernel(const __grid_constant__ OptionArguments<StepForward, ForwardOptions> arguments) {
  using A = typename Accumulator<S>::type;
  constexpr int C = states_or_one<Cell>;
  const StepForward& s = arguments.direction[block_z()];
  const ForwardOptions& o = arguments.options[block_z()];
  const Within& within = arguments.within;
  const int64_t H = arguments.hidden_size;
  for_each_vector<1>(s.rows, H, arguments.log2_lanes, [&](int64_t row, int64_t unit) {
    const int64_t index = row * H + unit;
    const bool goes_on = row < s.previous_rows;
    const bool keeps = s.mask && !s.mask[row];
    const bool anew = o.anew && o.anew[row];
    const A h_prev = load_one<S>(goes_on ? s.h : s.h0, index);
    // A private state of the unit.
    const auto place = [&](int j) { return (row * Cell::states + j) * H + unit; };
    A c_prev[C] = {}, c_next[C] = {}, h_next = 0;
    FRNN_UNROLL
    for (int j = 0; j < Cell::states; ++j)
      c_prev[j] = goes_on ? load_one<A>(s.c, place(j)) : load_one<S>(s.c0, place(j));
    if (anew) {
      h_next = load_one<S>(o.reset_h, index);
      FRNN_UNROLL
      for (int j = 0; j < Cell::states; ++j) c_next[j] = load_one<S>(o.reset_c, place(j));
    }
    const A factor = o.dropout ? load_one<S>(o.dropout, index) : A(1);

    A h = h_prev, c[C], saved[Cell::saved + 1] = {};
    FRNN_UNROLL
    for (int j = 0; j < C; ++j) c[j] = c_prev[j];
    if (!keeps) {
      A x[Cell::gates], r[Cell::gates];
      FRNN_UNROLL
      for (int g = 0; g < Cell::gates; ++g) {
        x[g] = load_one<S>(s.projection, row * s.projection_stride + g * H + unit) + load_one<S>(s.b_ih, g * H + unit);
        r[g] = load_one<A>(s.product, (row * Cell::gates + g) * H + unit);
        (Cell::hidden_bias_apart(g) ? r : x)[g] += load_one<S>(s.b_hh, g * H + unit);
      }
      const auto options = options_of<S>(within, o.peephole, H, unit);
      forward_of<Cell>(x, r, h_prev, c_prev, h, c, saved, options);
      h = rounded<S>(Zone<A>(o.zoneout, within.zoneout, row, unit, H).applied(h, h_prev));
      FRNN_UNROLL
      for (int j = 0; j < Cell::states; ++j)
        c[j] = Zone<A>(o.zoneout_cell, within.zoneout_cell, row, unit, H).applied(c[j], c_prev[j]);
    }
    if (!anew) {
      h_next = h;
      FRNN_UNROLL
      for (int j = 0; j < C; ++j) c_next[j] = c[j];
    }

    FRNN_UNROLL
    for (int k = 0; k < InStep<Cell>::saved; ++k) store_one<S>(s.gates, (row * Cell::saved + k) * H + unit, saved[k]);
    FRNN_UNROLL
    for (int j = 0; j < Cell::states; ++j) {
      store_one<A>(s.c, place(j), c_next[j]);
      store_one<S>(s.c_n, place(j), c[j]);
      store_one<A>(s.cells, place(j), c[j]);
    }
    store_one<S>(s.h, index, h_next);
    store_one<S>(o.multiplied, index, h_next * factor);
    store_one<S>(s.y, row * s.y_stride + unit, h);
  });
}

template <class Cell, class S>
__global__ void __launch_bounds__(step_threads) step_backward_with_options_kernel(
    const __grid_constant__ OptionArguments<StepBackward, BackwardOptions> arguments) {
  using A = typename Accumulator<S>::type;
  constexpr int C = states_or_one<Cell>;
  const StepBackward& s = arguments.direction[block_z()];
  const BackwardOptions& o = arguments.options[block_z()];
  const Within& within = arguments.within;
  const int64_t H = arguments.hidden_size;
  for_each_vector<1>(s.rows, H, arguments.log2_lanes, [&](int64_t row, int64_t unit) {
    const int64_t index = row * H + unit;
    const bool goes_on = row < s.previous_rows;
    const bool keeps = s.mask && !s.mask[row];
    const bool anew = o.anew && o.anew[row];
    const auto place = [&](int j) { return (row * Cell::states + j) * H + unit; };
    A saved[Cell::saved + 1] = {}, h = 0, h_prev = 0, c[C] = {}, c_prev[C] = {}, dc[C] = {};
    FRNN_UNROLL
    for (int k = 0; k < Cell::saved; ++k) saved[k] = load_one<S>(s.gates, (row * Cell::saved + k) * H + unit);
    if constexpr (Cell::saved == 0) h = load_one<S>(s.y, row * s.y_stride + unit);
    if constexpr (Cell::reads_h) {
      h_prev = anew      ? load_one<S>(o.reset_h, index)
               : goes_on ? load_one<S>(s.previous_y, row * s.y_stride + unit)
                         : load_one<S>(s.h0, index);
    }
    FRNN_UNROLL
    for (int j = 0; j < Cell::states; ++j) {
      c[j] = load_one<A>(s.cells, place(j));
      c_prev[j] = anew      ? load_one<S>(o.reset_c, place(j))
                  : goes_on ? load_one<A>(s.previous_cells, place(j))
                            : load_one<S>(s.c0, place(j));
      dc[j] = load_one<A>(s.dc, place(j)) + load_one<A>(o.grad_cells, place(j));
    }
    const A dh = load_one<A>(s.dh, index) + load_one<S>(o.grad_h, row * o.grad_h_stride + unit) +
                 load_one<S>(s.grad_y, row * s.grad_y_stride + unit);

    A grads[Cell::grad_gates] = {}, dh_prev = dh, dc_prev[C], hidden = 0;
    FRNN_UNROLL
    for (int j = 0; j < C; ++j) dc_prev[j] = dc[j];
    if (!keeps) {
      A h_to_before = 0, c_to_before[C] = {}, own_h = dh, own_c[C];  // past the cell, by zoneout, and to it
      Zone<A>(o.zoneout, within.zoneout, row, unit, H).divide(own_h, h_to_before);
      FRNN_UNROLL
      for (int j = 0; j < C; ++j) {
        own_c[j] = dc[j];
        if constexpr (Cell::has_cell)
          Zone<A>(o.zoneout_cell, within.zoneout_cell, row, unit, H).divide(own_c[j], c_to_before[j]);
      }
      const auto options = options_of<S>(within, o.peephole, H, unit);
      backward_of<Cell>(saved, h, h_prev, c, c_prev, own_h, own_c, grads, dh_prev, dc_prev, options);
      dh_prev += h_to_before;
      FRNN_UNROLL
      for (int j = 0; j < C; ++j) dc_prev[j] += c_to_before[j];
      if constexpr (Cell::kind == CellKind::lstm) {
        if (o.hidden) hidden = Cell::template hidden<A>(saved, c[0], c_prev[0], options);
        if (o.grad_peephole) {
          A* sums = static_cast<A*>(o.grad_peephole) + row * 3 * H + unit;
          sums[0] += grads[0] * c_prev[0];
          sums[H] += grads[1] * c_prev[0];
          sums[2 * H] += grads[3] * Cell::template cell_of<A>(saved, c[0], c_prev[0], options);
        }
      }
    }

    FRNN_UNROLL
    for (int k = InStep<Cell>::first_grad; k < InStep<Cell>::end_grad; ++k)
      store_one<S>(s.grad_gates, (row * Cell::grad_gates + k) * H + unit, grads[k]);
    store_one<A>(s.dh, index, dh_prev);
    FRNN_UNROLL
    for (int j = 0; j < Cell::states; ++j) store_one<A>(s.dc, place(j), dc_prev[j]);
    if constexpr (Cell::has_cell) store_one<S>(o.hidden, index, hidden);
  });
}

// Before the product with W_hn: r, and what it leaves of h.
template <class S>
__global__ void __launch_bounds__(step_threads)
    reset_forward_kernel(const __grid_constant__ OptionArguments<StepForward, ForwardOptions> arguments) {
  using A = typename Accumulator<S>::type;
  using Cell = GruResetBefore;
  const StepForward& s = arguments.direction[block_z()];
  const ForwardOptions& o = arguments.options[block_z()];
  const int64_t H = arguments.hidden_size;
  for_each_vector<1>(s.rows, H, arguments.log2_lanes, [&](int64_t row, int64_t unit) {
    const int64_t index = row * H + unit;
    A gated = 0;
    if (!s.mask || s.mask[row]) {
      const A h = load_one<S>(row < s.previous_rows ? s.h : s.h0, index);
      const A multiplied = o.dropout ? h * load_one<S>(o.dropout, index) : h;
      A x = load_one<S>(s.projection, row * s.projection_stride + unit) + load_one<S>(s.b_ih, unit);
      x += load_one<S>(s.b_hh, unit);
      const A r = load_one<A>(s.product, row * Cell::gates * H + unit);
      gated = Cell::reset<A>(x, r, options_of<S>(arguments.within, nullptr, H, unit)) * multiplied;
    }
    store_one<S>(o.gated, row * o.gated_stride + unit, gated);
  });
}

// After the gradient of n's sum has met W_hn: what r gets of it, and h by way of r * h.
template <class S>
__global__ void __launch_bounds__(step_threads)
    reset_backward_kernel(const __grid_constant__ OptionArguments<StepBackward, BackwardOptions> arguments) {
  using A = typename Accumulator<S>::type;
  using Cell = GruResetBefore;
  const StepBackward& s = arguments.direction[block_z()];
  const BackwardOptions& o = arguments.options[block_z()];
  const int64_t H = arguments.hidden_size;
  for_each_vector<1>(s.rows, H, arguments.log2_lanes, [&](int64_t row, int64_t unit) {
    const int64_t index = row * H + unit;
    A to_reset = 0, to_h = 0;
    if (!s.mask || s.mask[row]) {
      const A reset = load_one<S>(s.gates, row * Cell::saved * H + unit), gradient = load_one<A>(o.grad_gated, index);
      const A h = o.anew && o.anew[row]   ? load_one<S>(o.reset_h, index)
                  : row < s.previous_rows ? load_one<S>(s.previous_y, row * s.y_stride + unit)
                                          : load_one<S>(s.h0, index);
      const A factor = o.dropout ? load_one<S>(o.dropout, index) : A(1);
      const auto options = options_of<S>(arguments.within, nullptr, H, unit);
      to_reset = Cell::reset_backward<A>(reset, h * factor, gradient, options);
      to_h = reset * gradient;
    }
    const A dh = o.grad_multiplied ? A(0) : load_one<A>(s.dh, index);
    store_one<S>(s.grad_gates, row * Cell::grad_gates * H + unit, to_reset);
    store_one<A>(o.grad_multiplied ? o.grad_multiplied : s.dh, index, dh + to_h);
  });
}

template <class S>
__global__ void __launch_bounds__(step_threads)
    projected_forward_kernel(const __grid_constant__ StepArguments<ProjectedForward> arguments) {
  using A = typename Accumulator<S>::type;
  const ProjectedForward& s = arguments.direction[block_z()];
  const int64_t P = arguments.hidden_size;
  for_each_vector<1>(s.rows, P, arguments.log2_lanes, [&](int64_t row, int64_t unit) {
    const int64_t index = row * P + unit;
    const bool keeps = s.mask && !s.mask[row];
    const A before = load_one<S>(s.h, index);
    const A factor = s.dropout ? load_one<S>(s.dropout, index) : A(1);
    A h = before;
    if (!keeps)
      h = rounded<S>(Zone<A>(s.zoneout, s.rate, row, unit, P).applied(load_one<A>(s.projected, index), before));
    const A next = s.anew && s.anew[row] ? load_one<S>(s.reset_h, index) : h;
    store_one<S>(s.h, index, next);
    store_one<S>(s.multiplied, index, next * factor);
    store_one<S>(s.y, row * s.y_stride + unit, h);
  });
}

template <class S>
__global__ void __launch_bounds__(step_threads)
    projected_backward_kernel(const __grid_constant__ StepArguments<ProjectedBackward> arguments) {
  using A = typename Accumulator<S>::type;
  const ProjectedBackward& s = arguments.direction[block_z()];
  const int64_t P = arguments.hidden_size;
  for_each_vector<1>(s.rows, P, arguments.log2_lanes, [&](int64_t row, int64_t unit) {
    const int64_t index = row * P + unit;
    A own = load_one<A>(s.dh, index) + load_one<S>(s.grad_h, row * s.grad_h_stride + unit) +
            load_one<S>(s.grad_y, row * s.grad_y_stride + unit);
    A before = own;
    if (s.mask && !s.mask[row]) {
      own = 0;
    } else {
      Zone<A>(s.zoneout, s.rate, row, unit, P).divide(own, before);
    }
    store_one<A>(s.dh, index, before);
    store_one<S>(s.projected, index, own);
  });
}

struct HandBackArguments {
  HandedBack direction[2];
  int64_t hidden_size;  // the larger of the two that follow
  int64_t state_size, cell_size;
  int log2_lanes;
};

template <class S>
__global__ void __launch_bounds__(step_threads) hand_back_kernel(const __grid_constant__ HandBackArguments arguments) {
  using A = typename Accumulator<S>::type;
  const HandedBack& s = arguments.direction[block_z()];
  const int64_t P = arguments.state_size, H = arguments.cell_size;
  for_each_vector<1>(s.rows, arguments.hidden_size, arguments.log2_lanes, [&](int64_t row, int64_t unit) {
    const bool anew = s.anew && s.anew[row];
    // What no earlier step gets goes to `sums`, if anything wants it.
    const auto end = [&](void* gradients, void* sums, int64_t index, A gradient) {
      if (anew && sums) static_cast<A*>(sums)[index] += gradient;
      static_cast<A*>(gradients)[index] = A(0);
    };
    if (unit < P) {
      const int64_t index = row * P + unit;
      A dh = load_one<A>(s.dh, index);
      if (s.product) dh += load_one<A>(s.product, index) * load_one<S>(s.dropout, index);
      if (anew || s.ends) {
        end(s.dh, s.grad_reset_h, index, dh);
      } else {
        const bool clips = s.clip > 0 && row < s.previous_rows && (!s.clips || s.clips[row]);
        store_one<A>(s.dh, index, clips ? clamped<A>(dh, A(s.clip)) : dh);
      }
    }
    if (unit < H && (anew || s.ends)) end(s.dc, s.grad_reset_c, row * H + unit, load_one<A>(s.dc, row * H + unit));
  });
}

// --- Launches, as in step.cuh.

template <class Cell, class S>
auto step_kernel_with_options(const StepForward&) {
  return step_forward_with_options_kernel<Cell, S>;
}
template <class Cell, class S>
auto step_kernel_with_options(const StepBackward&) {
  return step_backward_with_options_kernel<Cell, S>;
}

// f(an S) of the dtype.
template <class F>
void with_element(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float64: return f(double{});
    case DType::bfloat16: return f(BFloat16{});
    case DType::float16: return f(Half{});
  }
}

// The plain recurrence has one kernel: its function is an option here.
template <class F>
void with_cell_of_options(CellKind kind, F f) {
  switch (kind) {
    case CellKind::rnn_tanh:
    case CellKind::rnn_relu: return f(RnnTanh{});
    case CellKind::lstm: return f(Lstm{});
    case CellKind::gru: return f(Gru{});
    case CellKind::custom: break;
  }
}

// Step: StepForward with ForwardOptions, or StepBackward with BackwardOptions.
template <class Step, class Options, class Kernel, class Launch>
void launch_with_options(Kernel kernel, int64_t hidden_size, const Step* directions, const Options* options,
                         const Within& within, int count, Launch launch) {
  OptionArguments<Step, Options> arguments{};
  for (int d = 0; d < count; ++d) {
    arguments.direction[d] = directions[d];
    arguments.options[d] = options[d];
  }
  arguments.within = within;
  arguments.hidden_size = hidden_size;
  const StepGrid grid = step_grid(arguments, count, 1);
  launch(kernel, grid, step_threads, 0, arguments);
}

template <class Cell, class S, class Step, class Options, class Launch>
void launch_step_with_options_of(int64_t hidden_size, const Step* directions, const Options* options,
                                 const Within& within, int count, Launch launch) {
  launch_with_options(step_kernel_with_options<Cell, S>(*directions), hidden_size, directions, options, within, count,
                      launch);
}

template <class Step, class Options, class Launch>
void launch_step_with_options(CellKind kind, DType dtype, int64_t hidden_size, const Step* directions,
                              const Options* options, const Within& within, int count, Launch launch) {
  with_element(dtype, [&](auto element) {
    const auto with = [&](auto cell) {
      launch_step_with_options_of<decltype(cell), decltype(element)>(hidden_size, directions, options, within, count,
                                                                     launch);
    };
    if (within.reset_after) return with_cell_of_options(kind, with);
    with(GruResetBefore{});
  });
}

template <class S>
auto reset_kernel(const StepForward&) {
  return reset_forward_kernel<S>;
}
template <class S>
auto reset_kernel(const StepBackward&) {
  return reset_backward_kernel<S>;
}

// Step and Options as launch_step_with_options, of a GRU whose reset gate is before the product.
template <class Step, class Options, class Launch>
void launch_reset(DType dtype, int64_t hidden_size, const Step* directions, const Options* options,
                  const Within& within, int count, Launch launch) {
  with_element(dtype, [&](auto element) {
    launch_with_options(reset_kernel<decltype(element)>(*directions), hidden_size, directions, options, within, count,
                        launch);
  });
}

// Step: ProjectedForward or ProjectedBackward, over rows of P.
template <class S>
auto state_kernel(const ProjectedForward&) {
  return projected_forward_kernel<S>;
}
template <class S>
auto state_kernel(const ProjectedBackward&) {
  return projected_backward_kernel<S>;
}

template <class Step, class Launch>
void launch_states(DType dtype, int64_t state_size, const Step* directions, int count, Launch launch) {
  StepArguments<Step> arguments{};
  for (int d = 0; d < count; ++d) arguments.direction[d] = directions[d];
  arguments.hidden_size = state_size;
  const StepGrid grid = step_grid(arguments, count, 1);
  with_element(dtype, [&](auto element) {
    launch(state_kernel<decltype(element)>(*directions), grid, step_threads, 0, arguments);
  });
}

template <class Launch>
void launch_hand_back(DType dtype, int64_t state_size, int64_t cell_size, const HandedBack* directions, int count,
                      Launch launch) {
  HandBackArguments arguments{};
  for (int d = 0; d < count; ++d) arguments.direction[d] = directions[d];
  arguments.state_size = state_size;
  arguments.cell_size = cell_size;
  arguments.hidden_size = state_size > cell_size ? state_size : cell_size;
  const StepGrid grid = step_grid(arguments, count, 1);
  with_element(dtype,
               [&](auto element) { launch(hand_back_kernel<decltype(element)>, grid, step_threads, 0, arguments); });
}

}  // namespace cuda
}  // namespace fused_rnn
