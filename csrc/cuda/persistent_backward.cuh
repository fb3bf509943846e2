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
//
// In a wavefront (the parameter of that name; exchange counted) a block above another layer's has row tiles of W_ih^T
// after those of W_hh^T, and sends what they give to the blocks below, whose gradients of h have it added at the same
// step.
#pragma once

#include "persistent.cuh"

namespace fused_rnn {
namespace cuda {

// Partial sums on their way through the team. Those of exchange e (after step e - 1; e = 1 is the first) are in buffer
// e % 2 of their receiver; two are enough for the reasons given at StateExchange: a block sends for e + 1 when it has
// all of e, which every block sent after it had read e - 1.
//
// In a wavefront the sums of step e of the layer above stand beside them, after all of the block's own layer. The layer
// above waits for nothing that this one computes: a credit, an arrival at an mbarrier of each block above, says that
// exchange e has been read, and lets the sums of step e + 2 be sent.
template <bool wavefront>
class SumExchange {
 public:
  FRNN_DEVICE SumExchange(const Tiling& tiling, const Place& place, char* workspace, int steps, int exchanges)
      : tiling_(tiling),
        place_(place),
        steps_(steps),
        exchanges_(exchanges),
        pairs_(((tiling.columns < tile_columns ? tiling.columns : tile_columns) + 1) / 2),
        buffer_bytes_((wavefront ? 2 : 1) * tiling.active * pairs_ * place.units * int(sizeof(Pair))),
        inverse_octets_((65535 + tiling.octets) / tiling.octets),
        received_(shared_memory() + tiling.received) {
#if defined(FRNN_CUDA_CLUSTERS)
    barriers_ = reinterpret_cast<Mbarrier*>(shared_memory() + tiling.barriers);
    credits_ = reinterpret_cast<Mbarrier*>(shared_memory() + tiling.credits);
#endif
    if (!wavefront && tiling.exchange == Exchange::memory) {
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
    if (counts() && thread_index() == 0) {
      for (int i = 0; i < 2 * place_.column_tiles; ++i) {
        mbarrier_init(&barriers_[i], 1);
        if (wavefront) mbarrier_init(&credits_[i], tiling_.active);
      }
      fence_mbarrier_init();
      // Exchange 0 is from the layer above alone, and without one there is none.
      for (int i = 0; i < 2 * place_.column_tiles; ++i)
        mbarrier_arrive_expect(&barriers_[i], bytes(i % 2 == 1 ? 1 : has_above() ? 0 : 2, i / 2));
    }
#endif
  }

  // Whether there is anything to wait for before step e.
  FRNN_DEVICE bool exists(int e) const { return e > 0 || has_above(); }

  // (Here and below the fastest exchange comes before the switch, whose jump takes longer than a step's other
  // branches.)
  FRNN_DEVICE void wait(int e, int j) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (counts()) {
      mbarrier_wait(&barriers_[2 * j + (e & 1)], ((has_above() ? e : e - 1) >> 1) & 1);
      if (thread_index() == 0 && e + 2 <= exchanges_)
        mbarrier_arrive_expect(&barriers_[2 * j + (e & 1)], bytes(e + 2, j));
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

  // What this block's layer and the layer above sent for a unit and two columns, added up. Threads beyond those that
  // own units and columns share the work: all threads of the block come here. `turn` is 0 and 1 in turns.
  FRNN_DEVICE void sum(int e, int j, int turn, Pair& own, Pair& above) {
    // Division by the units, as by the octets.
    const int row = (thread_index() / 8 * inverse_octets_) >> 16, unit = thread_index() - row * place_.units;
    const int split = row / (tile_columns / 2), pair = row % (tile_columns / 2);
    const int owners = tile_columns / 2 * place_.units;
    // In halves where both layers send: either the one's or the other's blocks.
    const int sources = sources_of(e), begin = takes_own(e) ? 0 : tiling_.active;
    Pair total = {};
    own = above = {};
    if (split < tiling_.source_split && 2 * pair < place_.columns_of(j) && unit / 8 < place_.octets) {
      const int first = begin + sources * split / tiling_.source_split;
      const int end = begin + sources * (split + 1) / tiling_.source_split;
      const int stride = offset(1, 0, 0);
      // Two loops: of a pointer to either, loads are not those of shared memory.
      if (!wavefront && tiling_.exchange == Exchange::memory) {
        // Eight on their way at a time: each takes as long as all of them.
        constexpr int batch = 8;
        const char* part = global(j, e & 1, place_.rank) + offset(first, pair, unit);
        for (int source = first; source < end; source += batch, part += batch * stride) {
          Pair parts[batch] = {};
          FRNN_UNROLL
          for (int i = 0; i < batch; ++i)
            if (source + i < end) parts[i] = load_l2(reinterpret_cast<const Pair*>(part + i * stride));
          FRNN_UNROLL
          for (int i = 0; i < batch; ++i) {
            total.v[0] += parts[i].v[0];
            total.v[1] += parts[i].v[1];
          }
        }
      } else {
        const char* part = shared(j, e & 1) + offset(first, pair, unit);
        for (int source = first; source < end; ++source, part += stride) {
          if (wavefront && source == tiling_.active) {
            own = total;
            total = {};
          }
          total.v[0] += reinterpret_cast<const Pair*>(part)->v[0];
          total.v[1] += reinterpret_cast<const Pair*>(part)->v[1];
        }
      }
    }
    const auto is_above = [&](int split) {  // the last of its sources
      return wavefront && begin + sources * (split + 1) / tiling_.source_split > tiling_.active;
    };
    const auto add = [&](const Pair& part, bool to_above) {
      FRNN_UNROLL
      for (int column = 0; column < 2; ++column) {
        own.v[column] += to_above ? 0.0f : part.v[column];
        if (wavefront) above.v[column] += to_above ? part.v[column] : 0.0f;
      }
    };
    add(total, is_above(split));
    if (tiling_.source_split > 1) {
      // Two buffers: who is a sum ahead has met those that still read here at the barrier below.
      Pair* const parts = reinterpret_cast<Pair*>(shared_memory() + tiling_.sums) + turn * block_threads;
      parts[thread_index()] = total;
      sync_threads();
      for (int i = 1; i < tiling_.source_split && split == 0; ++i) add(parts[i * owners + thread_index()], is_above(i));
    }
  }

  // All warps have read exchange e.
  FRNN_DEVICE void give_credit(int e, int j) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (!wavefront || !has_above() || e + 2 >= steps_ || thread_index() >= tiling_.active) return;
    mbarrier_arrive_remote(
        remote_address(&credits_[2 * j + (e & 1)], (place_.layer + 1) * tiling_.active + thread_index()));
#endif
  }

  // Until the layer below can take the sums of step e. Not for warps that have none: without those the layer below goes
  // on, and its next credit but one has this one's parity.
  FRNN_DEVICE void wait_for_credit(int e, int j) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (wavefront && e >= 2 && 2 * warp_index() < place_.total_octets)
      mbarrier_wait(&credits_[2 * j + (e & 1)], ((e - 2) >> 1) & 1);
#endif
  }

  // This lane's two columns of row g of an octet, for exchange e of its own layer, or of the one below.
  FRNN_DEVICE void send(int e, int j, int octet, int g, int pair, const Pair& value, bool to_below) {
    if (octet >= place_.total_octets || 2 * pair >= place_.columns_of(j)) return;
    const int owner = (octet * inverse_octets_) >> 16;  // octet / octets, exact for the sizes that fit a GPU
    const int source = wavefront && to_below ? tiling_.active + place_.rank : place_.rank;
    const int at = offset(source, pair, (octet - owner * tiling_.octets) * 8 + g);
#if defined(FRNN_CUDA_CLUSTERS)
    if (counts()) {
      const int block = wavefront ? (place_.layer - int(to_below)) * tiling_.active + owner : owner;
      store_async(remote_address(shared(j, e & 1) + at, block), value,
                  remote_address(&barriers_[2 * j + (e & 1)], block));
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
    if (counts()) return;
#if defined(FRNN_CUDA_CLUSTERS)
    if (tiling_.exchange == Exchange::barriers && j == place_.column_tiles - 1) cluster_arrive();
#endif
    if (tiling_.exchange == Exchange::memory) {
      sync_threads();
      if (thread_index() == 0) add_release(&counters_[j], 1);
    }
  }

 private:
  FRNN_DEVICE bool counts() const { return wavefront || tiling_.exchange == Exchange::counted; }
  FRNN_DEVICE bool has_above() const { return wavefront && place_.layer + 1 < tiling_.layers; }
  // Of exchange e: whether this layer's own sums are part of it, and from how many blocks sums come.
  FRNN_DEVICE bool takes_own(int e) const { return !wavefront || e > 0; }
  FRNN_DEVICE int sources_of(int e) const {
    const int own = takes_own(e) ? tiling_.active : 0;
    return has_above() && e < steps_ ? own + tiling_.active : own;
  }
  FRNN_DEVICE int offset(int source, int pair, int unit) const {
    return ((source * pairs_ + pair) * place_.units + unit) * int(sizeof(Pair));
  }
  FRNN_DEVICE char* shared(int j, int parity) const { return received_ + (2 * j + parity) * buffer_bytes_; }
  FRNN_DEVICE char* global(int j, int parity, int owner) const {
    return memory_ + (int64_t(2 * j + parity) * tiling_.active + owner) * buffer_bytes_;
  }
  FRNN_DEVICE int bytes(int e, int j) const {
    return sources_of(e) * ((place_.columns_of(j) + 1) / 2) * place_.octets * 8 * int(sizeof(Pair));
  }

  const Tiling& tiling_;
  const Place& place_;
  const int steps_, exchanges_, pairs_, buffer_bytes_, inverse_octets_;
  char* const received_;
#if defined(FRNN_CUDA_CLUSTERS)
  Mbarrier *barriers_, *credits_;
#endif
  char* memory_ = nullptr;
  uint32_t* counters_ = nullptr;
};

template <class Product, class Cell, int group, int register_groups, int most_slabs, bool wavefront>
__global__ void __launch_bounds__(block_threads, 1)
    persistent_backward_kernel(const __grid_constant__ BackwardArguments arguments) {
#if !defined(FRNN_CUDA_CLUSTERS)
  if constexpr (wavefront) return;
#endif
  using S = typename Product::Storage;
  using Real = typename Product::Real;
  constexpr int gates = Cell::gates, saved = Cell::saved, grad_gates = Cell::grad_gates;
  // Which h the cell's formula reads: its own, where nothing else is saved; that of the step before, in a cell that
  // keeps it in part; none beside a cell state.
  constexpr bool reads_h = saved == 0, reads_previous_h = saved > 0 && !Cell::has_cell;
  constexpr int per_chunk = Product::per_chunk;
  constexpr GateGrads hidden_grads = Cell::hidden_grads, input_grads = Cell::input_grads;
  // Gate gradients that W_hh^T and W_ih^T multiply: where they differ, the second have an operand of their own.
  constexpr int operands_of_step = wavefront && grad_gates > gates ? 2 : 1;
  const Tiling& tiling = arguments.tiling;
  const Steps& steps = arguments.steps;
  const int64_t H = arguments.hidden_size;
  const Place place(tiling, H, steps.B, wavefront);
  const Item item(place, H);
  const PersistentBackward& layer = arguments.part[place.part()];
  const bool reverse = place.direction == 1;
  const int num_steps = live_steps(steps, place.first_column);
  // Backward in this direction's time; the step before it in that time.
  const auto time_of = [&](int s) { return reverse ? s : num_steps - 1 - s; };
  const auto previous_time_of = [&](int s) { return reverse ? s + 1 : num_steps - 2 - s; };

  // The resident columns.
  const int g = lane_index() / 4;
  const int gate_chunks = place.units / per_chunk;
  const int slabs = tiling.slabs;
  const int row_tiles = wavefront && place.layer == 0 ? tiling.own_tiles : tiling.row_tiles;
  char* const stored = shared_memory() + tiling.weights +
                       warp_index() * (tiling.row_tiles - register_groups * group) * slabs * tile_bytes;
  // Chunks run along the columns of W_hh, memory along its rows: a lane loads one of the rows that it and its
  // neighbours want, and hands the others what is theirs.
  const auto load_weights = [&](uint32_t (&a)[8], int n, int k) {
    const bool below = wavefront && n >= tiling.own_tiles;
    const S* const w = typed<S>(below ? layer.w_ih : layer.w_hh);
    const auto weight = [&](int octet, int chunk) {
      const int gate = chunk / gate_chunks, first = chunk % gate_chunks * per_chunk + g % per_chunk;
      const int from = place.first_octet * 8 + first, unit = octet * 8 + g / per_chunk * per_chunk;
      int gate_row = 0;
      FRNN_UNROLL
      for (int i = 0; i < gates; ++i)
        if (i == gate) gate_row = below ? input_grads.gate[i] : hidden_grads.gate[i];
      Chunk row = {};
      if (gate < gates && first / 8 < place.octets && from < H)
        row = load_row_chunk<Product>(w + (int64_t(gate_row) * H + from) * H, unit, H);
      return transpose_chunk<S>(row);
    };
    load_tile(a, weight, (below ? n - tiling.own_tiles : n) * block_warps + warp_index(), k);
  };
  uint32_t resident[register_groups][most_slabs][group][8];
  FRNN_UNROLL
  for (int r = 0; r < register_groups; ++r) {
    FRNN_UNROLL
    for (int k = 0; k < most_slabs; ++k) {
      FRNN_UNROLL
      for (int m = 0; m < group; ++m) {
        FRNN_UNROLL
        for (int w = 0; w < 8; ++w) resident[r][k][m][w] = 0;
        if (k < slabs && r * group + m < row_tiles) load_weights(resident[r][k][m], r * group + m, k);
      }
    }
  }
  for (int n = register_groups * group; n < row_tiles; ++n) {
    for (int k = 0; k < slabs; ++k) {
      uint32_t a[8];
      load_weights(a, n, k);
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
  const int operand_bytes = operands_of_step * slabs * slab_bytes;
  for (int i = thread_index(); i < 2 * operand_bytes / chunk_bytes; i += block_size())
    reinterpret_cast<Chunk*>(operands)[i] = {};

  const int exchanges = layer.grad_h0 ? num_steps : num_steps - 1;
  SumExchange<wavefront> exchange(tiling, place, arguments.workspace, num_steps, exchanges);
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
  float factors[2] = {1, 1};  // of what comes from the layer above
  bool keeps[2] = {};         // the step kept their states as they were
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
      if (wavefront && layer.factors)
        factors[column] = widen(load_streaming(typed<S>(layer.factors) + row * layer.factors_stride + unit));
      if (layer.grad_y) grad_y[column] = load_streaming(typed<S>(layer.grad_y) + row * layer.grad_y_stride + unit);
    }
  };
  StepRows rows = step_rows(steps, time_of(0));
  fetch(rows, step_rows(steps, previous_time_of(0)), 0);

  int buffer = 0;
  // phase: loop
  for (int s = 0; s < num_steps; ++s) {
    for (int j = 0; j < place.column_tiles; ++j) {
      const int columns = place.columns_of(j);
      // phase: wait
      Pair received = {}, from_above = {};
      if (exchange.exists(s)) {
        exchange.wait(s, j);
        // phase: partial sums
        exchange.sum(s, j, buffer, received, from_above);
      }
      // phase: gates
      char* const operand = operands + buffer * operand_bytes;
      if (item.exists && 2 * item.pair < columns) {
        Pair dh = *dh_state(j), dc = *dc_state(j);
        Real grads[2][grad_gates], dh_previous[2], dc_previous[2];
        FRNN_UNROLL
        for (int column = 0; column < 2; ++column) {
          dh.v[column] += received.v[column];
          if (wavefront) dh.v[column] += from_above.v[column] * factors[column];
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
            // phase: stores
            S* const to = typed<S>(layer.grad_gates) + int64_t(rows.first + row_of(j, column)) * grad_gates * H +
                          item.global_unit;
            FRNN_UNROLL
            for (int i = 0; i < grad_gates; ++i) to[i * H] = narrow<S>(float(grads[column][i]));
          }
          // phase: gates
          FRNN_UNROLL
          for (int which = 0; which < operands_of_step; ++which) {
            const int first = which == 0 ? hidden_grads.first : input_grads.first;
            FRNN_UNROLL
            for (int gate = 0; gate < gates; ++gate) {
              const float grad = live ? float(grads[column][first + gate]) : 0.0f;
              char* const chunk = operand + which * slabs * slab_bytes +
                                  chunk_offset(gate * gate_chunks + item.unit / per_chunk, 2 * item.pair + column);
              if constexpr (per_chunk == 8) {
                reinterpret_cast<S*>(chunk)[item.unit % per_chunk] = narrow<S>(grad);
              } else {
                reinterpret_cast<uint32_t*>(chunk)[item.unit % per_chunk] = Product::word(grad);
              }
            }
          }
        }
        *dh_state(j) = dh;
        if (Cell::has_cell) *dc_state(j) = dc;
      }
      // phase: prefetch
      // The next column tile in turn.
      {
        const bool last = j + 1 == place.column_tiles;
        if (last) rows = s + 1 < num_steps ? step_rows(steps, time_of(s + 1)) : StepRows{};
        fetch(rows, step_rows(steps, previous_time_of(last ? s + 1 : s)), last ? 0 : j + 1);
      }
      // phase: barrier
      if (s < exchanges || (wavefront && place.layer > 0)) {
        sync_threads();
        exchange.give_credit(s, j);
        // phase: products
        typename Product::Operand b[most_slabs];
        const auto load_operand = [&](const char* from) {
          FRNN_UNROLL
          for (int k = 0; k < most_slabs; ++k)
            b[k] = Product::operand(from + (k < slabs ? k : 0) * slab_bytes, columns);
        };
        load_operand(operand);
        // Before the first group of W_ih's. (The first of all is never one of them.)
        const auto turn_below = [&](int n) {
          if (!wavefront || n == 0 || n != tiling.own_tiles) return;
          exchange.wait_for_credit(s, j);
          if (operands_of_step > 1) load_operand(operand + slabs * slab_bytes);
        };
        // phase: sends
        const auto send = [&](const typename Product::Sums(&sums)[group], int n) {
          const bool below = wavefront && n > 0 && n >= tiling.own_tiles;
          if (!below && s >= exchanges) return;
          FRNN_UNROLL
          for (int m = 0; m < group; ++m) {
            const TileSums tile = sums[m].result();
            const int row_tile = (below ? n + m - tiling.own_tiles : n + m) * block_warps + warp_index();
            FRNN_UNROLL
            for (int half = 0; half < 2; ++half)
              exchange.send(below ? s : s + 1, j, 2 * row_tile + half, g, lane_index() % 4, tile.row[half], below);
          }
        };
        // phase: products
        FRNN_UNROLL
        for (int r = 0; r < register_groups; ++r) {
          if (r * group >= row_tiles) break;
          turn_below(r * group);
          typename Product::Sums sums[group];
          FRNN_UNROLL
          for (int k = 0; k < most_slabs; ++k) {
            if (k >= slabs) break;
            FRNN_UNROLL
            for (int m = 0; m < group; ++m) sums[m].add(resident[r][k][m], b[k], columns);
          }
          // phase: sends
          send(sums, r * group);
        }
        // phase: products
        for (int n = register_groups * group; n < row_tiles; n += group) {
          turn_below(n);
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
          // phase: sends
          send(sums, n);
        }
        // phase: sends
        exchange.sent(j);
      }
      // phase: loop
      buffer ^= 1;
    }
  }

  // phase: end
  for (int j = 0; j < place.column_tiles; ++j) {
    Pair received = {}, from_above = {};
    if (layer.grad_h0) {
      exchange.wait(num_steps, j);
      exchange.sum(num_steps, j, buffer, received, from_above);
      buffer ^= 1;
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

template <Multiply multiply, bool wavefront, class Cell, int index>
BackwardKernel backward_kernel_of_shape() {
  constexpr BackwardShape shape = backward_shape(multiply, index);
  return persistent_backward_kernel<typename ProductOf<multiply>::type, Cell, shape.group, shape.register_groups,
                                    shape.slabs, wavefront>;
}

template <Multiply multiply, bool wavefront>
BackwardKernel backward_kernel(CellKind kind, int shape) {
  return with_cell(kind, [&](auto cell) -> BackwardKernel {
    using Cell = decltype(cell);
    if constexpr (wavefront && !has_wavefront(multiply, Cell::gates)) {
      return nullptr;
    } else {
      if constexpr (backward_shapes(multiply, Cell::gates) > 1) {
        if (shape == 1) return backward_kernel_of_shape<multiply, wavefront, Cell, 1>();
        if (shape == 2) return backward_kernel_of_shape<multiply, wavefront, Cell, 2>();
      }
      return backward_kernel_of_shape<multiply, wavefront, Cell, 0>();
    }
  });
}

}  // namespace cuda
}  // namespace fused_rnn
