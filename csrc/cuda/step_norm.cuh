// One step of a layer with layer normalisation (Ba et al. 2016), beside what else options do: W_ih x, W_hh h and, of an
// LSTM, c are each normalised over all that a row has of them.
//
// A block takes a row, and a thread every norm_threads-th unit of it with all its gates, from the first sum to the last
// store: what stands in memory where others' sums were read is written after all have read, and what a thread puts down
// for itself it finds again without a barrier. As on the CPU (cpu/layer_norm.h) a mean is that of the differences to
// the row's first value, so that a large mean costs no digits, and sums have a fixed order.
#pragma once

#include "step_options.cuh"

namespace fused_rnn {
namespace cuda {

constexpr int norm_threads = 256;
constexpr int norm_warps = norm_threads / warp_size;
constexpr int norm_shared_bytes = norm_warps * int(sizeof(double));

template <class Step, class Options, class Norm>
struct NormArguments {
  Step direction[2];
  Options options[2];
  Norm norm[2];
  Within within;
  int64_t hidden_size;
};

// The same for all threads of the block.
template <class A>
FRNN_DEVICE A sum_of_block(A value) {
  FRNN_UNROLL
  for (int mask = warp_size / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  A* shared = reinterpret_cast<A*>(shared_memory());
  sync_threads();  // the sum before this one has been read
  if (lane_index() == 0) shared[warp_index()] = value;
  sync_threads();
  A sum = 0;
  FRNN_UNROLL
  for (int warp = 0; warp < norm_warps; ++warp) sum += shared[warp];
  return sum;
}

template <class A>
FRNN_DEVICE A inverse_deviation(A squares, int64_t count) {
  return A(1) / std::sqrt(squares / A(count) + A(layer_norm_epsilon));
}

// Of `gates` values for each unit of a row.
template <class A>
struct Moments {
  A mean, scale;  // scale: one over the deviation

  FRNN_DEVICE A centred(A value) const { return value - mean; }
  FRNN_DEVICE A normal(A value) const { return (value - mean) * scale; }
};

// value(gate, unit) of this thread's units; first: the row's first value.
template <int gates, class A, class Value>
FRNN_DEVICE Moments<A> moments_of(int64_t hidden_size, A first, Value value) {
  Moments<A> moments;
  const auto sum_over = [&](auto term) {
    A sum = 0;
    for (int64_t unit = thread_index(); unit < hidden_size; unit += norm_threads) FRNN_UNROLL
    for (int g = 0; g < gates; ++g) sum += term(value(g, unit));
    return sum_of_block<A>(sum);
  };
  const int64_t count = gates * hidden_size;
  moments.mean = first + sum_over([&](A v) { return v - first; }) / A(count);
  moments.scale = inverse_deviation<A>(sum_over([&](A v) { return (v - moments.mean) * (v - moments.mean); }), count);
  return moments;
}

// What was normalised on either side of a gate.
struct InputSide {
  static constexpr int number = 0;
  template <class Cell>
  static constexpr GateGrads order = Cell::input_grads;
};
struct StateSide {
  static constexpr int number = 1;
  template <class Cell>
  static constexpr GateGrads order = Cell::hidden_grads;
};

// With normalisation `saved` values of a unit are followed by those of w_ih x and of w_hh h less their means.
template <class Cell>
constexpr int saved_with_norm = Cell::saved + 2 * Cell::gates;
template <class Cell>
constexpr int grads_with_norm = Cell::grad_gates + 2 * Cell::gates;

template <class Cell, class S>
__global__ void __launch_bounds__(norm_threads) step_forward_with_norm_kernel(
    const __grid_constant__ NormArguments<StepForward, ForwardOptions, ForwardNorm> arguments) {
  using A = typename Accumulator<S>::type;
  constexpr int G = Cell::gates, V = saved_with_norm<Cell>;
  constexpr bool is_lstm = Cell::kind == CellKind::lstm;
  const StepForward& s = arguments.direction[block_z()];
  const ForwardOptions& o = arguments.options[block_z()];
  const ForwardNorm& n = arguments.norm[block_z()];
  const Within& within = arguments.within;
  const int64_t H = arguments.hidden_size;
  for (int64_t row = block_x(); row < s.rows; row += grid_x()) {
    const bool goes_on = row < s.previous_rows;
    const bool keeps = s.mask && !s.mask[row];
    const bool anew = o.anew && o.anew[row];
    const auto before = [&](int64_t index) { return load_one<S>(goes_on ? s.h : s.h0, index); };
    const auto finish = [&](int64_t unit, A h) {
      const int64_t index = row * H + unit;
      const A next = anew ? load_one<S>(o.reset_h, index) : h;
      const A factor = o.dropout ? load_one<S>(o.dropout, index) : A(1);
      store_one<S>(s.h, index, next);
      store_one<S>(o.multiplied, index, next * factor);
      store_one<S>(s.y, row * s.y_stride + unit, h);
    };
    const auto finish_cell = [&](int64_t unit, A c) {
      const int64_t index = row * H + unit;
      store_one<A>(s.c, index, anew ? load_one<S>(o.reset_c, index) : c);
      store_one<S>(s.c_n, index, c);
      store_one<A>(s.cells, index, c);
    };
    if (keeps) {
      for (int64_t unit = thread_index(); unit < H; unit += norm_threads) {
        const A h = before(row * H + unit);
        if constexpr (Cell::has_cell)
          finish_cell(unit, goes_on ? load_one<A>(s.c, row * H + unit) : load_one<S>(s.c0, row * H + unit));
        FRNN_UNROLL
        for (int k = 0; k < V; ++k) store_one<S>(s.gates, (row * V + k) * H + unit, A(0));
        finish(unit, h);
      }
      continue;
    }

    const auto projection = [&](int g, int64_t unit) {
      return load_one<S>(s.projection, row * s.projection_stride + g * H + unit);
    };
    const auto product = [&](int g, int64_t unit) { return load_one<A>(s.product, (row * G + g) * H + unit); };
    const auto of_x = moments_of<G, A>(H, projection(0, 0), projection);
    const auto of_h = moments_of<G, A>(H, product(0, 0), product);
    for (int64_t unit = thread_index(); unit < H; unit += norm_threads) {
      const int64_t index = row * H + unit;
      A x[G], r[G], centred[2][G];
      FRNN_UNROLL
      for (int g = 0; g < G; ++g) {
        const A of_input = projection(g, unit), of_state = product(g, unit);
        centred[0][g] = of_x.centred(of_input);
        centred[1][g] = of_h.centred(of_state);
        x[g] = of_x.normal(of_input) * load_one<S>(n.gain_ih, g * H + unit) + load_one<S>(s.b_ih, g * H + unit);
        r[g] = of_h.normal(of_state) * load_one<S>(n.gain_hh, g * H + unit);
        (Cell::hidden_bias_apart(g) ? r : x)[g] += load_one<S>(s.b_hh, g * H + unit);
      }
      const A h_prev = before(index);
      A c_prev = 0, h = 0, c = 0, saved[Cell::saved + 1] = {};
      if constexpr (Cell::has_cell) c_prev = goes_on ? load_one<A>(s.c, index) : load_one<S>(s.c0, index);
      const auto options = options_of<S>(within, o.peephole, H, unit);
      Cell::template forward<A>(x, r, h_prev, c_prev, h, c, saved, options);
      FRNN_UNROLL
      for (int k = 0; k < Cell::saved; ++k) store_one<S>(s.gates, (row * V + k) * H + unit, saved[k]);
      FRNN_UNROLL
      for (int side = 0; side < 2; ++side) FRNN_UNROLL
      for (int g = 0; g < G; ++g)
        store_one<S>(s.gates, (row * V + Cell::saved + side * G + g) * H + unit, centred[side][g]);
      if constexpr (is_lstm) {  // h is the output gate yet
        store_one<A>(n.output_gate, index, h);
        store_one<A>(n.new_cell, index, c);
        finish_cell(unit, Zone<A>(o.zoneout_cell, within.zoneout_cell, row, unit, H).applied(c, c_prev));
      } else {
        finish(unit, rounded<S>(Zone<A>(o.zoneout, within.zoneout, row, unit, H).applied(h, h_prev)));
      }
    }
    if constexpr (is_lstm) {
      // The row's first value is another thread's.
      sync_threads();
      const auto cell = [&](int, int64_t unit) { return load_one<A>(n.new_cell, row * H + unit); };
      const auto of_c = moments_of<1, A>(H, cell(0, 0), cell);
      for (int64_t unit = thread_index(); unit < H; unit += norm_threads) {
        const int64_t index = row * H + unit;
        const A normal = of_c.normal(cell(0, unit)) * load_one<S>(n.gain_c, unit) + load_one<S>(n.bias_c, unit);
        const A h = load_one<A>(n.output_gate, index) * activate<A>(within.activation, normal);
        finish(unit, rounded<S>(Zone<A>(o.zoneout, within.zoneout, row, unit, H).applied(h, before(index))));
      }
    }
  }
}

template <class Cell, class S>
__global__ void __launch_bounds__(norm_threads) step_backward_with_norm_kernel(
    const __grid_constant__ NormArguments<StepBackward, BackwardOptions, BackwardNorm> arguments) {
  using A = typename Accumulator<S>::type;
  constexpr int G = Cell::gates, V = saved_with_norm<Cell>, GG = Cell::grad_gates, W = grads_with_norm<Cell>;
  constexpr bool is_lstm = Cell::kind == CellKind::lstm;
  const StepBackward& s = arguments.direction[block_z()];
  const BackwardOptions& o = arguments.options[block_z()];
  const BackwardNorm& n = arguments.norm[block_z()];
  const Within& within = arguments.within;
  const int64_t H = arguments.hidden_size;
  for (int64_t row = block_x(); row < s.rows; row += grid_x()) {
    const bool goes_on = row < s.previous_rows;
    const bool keeps = s.mask && !s.mask[row];
    const bool anew = o.anew && o.anew[row];
    const auto place = [&](int g, int64_t unit) { return (row * W + g) * H + unit; };
    const auto grad_h = [&](int64_t unit) {
      return load_one<A>(s.dh, row * H + unit) + load_one<S>(o.grad_h, row * o.grad_h_stride + unit) +
             load_one<S>(s.grad_y, row * s.grad_y_stride + unit);
    };
    const auto grad_c = [&](int64_t unit) {
      return load_one<A>(s.dc, row * H + unit) + load_one<A>(o.grad_cells, row * H + unit);
    };
    if (keeps) {
      for (int64_t unit = thread_index(); unit < H; unit += norm_threads) {
        const int64_t index = row * H + unit;
        const A dh = grad_h(unit);
        A dc = 0;
        if constexpr (Cell::has_cell) dc = grad_c(unit);
        FRNN_UNROLL
        for (int k = 0; k < W; ++k) store_one<S>(s.grad_gates, place(k, unit), A(0));
        store_one<A>(s.dh, index, dh);
        if constexpr (Cell::has_cell) {
          store_one<A>(s.dc, index, dc);
          store_one<S>(o.hidden, index, A(0));
          store_one<A>(n.normal_c, index, A(0));
          store_one<A>(n.grad_c, index, A(0));
        }
      }
      continue;
    }

    const auto saved_of = [&](int k, int64_t unit) { return load_one<S>(s.gates, (row * V + k) * H + unit); };
    const auto cell_before = [&](int64_t unit) {
      const int64_t index = row * H + unit;
      return anew      ? load_one<S>(o.reset_c, index)
             : goes_on ? load_one<A>(s.previous_cells, index)
                       : load_one<S>(s.c0, index);
    };
    // h = o * act(c normalised): what comes through it to c, and to o.
    Moments<A> of_c = {};
    A mean_c = 0, slope_c = 0;
    if constexpr (is_lstm) {
      // c before zoneout, which is what h was made of.
      const auto cell = [&](int, int64_t unit) {
        const A c = load_one<A>(s.cells, row * H + unit);
        if (!o.zoneout_cell && !(within.zoneout_cell > 0)) return c;
        A saved[Cell::saved];
        FRNN_UNROLL
        for (int k = 0; k < Cell::saved; ++k) saved[k] = saved_of(k, unit);
        const auto options = options_of<S>(within, o.peephole, H, unit);
        return Cell::template cell_of<A>(saved, c, cell_before(unit), options);
      };
      of_c = moments_of<1, A>(H, cell(0, 0), cell);
      A sum = 0, product = 0;
      for (int64_t unit = thread_index(); unit < H; unit += norm_threads) {
        const int64_t index = row * H + unit;
        const A normal = of_c.normal(cell(0, unit)), gain = load_one<S>(n.gain_c, unit);
        const A hidden = activate<A>(within.activation, normal * gain + load_one<S>(n.bias_c, unit));
        const A output = saved_of(3, unit);
        A own = grad_h(unit), to_before = 0;
        Zone<A>(o.zoneout, within.zoneout, row, unit, H).divide(own, to_before);
        const A grad = activation_gradient<A>(within.activation, own * output, hidden);
        store_one<A>(n.to_output, index, activation_gradient<A>(within.recurrent_activation, own * hidden, output));
        store_one<A>(n.normal_c, index, normal);
        store_one<A>(n.grad_c, index, grad);
        store_one<S>(o.hidden, index, output * hidden);
        sum += grad * gain;
        product += grad * gain * normal;
      }
      mean_c = sum_of_block<A>(sum) / A(H);
      slope_c = sum_of_block<A>(product) / A(H);
    }

    A sums[2][3] = {};  // of w_ih x and w_hh h: squares of the centred values, their gradients, and products of both
    for (int64_t unit = thread_index(); unit < H; unit += norm_threads) {
      const int64_t index = row * H + unit;
      A saved[Cell::saved + 1] = {}, h = 0, h_prev = 0, c = 0, c_prev = 0, own_c = 0, c_to_before = 0;
      FRNN_UNROLL
      for (int k = 0; k < Cell::saved; ++k) saved[k] = saved_of(k, unit);
      if constexpr (Cell::saved == 0) h = load_one<S>(s.y, row * s.y_stride + unit);
      if constexpr (Cell::reads_h) {
        h_prev = anew      ? load_one<S>(o.reset_h, index)
                 : goes_on ? load_one<S>(s.previous_y, row * s.y_stride + unit)
                           : load_one<S>(s.h0, index);
      }
      A own_h = grad_h(unit), h_to_before = 0;
      Zone<A>(o.zoneout, within.zoneout, row, unit, H).divide(own_h, h_to_before);
      const auto options = options_of<S>(within, o.peephole, H, unit);
      A to_output = 0;
      if constexpr (is_lstm) {
        c = load_one<A>(s.cells, index);
        c_prev = cell_before(unit);
        own_c = grad_c(unit);
        Zone<A>(o.zoneout_cell, within.zoneout_cell, row, unit, H).divide(own_c, c_to_before);
        to_output = load_one<A>(n.to_output, index);
        own_c += (load_one<A>(n.grad_c, index) * load_one<S>(n.gain_c, unit) - mean_c -
                  load_one<A>(n.normal_c, index) * slope_c) *
                 of_c.scale;
        if (within.peephole) own_c += options.peephole[2] * to_output;
        own_h = 0;  // it came through c and o
      }
      A grads[GG], dh_prev = 0, dc_prev = 0;
      Cell::template backward<A>(saved, h, h_prev, c, c_prev, own_h, own_c, grads, dh_prev, dc_prev, options);
      if constexpr (is_lstm) {
        grads[3] = to_output;
        if (o.grad_peephole) {
          A* peephole = static_cast<A*>(o.grad_peephole) + row * 3 * H + unit;
          peephole[0] += grads[0] * c_prev;
          peephole[H] += grads[1] * c_prev;
          peephole[2 * H] += grads[3] * Cell::template cell_of<A>(saved, c, c_prev, options);
        }
        store_one<A>(s.dc, index, dc_prev + c_to_before);
      }
      store_one<A>(s.dh, index, dh_prev + h_to_before);
      FRNN_UNROLL
      for (int k = 0; k < GG; ++k) store_one<S>(s.grad_gates, place(k, unit), grads[k]);
      const auto add_to = [&](auto side, const void* gain) {
        using Side = decltype(side);
        constexpr GateGrads order = Side::template order<Cell>;
        FRNN_UNROLL
        for (int j = 0; j < G; ++j) {
          const A value = saved_of(Cell::saved + Side::number * G + order.gate[j], unit);
          const A grad = rounded<S>(grads[order.first + j]) * load_one<S>(gain, order.gate[j] * H + unit);
          sums[Side::number][0] += value * value;
          sums[Side::number][1] += grad;
          sums[Side::number][2] += grad * value;
        }
      };
      add_to(InputSide(), n.gain_ih);
      add_to(StateSide(), n.gain_hh);
    }
    // With g = gradient * gain and z = value / deviation: (g - mean(g) - z mean(g z)) / deviation.
    const auto through_norm = [&](auto side, const void* gain) {
      using Side = decltype(side);
      constexpr GateGrads order = Side::template order<Cell>;
      constexpr int number = Side::number;
      const int64_t count = G * H;
      const A scale = inverse_deviation<A>(sum_of_block<A>(sums[number][0]), count);
      const A mean = sum_of_block<A>(sums[number][1]) / A(count);
      const A slope = sum_of_block<A>(sums[number][2]) / A(count) * scale * scale;
      for (int64_t unit = thread_index(); unit < H; unit += norm_threads) {
        FRNN_UNROLL
        for (int j = 0; j < G; ++j) {
          const A value = saved_of(Cell::saved + number * G + order.gate[j], unit);
          const A grad =
              load_one<S>(s.grad_gates, place(order.first + j, unit)) * load_one<S>(gain, order.gate[j] * H + unit);
          store_one<S>(s.grad_gates, place(GG + number * G + j, unit), (grad - mean - value * slope) * scale);
        }
      }
    };
    through_norm(InputSide(), n.gain_ih);
    through_norm(StateSide(), n.gain_hh);
  }
}

template <class Cell, class S>
auto step_kernel_with_norm(const StepForward&) {
  return step_forward_with_norm_kernel<Cell, S>;
}
template <class Cell, class S>
auto step_kernel_with_norm(const StepBackward&) {
  return step_backward_with_norm_kernel<Cell, S>;
}

template <class Step, class Options, class Norm, class Launch>
void launch_step_with_norm(CellKind kind, DType dtype, int64_t hidden_size, const Step* directions,
                           const Options* options, const Norm* norms, const Within& within, int count, Launch launch) {
  NormArguments<Step, Options, Norm> arguments{};
  int64_t rows = 1;
  for (int d = 0; d < count; ++d) {
    arguments.direction[d] = directions[d];
    arguments.options[d] = options[d];
    arguments.norm[d] = norms[d];
    if (directions[d].rows > rows) rows = directions[d].rows;
  }
  arguments.within = within;
  arguments.hidden_size = hidden_size;
  constexpr int64_t largest = 65535;
  const StepGrid grid{unsigned(rows < largest ? rows : largest), 1, unsigned(count)};
  with_element(dtype, [&](auto element) {
    with_cell_of_options(kind, [&](auto cell) {
      launch(step_kernel_with_norm<decltype(cell), decltype(element)>(*directions), grid, norm_threads,
             norm_shared_bytes, arguments);
    });
  });
}

}  // namespace cuda
}  // namespace fused_rnn
