// One step of a layer after its product with W_hh: gates, states and what the backward pass wants, forward and
// backward; and the sums over rows that bias gradients are. Any size, every dtype. cuda.h says what the pointers are.
//
// A thread takes `width` neighbouring units of a row. Everything in memory is indexed by row and unit alone, and a
// thread loads all it needs before it stores anything, so outputs may stand where the inputs of the same step do.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "cuda.h"
#include "device.h"

namespace fused_rnn {
namespace cuda {

constexpr int step_threads = 128;
constexpr int vector_bytes = 16;

// Fewer units than this go one to a thread: the gates of 8 units one after the other take longer than their memory
// traffic saves while there are not warps enough to hide them. (A guess, not measured.)
constexpr int64_t units_for_vectors = int64_t(1) << 19;

template <class T, int width>
struct alignas(sizeof(T) * width < vector_bytes ? sizeof(T) * width : vector_bytes) Vector {
  T v[width];
};

// Both directions, and how the threads of a block are spread: 2^log2_lanes on a row.
template <class Step>
struct StepArguments {
  Step direction[2];
  int64_t hidden_size;
  int log2_lanes;
};

struct StepGrid {
  unsigned x, y, z;
};

// Visits the first unit of every vector of this thread: visit(row, unit).
template <int width, class Visit>
FRNN_DEVICE void for_each_vector(int64_t rows, int64_t hidden_size, int log2_lanes, Visit visit) {
  const int lanes = 1 << log2_lanes, rows_of_block = block_size() >> log2_lanes;
  const int lane = thread_index() & (lanes - 1), row_of_block = thread_index() >> log2_lanes;
  const int64_t row_step = int64_t(grid_y()) * rows_of_block;
  const int64_t unit_step = int64_t(grid_x()) * lanes * width;
  for (int64_t row = int64_t(block_y()) * rows_of_block + row_of_block; row < rows; row += row_step) {
    for (int64_t unit = (int64_t(block_x()) * lanes + lane) * width; unit < hidden_size; unit += unit_step)
      visit(row, unit);
  }
}

// Values of the sum type A from `width` values of S at p, or zeros where p is null.
template <class S, int width, class A>
FRNN_DEVICE void load_vector(const void* p, int64_t index, A* values) {
  if (!p) {
    FRNN_UNROLL
    for (int i = 0; i < width; ++i) values[i] = A(0);
    return;
  }
  const auto vector = *reinterpret_cast<const Vector<S, width>*>(static_cast<const S*>(p) + index);
  FRNN_UNROLL
  for (int i = 0; i < width; ++i) values[i] = widen(vector.v[i]);
}

// Nothing where p is null. In stores of 16 bytes, which nvcc does not make of an assignment.
template <class S, int width, class A>
FRNN_DEVICE void store_vector(void* p, int64_t index, const A* values) {
  if (!p) return;
  constexpr int part = width * int(sizeof(S)) > vector_bytes ? vector_bytes / int(sizeof(S)) : width;
  FRNN_UNROLL
  for (int first = 0; first < width; first += part) {
    Vector<S, part> vector;
    FRNN_UNROLL
    for (int i = 0; i < part; ++i) vector.v[i] = narrow<S>(values[first + i]);
    store_l2(reinterpret_cast<Vector<S, part>*>(static_cast<S*>(p) + index + first), vector);
  }
}

// The step of a cell. A custom cell's private states are an array, of which those of cells/ have one at most; where
// there are none, c and c_prev are one value that nothing reads.
template <class Cell, class A, class... Options>
FRNN_DEVICE void forward_of(const A* x, const A* r, A h_prev, const A* c_prev, A& h, A* c, A* saved,
                            const Options&... options) {
  if constexpr (Cell::kind >= CellKind::custom) {
    A sums[Cell::gates];  // of x and r, which is what such a cell has for r where they are not apart
    FRNN_UNROLL
    for (int g = 0; g < Cell::gates; ++g) sums[g] = Cell::hidden_bias_apart(g) ? r[g] : x[g] + r[g];
    Cell::template forward<A>(x, sums, h_prev, c_prev, h, c, saved);
  } else {
    Cell::template forward<A>(x, r, h_prev, c_prev[0], h, c[0], saved, options...);
  }
}
template <class Cell, class A, class... Options>
FRNN_DEVICE void backward_of(const A* saved, A h, A h_prev, const A* c, const A* c_prev, A dh, const A* dc, A* grads,
                             A& dh_prev, A* dc_prev, const Options&... options) {
  if constexpr (Cell::kind >= CellKind::custom) {
    Cell::template backward<A>(saved, h_prev, c_prev, c, dh, dc, grads, dh_prev, dc_prev);
  } else {
    Cell::template backward<A>(saved, h, h_prev, c[0], c_prev[0], dh, dc[0], grads, dh_prev, dc_prev[0], options...);
  }
}

// Whether a gradient of h goes past W_hh. (A custom cell whose backward step is by hand may say so without reading h.)
template <class Cell>
inline constexpr bool passes_h = Cell::reads_h || Cell::kind >= CellKind::custom;

// At least one, for arrays.
template <class Cell>
inline constexpr int states_or_one = Cell::states > 0 ? Cell::states : 1;

template <class Cell, class S, int width>
__global__ void __launch_bounds__(step_threads)
    step_forward_kernel(const __grid_constant__ StepArguments<StepForward> arguments) {
  using A = typename Accumulator<S>::type;
  constexpr int C = states_or_one<Cell>;
  const StepForward& s = arguments.direction[block_z()];
  const int64_t H = arguments.hidden_size;
  for_each_vector<width>(s.rows, H, arguments.log2_lanes, [&](int64_t row, int64_t unit) {
    A h_prev[width] = {}, c_prev[C][width] = {};
    const bool goes_on = row < s.previous_rows;
    const bool keeps = s.mask && !s.mask[row];  // the state as it is
    if (Cell::reads_h || keeps) load_vector<S, width>(goes_on ? s.h : s.h0, row * H + unit, h_prev);
    FRNN_UNROLL
    for (int j = 0; j < Cell::states; ++j) {
      if (goes_on)
        load_vector<A, width>(s.c, (row * Cell::states + j) * H + unit, c_prev[j]);
      else
        load_vector<S, width>(s.c0, (row * Cell::states + j) * H + unit, c_prev[j]);
    }

    A h[width], c[C][width], saved[Cell::saved + 1][width];
    if (keeps) {
      FRNN_UNROLL
      for (int i = 0; i < width; ++i) {
        h[i] = h_prev[i];
        FRNN_UNROLL
        for (int j = 0; j < Cell::states; ++j) c[j][i] = c_prev[j][i];
        FRNN_UNROLL
        for (int k = 0; k < Cell::saved; ++k) saved[k][i] = 0;
      }
    } else {
      A x[Cell::gates][width], r[Cell::gates][width];
      FRNN_UNROLL
      for (int g = 0; g < Cell::gates; ++g) {
        A b_ih[width], b_hh[width];
        load_vector<S, width>(s.projection, row * s.projection_stride + g * H + unit, x[g]);
        load_vector<A, width>(s.product, (row * Cell::gates + g) * H + unit, r[g]);
        load_vector<S, width>(s.b_ih, g * H + unit, b_ih);
        load_vector<S, width>(s.b_hh, g * H + unit, b_hh);
        FRNN_UNROLL
        for (int i = 0; i < width; ++i) {
          x[g][i] += b_ih[i];
          (Cell::hidden_bias_apart(g) ? r : x)[g][i] += b_hh[i];
        }
      }
      FRNN_UNROLL
      for (int i = 0; i < width; ++i) {
        A x_of_unit[Cell::gates], r_of_unit[Cell::gates], saved_of_unit[Cell::saved + 1];
        A c_prev_of_unit[C], c_of_unit[C];
        FRNN_UNROLL
        for (int g = 0; g < Cell::gates; ++g) {
          x_of_unit[g] = x[g][i];
          r_of_unit[g] = r[g][i];
        }
        FRNN_UNROLL
        for (int j = 0; j < C; ++j) c_prev_of_unit[j] = c_prev[j][i];
        forward_of<Cell>(x_of_unit, r_of_unit, h_prev[i], c_prev_of_unit, h[i], c_of_unit, saved_of_unit);
        FRNN_UNROLL
        for (int j = 0; j < Cell::states; ++j) c[j][i] = c_of_unit[j];
        FRNN_UNROLL
        for (int k = 0; k < Cell::saved; ++k) saved[k][i] = saved_of_unit[k];
      }
    }

    if (s.gates) {
      FRNN_UNROLL
      for (int k = 0; k < Cell::saved; ++k)
        store_vector<S, width>(s.gates, (row * Cell::saved + k) * H + unit, saved[k]);
    }
    FRNN_UNROLL
    for (int j = 0; j < Cell::states; ++j) {
      const int64_t place = (row * Cell::states + j) * H + unit;
      store_vector<A, width>(s.c, place, c[j]);
      store_vector<S, width>(s.c_n, place, c[j]);
      store_vector<A, width>(s.cells, place, c[j]);
    }
    store_vector<S, width>(s.h, row * H + unit, h);
    store_vector<S, width>(s.y, row * s.y_stride + unit, h);
  });
}

template <class Cell, class S, int width>
__global__ void __launch_bounds__(step_threads)
    step_backward_kernel(const __grid_constant__ StepArguments<StepBackward> arguments) {
  using A = typename Accumulator<S>::type;
  constexpr int C = states_or_one<Cell>;
  const StepBackward& s = arguments.direction[block_z()];
  const int64_t H = arguments.hidden_size;
  for_each_vector<width>(s.rows, H, arguments.log2_lanes, [&](int64_t row, int64_t unit) {
    const int64_t index = row * H + unit;
    const bool goes_on = row < s.previous_rows;
    A saved[Cell::saved + 1][width], h[width] = {}, h_prev[width] = {}, c[C][width] = {}, c_prev[C][width] = {};
    A dh[width], dc[C][width] = {}, grad_y[width];
    FRNN_UNROLL
    for (int k = 0; k < Cell::saved; ++k) load_vector<S, width>(s.gates, (row * Cell::saved + k) * H + unit, saved[k]);
    if constexpr (Cell::saved == 0) load_vector<S, width>(s.y, row * s.y_stride + unit, h);
    if constexpr (Cell::reads_h) {
      if (goes_on)
        load_vector<S, width>(s.previous_y, row * s.y_stride + unit, h_prev);
      else
        load_vector<S, width>(s.h0, index, h_prev);
    }
    FRNN_UNROLL
    for (int j = 0; j < Cell::states; ++j) {
      const int64_t place = (row * Cell::states + j) * H + unit;
      load_vector<A, width>(s.cells, place, c[j]);
      if (goes_on)
        load_vector<A, width>(s.previous_cells, place, c_prev[j]);
      else
        load_vector<S, width>(s.c0, place, c_prev[j]);
      load_vector<A, width>(s.dc, place, dc[j]);
    }
    load_vector<A, width>(s.dh, index, dh);
    load_vector<S, width>(s.grad_y, row * s.grad_y_stride + unit, grad_y);

    const bool keeps = s.mask && !s.mask[row];
    A grads[Cell::grad_gates][width], dh_prev[width], dc_prev[C][width];
    FRNN_UNROLL
    for (int i = 0; i < width; ++i) {
      A saved_of_unit[Cell::saved + 1], grads_of_unit[Cell::grad_gates];
      A c_of_unit[C], c_prev_of_unit[C], dc_of_unit[C], dc_prev_of_unit[C];
      FRNN_UNROLL
      for (int k = 0; k < Cell::saved; ++k) saved_of_unit[k] = saved[k][i];
      FRNN_UNROLL
      for (int j = 0; j < C; ++j) {
        c_of_unit[j] = c[j][i];
        c_prev_of_unit[j] = c_prev[j][i];
        dc_of_unit[j] = dc[j][i];
      }
      backward_of<Cell>(saved_of_unit, h[i], h_prev[i], c_of_unit, c_prev_of_unit, dh[i] + grad_y[i], dc_of_unit,
                        grads_of_unit, dh_prev[i], dc_prev_of_unit);
      FRNN_UNROLL
      for (int k = 0; k < Cell::grad_gates; ++k) grads[k][i] = keeps ? A(0) : grads_of_unit[k];
      if (keeps) dh_prev[i] = dh[i] + grad_y[i];
      FRNN_UNROLL
      for (int j = 0; j < Cell::states; ++j) dc_prev[j][i] = keeps ? dc[j][i] : dc_prev_of_unit[j];
    }

    FRNN_UNROLL
    for (int k = 0; k < Cell::grad_gates; ++k)
      store_vector<S, width>(s.grad_gates, (row * Cell::grad_gates + k) * H + unit, grads[k]);
    if (passes_h<Cell> || s.mask) store_vector<A, width>(s.dh, index, dh_prev);
    FRNN_UNROLL
    for (int j = 0; j < Cell::states; ++j)
      store_vector<A, width>(s.dc, (row * Cell::states + j) * H + unit, dc_prev[j]);
  });
}

// --- Sums over rows. Chunks of rows are summed by a block each, then their sums, always in the same order.

constexpr int sum_threads = 256;
constexpr int sum_warps = sum_threads / warp_size;

// As many chunks as it takes to fill a large GPU when there are few columns; every warp still sums 16 rows itself.
inline int64_t sum_chunks(int64_t rows) {
  const int64_t least = 16 * sum_warps, most = 256;
  const int64_t chunks = (rows + least - 1) / least;
  return chunks < 1 ? 1 : chunks > most ? most : chunks;
}

// partial (chunks, columns). A block takes warp_size * width columns of a chunk; shared memory: sum_warps * warp_size *
// width sums.
template <class S, int width>
__global__ void __launch_bounds__(sum_threads)
    partial_column_sums(const S* data, int64_t rows, int64_t columns, int64_t stride,
                        typename Accumulator<S>::type* partial) {
  using A = typename Accumulator<S>::type;
  A* shared = reinterpret_cast<A*>(shared_memory());
  const int64_t rows_of_chunk = (rows + grid_y() - 1) / grid_y();
  const int64_t first = block_y() * rows_of_chunk;
  const int64_t end = first + rows_of_chunk < rows ? first + rows_of_chunk : rows;
  const int64_t first_column = int64_t(block_x()) * warp_size * width;
  const int64_t column = first_column + lane_index() * width;
  A sums[width] = {};
  if (column < columns) {
    for (int64_t row = first + warp_index(); row < end; row += sum_warps) {
      A values[width];
      load_vector<S, width>(data, row * stride + column, values);
      FRNN_UNROLL
      for (int i = 0; i < width; ++i) sums[i] += values[i];
    }
  }
  FRNN_UNROLL
  for (int i = 0; i < width; ++i) shared[(warp_index() * width + i) * warp_size + lane_index()] = sums[i];
  sync_threads();
  for (int i = thread_index(); i < warp_size * width; i += sum_threads) {
    A sum = 0;
    for (int warp = 0; warp < sum_warps; ++warp) sum += shared[warp * width * warp_size + i];
    const int64_t to = first_column + i % warp_size * width + i / warp_size;
    if (to < columns) partial[block_y() * columns + to] = sum;
  }
}

template <class S>
__global__ void __launch_bounds__(sum_threads)
    total_column_sums(const typename Accumulator<S>::type* partial, int64_t chunks, int64_t columns, S* out, S* again) {
  using A = typename Accumulator<S>::type;
  const int64_t step = int64_t(grid_x()) * block_size();
  for (int64_t column = int64_t(block_x()) * block_size() + thread_index(); column < columns; column += step) {
    A sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * columns + column];
    out[column] = narrow<S>(sum);
    if (again) again[column] = narrow<S>(sum);
  }
}

// --- Which kernel, over which grid. `launch(kernel, grid, threads, shared_bytes, arguments...)` starts it.

// Whether every pointer is at a vector of S (16 bytes) or null, and every number of elements a multiple of a vector.
template <class S>
struct Alignment {
  bool vectors = true;

  void pointer(const void* p) { vectors = vectors && reinterpret_cast<uintptr_t>(p) % vector_bytes == 0; }
  void elements(int64_t count) { vectors = vectors && count % int64_t(vector_bytes / sizeof(S)) == 0; }
  void step(const StepForward& s) {
    for (const void* p : {s.projection, s.product, s.b_ih, s.b_hh, s.h0, s.c0}) pointer(p);
    for (const void* p : {s.c, s.c_n, s.h, s.y, s.gates, s.cells}) pointer(p);
    elements(s.projection_stride);
    elements(s.y_stride);
  }
  void step(const StepBackward& s) {
    for (const void* p : {s.gates, s.cells, s.y, s.previous_cells, s.previous_y, s.h0, s.c0, s.grad_y}) pointer(p);
    for (const void* p : {s.dh, s.dc, s.grad_gates}) pointer(p);
    elements(s.y_stride);
    elements(s.grad_y_stride);
  }
};

template <class Cell, class S, int width>
auto step_kernel(const StepForward&) {
  return step_forward_kernel<Cell, S, width>;
}
template <class Cell, class S, int width>
auto step_kernel(const StepBackward&) {
  return step_backward_kernel<Cell, S, width>;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid with a thread for every vector of `width` units, as far as grids go.
template <class Arguments>
StepGrid step_grid(Arguments& arguments, int count, int width) {
  int64_t rows = 1;
  for (int d = 0; d < count; ++d)
    if (arguments.direction[d].rows > rows) rows = arguments.direction[d].rows;
  const int64_t vectors = ceil_divide(arguments.hidden_size, width);
  arguments.log2_lanes = 0;
  while ((1 << arguments.log2_lanes) < step_threads && (1 << arguments.log2_lanes) < vectors) ++arguments.log2_lanes;
  const int64_t x = ceil_divide(vectors, int64_t(1) << arguments.log2_lanes);
  const int64_t y = ceil_divide(rows, step_threads >> arguments.log2_lanes);
  constexpr int64_t largest = 65535;
  return {unsigned(x < largest ? x : largest), unsigned(y < largest ? y : largest), unsigned(count)};
}

template <class Cell, class S, class Step, class Launch>
void launch_step_of(int64_t hidden_size, const Step* directions, int count, int64_t units_for_vectors, Launch launch) {
  constexpr int width = vector_bytes / sizeof(S);
  StepArguments<Step> arguments{};
  arguments.hidden_size = hidden_size;
  Alignment<S> alignment;
  alignment.elements(hidden_size);
  int64_t units = 0;
  for (int d = 0; d < count; ++d) {
    arguments.direction[d] = directions[d];
    alignment.step(directions[d]);
    units += directions[d].rows * hidden_size;
  }
  const bool vectors = alignment.vectors && units >= units_for_vectors;
  const StepGrid grid = step_grid(arguments, count, vectors ? width : 1);
  launch(vectors ? step_kernel<Cell, S, width>(*directions) : step_kernel<Cell, S, 1>(*directions), grid, step_threads,
         0, arguments);
}

template <class S, class Step, class Launch>
void launch_step_in(CellKind kind, int64_t hidden_size, const Step* directions, int count, int64_t units_for_vectors,
                    Launch launch) {
  const auto with = [&](auto cell) {
    launch_step_of<decltype(cell), S>(hidden_size, directions, count, units_for_vectors, launch);
  };
  switch (kind) {
    case CellKind::rnn_tanh: return with(RnnTanh{});
    case CellKind::rnn_relu: return with(RnnRelu{});
    case CellKind::lstm: return with(Lstm{});
    case CellKind::gru: return with(Gru{});
    case CellKind::custom: break;
  }
}

// Step: StepForward or StepBackward.
template <class Step, class Launch>
void launch_step(CellKind kind, DType dtype, int64_t hidden_size, const Step* directions, int count,
                 int64_t units_for_vectors, Launch launch) {
  const auto with = [&](auto element) {
    launch_step_in<decltype(element)>(kind, hidden_size, directions, count, units_for_vectors, launch);
  };
  switch (dtype) {
    case DType::float32: return with(float{});
    case DType::float64: return with(double{});
    case DType::bfloat16: return with(BFloat16{});
    case DType::float16: return with(Half{});
  }
}

template <class S, class Launch>
void launch_column_sums_of(const void* data, int64_t rows, int64_t columns, int64_t stride, void* out, void* again,
                           void* workspace, Launch launch) {
  using A = typename Accumulator<S>::type;
  constexpr int width = vector_bytes / sizeof(S);
  Alignment<S> alignment;
  alignment.pointer(data);
  alignment.elements(columns);
  alignment.elements(stride);
  const int used = alignment.vectors ? width : 1;
  const int64_t chunks = sum_chunks(rows);
  const StepGrid grid{unsigned(ceil_divide(columns, used * warp_size)), unsigned(chunks), 1};
  A* partial = static_cast<A*>(workspace);
  launch(alignment.vectors ? partial_column_sums<S, width> : partial_column_sums<S, 1>, grid, sum_threads,
         int(sum_threads * used * sizeof(A)), static_cast<const S*>(data), rows, columns, stride, partial);
  const StepGrid total_grid{unsigned(ceil_divide(columns, sum_threads)), 1, 1};
  launch(total_column_sums<S>, total_grid, sum_threads, 0, static_cast<const A*>(partial), chunks, columns,
         static_cast<S*>(out), static_cast<S*>(again));
}

template <class Launch>
void launch_column_sums(DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride, void* out,
                        void* again, void* workspace, Launch launch) {
  const auto with = [&](auto element) {
    launch_column_sums_of<decltype(element)>(data, rows, columns, stride, out, again, workspace, launch);
  };
  switch (dtype) {
    case DType::float32: return with(float{});
    case DType::float64: return with(double{});
    case DType::bfloat16: return with(BFloat16{});
    case DType::float16: return with(Half{});
  }
}

}  // namespace cuda
}  // namespace fused_rnn
