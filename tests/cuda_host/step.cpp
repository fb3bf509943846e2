// step IN OUT: one layer through the kernels of csrc/cuda/step.cuh, forward and backward, one launch a step as
// csrc/ops_cuda.cpp does it, with products in plain loops. tests/test_cuda_step.py writes IN and knows the results.
//
// IN: the int64 numbers of Problem, batch_sizes (T), with a mask its T * B bytes, then for each direction, in the
// layer's dtype: projections (N, G * H), w_hh (G * H, H), with biases b_ih and b_hh (G * H), with initial states h0 and
// c0 (B, H), then grad_y (N, H), grad_h_n, grad_c_n (B, H).
// OUT: for each direction, in the sum type: y (N, H), h_n, c_n (B, H), grad_gates (N, grad_gates * H), grad_h0, grad_c0
// (B, H), the sums of grad_gates over rows (grad_gates * H).
#include "cuda/step.cuh"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <vector>

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
  static constexpr int G = Cell::gates, saved = Cell::saved, grad_gates = Cell::grad_gates;

  struct Direction {
    Array<S> projections, w_hh, b_ih, b_hh, h0, c0, grad_y, grad_h_n, grad_c_n;
    Array<S> h, c_n, gates, grads, sums;
    Array<A> c, cells, dh, dc;
  };

  const Problem& p;
  Steps steps;
  int64_t N, units_for_vectors;
  Array<S> y;
  Direction direction[2];

  Layer(const Problem& problem, const std::vector<int64_t>& sizes, const std::vector<int64_t>& offsets,
        const std::vector<uint8_t>& mask)
      : p(problem), N(offsets.back()) {
    steps.T = p.T;
    steps.B = p.B;
    if (p.masked) steps.mask = mask.data();
    if (p.packed) {
      steps.batch_sizes = sizes.data();
      steps.offsets = offsets.data();
    }
    units_for_vectors = p.vectors ? 0 : std::numeric_limits<int64_t>::max();
  }

  int64_t y_stride() const { return p.directions * p.H; }
  int64_t step_at(int d, int64_t k) const { return d == 0 ? k : p.T - 1 - k; }

  void read(std::istream& in) {
    const auto array = [&](Array<S>& to, int64_t count) {
      to = Array<S>(count);
      in.read(reinterpret_cast<char*>(to.data()), std::streamsize(size_t(count) * sizeof(S)));
    };
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      array(m.projections, N * G * p.H);
      array(m.w_hh, G * p.H * p.H);
      if (p.biases) array(m.b_ih, G * p.H), array(m.b_hh, G * p.H);
      if (p.initial) array(m.h0, p.B * p.H), array(m.c0, p.B * p.H);
      array(m.grad_y, N * p.H);
      array(m.grad_h_n, p.B * p.H);
      array(m.grad_c_n, p.B * p.H);
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
      m.h = Array<S>(p.B * p.H);
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
      Array<A> products[2];
      for (int d = 0; d < p.directions; ++d) {
        Direction& m = direction[d];
        const int64_t t = step_at(d, k), row = steps.first_row(t);
        s[d].rows = steps.rows(t);
        s[d].previous_rows = k == 0 ? 0 : std::min(s[d].rows, steps.rows(step_at(d, k - 1)));
        if (p.masked) s[d].mask = steps.mask + row;
        if (k > 0 || p.initial) {
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
        s[d].y = y.data() + row * y_stride() + d * p.H;
        s[d].y_stride = y_stride();
        if (saved > 0) s[d].gates = m.gates.data() + row * saved * p.H;
        if (Cell::has_cell) s[d].cells = m.cells.data() + row * p.H;
      }
      launch_step(Cell::kind, DType(p.dtype), p.H, s, int(p.directions), units_for_vectors, OnHost{p});
    }
  }

  // h W_hh^T of the rows that go on from the running h; the others begin from h0.
  void multiply(const Direction& m, int64_t rows, int64_t previous_rows, Array<A>& product) const {
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t i = 0; i < G * p.H; ++i) {
        A sum = 0;
        for (int64_t j = 0; j < p.H; ++j) {
          const A h = b < previous_rows ? widen(m.h[b * p.H + j]) : p.initial ? widen(m.h0[b * p.H + j]) : A(0);
          sum += h * widen(m.w_hh[i * p.H + j]);
        }
        product[b * G * p.H + i] = sum;
      }
    }
  }

  void backward() {
    for (int d = 0; d < p.directions; ++d) {
      Direction& m = direction[d];
      m.dh = Array<A>(p.B * p.H);
      m.dc = Array<A>(Cell::has_cell ? p.B * p.H : 0);
      for (int64_t i = 0; i < p.B * p.H; ++i) {
        m.dh[i] = widen(m.grad_h_n[i]);
        if (Cell::has_cell) m.dc[i] = widen(m.grad_c_n[i]);
      }
      const bool gates_are_free = p.in_place && saved == grad_gates;
      if (!gates_are_free) m.grads = Array<S>(N * grad_gates * p.H);
    }
    for (int64_t k = p.T - 1; k >= 0; --k) {
      StepBackward s[2];
      for (int d = 0; d < p.directions; ++d) {
        Direction& m = direction[d];
        const int64_t t = step_at(d, k), row = steps.first_row(t);
        s[d].rows = steps.rows(t);
        if (p.masked) s[d].mask = steps.mask + row;
        if (saved > 0) s[d].gates = m.gates.data() + row * saved * p.H;
        s[d].y = y.data() + row * y_stride() + d * p.H;
        s[d].y_stride = y_stride();
        if (Cell::has_cell) s[d].cells = m.cells.data() + row * p.H;
        if (k > 0) {
          const int64_t previous = step_at(d, k - 1), previous_row = steps.first_row(previous);
          s[d].previous_rows = std::min(s[d].rows, steps.rows(previous));
          s[d].previous_y = y.data() + previous_row * y_stride() + d * p.H;
          if (Cell::has_cell) s[d].previous_cells = m.cells.data() + previous_row * p.H;
        }
        s[d].h0 = some(m.h0);
        s[d].c0 = some(m.c0);
        s[d].grad_y = m.grad_y.data() + row * p.H;
        s[d].grad_y_stride = p.H;
        s[d].dh = m.dh.data();
        s[d].dc = some(m.dc);
        s[d].grad_gates = gradients(m) + row * grad_gates * p.H;
      }
      launch_step(Cell::kind, DType(p.dtype), p.H, s, int(p.directions), units_for_vectors, OnHost{p});
      for (int d = 0; d < p.directions; ++d) multiply_back(direction[d], steps.rows(step_at(d, k)), s[d].grad_gates);
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

  static S* gradients(Direction& m) { return m.grads.empty() ? m.gates.data() : m.grads.data(); }

  // dh = the part that does not go through W_hh (GRU, masked rows) + gradients of the gates W_hh.
  void multiply_back(Direction& m, int64_t rows, const void* gradients) const {
    const S* grads = static_cast<const S*>(gradients);
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t j = 0; j < p.H; ++j) {
        A sum = Cell::kind == CellKind::gru || p.masked ? m.dh[b * p.H + j] : A(0);
        for (int g = 0; g < G; ++g) {
          const int64_t from = (b * grad_gates + Cell::hidden_grads.first + g) * p.H;
          const int64_t gate = Cell::hidden_grads.gate[g];
          for (int64_t i = 0; i < p.H; ++i) sum += widen(grads[from + i]) * widen(m.w_hh[(gate * p.H + i) * p.H + j]);
        }
        m.dh[b * p.H + j] = sum;
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
        for (int64_t i = 0; i < p.H; ++i) one(widen(y[n * y_stride() + d * p.H + i]));
      all(m.h);
      all(m.c_n);
      for (int64_t i = 0; i < N * grad_gates * p.H; ++i) one(widen(gradients(m)[i]));
      all(m.dh);
      all(m.dc);
      all(m.sums);
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
  std::ofstream out(out_name, std::ios::binary);
  const auto with = [&](auto cell, auto element) {
    Layer<decltype(cell), decltype(element)> layer(problem, sizes, offsets, mask);
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
      case CellKind::gru: return with(Gru{}, element);
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
