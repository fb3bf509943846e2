#include "team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_rnn {

namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// About 20 us of pauses: longer than any step's imbalance between threads that all run, far shorter than a time slice.
constexpr int spins_before_yield = 1000;

std::atomic<bool> forked{false};
std::atomic<int> processors_override{0};

struct ForkHandler {
  ForkHandler() {
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  }
} fork_handler;

// Processors' worth of time that the container may use, from control groups version 2 or 1; 0: no limit.
int quota_processors() {
  long long quota = -1, period = 0;
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    if (std::fscanf(f, "%lld %lld", &quota, &period) != 2) quota = -1;  // "max" stands for no limit
    std::fclose(f);
  } else if (FILE* q = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
    if (std::fscanf(q, "%lld", &quota) != 1) quota = -1;
    std::fclose(q);
    if (FILE* p = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r")) {
      if (std::fscanf(p, "%lld", &period) != 1) quota = -1;
      std::fclose(p);
    }
  }
  if (quota <= 0 || period <= 0) return 0;
  return int((quota + period - 1) / period);
}

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};

thread_local Scratch scratch;

}  // namespace

void Barrier::wait() {
  if (threads_ == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < spins_before_yield) {
      pause();
    } else {
      sched_yield();
    }
  }
}

int override_processors(int count) { return processors_override.exchange(count); }

int available_processors() {
  const int override_count = processors_override.load(std::memory_order_relaxed);
  if (override_count > 0) return override_count;
  static const int quota = quota_processors();
  int count = 0;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
  // More processors than the set holds, or no such call: OpenMP knows another way.
  if (count <= 0) count = omp_get_num_procs();
  if (quota > 0) count = std::min(count, quota);
  return std::max(count, 1);
}

int usable_threads(int requested) {
  if (requested <= 1 || omp_in_parallel() || forked.load(std::memory_order_relaxed)) return 1;
  return std::min(requested, available_processors());
}

bool run_team(int threads, void (*task)(void*, int), void* context) {
  if (threads == 1) {
    task(context, 0);
    return true;
  }
  bool complete = false;
#pragma omp parallel num_threads(threads)
  {
    // Every thread sees the same number, so either all run the task or none does.
    if (omp_get_num_threads() == threads) {
      if (omp_get_thread_num() == 0) complete = true;
      task(context, omp_get_thread_num());
    }
  }
  return complete;
}

void* scratch_memory(size_t bytes) {
  if (bytes > scratch.bytes) {
    std::free(scratch.memory);
    scratch.bytes = 0;
    // Huge pages: a step streams megabytes of packed weights, and 4 KiB pages would miss the TLB.
    const size_t alignment = bytes >= (size_t(2) << 20) ? (size_t(2) << 20) : 64;
    const size_t size = (bytes + alignment - 1) / alignment * alignment;
    scratch.memory = std::aligned_alloc(alignment, size);
    if (!scratch.memory) return nullptr;
#if defined(MADV_HUGEPAGE)
    if (alignment > 64) madvise(scratch.memory, size, MADV_HUGEPAGE);
#endif
    scratch.bytes = size;
  }
  return scratch.memory;
}

size_t scratch_held() { return scratch.bytes; }

}  // namespace fused_rnn
