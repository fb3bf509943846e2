// The gate activations of a chunk of steps, computed again in the backward pass where the forward pass kept only the
// states: every previous h is known by then, so the products are those of all rows of the chunk together, and the
// threads divide them without waiting for one another.
//
// Sums and gates are taken in the order of the forward pass, and rounded as it stores them.
#pragma once

#include "forward.h"

namespace fused_rnn {
namespace FRNN_ISA {

template <class Cell, class S>
class GateRecomputation {
  using A = typename Accumulator<S>::type;
  using E = typename ProductElement<S>::type;
  using V = typename Simd<A>::V;
  static constexpr int width = Simd<A>::width;
  static constexpr int G = Cell::gates;
  static constexpr int64_t panel_columns = G * width;
  static constexpr int vectors_apart = gates_apart<Cell>();
  static constexpr bool converts = sizeof(S) != sizeof(E);

 public:
  GateRecomputation(const LayerBackward& layer, int threads)
      : layer_(layer),
        threads_count_(threads),
        I_(layer.sizes.input_size),
        H_(layer.sizes.hidden_size),
        P_(layer.sizes.state_size),
        heads_(layer.sizes.heads),
        K_(P_ / heads_),
        D_(layer.sizes.num_directions),
        panels_((H_ + width - 1) / width),
        normalises_(layer.within.layer_norm),
        saved_stride_((Cell::saved + (normalises_ ? 2 * G : 0)) * H_),
        row_stride_((normalises_ ? panels_ : 1) * panel_columns),
        copies_h_(converts || layer.direction[0].extras.dropout),
        x_stride_(round_up(I_, width) + 16),
        h_stride_(round_up(P_, width) + 16) {}

  // Whether there is anything to compute: the forward pass saves gates, and did not.
  bool needed() const { return (Cell::saved > 0 || normalises_) && !layer_.direction[0].gates; }

  void lay_out(Layout& layout, int64_t chunk_rows) {
    if (!needed()) return;
    for (int d = 0; d < D_; ++d) {
      Direction& s = direction_[d];
      s.w_ih = layout.take<E>(panels_ * padded_depth<E>(I_) * panel_columns);
      s.w_hh = layout.take<E>(panels_ * padded_depth<E>(K_) * panel_columns);
      s.input_bias = layout.take<A>(panels_ * panel_columns);
      s.hidden_bias = layout.take<A>(panels_ * panel_columns);
      s.gates = layout.take<S>(chunk_rows * saved_stride_);
      for (A** gain : {&s.gain_ih, &s.gain_hh}) *gain = layout.take<A>(normalises_ ? panels_ * panel_columns : 0);
    }
    zeros_ = layout.take<E>(h_stride_);
    threads_ = layout.take<Thread>(threads_count_);
    for (int i = 0; i < threads_count_; ++i) {
      Thread t;
      t.x = layout.take<E>(converts ? chunk_rows * x_stride_ : 0);
      t.h = layout.take<E>(copies_h_ ? chunk_rows * h_stride_ : 0);
      t.rows = layout.take<Row>(chunk_rows);
      t.x_rows = layout.take<const E*>(chunk_rows);
      t.h_rows = layout.take<const E*>(heads_ * chunk_rows);
      t.h_rows_of_head = chunk_rows;
      const int64_t rows = normalises_ && chunk_rows > rows_together ? rows_together : chunk_rows;
      t.projected = layout.take<A>(rows * row_stride_);
      t.sums = layout.take<A>(rows * row_stride_);
      if (threads_) threads_[i] = t;
    }
  }

  // This thread's share of packing; a barrier must follow.
  void pack(int thread) {
    if (!needed()) return;
    if (thread == 0) {
      for (int64_t i = 0; i < h_stride_; ++i) zeros_[i] = E{};
    }
    const Share share(panels_, thread, threads_count_);
    for (int d = 0; d < D_; ++d) {
      const Weights& w = layer_.direction[d].weights;
      Direction& s = direction_[d];
      for (int64_t p = share.begin; p < share.end; ++p) {
        pack_gates<E, G, 1>(rows_of<S>(w.w_ih), H_, I_, p, s.w_ih + p * padded_depth<E>(I_) * panel_columns);
        pack_gates<E, G, 1>(rows_of<S>(w.w_hh), H_, K_, p, s.w_hh + p * padded_depth<E>(K_) * panel_columns);
        pack_bias<Cell, S, 1>(w, H_, p, s.input_bias + p * panel_columns, s.hidden_bias + p * panel_columns);
        if (normalises_) {
          pack_gain<S, G, 1>(w.norm_ih, H_, p, s.gain_ih + p * panel_columns);
          pack_gain<S, G, 1>(w.norm_hh, H_, p, s.gain_hh + p * panel_columns);
        }
      }
    }
  }

  // Gates of row `row` of the chunk.
  FRNN_INLINE const S* gates(int d, int64_t row) const { return direction_[d].gates + row * saved_stride_; }

  // This thread's share of the gates of direction d for the rows that each_row(f) visits, calling f(row, t, b); a
  // barrier must follow. pass: the BackwardPass, for the states before a step.
  template <class EachRow, class Pass>
  void run(int d, int thread, int64_t rows, const EachRow& each_row, const Pass& pass) {
    if constexpr (Cell::kind < CellKind::custom) {
      if (normalises_) return run_normalised(d, thread, rows, each_row, pass);
    }
    if constexpr (Cell::saved > 0) {
      // Panels, so that a weight is read by one thread; rows where there are too few of them.
      const bool by_panels = panels_ >= 4 * threads_count_;
      const Share own(rows, by_panels ? 0 : thread, by_panels ? 1 : threads_count_);
      const Share panels(panels_, by_panels ? thread : 0, by_panels ? threads_count_ : 1);
      const Thread& mine = threads_[thread];
      each_row([&](int64_t row, int64_t t, int64_t b) {
        if (row >= own.begin && row < own.end) locate(d, t, b, row - own.begin, mine, pass);
      });
      const int64_t count = own.end - own.begin;
      const Direction& s = direction_[d];
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        const int64_t ih = padded_depth<E>(I_) * panel_columns, hh = padded_depth<E>(K_) * panel_columns;
        const int64_t head = heads_ > 1 ? p * width / K_ : 0;
        product<E, G>(count, I_, mine.x_rows, s.w_ih + p * ih, 1, ih, mine.projected, panel_columns,
                      {s.input_bias + p * panel_columns});
        product<E, G, vectors_apart>(count, K_, mine.h_rows + head * mine.h_rows_of_head, s.w_hh + p * hh, 1, hh,
                                     mine.sums, panel_columns,
                                     {mine.projected, panel_columns, s.hidden_bias + p * panel_columns});
        for (int64_t r = 0; r < count; ++r) {
          S* gates = s.gates + (own.begin + r) * saved_stride_;
          const A *sums = mine.sums + r * panel_columns, *projected = mine.projected + r * panel_columns;
          if (layer_.plain_gates) {
            store_gates<true>(d, mine.rows[r], sums, projected, p * width, gates);
          } else {
            store_gates<false>(d, mine.rows[r], sums, projected, p * width, gates);
          }
        }
      }
    }
  }

 private:
  struct Direction {
    E *w_ih = nullptr, *w_hh = nullptr;
    A *input_bias = nullptr, *hidden_bias = nullptr;
    S* gates = nullptr;  // (chunk_rows, saved * H), with layer normalisation (chunk_rows, (saved + 2 * G) * H)
    A *gain_ih = nullptr, *gain_hh = nullptr;
  };
  // The state before the step of a row of the chunk, as BackwardPass::Before.
  struct Row {
    const S* h;
    const A* cell;
    const S* c;
  };
  struct Thread {
    E *x, *h;  // rows that are not multiplied in their storage type
    const E **x_rows, **h_rows;
    int64_t h_rows_of_head;  // rows of the next head are so many further on
    Row* rows;
    A *projected, *sums;  // (chunk_rows, one panel), with layer normalisation (rows_together, all panels)
  };

  // With layer normalisation, which takes means over all panels: rows whose sums stay in the second-level cache.
  static constexpr int64_t rows_together = 32;

  // The same with layer normalisation, by rows.
  template <class EachRow, class Pass>
  void run_normalised(int d, int thread, int64_t rows, const EachRow& each_row, const Pass& pass) {
    const Share own(rows, thread, threads_count_);
    const Thread& mine = threads_[thread];
    const Direction& s = direction_[d];
    each_row([&](int64_t row, int64_t t, int64_t b) {
      if (row >= own.begin && row < own.end) locate(d, t, b, row - own.begin, mine, pass);
    });
    for (int64_t first = 0; first < own.end - own.begin; first += rows_together) {
      const int64_t left = own.end - own.begin - first, count = left < rows_together ? left : rows_together;
      for (int64_t p = 0; p < panels_; ++p) {
        const int64_t ih = padded_depth<E>(I_) * panel_columns, hh = padded_depth<E>(K_) * panel_columns;
        const int64_t head = heads_ > 1 ? p * width / K_ : 0;
        product<E, G>(count, I_, mine.x_rows + first, s.w_ih + p * ih, 1, ih, mine.projected + p * panel_columns,
                      row_stride_, Addend<A>{});
        product<E, G>(count, K_, mine.h_rows + head * mine.h_rows_of_head + first, s.w_hh + p * hh, 1, hh,
                      mine.sums + p * panel_columns, row_stride_, Addend<A>{});
      }
      for (int64_t r = 0; r < count; ++r) {
        S* gates = s.gates + (own.begin + first + r) * saved_stride_;
        S* centred = gates + Cell::saved * H_;
        A *x = mine.projected + r * row_stride_, *h = mine.sums + r * row_stride_;
        normalise_panels<S, G, 1>(x, H_, s.gain_ih, centred, [&](int64_t column, int) __attribute__((always_inline)) {
          return Simd<A>::load(s.input_bias + column);
        });
        normalise_panels<S, G, 1>(h, H_, s.gain_hh, centred + G * H_,
                                  [&](int64_t column, int v) __attribute__((always_inline)) {
                                    return Simd<A>::load((v < G - vectors_apart ? x : s.hidden_bias) + column);
                                  });
        if constexpr (Cell::saved > 0) {
          for (int64_t p = 0; p < panels_; ++p)
            store_gates<false>(d, mine.rows[first + r], h + p * panel_columns, x + p * panel_columns, p * width, gates);
        }
      }
    }
  }

  template <class Pass>
  void locate(int d, int64_t t, int64_t b, int64_t row, const Thread& mine, const Pass& pass) {
    const Sequence& x = layer_.x;
    const S* input = rows_of<S>(x.data) + layer_.steps.step(x, t) + b * x.batch_stride;
    const auto before = pass.before(d, t, b);
    mine.rows[row] = {before.h, before.cell, before.c};
    if constexpr (converts) {
      copy_row<A>(input, mine.x + row * x_stride_, I_);
      mine.x_rows[row] = mine.x + row * x_stride_;
    } else {
      mine.x_rows[row] = input;
    }
    if (copies_h_) {
      const void* dropout = layer_.direction[d].extras.dropout;
      copy_scaled<A>(before.h, dropout ? rows_of<S>(dropout) + b * P_ : nullptr, mine.h + row * h_stride_, P_);
      mine.h_rows[row] = mine.h + row * h_stride_;
    } else if constexpr (!converts) {
      mine.h_rows[row] = before.h ? before.h : zeros_;
    }
    for (int64_t head = 1; head < heads_; ++head)
      mine.h_rows[head * mine.h_rows_of_head + row] = mine.h_rows[row] + head * K_;
  }

  template <bool plain>
  FRNN_INLINE void store_gates(int d, const Row& place, const A* sums, const A* projected, int64_t unit, S* gates) {
    const int64_t n = H_ - unit;
    V x[G], r[G], saved[Cell::saved + 1], h_prev{}, c_prev[Cell::states + 1]{}, h, c[Cell::states + 1]{};
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      // As in the forward pass: the sums hold the projection too, but where the cell wants it apart.
      r[g] = Simd<A>::load(sums + g * width);
      x[g] = Cell::hidden_bias_apart(g) ? Simd<A>::load(projected + g * width) : Simd<A>::splat(A(-0.0));
    }
    if constexpr (Cell::reads_h) {
      if (place.h) h_prev = Simd<A>::load_n(place.h + unit, n);
    }
#pragma GCC unroll 4
    for (int j = 0; j < Cell::states; ++j) {
      if (place.cell) {
        c_prev[j] = Simd<A>::load_n(place.cell + j * H_ + unit, n);
      } else if (place.c) {
        c_prev[j] = Simd<A>::load_n(place.c + j * H_ + unit, n);
      }
    }
    if constexpr (plain || Cell::kind >= CellKind::custom) {
      forward_of<Cell>(x, r, h_prev, c_prev, h, c, saved);
    } else {
      forward_with_options(d, unit, n, x, r, h_prev, c_prev[0], saved);
    }
#pragma GCC unroll 4
    for (int g = 0; g < Cell::saved; ++g) Simd<A>::store_n(gates + g * H_ + unit, saved[g], n);
  }

  FRNN_INLINE void forward_with_options(int d, int64_t unit, int64_t n, const V* x, const V* r, V h_prev, V c_prev,
                                        V* saved) const {
    using One = Pack<V, 1>;  // as exact as the plain formulas of a vector
    Options<One, false> options{layer_.within, {}};
    load_peephole<S>(options, layer_.direction[d].weights.peephole, H_, unit, n, 0);
    One of_x[G], of_r[G], values[Cell::saved + 1], h, c;
    for (int g = 0; g < G; ++g) {
      of_x[g].v[0] = x[g];
      of_r[g].v[0] = r[g];
    }
    Cell::template forward<One>(of_x, of_r, One{{h_prev}}, One{{c_prev}}, h, c, values, options);
    for (int g = 0; g < Cell::saved; ++g) saved[g] = values[g].v[0];
  }

  const LayerBackward& layer_;
  const int threads_count_;
  const int64_t I_, H_, P_;
  const int64_t heads_, K_;  // K: features of h that a unit's weights multiply
  const int D_;
  const int64_t panels_;
  const bool normalises_;                    // by layer normalisation
  const int64_t saved_stride_, row_stride_;  // values of a row that are saved, and sums
  const bool copies_h_;                      // rows of h are not multiplied where they stand
  const int64_t x_stride_, h_stride_;
  Direction direction_[2];
  E* zeros_ = nullptr;
  Thread* threads_ = nullptr;
};

}  // namespace FRNN_ISA
}  // namespace fused_rnn
