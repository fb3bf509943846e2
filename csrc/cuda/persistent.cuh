// What the persistent kernels of both passes share: who a block is, its columns, and the arguments of a launch.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "plan.h"
#include "tile.cuh"
#include "zone.cuh"

namespace fused_rnn {
namespace cuda {

struct ForwardArguments {
  int64_t hidden_size;
  Steps steps;
  PersistentForward part[most_layers];
  Tiling tiling;
  char* workspace;
};

struct BackwardArguments {
  int64_t hidden_size;
  Steps steps;
  PersistentBackward part[most_layers];
  Tiling tiling;
  char* workspace;
};

// The kernel of a plan; of several layers only for the cells and products of has_wavefront, null for others. Each is
// instantiated in a source of its own, persistent_<pass>_<product>.cu or persistent_wavefront_<product>.cu.
using ForwardKernel = void (*)(ForwardArguments);
using BackwardKernel = void (*)(BackwardArguments);
template <Multiply multiply, bool wavefront = false>
ForwardKernel forward_kernel(CellKind kind, int shape);
template <Multiply multiply, bool wavefront = false>
BackwardKernel backward_kernel(CellKind kind, int shape);

// The product that a plan wants, as a type.
template <Multiply multiply>
struct ProductOf;
template <>
struct ProductOf<Multiply::bfloat16> {
  using type = HalfProduct<BFloat16>;
};
template <>
struct ProductOf<Multiply::float16> {
  using type = HalfProduct<Half>;
};
template <>
struct ProductOf<Multiply::tf32> {
  using type = Tf32Product;
};
template <>
struct ProductOf<Multiply::float32> {
  using type = FloatProduct;
};

// f(cell) with the cell of this kind.
template <class F>
auto with_cell(CellKind kind, const F& f) {
  switch (kind) {
    case CellKind::rnn_tanh: return f(RnnTanh{});
    case CellKind::rnn_relu: return f(RnnRelu{});
    case CellKind::gru: return f(Gru{});
    default: return f(Lstm{});
  }
}

// Who this block is. Blocks of a team are neighbours along x, in a wavefront those of its lowest layer first; y is the
// direction.
struct Place {
  int layer, rank;  // the rank among the blocks of the layer; not below Tiling::active: nothing to do
  int team, direction;
  int first_column;  // of the team
  int columns;       // that the team has; the last team may have fewer
  int column_tiles;  // none of them without columns
  int octets;        // of this block
  int first_octet, total_octets;
  int units;  // room for units per block, the same for all blocks

  FRNN_DEVICE Place(const Tiling& tiling, int64_t hidden_size, int64_t batch, bool wavefront)
      : layer(wavefront ? layer_of(tiling) : 0),
        rank(block_x() % tiling.blocks - layer * tiling.active),
        team(block_x() / tiling.blocks),
        direction(block_y()),
        first_column(team * tiling.columns),
        columns(batch - first_column < tiling.columns ? int(batch) - first_column : tiling.columns),
        column_tiles((columns + tile_columns - 1) / tile_columns),
        first_octet(rank * tiling.octets),
        total_octets(int((hidden_size + 7) / 8)),
        units(tiling.octets * 8) {
    const int rest = total_octets - first_octet;
    octets = rest < 0 ? 0 : rest < tiling.octets ? rest : tiling.octets;
  }

  FRNN_DEVICE int columns_of(int column_tile) const {
    const int rest = columns - column_tile * tile_columns;
    return rest < tile_columns ? rest : tile_columns;
  }
  // The team among those of both directions.
  FRNN_DEVICE int team_index(const Tiling& tiling) const { return direction * tiling.teams + team; }
  // The part of the launch's arguments that is this block's.
  FRNN_DEVICE int part() const { return layer + direction; }

 private:
  static FRNN_DEVICE int layer_of(const Tiling& tiling) {
    const int layer = block_x() % tiling.blocks / tiling.active;
    return layer < tiling.layers ? layer : tiling.layers - 1;
  }
};

// Where the rows of a step stand, and how many are live.
struct StepRows {
  int first = 0, live = 0;
};

FRNN_DEVICE StepRows step_rows(const Steps& steps, int t) {
  if (t < 0 || t >= steps.T) return {};
  return {int(steps.first_row(t)), int(steps.rows(t))};
}

// --- Who does what in a block.
//
// The first multiply_warps multiply. Where a kernel can give registers from some warps to others (two_roles), four more
// warps turn sums into gates, so that neither has to keep what the other needs: the multiplying warps have W_hh in
// their registers, and what a step takes from its last product to the states on their way has all it wants in those of
// the gates' warps. Elsewhere the same warps do both, one after the other.
//
// The two meet at barriers of the block that one side arrives at and the other waits for; `turn` counts column tiles
// over all steps, and everything that is handed over has two buffers.

#if defined(FRNN_CUDA_ON_HOST) && !defined(FRNN_ONE_ROLE)
constexpr bool two_roles = true;
#elif defined(FRNN_CUDA_SET_REGISTERS)
constexpr bool two_roles = true;
#else
constexpr bool two_roles = false;
#endif
constexpr int gate_threads = two_roles ? 128 : multiply_threads;
constexpr int kernel_threads = two_roles ? multiply_threads + gate_threads : multiply_threads;
// Registers of a thread of either role. What one side gives up is all that the other can get: a launch of
// kernel_threads has launch_registers each (as many as 65536 allow, in eights), and who asks for more than those waits
// for ever. As few for those that multiply as hold their part of W_hh.
constexpr int launch_registers = 65536 / (multiply_threads + 128) / 8 * 8;
template <class Product, bool backward, bool wavefront>
constexpr int multiply_registers = Product::per_chunk == 8 ? (wavefront  ? 208
                                                              : backward ? 192
                                                                         : 216)
                                   : Product::is_straight  ? (backward ? 192 : 208)
                                                           : 192;
template <class Product, bool backward, bool wavefront>
constexpr int gate_registers = 3 * launch_registers - 2 * multiply_registers<Product, backward, wavefront>;

// Barriers of the block, by number. (0 is sync_threads.)
enum Meeting : int {
  filled = 1,        // and 2: a buffer between the roles may be read
  emptied = 3,       // and 4: it may be written again
  states_ready = 5,  // all states that the block's own threads wrote are there
  multipliers = 6,   // the multiplying warps among themselves
  gate_warps = 7,    // the gates' among themselves
  everybody = 8      // all of the block
};

// What the threads of one role wrote before hand_over, those of the other see after take_over.
FRNN_DEVICE void hand_over(int meeting FRNN_AND_PLACE) {
  if (two_roles) named_barrier_arrive(meeting, kernel_threads FRNN_PASS_PLACE);
}
FRNN_DEVICE void take_over(int meeting FRNN_AND_PLACE) {
  if (two_roles)
    named_barrier(meeting, kernel_threads FRNN_PASS_PLACE);
  else
    sync_threads(FRNN_GIVE_PLACE);
}
// The same the other way round: a buffer of turn `turn` that is free again. With one role, who writes a buffer for the
// second time has met at the barrier of the turn between all who had read it before.
FRNN_DEVICE void free_buffer(int turn) {
  if (two_roles) named_barrier_arrive(emptied + (turn & 1), kernel_threads);
}
FRNN_DEVICE void wait_until_free(int turn FRNN_AND_PLACE) {
  if (two_roles && turn >= 2) named_barrier(emptied + (turn & 1), kernel_threads FRNN_PASS_PLACE);
}
// After the last of `turns`, by those who waited: no barrier is left with half of its arrivals.
FRNN_DEVICE void end_turns(int turns) {
  for (int turn = turns; two_roles && turn < turns + 2; ++turn)
    if (turn >= 2) named_barrier_arrive(emptied + (turn & 1), kernel_threads);
}

// Threads of one role among themselves.
FRNN_DEVICE void meet_multipliers(FRNN_PLACE) {
  if (two_roles)
    named_barrier(multipliers, multiply_threads FRNN_PASS_PLACE);
  else
    sync_threads(FRNN_GIVE_PLACE);
}
FRNN_DEVICE void meet_gate_warps(FRNN_PLACE) {
  if (two_roles)
    named_barrier(gate_warps, gate_threads FRNN_PASS_PLACE);
  else
    sync_threads(FRNN_GIVE_PLACE);
}

// What a thread does gates of: one unit of the block, in `count` columns of a column tile. Threads of a warp have
// neighbouring units, so that their global accesses are contiguous, and eight of them, from a multiple of eight, make a
// chunk of h.
//
// One column a thread where there are threads enough; else two that are neighbours, whose sums are read together, or
// two such pairs. With options (a count of 0) all that fall to it, one after the other in a loop: there are no
// registers for more beside the other variants.
struct GateThread {
  int index;  // among those that do gates
  int unit, group, groups;
  int global_unit;
  bool has_unit;  // the block has room for it, and the thread is one of a group
  bool exists;    // and the layer has it

  FRNN_DEVICE GateThread(const Place& place, int64_t hidden_size)
      // (Opaque: what several variants of a loop make of it would be made ahead of all of them, and be kept.)
      : index(int(opaque(uint32_t(two_roles ? thread_index() - multiply_threads : thread_index())))),
        unit(index % place.units),
        group(index / place.units),
        groups(gate_threads / place.units),
        global_unit(place.first_octet * 8 + unit),
        has_unit(group < groups && unit / 8 < place.octets),
        exists(has_unit && global_unit < hidden_size) {}

  // Of column tiles of so many columns: how many a thread takes, 1, 2 or 4.
  FRNN_DEVICE int columns_a_thread(int columns) const { return columns <= groups ? 1 : columns <= 2 * groups ? 2 : 4; }
  FRNN_DEVICE int columns_with_options(int columns) const { return (columns + groups - 1) / groups; }
  static constexpr int most_columns = two_roles ? 4 : 2;
  template <int count>
  FRNN_DEVICE int column(int i) const {
    return count == 0 ? group + i * groups : count == 1 ? group : 2 * (group + i / 2 * groups) + i % 2;
  }
};

// f(Count<n>{}) with n = columns_a_thread, or 0 with options, for which warps of both roles have no registers.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <bool wavefront, class F>
FRNN_DEVICE void with_count(int count, bool options, const F& f) {
  if constexpr (two_roles && !wavefront)
    if (options) return f(Count<0>{});
  if (count == 1) {
    f(Count<1>{});
  } else if (count == 2) {
    f(Count<2>{});
  } else if constexpr (two_roles) {  // 256 threads never have more than two
    f(Count<4>{});
  }
}

// f(Count<n>{}) with n = value, from `first` up to `last`; f(Count<-1>{}) for what is more. Chosen outside of the loop
// over steps, so that in it products stand one after the other without a branch.
template <int first, int last, class F>
FRNN_DEVICE void with_number(int value, const F& f) {
  if constexpr (first > last) {
    f(Count<-1>{});
  } else {
    if (value == first)
      f(Count<first>{});
    else
      with_number<first + 1, last>(value, f);
  }
}

// The rows of one step after the other, by a warp as a whole. Of a packed batch a lane holds those of a step in 32, and
// the next 32 are on their way to L2: nobody waits for memory in every step.
class RowsOfSteps {
 public:
  // s: 0, 1, 2, ... from call to call; time_of(s): its time. Nothing is live from step num_steps on.
  template <class TimeOf>
  FRNN_DEVICE StepRows at(int s, int num_steps, const Steps& steps, const TimeOf& time_of) {
    if (!steps.batch_sizes) return s < num_steps ? StepRows{time_of(s) * int(steps.B), int(steps.B)} : StepRows{};
    if (s % warp_size == 0) {
      const int mine = s + lane_index(), next = mine + warp_size;
      here_ = mine < num_steps ? step_rows(steps, time_of(mine)) : StepRows{};
      if (next < num_steps) {
        prefetch_l2(&steps.batch_sizes[time_of(next)]);
        prefetch_l2(&steps.offsets[time_of(next)]);
      }
    }
    return {shuffle(here_.first, s % warp_size), shuffle(here_.live, s % warp_size)};
  }

 private:
  StepRows here_;
};

// A row of a tensor. Rows and their strides have 31 bits (persistent.cu): one instruction each.
template <class S>
FRNN_DEVICE S* row_at(S* base, int row, int stride) {
  return base + int64_t(row) * stride;
}

constexpr FRNN_HOST_DEVICE bool is_cluster(Exchange exchange) {
  return exchange == Exchange::counted || exchange == Exchange::barriers;
}

// f(Flag<counted>{}): the loops over steps know whether the exchange is the fastest, and what the others need is not in
// its way.
template <bool flag>
struct Flag {
  static constexpr bool value = flag;
};
template <bool wavefront, class F>
FRNN_DEVICE void with_exchange(const Tiling& tiling, const F& f) {
#if defined(FRNN_CUDA_CLUSTERS)
  if (wavefront || tiling.exchange == Exchange::counted) return f(Flag<true>{});
#endif
  if constexpr (!wavefront) f(Flag<false>{});
}

// A barrier of the cluster, where the team is one.
FRNN_DEVICE void meet_cluster(const Tiling& tiling) {
#if defined(FRNN_CUDA_CLUSTERS)
  if (is_cluster(tiling.exchange)) {
    cluster_arrive();
    cluster_wait();
  }
#endif
}

// The same, and of the block where it is not: after it, shared memory is ready for whoever may write into it.
FRNN_DEVICE void meet_writers(const Tiling& tiling) {
  if (!is_cluster(tiling.exchange)) take_over(everybody);
  meet_cluster(tiling);
}

template <class S>
FRNN_DEVICE const S* typed(const void* p) {
  return static_cast<const S*>(p);
}
template <class S>
FRNN_DEVICE S* typed(void* p) {
  return static_cast<S*>(p);
}

// Unit u's bit among those of a row that begin at its byte.
FRNN_DEVICE bool bit_of(uint8_t byte, int unit) { return byte >> (unit % 8) & 1; }

template <class S>
FRNN_DEVICE float value_or_zero(const void* p, int64_t index) {
  return p ? float(widen(typed<S>(p)[index])) : 0.0f;
}

}  // namespace cuda
}  // namespace fused_rnn
