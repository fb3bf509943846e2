// A batch with a mask as the packed batch of its live steps, for kernels that know no mask.
//
// A masked step carries the state on, so a row's states are those of its live steps alone, put together, in either
// direction. Rows with most live steps come first, as in a PackedSequence; rows with none are not in it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cstring>
#include <numeric>

#include "cpu/team.h"
#include "ops.h"

namespace fused_rnn {

class LiveSteps {
 public:
  // mask (T, B), contiguous, on the CPU.
  explicit LiveSteps(const Tensor& mask) : T_(mask.size(0)), B_(mask.size(1)) {
    if (B_ == 0) return;  // of any number of steps: a tensor without elements may claim more than can be counted
    const uint8_t* bytes = static_cast<const uint8_t*>(mask.const_data_ptr());  // True may be any but 0
    std::vector<int64_t> counts(B_);
    for (int64_t t = 0; t < T_; ++t)
      for (int64_t b = 0; b < B_; ++b) counts[b] += bytes[t * B_ + b] != 0;
    count_ = std::accumulate(counts.begin(), counts.end(), int64_t(0));
    if (all()) return;

    std::vector<int64_t> order(B_), rank(B_);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return counts[a] > counts[b]; });
    for (int64_t r = 0; r < B_; ++r) rank[order[r]] = r;
    while (!order.empty() && counts[order.back()] == 0) order.pop_back();
    rows_ = at::empty({int64_t(order.size())}, at::kLong);
    std::copy(order.begin(), order.end(), rows_.mutable_data_ptr<int64_t>());

    sizes_.resize(order.empty() ? 0 : counts[order[0]]);
    for (const int64_t row : order)
      for (int64_t k = 0; k < counts[row]; ++k) ++sizes_[k];
    offsets_.resize(sizes_.size() + 1);
    std::partial_sum(sizes_.begin(), sizes_.end(), offsets_.begin() + 1);

    live_.resize(count_);
    masked_.reserve(T_ * B_ - count_);
    std::vector<int64_t> seen(B_);
    for (int64_t t = 0; t < T_; ++t) {
      for (int64_t b = 0; b < B_; ++b) {
        const int64_t n = t * B_ + b;
        if (bytes[n]) {
          live_[offsets_[seen[b]++] + rank[b]] = n;
        } else {
          masked_.push_back(n);
        }
      }
    }
  }

  int64_t count() const { return count_; }  // N of the packed batch
  bool all() const { return count_ == T_ * B_; }

  // What follows is only for a batch that has masked steps.

  const std::vector<int64_t>& sizes() const { return sizes_; }  // batch_sizes, none where no step is live
  const std::vector<int64_t>& offsets() const { return offsets_; }

  // The live rows of t (T, B, features), whose features are contiguous, in the order of the packed batch.
  Tensor pack(const Tensor& t) const {
    const Tensor packed = at::empty({count_, t.size(2)}, t.options());
    const int64_t size = t.element_size(), row_bytes = t.size(2) * size;
    const int64_t time_bytes = t.stride(0) * size, batch_bytes = t.stride(1) * size;
    const char* from = static_cast<const char*>(t.const_data_ptr());
    char* to = static_cast<char*>(packed.mutable_data_ptr());
    each(count_, row_bytes, [&](int64_t p) {
      const int64_t n = live_[p];
      std::memcpy(to + p * row_bytes, from + n / B_ * time_bytes + n % B_ * batch_bytes, row_bytes);
    });
    return packed;
  }

  // (T, B, features), of which the live rows are those of packed, and the others zeros.
  Tensor unpack(const Tensor& packed) const {
    const Tensor t = at::empty({T_, B_, packed.size(1)}, packed.options());
    const int64_t row_bytes = packed.size(1) * packed.element_size();
    const char* from = static_cast<const char*>(packed.const_data_ptr());
    char* to = static_cast<char*>(t.mutable_data_ptr());
    each(count_, row_bytes,
         [&](int64_t p) { std::memcpy(to + live_[p] * row_bytes, from + p * row_bytes, row_bytes); });
    each(T_ * B_ - count_, row_bytes, [&](int64_t k) { std::memset(to + masked_[k] * row_bytes, 0, row_bytes); });
    return t;
  }

  // States (L * D, B, features) of the rows in the packed batch.
  Tensor pack_states(const Tensor& t) const { return t.index_select(1, rows_); }

  // States of all rows; those without a live step have `others`, or zeros if that is undefined.
  Tensor unpack_states(const Tensor& packed, const Tensor& others) const {
    Tensor t = others.defined() ? others.clone(at::MemoryFormat::Contiguous)
                                : at::zeros({packed.size(0), B_, packed.size(2)}, packed.options());
    return t.index_copy_(1, rows_, packed);
  }

 private:
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
  Tensor rows_;  // of the batch, those of the packed one in order
  std::vector<int64_t> sizes_, offsets_;
  std::vector<int64_t> live_;    // of each row of the packed batch, t * B + b
  std::vector<int64_t> masked_;  // t * B + b of the others
};

}  // namespace fused_rnn
