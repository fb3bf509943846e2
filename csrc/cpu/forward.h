// The forward pass of one layer: all steps, all directions, in one launch.
//
// A thread owns directions x batch rows x panels of hidden units (plan.h) and walks through time in chunks of steps:
// the input projection of the chunk is one product, then each step multiplies the state by the packed w_hh, panel by
// panel, and turns the panel's sums into gates while they are in the first-level cache. Threads that share rows meet
// at one barrier a step (three with a projection of h); all others run without any.
#pragma once

#include "../cells/derivatives.h"
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "fingerprint.h"
#include "in_place.h"
#include "layer_norm.h"
#include "options.h"
#include "packed.h"
#include "plan.h"
#include "team.h"

namespace fused_rnn {
namespace FRNN_ISA {

// Bytes of projected inputs that one thread keeps between the projection and the steps: a part of its L2. Where the
// weights alone are as large as shared caches are, more of them, so that w_ih is read less often.
inline constexpr int64_t projection_chunk_bytes = 512 * 1024;
inline constexpr int64_t large_projection_chunk_bytes = 4 * 1024 * 1024;
inline constexpr int64_t large_weight_bytes = 16 * 1024 * 1024;

// What a layer saves for the backward pass, and its output, go past the caches when they are more than those would keep
// until they are read.
inline constexpr int64_t past_caches_bytes = 16 * 1024 * 1024;

// Streams keep nothing for a backward pass and compute no changes: where all are streams, that code is left out.
#if defined(FRNN_STREAMS_ALONE)
inline constexpr bool streams_alone = true;
#else
inline constexpr bool streams_alone = false;
#endif

template <class S>
FRNN_INLINE const S* rows_of(const void* p) {
  return static_cast<const S*>(p);
}
template <class S>
FRNN_INLINE S* rows_of(void* p) {
  return static_cast<S*>(p);
}

// Where packed weights are kept for the next inference call: not if they are fewer bytes, which are packed as fast as
// they are seen to be unchanged, nor with more steps or more rows over all steps, beside which packing is no cost, and
// brings the weights into the right caches (docs/performance.md).
inline constexpr int64_t least_kept_bytes = 256 * 1024;
inline constexpr int64_t most_kept_steps = 64;
inline constexpr int64_t most_kept_rows = 1024;

// A share [begin, end) of n items for part i of parts.
struct Share {
  int64_t begin, end;
  Share(int64_t n, int64_t i, int64_t parts) : begin(n * i / parts), end(n * (i + 1) / parts) {}
};

// What thread number `thread` owns under a plan.
struct Owner {
  int direction_begin, direction_end;
  int row_group, unit_group;
  int barrier;  // which of the plan's unit barriers it meets at

  Owner(const Plan& plan, int directions, int thread) {
    unit_group = thread % plan.unit_groups;
    row_group = thread / plan.unit_groups % plan.row_groups;
    const int direction_group = thread / plan.unit_groups / plan.row_groups;
    direction_begin = directions * direction_group / plan.direction_groups;
    direction_end = directions * (direction_group + 1) / plan.direction_groups;
    barrier = thread / plan.unit_groups;
  }
};

// dst[0..n) = src[0..n) between storage types, or zeros for a null src.
template <class A, class From, class To>
void copy_row(const From* src, To* dst, int64_t n) {
  constexpr int width = Simd<A>::width;
  for (int64_t i = 0; i < n; i += width) {
    typename Simd<A>::V v{};
    if (src) v = Simd<A>::load_n(src + i, n - i);
    Simd<A>::store_n(dst + i, v, n - i);
  }
}

// The gains of panel p, (G * H), in the order of its columns; zeros for units that do not exist.
template <class S, int G, int U>
void pack_gain(const void* gain, int64_t H, int64_t p, typename Accumulator<S>::type* panel) {
  using A = typename Accumulator<S>::type;
  constexpr int width = Simd<A>::width;
  for (int v = 0; v < G * U; ++v) {
    const int64_t unit = (p * U + v % U) * width;
    typename Simd<A>::V values{};
    if (unit < H) values = Simd<A>::load_n(rows_of<S>(gain) + v / U * H + unit, H - unit);
    Simd<A>::store(panel + v * width, values);
  }
}

// Biases of panel p, its columns ordered as those of pack_gates. b_ih + b_hh goes with the input projection, except
// where the cell wants b_hh apart.
template <class Cell, class S, int U>
void pack_bias(const Weights& w, int64_t H, int64_t p, typename Accumulator<S>::type* input,
               typename Accumulator<S>::type* hidden) {
  using A = typename Accumulator<S>::type;
  using V = typename Simd<A>::V;
  constexpr int width = Simd<A>::width;
  for (int g = 0; g < Cell::gates; ++g) {
    for (int u = 0; u < U; ++u) {
      const int64_t unit = (p * U + u) * width, column = (g * U + u) * width;
      V b_ih{}, b_hh{};
      if (unit < H && w.b_ih) {
        b_ih = Simd<A>::load_n(rows_of<S>(w.b_ih) + g * H + unit, H - unit);
        b_hh = Simd<A>::load_n(rows_of<S>(w.b_hh) + g * H + unit, H - unit);
      }
      const bool apart = Cell::hidden_bias_apart(g);
      Simd<A>::store(input + column, apart ? b_ih : b_ih + b_hh);
      Simd<A>::store(hidden + column, apart ? b_hh : V{});
    }
  }
}

// The step of a cell, whose private states are an array here; the cells of cells/ have one at most.
template <class Cell, class V, class... Options>
FRNN_INLINE void forward_of(const V* x, const V* r, const V& h_prev, const V* c_prev, V& h, V* c, V* saved,
                            const Options&... options) {
  if constexpr (Cell::kind >= CellKind::custom) {
    Cell::template forward<V>(x, r, h_prev, c_prev, h, c, saved);
  } else {
    Cell::template forward<V>(x, r, h_prev, c_prev[0], h, c[0], saved, options...);
  }
}

// A step that was computed: which row of all steps, and of the batch.
struct KnownPlace {
  int64_t row, previous;  // previous: of the step before; -1: there is none
  int64_t batch_row;
};

// One vector of units of it; h_stride: from one row of h to the next.
template <class Cell, class S, class V>
FRNN_INLINE void load_known(const KnownSteps& known, const KnownPlace& at, int64_t H, int64_t h_stride, int64_t unit,
                            int64_t n, int i, KnownStep<V>& step) {
  const auto load = [&](const void* data, int64_t first) __attribute__((always_inline)) {
    return data ? Simd<S>::load_n(rows_of<S>(data) + first + unit, n) : typename Simd<S>::V{};
  };
  for (int g = 0; g < Cell::saved; ++g) step.saved[g].v[i] = load(known.saved, (at.row * Cell::saved + g) * H);
  if constexpr (Cell::saved == 0) step.h.v[i] = load(known.h, at.row * h_stride);
  if constexpr (Cell::reads_h)
    step.h_prev.v[i] = at.previous < 0 ? load(known.h0, at.batch_row * H) : load(known.h, at.previous * h_stride);
  if constexpr (Cell::has_cell) {
    step.c.v[i] = load(known.c, at.row * H);
    step.c_prev.v[i] = at.previous < 0 ? load(known.c0, at.batch_row * H) : load(known.c, at.previous * H);
  }
}

template <class Cell, class S, int U>
class ForwardPass {
 protected:
  using A = typename Accumulator<S>::type;
  using E = typename ProductElement<S>::type;
  using V = typename Simd<A>::V;
  static constexpr int width = Simd<A>::width;
  static constexpr int G = Cell::gates;
  static constexpr int NV = G * U;
  static constexpr int64_t panel_columns = NV * width;
  // Vectors at the end of a panel whose recurrent sums the cell wants without the input projection.
  static constexpr int vectors_apart = gates_apart<Cell>() * U;
  static constexpr int64_t panel_units = U * width;

 public:
  ForwardPass(const LayerForward& layer, const Plan& plan)
      : layer_(layer),
        plan_(plan),
        I_(layer.sizes.input_size),
        H_(layer.sizes.hidden_size),
        P_(layer.sizes.state_size),
        heads_(layer.sizes.heads),
        K_(P_ / heads_),
        D_(layer.sizes.num_directions),
        T_(layer.steps.T),
        B_(layer.steps.B),
        panels_((H_ + panel_units - 1) / panel_units),
        projects_(layer.direction[0].weights.w_hr != nullptr),
        gates_(gates_wanted<Cell>(layer)),
        keeps_h_(layer.direction[0].extras.dropout || layer.direction[0].extras.zoneout || layer.within.zoneout > 0),
        saves_gates_(layer.direction[0].gates != nullptr),
        normalises_(layer.within.layer_norm),
        saved_stride_((Cell::saved + (normalises_ ? 2 * G : 0)) * H_),
        // Rows of a stride that is no multiple of 4 KiB: tiles read several rows at the same column.
        state_stride_(round_up(P_, width) + 16),
        unit_stride_(panels_ * panel_units + 16),
        cell_stride_(Cell::states * unit_stride_) {}

  bool run() {
    own_panels_ = (panels_ + plan_.unit_groups - 1) / plan_.unit_groups;
    own_rows_ = 0;
    for (int g = 0; g < plan_.row_groups; ++g) {
      const int64_t n =
          row_boundary(layer_.steps, g + 1, plan_.row_groups) - row_boundary(layer_.steps, g, plan_.row_groups);
      if (n > own_rows_) own_rows_ = n;
    }
    const int64_t all = layer_.steps.total_rows();
    for (int d = 0; d < D_; ++d) begins_at_zero_[d] = layer_.begins_at_zero(d);
    packs_input_ = !reads_input_weights_in_place(layer_.sizes, layer_.steps);
    packs_state_ = !reads_weights_in_place(layer_.sizes, layer_.steps);
    few_inputs_ = all < least_rows_in_lanes<A>;
    const int64_t weight_bytes = panels_ * panel_columns * (I_ + K_) * int64_t(sizeof(E));
    const int64_t chunk_bytes =
        weight_bytes > large_weight_bytes ? large_projection_chunk_bytes : projection_chunk_bytes;
    const int64_t wanted = chunk_bytes / (own_panels_ * panel_columns * int64_t(sizeof(A)));
    past_caches_ =
        all * H_ * (Cell::saved * int64_t(sizeof(S)) + Cell::states * int64_t(sizeof(A))) > past_caches_bytes &&
        H_ % width == 0 && aligned_to_lines(layer_.direction[0]) && aligned_to_lines(layer_.direction[1]);
    const Sequence& y = layer_.y;
    output_past_caches_ = all * D_ * P_ * int64_t(sizeof(S)) > past_caches_bytes &&
                          (y.time_stride | y.batch_stride | P_) % width == 0 &&
                          reinterpret_cast<uintptr_t>(y.data) % FRNN_VECTOR_BYTES == 0;
    chunk_rows_ = wanted < own_rows_ ? own_rows_ : wanted < all && packs_input_ ? wanted : all;

    const bool brief = T_ <= most_kept_steps && all <= most_kept_rows;
    if (!packs_state_ || !layer_.inference || !brief || kept_bytes() < least_kept_bytes) return launch();
    Layout weights;
    lay_out_weights(weights);
    PackedCopy copy(packed_key(), weights.used(), size_t(all_blocks() * fingerprint_sums));
    copy_ = &copy;
    if (!launch()) return false;
    if (copy.filled() && changed_) {
      copy.replace();
      changed_ = false;
      if (!launch()) return false;
    }
    if (copy.filling() && !changed_) {
      copy.keep();
    } else if (copy.filled()) {
      copy.confirm();
    }
    return true;
  }

 protected:  // of StreamPass, too: ../stream/pass.h
  bool launch() {
    Layout measure;
    lay_out(measure);
    void* memory = scratch_memory(measure.used());
    if (!memory) return false;
    Layout layout(memory);
    lay_out(layout);
    if (keeps()) {
      Layout weights(copy_->memory());
      lay_out_weights(weights);
    }
    for (int i = 0; i < plan_.threads() / plan_.unit_groups; ++i) unit_barriers_[i].reset(plan_.unit_groups);
    everyone_->reset(plan_.threads());
    return run_team(plan_.threads(), &task, this);
  }

  struct DirectionScratch {
    E *w_ih, *w_hh, *w_hr;
    A *input_bias, *hidden_bias;
    E* state[2];  // (B, state_stride) h before and after the step, as it is multiplied
    A* carried;   // (B, state_stride) h itself, where that is kept apart
    A* cell;      // (B, cell_stride) private states, each at a distance of unit_stride
    E* hidden;    // (B, unit_stride) h before its projection
    // With layer normalisation: gains in the order of the panels; o, and c before zoneout, (B, unit_stride).
    A *gain_ih, *gain_hh, *output_gate, *new_cell;
  };
  struct ThreadScratch {
    A* projected;   // (chunk_rows, own panels)
    A* sums;        // (own_rows, one panel), or a few panels of one or two rows
    A* all_sums;    // (own_rows, all panels), of which layer normalisation takes the mean
    A* state_sums;  // (own_rows, P padded): the projection of h
    E* x;           // (chunk_rows, x_stride) inputs, where they are not multiplied in their storage type
    LaneScratch<A> lanes;
    E* panel;  // one of a weight, where it is packed as it goes
    const E** x_rows;
    const E** state_rows[2];
    const E** hidden_rows;
  };

  static constexpr int64_t panels_together = panels_at_once<NV>(1);

  // How rows meet a weight: packed, or where it stands (in_place.h).
  enum class From { packed, dots, lanes };

  void lay_out_weights(Layout& layout) {
    for (int d = 0; d < D_; ++d) {
      DirectionScratch& s = direction_[d];
      s.w_ih = layout.take<E>(packs_input_ ? panels_ * padded_depth<E>(I_) * panel_columns : 0);
      s.w_hh = layout.take<E>(packs_state_ && multiplies_state(d) ? panels_ * padded_depth<E>(K_) * panel_columns : 0);
      s.w_hr = layout.take<E>(projects_ ? int64_t(ColumnPanels<E>::elements(H_, P_)) : 0);
    }
  }

  void lay_out(Layout& layout) {
    if (!keeps()) lay_out_weights(layout);
    for (int d = 0; d < D_; ++d) {
      DirectionScratch& s = direction_[d];
      s.input_bias = layout.take<A>(panels_ * panel_columns);
      s.hidden_bias = layout.take<A>(panels_ * panel_columns);
      for (E*& state : s.state) state = layout.take<E>(B_ * state_stride_);
      s.carried = layout.take<A>(keeps_h_ ? B_ * state_stride_ : 0);
      s.cell = layout.take<A>(B_ * cell_stride_);
      s.hidden = layout.take<E>(projects_ ? B_ * unit_stride_ : 0);
      for (A** gain : {&s.gain_ih, &s.gain_hh}) *gain = layout.take<A>(normalises_ ? panels_ * panel_columns : 0);
      for (A** state : {&s.output_gate, &s.new_cell})
        *state = layout.take<A>(normalises_ && Cell::has_cell ? B_ * unit_stride_ : 0);
    }
    zeros_ = layout.take<A>(normalises_ ? panels_ * panel_columns : 0);
    unit_barriers_ = layout.take<Barrier>(plan_.threads() / plan_.unit_groups);
    everyone_ = layout.take<Barrier>(1);
    threads_ = layout.take<ThreadScratch>(plan_.threads());
    for (int i = 0; i < plan_.threads(); ++i) {
      ThreadScratch t;
      t.projected = layout.take<A>(chunk_rows_ * own_panels_ * panel_columns);
      t.sums = layout.take<A>((own_rows_ + 2 * panels_together) * panel_columns);
      t.all_sums = layout.take<A>(normalises_ ? own_rows_ * panels_ * panel_columns : 0);
      t.state_sums = layout.take<A>(projects_ ? own_rows_ * ColumnPanels<E>::padded_columns(P_) : 0);
      t.x = layout.take<E>(converts_x ? chunk_rows_ * x_stride() : 0);
      lay_out_lanes(layout, t.lanes);
      const bool as_it_goes = reads_in_place() && packs_as_it_goes<E> && !few_inputs_;
      t.panel = layout.take<E>(as_it_goes ? padded_depth<E>(I_ > P_ ? I_ : P_) * panel_columns : 0);
      t.x_rows = layout.take<const E*>(chunk_rows_);
      for (const E**& rows : t.state_rows) rows = layout.take<const E*>(heads_ * own_rows_);
      t.hidden_rows = layout.take<const E*>(projects_ ? own_rows_ : 0);
      if (threads_) threads_[i] = t;
    }
  }

  void lay_out_lanes(Layout& layout, LaneScratch<A>& lanes) {
    const int64_t longest = I_ > P_ ? I_ : P_;
    const bool needed = reads_in_place() && !few_inputs_ && !packs_as_it_goes<E>;
    lanes.rows = layout.take<A>(needed ? LaneScratch<A>::row_elements(chunk_rows_, longest) : 0);
    lanes.weights = layout.take<A>(needed && sizeof(S) != sizeof(A) ? width * (round_up(longest, width) + 16) : 0);
    lanes.sums = layout.take<A>(needed ? LaneScratch<A>::sum_elements(chunk_rows_) : 0);
  }

  static constexpr bool converts_x = sizeof(S) != sizeof(E);
  int64_t x_stride() const { return round_up(I_, width) + 16; }

  bool reads_in_place() const { return !packs_input_ || !packs_state_; }

  static void task(void* self, int thread) { static_cast<ForwardPass*>(self)->work(thread); }

  void work(int thread) {
    if (!prepare_weights(thread)) return;
    const Owner own(plan_, D_, thread);
    const int64_t r0 = row_boundary(layer_.steps, own.row_group, plan_.row_groups);
    const int64_t r1 = row_boundary(layer_.steps, own.row_group + 1, plan_.row_groups);
    const Share panels(panels_, own.unit_group, plan_.unit_groups);
    const Share state_columns(ColumnPanels<E>::count(P_), own.unit_group, plan_.unit_groups);
    for (int d = own.direction_begin; d < own.direction_end; ++d)
      scan(d, r0, r1, panels, state_columns, threads_[thread], unit_barriers_[own.barrier], own.unit_group == 0);
  }

  // Whether packed weights are a copy that outlives the call.
  bool keeps() const { return copy_ && (copy_->filled() || copy_->filling()); }

  // Packs the weights, or looks whether the kept copy is still one of them; false: it is not.
  bool prepare_weights(int thread) {
    if (!keeps()) {
      pack(thread, true);
      everyone_->wait();
      return true;
    }
    if (copy_->filled()) {
      pack(thread, false);
      if (!each_block(thread, [&](uint64_t* kept, const uint64_t* found) { return same_sums(kept, found); }))
        changed_ = true;
      everyone_->wait();
      return !changed_;
    }
    // The fingerprint is that of bytes that were there before and after packing: whoever writes to the weights
    // meanwhile spoils this call, but no later one.
    each_block(thread, [](uint64_t* kept, const uint64_t* found) {
      for (int i = 0; i < fingerprint_sums; ++i) kept[i] = found[i];
      return true;
    });
    everyone_->wait();
    pack(thread, true);
    everyone_->wait();
    if (!each_block(thread, [&](uint64_t* kept, const uint64_t* found) { return same_sums(kept, found); }))
      changed_ = true;
    return true;
  }

  static bool same_sums(const uint64_t* a, const uint64_t* b) {
    uint64_t difference = 0;
    for (int i = 0; i < fingerprint_sums; ++i) difference |= a[i] ^ b[i];
    return difference == 0;
  }

  // The matrices that are packed.
  struct Matrix {
    const void* data = nullptr;
    int64_t bytes = 0;
  };
  Matrix matrix(int i) const {
    const Weights& w = layer_.direction[i / 3].weights;
    const int64_t element = int64_t(sizeof(S));
    switch (i % 3) {
      case 0:
        if (!packs_input_) return {};
        return {w.w_ih, G * H_ * I_ * element};
      case 1:
        if (!packs_state_ || !multiplies_state(i / 3)) return {};
        return {w.w_hh, G * H_ * K_ * element};
    }
    return {w.w_hr, projects_ ? P_ * H_ * element : 0};
  }
  int64_t kept_bytes() const {
    int64_t bytes = 0;
    for (int i = 0; i < 3 * D_; ++i) bytes += matrix(i).bytes;
    return bytes;
  }
  int64_t all_blocks() const {
    int64_t blocks = 0;
    for (int i = 0; i < 3 * D_; ++i) blocks += fingerprint_blocks(matrix(i).bytes);
    return blocks;
  }

  PackedKey packed_key() const {
    PackedKey key;
    for (int i = 0; i < 3 * D_; ++i) key.weights[i] = matrix(i).data;
    key.sizes = {I_, H_, K_, D_, int64_t(layer_.sizes.kind), int64_t(layer_.sizes.dtype)};
    key.format = reinterpret_cast<const void*>(&task);
    return key;
  }

  // Calls f(kept sums, found sums) for this thread's share of the blocks of 4 KiB, until one returns false.
  template <class F>
  bool each_block(int thread, F f) {
    const Share share(all_blocks(), thread, plan_.threads());
    int64_t first = 0;
    for (int i = 0; i < 3 * D_; ++i) {
      const Matrix m = matrix(i);
      const int64_t count = fingerprint_blocks(m.bytes);
      const int64_t begin = share.begin > first ? share.begin - first : 0;
      const int64_t end = share.end - first < count ? share.end - first : count;
      for (int64_t block = begin; block < end; ++block) {
        uint64_t sums[fingerprint_sums];
        fingerprint_of(m.data, m.bytes, block, fingerprint_key(), sums);
        if (!f(copy_->prints() + (first + block) * fingerprint_sums, sums)) return false;
      }
      first += count;
    }
    return true;
  }

  void pack(int thread, bool matrices) {
    const Share share(panels_, thread, plan_.threads());
    for (int d = 0; d < D_; ++d) {
      const Weights& w = layer_.direction[d].weights;
      DirectionScratch& s = direction_[d];
      for (int64_t p = share.begin; p < share.end; ++p) {
        if (packs_input_ && matrices) pack_panel(w.w_ih, I_, p, s.w_ih + p * padded_depth<E>(I_) * panel_columns);
        if (packs_state_ && matrices && multiplies_state(d))
          pack_panel(w.w_hh, K_, p, s.w_hh + p * padded_depth<E>(K_) * panel_columns);
        pack_bias<Cell, S, U>(w, H_, p, s.input_bias + p * panel_columns, s.hidden_bias + p * panel_columns);
        if (normalises_) {
          pack_gain<S, G, U>(w.norm_ih, H_, p, s.gain_ih + p * panel_columns);
          pack_gain<S, G, U>(w.norm_hh, H_, p, s.gain_hh + p * panel_columns);
          for (int64_t i = p * panel_columns; i < (p + 1) * panel_columns; ++i) zeros_[i] = 0;
        }
      }
      if (projects_ && matrices) {
        const int64_t count = ColumnPanels<E>::count(P_);
        const Share columns(count, thread, plan_.threads());
        for (int64_t p = columns.begin; p < columns.end; ++p) pack_projection(rows_of<S>(w.w_hr), p, s.w_hr);
      }
    }
  }

  void pack_panel(const void* w, int64_t K, int64_t p, E* panel) {
    if (is_narrow(p)) {
      pack_gates<E, G, 1>(rows_of<S>(w), H_, K, p * U, panel);
    } else {
      pack_gates<E, G, U>(rows_of<S>(w), H_, K, p, panel);
    }
  }

  // Where panels have two vectors of units and their number is odd, the last panel has one.
  bool is_narrow(int64_t p) const { return U == 2 && (2 * p + 1) * width >= H_; }

  // w_hr (P, H) transposed: K = H, N = P.
  void pack_projection(const S* w_hr, int64_t p, E* data) {
    using C = ColumnPanels<E>;
    E* panel = data + p * C::panel_stride(H_);
    const int64_t first = p * C::NV * width;
    const int64_t left = (P_ - first + width - 1) / width;
    const int64_t vectors = left < C::NV ? left : C::NV;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t column = first + v * width;
      const int64_t real = P_ - column < width ? P_ - column : width;
      pack_unit_vector<E>(w_hr + column * H_, H_, real, panel + v * width * Operand<E>::group, vectors * width);
    }
  }

  void scan(int d, int64_t r0, int64_t r1, Share panels, Share state_columns, const ThreadScratch& mine,
            Barrier& barrier, bool first) {
    const DirectionForward& dir = layer_.direction[d];
    DirectionScratch& s = direction_[d];
    const bool reverse = d == 1;
    const Steps& steps = layer_.steps;
    const auto time = [&](int64_t step) { return reverse ? T_ - 1 - step : step; };
    const auto live = [&](int64_t t) {
      const int64_t n = steps.rows(t) - r0;
      return n < 0 ? 0 : n < r1 - r0 ? n : r1 - r0;
    };
    if (first) {
      for (int64_t r = r0; r < r1; ++r) begin_row(d, r);
    }
    for (int64_t r = r0; r < r1; ++r) {
      for (int64_t head = 0; head < heads_; ++head) {
        for (int i = 0; i < 2; ++i)
          mine.state_rows[i][head * own_rows_ + r - r0] = s.state[i] + r * state_stride_ + head * K_;
      }
      if (projects_) mine.hidden_rows[r - r0] = s.hidden + r * unit_stride_;
    }
    barrier.wait();
    int now = 0;  // which of the two states is h before the step
    for (int64_t step = 0; step < T_;) {
      const int64_t chunk_end = project_chunk(d, step, r0, panels, mine, time, live);
      int64_t chunk_row = 0;
      for (; step < chunk_end; ++step) {
        const int64_t t = time(step), rows = live(t);
        advance(d, t, r0, rows, panels, mine, now, chunk_row);
        chunk_row += rows;
        if (projects_) {
          barrier.wait();
          project_state(d, t, r0, rows, mine, now, state_columns);
        }
        if (steps.reset && step + 1 < T_) {
          begin_anew(d, time(step + 1), r0, r1, now ^ 1,
                     projects_ ? of_panels(state_columns, ColumnPanels<E>::NV * width, P_)
                               : of_panels(panels, panel_units, H_),
                     of_panels(panels, panel_units, H_));
        }
        barrier.wait();
        now ^= 1;
        if (first && dir.h_n) {
          // Rows that have no later step end here.
          const int64_t later = step + 1 == T_ ? 0 : reverse ? rows : live(time(step + 1));
          for (int64_t r = r0 + later; r < r0 + rows; ++r) {
            S* h_n = rows_of<S>(dir.h_n) + r * P_;
            if (keeps_h_) {
              copy_row<A>(s.carried + r * state_stride_, h_n, P_);
            } else {
              copy_row<A>(s.state[now] + r * state_stride_, h_n, P_);
            }
          }
        }
      }
    }
    if (past_caches_ || output_past_caches_) wait_for_stores_past_caches();
    if (first) {
      for (int64_t r = r0; r < r1; ++r) {
        for (int i = 0; i < Cell::states; ++i)
          copy_row<A>(s.cell + r * cell_stride_ + i * unit_stride_, rows_of<S>(dir.c_n) + (r * Cell::states + i) * H_,
                      H_);
      }
    }
  }

  // The features of some panels of so many columns.
  static Share of_panels(Share panels, int64_t columns, int64_t features) {
    panels.begin = panels.begin * columns < features ? panels.begin * columns : features;
    panels.end = panels.end * columns < features ? panels.end * columns : features;
    return panels;
  }

  void begin_row(int d, int64_t r) {
    const DirectionForward& dir = layer_.direction[d];
    DirectionScratch& s = direction_[d];
    const bool anew = layer_.steps.reset && layer_.steps.begins_anew(d == 1 ? T_ - 1 : 0, r, d == 1);
    const void* h = anew ? dir.extras.reset_h : dir.h0;
    const void* c = anew ? dir.extras.reset_c : dir.c0;
    for (int i = 0; i < 2; ++i) place_state(d, r, i, h, Share(P_, 0, 1));
    for (int i = 0; i < Cell::states; ++i) {
      A* cell = s.cell + r * cell_stride_ + i * unit_stride_;
      copy_row<A>(c ? rows_of<S>(c) + (r * Cell::states + i) * H_ : nullptr, cell, H_);
      for (int64_t u = H_; u < unit_stride_; ++u) cell[u] = 0;
    }
  }

  // Some features of h of row r, from (B, P) or, for null, zeros.
  void place_state(int d, int64_t r, int which, const void* h, Share features) {
    const int64_t first = features.begin, count = features.end - features.begin;
    const S* from = h ? rows_of<S>(h) + r * P_ + first : nullptr;
    E* state = direction_[d].state[which] + r * state_stride_ + first;
    if (!keeps_h_) return copy_row<A>(from, state, count);
    const void* dropout = layer_.direction[d].extras.dropout;
    copy_scaled<A>(from, dropout ? rows_of<S>(dropout) + r * P_ + first : nullptr, state, count);
    copy_row<A>(from, direction_[d].carried + r * state_stride_ + first, count);
  }

  // The states of rows that begin anew before step t, of the owned features.
  void begin_anew(int d, int64_t t, int64_t r0, int64_t r1, int next, Share of_state, Share units) {
    const Extras& extras = layer_.direction[d].extras;
    for (int64_t r = r0; r < r1; ++r) {
      if (!layer_.steps.begins_anew(t, r, d == 1)) continue;
      place_state(d, r, next, extras.reset_h, of_state);
      for (int i = 0; i < Cell::states; ++i) {
        const S* c = extras.reset_c ? rows_of<S>(extras.reset_c) + (r * Cell::states + i) * H_ + units.begin : nullptr;
        copy_row<A>(c, direction_[d].cell + r * cell_stride_ + i * unit_stride_ + units.begin, units.end - units.begin);
      }
    }
  }

  // Input projections of as many steps as the chunk holds; returns the step after them.
  template <class Time, class Live>
  int64_t project_chunk(int d, int64_t step, int64_t r0, Share panels, const ThreadScratch& mine, const Time& time,
                        const Live& live) {
    const Sequence& x = layer_.x;
    int64_t rows = 0;
    for (; step < T_; ++step) {
      const int64_t t = time(step), n = live(t);
      if (rows + n > chunk_rows_) break;
      const S* row = rows_of<S>(x.data) + layer_.steps.step(x, t) + r0 * x.batch_stride;
      for (int64_t r = 0; r < n; ++r, ++rows, row += x.batch_stride) {
        if constexpr (converts_x) {
          E* copy = mine.x + rows * x_stride();
          copy_row<A>(row, copy, I_);
          mine.x_rows[rows] = copy;
        } else {
          mine.x_rows[rows] = row;
        }
      }
    }
    const DirectionScratch& s = direction_[d];
    const From from = packs_input_ ? From::packed : few_inputs_ ? From::dots : From::lanes;
    spread_over_lanes(from, rows, I_, mine.x_rows, mine);
    multiply_panels<0>(mine, from, rows, I_, mine.x_rows, s.w_ih, layer_.direction[d].weights.w_ih, panels.begin,
                       panels.end - panels.begin, mine.projected, own_panels_ * panel_columns,
                       {(normalises_ ? zeros_ : s.input_bias) + panels.begin * panel_columns, 0, nullptr},
                       multiplies_state(d) ? s.w_hh + panels.begin * padded_depth<E>(K_) * panel_columns : nullptr);
    return step;
  }

  // Rows that will be multiplied in lanes go where product_in_lanes finds them.
  void spread_over_lanes(From from, int64_t rows, int64_t K, const E* const* a, const ThreadScratch& mine) {
    if constexpr (!packs_as_it_goes<E>) {
      if (from == From::lanes) pack_transposed<A>(a, rows_in_lanes<A>(rows), K, mine.lanes.rows);
    }
  }

  // c = rows times panels [p, p + count) of a weight, which stand from `panel` on, plus an addend.
  template <int apart>
  FRNN_INLINE void multiply_packed(int64_t rows, int64_t K, const E* const* a, const E* panel, int64_t p, int64_t count,
                                   A* c, int64_t c_stride, Addend<A> addend, const E* then) {
    const int64_t stride = padded_depth<E>(K) * panel_columns;
    if constexpr (U == 2) {
      if (is_narrow(p + count - 1)) {
        const int64_t wide = count - 1, column = wide * panel_columns;
        const E* last = panel + wide * stride;
        product<E, NV>(rows, K, a, panel, wide, stride, c, c_stride, addend, last);
        addend.from += column;
        return product<E, NV / 2>(rows, K, a, last, 1, stride, c + column, c_stride, addend, then);
      }
    }
    product<E, NV, apart>(rows, K, a, panel, count, stride, c, c_stride, addend, then);
  }

  // c = rows times panels [p, p + count) of a weight, packed or not, plus an addend.
  template <int apart>
  FRNN_INLINE void multiply_panels(const ThreadScratch& mine, From from, int64_t rows, int64_t K, const E* const* a,
                                   const E* packed, const void* weight, int64_t p, int64_t count, A* c,
                                   int64_t c_stride, Addend<A> addend, const E* then) {
    if (from == From::packed)
      return multiply_packed<apart>(rows, K, a, packed + p * padded_depth<E>(K) * panel_columns, p, count, c, c_stride,
                                    addend, then);
    const S* w = rows_of<S>(weight);
    for (int64_t q = 0; q < count; ++q) {
      const int64_t column = q * panel_columns;
      const Addend<A> here{addend.from + column, addend.stride, apart > 0 ? addend.apart + column : nullptr};
      if (from == From::lanes) {
        if constexpr (packs_as_it_goes<E>) {
          pack_panel(weight, K, p + q, mine.panel);
          multiply_packed<apart>(rows, K, a, mine.panel, p + q, 1, c + column, c_stride, here, nullptr);
        } else {
          product_in_lanes<A, G, U, apart>(rows, K, a, w, H_, p + q, c + column, c_stride, here, mine.lanes);
        }
      } else {
        product_by_dots<E, G, U, apart>(rows, K, a, w, H_, p + q, c + column, c_stride, here);
      }
    }
  }

  From states_from(int64_t rows) const {
    return packs_state_ ? From::packed : rows < least_rows_in_lanes<A> ? From::dots : From::lanes;
  }

  // Whether h is multiplied at all: not in a single step from zeros, whose product is known.
  bool multiplies_state(int d) const { return T_ > 1 || !begins_at_zero_[d]; }
  bool is_zero_step(int d, int64_t t) const { return begins_at_zero_[d] && t == (d == 1 ? T_ - 1 : 0); }

  // c = the addend, as multiply_panels where all rows are zeros.
  template <int apart>
  static void product_of_zeros(int64_t rows, int64_t count, A* c, int64_t c_stride, Addend<A> addend) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < count * NV; ++v) {
        const A* added = v % NV >= NV - apart ? addend.apart : addend.from + r * addend.stride;
        Simd<A>::store(c + r * c_stride + v * width, Simd<A>::load(added + v * width));
      }
    }
  }

  // One step of the owned rows and panels.
  void advance(int d, int64_t t, int64_t r0, int64_t rows, Share panels, const ThreadScratch& mine, int now,
               int64_t chunk_row) {
    if (rows == 0) return;
    if (!is_zero_step(d, t)) spread_over_lanes(states_from(rows), rows, K_, mine.state_rows[now], mine);
    if constexpr (Cell::kind < CellKind::custom) {
      if (normalises_) return advance_normalised(d, t, r0, rows, mine, now, chunk_row);
    }
    if (heads_ == 1) return advance_head(d, t, r0, rows, panels, panels, 0, mine, now, chunk_row);
    const int64_t panels_of_head = K_ / panel_units;
    for (int64_t i = 0; i < heads_; ++i) {
      const int64_t head = now == 1 ? heads_ - 1 - i : i;
      Share part = panels;
      if (part.begin < head * panels_of_head) part.begin = head * panels_of_head;
      if (part.end > (head + 1) * panels_of_head) part.end = (head + 1) * panels_of_head;
      if (part.begin < part.end) advance_head(d, t, r0, rows, panels, part, head, mine, now, chunk_row);
    }
  }

  // The same of those owned panels whose units are of one head.
  void advance_head(int d, int64_t t, int64_t r0, int64_t rows, Share own, Share panels, int64_t head,
                    const ThreadScratch& mine, int now, int64_t chunk_row) {
    const DirectionScratch& s = direction_[d];
    const int64_t together = panels_at_once<NV>(rows), stride = own_panels_ * panel_columns;
    const int64_t groups = (panels.end - panels.begin + together - 1) / together;
    const bool descending = now == 1;  // every second step (product.h)
    const E* w_hh = s.w_hh;
    const E* const* state_rows = mine.state_rows[now] + head * own_rows_;
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t p = panels.begin + (descending ? groups - 1 - i : i) * together;
      const int64_t count = panels.end - p < together ? panels.end - p : together;
      const int64_t next = descending ? p - together : p + together;
      const E* then = i + 1 < groups ? w_hh + next * padded_depth<E>(K_) * panel_columns : nullptr;
      const A* projected = mine.projected + chunk_row * stride + (p - own.begin) * panel_columns;
      const Addend<A> addend{projected, stride, s.hidden_bias + p * panel_columns};
      if (is_zero_step(d, t)) {
        product_of_zeros<vectors_apart>(rows, count, mine.sums, together * panel_columns, addend);
      } else {
        multiply_panels<vectors_apart>(mine, states_from(rows), rows, K_, state_rows, w_hh,
                                       layer_.direction[d].weights.w_hh, p, count, mine.sums, together * panel_columns,
                                       addend, then);
      }
      gates_of_panels(d, t, r0, rows, p, count, projected, mine.sums, together * panel_columns, now);
    }
  }

  // One step with layer normalisation, which wants all sums of a row before its first gate: the panels are all owned.
  void advance_normalised(int d, int64_t t, int64_t r0, int64_t rows, const ThreadScratch& mine, int now,
                          int64_t chunk_row) {
    const DirectionForward& dir = layer_.direction[d];
    const DirectionScratch& s = direction_[d];
    const int64_t together = panels_at_once<NV>(rows), stride = panels_ * panel_columns;
    const int64_t panels_of_head = heads_ == 1 ? panels_ : K_ / panel_units;
    const int64_t groups = (panels_of_head + together - 1) / together;
    for (int64_t i = 0; i < heads_ * groups; ++i) {
      const int64_t group_of_all = now == 1 ? heads_ * groups - 1 - i : i;  // every second step descending (product.h)
      const int64_t head = group_of_all / groups, begin = group_of_all % groups * together;
      const int64_t p = head * panels_of_head + begin;
      const int64_t count = panels_of_head - begin < together ? panels_of_head - begin : together;
      if (is_zero_step(d, t)) {
        product_of_zeros<0>(rows, count, mine.all_sums + p * panel_columns, stride, {zeros_, 0, nullptr});
        continue;
      }
      multiply_panels<0>(mine, states_from(rows), rows, K_, mine.state_rows[now] + head * own_rows_, s.w_hh,
                         dir.weights.w_hh, p, count, mine.all_sums + p * panel_columns, stride, {zeros_, 0, nullptr},
                         nullptr);
    }
    A* projected = mine.projected + chunk_row * stride;
    normalised_gates(d, t, r0, rows, projected, mine.all_sums, now);
  }

  // The rest of it, of `rows` rows that stand in `projected` and `sums`, all panels side by side.
  __attribute__((noinline)) void normalised_gates(int d, int64_t t, int64_t r0, int64_t rows, A* projected, A* sums,
                                                  int now) {
    const DirectionForward& dir = layer_.direction[d];
    const DirectionScratch& s = direction_[d];
    const int64_t stride = panels_ * panel_columns;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = layer_.steps.first_row(t) + r0 + r;
      S* centred = saves_gates_ ? rows_of<S>(dir.gates) + row * saved_stride_ + Cell::saved * H_ : nullptr;
      A *x = projected + r * stride, *h = sums + r * stride;
      normalise_panels<S, G, U>(x, H_, s.gain_ih, centred, [&](int64_t column, int) __attribute__((always_inline)) {
        return Simd<A>::load(s.input_bias + column);
      });
      normalise_panels<S, G, U>(h, H_, s.gain_hh, centred ? centred + G * H_ : nullptr,
                                [&](int64_t column, int v) __attribute__((always_inline)) {
                                  return Simd<A>::load((v < NV - vectors_apart ? x : s.hidden_bias) + column);
                                });
    }
    gates_of_panels(d, t, r0, rows, 0, panels_, projected, sums, stride, now);
    if constexpr (Cell::kind == CellKind::lstm) hidden_of_normalised(d, t, r0, rows, now);
  }

  // h = o * act(c normalised), act being tanh or another function.
  void hidden_of_normalised(int d, int64_t t, int64_t r0, int64_t rows, int now) {
    using Values = Pack<V, group, rough_gates<S>>;
    const DirectionScratch& s = direction_[d];
    const Weights& w = layer_.direction[d].weights;
    const Sequence& y = layer_.y;
    for (int64_t r = r0; r < r0 + rows; ++r) {
      A* c = s.new_cell + r * unit_stride_;
      const A scale = centre_units<A>(c, H_);
      S* output = rows_of<S>(y.data) + layer_.steps.step(y, t) + r * y.batch_stride + d * P_;
      for (int64_t first = 0; first < H_; first += group * width) {
        Values h{};
        for (int i = 0; i < group && first + i * width < H_; ++i) {
          const int64_t u = first + i * width, n = H_ - u;
          h.v[i] = Simd<A>::load_n(c + u, n) * scale * Simd<A>::load_n(rows_of<S>(w.norm_c) + u, n);
          if (w.norm_c_bias) h.v[i] = h.v[i] + Simd<A>::load_n(rows_of<S>(w.norm_c_bias) + u, n);
        }
        CalledFunctions<Values>::activate(layer_.within.activation, &h, 1);
        for (int i = 0; i < group && first + i * width < H_; ++i) {
          const int64_t u = first + i * width, n = H_ - u;
          const V hidden = Simd<A>::load_n(s.output_gate + r * unit_stride_ + u, n) * h.v[i];
          E* state = s.state[now ^ 1] + r * state_stride_ + u;
          if (projects_) {
            Simd<A>::store(s.hidden + r * unit_stride_ + u, hidden);
          } else if (keeps_h_) {
            write_state_with_options(d, layer_.steps.first_row(t) + r, r, u, output + u, state,
                                     s.carried + r * state_stride_ + u, hidden, n);
          } else {
            write_state(output + u, state, hidden, n);
          }
        }
      }
    }
  }

  // A place in an array for each of several vectors of units.
  template <class T>
  struct Places {
    T* first;
    int64_t stride;
    FRNN_INLINE T* operator[](int64_t i) const { return first + i * stride; }
    FRNN_INLINE void advance(int64_t n) { first += n * stride; }
  };

  // Vectors of units whose gates are computed one like the other: one column of all rows, or all columns of one row.
  struct Units {
    Places<const A> projected, sums;  // gate g at + g * U * width
    Places<const E> h_prev;
    Places<E> h_next, hidden;
    Places<A> cell, cells;
    Places<S> y, gates;
    // For options alone: the first unit and how far the next is from it, the row of all steps and of the batch.
    Places<A> carried;
    int64_t unit, next_unit, row, batch_row, next_row;
    int64_t to_previous;  // rows to the step before; 0: there is none

    FRNN_INLINE void advance(int64_t n) {
      projected.advance(n);
      sums.advance(n);
      h_prev.advance(n);
      h_next.advance(n);
      hidden.advance(n);
      cell.advance(n);
      cells.advance(n);
      y.advance(n);
      gates.advance(n);
      carried.advance(n);
      unit += n * next_unit;
      row += n * next_row;
      batch_row += n * next_row;
    }
  };

  // The cell's step for some rows and panels [first, first + count).
  FRNN_INLINE void gates_of_panels(int d, int64_t t, int64_t r0, int64_t rows, int64_t first, int64_t count,
                                   const A* projected, const A* sums, int64_t sums_stride, int now) {
    static_assert(G == 1 || U == 1, "neighbouring vectors of units are equally far apart");
    constexpr int64_t next_vector = G == 1 ? width : panel_columns;
    const DirectionForward& dir = layer_.direction[d];
    const DirectionScratch& s = direction_[d];
    const Sequence& y = layer_.y;
    const int64_t first_row = layer_.steps.first_row(t) + r0, begin = first * panel_units;
    const int64_t left = H_ - begin;
    const int64_t whole = left / width < count * U ? left / width : count * U;  // vectors of which all units exist
    const bool tail = whole < count * U && left % width != 0;
    const bool by_rows = rows > 1;
    const auto places = [&](auto* data, int64_t row_stride, int64_t vector_stride) __attribute__((always_inline)) {
      return Places<std::remove_pointer_t<decltype(data)>>{data, by_rows ? row_stride : vector_stride};
    };
    for (int64_t v = 0; v < (by_rows ? whole + tail : 1); ++v) {
      const int64_t unit = begin + v * width;
      Units units;
      units.projected = places(projected + v * next_vector, own_panels_ * panel_columns, next_vector);
      units.sums = places(sums + v * next_vector, sums_stride, next_vector);
      units.h_prev = places(static_cast<const E*>(s.state[now]) + r0 * state_stride_ + unit, state_stride_, width);
      units.h_next = places(s.state[now ^ 1] + r0 * state_stride_ + unit, state_stride_, width);
      units.hidden = places(s.hidden + r0 * unit_stride_ + unit, unit_stride_, width);
      units.cell = places(s.cell + r0 * cell_stride_ + unit, cell_stride_, width);
      units.cells = places(rows_of<A>(dir.cells) + first_row * Cell::states * H_ + unit, Cell::states * H_, width);
      units.y = places(rows_of<S>(y.data) + layer_.steps.step(y, t) + r0 * y.batch_stride + d * P_ + unit,
                       y.batch_stride, width);
      units.gates = places(rows_of<S>(dir.gates) + first_row * saved_stride_ + unit, saved_stride_, width);
      units.carried = places(s.carried + r0 * state_stride_ + unit, state_stride_, width);
      units.unit = unit;
      units.next_unit = by_rows ? 0 : width;
      units.row = first_row;
      units.batch_row = r0;
      units.next_row = by_rows ? 1 : 0;
      const int64_t before = d == 1 ? t + 1 : t - 1;
      units.to_previous = before < 0 || before >= T_ ? 0 : layer_.steps.first_row(before) - layer_.steps.first_row(t);
      const bool saves = dir.gates || dir.cells;
      const int64_t vectors = by_rows ? rows : whole;
      with_gates<S>(gates_, [&](auto kind) {
        if (!by_rows || v < whole) gates_of<true, kind>(d, units, vectors, width, saves);
        if (tail && (!by_rows || v == whole)) gates_of<false, kind>(d, units, by_rows ? rows : 1, left % width, saves);
      });
    }
  }

  // `vectors` of them, each of n units: a whole vector, or a part of one.
  template <bool whole, Gates kind>
  FRNN_INLINE void gates_of(int d, Units& units, int64_t vectors, int64_t n, bool saves) {
    if constexpr (kind != Gates::plain) {
      // One body for all of them, of which the last vectors may be computed twice over: code that few calls run.
      while (vectors > 0) {
        const int count = vectors < group ? int(vectors) : group;
        gates<group, false, kind>(d, units, n, saves, count);
        units.advance(count);
        vectors -= count;
      }
      return;
    }
    for (; vectors >= group; vectors -= group) {
      gates<group, whole, kind>(d, units, n, saves, group);
      units.advance(group);
    }
    for (; vectors > 0; --vectors) {
      gates<1, whole, kind>(d, units, n, saves, 1);
      units.advance(1);
    }
  }

  // Vectors whose gates are computed together. Their chains hide each other's latency, which gains more than values on
  // the stack cost: measured with AVX2 and SSE2. With AVX-512 an LSTM takes two, whose tables stand in registers as
  // well.
  static constexpr int group = G == 4 && FRNN_VECTOR_BYTES == 64 ? 2 : 4;

  // count: how many of the N vectors there are; the others stand for the last of them.
  template <int N, bool whole, Gates kind>
  FRNN_INLINE void gates(int d, const Units& units, int64_t n, bool saves, int count) {
    using Values = Pack<V, N, rough_gates<S>>;
    constexpr bool plain = kind == Gates::plain;
    if (whole) n = width;
    const auto place = [&](int i) __attribute__((always_inline)) { return plain || i < count ? i : count - 1; };
    Values x[G], r[G], saved[Cell::saved + 1], h_prev{}, c_prev[Cell::states + 1]{}, h, c[Cell::states + 1]{};
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const int k = place(i);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        // The sums hold the projection too, but where the cell wants it apart; -0 added to them is no operation.
        r[g].v[i] = Simd<A>::load(units.sums[k] + g * U * width);
        x[g].v[i] =
            Cell::hidden_bias_apart(g) ? Simd<A>::load(units.projected[k] + g * U * width) : Simd<A>::splat(A(-0.0));
      }
      if constexpr (Cell::reads_h)
        h_prev.v[i] = !plain && keeps_h_ ? Simd<A>::load(units.carried[k]) : Simd<A>::load(units.h_prev[k]);
#pragma GCC unroll 4
      for (int j = 0; j < Cell::states; ++j) c_prev[j].v[i] = Simd<A>::load(units.cell[k] + j * unit_stride_);
    }
    bool is_change = false;
    if constexpr (!streams_alone && !plain && Cell::kind < CellKind::custom && std::is_same_v<S, A>) {
      if (layer_.known) {
        is_change = true;
        changes_of_step<N>(d, units, n, x, r, h_prev, c_prev[0], h, c[0], saved, place);
      }
    }
    if constexpr (plain) {
      forward_of<Cell>(x, r, h_prev, c_prev, h, c, saved);
    } else if (!is_change) {
      Options<Values, kind == Gates::own_functions> options{layer_.within, {}};
      for (int i = 0; i < N; ++i)
        load_peephole<S>(options, layer_.direction[d].weights.peephole, H_, units.unit + place(i) * units.next_unit, n,
                         i);
      forward_of<Cell>(x, r, h_prev, c_prev, h, c, saved, options);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      if (!plain && i >= count) break;
      if constexpr (Cell::kind == CellKind::lstm && !plain) {
        if (normalises_) {
          const int64_t place =
              (units.batch_row + i * units.next_row) * unit_stride_ + units.unit + i * units.next_unit;
          Simd<A>::store(direction_[d].output_gate + place, h.v[i]);
          Simd<A>::store(direction_[d].new_cell + place, c[0].v[i]);
        }
        const Zoneout<A> zone{row_of_bits(layer_.direction[d].extras.zoneout_cell, units.row + i * units.next_row, H_),
                              A(layer_.within.zoneout_cell)};
        if (zone.any()) c[0].v[i] = zone.applied(c[0].v[i], c_prev[0].v[i], units.unit + i * units.next_unit, n);
      }
#pragma GCC unroll 4
      for (int j = 0; j < Cell::states; ++j) Simd<A>::store(units.cell[i] + j * unit_stride_, c[j].v[i]);
      if (Cell::kind == CellKind::lstm && !plain && normalises_) continue;  // h is made of the normalised c
      if (projects_) {
        Simd<A>::store(units.hidden[i], h.v[i]);
      } else if (plain || !keeps_h_) {
        write_state(units.y[i], units.h_next[i], h.v[i], n);
      } else {
        write_state_with_options(d, units.row + i * units.next_row, units.batch_row + i * units.next_row,
                                 units.unit + i * units.next_unit, units.y[i], units.h_next[i], units.carried[i],
                                 h.v[i], n);
      }
    }
    if (streams_alone || !saves) return;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      if (!plain && i >= count) break;
      if (saves_gates_) {
#pragma GCC unroll 4
        for (int g = 0; g < Cell::saved; ++g) keep(units.gates[i] + g * H_, saved[g].v[i], n, past_caches_);
      }
#pragma GCC unroll 4
      for (int j = 0; j < Cell::states; ++j) keep(units.cells[i] + j * H_, c[j].v[i], n, past_caches_);
    }
  }

  // How the results of a step change, and what it saved.
  template <int N, class Values, class Place>
  FRNN_INLINE void changes_of_step(int d, const Units& units, int64_t n, Values* x, Values* r, const Values& h_prev,
                                   const Values& c_prev, Values& h, Values& c, Values* saved, const Place& place) {
    KnownStep<Values> step{}, change{};
    const S* more = rows_of<S>(layer_.more_of_sums[d]);
    for (int i = 0; i < N; ++i) {
      const int64_t k = place(i), row = units.row + k * units.next_row, unit = units.unit + k * units.next_unit;
      const KnownPlace at{row, units.to_previous == 0 ? -1 : row + units.to_previous,
                          units.batch_row + k * units.next_row};
      load_known<Cell, S>(layer_.known[d], at, H_, D_ * H_, unit, n, i, step);
      for (int g = 0; more && g < G; ++g) r[g].v[i] = r[g].v[i] + Simd<A>::load_n(more + (row * G + g) * H_ + unit, n);
    }
    change.h_prev = h_prev;
    change.c_prev = c_prev;
    StepDerivatives<Cell>::template tangents<Values>(step, x, r, change);
    h = change.h;
    c = change.c;
    for (int g = 0; g < Cell::saved; ++g) saved[g] = change.saved[g];
  }

  static bool aligned_to_lines(const DirectionForward& dir) {
    return (reinterpret_cast<uintptr_t>(dir.gates) | reinterpret_cast<uintptr_t>(dir.cells)) % FRNN_VECTOR_BYTES == 0;
  }

  // Stores what this pass does not read again.
  template <class T>
  FRNN_INLINE void keep(T* dst, V v, int64_t n, bool past_caches) {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (past_caches) return Simd<A>::store_past_caches(dst, v);
    }
    Simd<A>::store_n(dst, v, n);
  }

  // h of one vector of units, to the next state and to the output, both as the layer's dtype rounds it.
  FRNN_INLINE void write_state(S* y, E* state, V h, int64_t n) {
    keep(y, h, n, !streams_alone && output_past_caches_);
    if constexpr (std::is_same_v<S, E>) {
      Simd<A>::store(state, h);
    } else {
      Simd<A>::store(state, Simd<A>::template rounded<S>(h));
    }
  }

  // The same with options; features from u on, of `row` of all steps and `r` of the batch.
  FRNN_INLINE void write_state_with_options(int d, int64_t row, int64_t r, int64_t u, S* y, E* state, A* carried, V h,
                                            int64_t n) {
    const Extras& extras = layer_.direction[d].extras;
    const Zoneout<A> zone{row_of_bits(extras.zoneout, row, P_), A(layer_.within.zoneout)};
    if (zone.any()) h = zone.applied(h, Simd<A>::load(carried), u, n);
    h = Simd<A>::template rounded<S>(h);
    Simd<A>::store(carried, h);
    keep(y, h, n, !streams_alone && output_past_caches_);
    if (extras.dropout) h = h * Simd<A>::load_n(rows_of<S>(extras.dropout) + r * P_ + u, n);
    Simd<A>::store(state, h);
  }

  // h = w_hr (o * tanh(c)) for the owned rows and columns.
  void project_state(int d, int64_t t, int64_t r0, int64_t rows, const ThreadScratch& mine, int now, Share columns) {
    using C = ColumnPanels<E>;
    const ColumnPanels<E> w_hr{direction_[d].w_hr, H_, P_};
    const int64_t stride = C::padded_columns(P_);
    product_columns<E>(rows, mine.hidden_rows, w_hr, columns.begin, columns.end, mine.state_sums, stride, false);
    write_projected(d, t, r0, rows, mine.state_sums, now, columns);
  }

  // h of these sums, (rows, P padded).
  __attribute__((noinline)) void write_projected(int d, int64_t t, int64_t r0, int64_t rows, const A* sums, int now,
                                                 Share columns) {
    using C = ColumnPanels<E>;
    const int64_t stride = C::padded_columns(P_);
    const int64_t end = columns.end * C::NV * width < P_ ? columns.end * C::NV * width : P_;
    for (int64_t r = 0; r < rows; ++r) {
      S* y = rows_of<S>(layer_.y.data) + layer_.steps.step(layer_.y, t) + (r0 + r) * layer_.y.batch_stride + d * P_;
      E* state = direction_[d].state[now ^ 1] + (r0 + r) * state_stride_;
      A* carried = direction_[d].carried + (r0 + r) * state_stride_;
      const int64_t row = layer_.steps.first_row(t) + r0 + r;
      for (int64_t u = columns.begin * C::NV * width; u < end; u += width) {
        const V h = Simd<A>::load(sums + r * stride + u);
        if (!keeps_h_) {
          write_state(y + u, state + u, h, P_ - u);
        } else {
          write_state_with_options(d, row, r0 + r, u, y + u, state + u, carried + u, h, P_ - u);
        }
      }
    }
  }

  const LayerForward& layer_;
  const Plan& plan_;
  const int64_t I_, H_, P_;
  const int64_t heads_, K_;  // K: features of h that a unit's weights multiply
  const int D_;
  const int64_t T_, B_, panels_;
  const bool projects_;
  // Whether w_ih and w_hh are packed before they are multiplied; whether all inputs are few rows.
  bool packs_input_ = true, packs_state_ = true;
  bool few_inputs_ = false;
  bool past_caches_ = false, output_past_caches_ = false;
  const Gates gates_;
  const bool keeps_h_;          // apart from what is multiplied
  const bool saves_gates_;      // or, for the backward pass, the cells alone
  const bool normalises_;       // by layer normalisation
  const int64_t saved_stride_;  // values of a row that are saved
  bool begins_at_zero_[2] = {};
  PackedCopy* copy_ = nullptr;  // null: none is kept of weights such as these
  std::atomic<bool> changed_{false};
  const int64_t state_stride_, unit_stride_, cell_stride_;
  int64_t own_panels_ = 0, own_rows_ = 0, chunk_rows_ = 0;
  DirectionScratch direction_[2];
  A* zeros_ = nullptr;  // (all panels): the bias of what is normalised before a bias is added
  ThreadScratch* threads_ = nullptr;
  Barrier* unit_barriers_ = nullptr;
  Barrier* everyone_ = nullptr;
};

}  // namespace FRNN_ISA
}  // namespace fused_rnn
