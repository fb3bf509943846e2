// The backward pass of one layer, in one launch.
//
// The scan walks against the direction's time in chunks of steps. In a chunk each thread computes the gate gradients of
// the rows and units it owns (one barrier a step where units are split); then the whole team turns the chunk, still in
// cache, into the gradient of the input and adds to the weight gradients. No thread ever adds to another's result, and
// every sum runs in one fixed order: results are the same bits for any number of threads that gives the same chunks.
#pragma once

#include <cstring>

#include "forward.h"
#include "recompute.h"

namespace fused_rnn {
namespace FRNN_ISA {

// Rows of all steps of a chunk: long sums for the weight gradients, while their operands stay in the shared cache.
inline constexpr int64_t gradient_chunk_rows = 768;

// Weight gradients of a single chunk are written at once, instead of being summed first, where the chunk's rows take no
// more bytes than this: they are read once for each tile of rows, from the second-level cache.
inline constexpr size_t most_operand_bytes = 512 * 1024;

// Those that caches do not keep go past them, which saves reading what is overwritten: 0.76 to 0.92 of the time of the
// backward pass with 3 rows. With 64 the products take longer than the stores, and 1.01 to 1.12 was measured; but where
// an instruction multiplies bfloat16, 0.9 to 1.0.
template <class E>
inline constexpr int64_t most_rows_past_caches = packs_as_it_goes<E> ? 64 : 16;

// As forward_of().
template <class Cell, class V, class... Options>
FRNN_INLINE void backward_of(const V* saved, const V& h, const V& h_prev, const V* c, const V* c_prev, const V& dh,
                             const V* dc, V* grads, V& dh_prev, V* dc_prev, const Options&... options) {
  if constexpr (Cell::kind >= CellKind::custom) {
    Cell::template backward<V>(saved, h_prev, c_prev, c, dh, dc, grads, dh_prev, dc_prev);
  } else {
    Cell::template backward<V>(saved, h, h_prev, c[0], c_prev[0], dh, dc[0], grads, dh_prev, dc_prev[0], options...);
  }
}

// Gate gradients are kept, and multiplied, as E.
template <class Cell, class S, class E>
class BackwardPass {
  using A = typename Accumulator<S>::type;
  using V = typename Simd<A>::V;
  using Columns = ColumnPanels<E>;
  static constexpr int width = Simd<A>::width;
  static constexpr int G = Cell::gates;
  static constexpr int GG = Cell::grad_gates;
  static constexpr int64_t panel_columns = Columns::NV * width;

 public:
  BackwardPass(const LayerBackward& layer, const Plan& plan)
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
        projects_(layer.direction[0].weights.w_hr != nullptr),
        wants_x_(layer.grad_x.data != nullptr),
        gates_(gates_wanted<Cell>(layer)),
        plain_gates_(layer.plain_gates),
        normalises_(layer.within.layer_norm),
        saved_stride_((Cell::saved + (normalises_ ? 2 * G : 0)) * H_),
        input_grads_(normalises_ ? moved(Cell::input_grads, GG) : Cell::input_grads),
        hidden_grads_(normalises_ ? moved(Cell::hidden_grads, GG + G) : Cell::hidden_grads),
        state_stride_(round_up(P_, width) + 16),
        unit_stride_(round_up(H_, width) + 16),
        cell_stride_(Cell::states * unit_stride_),
        grad_stride_(round_up((GG + (normalises_ ? 2 * G : 0)) * H_, width) + 32),
        recomputation_(layer, plan.threads()) {}

  // Whether weights are read where they stand.
  static bool in_place(const LayerBackward& layer) {
    const bool recomputes = (Cell::saved > 0 || layer.within.layer_norm) && !layer.direction[0].gates;
    return !recomputes && !layer.direction[0].weights.w_hr && reads_weights_in_place(layer.sizes, layer.steps);
  }

  __attribute__((noinline)) bool run() {
    packs_ = !in_place(layer_);
    const int64_t all = layer_.steps.total_rows();
    chunk_rows_ = B_ > gradient_chunk_rows ? B_ : gradient_chunk_rows < all ? gradient_chunk_rows : all;
    one_chunk_ = chunk_rows_ >= all;
    depth_ = round_up(chunk_rows_, width * Operand<E>::group) + 16;
    Layout measure;
    lay_out(measure);
    void* memory = scratch_memory(measure.used());
    if (!memory) return false;
    Layout layout(memory);
    lay_out(layout);
    for (int i = 0; i < plan_.threads() / plan_.unit_groups; ++i) unit_barriers_[i].reset(plan_.unit_groups);
    everyone_->reset(plan_.threads());
    return run_team(plan_.threads(), &task, this);
  }

 private:
  // A weight gradient: M rows by N columns, summed in `sums`, which is the result itself where that has the right
  // shape.
  struct WeightGradient {
    void* result = nullptr;  // null: not needed
    A* sums = nullptr;       // null: one chunk holds all rows, and few enough, so that results are written as they come
    int64_t stride = 0;
    bool past_caches = false;  // results, where they are written as they come
    E* operand = nullptr;      // the chunk's rows, packed in columns
    int64_t next_operand = 0;  // of the next head
  };
  // With layer normalisation: what the gradients of gains and biases are made of, which are sums over all rows.
  struct NormGradients {
    A* scales = nullptr;   // (chunk_rows, 2) 1 / deviation of w_ih x and of w_hh h
    A* of_cell = nullptr;  // (chunk_rows, unit_stride) gradient of the normalised c with its gain and bias
    A* cell = nullptr;     // (chunk_rows, unit_stride) c normalised
    A* sums = nullptr;     // (4 * G * H + 2 * H); null: not needed
    A* sums_of_chunk = nullptr;
    // Where each stands in the sums: gains of w_ih x and w_hh h, b_ih, b_hh, gain and bias of c.
    static int64_t place(int which, int64_t H) { return (which < 5 ? which * G : 4 * G + which - 4) * H; }
  };
  struct DirectionScratch {
    E *w_ih, *w_hh, *w_hr;
    A* grad_state;  // (B, state_stride) gradient of h, of the step that comes next in the scan
    A* grad_cell;   // (B, cell_stride) of the private states, each at a distance of unit_stride
    // (chunk_rows, grad_stride) gate gradients, and with layer normalisation those of w_ih x and w_hh h before it
    E* grads;
    E* grad_h;           // (chunk_rows, state_stride) gradient of the projected h
    E* hidden;           // (chunk_rows, unit_stride) h before its projection
    A* through;          // (B, state_stride) gradient of the h that was multiplied, where that is h times factors
    S* dropped;          // (chunk_rows, P) that h
    A *anew_h, *anew_c;  // (B, P), (B, states * H) gradients of what rows begin anew from; null: not needed
    WeightGradient ih, hh, hr;
    A *bias_ih, *bias_hh;  // (G * H), null: not needed
    A* peephole;           // (3 * H), null: not needed
    NormGradients norms;
    bool wants_weights() const {
      return ih.result || hh.result || hr.result || bias_ih || bias_hh || peephole || norms.sums;
    }
  };
  // Of one row of an LSTM with layer normalisation: the gradients of c and o that come through h, h before a
  // projection, and what is on the way to them; each (unit_stride).
  struct NormalisedRow {
    A *to_cell, *to_output, *hidden, *cell;
  };
  struct ThreadScratch {
    A* grad_hidden;  // (B, unit_stride) gradient of h before its projection
    NormalisedRow normalised;
    A* tile;        // (chunk_rows, padded I): the gradient of the input before it is stored
    E* transposed;  // (rows_together, depth)
    A* results;     // (rows_at_once, widest weight gradient): those that are not summed elsewhere
    E* block;       // of product_of_columns
    const E** a_rows;
    const S** b_rows;
  };

  void lay_out(Layout& layout) {
    for (int d = 0; d < D_; ++d) {
      const DirectionBackward& dir = layer_.direction[d];
      DirectionScratch& s = direction_[d];
      s.w_ih = layout.take<E>(packs_ && wants_x_ ? int64_t(Columns::elements(G * H_, I_)) : 0);
      s.w_hh = layout.take<E>(!packs_ || !wants_state(d) ? 0
                              : heads_ == 1              ? int64_t(Columns::elements(G * H_, P_))
                                                         : heads_ * G * elements_of_block());
      s.w_hr = layout.take<E>(projects_ ? int64_t(Columns::elements(P_, H_)) : 0);
      s.grad_state = layout.take<A>(B_ * state_stride_);
      s.grad_cell = layout.take<A>(B_ * cell_stride_);
      s.grads = layout.take<E>(chunk_rows_ * grad_stride_);
      s.grad_h = layout.take<E>(projects_ ? chunk_rows_ * state_stride_ : 0);
      s.hidden = layout.take<E>(projects_ ? chunk_rows_ * unit_stride_ : 0);
      s.through = dir.extras.dropout ? layout.take<A>(B_ * state_stride_) : nullptr;
      s.dropped = dir.extras.dropout ? layout.take<S>(chunk_rows_ * P_) : nullptr;
      s.anew_h = dir.grad_reset_h ? layout.take<A>(B_ * P_) : nullptr;
      s.anew_c = dir.grad_reset_c ? layout.take<A>(B_ * Cell::states * H_) : nullptr;
      s.peephole = dir.grad_peephole ? layout.take<A>(3 * H_) : nullptr;
      s.ih = weight_gradient(layout, dir.grad_w_ih, G * H_, I_);
      s.hh = weight_gradient(layout, dir.grad_w_hh, G * H_, K_, heads_);
      s.hr = weight_gradient(layout, dir.grad_w_hr, P_, H_);
      s.bias_ih = dir.grad_b_ih && !normalises_ ? layout.take<A>(G * H_) : nullptr;
      s.bias_hh = dir.grad_b_hh && !normalises_ ? layout.take<A>(G * H_) : nullptr;
      if (normalises_) lay_out_norms(layout, dir, s.norms);
    }
    recomputation_.lay_out(layout, chunk_rows_);
    unit_barriers_ = layout.take<Barrier>(plan_.threads() / plan_.unit_groups);
    everyone_ = layout.take<Barrier>(1);
    threads_ = layout.take<ThreadScratch>(plan_.threads());
    const int64_t longest = H_ > P_ ? H_ : P_;
    for (int i = 0; i < plan_.threads(); ++i) {
      ThreadScratch t;
      t.grad_hidden = layout.take<A>(projects_ ? B_ * unit_stride_ : 0);
      for (A** row : {&t.normalised.to_cell, &t.normalised.to_output, &t.normalised.hidden, &t.normalised.cell})
        *row = layout.take<A>(normalises_ && Cell::has_cell ? unit_stride_ : 0);
      t.tile = layout.take<A>(!wants_x_ ? 0
                              : packs_  ? (chunk_rows_ / plan_.threads() + 1) * Columns::padded_columns(I_)
                                        : chunk_rows_ * own_input_columns());
      t.transposed = layout.take<E>(rows_together * depth_);
      const int64_t widest = I_ > longest ? I_ : longest;
      t.results = layout.take<A>(rows_at_once<E, Columns::NV>() * Columns::padded_columns(widest));
      t.block = layout.take<E>(packs_ ? 0 : column_block_elements<E>);
      const int64_t a_rows = 2 * most_operand_rows();
      t.a_rows = layout.take<const E*>(a_rows > longest ? a_rows : longest);
      const int64_t b_rows = most_operand_rows() > G * H_ ? most_operand_rows() : G * H_;
      t.b_rows = layout.take<const S*>(b_rows > P_ ? b_rows : P_);
      if (threads_) threads_[i] = t;
    }
  }

  void lay_out_norms(Layout& layout, const DirectionBackward& dir, NormGradients& norms) {
    norms.scales = layout.take<A>(2 * chunk_rows_);
    for (A** rows : {&norms.of_cell, &norms.cell})
      *rows = layout.take<A>(Cell::has_cell ? chunk_rows_ * unit_stride_ : 0);
    bool wanted = false;
    for (int k = 0; k < 6; ++k) wanted = wanted || norm_result(dir, k);
    if (!wanted) return;
    for (A** sums : {&norms.sums, &norms.sums_of_chunk}) *sums = layout.take<A>(NormGradients::place(6, H_));
  }

  static void* norm_result(const DirectionBackward& dir, int which) {
    void* const results[] = {dir.grad_norm_ih, dir.grad_norm_hh, dir.grad_b_ih,
                             dir.grad_b_hh,    dir.grad_norm_c,  dir.grad_norm_c_bias};
    return results[which];
  }

  // operands: how many there are, each of a part of the chunk's rows.
  WeightGradient weight_gradient(Layout& layout, void* result, int64_t M, int64_t N, int64_t operands = 1) {
    WeightGradient w;
    if (!result) return w;
    w.result = result;
    w.stride = Columns::padded_columns(N);
    w.next_operand = int64_t(Columns::elements(most_operand_rows(), N));
    w.operand = layout.take<E>(operands * w.next_operand);
    const size_t elements = size_t(operands * w.next_operand);
    if (one_chunk_ && elements * sizeof(E) <= most_operand_bytes) {
      w.past_caches = chunk_rows_ <= most_rows_past_caches<E> &&
                      G * H_ * (I_ + P_) * int64_t(sizeof(S)) > past_caches_bytes &&
                      N * int64_t(sizeof(S)) % FRNN_VECTOR_BYTES == 0 &&
                      reinterpret_cast<uintptr_t>(result) % FRNN_VECTOR_BYTES == 0;
      return w;
    }
    if constexpr (sizeof(S) == sizeof(A)) {
      if (w.stride == N) {
        w.sums = static_cast<A*>(result);
        return w;
      }
    }
    w.sums = layout.take<A>(M * w.stride);
    return w;
  }

  // A chunk's rows as the depth of a product, for which zeros may stand behind them.
  int64_t most_operand_rows() const { return round_up(chunk_rows_, width * Operand<E>::group); }

  // Of a block of w_hh, one gate of one head.
  int64_t elements_of_block() const { return int64_t(Columns::elements(K_, K_)); }

  // Panels of the columns of h, which never hold columns of two heads, and where one begins.
  int64_t state_panel_count() const { return heads_ * Columns::count(K_); }
  int64_t first_feature(int64_t panel) const {
    const int64_t count = Columns::count(K_), within = panel % count * panel_columns;
    return panel / count * K_ + (within < K_ ? within : K_);
  }

  // Whether anything wants gradients of a state before some step.
  bool wants_state(int d) const { return T_ > 1 || layer_.direction[d].grad_h0 || layer_.direction[d].grad_reset_h; }

  // Columns of the gradient of the input that a thread computes where it reads the weights in place, padded.
  int64_t own_input_columns() const {
    return (Columns::count(I_) + plan_.threads() - 1) / plan_.threads() * panel_columns + 16;
  }

  static void task(void* self, int thread) { static_cast<BackwardPass*>(self)->work(thread); }

  void work(int thread) {
    const Owner own(plan_, D_, thread);
    const int64_t r0 = row_boundary(layer_.steps, own.row_group, plan_.row_groups);
    const int64_t r1 = row_boundary(layer_.steps, own.row_group + 1, plan_.row_groups);
    ThreadScratch& mine = threads_[thread];
    pack(thread, mine);
    recomputation_.pack(thread);
    for (int d = own.direction_begin; d < own.direction_end; ++d) {
      if (own.unit_group == 0) begin_rows(d, r0, r1);
    }
    everyone_->wait();
    bool begun = false;
    for (int64_t step = 0; step < T_;) {
      int64_t end[2] = {T_, T_};
      for (int d = 0; d < D_; ++d) end[d] = chunk_end(d, step);
      // Both directions stop together, so that one chunk of each is at hand between the barriers.
      const int64_t stop = end[0] < end[1] ? end[0] : end[1];
      if (recomputation_.needed()) {
        for (int d = 0; d < D_; ++d) {
          recomputation_.run(d, thread, chunk_row(d, step, stop), [&](auto f) { each_row(d, step, stop, f); }, *this);
        }
        everyone_->wait();
      }
      for (int d = own.direction_begin; d < own.direction_end; ++d) scan(d, step, stop, r0, r1, own, mine);
      everyone_->wait();
      for (int d = 0; d < D_; ++d) {
        if (wants_x_) input_gradient(d, step, stop, thread, mine);
        if (direction_[d].wants_weights()) pack_operands(d, step, stop, thread, mine);
        everyone_->wait();
        if (direction_[d].wants_weights()) weight_gradients(d, chunk_row(d, step, stop), begun, thread, mine);
        if constexpr (Cell::kind == CellKind::lstm) {
          if (direction_[d].peephole) peephole_gradient(d, step, stop, begun, thread);
        }
        if (direction_[d].norms.sums) norm_gradients(d, step, stop, begun, thread);
        if constexpr (std::is_same_v<S, A> && Cell::kind < CellKind::custom) {
          if (layer_.step_gradients) give_rows(layer_.step_gradients[d], d, step, stop, thread);
        }
      }
      begun = true;
      step = stop;
      everyone_->wait();
    }
    for (int d = 0; d < D_; ++d) store_weight_gradients(d, thread);
    wait_for_stores_past_caches();
    for (int d = own.direction_begin; d < own.direction_end; ++d) {
      if (own.unit_group == 0) end_rows(d, r0, r1);
    }
  }

  // Steps count in the order of the scan, which is against the direction's own.
  int64_t time(int d, int64_t step) const { return d == 1 ? step : T_ - 1 - step; }

  int64_t chunk_end(int d, int64_t step) const {
    int64_t rows = 0;
    for (; step < T_; ++step) {
      rows += layer_.steps.rows(time(d, step));
      if (rows > chunk_rows_) break;
    }
    return step;
  }

  // Rows of the chunk before step `stop`.
  int64_t chunk_row(int d, int64_t begin, int64_t stop) const {
    int64_t rows = 0;
    for (int64_t step = begin; step < stop; ++step) rows += layer_.steps.rows(time(d, step));
    return rows;
  }

  // Calls f(chunk row, t, b) for all rows of a chunk.
  template <class F>
  void each_row(int d, int64_t begin, int64_t end, F f) const {
    int64_t row = 0;
    for (int64_t step = begin; step < end; ++step) {
      const int64_t t = time(d, step), n = layer_.steps.rows(t);
      for (int64_t b = 0; b < n; ++b) f(row++, t, b);
    }
  }

  // Where the state before step t of row b was written, or -1 where that is the initial state.
  int64_t previous_time(int d, int64_t t, int64_t b) const {
    const int64_t previous = d == 1 ? t + 1 : t - 1;
    return previous < 0 || previous >= T_ || b >= layer_.steps.rows(previous) ? -1 : previous;
  }

  // Whether row b has a step after step t.
  bool goes_on(int d, int64_t t, int64_t b) const {
    const int64_t next = d == 1 ? t - 1 : t + 1;
    return next >= 0 && next < T_ && b < layer_.steps.rows(next);
  }

  const S* y_row(int d, int64_t t, int64_t b) const {
    const Sequence& y = layer_.y;
    return rows_of<S>(y.data) + layer_.steps.step(y, t) + b * y.batch_stride + d * P_;
  }

  bool begins_anew(int d, int64_t t, int64_t b) const {
    return layer_.steps.reset && layer_.steps.begins_anew(t, b, d == 1);
  }

  // The state before step t of row b. Null: zeros, or elsewhere.
  struct Before {
    const S* h;
    const A* cell;  // of an earlier step
    const S* c;     // that the call was given
  };
  Before before(int d, int64_t t, int64_t b) const {
    const DirectionBackward& dir = layer_.direction[d];
    const auto given = [&](const void* h, const void* c) {
      return Before{h ? rows_of<S>(h) + b * P_ : nullptr, nullptr, c ? rows_of<S>(c) + b * Cell::states * H_ : nullptr};
    };
    if (begins_anew(d, t, b)) return given(dir.extras.reset_h, dir.extras.reset_c);
    const int64_t previous = previous_time(d, t, b);
    if (previous < 0) return given(dir.h0, dir.c0);
    const A* cell = nullptr;
    if constexpr (Cell::has_cell)
      cell = rows_of<A>(dir.cells) + (layer_.steps.first_row(previous) + b) * Cell::states * H_;
    return {y_row(d, previous, b), cell, nullptr};
  }

  // A private state of it, of one vector of units.
  FRNN_INLINE V cell_before(const Before& before, int state, int64_t unit) const {
    if (before.cell) return Simd<A>::load_n(before.cell + state * H_ + unit, H_ - unit);
    if (before.c) return Simd<A>::load_n(before.c + state * H_ + unit, H_ - unit);
    return V{};
  }

  // Saved gates of row b of step t; chunk_row: where it is in the chunk.
  FRNN_INLINE const S* saved_gates(int d, int64_t t, int64_t b, int64_t chunk_row) const {
    const void* gates = layer_.direction[d].gates;
    if (!gates) return recomputation_.gates(d, chunk_row);
    return rows_of<S>(gates) + (layer_.steps.first_row(t) + b) * saved_stride_;
  }

  void pack(int thread, ThreadScratch& mine) {
    if (!packs_) return;
    for (int d = 0; d < D_; ++d) {
      const Weights& w = layer_.direction[d].weights;
      DirectionScratch& s = direction_[d];
      // The rows of a weight in the order in which its gate gradients stand side by side.
      const auto pack_weight = [&](const void* weight, const GateGrads& order, int64_t N, E* data) {
        for (int j = 0; j < G; ++j) {
          for (int64_t u = 0; u < H_; ++u) mine.b_rows[j * H_ + u] = rows_of<S>(weight) + (order.gate[j] * H_ + u) * N;
        }
        const Share share(Columns::count(N), thread, plan_.threads());
        for (int64_t p = share.begin; p < share.end; ++p) pack_columns<E>(mine.b_rows, G * H_, N, p, data);
      };
      if (wants_state(d) && heads_ == 1) pack_weight(w.w_hh, Cell::hidden_grads, P_, s.w_hh);
      if (wants_state(d) && heads_ > 1) {
        const Share share(heads_ * G, thread, plan_.threads());
        for (int64_t i = share.begin; i < share.end; ++i) {
          const int64_t head = i / G, gate = Cell::hidden_grads.gate[i % G];
          for (int64_t u = 0; u < K_; ++u) mine.b_rows[u] = rows_of<S>(w.w_hh) + (gate * H_ + head * K_ + u) * K_;
          for (int64_t p = 0; p < Columns::count(K_); ++p)
            pack_columns<E>(mine.b_rows, K_, K_, p, s.w_hh + i * elements_of_block());
        }
      }
      if (wants_x_) pack_weight(w.w_ih, Cell::input_grads, I_, s.w_ih);
      if (projects_) {
        for (int64_t k = 0; k < P_; ++k) mine.b_rows[k] = rows_of<S>(w.w_hr) + k * H_;
        const Share share(Columns::count(H_), thread, plan_.threads());
        for (int64_t p = share.begin; p < share.end; ++p) pack_columns<E>(mine.b_rows, P_, H_, p, s.w_hr);
      }
    }
  }

  void begin_rows(int d, int64_t r0, int64_t r1) {
    const DirectionBackward& dir = layer_.direction[d];
    DirectionScratch& s = direction_[d];
    for (int64_t r = r0; r < r1; ++r) {
      copy_row<A>(dir.grad_h_n ? rows_of<S>(dir.grad_h_n) + r * P_ : nullptr, s.grad_state + r * state_stride_, P_);
      for (int i = 0; i < Cell::states; ++i)
        copy_row<A>(dir.grad_c_n ? rows_of<S>(dir.grad_c_n) + (r * Cell::states + i) * H_ : nullptr,
                    s.grad_cell + r * cell_stride_ + i * unit_stride_, H_);
      if (s.anew_h) copy_row<A, A>(nullptr, s.anew_h + r * P_, P_);
      if (s.anew_c) copy_row<A, A>(nullptr, s.anew_c + r * Cell::states * H_, Cell::states * H_);
    }
  }

  void end_rows(int d, int64_t r0, int64_t r1) {
    const DirectionBackward& dir = layer_.direction[d];
    const DirectionScratch& s = direction_[d];
    for (int64_t r = r0; r < r1; ++r) {
      if (dir.grad_h0) copy_row<A>(s.grad_state + r * state_stride_, rows_of<S>(dir.grad_h0) + r * P_, P_);
      for (int i = 0; i < Cell::states && dir.grad_c0; ++i)
        copy_row<A>(s.grad_cell + r * cell_stride_ + i * unit_stride_,
                    rows_of<S>(dir.grad_c0) + (r * Cell::states + i) * H_, H_);
      if (s.anew_h) copy_row<A>(s.anew_h + r * P_, rows_of<S>(dir.grad_reset_h) + r * P_, P_);
      if (s.anew_c)
        copy_row<A>(s.anew_c + r * Cell::states * H_, rows_of<S>(dir.grad_reset_c) + r * Cell::states * H_,
                    Cell::states * H_);
    }
  }

  // Of the owned features: clips what came back through time to the states after step t. In a row's last step that is
  // the gradient of the final state, which like those of the output and of returned states comes from outside.
  void clip_state_gradients(int d, int64_t t, int64_t r0, int64_t rows, Share features) {
    const A clip = A(layer_.within.recurrent_grad_clip);
    for (int64_t r = r0; r < r0 + rows; ++r) {
      if (!goes_on(d, t, r)) continue;
      A* grad = direction_[d].grad_state + r * state_stride_;
      for (int64_t u = features.begin; u < features.end; u += width)
        Simd<A>::store(grad + u, clamped<V>(Simd<A>::load(grad + u), clip));
    }
  }

  // Adds what comes to the states after step t themselves, of the owned features of h and units of c.
  void add_state_gradients(int d, int64_t t, int64_t r0, int64_t rows, Share features, Share units) {
    DirectionScratch& s = direction_[d];
    const Sequence& of_h = layer_.grad_h;
    const void* of_c = layer_.direction[d].grad_cells;
    for (int64_t r = r0; r < r0 + rows; ++r) {
      if (of_h.data) {
        const S* grad = rows_of<S>(of_h.data) + layer_.steps.step(of_h, t) + r * of_h.batch_stride + d * P_;
        add_to_gradient(s.grad_state + r * state_stride_, grad, features);
      }
      for (int i = 0; i < Cell::states && of_c; ++i)
        add_to_gradient(s.grad_cell + r * cell_stride_ + i * unit_stride_,
                        rows_of<A>(of_c) + ((layer_.steps.first_row(t) + r) * Cell::states + i) * H_, units);
    }
  }

  template <class T>
  static void add_to_gradient(A* grad, const T* more, Share features) {
    for (int64_t u = features.begin; u < features.end; u += width)
      Simd<A>::store(grad + u, Simd<A>::load(grad + u) + Simd<A>::load_n(more + u, features.end - u));
  }

  // Gate gradients of steps [begin, end) for the owned rows and units.
  void scan(int d, int64_t begin, int64_t end, int64_t r0, int64_t r1, const Owner& own, ThreadScratch& mine) {
    DirectionScratch& s = direction_[d];
    Barrier& barrier = unit_barriers_[own.barrier];
    // Those of the same features, but with a projection.
    const Share unit_panels(projects_ ? Columns::count(H_) : state_panel_count(), own.unit_group, plan_.unit_groups);
    const Share state_panels(state_panel_count(), own.unit_group, plan_.unit_groups);
    const ColumnPanels<E> w_hh{s.w_hh, G * H_, P_};
    const bool has_state_gradients = layer_.grad_h.data || layer_.direction[d].grad_cells;
    int64_t row = 0;
    for (int64_t step = begin; step < end; ++step) {
      const int64_t t = time(d, step), all = layer_.steps.rows(t);
      const int64_t last = all < r1 ? all : r1;
      const int64_t rows = last > r0 ? last - r0 : 0;
      if (layer_.within.recurrent_grad_clip > 0) clip_state_gradients(d, t, r0, rows, features_of(state_panels, P_));
      if (has_state_gradients)
        add_state_gradients(d, t, r0, rows, features_of(state_panels, P_), features_of(unit_panels, H_));
      if (projects_) {
        gradient_of_projected(d, t, r0, rows, row, state_panels);
        barrier.wait();
        gradient_before_projection(d, rows, row + r0, unit_panels, mine);
      }
      with_gates<S>(gates_, [&](auto kind) { gradients_of_rows<kind>(d, t, r0, rows, unit_panels, row, mine); });
      barrier.wait();
      const bool scales = s.through != nullptr;
      A* product = (scales ? s.through : s.grad_state) + r0 * state_stride_;
      const bool wanted = step + 1 < T_ || layer_.direction[d].grad_h0 || s.anew_h;  // else it is of the initial state
      if (wanted && heads_ > 1) {
        multiply_heads(d, rows, row + r0, state_panels, product, !scales, step % 2 == 1, mine);
      } else if (wanted && packs_) {
        for (int64_t r = 0; r < rows; ++r)
          mine.a_rows[r] = s.grads + (row + r0 + r) * grad_stride_ + hidden_grads_.first * H_;
        product_columns<E>(rows, mine.a_rows, w_hh, state_panels.begin, state_panels.end, product, state_stride_,
                           !scales && !(projects_ && plain_gates_), step % 2 == 1);
      } else if (wanted) {
        multiply_in_place(rows, s.grads + (row + r0) * grad_stride_, layer_.direction[d].weights.w_hh, hidden_grads_,
                          P_, state_panels, product + state_panels.begin * panel_columns, state_stride_, !scales, mine);
      }
      const Share features = features_of(state_panels, P_);
      if (scales) through_dropout(d, t, r0, rows, row, features);
      if (layer_.steps.reset || layer_.within.bptt_steps > 0)
        cut(d, t, r0, rows, features, features_of(unit_panels, H_));
      // With a projection every thread reads all of grad_state in the next step.
      row += all;
    }
  }

  Share features_of(Share panels, int64_t features) const {
    if (heads_ > 1) {
      panels.begin = first_feature(panels.begin);
      panels.end = first_feature(panels.end);
      return panels;
    }
    panels.begin *= panel_columns;
    panels.end = panels.end * panel_columns < features ? panels.end * panel_columns : features;
    return panels;
  }

  // c (+)= rows of gate gradients from `row` of the chunk on times w_hh, head by head.
  void multiply_heads(int d, int64_t rows, int64_t row, Share panels, A* c, bool accumulate, bool descending,
                      ThreadScratch& mine) {
    const DirectionScratch& s = direction_[d];
    const int64_t count = Columns::count(K_);
    for (int64_t head = panels.begin / count; head * count < panels.end; ++head) {
      const int64_t first = panels.begin > head * count ? panels.begin - head * count : 0;
      const int64_t last = panels.end - head * count < count ? panels.end - head * count : count;
      for (int j = 0; j < G; ++j) {
        for (int64_t r = 0; r < rows; ++r)
          mine.a_rows[r] = s.grads + (row + r) * grad_stride_ + (hidden_grads_.first + j) * H_ + head * K_;
        const ColumnPanels<E> block{s.w_hh + (head * G + j) * elements_of_block(), K_, K_};
        product_columns<E>(rows, mine.a_rows, block, first, last, c + head * K_, state_stride_, accumulate || j > 0,
                           descending);
      }
    }
  }

  // Of the owned features: the gradient that came through the product, times the factors by which h was multiplied
  // before it; and that h, for the gradient of the weight.
  void through_dropout(int d, int64_t t, int64_t r0, int64_t rows, int64_t row, Share features) {
    DirectionScratch& s = direction_[d];
    for (int64_t r = r0; r < r0 + rows; ++r) {
      const S* factors = rows_of<S>(layer_.direction[d].extras.dropout) + r * P_;
      const S* h = before(d, t, r).h;
      A* grad = s.grad_state + r * state_stride_;
      S* dropped = s.dropped + (row + r) * P_;
      for (int64_t u = features.begin; u < features.end; u += width) {
        const int64_t n = features.end - u;
        const V factor = Simd<A>::load_n(factors + u, n);
        Simd<A>::store(grad + u, Simd<A>::load(grad + u) + Simd<A>::load(s.through + r * state_stride_ + u) * factor);
        Simd<A>::store_n(dropped + u, h ? Simd<A>::load_n(h + u, n) * factor : V{}, n);
      }
    }
  }

  // Of the owned features of the state before step t: no gradient goes further back where a row begins anew, or where
  // back-propagation ends.
  void cut(int d, int64_t t, int64_t r0, int64_t rows, Share features, Share units) {
    DirectionScratch& s = direction_[d];
    const int64_t k = layer_.within.bptt_steps;
    const bool all = k > 0 && t > 0 && t % k == 0;
    for (int64_t r = r0; r < r0 + rows; ++r) {
      const bool anew = begins_anew(d, t, r);
      if (!anew && !all) continue;
      end_gradient(s.grad_state + r * state_stride_, anew && s.anew_h ? s.anew_h + r * P_ : nullptr, features);
      for (int i = 0; i < Cell::states; ++i)
        end_gradient(s.grad_cell + r * cell_stride_ + i * unit_stride_,
                     anew && s.anew_c ? s.anew_c + (r * Cell::states + i) * H_ : nullptr, units);
    }
  }

  // The gradient goes to `sum`, if that is there, and is zero then.
  static void end_gradient(A* grad, A* sum, Share features) {
    for (int64_t u = features.begin; u < features.end; u += width) {
      const int64_t n = features.end - u;
      if (sum) Simd<A>::store_n(sum + u, Simd<A>::load_n(sum + u, n) + Simd<A>::load(grad + u), n);
      Simd<A>::store(grad + u, V{});
    }
  }

  // c (+)= rows of gate gradients times columns of a weight that is not packed; N: all of its columns.
  void multiply_in_place(int64_t rows, const E* grads, const void* weight, const GateGrads& order, int64_t N,
                         Share panels, A* c, int64_t c_stride, bool accumulate, ThreadScratch& mine) {
    const E** a_block = mine.a_rows + rows;
    for (int64_t r = 0; r < rows; ++r) mine.a_rows[r] = grads + r * grad_stride_ + order.first * H_;
    for (int j = 0; j < G; ++j) {
      const S* b = rows_of<S>(weight) + order.gate[j] * H_ * N;
      const bool adds = accumulate || j > 0;
      if constexpr (packs_as_it_goes<E>) {
        packed_product_of_columns<E>(rows, H_, mine.a_rows, j * H_, b, N, panels.begin, panels.end, c, c_stride, adds,
                                     mine.block, a_block, mine.b_rows);
      } else {
        product_of_columns<A>(rows, H_, mine.a_rows, j * H_, b, N, panels.begin, panels.end, c, c_stride, adds,
                              mine.block, a_block);
      }
    }
  }

  // grad_h = grad_y + what came back through time, rounded as an operand.
  void gradient_of_projected(int d, int64_t t, int64_t r0, int64_t rows, int64_t row, Share panels) {
    DirectionScratch& s = direction_[d];
    const Share features = features_of(panels, P_);
    for (int64_t r = r0; r < r0 + rows; ++r) {
      for (int64_t u = features.begin; u < features.end; u += width) {
        V grad = output_gradient(d, t, r, u);
        if (!plain_gates_) {
          V to_before{};
          divide_state_gradient(d, t, r, u, grad, to_before);
          Simd<A>::store(s.grad_state + r * state_stride_ + u, to_before);
        }
        Simd<A>::store(s.grad_h + (row + r) * state_stride_ + u, grad);
      }
    }
  }

  // With options: the gradient of h after step t as that of the step's own h, and of the h before, which zoneout keeps.
  FRNN_INLINE void divide_state_gradient(int d, int64_t t, int64_t r, int64_t u, V& grad, V& to_before) const {
    const uint8_t* bits = row_of_bits(layer_.direction[d].extras.zoneout, layer_.steps.first_row(t) + r, P_);
    const Zoneout<A> zone{bits, A(layer_.within.zoneout)};
    if (zone.any()) zone.divide(grad, to_before, u, P_ - u);
  }

  // grad_y + grad_state of one vector.
  FRNN_INLINE V output_gradient(int d, int64_t t, int64_t r, int64_t u) {
    V dh = Simd<A>::load(direction_[d].grad_state + r * state_stride_ + u);
    const Sequence& y = layer_.grad_y;
    if (y.data)
      dh = dh + Simd<A>::load_n(rows_of<S>(y.data) + layer_.steps.step(y, t) + r * y.batch_stride + d * P_ + u, P_ - u);
    return dh;
  }

  void gradient_before_projection(int d, int64_t rows, int64_t row, Share panels, ThreadScratch& mine) {
    const DirectionScratch& s = direction_[d];
    for (int64_t r = 0; r < rows; ++r) mine.a_rows[r] = s.grad_h + (row + r) * state_stride_;
    const ColumnPanels<E> w_hr{s.w_hr, P_, H_};
    product_columns<E>(rows, mine.a_rows, w_hr, panels.begin, panels.end, mine.grad_hidden, unit_stride_, false);
  }

  // Vectors whose gate gradients are computed together.
  static constexpr int group = 2;

  // Gate gradients of one step for the owned rows and units; row: of the chunk, before row 0 of the step.
  template <Gates kind>
  void gradients_of_rows(int d, int64_t t, int64_t r0, int64_t rows, Share panels, int64_t row, ThreadScratch& mine) {
    if constexpr (kind != Gates::plain) {
      if constexpr (Cell::kind < CellKind::custom) {
        if (normalises_) return gradients_of_normalised_rows<kind>(d, t, r0, rows, row, mine);
      }
    }
    const auto [begin, end] = features_of(panels, H_);
    Units units[group];
    int waiting = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t unit = begin; unit < end; unit += width) {
        units[waiting++] = {r0 + r, unit, row + r0 + r, mine.grad_hidden + r * unit_stride_};
        if (waiting == group) {
          gate_gradients<group, kind>(d, t, units);
          waiting = 0;
        }
      }
    }
    if (waiting == 0) return;
    if constexpr (kind == Gates::plain) {
      gate_gradients<1, kind>(d, t, units);
    } else {
      units[1] = units[0];  // twice the same: less code
      gate_gradients<group, kind>(d, t, units);
    }
  }

  // One vector of units of one row; the row within the chunk; where the gradient of h before a projection stands.
  struct Units {
    int64_t r, unit, chunk_row;
    const A* grad_hidden;
  };

  // The same with layer normalisation, whose rows have all units.
  template <Gates kind>
  void gradients_of_normalised_rows(int d, int64_t t, int64_t r0, int64_t rows, int64_t row, ThreadScratch& mine) {
    for (int64_t r = r0; r < r0 + rows; ++r) {
      const A* grad_hidden = mine.grad_hidden + (r - r0) * unit_stride_;
      if constexpr (Cell::kind == CellKind::lstm)
        through_normalised_cell(d, t, r, row + r, grad_hidden, mine.normalised);
      for (int64_t unit = 0; unit < H_; unit += group * width) {
        const int64_t next = unit + width < H_ ? unit + width : unit;  // the last may be twice the same
        const Units units[group] = {{r, unit, row + r, grad_hidden}, {r, next, row + r, grad_hidden}};
        gate_gradients<group, kind>(d, t, units, &mine.normalised);
      }
      through_norms(d, t, r, row + r);
    }
  }

  // h = o * act(n), n = c normalised * gain + bias: the gradients of o and of c.
  void through_normalised_cell(int d, int64_t t, int64_t r, int64_t chunk_row, const A* grad_hidden,
                               const NormalisedRow& mine) {
    using One = Pack<V, 1, rough_gates<S>>;
    const DirectionBackward& dir = layer_.direction[d];
    DirectionScratch& s = direction_[d];
    const int64_t row = layer_.steps.first_row(t) + r;
    const S* gates = saved_gates(d, t, r, chunk_row);
    const A* cells = rows_of<A>(dir.cells) + row * H_;
    const bool zones = dir.extras.zoneout_cell || layer_.within.zoneout_cell > 0;
    const Before state = before(d, t, r);
    Options<One, false> options{layer_.within, {}};
    for (int64_t u = 0; u < H_; u += width) {
      const int64_t n = H_ - u;
      One c{{Simd<A>::load_n(cells + u, n)}};
      if (zones) {  // what is kept is c after it
        One saved[Cell::saved + 1];
        for (int g = 0; g < Cell::saved; ++g) saved[g].v[0] = Simd<A>::load_n(gates + g * H_ + u, n);
        c = Cell::template cell_of<One>(saved, c, One{{cell_before(state, 0, u)}}, options);
      }
      Simd<A>::store_n(mine.cell + u, c.v[0], n);
    }
    const A scale = centre_units<A>(mine.cell, H_);
    UnitSums<A, 2> sums;  // of the gradient of the normalised c, and of its product with that
    A *normal = s.norms.cell + chunk_row * unit_stride_, *of_cell = s.norms.of_cell + chunk_row * unit_stride_;
    sums.add(H_, [&](int64_t u, int64_t n, V* terms) {
      const V value = Simd<A>::load_n(mine.cell + u, n) * scale;
      const V gain = Simd<A>::load_n(rows_of<S>(dir.weights.norm_c) + u, n);
      One hidden{{value * gain}};
      if (dir.weights.norm_c_bias)
        hidden.v[0] = hidden.v[0] + Simd<A>::load_n(rows_of<S>(dir.weights.norm_c_bias) + u, n);
      hidden = options.template state<One>(hidden);
      V dh = projects_ ? Simd<A>::load_n(grad_hidden + u, n) : output_gradient(d, t, r, u), to_before{};
      if (!projects_) divide_state_gradient(d, t, r, u, dh, to_before);
      const One o{{Simd<A>::load_n(gates + (Cell::saved - 1) * H_ + u, n)}};
      Simd<A>::store_n(mine.to_output + u, options.template gate_gradient<One>(One{{dh * hidden.v[0]}}, o).v[0], n);
      Simd<A>::store_n(mine.hidden + u, o.v[0] * hidden.v[0], n);
      const V grad = options.template state_gradient<One>(One{{dh * o.v[0]}}, hidden).v[0];
      Simd<A>::store_n(normal + u, value, n);
      Simd<A>::store_n(of_cell + u, grad, n);
      Simd<A>::store_n(mine.to_cell + u, grad * gain, n);
      terms[0] = Simd<A>::load_n(mine.to_cell + u, n);
      terms[1] = terms[0] * value;
    });
    const V mean = Simd<A>::splat(sums.total(0) / A(H_)), slope = Simd<A>::splat(sums.total(1) / A(H_));
    for (int64_t u = 0; u < H_; u += width) {
      const int64_t n = H_ - u;
      V grad = Simd<A>::load_n(mine.to_cell + u, n) - mean - Simd<A>::load_n(normal + u, n) * slope;
      grad = grad * scale;
      load_peephole<S>(options, dir.weights.peephole, H_, u, n, 0);
      if (layer_.within.peephole) grad = grad + options.peephole[2].v[0] * Simd<A>::load_n(mine.to_output + u, n);
      Simd<A>::store_n(mine.to_cell + u, grad, n);
    }
  }

  // From the gate gradients of a row to those of w_ih x and of w_hh h before their normalisation.
  void through_norms(int d, int64_t t, int64_t r, int64_t chunk_row) {
    const Weights& w = layer_.direction[d].weights;
    const S* centred = saved_gates(d, t, r, chunk_row) + Cell::saved * H_;
    E* grads = direction_[d].grads + chunk_row * grad_stride_;
    A* scales = direction_[d].norms.scales + 2 * chunk_row;
    scales[0] = gradient_through_norm<S, E, G>(grads + Cell::input_grads.first * H_, Cell::input_grads.gate, centred,
                                               rows_of<S>(w.norm_ih), H_, grads + input_grads_.first * H_);
    scales[1] =
        gradient_through_norm<S, E, G>(grads + Cell::hidden_grads.first * H_, Cell::hidden_grads.gate, centred + G * H_,
                                       rows_of<S>(w.norm_hh), H_, grads + hidden_grads_.first * H_);
  }

  template <int N, Gates kind>
  FRNN_INLINE void gate_gradients(int d, int64_t t, const Units* units, const NormalisedRow* normalised = nullptr) {
    using Values = Pack<V, N, rough_gates<S>>;
    constexpr bool plain = kind == Gates::plain;
    const DirectionBackward& dir = layer_.direction[d];
    DirectionScratch& s = direction_[d];
    const int64_t first_row = layer_.steps.first_row(t);
    constexpr int places = Cell::states + 1;  // no array is empty
    Values saved[Cell::saved + 1], grads[GG], h{}, h_prev{}, c[places]{}, c_prev[places]{}, dh, dc[places]{}, dh_prev;
    Values dc_prev[places]{};
    Values h_to_before{}, c_to_before{};  // past the cell, by zoneout
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      const auto [r, unit, chunk_row, grad_hidden] = units[i];
      const int64_t n = H_ - unit;
      const S* gates = saved_gates(d, t, r, chunk_row) + unit;
#pragma GCC unroll 4
      for (int g = 0; g < Cell::saved; ++g) saved[g].v[i] = Simd<A>::load_n(gates + g * H_, n);
      if constexpr (Cell::has_cell || Cell::reads_h) {
        const Before state = before(d, t, r);
#pragma GCC unroll 4
        for (int j = 0; j < Cell::states; ++j) {
          c[j].v[i] = Simd<A>::load_n(rows_of<A>(dir.cells) + ((first_row + r) * Cell::states + j) * H_ + unit, n);
          c_prev[j].v[i] = cell_before(state, j, unit);
          dc[j].v[i] = Simd<A>::load(s.grad_cell + r * cell_stride_ + j * unit_stride_ + unit);
        }
        if constexpr (Cell::reads_h) {
          if (state.h) h_prev.v[i] = Simd<A>::load_n(state.h + unit, n);
        }
      }
      if constexpr (Cell::saved == 0) h.v[i] = Simd<A>::load_n(y_row(d, t, r) + unit, n);
      dh.v[i] = projects_ ? Simd<A>::load(grad_hidden + unit) : output_gradient(d, t, r, unit);
      if constexpr (!plain) {
        if (!projects_) divide_state_gradient(d, t, r, unit, dh.v[i], h_to_before.v[i]);
        if constexpr (Cell::kind == CellKind::lstm) {
          const Zoneout<A> zone{row_of_bits(dir.extras.zoneout_cell, first_row + r, H_), A(layer_.within.zoneout_cell)};
          if (zone.any()) zone.divide(dc[0].v[i], c_to_before.v[i], unit, n);
          if (normalised) {  // what comes through h is there already
            dh.v[i] = V{};
            dc[0].v[i] = dc[0].v[i] + Simd<A>::load_n(normalised->to_cell + unit, n);
          }
        }
      }
    }
    Values hidden{};
    if constexpr (plain) {
      backward_of<Cell>(saved, h, h_prev, c, c_prev, dh, dc, grads, dh_prev, dc_prev);
      if constexpr (Cell::kind == CellKind::lstm) {
        if (projects_) hidden = Cell::template hidden<Values>(saved, c[0]);
      }
    } else {
      const auto options = options_of<N, kind == Gates::own_functions>(d, units);
      backward_of<Cell>(saved, h, h_prev, c, c_prev, dh, dc, grads, dh_prev, dc_prev, options);
      if constexpr (Cell::kind == CellKind::lstm) {
        for (int i = 0; i < N && normalised; ++i)
          grads[3].v[i] = Simd<A>::load_n(normalised->to_output + units[i].unit, H_ - units[i].unit);
      }
      if constexpr (std::is_same_v<S, A>) {
        if (layer_.step_gradients)
          exchange_gradients<N>(layer_.step_gradients[d], first_row, units, dh, dc[0], grads, dh_prev, dc_prev[0]);
      }
      dh_prev = dh_prev + h_to_before;
      dc_prev[0] = dc_prev[0] + c_to_before;
      if constexpr (Cell::kind == CellKind::lstm) {
        if (projects_ && !normalised) hidden = Cell::template hidden<Values>(saved, c[0], c_prev[0], options);
        for (int i = 0; i < N && normalised; ++i)
          hidden.v[i] = Simd<A>::load_n(normalised->hidden + units[i].unit, H_ - units[i].unit);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      const int64_t r = units[i].r, unit = units[i].unit, row = units[i].chunk_row, n = H_ - unit;
#pragma GCC unroll 4
      for (int g = 0; g < GG; ++g) Simd<A>::store_n(s.grads + row * grad_stride_ + g * H_ + unit, grads[g].v[i], n);
#pragma GCC unroll 4
      for (int j = 0; j < Cell::states; ++j)
        Simd<A>::store(s.grad_cell + r * cell_stride_ + j * unit_stride_ + unit, dc_prev[j].v[i]);
      if constexpr (Cell::kind == CellKind::lstm) {
        if (projects_) Simd<A>::store(s.hidden + row * unit_stride_ + unit, hidden.v[i]);
      }
      if (!projects_) Simd<A>::store(s.grad_state + r * state_stride_ + unit, dh_prev.v[i]);
    }
  }

  // Adds what the caller has for the gradients of some units of a step, and gives what it wants of them.
  template <int N, class Values>
  FRNN_INLINE void exchange_gradients(const StepGradients& with, int64_t first_row, const Units* units,
                                      const Values& dh, const Values& dc, Values* grads, Values& dh_prev,
                                      Values& dc_prev) {
    for (int i = 0; i < N; ++i) {
      const int64_t row = first_row + units[i].r, unit = units[i].unit, n = H_ - unit;
      const auto add = [&](const void* more, int64_t at, V& to) __attribute__((always_inline)) {
        if (more) to = to + Simd<A>::load_n(rows_of<S>(more) + at * H_ + unit, n);
      };
      const auto give = [&](void* to, int64_t at, V value) __attribute__((always_inline)) {
        if (to) Simd<A>::store_n(rows_of<S>(to) + at * H_ + unit, value, n);
      };
      for (int g = 0; g < GG; ++g) {
        add(with.more_of_sums, row * GG + g, grads[g].v[i]);
        give(with.sums, row * GG + g, grads[g].v[i]);
      }
      add(with.more_of_h, row, dh_prev.v[i]);
      add(with.more_of_c, row, dc_prev.v[i]);
      give(with.h, row, dh.v[i]);
      give(with.c, row, dc.v[i]);
    }
  }

  template <int N, bool own>
  FRNN_INLINE auto options_of(int d, const Units* units) const {
    Options<Pack<V, N, rough_gates<S>>, own> options{layer_.within, {}};
    for (int i = 0; i < N; ++i)
      load_peephole<S>(options, layer_.direction[d].weights.peephole, H_, units[i].unit, H_ - units[i].unit, i);
    return options;
  }

  // The chunk's rows of grad_x: gate gradients times w_ih, the rows divided over the whole team.
  void input_gradient(int d, int64_t begin, int64_t end, int thread, ThreadScratch& mine) {
    if (!packs_) return input_gradient_in_place(d, begin, end, thread, mine);
    const DirectionScratch& s = direction_[d];
    const Share share(chunk_row(d, begin, end), thread, plan_.threads());
    for (int64_t r = share.begin; r < share.end; ++r)
      mine.a_rows[r - share.begin] = s.grads + r * grad_stride_ + input_grads_.first * H_;
    const ColumnPanels<E> w_ih{s.w_ih, G * H_, I_};
    const int64_t stride = Columns::padded_columns(I_);
    product_columns<E>(share.end - share.begin, mine.a_rows, w_ih, 0, Columns::count(I_), mine.tile, stride, false);
    each_row(d, begin, end, [&](int64_t row, int64_t t, int64_t b) {
      if (row >= share.begin && row < share.end)
        store_input_gradient(t, b, 0, I_, mine.tile + (row - share.begin) * stride);
    });
  }

  // The same with w_ih where it stands: its columns are divided, so that a thread reads its share of it.
  void input_gradient_in_place(int d, int64_t begin, int64_t end, int thread, ThreadScratch& mine) {
    const Share panels(Columns::count(I_), thread, plan_.threads());
    const int64_t stride = own_input_columns(), first = panels.begin * panel_columns;
    const int64_t last = panels.end * panel_columns < I_ ? panels.end * panel_columns : I_;
    multiply_in_place(chunk_row(d, begin, end), direction_[d].grads, layer_.direction[d].weights.w_ih, input_grads_, I_,
                      panels, mine.tile, stride, false, mine);
    each_row(d, begin, end, [&](int64_t row, int64_t t, int64_t b) {
      store_input_gradient(t, b, first, last, mine.tile + row * stride);
    });
  }

  // Features [first, last) of one row of grad_x.
  void store_input_gradient(int64_t t, int64_t b, int64_t first, int64_t last, const A* src) {
    const Sequence& x = layer_.grad_x;
    const bool add = D_ > 1;  // grad_x holds zeros before the first direction
    S* dst = rows_of<S>(x.data) + layer_.steps.step(x, t) + b * x.batch_stride + first;
    const int64_t n = last - first;
    for (int64_t i = 0; i < n; i += width) {
      V v = Simd<A>::load(src + i);
      if (add) v = v + Simd<A>::load_n(dst + i, n - i);
      Simd<A>::store_n(dst + i, v, n - i);
    }
  }

  // The B operands of the weight gradients: the chunk's inputs, previous states and unprojected states.
  void pack_operands(int d, int64_t begin, int64_t end, int thread, ThreadScratch& mine) {
    const DirectionScratch& s = direction_[d];
    const int64_t K = chunk_row(d, begin, end), depth = depth_of_product<E>(K);
    const auto pack_shared = [&](E* operand, int64_t N, auto rows) {
      const Share share(Columns::count(N), thread, plan_.threads());
      for (int64_t row = K; row < depth; ++row) rows[row] = nullptr;
      for (int64_t p = share.begin; p < share.end; ++p) pack_columns<E>(rows, depth, N, p, operand);
    };
    if (s.ih.result) {
      const Sequence& x = layer_.x;
      each_row(d, begin, end, [&](int64_t row, int64_t t, int64_t b) {
        mine.b_rows[row] = rows_of<S>(x.data) + layer_.steps.step(x, t) + b * x.batch_stride;
      });
      pack_shared(s.ih.operand, I_, mine.b_rows);
    }
    if (s.hh.result) {
      each_row(d, begin, end, [&](int64_t row, int64_t t, int64_t b) {
        mine.b_rows[row] = s.dropped ? s.dropped + row * P_ : before(d, t, b).h;
      });
      if (heads_ == 1) {
        pack_shared(s.hh.operand, P_, mine.b_rows);
      } else {
        const Share share(state_panel_count(), thread, plan_.threads());
        for (int64_t row = K; row < depth; ++row) mine.b_rows[row] = nullptr;
        int64_t at = 0;  // the head at whose features the rows begin
        for (int64_t p = share.begin; p < share.end; ++p) {
          const int64_t head = p / Columns::count(K_);
          for (; at < head; ++at) {
            for (int64_t row = 0; row < K; ++row)
              if (mine.b_rows[row]) mine.b_rows[row] += K_;
          }
          pack_columns<E>(mine.b_rows, depth, K_, p % Columns::count(K_), s.hh.operand + head * s.hh.next_operand);
        }
      }
    }
    if (s.hr.result) {
      for (int64_t row = 0; row < K; ++row) mine.a_rows[row] = s.hidden + row * unit_stride_;
      pack_shared(s.hr.operand, H_, mine.a_rows);
    }
  }

  // Adds the chunk to this thread's rows of the weight gradients: of its units, every gate.
  void weight_gradients(int d, int64_t K, bool begun, int thread, ThreadScratch& mine) {
    DirectionScratch& s = direction_[d];
    const Share own(H_, thread, plan_.threads());
    for (int j = 0; j < (normalises_ ? GG + 2 * G : GG); ++j) {
      const int ih = weight_gate(input_grads_, j), hh = weight_gate(hidden_grads_, j);
      if (ih < 0 && hh < 0) continue;
      for_blocks(own, [&](Share units) {
        transpose<E>(s.grads + j * H_ + units.begin, grad_stride_, K, units.end - units.begin, mine.transposed, depth_);
        if (ih >= 0) {
          add_outer_product(s.ih, I_, ih * H_, units, K, begun, mine);
          add_sums(s.bias_ih, ih * H_, units, K, begun, mine);
        }
        if (hh >= 0) {
          add_hidden_product(s.hh, hh * H_, units, K, begun, mine);
          add_sums(s.bias_hh, hh * H_, units, K, begun, mine);
        }
      });
    }
    if (s.hr.result) {
      for_blocks(Share(P_, thread, plan_.threads()), [&](Share rows) {
        transpose<E>(s.grad_h + rows.begin, state_stride_, K, rows.end - rows.begin, mine.transposed, depth_);
        add_outer_product(s.hr, H_, 0, rows, K, begun, mine);
      });
    }
  }

  // Adds the chunk to this thread's part of the gradient of the peephole weights.
  void peephole_gradient(int d, int64_t begin, int64_t end, bool begun, int thread) {
    using One = Pack<V, 1, rough_gates<S>>;
    DirectionScratch& s = direction_[d];
    const Share own = own_peepholes(thread);
    if (!begun) {
      for (int k = 0; k < 3; ++k) copy_row<A, A>(nullptr, s.peephole + k * H_ + own.begin, own.end - own.begin);
    }
    each_row(d, begin, end, [&](int64_t row, int64_t t, int64_t b) {
      const Before state = before(d, t, b);
      for (int64_t u = own.begin; u < own.end; u += width) {
        const int64_t n = own.end - u;
        const One before_step{{cell_before(state, 0, u)}};
        const V cell = cell_seen(d, t, b, row, u, n, before_step);
        const auto add = [&](int k, int gate, V seen) __attribute__((always_inline)) {
          A* sum = s.peephole + k * H_ + u;
          const V grad = Simd<A>::load_n(s.grads + row * grad_stride_ + gate * H_ + u, n);
          Simd<A>::store_n(sum, Simd<A>::load_n(sum, n) + grad * seen, n);
        };
        add(0, 0, before_step.v[0]);
        add(1, 1, before_step.v[0]);
        add(2, 3, cell);
      }
    });
  }

  // The c that o sees in a step, of n units from u on; row: of the chunk.
  template <class One>
  FRNN_INLINE V cell_seen(int d, int64_t t, int64_t b, int64_t row, int64_t u, int64_t n,
                          const One& before_step) const {
    const Options<One, true> options{layer_.within, {}};  // no function is asked for
    const S* gates = saved_gates(d, t, b, row);
    const A* cells = rows_of<A>(layer_.direction[d].cells) + (layer_.steps.first_row(t) + b) * H_;
    One saved[Cell::saved + 1];
    for (int g = 0; g < Cell::saved; ++g) saved[g].v[0] = Simd<A>::load_n(gates + g * H_ + u, n);
    const One after{{Simd<A>::load_n(cells + u, n)}};
    return Cell::template cell_of<One>(saved, after, before_step, options).v[0];
  }

  // What the caller wants of the chunk's rows: this thread's share of them.
  void give_rows(const StepGradients& to, int d, int64_t begin, int64_t end, int thread) const {
    const DirectionScratch& s = direction_[d];
    const Share own(chunk_row(d, begin, end), thread, plan_.threads());
    each_row(d, begin, end, [&](int64_t row, int64_t t, int64_t b) {
      if (row < own.begin || row >= own.end) return;
      const int64_t at = layer_.steps.first_row(t) + b;
      const auto give = [&](void* rows, const A* from, int64_t n) {
        if (rows) std::memcpy(rows_of<A>(rows) + at * n, from, size_t(n) * sizeof(A));
      };
      give(to.projected, s.grad_h + row * state_stride_, P_);
      give(to.hidden, s.hidden + row * unit_stride_, H_);
      give(to.normal_c, s.norms.cell + row * unit_stride_, H_);
      give(to.of_normal_c, s.norms.of_cell + row * unit_stride_, H_);
      if (to.normal) give_norms(to, d, t, b, row, at);
      if constexpr (Cell::kind == CellKind::lstm) {
        if (to.seen_c) give_seen_cell(rows_of<A>(to.seen_c) + at * H_, d, t, b, row);
      }
    });
  }

  void give_seen_cell(A* to, int d, int64_t t, int64_t b, int64_t row) const {
    using One = Pack<V, 1, rough_gates<S>>;
    const Before state = before(d, t, b);
    for (int64_t u = 0; u < H_; u += width) {
      const int64_t n = H_ - u;
      Simd<A>::store_n(to + u, cell_seen(d, t, b, row, u, n, One{{cell_before(state, 0, u)}}), n);
    }
  }

  // In the order of the weights' rows.
  void give_norms(const StepGradients& to, int d, int64_t t, int64_t b, int64_t row, int64_t at) const {
    const DirectionScratch& s = direction_[d];
    const S* centred = saved_gates(d, t, b, row) + Cell::saved * H_;
    A* normal = rows_of<A>(to.normal) + at * 2 * G * H_;
    A* before_norms = rows_of<A>(to.before_norms) + at * 2 * G * H_;
    for (int j = 0; j < 2 * G; ++j) {
      const int side = j / G;
      const GateGrads& order = side == 0 ? input_grads_ : hidden_grads_;
      const int64_t place = (side * G + order.gate[j % G]) * H_;
      std::memcpy(before_norms + place, s.grads + row * grad_stride_ + (order.first + j % G) * H_,
                  size_t(H_) * sizeof(A));
      const A scale = s.norms.scales[2 * row + side];
      for (int64_t u = 0; u < H_; ++u) normal[place + u] = A(centred[place + u]) * scale;
    }
  }

  // Adds the chunk to this thread's part of the gradients of gains and biases.
  void norm_gradients(int d, int64_t begin, int64_t end, bool begun, int thread) {
    const Share own = own_peepholes(thread);
    const NormGradients& norms = direction_[d].norms;
    const auto each_sum = [&](auto f) {
      for (int k = 0; k < 6; ++k) {
        for (int64_t first = NormGradients::place(k, H_); first < NormGradients::place(k + 1, H_); first += H_)
          f(first + own.begin);
      }
    };
    each_sum([&](int64_t first) { copy_row<A, A>(nullptr, norms.sums_of_chunk + first, own.end - own.begin); });
    // Some rows at a time, so that a sum is loaded and stored once for them.
    constexpr int most_rows = 8;
    struct {
      const S* centred;
      const E* grads;
      int64_t row;
    } rows[most_rows];
    int count = 0;
    const auto add = [&](int which, int64_t at, int64_t n, auto value) __attribute__((always_inline)) {
      A* sum = norms.sums_of_chunk + NormGradients::place(which, H_) + at;
      V total = Simd<A>::load_n(sum, n);
      for (int r = 0; r < count; ++r) total = total + value(r);
      Simd<A>::store_n(sum, total, n);
    };
    const auto add_rows = [&] {
      for (int64_t u = own.begin; u < own.end; u += width) {
        const int64_t n = own.end - u;
        for (int j = 0; j < 2 * G; ++j) {
          const int side = j / G;
          const GateGrads& order = side == 0 ? Cell::input_grads : Cell::hidden_grads;
          const int64_t gate = order.gate[j % G], from = (order.first + j % G) * H_ + u, at = gate * H_ + u;
          add(side, at, n, [&](int r) __attribute__((always_inline)) {
            return Simd<A>::load_n(rows[r].grads + from, n) *
                   (Simd<A>::load_n(rows[r].centred + side * G * H_ + at, n) * norms.scales[2 * rows[r].row + side]);
          });
          add(2 + side, at, n,
              [&](int r) __attribute__((always_inline)) { return Simd<A>::load_n(rows[r].grads + from, n); });
        }
        if constexpr (Cell::has_cell) {
          const auto of_cell = [&](int r) __attribute__((always_inline)) {
            return Simd<A>::load_n(norms.of_cell + rows[r].row * unit_stride_ + u, n);
          };
          add(4, u, n, [&](int r) __attribute__((always_inline)) {
            return of_cell(r) * Simd<A>::load_n(norms.cell + rows[r].row * unit_stride_ + u, n);
          });
          add(5, u, n, of_cell);
        }
      }
      count = 0;
    };
    each_row(d, begin, end, [&](int64_t row, int64_t t, int64_t b) {
      rows[count++] = {saved_gates(d, t, b, row) + Cell::saved * H_, direction_[d].grads + row * grad_stride_, row};
      if (count == most_rows) add_rows();
    });
    add_rows();
    each_sum([&](int64_t first) {
      for (int64_t u = 0; u < own.end - own.begin; u += width) {
        const int64_t n = own.end - own.begin - u;
        V sum = Simd<A>::load_n(norms.sums_of_chunk + first + u, n);
        if (begun) sum = sum + Simd<A>::load_n(norms.sums + first + u, n);
        Simd<A>::store_n(norms.sums + first + u, sum, n);
      }
    });
  }

  // Whole vectors, so that no two threads write to one.
  Share own_peepholes(int thread) const {
    Share own((H_ + width - 1) / width, thread, plan_.threads());
    own.begin = own.begin * width < H_ ? own.begin * width : H_;
    own.end = own.end * width < H_ ? own.end * width : H_;
    return own;
  }

  // Rows of a weight gradient that are computed together: their transposed gate gradients stay in L2.
  static constexpr int64_t rows_together = 96;

  template <class F>
  static void for_blocks(Share share, F f) {
    for (int64_t begin = share.begin; begin < share.end; begin += rows_together) {
      Share block = share;
      block.begin = begin;
      if (begin + rows_together < share.end) block.end = begin + rows_together;
      f(block);
    }
  }

  static constexpr GateGrads moved(GateGrads order, int first) {
    order.first = first;
    return order;
  }

  static int weight_gate(const GateGrads& order, int j) {
    return j >= order.first && j < order.first + G ? order.gate[j - order.first] : -1;
  }

  // add_outer_product for w_hh: rows of units of each head with that head's part of h.
  void add_hidden_product(const WeightGradient& w, int64_t first_row, Share units, int64_t K, bool begun,
                          ThreadScratch& mine) {
    if (heads_ == 1) return add_outer_product(w, P_, first_row, units, K, begun, mine);
    for (int64_t begin = units.begin; begin < units.end;) {
      const int64_t head = begin / K_;
      Share part = units;
      part.begin = begin;
      if (part.end > (head + 1) * K_) part.end = (head + 1) * K_;
      add_outer_product(w, K_, first_row, part, K, begun, mine, head, begin - units.begin);
      begin = part.end;
    }
  }

  // transposed: the row of mine.transposed that the first row's gradients are in.
  void add_outer_product(const WeightGradient& w, int64_t N, int64_t first_row, Share rows, int64_t K, bool begun,
                         ThreadScratch& mine, int64_t operand = 0, int64_t transposed = 0) {
    if (!w.result) return;
    const int64_t count = rows.end - rows.begin;
    for (int64_t m = 0; m < count; ++m) mine.a_rows[m] = mine.transposed + (transposed + m) * depth_;
    const ColumnPanels<E> b{w.operand + operand * w.next_operand, depth_of_product<E>(K), N};
    if (!w.sums) return write_outer_product(w, b, N, first_row + rows.begin, count, mine);
    product_columns<E>(count, mine.a_rows, b, 0, Columns::count(N), w.sums + (first_row + rows.begin) * w.stride,
                       w.stride, begun);
  }

  // Rows [first, first + count) of a weight gradient to which nothing will be added, a tile of rows after the other, so
  // that memory is written in order.
  void write_outer_product(const WeightGradient& w, const ColumnPanels<E>& b, int64_t N, int64_t first, int64_t count,
                           ThreadScratch& mine) {
    constexpr int64_t most = rows_at_once<E, Columns::NV>();
    const bool directly = std::is_same_v<S, A> && w.stride == N && !w.past_caches;
    for (int64_t m = 0; m < count; m += most) {
      const int64_t rows = count - m < most ? count - m : most;
      S* result = rows_of<S>(w.result) + (first + m) * N;
      A* sums = directly ? reinterpret_cast<A*>(result) : mine.results;
      product_columns<E>(rows, mine.a_rows + m, b, 0, Columns::count(N), sums, w.stride, false);
      if (directly) continue;
      for (int64_t i = 0; i < rows; ++i) store_row(sums + i * w.stride, result + i * N, N, w.past_caches);
    }
  }

  static void store_row(const A* src, S* dst, int64_t n, bool past_caches) {
    if constexpr (std::is_same_v<S, A>) {
      if (past_caches) {
        for (int64_t i = 0; i < n; i += width) Simd<A>::store_past_caches(dst + i, Simd<A>::load(src + i));
        return;
      }
    }
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (past_caches) {
        for (int64_t i = 0; i < n; i += 2 * width)
          Simd<A>::store_past_caches(dst + i, Simd<A>::load(src + i), Simd<A>::load(src + i + width));
        return;
      }
    }
    copy_row<A>(src, dst, n);
  }

  void add_sums(A* sums, int64_t first_row, Share rows, int64_t K, bool begun, const ThreadScratch& mine) {
    if (!sums) return;
    for (int64_t m = 0; m < rows.end - rows.begin; ++m) {
      const E* row = mine.transposed + m * depth_;
      V acc{};
      int64_t k = 0;
      for (; k < K; k += width) acc = acc + Simd<A>::load_n(row + k, K - k);
      A total = begun ? sums[first_row + rows.begin + m] : A(0);
      for (int l = 0; l < width; ++l) total += acc[l];
      sums[first_row + rows.begin + m] = total;
    }
  }

  // Sums to results, each thread its own rows.
  void store_weight_gradients(int d, int thread) {
    const DirectionBackward& dir = layer_.direction[d];
    const DirectionScratch& s = direction_[d];
    const Share units(H_, thread, plan_.threads()), rows(P_, thread, plan_.threads());
    for (int g = 0; g < G; ++g) {
      store_sums(s.ih, I_, g * H_ + units.begin, g * H_ + units.end);
      store_sums(s.hh, K_, g * H_ + units.begin, g * H_ + units.end);
      const int64_t first = g * H_ + units.begin, n = units.end - units.begin;
      if (s.bias_ih) copy_row<A>(s.bias_ih + first, rows_of<S>(dir.grad_b_ih) + first, n);
      if (s.bias_hh) copy_row<A>(s.bias_hh + first, rows_of<S>(dir.grad_b_hh) + first, n);
    }
    store_sums(s.hr, H_, rows.begin, rows.end);
    if (s.peephole) {
      const Share own = own_peepholes(thread);
      for (int k = 0; k < 3; ++k)
        copy_row<A>(s.peephole + k * H_ + own.begin, rows_of<S>(dir.grad_peephole) + k * H_ + own.begin,
                    own.end - own.begin);
    }
    for (int k = 0; s.norms.sums && k < 6; ++k) {
      const Share own = own_peepholes(thread);
      for (int64_t gate = 0; norm_result(dir, k) && gate < (k < 4 ? G : 1); ++gate)
        copy_row<A>(s.norms.sums + NormGradients::place(k, H_) + gate * H_ + own.begin,
                    rows_of<S>(norm_result(dir, k)) + gate * H_ + own.begin, own.end - own.begin);
    }
  }

  void store_sums(const WeightGradient& w, int64_t N, int64_t begin, int64_t end) {
    if (!w.sums || w.sums == w.result) return;
    for (int64_t m = begin; m < end; ++m) copy_row<A>(w.sums + m * w.stride, rows_of<S>(w.result) + m * N, N);
  }

  const LayerBackward& layer_;
  const Plan& plan_;
  const int64_t I_, H_, P_;
  const int64_t heads_, K_;  // K: features of h that a unit's weights multiply
  const int D_;
  const int64_t T_, B_;
  const bool projects_, wants_x_;
  const Gates gates_;
  const bool plain_gates_;
  const bool normalises_;       // by layer normalisation
  const int64_t saved_stride_;  // values of a row that are saved
  const GateGrads input_grads_,
      hidden_grads_;  // what is multiplied by the weights, of all that stand in a row of grads
  const int64_t state_stride_, unit_stride_, cell_stride_, grad_stride_;
  GateRecomputation<Cell, S> recomputation_;
  friend class GateRecomputation<Cell, S>;
  bool packs_ = true;
  bool one_chunk_ = false;  // all rows of all steps
  int64_t chunk_rows_ = 0, depth_ = 0;
  DirectionScratch direction_[2];
  ThreadScratch* threads_ = nullptr;
  Barrier* unit_barriers_ = nullptr;
  Barrier* everyone_ = nullptr;
};

}  // namespace FRNN_ISA
}  // namespace fused_rnn
