// All steps of a layer in one launch, forward.
//
// A step of a column tile, in each block of a team: wait for h of all units (Exchange), multiply the resident rows of
// W_hh (all gates of the block's units) by it, add the partial sums of the warps that split k through shared memory,
// turn them into gates and states, one thread for a unit and two columns, and send the new h to the team.
//
// Rows of the resident matrix: half tile q is gate q % G of octet q / G of the block. Warp w has row tiles
// (w % warps_rows) * row_tiles ... and, of k, slabs (w / warps_rows) * slabs ...; the first register_slabs of these
// stay in its registers, the rest in shared memory.
//
// In a wavefront (the parameter of that name; exchange counted) blocks of several layers make up a team. Half of a
// block's warps along k hold W_ih instead, which multiplies the h of the layer below, so that sums of both products
// come out apart; in the lowest layer, whose projections are in memory, they have nothing to do. A layer's h goes to
// the layer above as it goes to its own.
//
// One barrier of the block a step is enough. Partial sums have two buffers: a warp that writes one for the second time
// has passed the barrier of the step between, which every warp reached after it had read the first. For h see
// StateExchange.
#pragma once

#include "persistent.cuh"

namespace fused_rnn {
namespace cuda {

// h of all units on its way through the team. h after step s is in buffer s % 2 (h0: buffer 0).
//
// Two buffers are enough: h after step s + 1 goes where h after step s - 1 was. A block sends it when it has all of h
// after step s, of which every block sent its part after its barrier in step s, and so after all its warps had read h
// after step s - 1.
//
// Exchange::counted needs an mbarrier per buffer: with one, a fast block's h after step s + 1 could be counted for step
// s. The phase for step s + 2 is opened by the block itself after it has seen that of step s end, and nothing for step
// s + 2 arrives before, because it takes this block's own part of step s + 1.
//
// In a wavefront a block takes, for its step s, h after step s - 1 of its own layer and h after step s of the layer
// below, both in buffer s % 2. The layer below waits for nothing that this one computes: a credit, an arrival at an
// mbarrier of each block below, says that step s has been read, and lets h for step s + 2 be sent.
template <class Product, bool wavefront>
class StateExchange {
  using S = typename Product::Storage;
  static constexpr int per_chunk = Product::per_chunk;
  // Lanes that hold the same chunk after gather_chunk, and share the receivers.
  static constexpr int holders = per_chunk / 2;
  static constexpr int most_receivers = (wavefront ? 8 : 16) / holders;  // in a layer

 public:
  FRNN_DEVICE StateExchange(const Tiling& tiling, const Place& place, char* workspace, int steps, bool scales)
      : tiling_(tiling),
        place_(place),
        steps_(steps),
        scales_(scales),
        chunks_(place.total_octets * 8 / per_chunk),
        state_bytes_((chunks_ + slab_chunks - 1) / slab_chunks * slab_bytes),
        buffer_bytes_(wavefront ? 2 * state_bytes_ : state_bytes_),
        operand_(shared_memory() + tiling.operand) {
#if defined(FRNN_CUDA_CLUSTERS)
    barriers_ = reinterpret_cast<Mbarrier*>(shared_memory() + tiling.barriers);
    credits_ = reinterpret_cast<Mbarrier*>(shared_memory() + tiling.credits);
#endif
    if (!wavefront && tiling.exchange == Exchange::memory) {
      const int team = place.team_index(tiling);
      const int64_t teams = int64_t(grid_y()) * tiling.teams;
      counters_ = reinterpret_cast<uint32_t*>(workspace) + int64_t(team) * tiling.column_tiles;
      memory_ = workspace + counter_bytes(teams * tiling.column_tiles) +
                int64_t(team) * tiling.column_tiles * 2 * buffer_bytes_;
    }
  }

  // h0 into the buffers, zeros into all the rest. The caller meets all who write there before the first step.
  FRNN_DEVICE void begin(const void* h0, int64_t hidden_size) {
    const bool memory = !wavefront && tiling_.exchange == Exchange::memory;
    const int buffers = memory ? 1 : 2 * tiling_.column_tiles;
    for (int i = thread_index(); i < buffers * buffer_bytes_ / chunk_bytes; i += block_size())
      reinterpret_cast<Chunk*>(operand_)[i] = {};
#if defined(FRNN_CUDA_CLUSTERS)
    if (counts() && thread_index() == 0) {
      for (int i = 0; i < 2 * place_.column_tiles; ++i) {
        mbarrier_init(&barriers_[i], 1);
        if (wavefront) mbarrier_init(&credits_[i], tiling_.active);
      }
      fence_mbarrier_init();
      // Of step 0 there is h of the layer below alone, and without one nothing.
      for (int i = 0; i < 2 * place_.column_tiles; ++i)
        mbarrier_arrive_expect(&barriers_[i], has_below() && i % 2 == 0 ? state_bytes(i / 2) : bytes(i / 2));
    }
#endif
    if (memory) return;
    sync_threads();
    for (int j = 0; j < place_.column_tiles; ++j) load_initial(buffer(j, 0), j, h0, hidden_size);
  }

  // Where this block finds h after step s - 1 of column tile j (s = 0: h0), when all of it is there; and, state_bytes_
  // further on, h after step s of the layer below.
  FRNN_DEVICE const char* wait(int s, int j, const void* h0, int64_t hidden_size) {
    const int parity = s & 1;
    // (Here and below the fastest exchange comes before the switch, whose jump takes longer than other branches.)
#if defined(FRNN_CUDA_CLUSTERS)
    if (counts()) {
      if (s > 0 || has_below()) {
        mbarrier_wait(&barriers_[2 * j + parity], ((has_below() ? s : s - 1) >> 1) & 1);
        if (thread_index() == 0 && s + 2 < steps_) mbarrier_arrive_expect(&barriers_[2 * j + parity], bytes(j));
      }
      return buffer(j, parity);
    }
#endif
    switch (tiling_.exchange) {
      case Exchange::none:
        if (s > 0 && j == 0) sync_threads();
        break;
#if defined(FRNN_CUDA_CLUSTERS)
      case Exchange::barriers:
        if (s > 0 && j == 0) cluster_wait();
        break;
#endif
      case Exchange::memory:
        // The one buffer in shared memory is free: all warps have passed the barrier of the column tile before.
        if (s == 0) {
          load_initial(operand_, j, h0, hidden_size);
        } else {
          if (thread_index() == 0) wait_until_at_least(&counters_[j], uint32_t(s) * uint32_t(tiling_.active));
          sync_threads();
          fetch(j, parity);
        }
        sync_threads();
        return operand_;
      default: break;
    }
    return buffer(j, parity);
  }

  // All warps have read what wait(s, j) gave.
  FRNN_DEVICE void give_credit(int s, int j) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (!wavefront || !has_below() || s + 2 >= steps_ || thread_index() >= tiling_.active) return;
    mbarrier_arrive_remote(
        remote_address(&credits_[2 * j + (s & 1)], (place_.layer - 1) * tiling_.active + thread_index()));
#endif
  }

  // Sends two neighbouring columns of a unit to the team, for step s + 1, and to the layer above, times `factors`, for
  // step s; all lanes of the warp come here.
  FRNN_DEVICE void send(int s, int j, const Item& item, const float (&h)[2], const S (&factors)[2]) {
    const S first = narrow<S>(h[0]), second = narrow<S>(h[1]);
    const Chunk chunk = gather(first, second);
    Chunk above_chunk = chunk;
    if (wavefront && scales_)
      above_chunk = gather(narrow<S>(widen(first) * widen(factors[0])), narrow<S>(widen(second) * widen(factors[1])));
    const int column = 2 * item.pair + lane_index() % 2;
    const int parity = (s + 1) & 1;
    const bool sends = item.pair < tile_columns / 2 && item.unit / 8 < place_.octets && column < place_.columns_of(j);
    if (!sends) return;
    const int offset = chunk_offset((place_.first_octet * 8 + item.unit) / per_chunk, column);
    const int holder = lane_index() % (2 * holders) / 2;
#if defined(FRNN_CUDA_CLUSTERS)
    if (counts()) {
      if (!wavefront || s + 1 < steps_)
        send_to(place_.layer, chunk, buffer(j, parity) + offset, 2 * j + parity, holder);
      if (wavefront && place_.layer + 1 < tiling_.layers) {
        const int above = 2 * j + (s & 1);
        // Not who sends nothing: without it the layer above goes on, and its next credit but one has this one's parity.
        if (s >= 2 && holder < tiling_.active) mbarrier_wait(&credits_[above], ((s - 2) >> 1) & 1);
        send_to(place_.layer + 1, above_chunk, buffer(j, s & 1) + state_bytes_ + offset, above, holder);
      }
      return;
    }
#endif
    switch (tiling_.exchange) {
      case Exchange::none:
        if (holder == 0) *reinterpret_cast<Chunk*>(buffer(j, parity) + offset) = chunk;
        break;
#if defined(FRNN_CUDA_CLUSTERS)
      case Exchange::barriers:
        FRNN_UNROLL
        for (int i = 0; i < most_receivers; ++i) {
          const int rank = holder + i * holders;
          if (rank < tiling_.active) store_remote(remote_address(buffer(j, parity) + offset, rank), chunk);
        }
        break;
#endif
      case Exchange::memory:
        if (holder == 0) store_l2(reinterpret_cast<Chunk*>(global(j, parity) + offset), chunk);
        break;
      default: break;
    }
  }

  // After the block's sends of step s, column tile j.
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
  FRNN_DEVICE char* buffer(int j, int parity) const { return operand_ + (2 * j + parity) * buffer_bytes_; }
  FRNN_DEVICE char* global(int j, int parity) const { return memory_ + int64_t(2 * j + parity) * buffer_bytes_; }
  FRNN_DEVICE bool counts() const { return wavefront || tiling_.exchange == Exchange::counted; }
  FRNN_DEVICE bool has_below() const { return wavefront && place_.layer > 0; }
  // Of column tile j, that arrive for a step: from the team's blocks of one layer, and of all.
  FRNN_DEVICE int state_bytes(int j) const { return chunks_ * chunk_bytes * place_.columns_of(j); }
  FRNN_DEVICE int bytes(int j) const { return has_below() ? 2 * state_bytes(j) : state_bytes(j); }

#if defined(FRNN_CUDA_CLUSTERS)
  // To all blocks of a layer, which this lane shares with the other holders of the chunk.
  FRNN_DEVICE void send_to(int layer, const Chunk& chunk, const char* at, int barrier, int holder) {
    FRNN_UNROLL
    for (int i = 0; i < most_receivers; ++i) {
      const int rank = holder + i * holders;
      if (rank >= tiling_.active) continue;
      const int block = layer * tiling_.active + rank;
      store_async(remote_address(at, block), chunk, remote_address(&barriers_[barrier], block));
    }
  }
#endif

  static FRNN_DEVICE Chunk gather(S first, S second) {
    uint32_t a = 0, b = 0;
    if constexpr (sizeof(S) == 2) {
      a = first.bits;
      b = second.bits;
    } else {
      a = Product::word(first);
      b = Product::word(second);
    }
    return gather_chunk<S>(a, b);
  }

  FRNN_DEVICE void load_initial(char* to, int j, const void* h0, int64_t hidden_size) {
    if (!h0) return;
    const int columns = place_.columns_of(j);
    for (int i = thread_index(); i < chunks_ * columns; i += block_size()) {
      const int chunk = i % chunks_, column = i / chunks_;
      const int64_t row = place_.first_column + j * tile_columns + column;
      *reinterpret_cast<Chunk*>(to + chunk_offset(chunk, column)) =
          load_row_chunk<Product>(typed<S>(h0) + row * hidden_size, int64_t(chunk) * per_chunk, hidden_size);
    }
  }

  // Only what was sent: the workspace holds anything elsewhere, the buffer zeros.
  FRNN_DEVICE void fetch(int j, int parity) {
    const int columns = place_.columns_of(j);
    for (int i = thread_index(); i < buffer_bytes_ / chunk_bytes; i += block_size()) {
      const int chunk = i / (tile_columns * slab_chunks) * slab_chunks + i % slab_chunks;
      const int column = i / slab_chunks % tile_columns;
      if (chunk < chunks_ && column < columns)
        copy_async_16(operand_ + i * chunk_bytes, global(j, parity) + i * chunk_bytes);
    }
    copy_async_commit();
    copy_async_wait<0>();
  }

  const Tiling& tiling_;
  const Place& place_;
  const int steps_;
  const bool scales_;  // what goes to the layer above
  const int chunks_;
  const int state_bytes_, buffer_bytes_;  // of h of one layer; of all that a block takes
  char* const operand_;
#if defined(FRNN_CUDA_CLUSTERS)
  Mbarrier *barriers_, *credits_;
#endif
  char* memory_ = nullptr;
  uint32_t* counters_ = nullptr;
};

// Of one unit; the last is the bias of the hidden product that stays apart, in a cell that has one.
struct alignas(16) Biases {
  float of[4];
};

// The sums of a unit and two columns over `warps` warps, in their order. Without a loop, so that all loads overlap.
template <int warps, int gates>
FRNN_DEVICE void add_parts(Pair (&sums)[gates], const Pair* part, int pair_stride) {
  FRNN_UNROLL
  for (int k = 0; k < warps; ++k) {
    FRNN_UNROLL
    for (int gate = 0; gate < gates; ++gate) {
      const Pair more = part[(k * gates + gate) * (tile_columns / 2) * pair_stride];
      sums[gate].v[0] = k == 0 ? more.v[0] : sums[gate].v[0] + more.v[0];
      sums[gate].v[1] = k == 0 ? more.v[1] : sums[gate].v[1] + more.v[1];
    }
  }
}

// The sums of `warps` warps, 1, 2, 4 or 8.
template <int gates>
FRNN_DEVICE void add_parts(Pair (&sums)[gates], const Pair* part, int pair_stride, int warps) {
  switch (warps) {
    case 1: return add_parts<1>(sums, part, pair_stride);
    case 2: return add_parts<2>(sums, part, pair_stride);
    case 4: return add_parts<4>(sums, part, pair_stride);
    default: return add_parts<8>(sums, part, pair_stride);
  }
}

template <class Product, class Cell, int row_tiles, int register_slabs, bool wavefront>
__global__ void __launch_bounds__(block_threads, 1)
    persistent_forward_kernel(const __grid_constant__ ForwardArguments arguments) {
#if !defined(FRNN_CUDA_CLUSTERS)
  if constexpr (wavefront) return;
#endif
  using S = typename Product::Storage;
  using Real = typename Product::Real;
  constexpr int gates = Cell::gates, saved = Cell::saved;
  const Tiling& tiling = arguments.tiling;
  const Steps& steps = arguments.steps;
  const int64_t H = arguments.hidden_size;
  const Place place(tiling, H, steps.B, wavefront);
  const Item item(place, H);
  const PersistentForward& layer = arguments.part[place.part()];
  const bool reverse = place.direction == 1;
  const int live = live_steps(steps, place.first_column);
  const int first_step = live < layer.first_step ? live : int(layer.first_step);
  const int end_step = live < layer.end_step ? live : int(layer.end_step);
  const int num_steps = end_step - first_step;
  const auto time_of = [&](int s) { return reverse ? end_step - 1 - s : first_step + s; };

  // The resident rows.
  const int g = lane_index() / 4;
  const int row_group = warp_index() % tiling.warps_rows, k_group = warp_index() / tiling.warps_rows;
  const int total_slabs = (place.total_octets * 8 / Product::per_chunk + slab_chunks - 1) / slab_chunks;
  // Warps that share the k of one product, and of which: W_ih's come after W_hh's.
  const int product_warps = wavefront ? tiling.warps_k / 2 : tiling.warps_k;
  const bool takes_below = wavefront && k_group >= product_warps;
  const int k_of_product = takes_below ? k_group - product_warps : k_group;
  const int rest = takes_below && place.layer == 0 ? 0 : total_slabs - k_of_product * tiling.slabs;
  const int slabs = rest < tiling.slabs ? rest : tiling.slabs;  // none, or less, for the last warps
  const int first_slab = slabs > 0 ? k_of_product * tiling.slabs : 0;
  const int first_operand = (takes_below ? total_slabs + first_slab : first_slab) * slab_bytes;
  const S* const w = typed<S>(takes_below ? layer.w_ih : layer.w_hh);
  const int stored_slabs = tiling.slabs > register_slabs ? tiling.slabs - register_slabs : 0;
  char* const stored = shared_memory() + tiling.weights + warp_index() * stored_slabs * row_tiles * tile_bytes;
  const auto weight = [&](int half, int chunk) {
    const int octet = half / gates, gate = half % gates;
    const int64_t unit = int64_t(place.first_octet + octet) * 8 + g;
    if (octet >= place.octets || unit >= H) return Chunk{};
    return load_row_chunk<Product>(w + (gate * H + unit) * H, int64_t(chunk) * Product::per_chunk, H);
  };
  uint32_t resident[register_slabs][row_tiles][8];
  FRNN_UNROLL
  for (int r = 0; r < register_slabs; ++r) {
    FRNN_UNROLL
    for (int m = 0; m < row_tiles; ++m) {
      FRNN_UNROLL
      for (int w = 0; w < 8; ++w) resident[r][m][w] = 0;
      if (r < slabs) load_tile(resident[r][m], weight, row_group * row_tiles + m, first_slab + r);
    }
  }
  for (int r = register_slabs; r < slabs; ++r) {
    FRNN_UNROLL
    for (int m = 0; m < row_tiles; ++m) {
      uint32_t a[8];
      load_tile(a, weight, row_group * row_tiles + m, first_slab + r);
      store_tile(stored + ((r - register_slabs) * row_tiles + m) * tile_bytes, a);
    }
  }

  // Running states of the item, per column tile.
  Pair* const states = reinterpret_cast<Pair*>(shared_memory() + tiling.states);
  const auto h_state = [&](int j) { return &states[(2 * j) * block_threads + thread_index()]; };
  const auto c_state = [&](int j) { return &states[(2 * j + 1) * block_threads + thread_index()]; };
  const auto row_of = [&](int j, int column) { return place.first_column + j * tile_columns + 2 * item.pair + column; };
  const auto owns = [&](int j, int column) { return item.exists && 2 * item.pair + column < place.columns_of(j); };
  const auto lives = [&](int j, int column, int live) { return owns(j, column) && row_of(j, column) < live; };
  Biases& biases = reinterpret_cast<Biases*>(shared_memory() + tiling.biases)[thread_index()];
  biases = {};
  if (item.exists) {
    FRNN_UNROLL
    for (int gate = 0; gate < gates; ++gate) {
      const int64_t row = gate * H + item.global_unit;
      const bool apart = Cell::hidden_bias_apart(gate);
      const float b_hh = value_or_zero<S>(layer.b_hh, row);
      biases.of[gate] = value_or_zero<S>(layer.b_ih, row) + (apart ? 0.0f : b_hh);
      if (apart) biases.of[3] = b_hh;
    }
  }
  for (int j = 0; j < place.column_tiles; ++j) {
    Pair h = {}, c = {};
    FRNN_UNROLL
    for (int column = 0; column < 2; ++column) {
      if (!owns(j, column)) continue;
      const int64_t index = row_of(j, column) * H + item.global_unit;
      h.v[column] = value_or_zero<S>(layer.h0, index);
      if (Cell::has_cell) c.v[column] = layer.c ? typed<float>(layer.c)[index] : value_or_zero<S>(layer.c0, index);
    }
    *h_state(j) = h;
    *c_state(j) = c;
  }

  StateExchange<Product, wavefront> exchange(tiling, place, arguments.workspace, num_steps, layer.factors);
  exchange.begin(layer.h0, H);
  meet_writers(tiling);
  if (place.rank >= tiling.active) {  // nothing to do, but the cluster's barriers count this block
    for (int s = 0; s + 1 < num_steps && tiling.exchange == Exchange::barriers; ++s) meet_cluster(tiling);
    meet_cluster(tiling);
    return;
  }

  // The projected inputs of the next column tile in turn are fetched as soon as the registers of this one's are free.
  S projected[gates][2] = {}, factors[2] = {};
  bool keeps[2] = {};  // their states, as they are
  const auto fetch_projection = [&](int first, int live, int j) {
    FRNN_UNROLL
    for (int column = 0; column < 2; ++column) {
      if (!lives(j, column, live)) continue;
      keeps[column] = is_masked(steps, first + row_of(j, column));
      if (wavefront && layer.factors)
        factors[column] = load_streaming(typed<S>(layer.factors) + (first + row_of(j, column)) * layer.factors_stride +
                                         item.global_unit);
      if (wavefront && !layer.projection) continue;
      const S* const row =
          typed<S>(layer.projection) + (first + row_of(j, column)) * layer.projection_stride + item.global_unit;
      FRNN_UNROLL
      for (int gate = 0; gate < gates; ++gate) projected[gate][column] = load_streaming(row + gate * H);
    }
  };
  StepRows rows = num_steps > 0 ? step_rows(steps, time_of(0)) : StepRows{}, next_rows = {};
  fetch_projection(rows.first, rows.live, 0);

  const int pair_stride = place.units + 4;  // of the partial sums: no bank conflicts for writers or readers
  const int sums_stride = tiling.warps_k * gates * (tile_columns / 2) * pair_stride;
  int buffer = 0;
  // phase: loop
  for (int s = 0; s < num_steps; ++s) {
    if (s + 1 < num_steps) next_rows = step_rows(steps, time_of(s + 1));
    for (int j = 0; j < place.column_tiles; ++j) {
      const int columns = place.columns_of(j);
      // phase: wait
      const char* const operand = exchange.wait(s, j, layer.h0, H) + first_operand;

      // phase: products
      typename Product::Sums sums[row_tiles];
      // A slab of h is loaded one turn ahead, rows from shared memory while those in registers are multiplied.
      auto next = Product::operand(operand, columns);
      FRNN_UNROLL
      for (int r = 0; r < register_slabs; ++r) {
        if (r >= slabs) break;
        const auto b = next;
        next = Product::operand(operand + (r + 1 < slabs ? r + 1 : r) * slab_bytes, columns);
        if (register_slabs + r < slabs) {
          uint32_t a[row_tiles][8];
          FRNN_UNROLL
          for (int m = 0; m < row_tiles; ++m) fetch_tile(a[m], stored + (r * row_tiles + m) * tile_bytes);
          const auto stored_b = Product::operand(operand + (register_slabs + r) * slab_bytes, columns);
          FRNN_UNROLL
          for (int m = 0; m < row_tiles; ++m) sums[m].add(resident[r][m], b, columns);
          FRNN_UNROLL
          for (int m = 0; m < row_tiles; ++m) sums[m].add(a[m], stored_b, columns);
        } else {
          FRNN_UNROLL
          for (int m = 0; m < row_tiles; ++m) sums[m].add(resident[r][m], b, columns);
        }
      }
      for (int r = register_slabs; register_slabs + r < slabs; ++r) {
        const auto b = Product::operand(operand + (register_slabs + r) * slab_bytes, columns);
        FRNN_UNROLL
        for (int m = 0; m < row_tiles; ++m) {
          uint32_t a[8];
          fetch_tile(a, stored + (r * row_tiles + m) * tile_bytes);
          sums[m].add(a, b, columns);
        }
      }

      // phase: partial sums
      Pair* const partial = reinterpret_cast<Pair*>(shared_memory() + tiling.sums) + buffer * sums_stride;
      FRNN_UNROLL
      for (int m = 0; m < row_tiles; ++m) {
        const TileSums tile = sums[m].result();
        const int pair = lane_index() % 4;
        FRNN_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int q = 2 * (row_group * row_tiles + m) + half;
          const int octet = q / gates, gate = q % gates;
          if (octet < tiling.octets && 2 * pair < columns)
            partial[((k_group * gates + gate) * (tile_columns / 2) + pair) * pair_stride + octet * 8 + g] =
                tile.row[half];
        }
      }
      // phase: barrier
      sync_threads();
      exchange.give_credit(s, j);

      // phase: gates
      // Both columns of the item together, dead or not, so that their arithmetic overlaps.
      const bool acts = item.exists && 2 * item.pair < columns;
      Pair h = {};
      Real values[2][saved > 0 ? saved : 1], c_next[2];
      S stored_h[2] = {};
      if (acts) {
        h = *h_state(j);
        Pair c = {};
        if (Cell::has_cell) c = *c_state(j);
        Pair product[gates], below[gates] = {};
        const Pair* const part = partial + item.pair * pair_stride + item.unit;
        add_parts(product, part, pair_stride, product_warps);
        if (wavefront)
          add_parts(below, part + product_warps * gates * (tile_columns / 2) * pair_stride, pair_stride, product_warps);
        const Biases bias = biases;
        FRNN_UNROLL
        for (int column = 0; column < 2; ++column) {
          Real x[gates], r[gates], h_next;
          FRNN_UNROLL
          for (int gate = 0; gate < gates; ++gate) {
            x[gate] = widen(projected[gate][column]) + bias.of[gate];
            if (wavefront) x[gate] = x[gate] + below[gate].v[column];
            const float sum = product[gate].v[column];
            r[gate] = Cell::hidden_bias_apart(gate) ? sum + bias.of[3] : sum;
          }
          Cell::template forward<Real>(x, r, h.v[column], c.v[column], h_next, c_next[column], values[column]);
          stored_h[column] = narrow<S>(float(h_next));
          if (keeps[column]) {
            stored_h[column] = narrow<S>(h.v[column]);
            c_next[column] = c.v[column];
            FRNN_UNROLL
            for (int i = 0; i < saved; ++i) values[column][i] = 0.0f;
          } else if (lives(j, column, rows.live)) {
            h.v[column] = widen(stored_h[column]);
            if (Cell::has_cell) c.v[column] = float(c_next[column]);
          }
        }
        *h_state(j) = h;
        if (Cell::has_cell) *c_state(j) = c;
      }
      // phase: sends
      // The team waits for h; memory does not.
      if (wavefront || s + 1 < num_steps) {
        exchange.send(s, j, item, h.v, factors);
        exchange.sent(j);
      }
      // phase: stores
      FRNN_UNROLL
      for (int column = 0; column < 2; ++column) {
        if (!acts || !lives(j, column, rows.live)) continue;
        const int64_t row = rows.first + row_of(j, column);
        if (!wavefront || layer.y) typed<S>(layer.y)[row * layer.y_stride + item.global_unit] = stored_h[column];
        if (Cell::has_cell && layer.cells)
          store_streaming(typed<float>(layer.cells) + row * H + item.global_unit, float(c_next[column]));
        if (saved > 0 && layer.gates) {
          FRNN_UNROLL
          for (int i = 0; i < saved; ++i)
            store_streaming(typed<S>(layer.gates) + (row * saved + i) * H + item.global_unit,
                            narrow<S>(float(values[column][i])));
        }
      }
      // phase: prefetch
      if (j + 1 == place.column_tiles) {
        rows = next_rows;
        next_rows = {};
      }
      fetch_projection(rows.first, rows.live, j + 1 == place.column_tiles ? 0 : j + 1);
      // phase: loop
      buffer ^= 1;
    }
  }

  // phase: end
  for (int j = 0; j < place.column_tiles; ++j) {
    FRNN_UNROLL
    for (int column = 0; column < 2; ++column) {
      if (!owns(j, column)) continue;
      const int64_t index = row_of(j, column) * H + item.global_unit;
      if (layer.h_n) typed<S>(layer.h_n)[index] = narrow<S>(h_state(j)->v[column]);
      if (Cell::has_cell) typed<S>(layer.c_n)[index] = narrow<S>(c_state(j)->v[column]);
      if (Cell::has_cell && layer.c) typed<float>(layer.c)[index] = c_state(j)->v[column];
    }
  }
  // No block leaves while others may write into its shared memory.
  meet_cluster(tiling);
}

template <Multiply multiply, bool wavefront, class Cell, int index>
ForwardKernel forward_kernel_of_shape() {
  constexpr ForwardShape shape = forward_shape(multiply, index, wavefront);
  return persistent_forward_kernel<typename ProductOf<multiply>::type, Cell, shape.row_tiles, shape.register_slabs,
                                   wavefront>;
}

template <Multiply multiply, bool wavefront>
ForwardKernel forward_kernel(CellKind kind, int shape) {
  return with_cell(kind, [&](auto cell) -> ForwardKernel {
    using Cell = decltype(cell);
    if constexpr (wavefront && !has_wavefront(multiply, Cell::gates)) {
      return nullptr;
    } else {
      if constexpr (forward_shapes(multiply, Cell::gates) > 1) {
        if (shape == 1) return forward_kernel_of_shape<multiply, wavefront, Cell, 1>();
      }
      return forward_kernel_of_shape<multiply, wavefront, Cell, 0>();
    }
  });
}

}  // namespace cuda
}  // namespace fused_rnn
