// What grows while others read it: tables of cells and kernels that are added to a process.
#pragma once

#include <atomic>
#include <mutex>

namespace fused_rnn {

// Grows under the lock and is read without it: what is in it stays where it is.
template <class T, int most>
class Table {
 public:
  // The first that is wanted(item); null: there is none.
  template <class Wanted>
  const T* find(Wanted wanted) const {
    const int n = count_.load(std::memory_order_acquire);
    for (int i = 0; i < n; ++i) {
      if (wanted(items_[i])) return &items_[i];
    }
    return nullptr;
  }

  // Nothing where there is one of which same(other) holds. False: there is no more room.
  template <class Same>
  bool add(const T& item, Same same) {
    const std::lock_guard<std::mutex> lock(adding_);
    if (find(same)) return true;
    const int n = count_.load(std::memory_order_relaxed);
    if (n == most) return false;
    items_[n] = item;
    count_.store(n + 1, std::memory_order_release);
    return true;
  }

 private:
  std::mutex adding_;
  T items_[most];
  std::atomic<int> count_{0};
};

}  // namespace fused_rnn
