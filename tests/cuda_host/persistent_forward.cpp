// persistent_forward name=value ...: one case of the persistent forward kernels against float64. Exit status 1: wrong.
//   sites (prints the waits that were met)
//   kind dtype (tf32: float32 with its product in TF32) T B H directions layers (in a wavefront) ragged masked
//   exchange (none, counted, barriers, memory) blocks (of a team) columns (of a team, at most) sms seed
//   options without (letters: persistent.h) dropout (between layers) in_place (the projections are where the gates go,
//   or y) save initial bias
#include "cuda/persistent.cuh"
#include "cuda/plan.cpp"
#include "persistent.h"

namespace fused_rnn {
namespace cuda_host {

struct Forward {
  const Case& arguments;

  template <Multiply multiply>
  int operator()() const {
    using S = typename ProductOf<multiply>::type::Storage;
    const int T = arguments.number("T", 4), B = arguments.number("B", 3), H = arguments.number("H", 24);
    const int D = arguments.number("directions", 1), layers = arguments.number("layers", 1), parts = D * layers;
    const int seed = arguments.number("seed", 0);
    const bool save = arguments.number("save", 1), initial = arguments.number("initial", 1);
    const bool in_place = arguments.number("in_place", 1), bias = arguments.number("bias", 1);
    LayerSizes sizes;
    sizes.kind = kind_named(arguments.text("kind", "lstm"));
    sizes.dtype = dtype_named(arguments.text("dtype", "bfloat16"));
    sizes.hidden_size = sizes.state_size = H;
    sizes.num_directions = D;
    const Batch batch(arguments);
    const std::string without = arguments.text("without", "");
    const Plan plan = plan_of(arguments, sizes, batch.steps, false, multiply == Multiply::tf32);
    print(plan);
    if (plan.variant == Variant::none || plan.layers != layers) return printf("no plan: %s\n", plan.reason.c_str()), 2;

    const int64_t N = batch.steps.total_rows();
    return with_cell(sizes.kind, [&](auto cell) {
      using Cell = decltype(cell);
      constexpr int G = Cell::gates, saved = Cell::saved;
      Random<S> random(unsigned(seed) + 17);
      struct Part {
        std::vector<S> w_hh, w_ih, factors, b_ih, b_hh, h0, c0, projection, h_n, c_n, gates;
        std::vector<float> cells;
        DrawnOptions<S> drawn;
      } part[most_layers];
      std::vector<S> y = unwritten<S>(N * parts * H);
      ForwardArguments a = {};
      a.hidden_size = H;
      a.steps = batch.steps;
      if (without.find('r') != std::string::npos) a.steps.reset = nullptr;
      a.tiling = plan.tiling;
      std::vector<std::vector<S>> projections;
      for (int d = 0; d < parts; ++d) {
        Part& m = part[d];
        PersistentForward& p = a.part[d];
        const bool above = layers > 1 && d > 0;
        m.w_hh = random(int64_t(G) * H * H, 2 / std::sqrt(double(H)));
        if (above) m.w_ih = random(int64_t(G) * H * H, 2 / std::sqrt(double(H)));
        m.b_ih = random(G * H, 0.5);
        m.b_hh = random(G * H, 0.5);
        m.h0 = random(int64_t(B) * H, 1);
        m.c0 = random(int64_t(B) * H, 1);
        projections.push_back(random(N * G * H, 1));
        for (int64_t n = 0; n < N; ++n)
          for (int i = 0; i < G * H && batch.keeps(n); ++i) projections.back()[size_t(n * G * H + i)] = narrow<S>(NAN);
        m.h_n = unwritten<S>(int64_t(B) * H);
        m.c_n = unwritten<S>(Cell::has_cell ? int64_t(B) * H : 0);
        m.gates = unwritten<S>(save ? N * saved * H : 0);
        m.cells = unwritten<float>(save && Cell::has_cell ? N * H : 0);
        p.end_step = T;
        p.w_hh = m.w_hh.data();
        p.w_ih = above ? m.w_ih.data() : nullptr;
        p.b_ih = bias ? m.b_ih.data() : nullptr;
        p.b_hh = bias ? m.b_hh.data() : nullptr;
        p.h0 = initial ? m.h0.data() : nullptr;
        p.c0 = initial ? m.c0.data() : nullptr;
        p.h_n = m.h_n.data();
        p.c_n = Cell::has_cell ? m.c_n.data() : nullptr;
        p.y = layers > 1 && d < layers - 1 && !save ? nullptr : y.data() + d * H;
        p.y_stride = parts * H;
        if (arguments.number("dropout", 0) && d + 1 < layers) {
          m.factors = dropout_factors<S>(N * (H + 1), seed + d);
          p.factors = m.factors.data();
          p.factors_stride = H + 1;
        }
        p.gates = save && saved > 0 ? m.gates.data() : nullptr;
        p.cells = save && Cell::has_cell ? m.cells.data() : nullptr;
        m.drawn.draw(arguments.text("options", ""), Cell::has_cell, N, B, H, seed + d);
        p.options = m.drawn.options;
        hide_options(p.options, without);
        if (above) continue;
        // Where the projections stand: on their own, in the gates, or in y.
        S* to;
        if (in_place && G == 1) {
          to = y.data() + d * H;
          p.projection_stride = parts * H;
        } else if (in_place && save) {
          to = m.gates.data();
          p.projection_stride = saved * H;
        } else {
          m.projection = unwritten<S>(N * G * H);
          to = m.projection.data();
          p.projection_stride = G * H;
        }
        p.projection = to;
        for (int64_t n = 0; n < N; ++n)
          for (int i = 0; i < G * H; ++i) to[n * p.projection_stride + i] = projections.back()[size_t(n * G * H + i)];
      }
      std::vector<char> workspace = unwritten<char>(plan.workspace_bytes);
      for (int64_t i = 0; i < plan.counters * 4; ++i) workspace[size_t(i)] = 0;
      a.workspace = workspace.data();
      ForwardKernel kernel = forward_kernel<multiply, false>(sizes.kind, plan.shape);
      if constexpr (multiply != Multiply::float32)
        if (layers > 1) kernel = forward_kernel<multiply, true>(sizes.kind, plan.shape);
      launch(launch_of(arguments, plan, seed), [&] { kernel(a); });

      Error y_error, h_error, c_error, gates_error, cells_error;
      bool carried = true;
      std::vector<double> below;  // h of the part before, of all rows
      for (int d = 0; d < parts; ++d) {
        const Part& m = part[d];
        const bool above = layers > 1 && d > 0, has_y = a.part[d].y, reverse = D > 1 && d == 1;
        std::vector<double> output(size_t(N) * H, 0.0);
        const auto number = [&](const std::vector<S>& v, int64_t i) { return as_double(v[size_t(i)]); };
        std::vector<double> h(size_t(B) * H, 0.0), c(size_t(B) * H, 0.0), next = h;
        for (int64_t i = 0; i < int64_t(B) * H && initial; ++i) {
          h[size_t(i)] = number(m.h0, i);
          c[size_t(i)] = number(m.c0, i);
        }
        for (int s = 0; s < T; ++s) {
          const int t = reverse ? T - 1 - s : s;
          next = h;
          for (int64_t b = 0; b < batch.steps.rows(t); ++b) {
            const int64_t n = batch.steps.first_row(t) + b;
            for (int u = 0; u < H && batch.keeps(n); ++u) {
              const size_t state = size_t(b * H + u);
              const double found = as_double(y[size_t((n * parts + d) * H + u)]);
              const int64_t before = reverse ? n + B : n - B;
              const bool anew = s > 0 && batch.begins_anew(t, b, reverse);
              const double previous = anew      ? m.drawn.anew_h(int64_t(state))
                                      : s > 0   ? as_double(y[size_t((before * parts + d) * H + u)])
                                      : initial ? number(m.h0, b * H + u)
                                                : 0;
              if (has_y) carried = carried && found == previous;
              if (has_y) y_error.add(found, h[state]);
              for (int i = 0; i < saved && save; ++i) gates_error.add(number(m.gates, (n * saved + i) * H + u), 0);
              if (save && Cell::has_cell) cells_error.add(m.cells[size_t(n * H + u)], c[state]);
            }
            for (int u = 0; u < H && !batch.keeps(n); ++u) {
              double x[G], r[G], values[saved > 0 ? saved : 1] = {}, h_next, c_next = 0;
              for (int g = 0; g < G; ++g) {
                const bool apart = Cell::hidden_bias_apart(g);
                const double b_hh = bias ? number(m.b_hh, g * H + u) : 0;
                x[g] = (bias ? number(m.b_ih, g * H + u) : 0) + (apart ? 0 : b_hh);
                if (!above) x[g] += number(projections[size_t(d)], n * G * H + g * H + u);
                for (int k = 0; k < H && above; ++k)
                  x[g] += product_input(multiply, number(m.w_ih, (int64_t(g) * H + u) * H + k)) *
                          product_input(multiply, below[size_t(n * H + k)]);
                r[g] = apart ? b_hh : 0;
                for (int k = 0; k < H; ++k)
                  r[g] += product_input(multiply, number(m.w_hh, (int64_t(g) * H + u) * H + k)) *
                          product_input(multiply, h[size_t(b * H + k)] * m.drawn.factor(b * H + k));
              }
              Cell::template forward<double>(x, r, h[size_t(b * H + u)], c[size_t(b * H + u)], h_next, c_next, values);
              if (const double limit = m.drawn.options.cell_clip; limit > 0 && std::abs(c_next) > limit) {
                c_next = c_next > 0 ? limit : -limit;
                h_next = values[3] * std::tanh(c_next);
              }
              const double keeps_h = m.drawn.keeps_h(n, u, H), keeps_c = m.drawn.keeps_c(n, u, H);
              h_next = (1 - keeps_h) * h_next + keeps_h * h[size_t(b * H + u)];
              c_next = (1 - keeps_c) * c_next + keeps_c * c[size_t(b * H + u)];
              const double rounded = as_double(narrow<S>(float(h_next)));
              next[size_t(b * H + u)] = rounded;
              c[size_t(b * H + u)] = c_next;
              output[size_t(n * H + u)] = rounded;
              if (has_y) y_error.add(as_double(y[size_t((n * parts + d) * H + u)]), rounded);
              for (int i = 0; i < saved && save; ++i)
                gates_error.add(number(m.gates, (n * saved + i) * H + u), values[i]);
              if (save && Cell::has_cell) cells_error.add(m.cells[size_t(n * H + u)], c_next);
            }
          }
          h = next;
          for (int64_t i = 0; i < int64_t(B) * H; ++i) {
            if (!batch.begins_anew(reverse ? t - 1 : t + 1, i / H, reverse)) continue;
            h[size_t(i)] = m.drawn.anew_h(i);
            c[size_t(i)] = m.drawn.anew_c(i);
          }
        }
        for (int64_t i = 0; i < int64_t(B) * H; ++i) {
          h_error.add(number(m.h_n, i), h[size_t(i)]);
          if (Cell::has_cell) c_error.add(number(m.c_n, i), c[size_t(i)]);
        }
        for (int64_t n = 0; n < N && !m.factors.empty(); ++n)
          for (int u = 0; u < H; ++u) output[size_t(n * H + u)] *= number(m.factors, n * (H + 1) + u);
        below = output;
      }
      // A sum in float32 can fall on the other side of a rounding boundary than one in float64, and the sums of the
      // next step, which read that number, then do so all the more: an error of one rounding (2^-9 of bfloat16, 2^-12
      // of float16, also of TF32's factors) may be in every number. A wrong factor anywhere is a hundred times that.
      const double exact = multiply == Multiply::tf32 ? 1e-4 : 2e-6;
      const double bound = multiply == Multiply::bfloat16 ? 3e-3 : multiply == Multiply::float16 ? 4e-4 : exact;
      Verdict verdict;
      verdict.expect("y", y_error, bound);
      verdict.expect("h_n", h_error, bound);
      verdict.expect("c_n", c_error, bound);
      verdict.expect("gates", gates_error, bound);
      verdict.expect("cells", cells_error, bound);
      if (!carried) printf("y of a masked row is not the state before it  WRONG\n");
      return verdict.wrong() > 0 || !carried ? 1 : 0;
    });
  }
};

}  // namespace cuda_host
}  // namespace fused_rnn

int main(int argc, char** argv) { return fused_rnn::cuda_host::run_case<fused_rnn::cuda_host::Forward>(argc, argv); }
