// All steps of a layer in one launch, backward: the gradients of the gates, which the products for the weights' and the
// input's gradients follow.
//
// A step of a column tile, in each block of a team. The gates' warps wait for the gradient of h that comes through W_hh
// (SumReceiver), turn it into the gradients of the block's gates and leave these in shared memory; storing them and
// fetching what the next step wants is theirs too. The multiplying warps multiply the resident columns of W_hh (all
// units times the block's gates) by them, and send each unit's partial sum to the block that owns the unit (SumSender),
// which adds up what it gets in the order of the blocks.
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
// e % 2 of their receiver; two are enough for the reasons given at StateBuffers: a block sends for e + 1 when it has
// all of e, which every block sent after it had read e - 1.
//
// In a wavefront the sums of step e of the layer above stand beside them, after all of the block's own layer. The layer
// above waits for nothing that this one computes: a credit, an arrival at an mbarrier of each block above, says that
// exchange e has been read, and lets the sums of step e + 2 be sent.
template <bool wavefront>
class SumBuffers {
 public:
  FRNN_DEVICE SumBuffers(const Tiling& tiling, const Place& place, char* workspace, int steps, int exchanges)
      : tiling_(tiling),
        place_(place),
        workspace_(workspace),
        steps_(steps),
        exchanges_(exchanges),
        pairs_(((tiling.columns < tile_columns ? tiling.columns : tile_columns) + 1) / 2),
        buffer_bytes_((wavefront ? 2 : 1) * tiling.active * pairs_ * place.units * int(sizeof(Pair))) {
    if (!wavefront && tiling.exchange == Exchange::memory) {
      first_tile_ = place.team_index(tiling) * tiling.column_tiles;
      memory_at_ = int(counter_bytes(int64_t(grid_y()) * tiling.teams * tiling.column_tiles));
    }
  }

 protected:
  FRNN_DEVICE bool has_above() const { return wavefront && place_.layer + 1 < tiling_.layers; }
  FRNN_DEVICE bool has_below() const { return wavefront && place_.layer > 0; }
  FRNN_DEVICE int offset(int source, int pair, int unit) const {
    return ((source * pairs_ + pair) * place_.units + unit) * int(sizeof(Pair));
  }
  FRNN_DEVICE char* shared(int j, int parity) const {
    return shared_memory() + tiling_.received + (2 * j + parity) * buffer_bytes_;
  }
  // In the workspace: the counter of a column tile, and what goes to one of its blocks.
  FRNN_DEVICE uint32_t* counter(int j) const { return reinterpret_cast<uint32_t*>(workspace_) + first_tile_ + j; }
  FRNN_DEVICE char* global(int j, int parity, int owner) const {
    return workspace_ + memory_at_ + (int64_t(2 * (first_tile_ + j) + parity) * tiling_.active + owner) * buffer_bytes_;
  }
#if defined(FRNN_CUDA_CLUSTERS)
  FRNN_DEVICE Mbarrier* barriers() const { return reinterpret_cast<Mbarrier*>(shared_memory() + tiling_.barriers); }
  FRNN_DEVICE Mbarrier* credits() const { return reinterpret_cast<Mbarrier*>(shared_memory() + tiling_.credits); }
#endif
  // Of exchange e: from how many blocks sums come, and how many bytes.
  FRNN_DEVICE int sources_of(int e) const {
    const int own = !wavefront || e > 0 ? tiling_.active : 0;
    return has_above() && e < steps_ ? own + tiling_.active : own;
  }
  FRNN_DEVICE int bytes(int e, int j) const {
    return sources_of(e) * ((place_.columns_of(j) + 1) / 2) * place_.octets * 8 * int(sizeof(Pair));
  }
  // With one role, those who meet at a barrier of the cluster do so once for both.
  FRNN_DEVICE bool meets_for_itself() const { return two_roles && tiling_.exchange == Exchange::barriers; }

  const Tiling& tiling_;
  const Place& place_;
  char* const workspace_;
  const int steps_, exchanges_, pairs_, buffer_bytes_;
  int first_tile_ = 0, memory_at_ = 0;
};

// The gates' side.
template <bool wavefront, bool counted>
class SumReceiver : public SumBuffers<wavefront> {
  using SumBuffers<wavefront>::tiling_;
  using SumBuffers<wavefront>::place_;
  using SumBuffers<wavefront>::steps_;
  using SumBuffers<wavefront>::exchanges_;
  using SumBuffers<wavefront>::pairs_;

 public:
  using SumBuffers<wavefront>::SumBuffers;

  // Whether there is anything to wait for before step e.
  FRNN_DEVICE bool exists(int e) const { return e > 0 || this->has_above(); }

  FRNN_DEVICE void wait(int e, int j, int thread) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (counted) {
      mbarrier_wait(&this->barriers()[2 * j + (e & 1)], ((this->has_above() ? e : e - 1) >> 1) & 1);
      return;
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
        if (thread == 0) wait_until_at_least(this->counter(j), uint32_t(e) * uint32_t(tiling_.active));
        meet_gate_warps();
        break;
      default: break;
    }
  }

  // Step e is done with what came for it; off the path of those who wait for this block.
  FRNN_DEVICE void was_read(int e, int j, int thread) {
#if defined(FRNN_CUDA_CLUSTERS)
    if (counted) {
      if (exists(e) && thread == 0 && e + 2 <= exchanges_)
        mbarrier_arrive_expect(&this->barriers()[2 * j + (e & 1)], this->bytes(e + 2, j));
      return;
    }
    if (this->meets_for_itself() && j == place_.column_tiles - 1 && e < exchanges_) cluster_arrive();
#endif
  }

  // What this block's layer and the layer above sent for a unit and one or two columns, as T (float or Pair), added up.
  // All threads of the gates come here.
  template <class T>
  FRNN_DEVICE void sum(int e, int j, int column, int unit, bool exists, T& own, T& above) const {
    own = above = T{};
    if (!wavefront && !counted && tiling_.exchange == Exchange::memory) {
      // `turn`s of two buffers: see split_sum.
      if (exists)
        for (int i = 0; i < tiling_.source_split; ++i)
          own = own + *reinterpret_cast<const T*>(split_part(j, e, i, column, unit));
      return;
    }
    if (!exists) return;
    const int stride = this->offset(1, 0, 0), active = tiling_.active;
    const char* const part =
        this->shared(j, e & 1) + this->offset(0, column / 2, unit) + column % 2 * int(sizeof(float));
    if (!wavefront || e > 0) add_sources(own, part, stride, active);
    if (this->has_above() && e < steps_) add_sources(above, part + active * stride, stride, active);
  }

  // With Exchange::memory, before sum: threads share the sums over many blocks, which come from L2. They have two
  // buffers: who is a sum ahead has met those that still read here.
  FRNN_DEVICE void split_sum(int e, int j, int thread) const {
    if (wavefront || counted || tiling_.exchange != Exchange::memory) return;
    const int columns = place_.columns_of(j), split = tiling_.source_split, owners = pairs_ * place_.units;
    const int stride = this->offset(1, 0, 0);
    for (int item = thread; item < owners * split; item += gate_threads) {
      const int i = item / owners, pair = item % owners / place_.units, unit = item % place_.units;
      if (2 * pair >= columns || unit / 8 >= place_.octets) continue;
      const int first = tiling_.active * i / split, end = tiling_.active * (i + 1) / split;
      // Eight on their way at a time: each takes as long as all of them.
      constexpr int batch = 8;
      const char* part = this->global(j, e & 1, place_.rank) + this->offset(first, pair, unit);
      Pair total = {};
      FRNN_NO_UNROLL
      for (int source = first; source < end; source += batch, part += batch * stride) {
        Pair parts[batch] = {};
        FRNN_UNROLL
        for (int k = 0; k < batch; ++k)
          if (source + k < end) parts[k] = load_l2(reinterpret_cast<const Pair*>(part + k * stride));
        FRNN_UNROLL
        for (int k = 0; k < batch; ++k) total = total + parts[k];
      }
      *reinterpret_cast<Pair*>(split_part(j, e, i, 2 * pair, unit)) = total;
    }
    meet_gate_warps();
  }

 private:
  // Where a sum over a part of the blocks stands. Buffers take turns over all column tiles.
  FRNN_DEVICE char* split_part(int j, int e, int i, int column, int unit) const {
    const int turn = (e * place_.column_tiles + j) & 1;
    return shared_memory() + tiling_.sums +
           (((turn * tiling_.source_split + i) * pairs_ + column / 2) * place_.units + unit) * int(sizeof(Pair)) +
           column % 2 * int(sizeof(float));
  }

  // Of a full team, where there are registers for all, in pairs, pairs of pairs and so on, without a branch, so that
  // all loads overlap; of a smaller one in their order, four at a time.
  template <class T>
  static FRNN_DEVICE void add_sources(T& total, const char* part, int stride, int count) {
    constexpr int most = wavefront ? 8 : 16, together = 4;
    if (!two_roles) {
      FRNN_UNROLL
      for (int i = 0; i < most; ++i)
        if (i < count) total = total + *reinterpret_cast<const T*>(part + i * stride);
      return;
    }
    if (sizeof(T) == sizeof(float) && count == most) {
      T parts[most];
      FRNN_UNROLL
      for (int i = 0; i < most; ++i) parts[i] = *reinterpret_cast<const T*>(part + i * stride);
      FRNN_UNROLL
      for (int step = 1; step < most; step *= 2) {
        FRNN_UNROLL
        for (int i = 0; i < most; i += 2 * step) parts[i] = parts[i] + parts[i + step];
      }
      total = parts[0];
      return;
    }
    FRNN_NO_UNROLL
    for (int first = 0; first < count; first += together, part += together * stride) {
      T parts[together];
      FRNN_UNROLL
      for (int i = 0; i < together; ++i)
        parts[i] = *reinterpret_cast<const T*>(part + (first + i < count ? i * stride : 0));
      FRNN_UNROLL
      for (int i = 0; i < together; ++i) total = first + i < count ? total + parts[i] : total;
    }
  }
};

#if defined(FRNN_CUDA_CLUSTERS)
// Where the sums of an octet go: unit 0, columns 0 and 1, in the first buffer of the block that owns it, and that
// block's first mbarrier.
struct alignas(8) Target {
  RemoteAddress sums, barrier;
};
#endif

// The multiplying warps' side.
template <bool wavefront, bool counted>
class SumSender : public SumBuffers<wavefront> {
  using SumBuffers<wavefront>::tiling_;
  using SumBuffers<wavefront>::place_;
  using SumBuffers<wavefront>::steps_;
  using SumBuffers<wavefront>::exchanges_;
  using SumBuffers<wavefront>::buffer_bytes_;

 public:
  using SumBuffers<wavefront>::SumBuffers;

  // Barriers, and the table of targets. The caller meets all who write there before the first step.
  FRNN_DEVICE void begin() const {
#if defined(FRNN_CUDA_CLUSTERS)
    if (!counted) return;
    if (thread_index() == 0) {
      for (int i = 0; i < 2 * place_.column_tiles; ++i) {
        mbarrier_init(&this->barriers()[i], 1);
        if (wavefront) mbarrier_init(&this->credits()[i], tiling_.active);
      }
      fence_mbarrier_init();
      // Exchange 0 is from the layer above alone, and without one there is none.
      for (int i = 0; i < 2 * place_.column_tiles; ++i)
        mbarrier_arrive_expect(&this->barriers()[i], this->bytes(i % 2 == 1 ? 1 : this->has_above() ? 0 : 2, i / 2));
    }
    FRNN_NO_UNROLL
    for (int i = thread_index(); i < (this->has_below() ? 2 : 1) * place_.total_octets; i += multiply_threads) {
      const bool below = i >= place_.total_octets;
      const int octet = below ? i - place_.total_octets : i, owner = octet / tiling_.octets;
      const int block = wavefront ? (place_.layer - int(below)) * tiling_.active + owner : owner;
      const int at =
          this->offset(below ? tiling_.active + place_.rank : place_.rank, 0, (octet - owner * tiling_.octets) * 8);
      targets()[i] = {remote_address(this->shared(0, 0) + at, block), remote_address(this->barriers(), block)};
    }
#endif
  }

  // Before a step.
  FRNN_DEVICE void begin_step(int s, int j) const {
#if defined(FRNN_CUDA_CLUSTERS)
    if (!counted && this->meets_for_itself() && s > 0 && j == 0) cluster_keep_up();
#endif
  }
  FRNN_DEVICE void end() const {
#if defined(FRNN_CUDA_CLUSTERS)
    if (!counted && this->meets_for_itself() && exchanges_ == steps_ && steps_ > 0) cluster_keep_up();
#endif
  }

  // All warps of the gates have read exchange e.
  FRNN_DEVICE void give_credit(int e, int j) const {
#if defined(FRNN_CUDA_CLUSTERS)
    if (!wavefront || !this->has_above() || e + 2 >= steps_ || thread_index() >= tiling_.active) return;
    mbarrier_arrive_remote(
        remote_address(&this->credits()[2 * j + (e & 1)], (place_.layer + 1) * tiling_.active + thread_index()));
#endif
  }

  // Until the layer below can take the sums of step e. Not for warps that have none: without those the layer below goes
  // on, and its next credit but one has this one's parity.
  FRNN_DEVICE void wait_for_credit(int e, int j) const {
#if defined(FRNN_CUDA_CLUSTERS)
    if (wavefront && e >= 2 && 2 * warp_index() < place_.total_octets)
      mbarrier_wait(&this->credits()[2 * j + (e & 1)], ((e - 2) >> 1) & 1);
#endif
  }

  // Where a row tile's sums go (half tiles are two octets from `octet`), to be looked up before they are there.
  struct Targets {
#if defined(FRNN_CUDA_CLUSTERS)
    Target of[2];
#endif
  };
  FRNN_DEVICE void look_up(Targets& to, int octet, bool to_below) const {
#if defined(FRNN_CUDA_CLUSTERS)
    FRNN_UNROLL
    for (int half = 0; counted && half < 2; ++half) {
      const int known = octet + half < place_.total_octets ? octet + half : 0;
      to.of[half] = targets()[(to_below ? place_.total_octets : 0) + known];
    }
#endif
  }

  // The sums themselves, of which this lane has rows g and g + 8 and the columns of a pair: for exchange e of its own
  // layer, or of the one below.
  FRNN_DEVICE void send(int e, int j, int octet, int g, int pair, const TileSums& tile, const Targets& to) const {
    if (2 * pair >= place_.columns_of(j)) return;
    const int parity = e & 1;
    FRNN_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (octet + half >= place_.total_octets) continue;
#if defined(FRNN_CUDA_CLUSTERS)
      if (counted) {
        const int at = (2 * j + parity) * buffer_bytes_ + this->offset(0, pair, g);
        store_async(to.of[half].sums + at, tile.row[half],
                    to.of[half].barrier + (2 * j + parity) * int(sizeof(Mbarrier)));
        continue;
      }
#endif
      const int owner = (octet + half) / tiling_.octets;
      const int at = this->offset(place_.rank, pair, (octet + half - owner * tiling_.octets) * 8 + g);
      switch (tiling_.exchange) {
        case Exchange::none: *reinterpret_cast<Pair*>(this->shared(j, parity) + at) = tile.row[half]; break;
#if defined(FRNN_CUDA_CLUSTERS)
        case Exchange::barriers:
          store_remote(remote_address(this->shared(j, parity) + at, owner), tile.row[half]);
          break;
#endif
        case Exchange::memory:
          store_l2(reinterpret_cast<Pair*>(this->global(j, parity, owner) + at), tile.row[half]);
          break;
        default: break;
      }
    }
  }

  // After the block's sends of a column tile.
  FRNN_DEVICE void sent(int j) const {
    if (counted) return;
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
        meet_multipliers();
        if (thread_index() == 0) add_release(this->counter(j), 1);
        break;
      default: break;
    }
  }

 private:
#if defined(FRNN_CUDA_CLUSTERS)
  FRNN_DEVICE Target* targets() const { return reinterpret_cast<Target*>(shared_memory() + tiling_.targets); }
#endif
};

// The steps of a launch, as a team sees them: s runs backward in its direction's time.
struct BackwardSteps {
  int count;
  bool reverse;
  FRNN_DEVICE BackwardSteps(const BackwardArguments& arguments, const Place& place)
      : count(live_steps(arguments.steps, place.first_column)), reverse(place.direction == 1) {}
  FRNN_DEVICE int time_of(int s) const { return reverse ? s : count - 1 - s; }
};

// What the gates' warps do.
template <class Product, class Cell, bool wavefront, bool counted, int count>
class BackwardGates {
  using S = typename Product::Storage;
  using Real = typename Product::Real;
  static constexpr int gates = Cell::gates, saved = Cell::saved, grad_gates = Cell::grad_gates;
  static constexpr int per_chunk = Product::per_chunk;
  // Which h the cell's formula reads: its own, where nothing else is saved; that of the step before, in a cell that
  // keeps it in part; none beside a cell state.
  static constexpr bool reads_h = saved == 0, reads_previous_h = saved > 0 && !Cell::has_cell;
  // Columns whose arithmetic overlaps: as many as there are registers for.
  static constexpr int together = count > 1 && counted && !wavefront ? 2 : 1;
  static constexpr bool at_once = count > 0 && count <= together;
  static constexpr bool options = count == 0;
  static constexpr int unrolled = options ? 1 : count, most_columns = options ? GateThread::most_columns : count;

 public:
  // Gate gradients that W_hh^T and W_ih^T multiply: where they differ, the second have an operand of their own.
  static constexpr int operands_of_step = wavefront && grad_gates > gates ? 2 : 1;

  FRNN_DEVICE BackwardGates(const BackwardArguments& arguments, const PersistentBackward& layer, const Place& place,
                            const GateThread& thread, const BackwardSteps& range, int exchanges)
      : arguments_(arguments),
        layer_(layer),
        place_(place),
        thread_(thread),
        range_(range),
        exchange_(arguments.tiling, place, arguments.workspace, range.count, exchanges),
        H_(int(arguments.hidden_size)),
        states_(reinterpret_cast<float*>(shared_memory() + arguments.tiling.states) + thread.index) {}

  // The gradients of the last states, and what the first step wants from memory.
  FRNN_DEVICE void begin() {
    for (int j = 0; j < place_.column_tiles; ++j) {
      FRNN_UNROLL_BY(unrolled)
      for (int i = 0; i < columns(); ++i) {
        float dh = 0, dc = 0;
        if (owns(j, i)) {
          const int64_t index = batch_row(j, i) * int64_t(H_) + thread_.global_unit;
          dh = value_or_zero<S>(layer_.grad_h_n, index);
          if (Cell::has_cell) dc = value_or_zero<S>(layer_.grad_c_n, index);
        }
        keep_state(j, i, dh, dc);
      }
    }
    previous_ = rows_at(0);
    go_to_step(0);
    fetch(0, 0);
  }

  // Gates of step s, column tile j. All threads of the role come here.
  FRNN_DEVICE void step(int s, int j, int turn) {
    // phase: loop
    Columns work;
    wait_until_free(turn);
    uint8_t mask[together];
    Handed handed_back[together];
    look_up(mask, 0, j);
    if constexpr (options) look_up(handed_back, s, 0, j);
    if (two_roles && at_once) prepare(work, j, 0);
    // phase: wait
    if (exchange_.exists(s)) {
      exchange_.wait(s, j, thread_.index);
      exchange_.split_sum(s, j, thread_.index);
    }
    // phase: gates
    FRNN_UNROLL_BY(unrolled)
    for (int first = 0; first < columns(); first += together) {
      if (!two_roles || !at_once) prepare(work, j, first);
      FRNN_UNROLL
      for (int i = 0; i < together; ++i) {
        work.keeps[i] = has_mask() && !opaque(mask[i]);
        if constexpr (options) work.handed_back[i] = handed_back[i];
      }
      if (first + together < columns()) {
        look_up(mask, first + together, j);
        if constexpr (options) look_up(handed_back, s, first + together, j);
        fetch(first + together, j);
      }
      compute(work, s, j, first);
      write_operand(work, j, first, turn);
      // phase: stores
      if (!at_once) store(work, j, first);
    }
    // phase: barrier
    hand_over(filled + (turn & 1));
    // phase: sends
    exchange_.was_read(s, j, thread_.index);

    // phase: prefetch
    // What comes next before what is kept: it takes longest.
    const bool last_tile = j + 1 == place_.column_tiles;
    if (last_tile) go_to_step(s + 1);
    fetch(0, last_tile ? 0 : j + 1);
    // phase: stores
    if (at_once) store(work, j, 0);
  }

  // phase: end
  // The gradients of the initial states.
  FRNN_DEVICE void end() {
    for (int j = 0; j < place_.column_tiles; ++j) {
      if (layer_.grad_h0 && range_.count > 0) {
        exchange_.wait(range_.count, j, thread_.index);
        exchange_.split_sum(range_.count, j, thread_.index);
      }
      FRNN_UNROLL_BY(unrolled)
      for (int i = 0; i < columns(); ++i) {
        const bool mine = owns(j, i);
        float received = 0, above = 0;
        if (layer_.grad_h0 && range_.count > 0)
          exchange_.sum(range_.count, j, thread_.column<count>(i), thread_.unit, mine, received, above);
        if (!mine) continue;
        const int64_t index = batch_row(j, i) * int64_t(H_) + thread_.global_unit;
        float dh = states_[state(j, 0, i)] + received, dc = Cell::has_cell ? states_[state(j, 1, i)] : 0.0f;
        if constexpr (options) {
          dh = states_[state(j, 0, i)] + received * dropout(j, i);
          // Marks before the first step are those of time 0; there are none after the last.
          const uint8_t* const marks = arguments_.steps.reset;
          if (marks && !range_.reverse && marks[batch_row(j, i)]) end_gradients(index, dh, dc);
        }
        if (layer_.grad_h0) typed<S>(layer_.grad_h0)[index] = narrow<S>(dh);
        if (Cell::has_cell && layer_.grad_c0) typed<S>(layer_.grad_c0)[index] = narrow<S>(dc);
      }
    }
  }

 private:
  FRNN_DEVICE const PersistentBackward& layer_now() const {
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

  // What of the gradients of h and c stays in the block, of the thread's columns, per column tile.
  FRNN_DEVICE int state(int j, int which, int i) const { return ((2 * j + which) * most_columns + i) * gate_threads; }
  FRNN_DEVICE void keep_state(int j, int i, float dh, float dc) const {
    states_[state(j, 0, i)] = dh;
    if (Cell::has_cell) states_[state(j, 1, i)] = dc;
  }

  FRNN_DEVICE StepRows rows_at(int s) {
    return rows_of_steps_.at(s, range_.count, arguments_.steps, [&](int step) { return range_.time_of(step); });
  }
  // The step whose saved values are fetched next. The one before it in its direction's time is the next to come.
  FRNN_DEVICE void go_to_step(int s) {
    const StepRows rows = previous_;
    previous_ = rows_at(s + 1);
    if constexpr (options) later_limit_ = s == 0 ? 0 : limit_;
    first_row_ = rows.first + place_.first_column;
    limit_ = limit_of(rows.live);
  }
  FRNN_DEVICE int limit_of(int live) const {
    const int mine = live - place_.first_column;
    return !thread_.exists ? 0 : mine < place_.columns ? mine : place_.columns;
  }

  // What was saved of column tile j of the step that go_to_step came to: of as many columns as are computed together.
  // Those after them are fetched while these are computed, from L2.
  FRNN_DEVICE void fetch(int first, int j) {
    const PersistentBackward& tensors = layer_now();
    const int unit = thread_.global_unit;
    FRNN_UNROLL_BY(unrolled)
    for (int i = first; i < (first == 0 ? columns() : first + together); ++i) {
      const int slot = together == 1 ? 0 : i - first;
      if (!is_live(j, i)) continue;
      const int at = j * tile_columns + thread_.column<count>(i);
      const int row = first_row_ + at, previous_row = previous_.first + place_.first_column + at;
      const S* const values = row_at(typed<S>(tensors.gates), row, saved * H_) + unit;
      if (i - first >= together) {
        FRNN_UNROLL
        for (int k = 0; k < saved; ++k) prefetch_l2(values + k * H_);
        if (Cell::has_cell) prefetch_l2(row_at(typed<float>(tensors.cells), row, H_) + unit);
        continue;
      }
      Saved& to = saved_[slot];
      const bool begins = at >= limit_of(previous_.live);
      const int64_t initial = int64_t(place_.first_column + at) * H_ + unit;
      FRNN_UNROLL
      for (int k = 0; k < saved; ++k) to.values[k] = load_streaming(values + k * H_);
      if (Cell::has_cell) {
        to.cell = load_streaming(row_at(typed<float>(tensors.cells), row, H_) + unit);
        to.previous_cell = begins ? value_or_zero<S>(tensors.c0, initial)
                                  : row_at(typed<float>(tensors.cells), previous_row, H_)[unit];
      }
      if constexpr (options) look_up(to, row);
      if (reads_h) to.hidden = row_at(typed<S>(tensors.y), row, int(tensors.y_stride))[unit];
      if (reads_previous_h) {
        to.hidden = S{};
        if (!begins) to.hidden = row_at(typed<S>(tensors.y), previous_row, int(tensors.y_stride))[unit];
        if (begins && tensors.h0) to.hidden = typed<S>(tensors.h0)[initial];
      }
      if (wavefront && tensors.factors)
        to.factor = widen(load_streaming(typed<S>(tensors.factors) + row * tensors.factors_stride + unit));
      if (tensors.grad_y)
        to.grad_y = load_streaming(row_at(typed<S>(tensors.grad_y), row, int(tensors.grad_y_stride)) + unit);
    }
  }

  // Bytes of the mask. Waited for where they are used alone.
  FRNN_DEVICE void look_up(uint8_t (&mask)[together], int first, int j) const {
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      const int at = j * tile_columns + thread_.column<count>(first + i);
      mask[i] = 1;
      if (has_mask() && is_live(j, first + i)) mask[i] = load_streaming(arguments_.steps.mask + first_row_ + at);
    }
  }

  struct Saved {
    S values[saved > 0 ? saved : 1] = {}, hidden = {}, grad_y = {};
    float cell = 0, previous_cell = 0;
    float factor = 1;  // of what comes from the layer above
    // Of options: whether the row began anew before the step, and bytes of bits of zoneout.
    uint8_t anew = 0, zoneout = 0, zoneout_cell = 0;
  };
  // Of options, of what the step after this one hands back: whether its row began anew before it, whether it is
  // clipped, and the factor of what has come through W_hh.
  struct Handed {
    uint8_t anew, clipped;
    S dropout;
  };
  // Of the columns that are computed together.
  struct Columns {
    Real values[together][saved > 0 ? saved : 1], hidden[together], grads[together][grad_gates];
    float cell[together], previous_cell[together], grad_y[together], factor[together], dh[together], dc[together];
    bool lives[together], keeps[together], kept_h[together], kept_c[together];
    Handed handed_back[together];
    int row;  // in which column 0 of the team stands
  };

  FRNN_DEVICE float dropout(int j, int i) const {
    const void* const factors = options_now().dropout;
    if (!factors || !owns(j, i)) return 1;
    return widen(typed<S>(factors)[batch_row(j, i) * int64_t(H_) + thread_.global_unit]);
  }
  FRNN_DEVICE void look_up(Handed (&from)[together], int s, int first, int j) const {
    const uint8_t *const marks = arguments_.steps.reset, *const clips = options_now().clips;
    const int B = int(arguments_.steps.B);
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      const int row = first_row_ + j * tile_columns + thread_.column<count>(first + i);
      from[i] = {0, uint8_t(row - first_row_ < later_limit_), narrow<S>(dropout(j, first + i))};
      if (s == 0 || !is_live(j, first + i)) continue;
      if (marks) from[i].anew = load_streaming(marks + (range_.reverse ? row : row + B));
      if (clips) from[i].clipped = load_streaming(clips + (range_.reverse ? row - B : row + B));
    }
  }
  // Whether no gradient crosses from the step after step s to it.
  FRNN_DEVICE bool ends_before(int s) const {
    const int steps = options_now().bptt_steps;
    return steps > 0 && s > 0 && range_.time_of(s - 1) % steps == 0;
  }
  FRNN_DEVICE void look_up(Saved& to, int row) const {
    const PersistentOptions& from = options_now();
    const uint8_t* const marks = arguments_.steps.reset;
    const int B = int(arguments_.steps.B), rows = int(arguments_.steps.T) * B;
    const int byte = thread_.global_unit / 8, bytes = (H_ + 7) / 8;
    if (marks && !range_.reverse) to.anew = load_streaming(marks + row);
    if (marks && range_.reverse) to.anew = row + B < rows ? load_streaming(marks + row + B) : 0;
    if (from.zoneout) to.zoneout = load_streaming(row_at(from.zoneout, row, bytes) + byte);
    if (Cell::has_cell && from.zoneout_cell)
      to.zoneout_cell = load_streaming(row_at(from.zoneout_cell, row, bytes) + byte);
  }
  // The gradients of what a row began anew from: no earlier step gets them.
  FRNN_DEVICE void end_gradients(int64_t index, float& dh, float& dc) const {
    const PersistentOptions& to = options_now();
    if (to.grad_reset_h) typed<float>(to.grad_reset_h)[index] += dh;
    if (Cell::has_cell && to.grad_reset_c) typed<float>(to.grad_reset_c)[index] += dc;
    dh = dc = 0;
  }
  FRNN_DEVICE void begin_anew(Columns& work, int j, int first) const {
    const PersistentOptions& from = options_now();
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      work.kept_h[i] = bit_of(saved_[i].zoneout, thread_.global_unit);
      work.kept_c[i] = bit_of(saved_[i].zoneout_cell, thread_.global_unit);
      if (!work.lives[i] || !opaque(saved_[i].anew)) continue;
      const int64_t index = batch_row(j, first + i) * int64_t(H_) + thread_.global_unit;
      if (Cell::has_cell) work.previous_cell[i] = value_or_zero<S>(from.reset_c, index);
      if (reads_previous_h) work.hidden[i] = value_or_zero<S>(from.reset_h, index);
    }
  }

  // What is there before the sums are.
  FRNN_DEVICE void prepare(Columns& work, int j, int first) const {
    work.row = first_row_ + j * tile_columns;
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      const Saved& from = saved_[i];
      FRNN_UNROLL
      for (int k = 0; k < saved; ++k) work.values[i][k] = widen(from.values[k]);
      work.hidden[i] = widen(from.hidden);
      work.cell[i] = from.cell;
      work.previous_cell[i] = from.previous_cell;
      work.grad_y[i] = widen(from.grad_y);
      work.factor[i] = from.factor;
      work.dh[i] = states_[state(j, 0, first + i)];
      work.dc[i] = Cell::has_cell ? states_[state(j, 1, first + i)] : 0.0f;
      work.lives[i] = is_live(j, first + i);
    }
    if constexpr (options) begin_anew(work, j, first);
  }

  FRNN_DEVICE void compute(Columns& work, int s, int j, int first) const {
    float received[together] = {}, above[together] = {};
    if (exchange_.exists(s)) {
      const int column = thread_.column<count>(first);
      const bool mine = thread_.exists && column < place_.columns_of(j);
      if constexpr (together == 1) {
        exchange_.sum(s, j, column, thread_.unit, mine, received[0], above[0]);
      } else {
        Pair own_pair, above_pair;
        exchange_.sum(s, j, column, thread_.unit, mine, own_pair, above_pair);
        FRNN_UNROLL
        for (int i = 0; i < together; ++i) {
          received[i] = own_pair.v[i];
          above[i] = above_pair.v[i];
        }
      }
    }
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      float dh_own = work.dh[i] + received[i];
      if constexpr (options) {
        const Handed& from = work.handed_back[i];
        dh_own = work.dh[i] + received[i] * widen(from.dropout);
        const float limit = options_now().grad_clip;
        if (work.lives[i] && opaque(from.anew)) {
          end_gradients(batch_row(j, first + i) * int64_t(H_) + thread_.global_unit, dh_own, work.dc[i]);
        } else if (ends_before(s)) {
          dh_own = work.dc[i] = 0;
        } else if (limit > 0 && work.lives[i] && opaque(from.clipped)) {
          dh_own = clamped<float>(dh_own, limit);
        }
      }
      const float dh = (wavefront ? dh_own + above[i] * work.factor[i] : dh_own) + work.grad_y[i];
      Real dh_previous, dc_previous;
      if constexpr (options) {
        backward_with_options(work, i, dh, dh_previous, dc_previous);
      } else {
        Cell::template backward<Real>(work.values[i], work.hidden[i], work.hidden[i], work.cell[i],
                                      work.previous_cell[i], dh, work.dc[i], work.grads[i], dh_previous, dc_previous);
      }
      if (work.keeps[i]) {
        FRNN_UNROLL
        for (int k = 0; k < grad_gates; ++k) work.grads[i][k] = 0.0f;
        dh_previous = dh;
        dc_previous = work.dc[i];
      }
      if (work.lives[i]) {
        work.dh[i] = float(dh_previous);
        if (Cell::has_cell) work.dc[i] = float(dc_previous);
      } else {
        work.dh[i] = wavefront ? dh_own + above[i] * work.factor[i] : dh_own;
      }
    }
  }

  FRNN_DEVICE void backward_with_options(Columns& work, int i, float dh, Real& dh_previous, Real& dc_previous) const {
    const PersistentOptions& from = options_now();
    // Past the cell, by zoneout, and to it.
    float h_to_before = 0, c_to_before = 0, own_h = dh, own_c = work.dc[i];
    Zone<float>(from.zoneout, work.kept_h[i], from.rate).divide(own_h, h_to_before);
    Real cell = work.cell[i];
    if constexpr (Cell::has_cell) {
      const Zone<float> zone(from.zoneout_cell, work.kept_c[i], from.cell_rate);
      zone.divide(own_c, c_to_before);
      // What is saved is c after zoneout.
      const Real* const v = work.values[i];
      if (zone.drawn || zone.rate > 0) {
        cell = Cell::template new_cell<Real>(v[0], v[1], v[2], work.previous_cell[i], PlainGates{});
        if (from.cell_clip > 0) cell = clamped<Real>(cell, from.cell_clip);
      }
    }
    Cell::template backward<Real>(work.values[i], work.hidden[i], work.hidden[i], cell, work.previous_cell[i], own_h,
                                  own_c, work.grads[i], dh_previous, dc_previous);
    if constexpr (Cell::has_cell)
      if (from.cell_clip > 0)
        Cell::template clip_backward<Real>(work.values[i], work.previous_cell[i], from.cell_clip, work.grads[i],
                                           dc_previous);
    dh_previous = dh_previous + Real(h_to_before);
    if (Cell::has_cell) dc_previous = dc_previous + Real(c_to_before);
  }

  FRNN_DEVICE void write_operand(const Columns& work, int j, int first, int turn) const {
    const Tiling& tiling = arguments_.tiling;
    const int gate_chunks = place_.units / per_chunk;
    char* const operand = shared_memory() + tiling.operand + (turn & 1) * operands_of_step * tiling.slabs * slab_bytes;
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      if (!owns(j, first + i)) continue;
      FRNN_UNROLL
      for (int which = 0; which < operands_of_step; ++which) {
        constexpr GateGrads hidden_grads = Cell::hidden_grads, input_grads = Cell::input_grads;
        const int first_grad = which == 0 ? hidden_grads.first : input_grads.first;
        FRNN_UNROLL
        for (int gate = 0; gate < gates; ++gate) {
          const float grad = work.lives[i] ? float(work.grads[i][first_grad + gate]) : 0.0f;
          char* const chunk =
              operand + which * tiling.slabs * slab_bytes +
              chunk_offset(gate * gate_chunks + thread_.unit / per_chunk, thread_.column<count>(first + i));
          if constexpr (per_chunk == 8) {
            reinterpret_cast<S*>(chunk)[thread_.unit % per_chunk] = narrow<S>(grad);
          } else {
            reinterpret_cast<uint32_t*>(chunk)[thread_.unit % per_chunk] = Product::word(grad);
          }
        }
      }
    }
  }

  FRNN_DEVICE void store(const Columns& work, int j, int first) const {
    const PersistentBackward& tensors = layer_now();
    FRNN_UNROLL
    for (int i = 0; i < together; ++i) {
      keep_state(j, first + i, work.dh[i], work.dc[i]);
      if (!work.lives[i]) continue;
      S* const to = row_at(typed<S>(tensors.grad_gates), work.row + thread_.column<count>(first + i), grad_gates * H_) +
                    thread_.global_unit;
      FRNN_UNROLL
      for (int k = 0; k < grad_gates; ++k) to[k * H_] = narrow<S>(float(work.grads[i][k]));
    }
  }

  const BackwardArguments& arguments_;
  const PersistentBackward& layer_;
  const Place& place_;
  const GateThread& thread_;
  const BackwardSteps& range_;
  SumReceiver<wavefront, counted> exchange_;
  const int H_;
  float* const states_;
  RowsOfSteps rows_of_steps_;
  StepRows previous_;
  // Of the step whose saved values are here; the thread's columns from limit_ on have no live row.
  int first_row_ = 0, limit_ = 0;
  int later_limit_ = 0;  // with options: limit_ of the step after it; 0: there is none
  Saved saved_[together];
};

// What the multiplying warps do: W_hh^T, and with a layer below W_ih^T, of the block's gates.
template <class Product, class Cell, int group, int register_groups, int most_slabs, bool wavefront>
class BackwardProducts {
  using S = typename Product::Storage;
  static constexpr int gates = Cell::gates, per_chunk = Product::per_chunk;
  static constexpr int operands_of_step = wavefront && Cell::grad_gates > gates ? 2 : 1;

 public:
  FRNN_DEVICE BackwardProducts(const BackwardArguments& arguments, const PersistentBackward& layer, const Place& place)
      : arguments_(arguments),
        place_(place),
        slabs_(arguments.tiling.slabs),
        row_tiles_(wavefront && place.layer == 0 ? arguments.tiling.own_tiles : arguments.tiling.row_tiles) {
    const Tiling& tiling = arguments.tiling;
    constexpr GateGrads hidden_grads = Cell::hidden_grads, input_grads = Cell::input_grads;
    const int64_t H = arguments.hidden_size;
    const int g = lane_index() / 4;
    const int gate_chunks = place.units / per_chunk;
    stored_ = shared_memory() + tiling.weights +
              warp_index() * (tiling.row_tiles - register_groups * group) * slabs_ * tile_bytes;
    // Chunks run along the columns of W_hh, memory along its rows: a lane loads one of the rows that it and its
    // neighbours want, and hands the others what is theirs.
    const auto load_weights = [&](char* to, int n, int k) {
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
      uint32_t a[8];
      load_tile(a, weight, (below ? n - tiling.own_tiles : n) * multiply_warps + warp_index(), k);
      store_tile(to, a);
    };
    // A slab of row tiles at a time goes through shared memory: in one loop it takes few registers beside those that it
    // fills.
    char* const staged = shared_memory() + tiling.operand + warp_index() * group * tile_bytes;
    FRNN_UNROLL
    for (int r = 0; r < register_groups; ++r) {
      FRNN_UNROLL
      for (int k = 0; k < most_slabs; ++k) {
        const int tiles = k < slabs_ ? row_tiles_ - r * group : 0;
        FRNN_NO_UNROLL
        for (int m = 0; m < group; ++m)
          if (m < tiles) load_weights(staged + m * tile_bytes, r * group + m, k);
        FRNN_UNROLL
        for (int m = 0; m < group; ++m) {
          FRNN_UNROLL
          for (int w = 0; w < 8; ++w) resident_[r][k][m][w] = 0;
          if (m < tiles) fetch_tile(resident_[r][k][m], staged + m * tile_bytes);
        }
      }
    }
    meet_multipliers();  // from here on, other things stand there
    for (int n = register_groups * group; n < row_tiles_; ++n)
      for (int k = 0; k < slabs_; ++k)
        load_weights(stored_ + ((n - register_groups * group) * slabs_ + k) * tile_bytes, n, k);
    char* const operands = shared_memory() + tiling.operand;
    for (int i = thread_index(); i < 2 * operands_of_step * slabs_ * slab_bytes / chunk_bytes; i += multiply_threads)
      reinterpret_cast<Chunk*>(operands)[i] = {};
  }

  // f(Count<n>{}) with the block's slabs along k, or -1 for any number.
  // That is a loop for every number, which the slower exchanges are not worth, nor warps that have both roles.
  template <bool counted, class F>
  FRNN_DEVICE void with_slabs(const F& f) const {
    if constexpr (two_roles && counted && Product::is_straight)
      with_number<1, most_slabs>(slabs_, f);
    else
      f(Count<-1>{});
  }

  template <int n, class Sender>
  FRNN_DEVICE void step(const Sender& exchange, int s, int j, int turn, int exchanges) const {
    // phase: barrier
    exchange.begin_step(s, j);
    take_over(filled + (turn & 1));
    // phase: products
    if (s >= exchanges && !(wavefront && place_.layer > 0)) return free_buffer(turn);
    constexpr int most = n > 0 ? n : most_slabs;
    const int slabs = n > 0 ? n : slabs_, own_tiles = arguments_.tiling.own_tiles;
    const int g = lane_index() / 4, pair = lane_index() % 4, columns = place_.columns_of(j);
    const char* operand = shared_memory() + arguments_.tiling.operand +
                          (turn & 1) * operands_of_step * slabs_ * slab_bytes + Product::lane_offset();
    exchange.give_credit(s, j);
    // Before the first group of W_ih's. (The first of all is never one of them.)
    const auto turn_below = [&](int tile) {
      if (!wavefront || tile == 0 || tile != own_tiles) return;
      exchange.wait_for_credit(s, j);
      if (operands_of_step > 1) operand += slabs_ * slab_bytes;
    };
    using Targets = typename Sender::Targets;
    const auto octet_of = [&](int tile, bool below, int m) {
      return 2 * ((below ? tile + m - own_tiles : tile + m) * multiply_warps + warp_index());
    };
    const auto is_below = [&](int tile) { return wavefront && tile > 0 && tile >= own_tiles; };
    const auto look_up = [&](Targets& to, int tile, int m) {
      exchange.look_up(to, octet_of(tile, is_below(tile), m), is_below(tile));
    };
    // The operand is loaded anew for each group of row tiles, one slab ahead: in registers it would take the place of
    // rows.
    const auto load_operand = [&](int k) {
      return Product::operand(operand + (k < slabs ? k : 0) * slab_bytes, g < columns);
    };
    // phase: sends
    const auto send = [&](const typename Product::Sums(&sums)[group], Targets& to, int tile) {
      const bool below = is_below(tile);
      if (!below && s >= exchanges) return;
      FRNN_UNROLL
      for (int m = 0; m < group; ++m) {
        const Targets here = to;
        if (m + 1 < group) look_up(to, tile, m + 1);
        exchange.send(below ? s : s + 1, j, octet_of(tile, below, m), g, pair, sums[m].result(), here);
      }
    };
    // phase: products
    FRNN_UNROLL
    for (int r = 0; r < register_groups; ++r) {
      if (r * group >= row_tiles_) break;
      turn_below(r * group);
      typename Product::Sums sums[group];
      Targets to;
      look_up(to, r * group, 0);
      auto next = load_operand(0);
      FRNN_UNROLL
      for (int k = 0; k < most; ++k) {
        if (n < 0 && k >= slabs) continue;
        const auto b = next;
        if (k + 1 < most) next = load_operand(k + 1);
        FRNN_UNROLL
        for (int m = 0; m < group; ++m) sums[m].add(resident_[r][k][m], b, columns);
      }
      send(sums, to, r * group);
    }
    FRNN_NO_UNROLL
    for (int tile = register_groups * group; tile < row_tiles_; tile += group) {
      turn_below(tile);
      typename Product::Sums sums[group];
      Targets to;
      const char* const stored = stored_ + (tile - register_groups * group) * slabs * tile_bytes;
      look_up(to, tile, 0);
      auto next = load_operand(0);
      FRNN_UNROLL
      for (int k = 0; k < most; ++k) {
        if (n < 0 && k >= slabs) continue;
        const auto b = next;
        if (k + 1 < most) next = load_operand(k + 1);
        FRNN_UNROLL
        for (int m = 0; m < group; ++m) {
          uint32_t a[8];
          fetch_tile(a, stored + (m * slabs + k) * tile_bytes);
          sums[m].add(a, b, columns);
        }
      }
      send(sums, to, tile);
    }
    // phase: sends
    free_buffer(turn);
    exchange.sent(j);
  }

  // phase: end
 private:
  const BackwardArguments& arguments_;
  const Place& place_;
  const int slabs_, row_tiles_;
  char* stored_;
  uint32_t resident_[register_groups][most_slabs][group][8];
};

template <class Product, class Cell, int group, int register_groups, int most_slabs, bool wavefront>
__global__ void __launch_bounds__(kernel_threads, 1)
    persistent_backward_kernel(const __grid_constant__ BackwardArguments arguments) {
#if !defined(FRNN_CUDA_CLUSTERS)
  if constexpr (wavefront) return;
#endif
  using Products = BackwardProducts<Product, Cell, group, register_groups, most_slabs, wavefront>;
  const Tiling& tiling = arguments.tiling;
  const Place place(tiling, arguments.hidden_size, arguments.steps.B, wavefront);
  const PersistentBackward& layer = arguments.part[place.part()];
  const BackwardSteps range(arguments, place);
  const int num_steps = range.count, tiles = place.column_tiles;
  const int exchanges = layer.grad_h0 ? num_steps : num_steps > 0 ? num_steps - 1 : 0;
  const bool idle = place.rank >= tiling.active;
  if (idle) {  // nothing to do, but the cluster's barriers count this block
    meet_writers(tiling);
    for (int e = 0; e < exchanges && tiling.exchange == Exchange::barriers; ++e) meet_cluster(tiling);
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
      f(BackwardGates<Product, Cell, wavefront, decltype(counted)::value, decltype(count)::value>(
          arguments, layer, place, thread, range, exchanges));
    });
  };
  // Before there is W_hh in registers.
  const auto begin_exchange = [&] {
    with_exchange<wavefront>(tiling, [&](auto counted) {
      SumSender<wavefront, decltype(counted)::value>(tiling, place, arguments.workspace, num_steps, exchanges).begin();
    });
  };
  if constexpr (two_roles) {
    if (thread_index() < multiply_threads) {
      raise_registers<multiply_registers<Product, true, wavefront>>();
      begin_exchange();
      const Products products(arguments, layer, place);
      with_exchange<wavefront>(tiling, [&](auto counted) {
        const SumSender<wavefront, decltype(counted)::value> exchange(tiling, place, arguments.workspace, num_steps,
                                                                      exchanges);
        meet_writers(tiling);
        products.template with_slabs<decltype(counted)::value>([&](auto n) {
          every_turn([&](int s, int j, int turn) {
            products.template step<decltype(n)::value>(exchange, s, j, turn, exchanges);
          });
        });
        exchange.end();
      });
    } else {
      lower_registers<gate_registers<Product, true, wavefront>>();
      with_exchange<wavefront>(tiling, [&](auto counted) {
        do_gates(counted, [&](auto gates) {
          gates.begin();
          meet_writers(tiling);
          every_turn([&](int s, int j, int turn) { gates.step(s, j, turn); });
          gates.end();
          end_turns(num_steps * tiles);
        });
      });
    }
  } else {
    begin_exchange();
    const Products products(arguments, layer, place);
    with_exchange<wavefront>(tiling, [&](auto counted) {
      const SumSender<wavefront, decltype(counted)::value> exchange(tiling, place, arguments.workspace, num_steps,
                                                                    exchanges);
      do_gates(counted, [&](auto gates) {
        gates.begin();
        meet_writers(tiling);
        products.template with_slabs<decltype(counted)::value>([&](auto n) {
          every_turn([&](int s, int j, int turn) {
            gates.step(s, j, turn);
            products.template step<decltype(n)::value>(exchange, s, j, turn, exchanges);
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
