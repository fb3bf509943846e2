// A batch with a mask, or whose rows begin anew at some steps, as the packed batch of its pieces, for kernels that know
// neither.
//
// A masked step carries the state on, so a row's states are those of its live steps alone, put together. Where a row
// begins anew, what comes before and what comes after know nothing of each other: each such piece is a row of its own.
// Pieces of most live steps come first, as in a PackedSequence; those of none are not in it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cstring>
#include <numeric>

#include "cpu/team.h"
#include "ops.h"

namespace fused_rnn {

class Pieces {
 public:
  // mask and reset: bytes (T, B), True may be any but 0, or null: all steps are live, no row begins anew.
  Pieces(int64_t T, int64_t B, const uint8_t* mask, const uint8_t* reset) : T_(T), B_(B) {
    if (B_ == 0) return;  // of any number of steps: a tensor without elements may claim more than can be counted
    // Pieces of the batch, row by row, with their numbers of live steps.
    std::vector<int64_t> counts, row_of, first_of_row(B_ + 1);
    for (int64_t b = 0; b < B_; ++b) {
      first_of_row[b] = int64_t(counts.size());
      const auto begin = [&] {
        counts.push_back(0);
        row_of.push_back(b);
      };
      begin();
      for (int64_t t = 0; t < T_; ++t) {
        if (reset && reset[t * B_ + b]) begin();
        counts.back() += !mask || mask[t * B_ + b];
      }
    }
    const int64_t pieces = first_of_row[B_] = int64_t(counts.size());
    count_ = std::accumulate(counts.begin(), counts.end(), int64_t(0));
    whole_ = pieces == B_ && count_ == T_ * B_;
    if (whole_) return;

    std::vector<int64_t> order(pieces), rank(pieces, -1);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return counts[a] > counts[b]; });
    while (!order.empty() && counts[order.back()] == 0) order.pop_back();
    rows_.resize(order.size());
    for (size_t r = 0; r < order.size(); ++r) {
      rank[order[r]] = int64_t(r);
      rows_[r] = row_of[order[r]];
    }
    for (int d = 0; d < 2; ++d) {
      ends_[d].resize(B_);
      for (int64_t b = 0; b < B_; ++b) {
        const int64_t first = first_of_row[b], last = first_of_row[b + 1] - 1;
        // The reverse direction ends with the piece that step 0 is in.
        const int64_t lowest = reset && T_ > 0 && reset[b] ? first + 1 : first;
        const int64_t from = d == 0 ? first : last, to = d == 0 ? last : lowest;
        ends_[d][b] = {rank[from], rank[to], from == to};
      }
    }

    sizes_.resize(order.empty() ? 0 : counts[order[0]]);
    for (const int64_t piece : order)
      for (int64_t k = 0; k < counts[piece]; ++k) ++sizes_[k];
    offsets_.resize(sizes_.size() + 1);
    std::partial_sum(sizes_.begin(), sizes_.end(), offsets_.begin() + 1);

    live_.resize(count_);
    masked_.reserve(T_ * B_ - count_);
    std::vector<int64_t> piece(first_of_row.begin(), first_of_row.end() - 1), seen(B_);
    for (int64_t t = 0; t < T_; ++t) {
      for (int64_t b = 0; b < B_; ++b) {
        const int64_t n = t * B_ + b;
        if (reset && reset[n]) {
          ++piece[b];
          seen[b] = 0;
        }
        if (!mask || mask[n]) {
          live_[offsets_[seen[b]++] + rank[piece[b]]] = n;
        } else {
          masked_.push_back(n);
        }
      }
    }
  }

  int64_t count() const { return count_; }  // N of the packed batch
  int64_t batch() const { return B_; }      // rows of the batch itself
  bool whole() const { return whole_; }     // the batch as it is: nothing masked, nothing begun anew

  // What follows is only for a batch that is not whole.

  const std::vector<int64_t>& sizes() const { return sizes_; }  // batch_sizes, none where no step is live
  const std::vector<int64_t>& offsets() const { return offsets_; }

  // The live rows of t (T, B, features), whose features are contiguous, in the order of the packed batch.
  Tensor pack(const Tensor& t) const {
    const Tensor packed = at::empty({count_, t.size(2)}, t.options());
    pack(t, packed);
    return packed;
  }
  void pack(const Tensor& t, const Tensor& packed) const {
    const int64_t size = t.element_size(), row_bytes = t.size(2) * size;
    const int64_t time_bytes = t.stride(0) * size, batch_bytes = t.stride(1) * size;
    const char* from = static_cast<const char*>(t.const_data_ptr());
    char* to = static_cast<char*>(packed.mutable_data_ptr());
    each(count_, row_bytes, [&](int64_t p) {
      const int64_t n = live_[p];
      std::memcpy(to + p * row_bytes, from + n / B_ * time_bytes + n % B_ * batch_bytes, row_bytes);
    });
  }

  // The same of each entry of t (entries, T * B, features), contiguous.
  Tensor pack_each(const Tensor& t) const {
    const Tensor packed = at::empty({t.size(0), count_, t.size(2)}, t.options());
    for (int64_t i = 0; i < t.size(0); ++i) pack(t.select(0, i).view({T_, B_, t.size(2)}), packed.select(0, i));
    return packed;
  }

  // (T, B, features), of which the live rows are those of packed, and the others zeros.
  Tensor unpack(const Tensor& packed) const {
    const Tensor t = at::empty({T_, B_, packed.size(1)}, packed.options());
    unpack(packed, t);
    return t;
  }
  void unpack(const Tensor& packed, const Tensor& t) const {
    const int64_t row_bytes = packed.size(1) * packed.element_size();
    const char* from = static_cast<const char*>(packed.const_data_ptr());
    char* to = static_cast<char*>(t.mutable_data_ptr());
    each(count_, row_bytes,
         [&](int64_t p) { std::memcpy(to + live_[p] * row_bytes, from + p * row_bytes, row_bytes); });
    each(T_ * B_ - count_, row_bytes, [&](int64_t k) { std::memset(to + masked_[k] * row_bytes, 0, row_bytes); });
  }

  // The same of each entry of packed (entries, rows of the packed batch, features): (entries, T * B, features).
  Tensor unpack_each(const Tensor& packed) const {
    const Tensor t = at::empty({packed.size(0), T_ * B_, packed.size(2)}, packed.options());
    for (int64_t i = 0; i < packed.size(0); ++i) unpack(packed.select(0, i), t.select(0, i));
    return t;
  }

  // (L * D, B, features) for the rows of the packed batch, whatever piece of a row each is.
  Tensor pack_rows(const Tensor& t) const { return t.index_select(1, row_indices()); }

  // States are (L * D, B or rows of the packed batch, features) of D directions, contiguous; undefined: zeros.

  // What pieces begin from: the first of a row from `initial`, the others from `anew`.
  Tensor initial_states(const Tensor& initial, const Tensor& anew, int64_t D) const {
    const Tensor& like = initial.defined() ? initial : anew;
    if (!like.defined()) return {};
    const Tensor packed = at::zeros({like.size(0), int64_t(rows_.size()), like.size(2)}, like.options());
    each_piece(like.size(0), D, [&](int64_t i, int64_t r, const Ends& ends) {
      copy(packed, i, r, ends.first == r ? initial : anew, i, rows_[r]);
    });
    return packed;
  }

  // What rows end in: the state after their last piece, or, where that has no live step, what it began from.
  Tensor final_states(const Tensor& packed, const Tensor& initial, const Tensor& anew, int64_t D) const {
    const Tensor states = at::zeros({packed.size(0), B_, packed.size(2)}, packed.options());
    each_row(packed.size(0), D, [&](int64_t i, int64_t b, const Ends& ends) {
      if (ends.last >= 0) {
        copy(states, i, b, packed, i, ends.last);
      } else {
        copy(states, i, b, ends.one ? initial : anew, i, b);
      }
    });
    return states;
  }

  // Gradients of the states after pieces, from those of final states.
  Tensor final_gradients(const Tensor& grad, int64_t D) const {
    if (!grad.defined()) return {};
    const Tensor packed = at::zeros({grad.size(0), int64_t(rows_.size()), grad.size(2)}, grad.options());
    each_row(grad.size(0), D, [&](int64_t i, int64_t b, const Ends& ends) {
      if (ends.last >= 0) copy(packed, i, ends.last, grad, i, b);
    });
    return packed;
  }

  // The gradient of `initial`, from those of what pieces began from and of final states.
  Tensor initial_gradient(const Tensor& packed, const Tensor& grad, int64_t D) const {
    const Tensor result = at::zeros({packed.size(0), B_, packed.size(2)}, packed.options());
    each_row(packed.size(0), D, [&](int64_t i, int64_t b, const Ends& ends) {
      if (ends.first >= 0) {
        copy(result, i, b, packed, i, ends.first);
      } else if (ends.one) {
        copy(result, i, b, grad, i, b);
      }
    });
    return result;
  }

  // The gradient of `anew`, likewise: the sum over the pieces of a row that are not its first.
  Tensor anew_gradient(const Tensor& packed, const Tensor& grad, int64_t D) const {
    Tensor rows = packed.clone(at::MemoryFormat::Contiguous);
    each_piece(packed.size(0), D, [&](int64_t i, int64_t r, const Ends& ends) {
      if (ends.first == r) copy(rows, i, r, Tensor(), i, r);
    });
    Tensor ended = at::zeros({packed.size(0), B_, packed.size(2)}, packed.options());
    each_row(packed.size(0), D, [&](int64_t i, int64_t b, const Ends& ends) {
      if (ends.last < 0 && !ends.one) copy(ended, i, b, grad, i, b);
    });
    const auto sums = packed.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return ended.to(sums).index_add_(1, row_indices(), rows.to(sums)).to(packed.scalar_type());
  }

 private:
  // Of a row in one direction: the places in the packed batch of the pieces it begins and ends with, -1 for one without
  // a live step; and whether they are one.
  struct Ends {
    int64_t first, last;
    bool one;
  };

  Tensor row_indices() const {
    return at::from_blob(const_cast<int64_t*>(rows_.data()), {int64_t(rows_.size())}, at::kLong);
  }

  template <class F>
  void each_row(int64_t entries, int64_t D, F f) const {
    for (int64_t i = 0; i < entries; ++i)
      for (int64_t b = 0; b < B_; ++b) f(i, b, ends_[i % D][b]);
  }
  template <class F>
  void each_piece(int64_t entries, int64_t D, F f) const {
    for (int64_t i = 0; i < entries; ++i)
      for (int64_t r = 0; r < int64_t(rows_.size()); ++r) f(i, r, ends_[i % D][rows_[r]]);
  }

  // to[i][r] = from[j][s], or zeros where that is undefined.
  static void copy(const Tensor& to, int64_t i, int64_t r, const Tensor& from, int64_t j, int64_t s) {
    const int64_t bytes = to.size(2) * to.element_size();
    char* target = static_cast<char*>(to.mutable_data_ptr()) + (i * to.size(1) + r) * bytes;
    if (!from.defined()) {
      std::memset(target, 0, bytes);
    } else {
      std::memcpy(target, static_cast<const char*>(from.const_data_ptr()) + (j * from.size(1) + s) * bytes, bytes);
    }
  }

  // row(i) for each i of count, on the threads of a call where it is worth waking them.
  template <class Row>
  static void each(int64_t count, int64_t row_bytes, Row row) {
    constexpr int64_t bytes_of_a_thread = 1 << 17;
    const int64_t grain = std::max<int64_t>(1, bytes_of_a_thread / std::max<int64_t>(1, row_bytes));
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) row(i);
    };
    if (count <= grain || team_is_late() || usable_threads(at::get_num_threads()) == 1) {
      run(0, count);
    } else {
      at::parallel_for(0, count, grain, run);
    }
  }

  int64_t T_, B_, count_ = 0;
  bool whole_ = true;
  std::vector<int64_t> rows_;  // of the batch, one for each row of the packed one
  std::vector<Ends> ends_[2];  // of the batch's rows, forward and reverse
  std::vector<int64_t> sizes_, offsets_;
  std::vector<int64_t> live_;    // of each row of the packed batch, t * B + b
  std::vector<int64_t> masked_;  // t * B + b of the others
};

}  // namespace fused_rnn
