// All steps of a layer in one launch, forward.
//
// A step of a column tile, in each block of a team. The multiplying warps wait for h of all units (StateReceiver),
// multiply the resident rows of W_hh (all gates of the block's units) by it and leave partial sums, one for each group
// of warps along k, in shared memory. The gates' warps add these up, turn them into gates and states, and send the new
// h to the team (StateSender); storing what is kept and fetching what comes next is theirs too, while the others
// multiply.
//
// Rows of the resident matrix: half tile q is gate q % G of octet q / G of the block. Warp w has row tiles
// (w % warps_rows) * row_tiles ... and, of k, slabs (w / warps_rows) * slabs ...; the first register_slabs of these
// stay in its registers, the rest in shared memory.
//
// In a wavefront (the parameter of that name; exchange counted) blocks of several layers make up a team. Half of a
// block's warps along k hold W_ih instead, which multiplies the h of the layer below, so that sums of both products
// come out apart; in the lowest layer, whose projections are in memory, they have nothing to do. A layer's h goes to
// the layer above as it goes to its own.
#pragma once

#include "persistent.cuh"

namespace fused_rnn {
namespace cuda {

// h of all units on its way through the team: h before step s is in buffer s % 2. h0 goes the same way: a block sends
// what it owns of it before the first step.
//
// Two buffers are enough: h before step s + 2 goes where h before step s was. A block sends it when it has all of h
// before step s + 1, of which every block sent its part after its products of step s, and so after all its warps had
// read h before step s.
//
// Exchange::counted needs an mbarrier per buffer: with one, a fast block's h before step s + 1 could be counted for
// step s. The phase for step s + 2 is opened by the block itself after it has seen that of step s end. What arrives
// before that is no mistake, since no phase ends before it was opened.
//
// In a wavefront a block takes, for its step s, h before step s of its own layer and h after step s of the layer below,
// both in buffer s % 2. The layer below waits for nothing that this one computes: a credit, an arrival at an mbarrier
// of each block below, says that step s has been read, and lets h after step s + 2 be sent.
template <class Product, bool wavefront>
class StateBuffers {
 public:
  FRNN_DEVICE StateBuffers(const Tiling& tiling, const Place& place, char* workspace, int steps)
      : tiling_(tiling),
        place_(place),
        steps_(steps),
        chunks_(place.total_octets * 8 / Product::per_chunk),
        state_bytes_((chunks_ + slab_chunks - 1) / slab_chunks * slab_bytes),
        buffer_bytes_(wavefront ? 2 * state_bytes_ : state_bytes_),
        operand_(shared_memory() + tiling.operand),
        workspace_(workspace) {
#if defined(FRNN_CUDA_CLUSTERS)
    barriers_ = reinterpret_cast<Mbarrier*>(shared_memory() + tiling.barriers);
    credits_ = reinterpret_cast<Mbarrier*>(shared_memory() + tiling.credits);
#endif
    if (!wavefront && tiling.exchange == Exchange::memory) {
      first_tile_ = place.team_index(tiling) * tiling.column_tiles;
      memory_at_ = int(counter_bytes(int64_t(grid_y()) * tiling.teams * tiling.column_tiles));
    }
  }

 protected:
  FRNN_DEVICE char* buffer(int j, int parity) const { return operand_ + (2 * j + parity) * buffer_bytes_; }
  // In the workspace: the counter of a column tile, and its buffers.
  FRNN_DEVICE uint32_t* counter(int j) const { return reinterpret_cast<uint32_t*>(workspace_) + first_tile_ + j; }
  FRNN_DEVICE char* global(int j, int parity) const {
    return workspace_ + memory_at_ + int64_t(2 * (first_tile_ + j) + parity) * buffer_bytes_;
  }
  FRNN_DEVICE bool has_below() const { return wavefront && place_.layer > 0; }
  // Of column tile j, that arrive for a step: from the team's blocks of one layer, and of all.
  FRNN_DEVICE int state_bytes(int j) const { return chunks_ * chunk_bytes * place_.columns_of(j); }
  FRNN_DEVICE int bytes(int j) const { return has_below() ? 2 * state_bytes(j) : state_bytes(j); }

  const Tiling& tiling_;
  const Place& place_;
  const int steps_;
  const int chunks_;
  const int state_bytes_, buffer_bytes_;  // of h of one layer; of all that a block takes
  char* const operand_;
#if defined(FRNN_CUDA_CLUSTERS)
  Mbarrier *barriers_, *credits_;
#endif
  char* const workspace_;
  int first_tile_ = 0, memory_at_ = 0;
};

// The multiplying warps' side.
template <class Product, bool wavefront, bool counted>
class StateReceiver : public StateBuffers<Product, wavefront> {
  using StateBuffers<Product, wavefront>::buffer;
  using StateBuffers<Product, wavefront>::tiling_;
  using StateBuffers<Product, wavefront>::place_;
  using StateBuffers<Product, wavefront>::steps_;
  using StateBuffers<Product, wavefront>::chunks_;
  using StateBuffers<Product, wavefront>::operand_;
  using StateBuffers<Product, wavefront>::buffer_bytes_;

 public:
  using StateBuffers<Product, wavefront>::StateBuffers;

  // Zeros where nothing is ever sent. The caller meets all who write there before the first step.
  FRNN_DEVICE void begin() {
    const bool memory = !wavefront && tiling_.exchange == Exchange::memory;
    const int buffers = memory ? 1 : 2 * tiling_.column_tiles;
    FRNN_NO_UNROLL
    for (int i = thread_index(); i < buffers * buffer_bytes_ / chunk_bytes; i += multiply_threads)
      reinterpret_cast<Chunk*>(operand_)[i] = {};
#if defined(FRNN_CUDA_CLUSTERS)
    if (counted && thread_index() == 0) {
      for (int i = 0; i < 2 * place_.column_tiles; ++i) {
        mbarrier_init(&this->barriers_[i], 1);
        if (wavefront) mbarrier_init(&this->credits_[i], tiling_.active);
      }
      fence_mbarrier_init();
      for (int i = 0; i < 2 * place_.column_tiles; ++i) mbarrier_arrive_expect(&this->barriers_[i], this->bytes(i / 2));
    }
#endif
  }

  // Where this block finds h before step s of column tile j, when all of it is there; and, state_bytes_ further on, h
  // after step s of the layer below.
  FRNN_DEVICE const char* wait(int s, int j) {
    const int parity = s & 1;
#if defined(FRNN_CUDA_CLUSTERS)
    if (counted) {
      mbarrier_wait(&this->barriers_[2 * j + parity], (s >> 1) & 1);
      return buffer(j, parity);
    }
#endif
    switch (tiling_.exchange) {
      case Exchange::none:
        if (j == 0) take_over(states_ready);
        break;
#if defined(FRNN_CUDA_CLUSTERS)
      case Exchange::barriers:
        if (j == 0) cluster_wait();
        break;
#endif
      case Exchange::memory:
        // There is one buffer in shared memory, and after this barrier no warp reads it any more.
        if (thread_index() == 0) wait_until_at_least(this->counter(j), uint32_t(s + 1) * tiling_.active);
        meet_multipliers();
        fetch(j, parity);
        meet_multipliers();
        return operand_;
      default: break;
    }
    return buffer(j, parity);
  }

  // This thread has read what wait(s, j) gave, or (s = -1) can receive.
  FRNN_DEVICE void was_read(int s, int j) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (two_roles && !counted && tiling_.exchange == Exchange::barriers && j == place_.column_tiles - 1 &&
        s + 1 < steps_)
      cluster_arrive();
#endif
  }

 private:
  // Only what was sent: the workspace holds anything elsewhere, the buffer zeros.
  FRNN_DEVICE void fetch(int j, int parity) {
    const int columns = place_.columns_of(j);
    FRNN_NO_UNROLL
    for (int i = thread_index(); i < buffer_bytes_ / chunk_bytes; i += multiply_threads) {
      const int chunk = i / (tile_columns * slab_chunks) * slab_chunks + i % slab_chunks;
      const int column = i / slab_chunks % tile_columns;
      if (chunk < chunks_ && column < columns)
        copy_async_16(operand_ + i * chunk_bytes, this->global(j, parity) + i * chunk_bytes);
    }
    copy_async_commit();
    copy_async_wait<0>();
  }
};

// The gates' side.
template <class Product, bool wavefront, bool counted>
class StateSender : public StateBuffers<Product, wavefront> {
  using S = typename Product::Storage;
  using StateBuffers<Product, wavefront>::buffer;
  using StateBuffers<Product, wavefront>::tiling_;
  using StateBuffers<Product, wavefront>::place_;
  using StateBuffers<Product, wavefront>::steps_;
  using StateBuffers<Product, wavefront>::buffer_bytes_;
  using StateBuffers<Product, wavefront>::state_bytes_;
  // As many lanes have a chunk after gather_units, and share the receivers.
  static constexpr int holders = Product::per_chunk;
  static constexpr int most_receivers = ((wavefront ? 8 : 16) + holders - 1) / holders;  // in a layer

 public:
  FRNN_DEVICE StateSender(const Tiling& tiling, const Place& place, const GateThread& thread, char* workspace,
                          int steps)
      : StateBuffers<Product, wavefront>(tiling, place, workspace, steps),
        thread_(thread.index),
        holder_(lane_index() % holders),
        chunk_at_(chunk_offset((place.first_octet * 8 + thread.unit) / Product::per_chunk, 0)) {
#if defined(FRNN_CUDA_CLUSTERS)
    // Once and for all: where a chunk goes in each block, of column 0 in the first buffer.
    if (!is_cluster(tiling.exchange)) return;
    const auto address = [&](RemoteAddress(&to)[most_receivers], int layer) {
      FRNN_UNROLL
      for (int i = 0; i < most_receivers; ++i) {
        const int rank = holder_ + i * holders;
        to[i] = remote_address(buffer(0, 0) + chunk_at_, layer * tiling.active + (rank < tiling.active ? rank : 0));
      }
    };
    address(own_, place.layer);
    if (wavefront && has_above()) address(above_, place.layer + 1);
#endif
  }

  // All threads of the gates, before a step.
  FRNN_DEVICE void begin_step(int j) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (two_roles && !counted && tiling_.exchange == Exchange::barriers && j == 0) cluster_keep_up();
#endif
  }

  // Sends a column of the warp's units to the team, for step s + 1, and to the layer above, times `factor`, for step s
  // (-1: the initial state, which is for no other layer); all lanes of the warp come here, of which those send that
  // have one. `last`: there is no step s + 1.
  FRNN_DEVICE void send(int s, int j, int column, bool sends, S h, S factor, bool scales, bool last) {
    const Chunk chunk = gather_units<S>(bits(h));
    Chunk above_chunk = chunk;
    if (wavefront && scales) above_chunk = gather_units<S>(bits(narrow<S>(widen(h) * widen(factor))));
    if (!sends) return;
    const int parity = (s + 1) & 1, at = column * (slab_chunks * chunk_bytes);
#if defined(FRNN_CUDA_CLUSTERS)
    if (counted) {
      if (!last) send_to(own_, chunk, (2 * j + parity) * buffer_bytes_ + at, 2 * j + parity);
      if (wavefront && has_above() && s >= 0) {
        const int buffer = 2 * j + (s & 1);
        // Not who sends nothing: without it the layer above goes on, and its next credit but one has this one's parity.
        if (s >= 2 && holder_ < tiling_.active) mbarrier_wait(&this->credits_[buffer], ((s - 2) >> 1) & 1);
        send_to(above_, above_chunk, buffer * buffer_bytes_ + state_bytes_ + at, buffer);
      }
      return;
    }
#endif
    if (last) return;
    switch (tiling_.exchange) {
      case Exchange::none:
        if (holder_ == 0) *reinterpret_cast<Chunk*>(buffer(j, parity) + chunk_at_ + at) = chunk;
        break;
#if defined(FRNN_CUDA_CLUSTERS)
      case Exchange::barriers:
        FRNN_UNROLL
        for (int i = 0; i < most_receivers; ++i)
          if (holder_ + i * holders < tiling_.active)
            store_remote(own_[i] + ((2 * j + parity) * buffer_bytes_ + at), chunk);
        break;
#endif
      case Exchange::memory:
        if (holder_ == 0) store_l2(reinterpret_cast<Chunk*>(this->global(j, parity) + chunk_at_ + at), chunk);
        break;
      default: break;
    }
  }

  // After all sends of step s, column tile j: what others wait for beside the bytes themselves.
  FRNN_DEVICE void sent(int s, int j, bool last) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (counted) {
      if (thread_ == 0 && s >= 0 && s + 2 < steps_)
        mbarrier_arrive_expect(&this->barriers_[2 * j + (s & 1)], this->bytes(j));
      // All warps have read what came for step s.
      if (wavefront && this->has_below() && s >= 0 && s + 2 < steps_ && thread_ < tiling_.active)
        mbarrier_arrive_remote(
            remote_address(&this->credits_[2 * j + (s & 1)], (place_.layer - 1) * tiling_.active + thread_));
      return;
    }
#endif
    if (last) return;
    const bool last_tile = j == place_.column_tiles - 1;
    switch (tiling_.exchange) {
      case Exchange::none:
        if (last_tile) hand_over(states_ready);
        break;
#if defined(FRNN_CUDA_CLUSTERS)
      case Exchange::barriers:
        if (last_tile) cluster_arrive();
        break;
#endif
      case Exchange::memory:
        meet_gate_warps();
        if (thread_ == 0) add_release(this->counter(j), 1);
        break;
      default: break;
    }
  }

 private:
  FRNN_DEVICE bool has_above() const { return wavefront && place_.layer + 1 < tiling_.layers; }
  static FRNN_DEVICE uint32_t bits(S h) {
    if constexpr (sizeof(S) == 2)
      return h.bits;
    else
      return Product::word(h);
  }

#if defined(FRNN_CUDA_CLUSTERS)
  FRNN_DEVICE void send_to(const RemoteAddress (&to)[most_receivers], const Chunk& chunk, int at, int barrier) {
    // In every block the barriers are as far from the buffers.
    const int64_t barrier_at = tiling_.barriers - tiling_.operand - chunk_at_ + barrier * int(sizeof(Mbarrier));
    FRNN_UNROLL
    for (int i = 0; i < most_receivers; ++i)
      if (holder_ + i * holders < tiling_.active) store_async(to[i] + at, chunk, to[i] + barrier_at);
  }
  RemoteAddress own_[most_receivers], above_[most_receivers];
#endif
  const int thread_, holder_;
  const int chunk_at_;  // of column 0
};

// Of one unit; the last is the bias of the hidden product that stays apart, in a cell that has one.
struct alignas(16) Biases {
  float of[4];
};

// Partial sums: for each warp along k and each pair of columns those of all half tiles, of a unit in each, as Pairs.
// Half tiles are 9 Pairs apart and pairs of columns 4 modulo 16, so that neither writers nor readers meet in a bank.
constexpr int half_tile_pairs = 9;

// The sums over `warps` warps, in their order. Without a loop, so that all loads overlap. T: float or Pair; stride: of
// a warp along k.
template <int warps, int gates, class T>
FRNN_DEVICE void add_parts(T (&sums)[gates], const char* part, int stride) {
  FRNN_UNROLL
  for (int k = 0; k < warps; ++k) {
    FRNN_UNROLL
    for (int gate = 0; gate < gates; ++gate) {
      const T more = *reinterpret_cast<const T*>(part + k * stride + gate * half_tile_pairs * int(sizeof(Pair)));
      sums[gate] = k == 0 ? more : sums[gate] + more;
    }
  }
}
template <int gates, class T>
FRNN_DEVICE void add_parts(T (&sums)[gates], const char* part, int stride, int warps) {
  if (warps == 2) return add_parts<2>(sums, part, stride);
  if (warps == 1) return add_parts<1>(sums, part, stride);
  if (warps == 4) return add_parts<4>(sums, part, stride);
  return add_parts<8>(sums, part, stride);
}

// The steps of a launch, as a team sees them.
struct ForwardSteps {
  int first, end;
  bool reverse;
  FRNN_DEVICE ForwardSteps(const ForwardArguments& arguments, const PersistentForward& layer, const Place& place)
      : reverse(place.direction == 1) {
    const int live = live_steps(arguments.steps, place.first_column);
    first = live < layer.first_step ? live : int(layer.first_step);
    end = live < layer.end_step ? live : int(layer.end_step);
  }
  FRNN_DEVICE int count() const { return end - first; }
  FRNN_DEVICE int time_of(int s) const { return reverse ? end - 1 - s : first + s; }
};

// What the gates' warps do.
template <class Product, class Cell, bool wavefront, bool counted, int count>
class ForwardGates {
  using S = typename Product::Storage;
  using Real = typename Product::Real;
  static constexpr int gates = Cell::gates, saved = Cell::saved;
  // Columns whose arithmetic overlaps: as many as there are registers for.
  static constexpr int together = two_roles && count == 2 ? 2 : 1;
  static constexpr bool at_once = count > 0 && count <= together;
  static constexpr bool options = count == 0;
  static constexpr int unrolled = options ? 1 : count, most_columns = options ? GateThread::most_columns : count;

 public:
  FRNN_DEVICE ForwardGates(const ForwardArguments& arguments, const PersistentForward& layer, const Place& place,
                           const GateThread& thread, const ForwardSteps& range)
      : arguments_(arguments),
        layer_(layer),
        place_(place),
        thread_(thread),
        range_(range),
        num_steps_(range.count()),
        exchange_(arguments.tiling, place, thread, arguments.workspace, range.count()),
        H_(int(arguments.hidden_size)),
        product_warps_(wavefront ? arguments.tiling.warps_k / 2 : arguments.tiling.warps_k),
        warp_bytes_(arguments.tiling.sum_pairs * arguments.tiling.pair_stride * int(sizeof(Pair))),
        part_(shared_memory() + arguments.tiling.sums +
              (thread.unit / 8 * gates * half_tile_pairs + thread.unit % 8) * int(sizeof(Pair))),
        states_(reinterpret_cast<uint32_t*>(shared_memory() + arguments.tiling.states) + thread.index),
        biases_(reinterpret_cast<Biases*>(shared_memory() + arguments.tiling.biases) + thread.index) {}

  // Initial states, biases, and what the first step wants from memory.
  FRNN_DEVICE void begin() {
    Biases biases = {};
    if (thread_.exists) {
      FRNN_UNROLL
      for (int gate = 0; gate < gates; ++gate) {
        const int64_t row = gate * int64_t(H_) + thread_.global_unit;
        const bool apart = Cell::hidden_bias_apart(gate);
        const float b_hh = value_or_zero<S>(layer_.b_hh, row);
        biases.of[gate] = value_or_zero<S>(layer_.b_ih, row) + (apart ? 0.0f : b_hh);
        if (apart) biases.of[3] = b_hh;
      }
    }
    *biases_ = biases;
    for (int j = 0; j < place_.column_tiles; ++j) {
      FRNN_UNROLL_BY(unrolled)
      for (int i = 0; i < columns(); ++i) {
        S h = {};
        float c = 0;
        if (owns(j, i)) {
          const int64_t index = batch_row(j, i) * int64_t(H_) + thread_.global_unit;
          if (layer_.h0) h = typed<S>(layer_.h0)[index];
          if (Cell::has_cell) c = layer_.c ? typed<float>(layer_.c)[index] : value_or_zero<S>(layer_.c0, index);
        }
        keep_state(j, i, h, c);
      }
    }
    go_to_step(0);
    fetch(0, 0);
  }

  // After all have met that send and receive.
  FRNN_DEVICE void send_initial() {
    for (int j = 0; j < place_.column_tiles && num_steps_ > 0; ++j) {
      FRNN_UNROLL_BY(unrolled)
      for (int i = 0; i < columns(); ++i) {
        const int column = thread_.column<count>(i);
        S h = from_word(states_[state(j, 0, i)]);
        if constexpr (options) h = multiplied(h, dropout(j, i));
        exchange_.send(-1, j, column, thread_.has_unit && column < place_.columns_of(j), h, S{}, false, false);
      }
      exchange_.sent(-1, j, false);
    }
  }

  // Gates of step s, column tile j. All threads of the role come here.
  FRNN_DEVICE void step(int s, int j, int turn) {
    // phase: loop
    const bool last = s + 1 == num_steps_;
    Columns work;
    uint8_t mask[together];
    S factor[together];
    Draws draws[together];
    if (two_roles) exchange_.begin_step(j);
    look_up(mask, factor, 0, j);
    if constexpr (options) look_up(draws, 0, j);
    if (two_roles && at_once) prepare(work, 0, j);
    // phase: barrier
    take_over(filled + (turn & 1));
    // phase: gates
    FRNN_UNROLL_BY(unrolled)
    for (int first = 0; first < columns(); first += together) {
      if (!two_roles || !at_once) prepare(work, first, j);
      FRNN_UNROLL
      for (int i = 0; i < together; ++i) {
        work.keeps[i] = has_mask() && !opaque(mask[i]);
        work.factor[i] = factor[i];
        if constexpr (options) work.draws[i] = draws[i];
      }
      if (first + together < columns()) {
        look_up(mask, factor, first + together, j);
        if constexpr (options) look_up(draws, first + together, j);
        fetch(first + together, j);
      }
      compute(work, first, j, turn);
      // phase: sends
      // The team waits for h; memory does not.
      if (wavefront || !last) {
        FRNN_UNROLL
        for (int i = 0; i < together; ++i) {
          const int column = thread_.column<count>(first + i);
          S h = work.h[i];
          if constexpr (options) h = multiplied(h, work.draws[i].dropout);
          exchange_.send(s, j, column, thread_.has_unit && column < place_.columns_of(j), h, work.factor[i],
                         wavefront && layer_.factors, last);
        }
      }
      // phase: stores
      // What does not fit beside the others' registers is stored before they are computed.
      if (!at_once) store(work, first, j);
    }
    // phase: sends
    free_buffer(turn);
    exchange_.sent(s, j, last);

    // phase: prefetch
    // What comes next before what is kept: it takes longest.
    const bool last_tile = j + 1 == place_.column_tiles;
    if (last_tile) go_to_step(s + 1);
    fetch(0, last_tile ? 0 : j + 1);
    // phase: stores
    if (at_once) store(work, 0, j);
  }

  // phase: end
  // The states after the last step.
  FRNN_DEVICE void end() {
    for (int j = 0; j < place_.column_tiles; ++j) {
      FRNN_UNROLL_BY(unrolled)
      for (int i = 0; i < columns(); ++i) {
        if (!owns(j, i)) continue;
        const int64_t index = batch_row(j, i) * int64_t(H_) + thread_.global_unit;
        const float c = as_float(states_[state(j, 1, i)]);
        if (layer_.h_n) typed<S>(layer_.h_n)[index] = from_word(states_[state(j, 0, i)]);
        if (Cell::has_cell) typed<S>(layer_.c_n)[index] = narrow<S>(c);
        if (Cell::has_cell && layer_.c) typed<float>(layer_.c)[index] = c;
      }
    }
  }

 private:
  // Where the tensors are: read again each time where registers are few.
  FRNN_DEVICE const PersistentForward& layer_now() const {
    const int part = place_.part();
    return arguments_.part[count == 4 || options ? int(opaque(uint32_t(part))) : part];
  }
  FRNN_DEVICE const PersistentOptions& options_now() const { return layer_now().options; }
  FRNN_DEVICE int columns() const { return options ? thread_.columns_with_options(place_.columns_of(0)) : count; }
  FRNN_DEVICE bool has_mask() const { return arguments_.steps.mask != nullptr; }
  FRNN_DEVICE int batch_row(int j, int i) const {
    return place_.first_column + j * tile_columns + thread_.column<count>(i);
  }
  // Whether its row is one of the step that go_to_step came to.
  FRNN_DEVICE bool is_live(int j, int i) const {
    const int column = thread_.column<count>(i);
    return column < tile_columns && j * tile_columns + column < limit_;
  }
  FRNN_DEVICE bool owns(int j, int i) const {
    return thread_.exists && thread_.column<count>(i) < place_.columns_of(j);
  }

  // What options have of a unit and a row: bytes of marks and of bits, which are waited for where they are used alone,
  // and the factor of h before W_hh.
  struct Draws {
    uint8_t anew, zoneout, zoneout_cell;
    S dropout;
  };
  // Of the columns that are computed together. h and c go on from the step; cell is that of the step.
  struct Columns {
    S h[together], output[together], factor[together];
    float c[together], cell[together];
    Draws draws[together];
    Real x[together][gates], bias_apart, values[together][saved > 0 ? saved : 1];
    bool lives[together], keeps[together];
    int row;  // in which column 0 of the team stands
  };

  // Bytes of the mask, and what h is multiplied by on its way to the layer above. Waited for where they are used alone.
  FRNN_DEVICE void look_up(uint8_t (&mask)[together], S (&factor)[together], int first, int j) const {
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      const int row = first_row_ + j * tile_columns + thread_.column<count>(first + i);
      mask[i] = 1;
      factor[i] = {};
      if (!is_live(j, first + i)) continue;
      if (has_mask()) mask[i] = load_streaming(arguments_.steps.mask + row);
      if (wavefront && layer_.factors)
        factor[i] =
            load_streaming(typed<S>(layer_.factors) + int64_t(row) * layer_.factors_stride + thread_.global_unit);
    }
  }

  FRNN_DEVICE S dropout(int j, int i) const {
    const void* const factors = options_now().dropout;
    if (!factors || !owns(j, i)) return narrow<S>(1.0f);
    return typed<S>(factors)[batch_row(j, i) * int64_t(H_) + thread_.global_unit];
  }
  static FRNN_DEVICE S multiplied(S h, S factor) { return narrow<S>(widen(h) * widen(factor)); }

  FRNN_DEVICE void look_up(Draws (&draws)[together], int first, int j) const {
    const PersistentOptions& from = options_now();
    const uint8_t* const marks = arguments_.steps.reset;
    const int B = int(arguments_.steps.B), rows = int(arguments_.steps.T) * B;
    const int byte = thread_.global_unit / 8, bytes = (H_ + 7) / 8;
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      const int row = first_row_ + j * tile_columns + thread_.column<count>(first + i);
      draws[i] = {0, 0, 0, dropout(j, first + i)};
      if (!is_live(j, first + i)) continue;
      // Whether the row begins anew before the step that follows: what goes on from a step is written by it.
      if (marks && (range_.reverse ? row >= B : row + B < rows))
        draws[i].anew = load_streaming(marks + (range_.reverse ? row : row + B));
      if (from.zoneout) draws[i].zoneout = load_streaming(row_at(from.zoneout, row, bytes) + byte);
      if (Cell::has_cell && from.zoneout_cell)
        draws[i].zoneout_cell = load_streaming(row_at(from.zoneout_cell, row, bytes) + byte);
    }
  }

  // h and c of the step, of column first + i, by zoneout.
  FRNN_DEVICE void zone_out(const Columns& work, int i, float& h, float& c) const {
    const PersistentOptions& from = options_now();
    const Draws& draws = work.draws[i];
    const int unit = thread_.global_unit;
    h = Zone<float>(from.zoneout, bit_of(draws.zoneout, unit), from.rate).applied(h, widen(work.h[i]));
    if (Cell::has_cell)
      c = Zone<float>(from.zoneout_cell, bit_of(draws.zoneout_cell, unit), from.cell_rate).applied(c, work.c[i]);
  }
  // What goes on from it.
  FRNN_DEVICE void begin_anew(Columns& work, int i, int j, int first) const {
    work.cell[i] = work.c[i];
    if (!work.lives[i] || !opaque(work.draws[i].anew)) return;
    const int64_t index = batch_row(j, first + i) * int64_t(H_) + thread_.global_unit;
    work.h[i] = options_now().reset_h ? typed<S>(options_now().reset_h)[index] : S{};
    if (Cell::has_cell) work.c[i] = value_or_zero<S>(options_now().reset_c, index);
  }

  // What is there before the products are.
  FRNN_DEVICE void prepare(Columns& work, int first, int j) const {
    const Biases bias = *biases_;
    work.bias_apart = bias.of[3];
    work.row = first_row_ + j * tile_columns;
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      work.h[i] = from_word(states_[state(j, 0, first + i)]);
      work.c[i] = Cell::has_cell ? as_float(states_[state(j, 1, first + i)]) : 0.0f;
      work.lives[i] = is_live(j, first + i);
      FRNN_UNROLL
      for (int gate = 0; gate < gates; ++gate) work.x[i][gate] = widen(projected_[i][gate]) + bias.of[gate];
    }
  }

  FRNN_DEVICE void compute(Columns& work, int first, [[maybe_unused]] int j, int turn) const {
    const char* const part = part_ + (turn & 1) * arguments_.tiling.warps_k * warp_bytes_;
    float product[together][gates], below[together][gates];
    read_sums(product, part, first);
    if (wavefront) read_sums(below, part + product_warps_ * warp_bytes_, first);
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      Real x[gates], r[gates], h, c;
      FRNN_UNROLL
      for (int gate = 0; gate < gates; ++gate) {
        x[gate] = wavefront ? work.x[i][gate] + Real(below[i][gate]) : work.x[i][gate];
        r[gate] = Cell::hidden_bias_apart(gate) ? Real(product[i][gate]) + work.bias_apart : Real(product[i][gate]);
      }
      Cell::template forward<Real>(x, r, widen(work.h[i]), work.c[i], h, c, work.values[i]);
      if constexpr (options && Cell::has_cell)
        if (const float limit = options_now().cell_clip; limit > 0)
          Cell::template clip<Real>(work.values[i], limit, h, c);
      float next_h = float(h), next_c = Cell::has_cell ? float(c) : 0.0f;
      if constexpr (options) zone_out(work, i, next_h, next_c);
      // With a mask the output is the state that is kept.
      work.output[i] = work.keeps[i] ? work.h[i] : narrow<S>(next_h);
      if (work.lives[i] && !work.keeps[i]) {
        work.h[i] = work.output[i];
        if (Cell::has_cell) work.c[i] = next_c;
      }
      if constexpr (options) begin_anew(work, i, j, first);
    }
  }

  FRNN_DEVICE void store(const Columns& work, int first, int j) const {
    const PersistentForward& tensors = layer_now();
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      keep_state(j, first + i, work.h[i], work.c[i]);
      if (!work.lives[i]) continue;
      const int row = work.row + thread_.column<count>(first + i);
      const int unit = thread_.global_unit;
      if (!wavefront || tensors.y) row_at(typed<S>(tensors.y), row, int(tensors.y_stride))[unit] = work.output[i];
      if (Cell::has_cell && tensors.cells)
        store_streaming(row_at(typed<float>(tensors.cells), row, H_) + unit, options ? work.cell[i] : work.c[i]);
      if (saved > 0 && tensors.gates) {
        S* const to = row_at(typed<S>(tensors.gates), row, saved * H_) + unit;
        FRNN_UNROLL
        for (int k = 0; k < saved; ++k)
          store_streaming(to + k * H_, work.keeps[i] ? S{} : narrow<S>(float(work.values[i][k])));
      }
    }
  }

  // Running h and c of the thread's columns, per column tile.
  FRNN_DEVICE int state(int j, int which, int i) const { return ((2 * j + which) * most_columns + i) * gate_threads; }
  FRNN_DEVICE void keep_state(int j, int i, S h, float c) const {
    states_[state(j, 0, i)] = to_word(h);
    if (Cell::has_cell) states_[state(j, 1, i)] = as_word(c);
  }
  static FRNN_DEVICE uint32_t as_word(float x) { return uint32_t(Lanes<float>::bits(x)); }
  static FRNN_DEVICE float as_float(uint32_t x) { return Lanes<float>::from_bits(int32_t(x)); }
  static FRNN_DEVICE uint32_t to_word(S x) {
    if constexpr (sizeof(S) == 2)
      return x.bits;
    else
      return as_word(x);
  }
  static FRNN_DEVICE S from_word(uint32_t x) {
    if constexpr (sizeof(S) == 2)
      return S{uint16_t(x)};
    else
      return as_float(x);
  }

  FRNN_DEVICE void read_sums(float (&sums)[together][gates], const char* part, int first) const {
    const int pair_bytes = arguments_.tiling.pair_stride * int(sizeof(Pair));
    const int column = thread_.column<count>(first);
    // (Threads without a column read what others do.)
    const int pair = column / 2 < arguments_.tiling.sum_pairs ? column / 2 : 0;
    const char* const from = part + pair * pair_bytes;
    if constexpr (together == 1) {
      add_parts(sums[0], from + column % 2 * int(sizeof(float)), warp_bytes_, product_warps_);
    } else {
      Pair pairs[gates];
      add_parts(pairs, from, warp_bytes_, product_warps_);
      FRNN_UNROLL
      for (int gate = 0; gate < gates; ++gate) {
        sums[0][gate] = pairs[gate].v[0];
        sums[1][gate] = pairs[gate].v[1];
      }
    }
  }

  FRNN_DEVICE void go_to_step(int s) {
    const StepRows rows = rows_of_steps_.at(s, num_steps_, arguments_.steps, [&](int s) { return range_.time_of(s); });
    first_row_ = rows.first + place_.first_column;
    const int live = rows.live - place_.first_column;
    limit_ = !thread_.exists ? 0 : live < place_.columns ? live : place_.columns;
  }

  // Projections of column tile j, of the step that go_to_step came to: of as many columns as are computed together.
  // Those after them are fetched while these are computed, from L2.
  FRNN_DEVICE void fetch(int first, int j) {
    const PersistentForward& tensors = layer_now();
    if (wavefront && !tensors.projection) return;
    FRNN_UNROLL_BY(unrolled)
    for (int i = first; i < (first == 0 ? columns() : first + together); ++i) {
      const int slot = together == 1 ? 0 : i - first;
      if (!is_live(j, i)) continue;
      const int row = first_row_ + j * tile_columns + thread_.column<count>(i);
      const S* const from =
          row_at(typed<S>(tensors.projection), row, int(tensors.projection_stride)) + thread_.global_unit;
      FRNN_UNROLL
      for (int gate = 0; gate < gates; ++gate) {
        if (i - first < together)
          projected_[slot][gate] = load_streaming(from + gate * H_);
        else
          prefetch_l2(from + gate * H_);
      }
    }
  }

  const ForwardArguments& arguments_;
  const PersistentForward& layer_;
  const Place& place_;
  const GateThread& thread_;
  const ForwardSteps& range_;
  const int num_steps_;
  StateSender<Product, wavefront, counted> exchange_;
  const int H_;
  const int product_warps_, warp_bytes_;
  const char* const part_;
  uint32_t* const states_;
  Biases* const biases_;
  RowsOfSteps rows_of_steps_;
  // Of the step whose projections are here; the thread's columns from limit_ on have no live row.
  int first_row_ = 0, limit_ = 0;
  S projected_[together][gates] = {};
};

// What the multiplying warps do: W_hh, and with `below` W_ih, of the block's units.
template <class Product, class Cell, int row_tiles, int register_slabs, bool wavefront>
class ForwardProducts {
  using S = typename Product::Storage;
  static constexpr int gates = Cell::gates;

 public:
  FRNN_DEVICE ForwardProducts(const ForwardArguments& arguments, const PersistentForward& layer, const Place& place)
      : arguments_(arguments), place_(place) {
    const Tiling& tiling = arguments.tiling;
    const int64_t H = arguments.hidden_size;
    const int g = lane_index() / 4;
    const int row_group = warp_index() % tiling.warps_rows, k_group = warp_index() / tiling.warps_rows;
    const int total_slabs = (place.total_octets * 8 / Product::per_chunk + slab_chunks - 1) / slab_chunks;
    // Warps that share the k of one product, and of which: W_ih's come after W_hh's.
    const int product_warps = wavefront ? tiling.warps_k / 2 : tiling.warps_k;
    const bool takes_below = wavefront && k_group >= product_warps;
    const int k_of_product = takes_below ? k_group - product_warps : k_group;
    const int rest = takes_below && place.layer == 0 ? 0 : total_slabs - k_of_product * tiling.slabs;
    slabs_ = rest < tiling.slabs ? rest < 0 ? 0 : rest : tiling.slabs;  // none, or less, for the last warps
    const int first_slab = slabs_ > 0 ? k_of_product * tiling.slabs : 0;
    first_operand_ = (takes_below ? total_slabs + first_slab : first_slab) * slab_bytes + Product::lane_offset();
    const S* const w = typed<S>(takes_below ? layer.w_ih : layer.w_hh);
    const int stored_slabs = tiling.slabs > register_slabs ? tiling.slabs - register_slabs : 0;
    stored_ = shared_memory() + tiling.weights + warp_index() * stored_slabs * row_tiles * tile_bytes;
    partial_ = reinterpret_cast<Pair*>(shared_memory() + tiling.sums) +
               (k_group * tiling.sum_pairs + lane_index() % 4) * tiling.pair_stride +
               2 * row_group * row_tiles * half_tile_pairs + g;
    const auto weight = [&](int half, int chunk) {
      const int octet = half / gates, gate = half % gates;
      const int64_t unit = int64_t(place.first_octet + octet) * 8 + g;
      if (octet >= place.octets || unit >= H) return Chunk{};
      return load_row_chunk<Product>(w + (gate * H + unit) * H, int64_t(chunk) * Product::per_chunk, H);
    };
    // A slab of row tiles at a time goes through shared memory: in one loop it takes few registers beside those that it
    // fills.
    char* const staged = shared_memory() + tiling.sums + warp_index() * row_tiles * tile_bytes;
    const auto stage = [&](char* to, int r) {
      FRNN_NO_UNROLL
      for (int m = 0; m < row_tiles; ++m) {
        uint32_t a[8];
        load_tile(a, weight, row_group * row_tiles + m, first_slab + r);
        store_tile(to + m * tile_bytes, a);
      }
    };
    FRNN_UNROLL
    for (int r = 0; r < register_slabs; ++r) {
      if (r < slabs_) stage(staged, r);
      FRNN_UNROLL
      for (int m = 0; m < row_tiles; ++m) {
        FRNN_UNROLL
        for (int w = 0; w < 8; ++w) resident_[r][m][w] = 0;
        if (r < slabs_) fetch_tile(resident_[r][m], staged + m * tile_bytes);
      }
    }
    meet_multipliers();  // from here on, other things stand there
    for (int r = register_slabs; r < slabs_; ++r) stage(stored_ + (r - register_slabs) * row_tiles * tile_bytes, r);
  }

  // f(Count<n>{}) with the number of this warp's slabs along k, or -1: see multiply.
  // That is a loop for every number, which the slower exchanges are not worth, nor warps that have both roles.
  template <bool counted, class F>
  FRNN_DEVICE void with_slabs(const F& f) const {
    if constexpr (two_roles && counted && Product::is_straight)
      with_number<0, 2 * register_slabs>(slabs_, f);
    else
      f(Count<-1>{});
  }

  // Products of step s, column tile j, by a warp with n slabs.
  template <int n, class Receiver>
  FRNN_DEVICE void step(Receiver& exchange, int s, int j, int turn) const {
    // phase: wait
    const int columns = place_.columns_of(j);
    wait_until_free(turn);
    const char* const operand = exchange.wait(s, j) + first_operand_;
    // phase: products
    typename Product::Sums sums[row_tiles];
    multiply<n>(sums, operand, columns);
    exchange.was_read(s, j);
    // phase: partial sums
    Pair* const partial =
        partial_ + (turn & 1) * arguments_.tiling.warps_k * arguments_.tiling.sum_pairs * arguments_.tiling.pair_stride;
    const bool has_columns = 2 * (lane_index() % 4) < columns;
    FRNN_UNROLL
    for (int m = 0; m < row_tiles; ++m) {
      const TileSums tile = sums[m].result();
      FRNN_UNROLL
      for (int half = 0; half < 2; ++half)
        if (has_columns) partial[(2 * m + half) * half_tile_pairs] = tile.row[half];
    }
    // phase: barrier
    hand_over(filled + (turn & 1));
  }

  // phase: end
 private:
  template <int n>
  FRNN_DEVICE void multiply(typename Product::Sums (&sums)[row_tiles], const char* operand, int columns) const {
    const bool loads = lane_index() / 4 < columns;
    if constexpr (n >= 0) {
      // Straight through. Two sets of sums where there is little to multiply: its time is that of a chain of sums. With
      // more, the two warps of a scheduler between them keep the matrix units busy.
      constexpr int in_registers = n < register_slabs ? n : register_slabs, in_shared = n - in_registers;
      constexpr int sets = n > 1 && n < register_slabs ? 2 : 1;
      typename Product::Sums more[row_tiles];
      // One slab ahead, so that its latency is not waited for.
      auto next = Product::operand(operand, loads);
      FRNN_UNROLL
      for (int r = 0; r < in_registers; ++r) {
        const auto b = next;
        if (r < in_shared) {
          const auto stored_b = Product::operand(operand + (register_slabs + r) * slab_bytes, loads);
          FRNN_UNROLL
          for (int m = 0; m < row_tiles; ++m) {
            uint32_t a[8];
            fetch_tile(a, stored_ + (r * row_tiles + m) * tile_bytes);
            if (m == row_tiles - 1 && r + 1 < in_registers)
              next = Product::operand(operand + (r + 1) * slab_bytes, loads);
            sums[m].add(resident_[r][m], b, columns);
            sums[m].add(a, stored_b, columns);
          }
        } else {
          if (r + 1 < in_registers) next = Product::operand(operand + (r + 1) * slab_bytes, loads);
          FRNN_UNROLL
          for (int m = 0; m < row_tiles; ++m) (r % sets ? more : sums)[m].add(resident_[r][m], b, columns);
        }
      }
      if (sets == 2) {
        FRNN_UNROLL
        for (int m = 0; m < row_tiles; ++m) sums[m].add(more[m]);
      }
    } else {
      FRNN_UNROLL
      for (int r = 0; r < register_slabs; ++r) {
        if (r >= slabs_) break;
        const auto b = Product::operand(operand + r * slab_bytes, loads);
        FRNN_UNROLL
        for (int m = 0; m < row_tiles; ++m) sums[m].add(resident_[r][m], b, columns);
      }
      FRNN_NO_UNROLL
      for (int r = register_slabs; r < slabs_; ++r) {
        const auto b = Product::operand(operand + r * slab_bytes, loads);
        FRNN_UNROLL
        for (int m = 0; m < row_tiles; ++m) {
          uint32_t a[8];
          fetch_tile(a, stored_ + ((r - register_slabs) * row_tiles + m) * tile_bytes);
          sums[m].add(a, b, columns);
        }
      }
    }
  }

  const ForwardArguments& arguments_;
  const Place& place_;
  int slabs_, first_operand_;
  char* stored_;
  Pair* partial_;
  uint32_t resident_[register_slabs][row_tiles][8];
};

template <class Product, class Cell, int row_tiles, int register_slabs, bool wavefront>
__global__ void __launch_bounds__(kernel_threads, 1)
    persistent_forward_kernel(const __grid_constant__ ForwardArguments arguments) {
#if !defined(FRNN_CUDA_CLUSTERS)
  if constexpr (wavefront) return;
#endif
  using Products = ForwardProducts<Product, Cell, row_tiles, register_slabs, wavefront>;
  const Tiling& tiling = arguments.tiling;
  const Place place(tiling, arguments.hidden_size, arguments.steps.B, wavefront);
  const PersistentForward& layer = arguments.part[place.part()];
  const ForwardSteps range(arguments, layer, place);
  const int num_steps = range.count(), tiles = place.column_tiles;
  const bool idle = place.rank >= tiling.active;
  if (idle) {  // nothing to do, but the cluster's barriers count this block
    meet_writers(tiling);
    for (int s = 0; s < num_steps && tiling.exchange == Exchange::barriers; ++s) meet_cluster(tiling);
    meet_cluster(tiling);
    return;
  }
  const auto every_turn = [&](const auto& step) {
    int turn = 0;
    for (int s = 0; s < num_steps; ++s)
      for (int j = 0; j < tiles; ++j) step(s, j, turn++);
  };
  const auto do_gates = [&](auto counted, const auto& f) {
    const int columns = place.columns_of(0);
    const int a_thread = GateThread(place, arguments.hidden_size).columns_a_thread(columns);
    with_count<wavefront>(a_thread, layer.options.any, [&](auto count) {
      const GateThread thread(place, arguments.hidden_size);
      f(ForwardGates<Product, Cell, wavefront, decltype(counted)::value, decltype(count)::value>(arguments, layer,
                                                                                                 place, thread, range));
    });
  };
  if constexpr (two_roles) {
    if (thread_index() < multiply_threads) {
      raise_registers<multiply_registers<Product, false, wavefront>>();
      const Products products(arguments, layer, place);
      with_exchange<wavefront>(tiling, [&](auto counted) {
        StateReceiver<Product, wavefront, decltype(counted)::value> exchange(tiling, place, arguments.workspace,
                                                                             num_steps);
        exchange.begin();
        meet_writers(tiling);
        exchange.was_read(-1, tiles - 1);
        products.template with_slabs<decltype(counted)::value>([&](auto n) {
          every_turn([&](int s, int j, int turn) { products.template step<decltype(n)::value>(exchange, s, j, turn); });
        });
        end_turns(num_steps * tiles);
      });
    } else {
      lower_registers<gate_registers<Product, false, wavefront>>();
      with_exchange<wavefront>(tiling, [&](auto counted) {
        do_gates(counted, [&](auto gates) {
          gates.begin();
          meet_writers(tiling);
          gates.send_initial();
          every_turn([&](int s, int j, int turn) { gates.step(s, j, turn); });
          gates.end();
        });
      });
    }
  } else {
    const Products products(arguments, layer, place);
    with_exchange<wavefront>(tiling, [&](auto counted) {
      StateReceiver<Product, wavefront, decltype(counted)::value> exchange(tiling, place, arguments.workspace,
                                                                           num_steps);
      exchange.begin();
      do_gates(counted, [&](auto gates) {
        gates.begin();
        meet_writers(tiling);
        gates.send_initial();
        products.template with_slabs<decltype(counted)::value>([&](auto n) {
          every_turn([&](int s, int j, int turn) {
            products.template step<decltype(n)::value>(exchange, s, j, turn);
            gates.step(s, j, turn);
          });
        });
        gates.end();
      });
    });
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
