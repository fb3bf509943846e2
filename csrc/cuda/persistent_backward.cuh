// All steps of a layer in one launch, backward: the gradients of the gates, which the products for the weights' and the
// input's gradients follow.
//
// A step of a column tile, in each block of a team: wait for the gradient of h that comes through W_hh, turn it into
// the gradients of the block's gates, one thread for a unit and two columns, multiply the resident columns of W_hh (all
// units times the block's gates) by them, and send each unit's partial sum to the block that owns the unit, which adds
// up what it gets in the order of the blocks.
//
// Sending partial sums instead of gate gradients moves H numbers of 32 bits a column instead of G * H, and needs no
// sums over warps: a warp has all of the block's k.
//
// Row tiles of the resident matrix: tile n of warp w is tile 8 n + w, half tiles are octets of units. Chunk c along k
// is gate c / (units / per_chunk), and of it the units from c % (units / per_chunk) * per_chunk.
#pragma once

#include "persistent.cuh"

namespace fused_rnn {
namespace cuda {

// Partial sums on their way through the team. Those of exchange e (after step e - 1; e = 1 is the first) are in buffer
// e % 2 of their receiver; two are enough for the reasons given at StateExchange: a block sends for e + 1 when it has
// all of e, which every block sent after it had read e - 1.
class SumExchange {
 public:
  FRNN_DEVICE SumExchange(const Tiling& tiling, const Place& place, char* workspace, int exchanges)
      : tiling_(tiling),
        place_(place),
        exchanges_(exchanges),
        pairs_(((tiling.columns < tile_columns ? tiling.columns : tile_columns) + 1) / 2),
        buffer_bytes_(tiling.active * pairs_ * place.units * int(sizeof(Pair))),
        inverse_octets_((65535 + tiling.octets) / tiling.octets),
        received_(shared_memory() + tiling.received) {
#if defined(FRNN_CUDA_CLUSTERS)
    barriers_ = reinterpret_cast<Mbarrier*>(shared_memory() + tiling.barriers);
#endif
    if (tiling.exchange == Exchange::memory) {
      const int team = place.team_index(tiling);
      const int64_t teams = int64_t(grid_y()) * tiling.teams;
      counters_ = reinterpret_cast<uint32_t*>(workspace) + int64_t(team) * tiling.column_tiles;
      memory_ = workspace + counter_bytes(teams * tiling.column_tiles) +
                int64_t(team) * tiling.column_tiles * 2 * tiling.active * buffer_bytes_;
    }
  }

  // The caller meets all who write there before the first step.
  FRNN_DEVICE void begin() {
#if defined(FRNN_CUDA_CLUSTERS)
    if (tiling_.exchange == Exchange::counted && thread_index() == 0) {
      for (int i = 0; i < 2 * place_.column_tiles; ++i) mbarrier_init(&barriers_[i], 1);
      fence_mbarrier_init();
      for (int i = 0; i < 2 * place_.column_tiles; ++i) mbarrier_arrive_expect(&barriers_[i], bytes(i / 2));
    }
#endif
  }

  // (Here and below the fastest exchange comes before the switch, whose jump takes longer than a step's other
  // branches.)
  FRNN_DEVICE void wait(int e, int j) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (tiling_.exchange == Exchange::counted) {
      mbarrier_wait(&barriers_[2 * j + (e & 1)], ((e - 1) >> 1) & 1);
      if (thread_index() == 0 && e + 2 <= exchanges_) mbarrier_arrive_expect(&barriers_[2 * j + (e & 1)], bytes(j));
      return;
    }
#endif
    switch (tiling_.exchange) {
      case Exchange::none:
        if (j == 0) sync_threads();
        break;
#if defined(FRNN_CUDA_CLUSTERS)
      case Exchange::barriers:
        if (j == 0) cluster_wait();
        break;
#endif
      case Exchange::memory:
        if (thread_index() == 0) wait_until_at_least(&counters_[j], uint32_t(e) * uint32_t(tiling_.active));
        sync_threads();
        break;
      default: break;
    }
  }

  // What the team sent for a unit and two columns of this block, added up. Threads beyond those that own units and
  // columns share the work: all threads of the block come here.
  FRNN_DEVICE Pair sum(int e, int j) {
    const int owners = tile_columns / 2 * place_.units;
    const int split = thread_index() / owners, within = thread_index() % owners;
    const int pair = within / place_.units, unit = within % place_.units;
    Pair total = {};
    if (split < tiling_.source_split && 2 * pair < place_.columns_of(j) && unit / 8 < place_.octets) {
      const int first = tiling_.active * split / tiling_.source_split;
      const int end = tiling_.active * (split + 1) / tiling_.source_split;
      const bool memory = tiling_.exchange == Exchange::memory;
      const char* const buffer = memory ? global(j, e & 1, place_.rank) : shared(j, e & 1);
      for (int source = first; source < end; ++source) {
        const Pair* const p = reinterpret_cast<const Pair*>(buffer + offset(source, pair, unit));
        const Pair part = memory ? load_l2(p) : *p;
        total.v[0] += part.v[0];
        total.v[1] += part.v[1];
      }
    }
    if (tiling_.source_split > 1) {
      // Two buffers: who is a sum ahead has met those that still read here at the barrier below.
      Pair* const parts = reinterpret_cast<Pair*>(shared_memory() + tiling_.sums) + parity_ * block_threads;
      parity_ ^= 1;
      parts[thread_index()] = total;
      sync_threads();
      for (int i = 1; i < tiling_.source_split && split == 0; ++i) {
        total.v[0] += parts[i * owners + within].v[0];
        total.v[1] += parts[i * owners + within].v[1];
      }
    }
    return total;
  }

  // This lane's two columns of row g of an octet, for exchange e.
  FRNN_DEVICE void send(int e, int j, int octet, int g, int pair, const Pair& value) {
    if (octet >= place_.total_octets || 2 * pair >= place_.columns_of(j)) return;
    const int owner = (octet * inverse_octets_) >> 16;  // octet / octets, exact for the sizes that fit a GPU
    const int at = offset(place_.rank, pair, (octet - owner * tiling_.octets) * 8 + g);
#if defined(FRNN_CUDA_CLUSTERS)
    if (tiling_.exchange == Exchange::counted) {
      store_async(remote_address(shared(j, e & 1) + at, owner), value,
                  remote_address(&barriers_[2 * j + (e & 1)], owner));
      return;
    }
#endif
    switch (tiling_.exchange) {
      case Exchange::none: *reinterpret_cast<Pair*>(shared(j, e & 1) + at) = value; break;
#if defined(FRNN_CUDA_CLUSTERS)
      case Exchange::barriers: store_remote(remote_address(shared(j, e & 1) + at, owner), value); break;
#endif
      case Exchange::memory: store_l2(reinterpret_cast<Pair*>(global(j, e & 1, owner) + at), value); break;
      default: break;
    }
  }

  // After the block's sends of a column tile.
  FRNN_DEVICE void sent(int j) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (tiling_.exchange == Exchange::barriers && j == place_.column_tiles - 1) cluster_arrive();
#endif
    if (tiling_.exchange == Exchange::memory) {
      sync_threads();
      if (thread_index() == 0) add_release(&counters_[j], 1);
    }
  }

 private:
  FRNN_DEVICE int offset(int source, int pair, int unit) const {
    return ((source * pairs_ + pair) * place_.units + unit) * int(sizeof(Pair));
  }
  FRNN_DEVICE char* shared(int j, int parity) const { return received_ + (2 * j + parity) * buffer_bytes_; }
  FRNN_DEVICE char* global(int j, int parity, int owner) const {
    return memory_ + (int64_t(2 * j + parity) * tiling_.active + owner) * buffer_bytes_;
  }
  FRNN_DEVICE int bytes(int j) const {
    return tiling_.active * ((place_.columns_of(j) + 1) / 2) * place_.octets * 8 * int(sizeof(Pair));
  }

  const Tiling& tiling_;
  const Place& place_;
  const int exchanges_, pairs_, buffer_bytes_, inverse_octets_;
  char* const received_;
#if defined(FRNN_CUDA_CLUSTERS)
  Mbarrier* barriers_;
#endif
  char* memory_ = nullptr;
  uint32_t* counters_ = nullptr;
  int parity_ = 0;  // of the sums
};

template <class Product, class Cell, int group, int register_groups, int most_slabs>
__global__ void __launch_bounds__(block_threads, 1)
    persistent_backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  using S = typename Product::Storage;
  using Real = typename Product::Real;
  constexpr int gates = Cell::gates, saved = Cell::saved, grad_gates = Cell::grad_gates;
  // Which h the cell's formula reads: its own, where nothing else is saved; that of the step before, in a cell that
  // keeps it in part; none beside a cell state.
  constexpr bool reads_h = saved == 0, reads_previous_h = saved > 0 && !Cell::has_cell;
  constexpr int per_chunk = Product::per_chunk;
  constexpr GateGrads hidden_grads = Cell::hidden_grads;
  const Tiling& tiling = arguments.tiling;
  const Steps& steps = arguments.steps;
  const int64_t H = arguments.hidden_size;
  const Place place(tiling, H, steps.B);
  const Item item(place, H);
  const PersistentBackward& layer = arguments.direction[place.direction];
  const bool reverse = place.direction == 1;
  const int num_steps = live_steps(steps, place.first_column);
  // Backward in this direction's time; the step before it in that time.
  const auto time_of = [&](int s) { return reverse ? s : num_steps - 1 - s; };
  const auto previous_time_of = [&](int s) { return reverse ? s + 1 : num_steps - 2 - s; };

  // The resident columns.
  const int g = lane_index() / 4;
  const int gate_chunks = place.units / per_chunk;
  const int slabs = tiling.slabs;
  char* const stored = shared_memory() + tiling.weights +
                       warp_index() * (tiling.row_tiles - register_groups * group) * slabs * tile_bytes;
  // Chunks run along the columns of W_hh, memory along its rows: a lane loads one of the rows that it and its
  // neighbours want, and hands the others what is theirs.
  const auto weight = [&](int octet, int chunk) {
    const int gate = chunk / gate_chunks, first = chunk % gate_chunks * per_chunk + g % per_chunk;
    const int from = place.first_octet * 8 + first, unit = octet * 8 + g / per_chunk * per_chunk;
    int gate_row = 0;
    FRNN_UNROLL
    for (int i = 0; i < gates; ++i)
      if (i == gate) gate_row = hidden_grads.gate[i];
    Chunk row = {};
    if (gate < gates && first / 8 < place.octets && from < H)
      row = load_row_chunk<Product>(typed<S>(layer.w_hh) + (int64_t(gate_row) * H + from) * H, unit, H);
    return transpose_chunk<S>(row);
  };
  const auto tile_of = [&](int n) { return n * block_warps + warp_index(); };
  uint32_t resident[register_groups][most_slabs][group][8];
  FRNN_UNROLL
  for (int r = 0; r < register_groups; ++r) {
    FRNN_UNROLL
    for (int k = 0; k < most_slabs; ++k) {
      FRNN_UNROLL
      for (int m = 0; m < group; ++m) {
        FRNN_UNROLL
        for (int w = 0; w < 8; ++w) resident[r][k][m][w] = 0;
        if (k < slabs && r * group + m < tiling.row_tiles)
          load_tile(resident[r][k][m], weight, tile_of(r * group + m), k);
      }
    }
  }
  for (int n = register_groups * group; n < tiling.row_tiles; ++n) {
    for (int k = 0; k < slabs; ++k) {
      uint32_t a[8];
      load_tile(a, weight, tile_of(n), k);
      store_tile(stored + ((n - register_groups * group) * slabs + k) * tile_bytes, a);
    }
  }

  // What of the gradients of h and c stays in the block, per column tile.
  Pair* const states = reinterpret_cast<Pair*>(shared_memory() + tiling.states);
  const auto dh_state = [&](int j) { return &states[(2 * j) * block_threads + thread_index()]; };
  const auto dc_state = [&](int j) { return &states[(2 * j + 1) * block_threads + thread_index()]; };
  const auto row_of = [&](int j, int column) { return place.first_column + j * tile_columns + 2 * item.pair + column; };
  const auto owns = [&](int j, int column) { return item.exists && 2 * item.pair + column < place.columns_of(j); };
  for (int j = 0; j < place.column_tiles; ++j) {
    Pair dh = {}, dc = {};
    FRNN_UNROLL
    for (int column = 0; column < 2; ++column) {
      if (!owns(j, column)) continue;
      const int64_t index = row_of(j, column) * H + item.global_unit;
      dh.v[column] = value_or_zero<S>(layer.grad_h_n, index);
      if (Cell::has_cell) dc.v[column] = value_or_zero<S>(layer.grad_c_n, index);
    }
    *dh_state(j) = dh;
    *dc_state(j) = dc;
  }
  char* const operands = shared_memory() + tiling.operand;
  for (int i = thread_index(); i < 2 * slabs * slab_bytes / chunk_bytes; i += block_size())
    reinterpret_cast<Chunk*>(operands)[i] = {};

  const int exchanges = layer.grad_h0 ? num_steps : num_steps - 1;
  SumExchange exchange(tiling, place, arguments.workspace, exchanges);
  exchange.begin();
  meet_writers(tiling);
  if (place.rank >= tiling.active) {  // nothing to do, but the cluster's barriers count this block
    for (int e = 0; e < exchanges && tiling.exchange == Exchange::barriers; ++e) meet_cluster(tiling);
    meet_cluster(tiling);
    return;
  }

  // What was saved is fetched one column tile ahead, as soon as the registers of the one before are free.
  S values[saved > 0 ? saved : 1][2] = {}, hidden[2] = {}, grad_y[2] = {};
  float cells[2] = {}, previous_cells[2] = {};
  bool keeps[2] = {};  // the step kept their states as they were
  const auto fetch = [&](const StepRows& rows, const StepRows& previous, int j) {
    FRNN_UNROLL
    for (int column = 0; column < 2; ++column) {
      const int b = row_of(j, column);
      if (!owns(j, column) || b >= rows.live) continue;
      const int64_t row = rows.first + b, previous_row = previous.first + b, unit = item.global_unit;
      const bool begins = b >= previous.live;
      keeps[column] = is_masked(steps, row);
      FRNN_UNROLL
      for (int i = 0; i < saved; ++i)
        values[i][column] = load_streaming(typed<S>(layer.gates) + (row * saved + i) * H + unit);
      if (Cell::has_cell) {
        cells[column] = load_streaming(typed<float>(layer.cells) + row * H + unit);
        previous_cells[column] =
            begins ? value_or_zero<S>(layer.c0, b * H + unit) : typed<float>(layer.cells)[previous_row * H + unit];
      }
      if (reads_h) hidden[column] = typed<S>(layer.y)[row * layer.y_stride + unit];
      if (reads_previous_h) {
        hidden[column] = S{};
        if (!begins) hidden[column] = typed<S>(layer.y)[previous_row * layer.y_stride + unit];
        if (begins && layer.h0) hidden[column] = typed<S>(layer.h0)[b * H + unit];
      }
      if (layer.grad_y) grad_y[column] = load_streaming(typed<S>(layer.grad_y) + row * layer.grad_y_stride + unit);
    }
  };
  StepRows rows = step_rows(steps, time_of(0));
  fetch(rows, step_rows(steps, previous_time_of(0)), 0);

  int buffer = 0;
  for (int s = 0; s < num_steps; ++s) {
    for (int j = 0; j < place.column_tiles; ++j) {
      const int columns = place.columns_of(j);
      Pair received = {};
      if (s > 0) {
        exchange.wait(s, j);
        received = exchange.sum(s, j);
      }
      char* const operand = operands + buffer * slabs * slab_bytes;
      if (item.exists && 2 * item.pair < columns) {
        Pair dh = *dh_state(j), dc = *dc_state(j);
        Real grads[2][grad_gates], dh_previous[2], dc_previous[2];
        FRNN_UNROLL
        for (int column = 0; column < 2; ++column) {
          dh.v[column] += received.v[column];
          Real activated[saved > 0 ? saved : 1];
          FRNN_UNROLL
          for (int i = 0; i < saved; ++i) activated[i] = widen(values[i][column]);
          const Real h = widen(hidden[column]);
          Cell::template backward<Real>(activated, h, h, cells[column], previous_cells[column],
                                        dh.v[column] + widen(grad_y[column]), dc.v[column], grads[column],
                                        dh_previous[column], dc_previous[column]);
          if (keeps[column]) {
            FRNN_UNROLL
            for (int i = 0; i < grad_gates; ++i) grads[column][i] = 0.0f;
            dh_previous[column] = dh.v[column] + widen(grad_y[column]);
            dc_previous[column] = dc.v[column];
          }
        }
        FRNN_UNROLL
        for (int column = 0; column < 2; ++column) {
          const bool live = owns(j, column) && row_of(j, column) < rows.live;
          if (live) {
            dh.v[column] = float(dh_previous[column]);
            if (Cell::has_cell) dc.v[column] = float(dc_previous[column]);
            S* const to = typed<S>(layer.grad_gates) + int64_t(rows.first + row_of(j, column)) * grad_gates * H +
                          item.global_unit;
            FRNN_UNROLL
            for (int i = 0; i < grad_gates; ++i) to[i * H] = narrow<S>(float(grads[column][i]));
          }
          FRNN_UNROLL
          for (int gate = 0; gate < gates; ++gate) {
            const float grad = live ? float(grads[column][hidden_grads.first + gate]) : 0.0f;
            char* const chunk =
                operand + chunk_offset(gate * gate_chunks + item.unit / per_chunk, 2 * item.pair + column);
            if constexpr (per_chunk == 8) {
              reinterpret_cast<S*>(chunk)[item.unit % per_chunk] = narrow<S>(grad);
            } else {
              reinterpret_cast<uint32_t*>(chunk)[item.unit % per_chunk] = Product::word(grad);
            }
          }
        }
        *dh_state(j) = dh;
        if (Cell::has_cell) *dc_state(j) = dc;
      }
      // The next column tile in turn.
      {
        const bool last = j + 1 == place.column_tiles;
        if (last) rows = s + 1 < num_steps ? step_rows(steps, time_of(s + 1)) : StepRows{};
        fetch(rows, step_rows(steps, previous_time_of(last ? s + 1 : s)), last ? 0 : j + 1);
      }
      if (s < exchanges) {
        sync_threads();
        typename Product::Operand b[most_slabs];
        FRNN_UNROLL
        for (int k = 0; k < most_slabs; ++k)
          b[k] = Product::operand(operand + (k < slabs ? k : 0) * slab_bytes, columns);
        const auto send = [&](const typename Product::Sums(&sums)[group], int n) {
          FRNN_UNROLL
          for (int m = 0; m < group; ++m) {
            const TileSums tile = sums[m].result();
            FRNN_UNROLL
            for (int half = 0; half < 2; ++half)
              exchange.send(s + 1, j, 2 * tile_of(n + m) + half, g, lane_index() % 4, tile.row[half]);
          }
        };
        FRNN_UNROLL
        for (int r = 0; r < register_groups; ++r) {
          if (r * group >= tiling.row_tiles) break;
          typename Product::Sums sums[group];
          FRNN_UNROLL
          for (int k = 0; k < most_slabs; ++k) {
            if (k >= slabs) break;
            FRNN_UNROLL
            for (int m = 0; m < group; ++m) sums[m].add(resident[r][k][m], b[k], columns);
          }
          send(sums, r * group);
        }
        for (int n = register_groups * group; n < tiling.row_tiles; n += group) {
          typename Product::Sums sums[group];
          FRNN_UNROLL
          for (int k = 0; k < most_slabs; ++k) {
            if (k >= slabs) break;
            FRNN_UNROLL
            for (int m = 0; m < group; ++m) {
              uint32_t a[8];
              fetch_tile(a, stored + ((n + m - register_groups * group) * slabs + k) * tile_bytes);
              sums[m].add(a, b[k], columns);
            }
          }
          send(sums, n);
        }
        exchange.sent(j);
      }
      buffer ^= 1;
    }
  }

  for (int j = 0; j < place.column_tiles; ++j) {
    Pair received = {};
    if (layer.grad_h0) {
      exchange.wait(num_steps, j);
      received = exchange.sum(num_steps, j);
    }
    FRNN_UNROLL
    for (int column = 0; column < 2; ++column) {
      if (!owns(j, column)) continue;
      const int64_t index = row_of(j, column) * H + item.global_unit;
      if (layer.grad_h0) typed<S>(layer.grad_h0)[index] = narrow<S>(dh_state(j)->v[column] + received.v[column]);
      if (Cell::has_cell && layer.grad_c0) typed<S>(layer.grad_c0)[index] = narrow<S>(dc_state(j)->v[column]);
    }
  }
  // No block leaves while others may write into its shared memory.
  meet_cluster(tiling);
}

template <Multiply multiply>
BackwardKernel backward_kernel(CellKind kind, int shape) {
  using Product = typename ProductOf<multiply>::type;
  return with_cell(kind, [&](auto cell) -> BackwardKernel {
    using Cell = decltype(cell);
    constexpr BackwardShape first = backward_shape(multiply, 0);
    if constexpr (backward_shapes(multiply, Cell::gates) > 1) {
      constexpr BackwardShape second = backward_shape(multiply, 1), third = backward_shape(multiply, 2);
      if (shape == 1)
        return persistent_backward_kernel<Product, Cell, second.group, second.register_groups, second.slabs>;
      if (shape == 2) return persistent_backward_kernel<Product, Cell, third.group, third.register_groups, third.slabs>;
    }
    return persistent_backward_kernel<Product, Cell, first.group, first.register_groups, first.slabs>;
  });
}

}  // namespace cuda
}  // namespace fused_rnn
