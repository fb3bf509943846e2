// Threads of one operator call: they are launched once, stay for the whole sequence, and meet at spinning barriers.
//
// The threads are those of the OpenMP runtime that PyTorch has loaded, so that a model that mixes our layers with
// torch's own operators keeps one set of threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace fused_rnn {

// A reusable barrier. It spins briefly, then gives the processor away, so that more threads than processors cost their
// share of time and no more.
class alignas(64) Barrier {
 public:
  FRNN_HOST_DEVICE void reset(int threads) {
    threads_ = threads;
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(0, std::memory_order_relaxed);
  }
  FRNN_EXPORT void wait();

 private:
  int threads_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

// Processors that this process may run on: affinity mask and container quota, at least 1.
int available_processors();

// Lets tests act on a machine of another size: `count` stands for available_processors() from now on, 0 for the real
// number. Returns what stood before.
int override_processors(int count);

// The number of threads that a call should use when PyTorch is set to `requested`: no more than there are processors,
// and 1 inside a parallel region or in a forked child, whose OpenMP threads did not survive the fork.
int usable_threads(int requested);

// Whether teams of this thread were late often enough of late that a call should do without one: the machine has other
// work, and the system lets a team's threads run in turns. Never under override_processors.
bool team_is_late();

// What that follows from: a team of `threads` took wall_us, of which its first thread worked own_us on a processor, not
// waiting for the others. run_team says so of each; tests, too.
void judge_team(int threads, double wall_us, double own_us);

// Forgets that teams were late; for tests.
void expect_teams_in_time();

// Runs task(context, thread) on `threads` threads at once and returns true; returns false, having run nothing, where
// the runtime does not give that many. In a task denormal numbers are zero.
FRNN_EXPORT bool run_team(int threads, void (*task)(void* context, int thread), void* context);

// Memory for packed weights and buffers, aligned to 64 bytes or to a huge page; free() gives it back. Null when there
// is none to be had.
void* large_memory(size_t bytes);

// Memory of the calling thread that is kept from call to call, aligned to 64 bytes: it grows to what the largest call
// needed. Null when there is none to be had.
FRNN_EXPORT void* scratch_memory(size_t bytes);

// Bytes that scratch_memory holds for the calling thread.
size_t scratch_held();

// Cuts an arena into arrays. With a null base it only counts, so one function can both measure and lay out.
class Layout {
 public:
  FRNN_HOST_DEVICE explicit Layout(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  FRNN_HOST_DEVICE T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    // One more line between arrays: power-of-two arrays would share their cache sets.
    used_ += (size_t(count > 0 ? count : 0) * sizeof(T) + 63) / 64 * 64 + 64;
    return p;
  }
  FRNN_HOST_DEVICE size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace fused_rnn
