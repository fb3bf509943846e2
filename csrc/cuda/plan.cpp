#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "measured.h"

namespace fused_rnn {
namespace cuda {

namespace {

using namespace measured;  // constants of the cost model

// Threads of a block that do gates, in whichever way the kernels were compiled.
constexpr int fewest_gate_threads = 128;
// Of shared memory, for a column tile's running states: two numbers for each unit and column.
constexpr int64_t state_bytes = 2 * most_units * tile_columns * 4;

// Projections of so many bytes of a direction at once, but of no fewer steps: for each part W_hh is loaded again.
constexpr int64_t projection_bytes = int64_t(64) << 20, fewest_projection_steps = 128;

struct Problem {
  CellKind kind;
  DType dtype;
  int gates;
  int64_t H, P, T, B;  // P: of h after its projection, else H
  int directions;
  int layers;     // that one launch runs
  int element;    // bytes
  int per_chunk;  // elements
  int octets;     // of all units
};

int gates_of(CellKind kind) {
  switch (kind) {
    case CellKind::lstm: return Lstm::gates;
    case CellKind::gru: return Gru::gates;
    default: return RnnTanh::gates;
  }
}

// Cycles between two m16n8k16 (16 bits) or m16n8k8 (TF32) instructions of a scheduler.
double multiply_cycles_of(int arch) { return arch >= 120 ? 16 : arch >= 90 ? multiply_cycles : 8; }

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

std::string text(const char* format, double a = 0, double b = 0, double c = 0) {
  char buffer[256];
  snprintf(buffer, sizeof buffer, format, a, b, c);
  return buffer;
}

// Teams of `blocks` blocks that are resident together.
int resident_teams(const DeviceInfo& device, Exchange exchange, int blocks) {
  if (exchange != Exchange::counted && exchange != Exchange::barriers) return device.sms / blocks;
  const int known = device.resident_clusters[blocks == 2 ? 1 : blocks == 4 ? 2 : blocks == 8 ? 3 : 4];
  return known >= 0 ? known : device.sms / blocks;
}

class Candidate {
 public:
  Candidate(const Problem& problem, const DeviceInfo& device, Plan plan)
      : problem_(problem), device_(device), plan_(std::move(plan)) {}

  // Lays out a block of the plan's team. The result says what does not fit; empty: all does.
  std::string lay_out() {
    Tiling& t = plan_.tiling;
    t.layers = problem_.layers;
    t.active = ceil_div(problem_.octets, t.octets);
    t.column_tiles = ceil_div(t.columns, tile_columns);
    if (t.octets * 8 > most_units)
      return text("%.0f units a block, of which a kernel takes %.0f", t.octets * 8, most_units);
    return plan_.backward ? lay_out_backward() : lay_out_forward();
  }

  void predict() {
    Tiling& t = plan_.tiling;
    const double mma = multiply_cycles_of(device_.arch);
    const bool fma = plan_.multiply == Multiply::float32;
    const int columns = std::min(t.columns, tile_columns);
    // Of a warp, per column tile: row tiles times slabs; two warps share a scheduler.
    const double tiles = double(t.row_tiles) * t.slabs;
    const double multiply = 2 * tiles * (fma ? 8.0 * columns : 2 * mma);
    double shared = double(plan_.weight_bytes) + double(multiply_warps) * t.slabs * slab_bytes;
    const double units = t.octets * 8;
    double travels;
    if (plan_.backward) {
      if (fma) shared += double(multiply_warps) * t.row_tiles * t.slabs * slab_bytes;
      shared += double(sources()) * t.active * units * columns * 4;
      travels = double(sources() * problem_.H) * columns * 4;
    } else {
      shared += 2.0 * t.warps_k * problem_.gates * units * columns * 4;
      travels = double(sources() * problem_.H) * columns * problem_.element;
    }
    double latency = plan_.backward ? backward_gates_cycles : gates_cycles, bandwidth = remote_bytes_per_cycle;
    switch (t.exchange) {
      case Exchange::none: travels = 0; break;
      case Exchange::counted: latency += remote_cycles; break;
      case Exchange::barriers: latency += cluster_barrier_cycles; break;
      case Exchange::memory:
        latency += memory_cycles;
        bandwidth = l2_bytes_per_cycle / (plan_.backward ? 2 : 1);
        break;
    }
    // Products hide behind the loads of their operands, or these behind them; in the machine code of the backward pass,
    // where sums leave between the groups of row tiles, about half of the shorter does not.
    const double loads = shared / shared_bytes_per_cycle;
    const double products = std::max(multiply, loads) + (plan_.backward ? std::min(multiply, loads) / 2 : 0);
    const double tile = std::max(products, travels / bandwidth);
    const double cycles = std::max(t.column_tiles * (tile + issue_cycles), tile + latency + travels / bandwidth / 2);
    const double mhz = device_.clock_khz > 0 ? device_.clock_khz / 1e3 : 1700;
    plan_.predicted_step_us = plan_.waves * cycles / mhz;
    const double load = double(plan_.register_bytes + plan_.weight_bytes) / load_bytes_per_us;
    plan_.predicted_us =
        launch_us + plan_.waves * load + double(problem_.T + problem_.layers - 1) * plan_.predicted_step_us;
  }

  const Plan& plan() const { return plan_; }

 private:
  // Layers from which a block receives, and whose products with it holds: its own, and in a wavefront its neighbour.
  int sources() const { return problem_.layers > 1 ? 2 : 1; }

  // The next `bytes` of shared memory.
  int32_t take(int64_t bytes) {
    const int64_t at = shared_;
    shared_ += (bytes + 127) / 128 * 128;
    return int32_t(at);
  }

  // From `at` on there is room for so many row tiles of each warp, before the first step: what stands there later is
  // written after that.
  void staging(int64_t at, int row_tiles) { most_ = std::max(most_, at + multiply_warps * row_tiles * tile_bytes); }

  std::string check() {
    shared_ = std::max(shared_, most_);
    if (shared_ > device_.shared_per_block)
      return text(
          "%.0f KiB of W_hh a block do not fit %.0f KiB of registers and, beside the states, %.0f of shared memory",
          double(plan_.register_bytes + plan_.weight_bytes) / 1024, double(plan_.register_bytes) / 1024,
          double(device_.shared_per_block) / 1024);
    plan_.tiling.shared_bytes = int32_t(shared_);
    return "";
  }

  std::string lay_out_forward() {
    Tiling& t = plan_.tiling;
    const ForwardShape shape = forward_shape(plan_.multiply, plan_.shape, problem_.layers > 1);
    const int row_tiles = ceil_div(int64_t(t.octets) * problem_.gates, 2);
    t.warps_rows = 1;
    while (t.warps_rows < multiply_warps && t.warps_rows * shape.row_tiles < row_tiles) t.warps_rows *= 2;
    // In a wavefront half of the warps are W_ih's.
    const int most_rows = multiply_warps / sources();
    if (t.warps_rows > most_rows || t.warps_rows * shape.row_tiles < row_tiles)
      return text("%.0f rows of W_hh a block, of which a kernel takes %.0f", 16 * row_tiles,
                  16 * most_rows * shape.row_tiles);
    t.warps_k = multiply_warps / t.warps_rows;
    const int chunks = problem_.octets * 8 / problem_.per_chunk, slabs = ceil_div(chunks, 4);
    t.slabs = ceil_div(slabs, t.warps_k / sources());
    t.row_tiles = shape.row_tiles;
    const bool memory = t.exchange == Exchange::memory;
    const int64_t in_registers = std::min(t.slabs, shape.register_slabs);
    plan_.register_bytes = multiply_warps * in_registers * shape.row_tiles * tile_bytes;
    plan_.weight_bytes = multiply_warps * (t.slabs - in_registers) * shape.row_tiles * tile_bytes;
    t.states = take(int64_t(t.column_tiles) * state_bytes);
    t.biases = take(multiply_threads * 16);
    // As at half_tile_pairs (persistent_forward.cuh).
    t.sum_pairs = ceil_div(std::min(t.columns, tile_columns), 2);
    t.pair_stride = (2 * t.warps_rows * t.row_tiles * 9 + 15) / 16 * 16 + 4;
    t.sums = take(2LL * t.warps_k * t.sum_pairs * t.pair_stride * 8);
    staging(t.sums, shape.row_tiles);  // W_hh comes in through here, a slab of row tiles a warp
    t.operand = take(int64_t(memory ? 1 : 2 * t.column_tiles * sources()) * slabs * slab_bytes);
    t.barriers = take(2LL * t.column_tiles * 8);
    t.credits = take(problem_.layers > 1 ? 2LL * t.column_tiles * 8 : 0);
    t.weights = take(plan_.weight_bytes);
    if (memory) {
      plan_.counters = int64_t(problem_.directions) * t.teams * t.column_tiles;
      plan_.workspace_bytes = counter_bytes(plan_.counters) + plan_.counters * 2 * slabs * slab_bytes;
    }
    return check();
  }

  std::string lay_out_backward() {
    Tiling& t = plan_.tiling;
    const BackwardShape shape = backward_shape(plan_.multiply, plan_.shape);
    t.slabs = ceil_div(int64_t(t.octets) * 8 / problem_.per_chunk * problem_.gates, 4);
    if (t.slabs > shape.slabs)
      return text("%.0f gates a block, of which a kernel takes %.0f", t.octets * 8 * problem_.gates,
                  shape.slabs * slab_chunks * problem_.per_chunk);
    const int own_groups = ceil_div(ceil_div(ceil_div(problem_.H, 16), multiply_warps), shape.group);
    const int groups = sources() * own_groups;
    t.own_tiles = own_groups * shape.group;
    t.row_tiles = groups * shape.group;
    const int units = t.octets * 8;
    const bool memory = t.exchange == Exchange::memory;
    const int pairs = ceil_div(std::min(t.columns, tile_columns), 2);
    t.source_split = 1;
    while (memory && 2 * t.source_split * units * pairs <= fewest_gate_threads && 2 * t.source_split <= t.active)
      t.source_split *= 2;
    const int64_t in_registers = int64_t(std::min(groups, shape.register_groups)) * shape.group;
    plan_.register_bytes = multiply_warps * in_registers * t.slabs * tile_bytes;
    plan_.weight_bytes = multiply_warps * (t.row_tiles - in_registers) * t.slabs * tile_bytes;
    // From every block that sends here, of a column tile.
    const int64_t received = int64_t(sources()) * t.active * pairs * units * 8;
    t.states = take(int64_t(t.column_tiles) * state_bytes);
    t.sums = take(memory ? 2LL * t.source_split * pairs * units * 8 : 0);
    t.targets = take(t.exchange == Exchange::counted ? 16LL * sources() * problem_.octets : 0);
    t.barriers = take(2LL * t.column_tiles * 8);
    t.credits = take(problem_.layers > 1 ? 2LL * t.column_tiles * 8 : 0);
    // A GRU's two products multiply different gradients. (W_hh^T comes in through here: a group of row tiles a warp.)
    t.operand = take(2LL * (problem_.kind == CellKind::gru ? sources() : 1) * t.slabs * slab_bytes);
    staging(t.operand, shape.group);
    t.received = take(memory ? 0 : 2 * t.column_tiles * received);
    t.weights = take(plan_.weight_bytes);
    if (memory) {
      plan_.counters = int64_t(problem_.directions) * t.teams * t.column_tiles;
      plan_.workspace_bytes = counter_bytes(plan_.counters) + plan_.counters * 2 * t.active * received;
    }
    return check();
  }

  const Problem& problem_;
  const DeviceInfo& device_;
  Plan plan_;
  int64_t shared_ = 0, most_ = 0;
};

class Planner {
 public:
  Planner(const Problem& problem, const DeviceInfo& device, bool backward, Multiply multiply, const Allowed& allowed)
      : problem_(problem), device_(device), backward_(backward), multiply_(multiply), allowed_(allowed) {}

  // The best plan of a variant; false and a reason where there is none.
  bool best(Variant variant, Plan& best, std::string& reason) {
    found_ = false;
    refusal_.clear();
    switch (variant) {
      case Variant::block:
        if (!allowed_.block) return refuse(reason, "not allowed by the request");
        try_teams(Exchange::none, 1, problem_.octets);
        break;
      case Variant::cluster:
        if (!allowed_.cluster || !(allowed_.counted || allowed_.barriers))
          return refuse(reason, "not allowed by the request");
        if (device_.max_cluster < 2) return refuse(reason, "this GPU has no clusters");
        for (int blocks = 2; blocks <= device_.max_cluster && blocks <= 16; blocks *= 2) {
          const int of_layer = blocks / problem_.layers;
          if (problem_.octets * problem_.layers > blocks / 2 && of_layer > 0)  // else half of the blocks would be idle
            try_teams(allowed_.counted ? Exchange::counted : Exchange::barriers, blocks,
                      ceil_div(problem_.octets, of_layer));
        }
        break;
      case Variant::grid:
        if (!allowed_.grid) return refuse(reason, "not allowed by the request");
        if (!device_.cooperative) return refuse(reason, "no cooperative launch on this device");
        // The largest teams last: what they lack is the reason that is told.
        for (int octets = most_units / 8; octets >= 1; --octets) {
          const int blocks = ceil_div(problem_.octets, octets);
          if (blocks > 1) try_teams(Exchange::memory, blocks, octets);
        }
        break;
      case Variant::none: break;
    }
    if (!found_) return refuse(reason, refusal_.empty() ? "no team of a fitting size" : refusal_);
    best = best_;
    best.variant = variant;
    return true;
  }

 private:
  static bool refuse(std::string& reason, const std::string& why) {
    reason = why;
    return false;
  }

  void try_teams(Exchange exchange, int blocks, int octets) {
    if (allowed_.team_blocks > 0 && blocks != allowed_.team_blocks) return;
    const int resident = resident_teams(device_, exchange, blocks) / problem_.directions;
    // With fewer resident teams than directions, a cluster or a block may wait for its turn; a grid may not.
    const int most_waves = exchange == Exchange::memory ? 1 : 64;
    if (resident < 1 && (exchange == Exchange::memory || resident_teams(device_, exchange, blocks) < 1)) {
      if (refusal_.empty()) refusal_ = text("teams of %.0f are not resident together", blocks);
      return;
    }
    for (int waves = 1; waves <= most_waves; ++waves) {
      const int64_t teams = std::max<int64_t>(1, int64_t(resident) * waves);
      int columns = ceil_div(problem_.B, teams);
      if (allowed_.most_columns > 0) columns = std::min(columns, allowed_.most_columns);
      bool laid_out = false;
      const int shapes =
          backward_ ? backward_shapes(multiply_, problem_.gates) : forward_shapes(multiply_, problem_.gates);
      for (int shape = 0; shape < shapes; ++shape) laid_out |= consider(exchange, blocks, octets, columns, shape);
      if (laid_out || columns == 1) return;
    }
  }

  bool consider(Exchange exchange, int blocks, int octets, int columns, int shape) {
    Plan plan;
    plan.multiply = multiply_;
    plan.backward = backward_;
    plan.shape = shape;
    plan.directions = problem_.directions;
    plan.layers = problem_.layers;
    Tiling& t = plan.tiling;
    t.exchange = exchange;
    t.blocks = blocks;
    t.octets = octets;
    t.columns = columns;
    t.teams = ceil_div(problem_.B, columns);
    plan.blocks = t.blocks * t.teams * plan.directions;
    plan.waves = ceil_div(int64_t(t.teams) * plan.directions, resident_teams(device_, exchange, blocks));
    Candidate candidate(problem_, device_, plan);
    const std::string misfit = candidate.lay_out();
    if (!misfit.empty()) {
      refusal_ = text("with teams of %.0f: ", blocks) + misfit;
      return false;
    }
    candidate.predict();
    if (!found_ || candidate.plan().predicted_us < best_.predicted_us) best_ = candidate.plan();
    found_ = true;
    return true;
  }

  const Problem& problem_;
  const DeviceInfo& device_;
  const bool backward_;
  const Multiply multiply_;
  const Allowed& allowed_;
  bool found_ = false;
  Plan best_;
  std::string refusal_;  // of the last team that did not fit
};

// Dense rate of the matrix units, or of plain float32 and float64, in multiply-adds a microsecond; half of it is
// reached by products of such sizes.
double product_rate(const Problem& problem, const DeviceInfo& device) {
  const double mhz = device.clock_khz > 0 ? device.clock_khz / 1e3 : 1700;
  const double per_cycle = problem.element == 2 ? 1024 : problem.element == 8 ? 64 : 128;
  return 0.5 * per_cycle * device.sms * mhz;
}

// A layer's product over all rows with its W_ih, which is as large as W_hh.
double projection_us(const Problem& problem, const DeviceInfo& device) {
  const double multiply_adds = double(problem.T * problem.B) * problem.gates * double(problem.H * problem.H);
  return step_launch_us + multiply_adds / product_rate(problem, device);
}

// All steps, each with a launch of its own; a projection is a product more.
double step_wise_us(const Problem& problem, const DeviceInfo& device) {
  const bool projects = problem.P != problem.H;
  const double count = double(problem.H * problem.P) * (problem.gates + (projects ? 1 : 0));
  const double weights = count * problem.element;
  const double rate =
      weights * problem.directions < 0.7 * double(device.l2_bytes) ? l2_bytes_per_us : memory_bytes_per_us;
  const double multiply = double(problem.B) * count / product_rate(problem, device);
  const double launches = projects ? 2 * step_launch_us : step_launch_us;
  return double(problem.T) * problem.directions * (launches + std::max(weights / rate, multiply));
}

// What a layer with a projection has beside a launch that runs it merged, and not where each step has its products:
// W_hh W_hr, and the projections of all rows; in the backward pass also what W_hh^T takes to the h after them.
double merging_us(const Problem& problem, const DeviceInfo& device, bool backward) {
  if (problem.P == problem.H) return 0;
  const double H = double(problem.H), P = double(problem.P), rows = double(problem.T * problem.B);
  const double multiply_adds = P * H * (problem.gates * H + rows * (backward ? 1 + problem.gates : 1));
  const double products = backward ? 3 : 2;
  return problem.directions * (products * step_launch_us + multiply_adds / product_rate(problem, device));
}

}  // namespace

const char* name(Variant variant) {
  switch (variant) {
    case Variant::block: return "block";
    case Variant::cluster: return "cluster";
    case Variant::grid: return "grid";
    case Variant::none: break;
  }
  return "none";
}

const char* name(Multiply multiply) {
  switch (multiply) {
    case Multiply::bfloat16: return "bfloat16";
    case Multiply::float16: return "float16";
    case Multiply::tf32: return "tf32";
    case Multiply::float32: break;
  }
  return "float32";
}

const char* name(Exchange exchange) {
  switch (exchange) {
    case Exchange::counted: return "counted";
    case Exchange::barriers: return "barriers";
    case Exchange::memory: return "memory";
    case Exchange::none: break;
  }
  return "none";
}

int64_t projection_steps(const LayerSizes& sizes, int gates, const Steps& steps) {
  const int64_t element = stored_bytes(sizes.dtype);
  const int64_t step_bytes = std::max<int64_t>(1, steps.B * gates * sizes.hidden_size * element);
  const int64_t most = std::max(fewest_projection_steps, projection_bytes / step_bytes);
  // Parts of one size: the last would be short otherwise.
  const int64_t parts = std::max<int64_t>(1, (steps.T + most - 1) / most);
  return (steps.T + parts - 1) / parts;
}

static Problem problem_of(const LayerSizes& sizes, const Steps& steps, int layers) {
  Problem problem;
  problem.kind = sizes.kind;
  problem.dtype = sizes.dtype;
  problem.gates = gates_of(sizes.kind);
  problem.H = sizes.hidden_size;
  problem.P = sizes.state_size;
  problem.T = steps.T;
  problem.B = steps.B;
  problem.directions = sizes.num_directions;
  problem.layers = layers;
  problem.element = stored_bytes(sizes.dtype);
  problem.per_chunk = chunk_bytes / problem.element;
  problem.octets = ceil_div(sizes.hidden_size, 8);
  return problem;
}

// Why no persistent kernel takes such a layer, whatever the GPU; empty: one may.
static std::string not_persistent(const LayerSizes& sizes, const Steps& steps) {
  if (sizes.kind >= CellKind::custom) return "no persistent kernel for a custom cell";
  if (sizes.dtype == DType::float64) return "no persistent kernel for float64";
  // The kernels count steps and rows in 32 bits.
  if (steps.T * steps.B >= int64_t(1) << 31 || steps.T < 1 || steps.B < 1 || sizes.hidden_size < 1)
    return "no persistent kernel for 2^31 rows or none";
  return "";
}

static Multiply multiply_of(DType dtype, bool tf32) {
  return dtype == DType::bfloat16  ? Multiply::bfloat16
         : dtype == DType::float16 ? Multiply::float16
         : tf32                    ? Multiply::tf32
                                   : Multiply::float32;
}

Plan make_plan(const LayerSizes& sizes, const Steps& steps, const DeviceInfo& device, bool backward, bool tf32,
               const Allowed& allowed) {
  Plan plan;
  plan.backward = backward;
  plan.directions = sizes.num_directions;
  const Problem problem = problem_of(sizes, steps, 1);
  plan.predicted_us = step_wise_us(problem, device);
  plan.predicted_step_us = plan.predicted_us / double(std::max<int64_t>(1, steps.T));
  const double step_wise = plan.predicted_us;

  plan.reason = not_persistent(sizes, steps);
  if (!plan.reason.empty()) return plan;
  const Multiply multiply = multiply_of(sizes.dtype, tf32);
  plan.multiply = multiply;
  Planner planner(problem, device, backward, multiply, allowed);
  const double merging = merging_us(problem, device, backward);
  bool found = false;
  std::string reasons;
  for (Variant variant : {Variant::block, Variant::cluster, Variant::grid}) {
    Plan candidate;
    std::string reason;
    const bool possible = planner.best(variant, candidate, reason);
    if (possible && (!found || candidate.predicted_us < plan.predicted_us)) {
      if (found) reasons += text("%.0f us with variant ", plan.predicted_us) + name(plan.variant) + "; ";
      plan = candidate;
      found = true;
      continue;
    }
    if (possible) reason = text("%.0f us", candidate.predicted_us);
    reasons += std::string(name(variant)) + ": " + reason + "; ";
  }
  plan.merged = found && problem.P != problem.H;
  if (plan.merged) reasons += text("products for the projection: %.0f us; ", merging);
  if (found && allowed.none && step_wise < plan.predicted_us + merging) {
    reasons += std::string(name(plan.variant)) + text(": %.0f us; ", plan.predicted_us);
    plan = Plan{};
    plan.backward = backward;
    plan.directions = sizes.num_directions;
    plan.multiply = multiply;
    plan.predicted_us = step_wise;
    plan.predicted_step_us = step_wise / double(steps.T);
  } else if (found) {
    reasons += text("a launch a step: %.0f us; ", step_wise);
  }
  if (reasons.size() >= 2) reasons.resize(reasons.size() - 2);
  plan.reason = reasons;
  return plan;
}

Plan make_wavefront_plan(const LayerSizes& sizes, int64_t layers, const Steps& steps, const DeviceInfo& device,
                         bool backward, bool tf32, const Allowed& allowed) {
  Plan none;
  const auto refuse = [&](const std::string& why) {
    none.reason = why;
    return none;
  };
  const std::string never = not_persistent(sizes, steps);
  if (!never.empty()) return refuse(never);
  if (sizes.state_size != sizes.hidden_size) return refuse("no kernel of several layers with a projection of h");
  if (sizes.num_directions > 1) return refuse("both directions of a layer end before the next can begin");
  if (allowed.layers == 1 || !allowed.counted) return refuse("not allowed by the request");
  const Multiply multiply = multiply_of(sizes.dtype, tf32);
  if (!has_wavefront(multiply, gates_of(sizes.kind)))
    return refuse(std::string("no kernel of several layers for this cell in ") + name(multiply));

  const double layer_us = make_plan(sizes, steps, device, backward, tf32, allowed).predicted_us +
                          projection_us(problem_of(sizes, steps, 1), device);
  double best_us = double(layers) * layer_us;
  Plan best;
  std::string reason;
  for (int together = 2; together <= std::min<int64_t>(layers, most_layers); ++together) {
    if (allowed.layers > 0 && together != allowed.layers) continue;
    const Problem problem = problem_of(sizes, steps, together);
    Planner planner(problem, device, backward, multiply, allowed);
    Plan plan;
    std::string why;
    if (!planner.best(Variant::cluster, plan, why)) {
      reason += text("%.0f layers at once: ", together) + why + "; ";
      continue;
    }
    // Groups of so many, and the layers that are left over.
    const double groups_us = double(layers / together) * (plan.predicted_us + projection_us(problem, device));
    const double all_us = groups_us + double(layers % together) * layer_us;
    reason += text("%.0f layers at once: %.0f us for all; ", together, all_us);
    if (all_us < best_us || (allowed.layers > 0 && best.layers == 1)) {
      best_us = all_us;
      best = plan;
    }
  }
  reason += text("one after the other: %.0f us", double(layers) * layer_us);
  if (best.layers == 1) return refuse(reason);
  best.reason = reason;
  return best;
}

}  // namespace cuda
}  // namespace fused_rnn
