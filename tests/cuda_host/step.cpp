// step IN OUT: one layer through the kernels of csrc/cuda/step.cuh, or with options those of step_options.cuh and
// step_norm.cuh, forward and backward, one launch a step as csrc/ops_cuda.cpp does it, with products in plain loops.
// tests/test_cuda_step.py writes IN and knows the results.
//
// IN: the numbers of Problem, batch_sizes (T), with a mask its T * B bytes, with resets theirs, then for each
// direction, in the layer's dtype: projections (N, G * H), w_hh (G * H, P), with biases b_ih and b_hh (G * H), with
// initial states h0 (B, P) and c0 (B, H), then grad_y (N, P), grad_h_n (B, P), grad_c_n (B, H); and, of what there is,
// w_hr (P, H), peephole (3 * H), reset_h (B, P), reset_c (B, H), dropout (B, P), grad_h (N, P), in the sum type
// grad_cells (N, H), the bytes of zoneout (N, ceil(P / 8)) and zoneout_cell (N, ceil(H / 8)), the gains of layer
// normalisation (G * H) of both sides, and of an LSTM's c gain and bias (H).
//
// OUT: for each direction, in the sum type: y (N, P), h_n (B, P), c_n (B, H), grad_gates (N, grad_gates * H), grad_h0
// (B, P), grad_c0 (B, H), the sums of grad_gates over rows (grad_gates * H); and, of what there is, grad_peephole
// (3 * H), grad_reset_h, grad_reset_c, h before its projection and the gradient after it, (N, H) and (N, P), c
// normalised and the gradient of what gain and bias make of it, (N, H).
#include "cuda/step.cuh"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <vector>

#include "cuda/step_norm.cuh"
#include "cuda/step_options.cuh"
#include "engine.h"

namespace fused_rnn {
namespace cuda_host {

using namespace fused_rnn::cuda;

struct Problem {
  int64_t kind, dtype, T, B, H, directions, packed, biases, initial;
  int64_t vectors;     // 16 bytes a thread where the memory allows
  int64_t in_place;    // projections stand where the gates go, or y; gradients of gates where the gates are
  int64_t few_blocks;  // a grid so small that threads take several rows
  int64_t masked;
  int64_t seed;
  int64_t options;  // whether any of what follows is there
  int64_t P, activation, recurrent_activation, peephole, coupled_gates, bptt_steps;
  int64_t dropout, zoneout_bits, zoneout_cell_bits, resets, reset_state, state_gradients, layer_norm, reset_after;
  double cell_clip, recurrent_grad_clip, zoneout, zoneout_cell;

  Within within() const {
    Within w;
    w.activation = Activation(activation);
    w.recurrent_activation = Activation(recurrent_activation);
    w.peephole = peephole;
    w.coupled_gates = coupled_gates;
    w.bptt_steps = bptt_steps;
    w.cell_clip = cell_clip;
    w.recurrent_grad_clip = recurrent_grad_clip;
    w.zoneout = P == H ? zoneout : 0;
    w.zoneout_cell = zoneout_cell;
    w.layer_norm = layer_norm;
    w.reset_after = reset_after;
    return w;
  }
};

// Memory of exactly this size that nobody has written: NaN in every dtype.
template <class T>
struct Array : std::vector<T> {
  explicit Array(int64_t count = 0) : std::vector<T>(size_t(count)) {
    if (count > 0) memset(static_cast<void*>(this->data()), 0xff, size_t(count) * sizeof(T));
  }
};

struct OnHost {
  const Problem& problem;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), StepGrid grid, int threads, int shared_bytes,
                  const Arguments&... arguments) const {
    Launch l;
    const bool is_step = shared_bytes == 0 && grid.z == problem.directions;
    l.grid_x = problem.few_blocks && is_step ? 1 : int(grid.x);
    l.grid_y = problem.few_blocks && is_step ? 1 : int(grid.y);
    l.grid_z = int(grid.z);
    l.threads = threads;
    l.shared_bytes = size_t(shared_bytes);
    l.seed = uint64_t(problem.seed);
#if defined(FRNN_INTERPRETED)
    const auto run = interpreted(kernel);
#else
    const auto run = kernel;
#endif
    launch(l, [&] { run(arguments...); });
  }
};

template <class Cell, class S>
struct Layer {
  using A = typename Accumulator<S>::type;
  static constexpr int G = Cell::gates;
  // As in csrc/ops_cuda.cpp: the gates whose W_hh multiplies h, and not what the reset gate has left of it.
  static constexpr bool resets_before = std::is_same_v<Cell, GruResetBefore>;
  static constexpr int gates_of_h = resets_before ? GruResetBefore::gates_of_h : G;

  struct Direction {
    Array<S> projections, w_hh, b_ih, b_hh, h0, c0, grad_y, grad_h_n, grad_c_n;
    Array<S> w_hr, peephole, reset_h, reset_c, dropout, grad_h;
    Array<S> norm_ih, norm_hh, norm_c, norm_c_bias;
    Array<uint8_t> zoneout, zoneout_cell;
    Array<S> h, c_n, gates, grads, sums, multiplied, hidden, grad_projected, first_h, first_c;
    Array<A> c, cells, dh, dc, grad_cells, grad_peephole, grad_reset_h, grad_reset_c, normal_c, grad_c;
  };

  const Problem& p;
  const int64_t P;
  const int saved, grad_gates, first_hidden;  // values of a unit, with those of layer normalisation
  Steps steps;
  int64_t N, units_for_vectors;
  const Within within;
  Array<S> y;
  Direction direction[2];

  Layer(const Problem& problem, const std::vector<int64_t>& sizes, const std::vector<int64_t>& offsets,
        const std::vector<uint8_t>& mask, const std::vector<uint8_t>& resets)
      : p(problem),
        P(problem.P),
        saved(Cell::saved + (problem.layer_norm ? 2 * G : 0)),
        grad_gates(Cell::grad_gates + (problem.layer_norm ? 2 * G : 0)),
        first_hidden(problem.layer_norm ? Cell::grad_gates + G : Cell::hidden_grads.first),
        N(offsets.back()),
        within(problem.within()) {
    steps.T = p.T;
    steps.B = p.B;
    if (p.masked) steps.mask = mask.data();
    if (p.resets) steps.reset = resets.data();
    if (p.packed) {
      steps.batch_sizes = sizes.data();
      steps.offsets = offsets.data();
    }
    units_for_vectors = p.vectors ? 0 : std::numeric_limits<int64_t>::max();
  }

  int64_t y_stride() const { return p.directions * P; }
  bool projects() const { return P != p.H; }
  // As in csrc/ops_cuda.cpp.
  const uint8_t* rows_anew(int d, int64_t k) const {
    const int64_t mark = d == 0 ? k : p.T - k;
    return p.resets && k < p.T && mark < p.T ? steps.reset + mark * p.B : nullptr;
  }
  static const uint8_t* rows_of_bits(const Array<uint8_t>& bits, int64_t row, int64_t units) {
    return bits.empty() ? nullptr : bits.data() + row * ((units + 7) / 8);
  }
  int64_t step_at(int d, int64_t k) const { return d == 0 ? k : p.T - 1 - k; }

  void read(std::istream& in) {
    const auto array = [&](auto& to, int64_t count) {
      to = std::decay_t<decltype(to)>(count);
      in.read(reinterpret_cast<char*>(to.data()), std::streamsize(size_t(count) * sizeof(to[0])));
    };
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      array(m.projections, N * G * p.H);
      array(m.w_hh, G * p.H * P);
      if (p.biases) array(m.b_ih, G * p.H), array(m.b_hh, G * p.H);
      if (p.initial) array(m.h0, p.B * P), array(m.c0, p.B * p.H);
      array(m.grad_y, N * P);
      array(m.grad_h_n, p.B * P);
      array(m.grad_c_n, p.B * p.H);
      if (projects()) array(m.w_hr, P * p.H);
      if (p.peephole) array(m.peephole, 3 * p.H);
      if (p.reset_state) array(m.reset_h, p.B * P), array(m.reset_c, p.B * p.H);
      if (p.dropout) array(m.dropout, p.B * P);
      if (p.state_gradients) array(m.grad_h, N * P), array(m.grad_cells, N * p.H);
      if (p.zoneout_bits) array(m.zoneout, N * ((P + 7) / 8));
      if (p.zoneout_cell_bits) array(m.zoneout_cell, N * ((p.H + 7) / 8));
      if (p.layer_norm) array(m.norm_ih, G * p.H), array(m.norm_hh, G * p.H);
      if (p.layer_norm && Cell::has_cell) array(m.norm_c, p.H), array(m.norm_c_bias, p.H);
    }
  }

  template <class T>
  static T* some(Array<T>& a) {
    return a.empty() ? nullptr : a.data();
  }

  void forward() {
    y = Array<S>(N * y_stride());
    S* projections[2];
    int64_t stride[2];
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      m.h = Array<S>(p.B * P);
      if (p.options) begin(d);
      m.c_n = Array<S>(Cell::has_cell ? p.B * p.H : 0);
      m.c = Array<A>(Cell::has_cell ? p.B * p.H : 0);
      m.gates = Array<S>(N * saved * p.H);
      m.cells = Array<A>(Cell::has_cell ? N * p.H : 0);
      projections[d] = m.projections.data();
      stride[d] = G * p.H;
      if (!p.in_place) continue;
      projections[d] = saved > 0 ? m.gates.data() : y.data() + d * p.H;
      stride[d] = saved > 0 ? saved * p.H : y_stride();
      for (int64_t n = 0; n < N; ++n)
        for (int64_t i = 0; i < G * p.H; ++i) projections[d][n * stride[d] + i] = m.projections[n * G * p.H + i];
    }
    for (int64_t k = 0; k < p.T; ++k) {
      StepForward s[2];
      ForwardOptions o[2];
      Array<A> products[2];
      Array<S> unprojected[2];
      for (int d = 0; d < p.directions; ++d) {
        Direction& m = direction[d];
        const int64_t t = step_at(d, k), row = steps.first_row(t);
        s[d].rows = steps.rows(t);
        s[d].previous_rows = k == 0 ? 0 : std::min(s[d].rows, steps.rows(step_at(d, k - 1)));
        if (p.masked) s[d].mask = steps.mask + row;
        if (k > 0 || p.initial || p.options) {
          products[d] = Array<A>(s[d].rows * G * p.H);
          multiply(m, s[d].rows, s[d].previous_rows, products[d]);
          s[d].product = products[d].data();
        }
        s[d].projection = projections[d] + row * stride[d];
        s[d].projection_stride = stride[d];
        s[d].b_ih = some(m.b_ih);
        s[d].b_hh = some(m.b_hh);
        s[d].h0 = some(m.h0);
        s[d].c0 = some(m.c0);
        s[d].c = some(m.c);
        s[d].c_n = some(m.c_n);
        s[d].h = m.h.data();
        s[d].y = y.data() + row * y_stride() + d * P;
        s[d].y_stride = y_stride();
        if (saved > 0) s[d].gates = m.gates.data() + row * saved * p.H;
        if (Cell::has_cell) s[d].cells = m.cells.data() + row * p.H;
        if (!p.options) continue;
        s[d].h0 = some(m.first_h);
        s[d].c0 = some(m.first_c);
        o[d].zoneout_cell = rows_of_bits(m.zoneout_cell, row, p.H);
        o[d].anew = rows_anew(d, k + 1);
        o[d].reset_c = some(m.reset_c);
        o[d].peephole = some(m.peephole);
        if (projects()) {
          unprojected[d] = Array<S>(s[d].rows * p.H);
          s[d].h0 = s[d].h = nullptr;
          s[d].y = unprojected[d].data();
          s[d].y_stride = p.H;
          continue;
        }
        o[d].zoneout = rows_of_bits(m.zoneout, row, p.H);
        o[d].reset_h = some(m.reset_h);
        o[d].dropout = some(m.dropout);
        o[d].multiplied = some(m.multiplied);
        o[d].gated = m.gates.data() + (row * saved + saved - 1) * p.H;
        o[d].gated_stride = saved * p.H;
      }
      if (resets_before) {
        launch_reset(DType(p.dtype), p.H, s, o, within, int(p.directions), OnHost{p});
        for (int d = 0; d < p.directions; ++d) multiply_gated(direction[d], s[d].rows, o[d], products[d]);
      }
      if (!p.options) {
        launch_step(Cell::kind, DType(p.dtype), p.H, s, int(p.directions), units_for_vectors, OnHost{p});
        continue;
      }
      if (p.layer_norm) {
        ForwardNorm n[2];
        Array<A> scratch[2];
        for (int d = 0; d < p.directions; ++d) {
          Direction& m = direction[d];
          n[d] = {some(m.norm_ih), some(m.norm_hh), some(m.norm_c), some(m.norm_c_bias)};
          scratch[d] = Array<A>(Cell::has_cell ? 2 * p.B * p.H : 0);
          n[d].output_gate = some(scratch[d]);
          n[d].new_cell = Cell::has_cell ? scratch[d].data() + p.B * p.H : nullptr;
        }
        launch_step_with_norm(Cell::kind, DType(p.dtype), p.H, s, o, n, within, int(p.directions), OnHost{p});
      } else {
        launch_step_with_options(Cell::kind, DType(p.dtype), p.H, s, o, within, int(p.directions), OnHost{p});
      }
      if (!projects()) continue;
      ProjectedForward f[2];
      Array<A> projected[2];
      for (int d = 0; d < p.directions; ++d) {
        Direction& m = direction[d];
        const int64_t row = steps.first_row(step_at(d, k));
        projected[d] = Array<A>(s[d].rows * P);
        for (int64_t b = 0; b < s[d].rows; ++b) {
          for (int64_t i = 0; i < P; ++i) {
            A sum = 0;
            for (int64_t j = 0; j < p.H; ++j) sum += widen(unprojected[d][b * p.H + j]) * widen(m.w_hr[i * p.H + j]);
            projected[d][b * P + i] = sum;
          }
        }
        f[d].rows = s[d].rows;
        f[d].mask = s[d].mask;
        f[d].projected = projected[d].data();
        f[d].zoneout = rows_of_bits(m.zoneout, row, P);
        f[d].rate = p.zoneout;
        f[d].anew = o[d].anew;
        f[d].reset_h = some(m.reset_h);
        f[d].dropout = some(m.dropout);
        f[d].multiplied = some(m.multiplied);
        f[d].h = m.h.data();
        f[d].y = y.data() + row * y_stride() + d * P;
        f[d].y_stride = y_stride();
      }
      launch_states(DType(p.dtype), P, f, int(p.directions), OnHost{p});
    }
  }

  // With options: the states before the first step, also where rows begin later in this direction.
  void begin(int d) {
    Direction& m = direction[d];
    m.first_h = Array<S>(p.B * P);
    m.first_c = Array<S>(Cell::has_cell ? p.B * p.H : 0);
    const uint8_t* anew = rows_anew(d, 0);
    const auto fill = [&](Array<S>& first, const Array<S>& initial, const Array<S>& reset, int64_t size) {
      for (size_t i = 0; i < first.size(); ++i) {
        const Array<S>& from = anew && anew[i / size_t(size)] ? reset : initial;
        first[i] = from.empty() ? narrow<S>(A(0)) : from[i];
      }
    };
    fill(m.first_h, m.h0, m.reset_h, P);
    fill(m.first_c, m.c0, m.reset_c, p.H);
    m.h = m.first_h;
    if (!p.dropout) return;
    m.multiplied = Array<S>(p.B * P);
    for (int64_t i = 0; i < p.B * P; ++i) m.multiplied[i] = narrow<S>(widen(m.first_h[i]) * widen(m.dropout[i]));
  }

  // h W_hh^T of the rows that go on from the running h; the others begin from h0.
  void multiply(const Direction& m, int64_t rows, int64_t previous_rows, Array<A>& product) const {
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t i = 0; i < gates_of_h * p.H; ++i) {
        A sum = 0;
        for (int64_t j = 0; j < P; ++j) {
          const int64_t at = b * P + j;
          const A h = !m.multiplied.empty()            ? widen(m.multiplied[at])
                      : p.options || b < previous_rows ? widen(m.h[at])
                      : p.initial                      ? widen(m.h0[at])
                                                       : A(0);
          sum += h * widen(m.w_hh[i * P + j]);
        }
        product[b * G * p.H + i] = sum;
      }
    }
  }

  void multiply_gated(const Direction& m, int64_t rows, const ForwardOptions& o, Array<A>& product) const {
    for (int64_t b = 0; b < rows; ++b) {
      const S* h = static_cast<const S*>(o.gated) + b * o.gated_stride;
      for (int64_t i = gates_of_h * p.H; i < G * p.H; ++i) {
        A sum = 0;
        for (int64_t j = 0; j < p.H; ++j) sum += widen(h[j]) * widen(m.w_hh[i * p.H + j]);
        product[b * G * p.H + i] = sum;
      }
    }
  }

  void backward() {
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      m.dh = Array<A>(p.B * P);
      m.dc = Array<A>(Cell::has_cell ? p.B * p.H : 0);
      for (size_t i = 0; i < m.dh.size(); ++i) m.dh[i] = widen(m.grad_h_n[i]);
      for (size_t i = 0; i < m.dc.size(); ++i) m.dc[i] = widen(m.grad_c_n[i]);
      const auto zeros = [](bool wanted, int64_t count) {
        Array<A> array(wanted ? count : 0);
        for (A& value : array) value = 0;
        return array;
      };
      m.grad_peephole = zeros(p.peephole, p.B * 3 * p.H);
      m.grad_reset_h = zeros(p.reset_state, p.B * P);
      m.grad_reset_c = zeros(p.reset_state && Cell::has_cell, p.B * p.H);
      m.hidden = Array<S>(projects() ? N * p.H : 0);
      m.grad_projected = Array<S>(projects() ? N * P : 0);
      m.normal_c = Array<A>(p.layer_norm && Cell::has_cell ? N * p.H : 0);
      m.grad_c = Array<A>(p.layer_norm && Cell::has_cell ? N * p.H : 0);
      const bool gates_are_free = p.in_place && saved == grad_gates && !p.layer_norm;
      if (!gates_are_free) m.grads = Array<S>(N * grad_gates * p.H);
    }
    for (int64_t k = p.T - 1; k >= 0; --k) {
      StepBackward s[2];
      BackwardOptions o[2];
      Array<A> unprojected[2];
      for (int d = 0; d < p.directions; ++d) {
        Direction& m = direction[d];
        const int64_t t = step_at(d, k), row = steps.first_row(t);
        s[d].rows = steps.rows(t);
        if (p.masked) s[d].mask = steps.mask + row;
        if (saved > 0) s[d].gates = m.gates.data() + row * saved * p.H;
        s[d].y = y.data() + row * y_stride() + d * P;
        s[d].y_stride = y_stride();
        if (Cell::has_cell) s[d].cells = m.cells.data() + row * p.H;
        if (k > 0) {
          const int64_t previous = step_at(d, k - 1), previous_row = steps.first_row(previous);
          s[d].previous_rows = std::min(s[d].rows, steps.rows(previous));
          s[d].previous_y = y.data() + previous_row * y_stride() + d * P;
          if (Cell::has_cell) s[d].previous_cells = m.cells.data() + previous_row * p.H;
        }
        s[d].h0 = some(m.h0);
        s[d].c0 = some(m.c0);
        s[d].grad_y = m.grad_y.data() + row * P;
        s[d].grad_y_stride = P;
        s[d].dh = m.dh.data();
        s[d].dc = some(m.dc);
        s[d].grad_gates = gradients(m) + row * grad_gates * p.H;
        if (!p.options) continue;
        o[d].zoneout_cell = rows_of_bits(m.zoneout_cell, row, p.H);
        o[d].anew = rows_anew(d, k);
        o[d].reset_c = some(m.reset_c);
        if (p.state_gradients && Cell::has_cell) o[d].grad_cells = m.grad_cells.data() + row * p.H;
        o[d].peephole = some(m.peephole);
        o[d].grad_peephole = some(m.grad_peephole);
        if (projects()) {
          o[d].hidden = m.hidden.data() + row * p.H;
          s[d].grad_y = nullptr;
          unprojected[d] = Array<A>(s[d].rows * p.H);
          s[d].dh = unprojected[d].data();
          continue;
        }
        o[d].zoneout = rows_of_bits(m.zoneout, row, p.H);
        o[d].reset_h = some(m.reset_h);
        if (p.state_gradients) o[d].grad_h = m.grad_h.data() + row * P;
        o[d].grad_h_stride = P;
      }
      if (!p.options) {
        launch_step(Cell::kind, DType(p.dtype), p.H, s, int(p.directions), units_for_vectors, OnHost{p});
        for (int d = 0; d < p.directions; ++d) multiply_back(direction[d], s[d].rows, s[d].grad_gates);
        continue;
      }
      if (projects()) back_before_projection(k, s, unprojected);
      if (p.layer_norm) {
        BackwardNorm n[2];
        Array<A> scratch[2];
        for (int d = 0; d < p.directions; ++d) {
          Direction& m = direction[d];
          n[d] = {some(m.norm_ih), some(m.norm_hh), some(m.norm_c), some(m.norm_c_bias)};
          if (!Cell::has_cell) continue;
          const int64_t row = steps.first_row(step_at(d, k));
          scratch[d] = Array<A>(p.B * p.H);
          n[d].to_output = scratch[d].data();
          n[d].normal_c = m.normal_c.data() + row * p.H;
          n[d].grad_c = m.grad_c.data() + row * p.H;
        }
        launch_step_with_norm(Cell::kind, DType(p.dtype), p.H, s, o, n, within, int(p.directions), OnHost{p});
      } else {
        launch_step_with_options(Cell::kind, DType(p.dtype), p.H, s, o, within, int(p.directions), OnHost{p});
      }
      Array<A> products[2];
      for (int d = 0; d < p.directions; ++d) products[d] = Array<A>(p.dropout ? s[d].rows * P : 0);
      if (resets_before) {
        back_before_reset(s, o, products);
      } else {
        for (int d = 0; d < p.directions; ++d)
          for (A& value : products[d]) value = 0;
      }
      hand_back(k, s, o, products);
    }
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      const int64_t columns = grad_gates * p.H;
      m.sums = Array<S>(columns);
      Array<A> workspace(sum_chunks(N) * columns);
      Array<S> again(columns);
      launch_column_sums(DType(p.dtype), gradients(m), N, columns, columns, m.sums.data(), again.data(),
                         workspace.data(), OnHost{p});
      if (memcmp(again.data(), m.sums.data(), size_t(columns) * sizeof(S)) != 0) throw Failure("column_sums: again");
    }
  }

  void back_before_projection(int64_t k, const StepBackward* s, Array<A>* unprojected) {
    ProjectedBackward b[2];
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      const int64_t row = steps.first_row(step_at(d, k));
      b[d].rows = s[d].rows;
      b[d].mask = s[d].mask;
      b[d].zoneout = rows_of_bits(m.zoneout, row, P);
      b[d].rate = p.zoneout;
      b[d].grad_y = m.grad_y.data() + row * P;
      b[d].grad_y_stride = P;
      if (p.state_gradients) b[d].grad_h = m.grad_h.data() + row * P;
      b[d].grad_h_stride = P;
      b[d].dh = m.dh.data();
      b[d].projected = m.grad_projected.data() + row * P;
    }
    launch_states(DType(p.dtype), P, b, int(p.directions), OnHost{p});
    for (int d = 0; d < p.directions; ++d) {
      const S* projected = static_cast<const S*>(b[d].projected);
      for (int64_t row = 0; row < s[d].rows; ++row) {
        for (int64_t i = 0; i < p.H; ++i) {
          A sum = 0;
          for (int64_t j = 0; j < P; ++j) sum += widen(projected[row * P + j]) * widen(direction[d].w_hr[j * p.H + i]);
          unprojected[d][row * p.H + i] = sum;
        }
      }
    }
  }

  // What comes to `gated` goes on to r and h.
  void back_before_reset(const StepBackward* s, BackwardOptions* o, Array<A>* products) {
    Array<A> grad_gated[2];
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      grad_gated[d] = Array<A>(s[d].rows * p.H);
      for (A& value : grad_gated[d]) value = 0;
      multiply_back(m, s[d].rows, s[d].grad_gates, grad_gated[d], gates_of_h, G);
      o[d].grad_gated = grad_gated[d].data();
      o[d].dropout = some(m.dropout);
      o[d].grad_multiplied = some(products[d]);
    }
    launch_reset(DType(p.dtype), p.H, s, o, within, int(p.directions), OnHost{p});
  }

  // A mask and clipped gradients together are for the test of the operators, which counts the steps between.
  void hand_back(int64_t k, const StepBackward* s, const BackwardOptions* o, Array<A>* products) {
    HandedBack b[2];
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      const int64_t t = step_at(d, k);
      if (p.dropout) {
        multiply_back(m, s[d].rows, s[d].grad_gates, products[d], 0, gates_of_h);
        b[d].product = products[d].data();
        b[d].dropout = m.dropout.data();
      } else {
        multiply_back(m, s[d].rows, s[d].grad_gates, m.dh, 0, gates_of_h);
      }
      b[d].rows = s[d].rows;
      b[d].previous_rows = s[d].previous_rows;
      b[d].anew = o[d].anew;
      b[d].grad_reset_h = some(m.grad_reset_h);
      b[d].grad_reset_c = some(m.grad_reset_c);
      b[d].ends = p.bptt_steps > 0 && t > 0 && t % p.bptt_steps == 0;
      b[d].clip = p.recurrent_grad_clip;
      b[d].dh = m.dh.data();
      b[d].dc = some(m.dc);
    }
    launch_hand_back(DType(p.dtype), P, Cell::has_cell ? p.H : 0, b, int(p.directions), OnHost{p});
  }

  static S* gradients(Direction& m) { return m.grads.empty() ? m.gates.data() : m.grads.data(); }

  // dh = the part that does not go through W_hh (GRU, masked rows, options) + gradients of the gates W_hh.
  void multiply_back(Direction& m, int64_t rows, const void* gradients) const {
    multiply_back(m, rows, gradients, m.dh, 0, G);
  }
  void multiply_back(const Direction& m, int64_t rows, const void* gradients, Array<A>& dh, int first, int end) const {
    const S* grads = static_cast<const S*>(gradients);
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t j = 0; j < P; ++j) {
        A sum = Cell::kind == CellKind::gru || p.masked || p.options ? dh[b * P + j] : A(0);
        for (int g = first; g < end; ++g) {
          const int64_t from = (b * grad_gates + first_hidden + g) * p.H;
          const int64_t gate = Cell::hidden_grads.gate[g];
          for (int64_t i = 0; i < p.H; ++i) sum += widen(grads[from + i]) * widen(m.w_hh[(gate * p.H + i) * P + j]);
        }
        dh[b * P + j] = sum;
      }
    }
  }

  void write(std::ostream& out) {
    const auto one = [&](A value) { out.write(reinterpret_cast<const char*>(&value), sizeof value); };
    const auto all = [&](const auto& array) {
      for (const auto value : array) one(widen(value));
    };
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      for (int64_t n = 0; n < N; ++n)
        for (int64_t i = 0; i < P; ++i) one(widen(y[n * y_stride() + d * P + i]));
      all(m.h);
      all(m.c_n);
      for (int64_t i = 0; i < N * grad_gates * p.H; ++i) one(widen(gradients(m)[i]));
      all(m.dh);
      all(m.dc);
      all(m.sums);
      for (int64_t i = 0; i < 3 * p.H && p.peephole; ++i) {
        A sum = 0;
        for (int64_t b = 0; b < p.B; ++b) sum += m.grad_peephole[b * 3 * p.H + i];
        one(sum);
      }
      all(m.grad_reset_h);
      all(m.grad_reset_c);
      all(m.hidden);
      all(m.grad_projected);
      all(m.normal_c);
      all(m.grad_c);
    }
  }
};

int run(const char* in_name, const char* out_name) {
  std::ifstream in(in_name, std::ios::binary);
  Problem problem;
  in.read(reinterpret_cast<char*>(&problem), sizeof problem);
  std::vector<int64_t> sizes(size_t(problem.T)), offsets { 0 };
  in.read(reinterpret_cast<char*>(sizes.data()), std::streamsize(sizes.size() * sizeof(int64_t)));
  for (int64_t size : sizes) offsets.push_back(offsets.back() + size);
  std::vector<uint8_t> mask(size_t(problem.masked ? problem.T * problem.B : 0));
  in.read(reinterpret_cast<char*>(mask.data()), std::streamsize(mask.size()));
  std::vector<uint8_t> resets(size_t(problem.resets ? problem.T * problem.B : 0));
  in.read(reinterpret_cast<char*>(resets.data()), std::streamsize(resets.size()));
  std::ofstream out(out_name, std::ios::binary);
  const auto with = [&](auto cell, auto element) {
    Layer<decltype(cell), decltype(element)> layer(problem, sizes, offsets, mask, resets);
    layer.read(in);
    layer.forward();
    layer.backward();
    layer.write(out);
  };
  const auto with_element = [&](auto element) {
    switch (CellKind(problem.kind)) {
      case CellKind::rnn_tanh: return with(RnnTanh{}, element);
      case CellKind::rnn_relu: return with(RnnRelu{}, element);
      case CellKind::lstm: return with(Lstm{}, element);
      case CellKind::gru: return problem.reset_after ? with(Gru{}, element) : with(GruResetBefore{}, element);
    }
  };
  switch (DType(problem.dtype)) {
    case DType::float32: with_element(float{}); break;
    case DType::float64: with_element(double{}); break;
    case DType::bfloat16: with_element(BFloat16{}); break;
    case DType::float16: with_element(Half{}); break;
  }
  for (const Site& site : sites()) printf("%s %s:%d\n", site.function.c_str(), site.file.c_str(), site.line);
  return in && out ? 0 : 1;
}

}  // namespace cuda_host
}  // namespace fused_rnn

int main(int argc, char** argv) {
  if (argc != 3) return fprintf(stderr, "usage: step IN OUT\n"), 2;
  try {
    return fused_rnn::cuda_host::run(argv[1], argv[2]);
  } catch (const fused_rnn::cuda_host::Failure& failure) {
    fprintf(stderr, "%s\n", failure.what());
    return 3;
  }
}
