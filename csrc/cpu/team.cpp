#include "team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "denormals.h"

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

double clock_us(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return double(t.tv_sec) * 1e6 + double(t.tv_nsec) * 1e-3;
}

double now_us() { return clock_us(CLOCK_MONOTONIC); }

// Whether teams get the processors they ask for. Where they do not, the threads that run wait for one that does not,
// until the system lets it in; one thread alone then is faster. A team of n that took `wall`, of which its first thread
// worked for `own` on a processor, took longer than that thread alone would have with a processor, about n * own; and
// where it would not have had one either, it loses its share of time and not the waiting.
//
// Single late teams say nothing: a thread wakes up slowly, an interruption comes in between. So what teams lose is
// added up and what they gain is taken off again, never below zero, and calls do without a team only while the losses
// of many stand against no gains: for a time that is long compared with what was lost, and doubles whenever the teams
// after it lose still.
class Crowding {
 public:
  bool alone() { return until_us_ > 0 && now_us() < until_us_; }

  // Whether the next team is worth the clock of its first thread's processor time, a system call.
  bool watches() const { return watches_; }

  void judge(int threads, double wall_us, double own_us) {
    watches_ = wall_us >= shortest_us;
    // The runtime has to start threads, or to end some.
    const bool first = threads != threads_;
    threads_ = threads;
    if (first) return;
    const double lost_us = wall_us - threads * own_us;
    const bool late = watches_ && lost_us >= least_lost_share * wall_us;
    lost_us_ += late ? std::min(lost_us, most_lost_by_one_us) : std::min(lost_us, 0.0);
    lost_us_ = std::min(std::max(lost_us_, 0.0), most_lost_us);
    if (lost_us_ == 0) alone_us_ = 0;
    if (!late || lost_us_ < enough_lost_us) return;
    alone_us_ = std::min(std::max(2 * alone_us_, 16 * lost_us), longest_alone_us);
    until_us_ = now_us() + alone_us_;
  }

 private:
  // Waking a thread that sleeps takes tens of microseconds on an idle machine.
  static constexpr double shortest_us = 200;
  // Threads that have unequal shares of the work lose less; teams of a crowd lose most of their time.
  static constexpr double least_lost_share = 0.25;
  // A late team costs some 10 ms on a crowded machine, a time slice; on an idle one an interruption may, too. So one
  // counts as a part of that, and four of them without a gain in between are evidence.
  static constexpr double most_lost_by_one_us = 4e3;
  static constexpr double enough_lost_us = 14e3;
  // Gains of as much as this make a crowd be forgotten.
  static constexpr double most_lost_us = 20e3;
  static constexpr double longest_alone_us = 250e3;
  bool watches_ = false;
  int threads_ = 0;
  double lost_us_ = 0, alone_us_ = 0, until_us_ = 0;
};

thread_local Crowding crowding;
thread_local double waited_us = 0;  // by this thread at barriers, past their spinning

// Wherever a task runs, it runs here.
void run_task(void (*task)(void*, int), void* context, int thread) {
  const DenormalsAreZero denormals_are_zero;
  task(context, thread);
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
  for (int spins = 0; spins < spins_before_yield; ++spins) {
    if (generation_.load(std::memory_order_acquire) != generation) return;
    pause();
  }
  const double begin = now_us();
  while (generation_.load(std::memory_order_acquire) == generation) sched_yield();
  waited_us += now_us() - begin;
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

bool team_is_late() { return processors_override.load(std::memory_order_relaxed) == 0 && crowding.alone(); }

void judge_team(int threads, double wall_us, double own_us) { crowding.judge(threads, wall_us, own_us); }

void expect_teams_in_time() { crowding = Crowding(); }

bool run_team(int threads, void (*task)(void*, int), void* context) {
  if (threads == 1) {
    run_task(task, context, 0);
    return true;
  }
  bool complete = false;
  // Before the runtime's own barrier at the end of the region, which spins for milliseconds without giving its
  // processor to a thread that has none.
  Barrier finish;
  finish.reset(threads);
  const bool watches = crowding.watches();
  const double begin = now_us(), processor_begin = watches ? clock_us(CLOCK_THREAD_CPUTIME_ID) : 0;
  waited_us = 0;
  double finished = begin;
#pragma omp parallel num_threads(threads)
  {
    // Every thread sees the same number, so either all run the task or none does.
    if (omp_get_num_threads() == threads) {
      run_task(task, context, omp_get_thread_num());
      finish.wait();
      if (omp_get_thread_num() == 0) {
        complete = true;
        finished = now_us();
      }
    }
  }
  const double end = now_us(), wall = end - begin, waited = waited_us + end - finished;
  const double processor = watches ? clock_us(CLOCK_THREAD_CPUTIME_ID) - processor_begin : wall;
  if (complete) judge_team(threads, wall, std::max(0.0, std::min(wall, processor) - waited));
  return complete;
}

void* scratch_memory(size_t bytes) {
  if (bytes > scratch.bytes) {
    std::free(scratch.memory);
    scratch.bytes = 0;
    scratch.memory = large_memory(bytes);
    if (!scratch.memory) return nullptr;
    scratch.bytes = bytes;
  }
  return scratch.memory;
}

size_t scratch_held() { return scratch.bytes; }

}  // namespace fused_rnn
