// persistent_backward name=value ...: one case of the persistent backward kernels against float64. Exit status 1:
// wrong.
//   kind dtype (tf32: float32 with its product in TF32) T B H directions layers (in a wavefront) ragged masked
//   exchange (none, counted, barriers, memory) blocks (of a team) columns (of a team, at most) sms seed
//   options without (letters: persistent.h) dropout (between layers) in_place (gradients of the gates go where the
//   gates are) initial (h0, c0 and their gradients) final (gradients of h_n, c_n) output (gradients of y)
#include "cuda/persistent.cuh"
#include "cuda/plan.cpp"
#include "persistent.h"

namespace fused_rnn {
namespace cuda_host {

struct Backward {
  const Case& arguments;

  template <Multiply multiply>
  int operator()() const {
    using S = typename ProductOf<multiply>::type::Storage;
    const int T = arguments.number("T", 4), B = arguments.number("B", 3), H = arguments.number("H", 24);
    const int D = arguments.number("directions", 1), layers = arguments.number("layers", 1), parts = D * layers;
    const int seed = arguments.number("seed", 0);
    const bool initial = arguments.number("initial", 1), final = arguments.number("final", 1);
    const bool output = arguments.number("output", 1), in_place = arguments.number("in_place", 1);
    LayerSizes sizes;
    sizes.kind = kind_named(arguments.text("kind", "lstm"));
    sizes.dtype = dtype_named(arguments.text("dtype", "bfloat16"));
    sizes.hidden_size = sizes.state_size = H;
    sizes.num_directions = D;
    const Batch batch(arguments);
    const std::string without = arguments.text("without", "");
    const Plan plan = plan_of(arguments, sizes, batch.steps, true, multiply == Multiply::tf32);
    print(plan);
    if (plan.variant == Variant::none || plan.layers != layers) return printf("no plan: %s\n", plan.reason.c_str()), 2;

    const int64_t N = batch.steps.total_rows(), states = int64_t(B) * H;
    return with_cell(sizes.kind, [&](auto cell) {
      using Cell = decltype(cell);
      constexpr int G = Cell::gates, saved = Cell::saved, grad_gates = Cell::grad_gates;
      Random<S> random(unsigned(seed) + 17);
      Random<float> random_float(unsigned(seed) + 18);
      struct Part {
        std::vector<S> w_hh, w_ih, factors, h0, c0, gates, grad_h_n, grad_c_n, grad_gates, grad_h0, grad_c0;
        std::vector<float> cells;
        std::vector<uint8_t> clips;
        DrawnOptions<S> drawn;
      } part[most_layers];
      const std::vector<S> y = random(N * parts * H, 1), grad_y = random(N * parts * H, 1);
      BackwardArguments a = {};
      a.hidden_size = H;
      a.steps = batch.steps;
      if (without.find('r') != std::string::npos) a.steps.reset = nullptr;
      a.tiling = plan.tiling;
      std::vector<std::vector<S>> gates;
      for (int d = 0; d < parts; ++d) {
        Part& m = part[d];
        PersistentBackward& p = a.part[d];
        const bool above = layers > 1 && d > 0, highest = layers == 1 || d == layers - 1;
        m.w_hh = random(int64_t(G) * H * H, 2 / std::sqrt(double(H)));
        if (above) m.w_ih = random(int64_t(G) * H * H, 2 / std::sqrt(double(H)));
        m.h0 = random(states, 1);
        m.c0 = random(states, 1);
        m.gates = random(N * saved * H, 1);
        gates.push_back(m.gates);
        for (int64_t n = 0; n < N; ++n)
          for (int i = 0; i < saved * H && batch.keeps(n); ++i) m.gates[size_t(n * saved * H + i)] = narrow<S>(NAN);
        m.grad_h_n = random(states, 1);
        m.grad_c_n = random(states, 1);
        if (Cell::has_cell) m.cells = random_float(N * H, 2);
        m.grad_h0 = unwritten<S>(states);
        m.grad_c0 = unwritten<S>(states);
        const bool replaces = in_place && saved == grad_gates;
        if (!replaces) m.grad_gates = unwritten<S>(N * grad_gates * H);
        p.w_hh = m.w_hh.data();
        p.w_ih = above ? m.w_ih.data() : nullptr;
        p.gates = m.gates.data();
        p.cells = m.cells.data();
        p.y = y.data() + d * H;
        p.y_stride = parts * H;
        p.h0 = initial ? m.h0.data() : nullptr;
        p.c0 = initial ? m.c0.data() : nullptr;
        p.grad_y = output && highest ? grad_y.data() + d * H : nullptr;
        p.grad_y_stride = parts * H;
        if (arguments.number("dropout", 0) && !highest) {
          m.factors = dropout_factors<S>(N * (H + 1), seed + d);
          p.factors = m.factors.data();
          p.factors_stride = H + 1;
        }
        p.grad_h_n = final ? m.grad_h_n.data() : nullptr;
        p.grad_c_n = final && Cell::has_cell ? m.grad_c_n.data() : nullptr;
        p.grad_gates = replaces ? m.gates.data() : m.grad_gates.data();
        p.grad_h0 = initial ? m.grad_h0.data() : nullptr;
        p.grad_c0 = initial && Cell::has_cell ? m.grad_c0.data() : nullptr;
        m.drawn.draw(arguments.text("options", ""), Cell::has_cell, N, B, H, seed + d);
        if (batch.steps.reset && initial) m.drawn.want_gradients(Cell::has_cell, states);
        for (int64_t n = 0; n < N && !batch.mask.empty(); ++n)
          m.clips.push_back(!batch.keeps(n) && batch.is_made(n / B, n % B, D > 1 && d == 1));
        m.drawn.options.clips = m.clips.empty() ? nullptr : m.clips.data();
        p.options = m.drawn.options;
        hide_options(p.options, without);
      }
      std::vector<char> workspace = unwritten<char>(plan.workspace_bytes);
      for (int64_t i = 0; i < plan.counters * 4; ++i) workspace[size_t(i)] = 0;
      a.workspace = workspace.data();
      BackwardKernel kernel = backward_kernel<multiply, false>(sizes.kind, plan.shape);
      if constexpr (multiply != Multiply::float32)
        if (layers > 1) kernel = backward_kernel<multiply, true>(sizes.kind, plan.shape);
      launch(launch_of(arguments, plan, seed), [&] { kernel(a); });

      Error gates_error, h_error, c_error, anew_h_error, anew_c_error;
      bool zeros = true;
      std::vector<double> from_above;  // gradient of h, of all rows
      for (int d = parts - 1; d >= 0; --d) {
        const Part& m = part[d];
        const bool above = layers > 1 && d > 0, highest = layers == 1 || d == layers - 1;
        const bool reverse = D > 1 && d == 1;
        std::vector<double> to_below(size_t(N) * H, 0.0);
        const auto number = [&](const std::vector<S>& v, int64_t i) { return as_double(v[size_t(i)]); };
        const auto gradient_of_y = [&](int64_t n, int u) {
          if (!highest)
            return from_above[size_t(n * H + u)] * (m.factors.empty() ? 1 : number(m.factors, n * (H + 1) + u));
          return output ? as_double(grad_y[size_t((n * parts + d) * H + u)]) : 0;
        };
        const S* const results = typed<S>(a.part[d].grad_gates);
        std::vector<double> dh(size_t(states), 0.0), dc(size_t(states), 0.0), anew_dh = dh, anew_dc = dc;
        for (int64_t i = 0; i < states && final; ++i) {
          dh[size_t(i)] = number(m.grad_h_n, i);
          dc[size_t(i)] = number(m.grad_c_n, i);
        }
        for (int s = 0; s < T; ++s) {
          const int t = reverse ? s : T - 1 - s, previous = reverse ? t + 1 : t - 1;
          const int64_t previous_rows = previous < 0 || previous >= T ? 0 : batch.steps.rows(previous);
          for (int64_t b = 0; b < batch.steps.rows(t); ++b) {
            const int64_t n = batch.steps.first_row(t) + b;
            for (int u = 0; u < H && batch.keeps(n); ++u) {
              dh[size_t(b * H + u)] += gradient_of_y(n, u);
              for (int i = 0; i < grad_gates; ++i) zeros = zeros && widen(results[(n * grad_gates + i) * H + u]) == 0;
            }
            const bool anew = batch.begins_anew(t, b, reverse);
            const auto end_gradients = [&] {
              for (int u = 0; u < H && anew; ++u) {
                const size_t state = size_t(b * H + u);
                anew_dh[state] += dh[state];
                anew_dc[state] += dc[state];
                dh[state] = dc[state] = 0;
              }
            };
            if (batch.keeps(n)) {
              end_gradients();
              continue;
            }
            std::vector<double> product(size_t(G) * H), input_product = product;
            for (int u = 0; u < H; ++u) {
              const bool begins = b >= previous_rows;
              const int64_t state = b * H + u, before = begins ? 0 : batch.steps.first_row(previous) + b;
              double values[saved > 0 ? saved : 1] = {}, grads[grad_gates], dh_previous, dc_previous = 0;
              for (int i = 0; i < saved; ++i) values[i] = number(gates[size_t(d)], (n * saved + i) * H + u);
              const double h_previous = anew     ? m.drawn.anew_h(state)
                                        : begins ? (initial ? number(m.h0, state) : 0)
                                                 : number(y, (before * parts + d) * H + u);
              const double keeps_h = m.drawn.keeps_h(n, u, H), keeps_c = m.drawn.keeps_c(n, u, H);
              const double all_h = dh[size_t(state)] + gradient_of_y(n, u), all_c = dc[size_t(state)];
              double c = 0, c_previous = 0, unclipped = 0;
              const double limit = m.drawn.options.cell_clip;
              if (Cell::has_cell) {
                c = m.cells[size_t(n * H + u)];
                c_previous = anew     ? m.drawn.anew_c(state)
                             : begins ? (initial ? number(m.c0, state) : 0)
                                      : double(m.cells[size_t(before * H + u)]);
                // What is saved is c after zoneout.
                unclipped = values[1] * c_previous + values[0] * values[2];
                if (m.drawn.options.zoneout_cell || m.drawn.options.cell_rate > 0)
                  c = limit > 0 ? std::min(std::max(unclipped, -limit), limit) : unclipped;
              }
              Cell::template backward<double>(values, number(y, (n * parts + d) * H + u), h_previous, c, c_previous,
                                              (1 - keeps_h) * all_h, (1 - keeps_c) * all_c, grads, dh_previous,
                                              dc_previous);
              if (limit > 0 && std::abs(unclipped) > limit) grads[0] = grads[1] = grads[2] = dc_previous = 0;
              dh[size_t(state)] = dh_previous + keeps_h * all_h;
              if (Cell::has_cell) dc[size_t(state)] = dc_previous + keeps_c * all_c;
              for (int i = 0; i < grad_gates; ++i)
                gates_error.add(as_double(results[(n * grad_gates + i) * H + u]), grads[i]);
              for (int g = 0; g < G; ++g) {
                const double grad = as_double(narrow<S>(float(grads[Cell::hidden_grads.first + g])));
                const double input_grad = as_double(narrow<S>(float(grads[Cell::input_grads.first + g])));
                product[size_t(Cell::hidden_grads.gate[g]) * H + u] = product_input(multiply, grad);
                input_product[size_t(Cell::input_grads.gate[g]) * H + u] = product_input(multiply, input_grad);
              }
            }
            for (int u = 0; u < H; ++u) {
              for (int k = 0; k < G * H; ++k) {
                const int64_t at = int64_t(k) * H + u;
                dh[size_t(b * H + u)] +=
                    m.drawn.factor(b * H + u) * product_input(multiply, number(m.w_hh, at)) * product[size_t(k)];
                if (above)
                  to_below[size_t(n * H + u)] += product_input(multiply, number(m.w_ih, at)) * input_product[size_t(k)];
              }
            }
            end_gradients();
            const double limit = m.drawn.options.grad_clip;
            const bool ends = m.drawn.options.bptt_steps > 0 && t > 0 && t % m.drawn.options.bptt_steps == 0;
            for (int64_t i = b * H; i < (b + 1) * H; ++i) {
              if (ends) dh[size_t(i)] = dc[size_t(i)] = 0;
              if (limit > 0 && batch.is_made(t, b, reverse))
                dh[size_t(i)] = std::min(std::max(dh[size_t(i)], -limit), limit);
            }
          }
        }
        for (int64_t i = 0; i < states && initial; ++i) {
          h_error.add(number(m.grad_h0, i), dh[size_t(i)]);
          if (Cell::has_cell) c_error.add(number(m.grad_c0, i), dc[size_t(i)]);
        }
        for (int64_t i = 0; i < int64_t(m.drawn.grad_reset_h.size()); ++i) {
          anew_h_error.add(m.drawn.grad_reset_h[size_t(i)], anew_dh[size_t(i)]);
          if (Cell::has_cell) anew_c_error.add(m.drawn.grad_reset_c[size_t(i)], anew_dc[size_t(i)]);
        }
        from_above = to_below;
      }
      // Results are rounded to the dtype; a gradient that a sum in float32 rounds the other way goes on with that.
      const double rounding = multiply == Multiply::bfloat16 ? 3e-3 : multiply == Multiply::float16 ? 4e-4 : 2e-6;
      // TF32 takes a rounding boundary of its own at every step.
      const double bound = multiply == Multiply::tf32 ? 1e-4 : rounding;
      Verdict verdict;
      verdict.expect("grad_gates", gates_error, bound);
      verdict.expect("grad_h0", h_error, bound);
      verdict.expect("grad_c0", c_error, bound);
      verdict.expect("grad_reset_h", anew_h_error, bound);
      verdict.expect("grad_reset_c", anew_c_error, bound);
      if (!zeros) printf("grad_gates of masked rows are not zeros  WRONG\n");
      return verdict.wrong() > 0 || !zeros ? 1 : 0;
    });
  }
};

}  // namespace cuda_host
}  // namespace fused_rnn

int main(int argc, char** argv) { return fused_rnn::cuda_host::run_case<fused_rnn::cuda_host::Backward>(argc, argv); }
