// A layer whose packed weights and states stay from call to call. Products, normalisation, gates and projections are
// those of a call of a layer (../cpu/forward.h), so results are the same bits as where such a call packs its weights.
// Matrices that are stored in another format than the rest have products of their own (../cpu/stored.h).
//
// A step is two products for all rows, x with w_ih and h with w_hh, and then the gates of all units, which write h over
// the h before: nobody reads it any more. So a state has one place, and rows may have states in any order; those that
// follow each other in memory go through the gates together.
#pragma once

#include <new>

#include "../cpu/run.h"
#include "../cpu/stored.h"
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

  static void pack(const LayerForward& layer, const StreamWeights& weights) {
    StreamPass pass(layer);
    pass.take(weights);
    pass.Base::pack(0, pass.format_ == WeightFormat::same);
    if (pass.format_ != WeightFormat::same) pass.pack_stored(weights);
  }

  static void create(LayerForward& layer, const StreamWeights& weights, const StreamStates& states,
                     const StreamWork& work, void* object) {
    StreamPass& pass = *new (object) StreamPass(layer);
    pass.own_layer_ = &layer;
    pass.take(weights);
    pass.states_ = static_cast<E*>(states.multiplied);
    pass.carried_ = static_cast<A*>(states.carried);
    pass.cells_ = static_cast<A*>(states.cells);
    pass.own_panels_ = pass.panels_;
    pass.own_rows_ = work.step_rows;
    pass.chunk_rows_ = work.rows;
    pass.mine_.projected = static_cast<A*>(work.projected);
    pass.mine_.sums = static_cast<A*>(work.sums);
    pass.mine_.state_sums = static_cast<A*>(work.state_sums);
    pass.mine_.x = static_cast<E*>(work.x);
    pass.mine_.x_rows = static_cast<const E**>(work.x_rows);
    pass.mine_.state_rows[0] = static_cast<const E**>(work.state_rows);
    pass.mine_.hidden_rows = static_cast<const E**>(work.hidden_rows);
    pass.hidden_ = static_cast<E*>(work.hidden);
    pass.output_gate_ = static_cast<A*>(work.output_gate);
    pass.new_cell_ = static_cast<A*>(work.new_cell);
    if (pass.format_ != WeightFormat::same) {
      pass.stored_ih_ = {pass.format_, weights.w_ih, weights.scale_ih, weights.sum_ih};
      pass.stored_hh_ = {pass.format_, weights.w_hh, weights.scale_hh, weights.sum_hh};
      pass.stored_hr_ = {pass.format_, weights.w_hr, weights.scale_hr, weights.sum_hr};
      pass.quantized_ = {static_cast<Int8*>(work.quantized),
                         static_cast<const Int8**>(work.quantized_rows),
                         static_cast<RowScale*>(work.row_scales),
                         work.quantized_stride,
                         work.by_dots,
                         work.by_tiles};
    }
  }

  static void advance(void* object, const StreamRows& call) { static_cast<StreamPass*>(object)->run_rows(call); }

  static constexpr StreamShape shape = {
      Cell::gates,        Cell::states,     Simd<A>::width,           U, Operand<E>::group, int64_t(sizeof(E)),
      int64_t(sizeof(A)), Base::converts_x, int64_t(sizeof(RowScale))};

 private:
  static constexpr int vectors_apart = Base::vectors_apart;
  static constexpr Plan one_thread{};
  // Whether the matrices may be stored in another format.
  static constexpr bool may_store = std::is_same_v<S, float> && U == 1;

  void take(const StreamWeights& weights) {
    auto& s = direction_[0];
    s.w_ih = static_cast<E*>(weights.w_ih);
    s.w_hh = static_cast<E*>(weights.w_hh);
    s.w_hr = static_cast<E*>(weights.w_hr);
    s.input_bias = static_cast<A*>(weights.input_bias);
    s.hidden_bias = static_cast<A*>(weights.hidden_bias);
    s.gain_ih = static_cast<A*>(weights.gain_ih);
    s.gain_hh = static_cast<A*>(weights.gain_hh);
    zeros_ = static_cast<A*>(weights.zeros);
  }

  // The matrices in their format; what lies between is zeros.
  void pack_stored(const StreamWeights& to) {
    const Weights& w = layer_.direction[0].weights;
    const int64_t bytes = format_ == WeightFormat::int8 ? 1 : 2, group = group_of(format_);
    const auto pack = [&](const void* matrix, const float* scales, int64_t row, int64_t K, int64_t first,
                          int64_t column, int64_t columns, void* data, float* scales_to, int32_t* sums_to) {
      const int64_t depth = (K + group - 1) / group * group;
      pack_stored_row(format_, matrix, row, K, column, columns, static_cast<char*>(data) + first * depth * bytes);
      if (format_ != WeightFormat::int8) return;
      int32_t sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += static_cast<const int8_t*>(matrix)[row * K + k];
      scales_to[first + column] = scales[row];
      sums_to[first + column] = sum;
    };
    for (int64_t row = 0; row < Base::G * H_; ++row) {
      const int64_t unit = row % H_, p = unit / Base::panel_units, first = p * panel_columns;
      const int64_t column = row / H_ * Base::panel_units + unit % Base::panel_units;
      pack(w.w_ih, w.scale_ih, row, I_, first, column, panel_columns, to.w_ih, to.scale_ih, to.sum_ih);
      pack(w.w_hh, w.scale_hh, row, K_, first, column, panel_columns, to.w_hh, to.scale_hh, to.sum_hh);
    }
    constexpr int64_t wide = Columns::NV * Columns::width;
    for (int64_t row = 0; projects_ && row < P_; ++row) {
      const int64_t first = row / wide * wide, left = Columns::padded_columns(P_) - first;
      pack(w.w_hr, w.scale_hr, row, H_, first, row - first, left < wide ? left : wide, to.w_hr, to.scale_hr, to.sum_hr);
    }
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
      multiply<vectors_apart>(call.rows, K_, mine_.state_rows[0] + head * this->own_rows_, direction_[0].w_hh,
                              stored_hh_, p, panels_of_head, mine_.sums,
                              normalises_ ? Addend<A>{zeros_ + column, 0, zeros_ + column} : projection);
    }
    each_run(call, t, projected, false);
    if (!projects_) return;
    multiply_projection(call.rows);
    each_run(call, t, projected, true);
  }

  void multiply_inputs(int64_t rows) {
    const A* bias = normalises_ ? zeros_ : direction_[0].input_bias;
    multiply<0>(rows, I_, mine_.x_rows, direction_[0].w_ih, stored_ih_, 0, panels_, mine_.projected,
                {bias, 0, nullptr});
  }

  void multiply_projection(int64_t rows) {
    const int64_t stride = Columns::padded_columns(P_);
    if constexpr (may_store) {
      if (format_ != WeightFormat::same)
        return product_stored_columns(rows, H_, P_, mine_.hidden_rows, stored_hr_, mine_.state_sums, stride,
                                      quantized_);
    }
    const Columns w_hr{direction_[0].w_hr, H_, P_};
    product_columns<E>(rows, mine_.hidden_rows, w_hr, 0, Columns::count(P_), mine_.state_sums, stride, false);
  }

  // Panels [p, p + count) of `sums` = rows times those of a weight, which is `stored` where that has a format.
  template <int apart>
  __attribute__((noinline)) void multiply(int64_t rows, int64_t K, const E* const* a, const E* weight,
                                          const StoredWeights& stored, int64_t p, int64_t count, A* sums,
                                          Addend<A> addend) {
    if constexpr (may_store) {
      const int64_t first = p * panel_columns;
      if (format_ != WeightFormat::same)
        return product_stored<Base::NV, apart>(rows, K, a, stored, first, count, sums + first, panels_ * panel_columns,
                                               addend, quantized_);
    }
    this->template multiply_packed<apart>(rows, K, a, weight + p * padded_depth<E>(K) * panel_columns, p, count,
                                          sums + p * panel_columns, panels_ * panel_columns, addend, nullptr);
  }

  // The gates of rows that have this step, or what follows the projection of h: rows whose states follow each other in
  // memory at once, with everything that is counted from row 0 in the place of the first.
  void each_run(const StreamRows& call, int64_t t, A* projected, bool after_projection) {
    const auto lives = [&](int64_t row) {
      if (call.mask && !call.mask[(call.first_step + t) * call.mask_stride + row]) return false;
      return !call.lengths || call.first_step + t < call.lengths[row];
    };
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

  const WeightFormat format_ = layer_.sizes.format;
  StoredWeights stored_ih_, stored_hh_, stored_hr_;
  QuantizedRows quantized_;
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
  static constexpr StreamKernel kernel = {FRNN_ISA_TEXT, Pass::shape,   sizeof(Pass),
                                          &Pass::pack,   &Pass::create, &Pass::advance};
  return kernel;
}

// In the shape of run_forward (../cpu/run.h), on which the order of the packed weights depends. There is no relu here:
// it is tanh with another function.
template <class S>
const StreamKernel& stream_kernel_of(const LayerSizes& sizes) {
  if (sizes.kind == CellKind::lstm) return stream_kernel_of<Lstm, S, 1>();
  if (sizes.kind == CellKind::gru) return stream_kernel_of<Gru, S, 1>();
  if (sizes.format == WeightFormat::same && has_wide_panels<S>(sizes.hidden_size, sizes.heads))
    return stream_kernel_of<RnnTanh, S, 2>();
  return stream_kernel_of<RnnTanh, S, 1>();
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn
