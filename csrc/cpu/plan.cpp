#include "plan.h"

#include <algorithm>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "custom.h"

namespace fused_rnn {

namespace {

// Constants of the cost model, in cycles and bytes per cycle of one core, measured on Zen 5 (docs/performance.md). They
// decide only between splits, so their ratios matter, not their absolute size.
constexpr double cycles_per_us = 3700;
constexpr double fma_per_cycle = 2;            // vector instructions
constexpr double bytes_per_cycle_l2 = 60;      // streaming packed weights that stay in this core's L2
constexpr double bytes_per_cycle_shared = 30;  // the same from the shared cache
constexpr double l2_bytes = 900e3;             // of 1 MiB, the rest being states and gates
constexpr double bytes_per_cycle_memory = 7;   // weights in place, 27 GB/s, and their gradients
constexpr double barrier_cycles = 900;         // arrival and wake-up
constexpr double exchange_cycles = 300;        // the cache misses on one row of the state that others wrote
constexpr double stream_share = 0.7;           // of the streaming time, what multiplying does not hide, forward
constexpr double activation_cycles = 22;       // one vector of tanh or sigmoid
constexpr double launch_cycles = 14000;        // waking the other threads of the team

// Where weights are read in place, which saves reading, writing and reading them once more. Every step reads w_hh anew,
// from memory where it is large and packing it costs much, otherwise from a cache, from which packed panels come
// faster: with 4 steps both take the same time, with 8 only large weights gain (0.6 to 0.95 of the time). The gain ends
// at some 256 rows over all steps, beside whose products packing is no cost, and small layers have none. bfloat16,
// where an instruction multiplies it, is packed a panel at a time as it goes, and anew for every step: one step takes
// 0.5 to 0.95 of the time, four 0.9 to 1.9, and products pass so fast that small weights gain nothing
// (docs/performance.md).
constexpr int64_t most_rows_in_place = 256;
// Of w_ih beside a packed w_hh: with many more rows a call whose w_ih is kept packed is faster.
constexpr int64_t most_input_rows_in_place = 48;
constexpr int64_t most_bfloat16_steps_in_place = 2;
constexpr int64_t least_bfloat16_elements_in_place = 1 << 17;
constexpr int64_t most_steps_in_place = 4;
constexpr int64_t most_steps_of_large_in_place = 8;
constexpr int64_t large_recurrent_elements = 1 << 20;
constexpr int64_t least_units_in_place = 96;

template <class F>
auto with_cell(CellKind kind, F f) {
  switch (kind) {
    case CellKind::rnn_tanh: return f(RnnTanh{});
    case CellKind::rnn_relu: return f(RnnRelu{});
    case CellKind::gru: return f(Gru{});
    case CellKind::lstm:
    case CellKind::custom: break;
  }
  return f(Lstm{});
}

// Of a packed weight: float16, and bfloat16 without its dot product, are multiplied in float32; the model counts
// bfloat16 as if it had it.
double element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::bfloat16 ? 2 : 4; }

// Multiply-adds that a core does in a cycle.
double multiply_adds_per_cycle(DType dtype, int vector_bytes) {
  return fma_per_cycle * vector_bytes / element_bytes(dtype);
}

// Cycles of one step on one thread that has `rows` rows and `units` units of each direction it owns.
double step_cycles(const LayerSizes& sizes, double rows, double units, double directions, int vector_bytes,
                   bool backward) {
  const double element = element_bytes(sizes.dtype);
  const double lanes = vector_bytes / (sizes.dtype == DType::float64 ? 8.0 : 4.0);
  const double padded = std::max(1.0, double(int64_t((units + lanes - 1) / lanes))) * lanes;
  const double weights = gate_count(sizes.kind) * padded * double(sizes.state_size / sizes.heads);
  const double multiply = rows * weights / multiply_adds_per_cycle(sizes.dtype, vector_bytes);
  const double bytes = weights * element;
  const double stream = bytes / (bytes * directions <= l2_bytes ? bytes_per_cycle_l2 : bytes_per_cycle_shared);
  const double gates = rows * (padded / lanes) * (gate_count(sizes.kind) + 1) * activation_cycles;
  const double products = std::max(stream, backward ? multiply : multiply + stream_share * stream);
  return directions * (products + gates);
}

// Cycles for which one thread alone would read the weights in place and, backward, write their gradients, each line of
// which is read first.
double in_place_cycles(const LayerSizes& sizes, const Steps& steps, bool backward, bool from_zeros) {
  const double stored = double(stored_bytes(sizes.dtype));
  const double rows = gate_count(sizes.kind) * double(sizes.hidden_size) * double(sizes.num_directions);
  const double once = rows * double(sizes.input_size + (from_zeros ? 0 : sizes.state_size)) * stored;
  const double again = rows * double(sizes.state_size) * stored * double(steps.T - 1);
  const double touched = once * (backward ? 3 : 1);
  return (touched + again) / (touched <= l2_bytes ? bytes_per_cycle_shared : bytes_per_cycle_memory);
}

// Null: a cell of cells/.
const CustomCell* custom(CellKind kind) { return is_custom(kind) ? custom_cell(kind) : nullptr; }

}  // namespace

int gate_count(CellKind kind) {
  if (const CustomCell* cell = custom(kind)) return cell->gates;
  return with_cell(kind, [](auto cell) { return int(decltype(cell)::gates); });
}

int saved_gate_count(CellKind kind, bool layer_norm) {
  if (const CustomCell* cell = custom(kind)) return cell->saved;
  return with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    return int(Cell::saved + (layer_norm ? 2 * Cell::gates : 0));
  });
}

int private_states(CellKind kind) {
  if (const CustomCell* cell = custom(kind)) return cell->states;
  return with_cell(kind, [](auto cell) { return int(decltype(cell)::states); });
}

bool is_known(CellKind kind) {
  return (kind >= CellKind::rnn_tanh && kind <= CellKind::gru) || custom(kind) != nullptr;
}

bool reads_weights_in_place(const LayerSizes& sizes, const Steps& steps) {
  if (sizes.heads > 1) return false;
  const int64_t rows = steps.total_rows();
  if (rows <= most_rows_in_place_of_any_size && steps.T <= most_steps_in_place) return true;
  if (sizes.layer_norm) return false;  // no thread may divide units, so that rows are all there is to divide
  if (sizes.hidden_size < least_units_in_place) return false;
  if (rows > most_rows_in_place) return false;
  const int64_t elements = gate_count(sizes.kind) * sizes.hidden_size * sizes.state_size;
  if (sizes.dtype == DType::bfloat16)
    return elements >= least_bfloat16_elements_in_place && steps.T <= most_bfloat16_steps_in_place;
  return steps.T <= (elements >= large_recurrent_elements ? most_steps_of_large_in_place : most_steps_in_place);
}

bool reads_input_weights_in_place(const LayerSizes& sizes, const Steps& steps) {
  if (steps.total_rows() <= most_rows_in_place_of_any_size || reads_weights_in_place(sizes, steps)) return true;
  if (sizes.layer_norm || sizes.hidden_size < least_units_in_place) return false;
  if (steps.total_rows() > most_input_rows_in_place) return false;
  const int64_t elements = gate_count(sizes.kind) * sizes.hidden_size * sizes.input_size;
  return sizes.dtype != DType::bfloat16 || elements >= least_bfloat16_elements_in_place;
}

Plan make_plan(const LayerSizes& sizes, const Steps& steps, int threads, int vector_bytes, bool backward,
               bool from_zeros) {
  const int64_t D = sizes.num_directions;
  const double T = double(steps.T);
  const double rows = steps.T > 0 ? double(steps.total_rows()) / T : 0;  // of a mean step
  // Threads with other rows would each read all of the weights.
  const bool in_place = sizes.hidden_size >= least_units_in_place && reads_weights_in_place(sizes, steps);
  LayerSizes without_state = sizes;
  without_state.state_size = 0;
  const auto cost = [&](const Plan& plan) {
    const double own_rows = std::max(1.0, double(int64_t(rows / plan.row_groups + 0.999)));
    const double own_units = double(sizes.hidden_size) / plan.unit_groups;
    const auto step = [&](const LayerSizes& multiplied) {
      return step_cycles(multiplied, own_rows, own_units, double(D) / plan.direction_groups, vector_bytes, backward);
    };
    double cycles = T * step(sizes);
    if (from_zeros && T > 0) cycles -= step(sizes) - step(without_state);
    if (plan.unit_groups > 1)
      cycles += T * (barrier_cycles + exchange_cycles * own_rows) * (sizes.state_size != sizes.hidden_size ? 3 : 1);
    // What divides evenly over any plan: the input projections, or backward the gradients of the input and of the
    // weights; and a projection of h.
    const double gates = gate_count(sizes.kind) * double(sizes.hidden_size);
    const double input_size = double(sizes.input_size), state_size = double(sizes.state_size);
    const double projection = sizes.state_size == sizes.hidden_size ? 0 : state_size * double(sizes.hidden_size);
    const double recurrent = state_size / double(sizes.heads);
    const double even =
        backward ? gates * (2 * input_size + recurrent) + 2 * projection : gates * input_size + projection;
    const double even_cycles = rows * double(D) * even / multiply_adds_per_cycle(sizes.dtype, vector_bytes);
    double total = cycles + T * even_cycles / plan.threads();
    if (in_place) total = std::max(total, in_place_cycles(sizes, steps, backward, from_zeros) / plan.threads());
    if (plan.threads() > 1) total += launch_cycles;
    return total / cycles_per_us;
  };
  Plan best;
  best.predicted_us = best.serial_us = cost(best);
  // A team is woken as a whole, so it has either one thread or all of them.
  // The backward pass divides units by column panels of four vectors.
  const int64_t unit_blocks = (sizes.hidden_size + vector_bytes - 1) / vector_bytes;
  for (int directions = 1; directions <= D; ++directions) {
    if (threads % directions != 0) continue;
    for (int units = 1; units <= threads / directions; ++units) {
      if ((threads / directions) % units != 0 || (units > 1 && units > unit_blocks)) continue;
      Plan plan;
      plan.direction_groups = directions;
      plan.unit_groups = units;
      plan.row_groups = threads / directions / units;
      if (plan.row_groups > 1 && plan.row_groups > steps.B) continue;
      if (plan.row_groups > 1 && in_place) continue;
      if (units > 1 && sizes.layer_norm) continue;  // mean and variance are of all units of a row
      plan.serial_us = best.serial_us;
      plan.predicted_us = cost(plan);
      if (plan.predicted_us < best.predicted_us) best = plan;
    }
  }
  return best;
}

Bound time_bound(const LayerSizes& sizes, const Steps& steps, const Plan& plan, int vector_bytes, bool backward) {
  const double D = sizes.num_directions, T = double(steps.T), N = double(steps.total_rows());
  const double H = double(sizes.hidden_size), P = double(sizes.state_size), G = gate_count(sizes.kind);
  const double threads = plan.threads();
  const double lanes = vector_bytes / (sizes.dtype == DType::float64 ? 8.0 : 4.0);
  const double projection = sizes.state_size == sizes.hidden_size ? 0 : P * H;
  const double products =
      N * D * (G * H * (double(sizes.input_size) + P / double(sizes.heads)) + projection) * (backward ? 2 : 1);
  const struct {
    double cycles;
    const char* by;
  } bounds[] = {
      {products / multiply_adds_per_cycle(sizes.dtype, vector_bytes) / threads, "multiply-adds"},
      {T * D * (G * H * P / double(sizes.heads) + projection) * element_bytes(sizes.dtype) / bytes_per_cycle_l2 /
           threads,
       "recurrent weights"},
      {N * D * H / lanes * (backward ? 1 : G + (has_cell_state(sizes.kind) ? 1 : 0)) * activation_cycles / threads,
       "gate arithmetic"},
      {plan.unit_groups > 1 ? T * barrier_cycles : 0, "barriers"},
  };
  Bound bound;
  for (const auto& b : bounds) {
    if (b.cycles / cycles_per_us > bound.us) bound = {b.cycles / cycles_per_us, b.by};
  }
  return bound;
}

int64_t row_boundary(const Steps& steps, int group, int groups) {
  if (group <= 0) return 0;
  if (group >= groups) return steps.B;
  if (!steps.batch_sizes) return steps.B * group / groups;
  // Rows are sorted by falling length: the smallest r whose rows hold this share of all live rows.
  const int64_t wanted = steps.total_rows() * group / groups;
  int64_t low = 0, high = steps.B;
  while (low < high) {
    const int64_t r = (low + high) / 2;
    int64_t live = 0;
    for (int64_t t = 0; t < steps.T; ++t) live += std::min(steps.batch_sizes[t], r);
    if (live < wanted) {
      low = r + 1;
    } else {
      high = r;
    }
  }
  return low;
}

}  // namespace fused_rnn
