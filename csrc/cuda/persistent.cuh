// What the persistent kernels of both passes share: who a block is, its columns, and the arguments of a launch.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "plan.h"
#include "tile.cuh"

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

// Whether row `row` of all rows keeps its state as it is.
FRNN_DEVICE bool is_masked(const Steps& steps, int64_t row) { return steps.mask && !steps.mask[row]; }

// A thread turns the sums of one unit and two neighbouring columns into gates: threads of a warp have neighbouring
// units, so their global accesses are contiguous.
struct Item {
  int unit, pair;  // of the block, of the column tile
  int global_unit;
  bool exists;  // the unit does

  FRNN_DEVICE Item(const Place& place, int64_t hidden_size)
      : unit(thread_index() % place.units),
        pair(thread_index() / place.units),
        global_unit(place.first_octet * 8 + unit),
        exists(pair < tile_columns / 2 && global_unit < hidden_size && unit / 8 < place.octets) {}
};

constexpr FRNN_HOST_DEVICE bool is_cluster(Exchange exchange) {
  return exchange == Exchange::counted || exchange == Exchange::barriers;
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
  if (!is_cluster(tiling.exchange)) sync_threads();
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

template <class S>
FRNN_DEVICE float value_or_zero(const void* p, int64_t index) {
  return p ? float(widen(typed<S>(p)[index])) : 0.0f;
}

}  // namespace cuda
}  // namespace fused_rnn
