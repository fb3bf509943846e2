// A layer whose packed weights and states stay from call to call. Products, normalisation, gates and projections are
// those of a call of a layer (../cpu/forward.h), so results are the same bits as where such a call packs its weights.
//
// A step is two products for all rows, x with w_ih and h with w_hh, and then the gates of all units, which write h over
// the h before: nobody reads it any more. So a state has one place, and rows may have states in any order; those that
// follow each other in memory go through the gates together.
#pragma once

#include <new>

#include "../cpu/run.h"
#include "kernels.h"

namespace fused_rnn {
namespace FRNN_ISA {

template <class Cell, class S, int U>
class StreamPass : public ForwardPass<Cell, S, U> {
  using Base = ForwardPass<Cell, S, U>;
  using Base::direction_, Base::layer_, Base::panel_columns, Base::zeros_, Base::keeps_h_, Base::normalises_;
  using Base::heads_, Base::panels_, Base::projects_, Base::I_, Base::H_, Base::K_, Base::P_;
  using Base::state_stride_, Base::unit_stride_, Base::cell_stride_;
  using typename Base::A;
  using typename Base::E;
  using typename Base::ThreadScratch;
  using Columns = ColumnPanels<E>;

 public:
  explicit StreamPass(const LayerForward& layer) : Base(layer, one_thread) {}

  static size_t weight_bytes(const LayerForward& layer) {
    StreamPass pass(layer);
    Layout layout;
    pass.lay_out_kept(layout);
    return layout.used();
  }

  static void pack(const LayerForward& layer, void* weights) {
    StreamPass pass(layer);
    __builtin_memset(weights, 0, weight_bytes(layer));
    Layout layout(weights);
    const auto kept = pass.lay_out_kept(layout);
    pass.Base::pack(0, true);
    const Weights& w = layer.direction[0].weights;
    const void* const from[] = {w.peephole, w.norm_c, w.norm_c_bias};
    for (int i = 0; i < 3; ++i) {
      if (from[i])
        __builtin_memcpy(kept.of_units[i], from[i], size_t(i == 0 ? 3 : 1) * layer.sizes.hidden_size * sizeof(S));
    }
  }

  static size_t state_bytes(const LayerForward& layer, int64_t slots) {
    StreamPass pass(layer);
    Layout layout;
    pass.lay_out_states(layout, slots);
    return layout.used();
  }

  static size_t work_bytes(const LayerForward& layer, int64_t rows, int64_t step_rows) {
    StreamPass pass(layer);
    Layout layout;
    pass.lay_out_work(layout, rows, step_rows);
    return layout.used();
  }

  static void create(LayerForward& layer, const StreamMemory& memory, void* object) {
    StreamPass& pass = *new (object) StreamPass(layer);
    pass.own_layer_ = &layer;
    Layout weights(memory.weights), states(memory.states), work(memory.work);
    const auto kept = pass.lay_out_kept(weights);
    Weights& w = layer.direction[0].weights;
    const void** const of_units[] = {&w.peephole, &w.norm_c, &w.norm_c_bias};
    for (int i = 0; i < 3; ++i) {
      if (*of_units[i]) *of_units[i] = kept.of_units[i];
    }
    // What was packed is not read again; w_hr says that there is a projection.
    w.w_ih = w.w_hh = w.b_ih = w.b_hh = w.norm_ih = w.norm_hh = nullptr;
    pass.lay_out_states(states, memory.slots);
    pass.lay_out_work(work, memory.rows, memory.step_rows);
    __builtin_memset(memory.states, 0, states.used());
  }

  static void advance(void* object, const StreamRows& call) { static_cast<StreamPass*>(object)->run_rows(call); }

  static void read(const void* object, int64_t slot, void* h, void* c, bool exact) {
    const StreamPass& pass = *static_cast<const StreamPass*>(object);
    const int64_t place = slot * pass.state_stride_;
    if (pass.keeps_h_) {
      copy_row<A>(pass.carried_ + place, rows_of<S>(h), pass.P_);
    } else {
      copy_row<A>(pass.states_ + place, rows_of<S>(h), pass.P_);
    }
    for (int i = 0; c && i < Cell::states; ++i) {
      const A* cell = pass.cells_ + slot * pass.cell_stride_ + i * pass.unit_stride_;
      if (exact) {
        copy_row<A>(cell, rows_of<A>(c) + i * pass.H_, pass.H_);
      } else {
        copy_row<A>(cell, rows_of<S>(c) + i * pass.H_, pass.H_);
      }
    }
  }

  static void write(void* object, int64_t slot, const void* h, const void* c, bool exact) {
    StreamPass& pass = *static_cast<StreamPass*>(object);
    const int64_t place = slot * pass.state_stride_;
    const S* from = rows_of<S>(h);
    copy_row<A>(from, pass.states_ + place, pass.P_);
    if (pass.keeps_h_) copy_row<A>(from, pass.carried_ + place, pass.P_);
    for (int i = 0; i < Cell::states; ++i) {
      A* cell = pass.cells_ + slot * pass.cell_stride_ + i * pass.unit_stride_;
      if (exact) {
        copy_row<A>(c ? rows_of<A>(c) + i * pass.H_ : nullptr, cell, pass.H_);
      } else {
        copy_row<A>(c ? rows_of<S>(c) + i * pass.H_ : nullptr, cell, pass.H_);
      }
    }
  }

 private:
  static constexpr int vectors_apart = Base::vectors_apart;
  static constexpr Plan one_thread{};

  // Weights that are used as they are: peepholes, and gain and bias of a normalised c.
  struct Kept {
    S* of_units[3];
  };

  __attribute__((noinline)) Kept lay_out_kept(Layout& layout) {
    this->packs_ = true;
    this->lay_out_weights(layout);
    auto& s = direction_[0];
    s.input_bias = layout.take<A>(panels_ * panel_columns);
    s.hidden_bias = layout.take<A>(panels_ * panel_columns);
    for (A** gain : {&s.gain_ih, &s.gain_hh}) *gain = layout.take<A>(normalises_ ? panels_ * panel_columns : 0);
    zeros_ = layout.take<A>(normalises_ ? panels_ * panel_columns : 0);
    const Weights& w = layer_.direction[0].weights;
    Kept kept;
    kept.of_units[0] = layout.take<S>(w.peephole ? 3 * H_ : 0);
    kept.of_units[1] = layout.take<S>(w.norm_c ? H_ : 0);
    kept.of_units[2] = layout.take<S>(w.norm_c_bias ? H_ : 0);
    return kept;
  }

  __attribute__((noinline)) void lay_out_states(Layout& layout, int64_t slots) {
    states_ = layout.take<E>(slots * state_stride_);
    carried_ = layout.take<A>(keeps_h_ ? slots * state_stride_ : 0);
    cells_ = layout.take<A>(slots * cell_stride_);
  }

  __attribute__((noinline)) void lay_out_work(Layout& layout, int64_t rows, int64_t step_rows) {
    this->own_panels_ = panels_;
    this->own_rows_ = step_rows;
    this->chunk_rows_ = rows;
    mine_.projected = layout.take<A>(rows * panels_ * panel_columns);
    mine_.sums = layout.take<A>(step_rows * panels_ * panel_columns);
    mine_.state_sums = layout.take<A>(projects_ ? step_rows * Columns::padded_columns(P_) : 0);
    mine_.x = layout.take<E>(Base::converts_x ? rows * this->x_stride() : 0);
    mine_.x_rows = layout.take<const E*>(rows);
    mine_.state_rows[0] = layout.take<const E*>(heads_ * step_rows);
    mine_.hidden_rows = layout.take<const E*>(projects_ ? step_rows : 0);
    hidden_ = layout.take<E>(projects_ ? step_rows * unit_stride_ : 0);
    const int64_t of_normalised = normalises_ && Cell::has_cell ? step_rows * unit_stride_ : 0;
    output_gate_ = layout.take<A>(of_normalised);
    new_cell_ = layout.take<A>(of_normalised);
  }

  void run_rows(const StreamRows& call) {
    const int64_t stride = panels_ * panel_columns;
    int64_t row = 0;
    for (int64_t t = 0; t < call.steps; ++t) {
      const S* x = rows_of<S>(call.x.data) + t * call.x.time_stride;
      for (int64_t r = 0; r < call.rows; ++r, ++row, x += call.x.batch_stride) {
        if constexpr (Base::converts_x) {
          E* copy = mine_.x + row * this->x_stride();
          copy_row<A>(x, copy, I_);
          mine_.x_rows[row] = copy;
        } else {
          mine_.x_rows[row] = x;
        }
      }
    }
    multiply_inputs(row);
    for (int64_t r = 0; r < call.rows; ++r) {
      const E* state = states_ + slot_of(call, r) * state_stride_;
      for (int64_t head = 0; head < heads_; ++head) mine_.state_rows[0][head * this->own_rows_ + r] = state + head * K_;
      if (projects_) mine_.hidden_rows[r] = hidden_ + r * unit_stride_;
    }
    for (int64_t t = 0; t < call.steps; ++t) advance_step(call, t, mine_.projected + t * call.rows * stride);
  }

  static FRNN_INLINE int64_t slot_of(const StreamRows& call, int64_t row) {
    return call.slots ? call.slots[row] : call.first_slot + row;
  }

  void advance_step(const StreamRows& call, int64_t t, A* projected) {
    const int64_t stride = panels_ * panel_columns, panels_of_head = heads_ == 1 ? panels_ : K_ / Base::panel_units;
    for (int64_t head = 0; head < heads_; ++head) {
      const int64_t p = head * panels_of_head, column = p * panel_columns;
      const Addend<A> projection{projected + column, stride, direction_[0].hidden_bias + column};
      multiply<vectors_apart>(call.rows, K_, mine_.state_rows[0] + head * this->own_rows_, direction_[0].w_hh, p,
                              panels_of_head, mine_.sums,
                              normalises_ ? Addend<A>{zeros_ + column, 0, zeros_ + column} : projection);
    }
    each_run(call, t, projected, false);
    if (!projects_) return;
    const Columns w_hr{direction_[0].w_hr, H_, P_};
    product_columns<E>(call.rows, mine_.hidden_rows, w_hr, 0, Columns::count(P_), mine_.state_sums,
                       Columns::padded_columns(P_), false);
    each_run(call, t, projected, true);
  }

  void multiply_inputs(int64_t rows) {
    const A* bias = normalises_ ? zeros_ : direction_[0].input_bias;
    multiply<0>(rows, I_, mine_.x_rows, direction_[0].w_ih, 0, panels_, mine_.projected, {bias, 0, nullptr});
  }

  // Panels [p, p + count) of `sums` = rows times those of a weight.
  template <int apart>
  __attribute__((noinline)) void multiply(int64_t rows, int64_t K, const E* const* a, const E* weight, int64_t p,
                                          int64_t count, A* sums, Addend<A> addend) {
    this->template multiply_packed<apart>(rows, K, a, weight + p * padded_depth<E>(K) * panel_columns, p, count,
                                          sums + p * panel_columns, panels_ * panel_columns, addend, nullptr);
  }

  // The gates of rows that have this step, or what follows the projection of h: rows whose states follow each other in
  // memory at once, with everything that is counted from row 0 in the place of the first.
  void each_run(const StreamRows& call, int64_t t, A* projected, bool after_projection) {
    const auto lives = [&](int64_t row) { return !call.lengths || call.first_step + t < call.lengths[row]; };
    const int64_t stride = panels_ * panel_columns;
    auto& s = direction_[0];
    Sequence& y = own_layer_->y;
    y.batch_stride = call.y.batch_stride;
    for (int64_t first = 0; first < call.rows;) {
      if (!lives(first)) {
        ++first;
        continue;
      }
      const int64_t slot = slot_of(call, first);
      int64_t end = first + 1;
      while (end < call.rows && slot_of(call, end) == slot + (end - first) && lives(end)) ++end;
      s.state[0] = s.state[1] = states_ + slot * state_stride_;
      s.carried = carried_ + slot * state_stride_;
      s.cell = cells_ + slot * cell_stride_;
      s.hidden = hidden_ + first * unit_stride_;
      s.output_gate = output_gate_ + first * unit_stride_;
      s.new_cell = new_cell_ + first * unit_stride_;
      y.data = rows_of<S>(call.y.data) + t * call.y.time_stride + first * call.y.batch_stride;
      const int64_t rows = end - first;
      A *x = projected + first * stride, *h = mine_.sums + first * stride;
      if (after_projection) {
        this->write_projected(0, 0, 0, rows, mine_.state_sums + first * Columns::padded_columns(P_), 0,
                              Share(Columns::count(P_), 0, 1));
      } else if (normalises_) {
        this->normalised_gates(0, 0, 0, rows, x, h, 0);
      } else {
        this->gates_of_panels(0, 0, 0, rows, 0, panels_, x, h, stride, 0);
      }
      first = end;
    }
  }

  LayerForward* own_layer_ = nullptr;
  ThreadScratch mine_{};
  E* states_ = nullptr;   // (slots, state_stride) h, as it is multiplied
  A* carried_ = nullptr;  // (slots, state_stride) h itself, where that is kept apart
  A* cells_ = nullptr;    // (slots, cell_stride)
  E* hidden_ = nullptr;   // (step_rows, unit_stride) h before its projection
  A *output_gate_ = nullptr, *new_cell_ = nullptr;
};

template <class Cell, class S, int U>
const StreamKernel& stream_kernel_of() {
  using Pass = StreamPass<Cell, S, U>;
  static constexpr StreamKernel kernel = {FRNN_ISA_TEXT,      sizeof(Pass),      &Pass::weight_bytes, &Pass::pack,
                                          &Pass::state_bytes, &Pass::work_bytes, &Pass::create,       &Pass::advance,
                                          &Pass::read,        &Pass::write};
  return kernel;
}

// In the shape of run_forward (../cpu/run.h), on which the order of the packed weights depends.
template <class Cell, class S>
const StreamKernel& stream_kernel_of(const LayerSizes& sizes) {
  if constexpr (Cell::gates == 1 && gates_apart<Cell>() == 0) {
    if (has_wide_panels<S>(sizes.hidden_size, sizes.heads)) return stream_kernel_of<Cell, S, 2>();
  }
  return stream_kernel_of<Cell, S, 1>();
}

template <class S>
const StreamKernel& stream_kernel_of(const LayerSizes& sizes) {
  switch (sizes.kind) {
    case CellKind::rnn_tanh: return stream_kernel_of<RnnTanh, S>(sizes);
    case CellKind::rnn_relu: return stream_kernel_of<RnnRelu, S>(sizes);
    case CellKind::gru: return stream_kernel_of<Gru, S>(sizes);
    case CellKind::lstm:
    case CellKind::custom: break;
  }
  return stream_kernel_of<Lstm, S>(sizes);
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
