// The fibres, their scheduler, and every function of device.h that concerns more than one thread.
//
// A fibre that calls such a function hands the scheduler an action and stops; the scheduler, on the program's own
// stack, runs the action, which leaves the fibre ready or waiting. So nothing in here ever runs beside anything else,
// and no action can be interrupted.
//
// ThreadSanitizer (FRNN_HOST_TSAN) is told that every fibre is a thread, that switching orders nothing, and what the
// barriers do order: what is released into a token (one for each phase of each barrier) before is seen by whoever
// acquires it. Shuffles and matrix products order nothing. This file is compiled without instrumentation.
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <set>
#include <tuple>
#include <unordered_map>

#include "cuda/device.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(FRNN_HOST_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read16(void* address);
void __tsan_write4(void* address);
void __tsan_write8(void* address);
void __tsan_write16(void* address);
}
#endif

namespace fused_rnn {
namespace cuda_host {
namespace {

// --- Stacks

constexpr size_t page = 4096;
constexpr size_t stack_bytes = 128 * 1024;

char* map_stack() {
  void* p = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Failure("no memory for the stacks of so many threads");
  mprotect(p, page, PROT_NONE);  // a kernel that needs more stops here
  return static_cast<char*>(p);
}

// What a fibre borrows. Kept from launch to launch, because making them is slow; not used twice in one launch under
// ThreadSanitizer, which would take the second fibre for the first.
struct Thread {
  char* stack = nullptr;
  void* tsan = nullptr;    // ThreadSanitizer's fibre
  void* copier = nullptr;  // another, for the stores that it sends
};
std::vector<Thread> free_threads;

Thread take_thread() {
  Thread thread;
  if (!free_threads.empty()) {
    thread = free_threads.back();
    free_threads.pop_back();
    return thread;
  }
  thread.stack = map_stack();
#if defined(FRNN_HOST_TSAN)
  thread.tsan = __tsan_create_fiber(0);
#endif
  return thread;
}

void fibre_main();

#if defined(__x86_64__)
using Context = void*;

// Keeps what a function must keep (System V ABI) on the old stack, and goes on where the new one stopped.
extern "C" void frnn_switch_stack(Context* from, Context to);
asm(R"(
.text
.type frnn_switch_stack, @function
frnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size frnn_switch_stack, .-frnn_switch_stack
)");

void switch_context(Context& from, Context& to) { frnn_switch_stack(&from, to); }

void prepare_context(Context& context, char* stack) {
  void** top = reinterpret_cast<void**>(stack + stack_bytes);
  *--top = nullptr;  // where fibre_main would return to; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&fibre_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare_context(Context& context, char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, fibre_main, 0);
}
#endif

// --- What a launch consists of

struct Block;
struct Warp;

struct Copy {
  char* to;
  const char* from;
  int group;
};

struct Fibre {
  Context context{};
  Thread borrowed;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;
  uint64_t priority = 0;
  // The last call into the engine.
  const char* function = "";
  const char* file = "";
  int line = 0;
  void (*run_action)(void* action, Fibre&) = nullptr;
  void* action = nullptr;
  bool waiting = false;
  bool queued = false;  // in `ready`; an action may wake its own fibre
  bool polling = false;
  bool started = false;
  bool done = false;
  std::vector<Copy> copies;  // not yet arrived
  int copy_group = 0;
  int cluster_arrivals = 0, cluster_waits = 0;
};

using Token = char*;

struct Barrier {
  int arrived = 0;
  int expected = 0;
  Token token = nullptr;
  const Fibre* first = nullptr;
  std::vector<Fibre*> waiting;
};

struct Warp {
  std::vector<Fibre*> lanes;
  std::vector<void*> arguments;
  int arrived = 0;
  const Fibre* first = nullptr;
};

constexpr uint64_t mbarrier_mark = 0x6d62617272696572;

struct MbarrierState {
  int count = 0;
  int pending = 0;
  int64_t expected_bytes = 0;
  uint64_t phase = 0;
  bool fenced = false;
  const Fibre* initialiser = nullptr;
  Token token = nullptr;
  Token ended[2] = {nullptr, nullptr};
  std::vector<std::pair<Fibre*, int>> waiting;  // and the parity
};

struct Cluster;

struct Block {
  int x = 0, y = 0, z = 0;
  int rank = 0;
  Cluster* cluster = nullptr;
  char* shared = nullptr;
  int live = 0;
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Warp> warps;
  Barrier barrier;
  std::map<int, Barrier> named;
  std::map<int, int> registers;  // that each warp has asked for, of a thread
  std::unordered_map<const void*, MbarrierState> mbarriers;

  bool holds(const void* p, size_t bytes) const;
};

// Phase n of a cluster's barrier ends when every live thread has arrived n + 1 times.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int live = 0;
  std::deque<std::pair<int, Token>> phases;  // arrivals (of threads still there), token
  int ended = 0;
  std::vector<Token> ended_tokens;
  std::vector<Fibre*> waiting;
};

struct Delivery {
  Fibre* sender;
  Block* block;
  char* to;
  void* barrier;
  uint32_t words[4];
  int bytes;
  Token token;
  const char* file;
  int line;
};

struct CounterWait {
  Fibre* fibre;
  const volatile uint32_t* counter;
  uint32_t target;
};

constexpr size_t max_shared_bytes = 227 * 1024;
constexpr size_t guard_bytes = 256;
constexpr unsigned char nan_byte = 0xff, guard_byte = 0xa5;

const char* base_name(const char* path) {
  const char* slash = __builtin_strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string place(const Fibre& f) {
  return std::string(f.function) + " (" + base_name(f.file) + ":" + std::to_string(f.line) + ")";
}

std::string thread_name(const Fibre& f) {
  const Block& b = *f.block;
  return "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + ") thread " +
         std::to_string(f.thread);
}

[[noreturn]] void fail(const Fibre& f, const std::string& what) {
  throw Failure(place(f) + ", " + thread_name(f) + ": " + what);
}

// --- ThreadSanitizer

#if defined(FRNN_HOST_TSAN)
constexpr unsigned no_sync = 1;
template <class F>
void as_thread(void* tsan, F f) {
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan, no_sync);
  f();
  __tsan_switch_to_fiber(self, no_sync);
}
void release(Fibre& f, Token token) {
  as_thread(f.borrowed.tsan, [&] { __tsan_release(token); });
}
void acquire(Fibre& f, Token token) {
  if (token) as_thread(f.borrowed.tsan, [&] { __tsan_acquire(token); });
}
#else
void release(Fibre&, Token) {}
void acquire(Fibre&, Token) {}
#endif

// Loops over volatile memory, because ThreadSanitizer would see calls of memcpy and memset as accesses of the
// scheduler's.
void fill(char* to, size_t bytes, unsigned char value) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = char(value);
}
void copy_words(void* to, const void* from, int bytes) {
  for (int i = 0; i < bytes / 4; ++i)
    static_cast<volatile uint32_t*>(to)[i] = static_cast<const volatile uint32_t*>(from)[i];
}

// --- Sites

std::map<std::pair<std::string, int>, std::string>& site_table() {
  static std::map<std::pair<std::string, int>, std::string> table;
  return table;
}

// Notes the site of a call that waits; true if it is the one to go past.
bool skipped(const Fibre& f) {
  static std::set<std::tuple<const char*, int, const char*>> seen;
  static const char* skip = getenv("FRNN_SKIP_SITE");
  if (seen.insert({f.file, f.line, f.function}).second) site_table().insert({{base_name(f.file), f.line}, f.function});
  if (!skip) return false;
  const std::string here = std::string(base_name(f.file)) + ":" + std::to_string(f.line);
  return here == skip;
}

// --- The scheduler

enum class Order { in_turn, last_first, random, favourites };
enum class Arrival { late, early, random };

class Engine {
 public:
  Engine(const Launch& l, const std::function<void()>& k)
      : shape(l),
        kernel(k),
        random(l.seed * 7919 + 1),
        order(Order(l.seed % 4)),
        arrival(Arrival((l.seed + l.seed / 4) % 3)) {}

  void run();
  Token new_token() {
    if (tokens.empty() || tokens_left == 0) {
      tokens.push_back(std::make_unique<uint64_t[]>(4096));
      tokens_left = 4096;
    }
    return reinterpret_cast<char*>(tokens.back().get() + --tokens_left);
  }
  void wake(Fibre& f) {
    f.waiting = false;
    make_ready(f);
  }
  void make_ready(Fibre& f);
  bool coin(int one_in) { return random() % one_in == 0; }

  void arrive(Barrier& b, Fibre& f);
  void wait(Barrier& b, Fibre& f) {
    f.waiting = true;
    b.waiting.push_back(&f);
  }
  void end_phase_if(Barrier& b, int expected);

  void meet_warp(Fibre& f, void* argument, void (*execute)(Warp&));

  Token& cluster_phase(Cluster& c, int phase);
  void end_cluster_phases(Cluster& c);

  Block& block_of(Fibre& f, const void* p, size_t bytes);
  MbarrierState& find_mbarrier(Fibre& f, const void* p, bool from_outside);
  void end_mbarrier_phase(MbarrierState& m);

  void send(const Delivery& d) {
    deliveries.push_back(d);
    if (arrival == Arrival::early) deliver(deliveries.size() - 1);
  }
  void copy_now(Fibre& f, const Copy& c);
  bool copies_late() const { return arrival == Arrival::late; }
  bool copies_early() const { return arrival == Arrival::early; }

  std::vector<CounterWait> counter_waits;
  bool check_counters();

  Fibre* current = nullptr;
  Context scheduler{};
  const Launch shape;
  const std::function<void()>& kernel;
  std::mt19937_64 random;
#if defined(FRNN_HOST_TSAN)
  void* scheduler_tsan = __tsan_get_current_fiber();
#endif

 private:
  void start_cluster();
  void finish(Fibre& f);
  void finish(Block& b);
  void resume(Fibre& f);
  void deliver(size_t index);
  [[noreturn]] void report_deadlock();

  const Order order;
  const Arrival arrival;
  std::vector<std::unique_ptr<Cluster>> running;
  int next_cluster = 0;
  int resident_limit = 1;
  using Entry = std::tuple<uint64_t, uint64_t, Fibre*>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> ready;
  uint64_t pushes = 0;
  std::deque<Fibre*> polling;
  int64_t idle_polls = 0;
  std::vector<Delivery> deliveries;
  std::vector<std::unique_ptr<char, void (*)(void*)>> buffers;
  std::vector<std::unique_ptr<uint64_t[]>> tokens;
  size_t tokens_left = 0;
  Token start_token = nullptr, end_token = nullptr;
  std::vector<Thread> used_threads;
};

Engine* engine = nullptr;

Fibre& current() { return *engine->current; }

void fibre_main() {
  engine->kernel();
  Fibre& f = current();
  f.function = "return";
  f.run_action = [](void*, Fibre& f) { f.done = true; };
#if defined(FRNN_HOST_TSAN)
  __tsan_switch_to_fiber(engine->scheduler_tsan, no_sync);
#endif
  switch_context(f.context, engine->scheduler);
  abort();  // a finished fibre is never resumed
}

// Called by a fibre: runs action(fibre) in the scheduler and returns when the fibre is chosen again.
template <class Action>
void in_scheduler(const char* function, const char* file, int line, Action action) {
  Fibre& f = current();
  f.function = function;
  f.file = file;
  f.line = line;
  f.action = &action;
  f.run_action = [](void* a, Fibre& f) { (*static_cast<Action*>(a))(f); };
#if defined(FRNN_HOST_TSAN)
  __tsan_switch_to_fiber(engine->scheduler_tsan, no_sync);
#endif
  switch_context(f.context, engine->scheduler);
}

void Engine::make_ready(Fibre& f) {
  f.queued = true;
  const uint64_t n = pushes++;
  switch (order) {
    case Order::in_turn: ready.push({n, 0, &f}); break;
    case Order::last_first: ready.push({~n, 0, &f}); break;
    case Order::random: ready.push({random(), 0, &f}); break;
    case Order::favourites: ready.push({f.priority, n, &f}); break;
  }
}

void Engine::resume(Fibre& f) {
  current = &f;
  f.queued = false;
  f.started = true;
#if defined(FRNN_HOST_TSAN)
  __tsan_switch_to_fiber(f.borrowed.tsan, no_sync);
#endif
  switch_context(scheduler, f.context);
  f.run_action(f.action, f);
  if (f.done)
    finish(f);
  else if (f.polling)
    polling.push_back(&f);
  else if (!f.waiting && !f.queued)
    make_ready(f);
}

void Engine::start_cluster() {
  const int clusters_x = shape.grid_x / shape.cluster;
  const int cx = next_cluster % clusters_x, y = next_cluster / clusters_x % shape.grid_y,
            z = next_cluster / clusters_x / shape.grid_y;
  ++next_cluster;
  auto cluster = std::make_unique<Cluster>();
  for (int rank = 0; rank < shape.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->x = cx * shape.cluster + rank;
    block->y = y;
    block->z = z;
    block->rank = rank;
    block->cluster = cluster.get();
    block->live = shape.threads;
    const size_t bytes = (shape.shared_bytes + guard_bytes + 1023) / 1024 * 1024;
    block->shared = static_cast<char*>(aligned_alloc(1024, bytes));
    buffers.emplace_back(block->shared, &free);
    fill(block->shared, shape.shared_bytes, nan_byte);
    fill(block->shared + shape.shared_bytes, bytes - shape.shared_bytes, guard_byte);
#if defined(FRNN_HOST_TSAN)
    __tsan_release(start_token);
#endif
    block->warps.resize((shape.threads + cuda::warp_size - 1) / cuda::warp_size);
    uint64_t priority = 0;
    for (int t = 0; t < shape.threads; ++t) {
      auto fibre = std::make_unique<Fibre>();
      if (t % cuda::warp_size == 0) priority = random();
      fibre->priority = priority;
      fibre->block = block.get();
      fibre->thread = t;
      fibre->warp = &block->warps[t / cuda::warp_size];
      fibre->warp->lanes.push_back(fibre.get());
      fibre->borrowed = take_thread();
      prepare_context(fibre->context, fibre->borrowed.stack);
      acquire(*fibre, start_token);
      make_ready(*fibre);
      block->fibres.push_back(std::move(fibre));
    }
    cluster->live += shape.threads;
    cluster->blocks.push_back(std::move(block));
  }
  running.push_back(std::move(cluster));
}

void Engine::finish(Fibre& f) {
  for (const Copy& c : f.copies) copy_now(f, c);
  f.copies.clear();
#if defined(FRNN_HOST_TSAN)
  release(f, end_token);
  used_threads.push_back(f.borrowed);
#else
  free_threads.push_back(f.borrowed);
#endif
  Block& block = *f.block;
  Cluster& cluster = *block.cluster;
  --block.live;
  --cluster.live;
  end_phase_if(block.barrier, block.live);
  // Its arrivals at phases that are still open are not awaited any more.
  for (int phase = cluster.ended; phase < f.cluster_arrivals; ++phase) --cluster.phases[phase - cluster.ended].first;
  end_cluster_phases(cluster);
  if (block.live == 0) finish(block);
  if (cluster.live == 0)
    running.erase(std::find_if(running.begin(), running.end(), [&](auto& c) { return c.get() == &cluster; }));
}

// No thread of the block is left: what it shared is gone, and whoever still looks sees NaN.
void Engine::finish(Block& block) {
  const Fibre& f = *block.fibres.back();
  for (size_t i = shape.shared_bytes; i < shape.shared_bytes + guard_bytes; ++i)
    if (uint8_t(block.shared[i]) != guard_byte) fail(f, "the block has written past its shared memory");
  // Of the registers that the launch gave the block, as many as there are in eights, warps can only hand on their own.
  const int warps = shape.threads / cuda::warp_size;
  int wanted = 0;
  for (const auto& [warp, count] : block.registers) wanted += count;
  if (int(block.registers.size()) == warps && wanted > warps * (65536 / shape.threads / 8 * 8))
    fail(f, "warps ask for more registers than the others gave up");
  for (const auto& [id, barrier] : block.named)
    if (barrier.arrived > 0) fail(f, "the block returned from half of named barrier " + std::to_string(id));
  for (const Delivery& d : deliveries)
    if (d.block == &block)
      fail(f, std::string("the block returned before a store_async (") + base_name(d.file) + ":" +
                  std::to_string(d.line) + ") to it arrived");
  fill(block.shared, shape.shared_bytes, nan_byte);
}

void Engine::run() {
  if (shape.threads < 1 || shape.threads > 1024) throw Failure("a block has 1 to 1024 threads");
  if (shape.cluster < 1 || shape.cluster > 16 || shape.grid_x % shape.cluster)
    throw Failure("a cluster has 1 to 16 blocks and divides the grid");
  if (shape.shared_bytes > max_shared_bytes) throw Failure("no block has so much shared memory");
  start_token = new_token();
  end_token = new_token();
  const int clusters = shape.grid_x / shape.cluster * shape.grid_y * shape.grid_z;
  resident_limit = shape.cooperative ? clusters : 1 + int(random() % 3);
  while (true) {
    while (next_cluster < clusters && int(running.size()) < resident_limit) start_cluster();
    if (!ready.empty()) {
      Fibre* f = std::get<2>(ready.top());
      ready.pop();
      if (!f->polling) idle_polls = 0;
      f->polling = false;
      resume(*f);
      if (arrival == Arrival::random && !deliveries.empty() && coin(4)) deliver(random() % deliveries.size());
    } else if (!deliveries.empty()) {
      deliver(random() % deliveries.size());
    } else if (check_counters()) {
    } else if (!polling.empty()) {
      if (++idle_polls > 10000) report_deadlock();
      for (Fibre* f : polling) make_ready(*f);
      polling.clear();
    } else if (running.empty()) {
      break;
    } else {
      report_deadlock();
    }
  }
#if defined(FRNN_HOST_TSAN)
  for (const Thread& thread : used_threads) {
    if (thread.copier) as_thread(thread.copier, [&] { __tsan_release(end_token); });
    free_threads.push_back(thread);
  }
  __tsan_acquire(end_token);
#endif
}

void Engine::report_deadlock() {
  std::map<std::string, std::pair<int, const Fibre*>> groups;
  for (auto& cluster : running)
    for (auto& block : cluster->blocks)
      for (auto& f : block->fibres)
        if (!f->done) {
          auto& group = groups[f->started ? place(*f) : "its start"];
          if (group.first++ == 0) group.second = f.get();
        }
  std::string text = "deadlock";
  for (auto& [where, group] : groups)
    text += "\n  " + std::to_string(group.first) + " threads wait in " + where + ", the first is " +
            thread_name(*group.second);
  throw Failure(text);
}

// --- Barriers of a block

void Engine::arrive(Barrier& b, Fibre& f) {
  if (!b.token) b.token = new_token();
  release(f, b.token);
  if (b.arrived++ == 0) b.first = &f;
}

void Engine::end_phase_if(Barrier& b, int expected) {
  if (b.arrived == 0 || b.arrived < expected) return;
  for (Fibre* f : b.waiting) {
    acquire(*f, b.token);
    wake(*f);
  }
  b.waiting.clear();
  b.arrived = 0;
  b.token = nullptr;
}

bool same_place(const Fibre& a, const Fibre& b) {
  return a.line == b.line && (a.file == b.file || std::string(a.file) == b.file) && a.function == b.function;
}

// The last lane to come executes for all.
void Engine::meet_warp(Fibre& f, void* argument, void (*execute)(Warp&)) {
  Warp& warp = *f.warp;
  const int lanes = cuda::warp_size;
  if (int(warp.lanes.size()) != lanes) fail(f, "the warp has only " + std::to_string(warp.lanes.size()) + " lanes");
  if (warp.arrived == 0) {
    warp.arguments.assign(lanes, nullptr);
    warp.first = &f;
  } else if (!same_place(f, *warp.first)) {
    fail(f, "lanes of one warp are at different places: lane " + std::to_string(warp.first->thread % lanes) +
                " is in " + place(*warp.first));
  }
  warp.arguments[f.thread % lanes] = argument;
  f.waiting = true;
  if (++warp.arrived < lanes) return;
  warp.arrived = 0;
  execute(warp);
  for (Fibre* lane : warp.lanes) wake(*lane);
}

// --- Clusters

Token& Engine::cluster_phase(Cluster& c, int phase) {
  while (int(c.phases.size()) <= phase - c.ended) c.phases.push_back({0, new_token()});
  return c.phases[phase - c.ended].second;
}

void Engine::end_cluster_phases(Cluster& c) {
  while (!c.phases.empty() && c.phases.front().first >= c.live) {
    c.ended_tokens.push_back(c.phases.front().second);
    c.phases.pop_front();
    ++c.ended;
    auto waits = std::move(c.waiting);
    c.waiting.clear();
    for (Fibre* f : waits) {
      if (f->cluster_waits <= c.ended) {
        acquire(*f, c.ended_tokens[f->cluster_waits - 1]);
        wake(*f);
      } else {
        c.waiting.push_back(f);
      }
    }
  }
}

// The block of this thread's cluster in whose shared memory p lies.
Block& Engine::block_of(Fibre& f, const void* p, size_t bytes) {
  for (auto& block : f.block->cluster->blocks) {
    if (!block->holds(p, bytes)) continue;
    if (block->live == 0) fail(f, "the other block has returned");
    if (std::none_of(block->fibres.begin(), block->fibres.end(), [](auto& other) { return other->started; }))
      fail(f, "the other block has not started");
    return *block;
  }
  fail(f, "the address is not in the cluster's shared memory");
}

bool Block::holds(const void* p, size_t bytes) const {
  const char* c = static_cast<const char*>(p);
  return c >= shared && c + bytes <= shared + engine->shape.shared_bytes;
}

// --- Asynchronous copies and stores

// For ThreadSanitizer the stores of one thread are made by another thread, which knows what the sender knew when it
// sent.
void Engine::deliver(size_t index) {
  const Delivery d = deliveries[index];
  deliveries[index] = deliveries.back();
  deliveries.pop_back();
  MbarrierState& m = d.block->mbarriers.at(d.barrier);
#if defined(FRNN_HOST_TSAN)
  void*& copier = d.sender->borrowed.copier;
  if (!copier) copier = __tsan_create_fiber(0);
  as_thread(copier, [&] {
    __tsan_acquire(d.token);
    if (d.bytes == 4) __tsan_write4(d.to);
    if (d.bytes == 8) __tsan_write8(d.to);
    if (d.bytes == 16) __tsan_write16(d.to);
    __tsan_release(m.token);
  });
#endif
  copy_words(d.to, d.words, d.bytes);
  m.expected_bytes -= d.bytes;
  end_mbarrier_phase(m);
}

void Engine::copy_now(Fibre& f, const Copy& c) {
#if defined(FRNN_HOST_TSAN)
  as_thread(f.borrowed.tsan, [&] {
    __tsan_read16(const_cast<char*>(c.from));
    __tsan_write16(c.to);
  });
#else
  (void)f;
#endif
  copy_words(c.to, c.from, 16);
}

bool Engine::check_counters() {
  auto waits = std::move(counter_waits);
  counter_waits.clear();
  for (const CounterWait& w : waits) {
    if (int32_t(*w.counter - w.target) >= 0)
      wake(*w.fibre);
    else
      counter_waits.push_back(w);
  }
  return counter_waits.size() < waits.size();
}

// --- Mbarriers

MbarrierState& Engine::find_mbarrier(Fibre& f, const void* p, bool from_outside) {
  Block& block = block_of(f, p, sizeof(cuda::Mbarrier));
  const auto found = block.mbarriers.find(p);
  if (found == block.mbarriers.end()) fail(f, "the mbarrier is not initialised");
  if (static_cast<const volatile cuda::Mbarrier*>(p)->state != mbarrier_mark)
    fail(f, "something else was written over the mbarrier");
  if (from_outside && !found->second.fenced) fail(f, "fence_mbarrier_init is missing after mbarrier_init");
  return found->second;
}

void Engine::end_mbarrier_phase(MbarrierState& m) {
  if (m.pending != 0 || m.expected_bytes != 0) return;
  const int parity = m.phase & 1;
  m.ended[parity] = m.token;
  ++m.phase;
  m.pending = m.count;
  m.token = new_token();
  auto waits = std::move(m.waiting);
  m.waiting.clear();
  for (auto& [f, wanted] : waits) {
    if (wanted == parity) {
      acquire(*f, m.ended[parity]);
      wake(*f);
    } else {
      m.waiting.push_back({f, wanted});
    }
  }
}

}  // namespace

void launch(const Launch& shape, const std::function<void()>& kernel) {
  Engine e(shape, kernel);
  engine = &e;
  try {
    e.run();
  } catch (...) {
    engine = nullptr;
    throw;
  }
  engine = nullptr;
}

std::vector<Site> sites() {
  std::vector<Site> all;
  for (const auto& [place, function] : site_table()) all.push_back({function, place.first, place.second});
  return all;
}

}  // namespace cuda_host

// --- The functions of device.h

namespace cuda {

using namespace cuda_host;

int thread_index() { return current().thread; }
int block_size() { return engine->shape.threads; }
int block_x() { return current().block->x; }
int block_y() { return current().block->y; }
int block_z() { return current().block->z; }
int grid_x() { return engine->shape.grid_x; }
int grid_y() { return engine->shape.grid_y; }
int grid_z() { return engine->shape.grid_z; }
int cluster_rank() { return current().block->rank; }
int cluster_size() { return engine->shape.cluster; }
char* shared_memory() { return current().block->shared; }

void sync_threads(const char* file, int line) {
  in_scheduler("sync_threads", file, line, [](Fibre& f) {
    if (skipped(f)) return;
    Block& block = *f.block;
    if (block.barrier.arrived > 0 && !same_place(f, *block.barrier.first))
      fail(f, "threads of one block are at different barriers: thread " + std::to_string(block.barrier.first->thread) +
                  " is in " + place(*block.barrier.first));
    engine->arrive(block.barrier, f);
    engine->wait(block.barrier, f);
    engine->end_phase_if(block.barrier, block.live);
  });
}

void sync_warp(const char* file, int line) {
  in_scheduler("sync_warp", file, line, [](Fibre& f) {
    if (skipped(f)) return;
    engine->meet_warp(f, nullptr, [](Warp& warp) {
      const Token token = engine->new_token();
      for (Fibre* lane : warp.lanes) release(*lane, token);
      for (Fibre* lane : warp.lanes) acquire(*lane, token);
    });
  });
}

static void arrive_named(Fibre& f, int id, int threads, bool wait) {
  if (id < 1 || id > 15) fail(f, "the id of a named barrier is 1 to 15, got " + std::to_string(id));
  if (threads < 1 || threads % warp_size != 0)
    fail(f, "a named barrier counts a multiple of 32 threads, got " + std::to_string(threads));
  Barrier& b = f.block->named[id];
  if (b.arrived > 0 && b.expected != threads)
    fail(f, "barrier " + std::to_string(id) + " expects " + std::to_string(b.expected) + " threads, got " +
                std::to_string(threads));
  b.expected = threads;
  engine->arrive(b, f);
  if (wait) engine->wait(b, f);
  engine->end_phase_if(b, threads);
}

void named_barrier(int id, int threads, const char* file, int line) {
  in_scheduler("named_barrier", file, line, [=](Fibre& f) { arrive_named(f, id, threads, !skipped(f)); });
}

void named_barrier_arrive(int id, int threads, const char* file, int line) {
  in_scheduler("named_barrier_arrive", file, line, [=](Fibre& f) { arrive_named(f, id, threads, false); });
}

namespace detail {
void set_registers(int count, const char* file, int line) {
  in_scheduler("set_registers", file, line, [=](Fibre& f) {
    if (count % 8 || count < 24 || count > 256) fail(f, "a thread has 24 to 256 registers, in eights");
    f.block->registers[f.thread / warp_size] = count;
  });
}
}  // namespace detail

bool any_in_warp(bool condition, const char* file, int line) {
  uint32_t value = condition;
  in_scheduler("any_in_warp", file, line, [&](Fibre& f) {
    engine->meet_warp(f, &value, [](Warp& warp) {
      uint32_t any = 0;
      for (void* v : warp.arguments) any |= *static_cast<uint32_t*>(v);
      for (void* v : warp.arguments) *static_cast<uint32_t*>(v) = any;
    });
  });
  return value != 0;
}

namespace detail {

struct ShuffleArgument {
  uint64_t word;
  int source;
  uint64_t result;
};

uint64_t shuffle_word(uint64_t word, int source_lane, const char* file, int line) {
  ShuffleArgument argument{word, source_lane, 0};
  in_scheduler("shuffle", file, line, [&](Fibre& f) {
    engine->meet_warp(f, &argument, [](Warp& warp) {
      for (void* v : warp.arguments) {
        auto& own = *static_cast<ShuffleArgument*>(v);
        own.result = static_cast<ShuffleArgument*>(warp.arguments[own.source])->word;
      }
    });
  });
  return argument.result;
}

static void check_place(bool good, const char* what, const char* function, const char* file, int line) {
  if (good) return;
  in_scheduler(function, file, line, [=](Fibre& f) { fail(f, what); });
}

static bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

void check_aligned(const void* p, size_t bytes, const char* function, const char* file, int line) {
  check_place(aligned(p, bytes), "the address is not aligned to its size", function, file, line);
}

void check_shared(const void* p, size_t bytes, const char* function, const char* file, int line) {
  check_aligned(p, bytes, function, file, line);
  check_place(current().block->holds(p, bytes), "the address is not in the block's shared memory", function, file,
              line);
}

void check_remote(const void* p, size_t bytes, const char* function, const char* file, int line) {
  check_aligned(p, bytes, function, file, line);
  in_scheduler(function, file, line, [=](Fibre& f) { engine->block_of(f, p, bytes); });
}

void* map_shared(const void* p, int rank, bool for_access, const char* file, int line) {
  char* mapped = nullptr;
  in_scheduler("map_shared", file, line, [&](Fibre& f) {
    if (rank < 0 || rank >= engine->shape.cluster) fail(f, "the cluster has no block of rank " + std::to_string(rank));
    if (!f.block->holds(p, 1)) fail(f, "the address is not in the block's shared memory");
    mapped = f.block->cluster->blocks[rank]->shared + (static_cast<const char*>(p) - f.block->shared);
    if (for_access) engine->block_of(f, mapped, 1);
  });
  return mapped;
}

// A lane's fragments, as device.h describes them.
struct ProductArgument {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

static float half_of(uint32_t packed, int part, bool bfloat16) {
  const uint16_t bits = uint16_t(packed >> (16 * part));
  return bfloat16 ? widen(BFloat16{bits}) : widen(Half{bits});
}

// Products are exact in double, and their sum is rounded once.
static void multiply_fragments(Warp& warp, int K, float (*a_value)(Warp&, int row, int k),
                               float (*b_value)(Warp&, int k, int column)) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      const auto& owner = *static_cast<ProductArgument*>(warp.arguments[row % 8 * 4 + column / 2]);
      float& d = owner.d[row / 8 * 2 + column % 2];
      double sum = d;
      for (int k = 0; k < K; ++k) sum += double(a_value(warp, row, k)) * double(b_value(warp, k, column));
      d = float(sum);
    }
  }
}

static const ProductArgument& product_argument(Warp& warp, int lane) {
  return *static_cast<ProductArgument*>(warp.arguments[lane]);
}

template <bool bfloat16>
static float a_half(Warp& warp, int row, int k) {
  const auto& argument = product_argument(warp, row % 8 * 4 + k % 8 / 2);
  return half_of(argument.a[row / 8 + k / 8 * 2], k % 2, bfloat16);
}
template <bool bfloat16>
static float b_half(Warp& warp, int k, int column) {
  const auto& argument = product_argument(warp, column * 4 + k % 8 / 2);
  return half_of(argument.b[k / 8], k % 2, bfloat16);
}

void multiply_add_bfloat16(float* d, const uint32_t* a, const uint32_t* b, const char* file, int line) {
  ProductArgument argument{d, a, b};
  in_scheduler("multiply_add", file, line, [&](Fibre& f) {
    engine->meet_warp(f, &argument, [](Warp& w) { multiply_fragments(w, 16, a_half<true>, b_half<true>); });
  });
}

void multiply_add_half(float* d, const uint32_t* a, const uint32_t* b, const char* file, int line) {
  ProductArgument argument{d, a, b};
  in_scheduler("multiply_add", file, line, [&](Fibre& f) {
    engine->meet_warp(f, &argument, [](Warp& w) { multiply_fragments(w, 16, a_half<false>, b_half<false>); });
  });
}

// The hardware ignores the 13 lowest bits.
static float tf32_value(uint32_t bits) {
  bits &= ~0x1fffu;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static float a_tf32(Warp& warp, int row, int k) {
  return tf32_value(product_argument(warp, row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]);
}
static float b_tf32(Warp& warp, int k, int column) {
  return tf32_value(product_argument(warp, column * 4 + k % 4).b[k / 4]);
}

struct MatricesArgument {
  const uint32_t* row;
  uint32_t* registers;
  bool transposed;
};

static uint32_t matrix_element(Warp& warp, int tile, int row, int column) {
  const auto& argument = *static_cast<MatricesArgument*>(warp.arguments[tile * 8 + row]);
  return argument.row[column / 2] >> (16 * (column % 2)) & 0xffffu;
}

void distribute_matrices(uint32_t* r, const uint32_t* row, bool transposed, const char* file, int line) {
  MatricesArgument argument{row, r, transposed};
  in_scheduler(transposed ? "load_matrices_transposed" : "load_matrices", file, line, [&](Fibre& f) {
    engine->meet_warp(f, &argument, [](Warp& warp) {
      for (int lane = 0; lane < warp_size; ++lane) {
        const auto& own = *static_cast<MatricesArgument*>(warp.arguments[lane]);
        for (int tile = 0; tile < 4; ++tile) {
          const int i = lane / 4, j = lane % 4 * 2;
          own.registers[tile] = own.transposed
                                    ? matrix_element(warp, tile, j, i) | matrix_element(warp, tile, j + 1, i) << 16
                                    : matrix_element(warp, tile, i, j) | matrix_element(warp, tile, i, j + 1) << 16;
        }
      }
    });
  });
}

void copy_async_wait(int pending, const char* file, int line) {
  in_scheduler("copy_async_wait", file, line, [=](Fibre& f) {
    if (skipped(f)) return;
    std::vector<Copy> left;
    for (const Copy& c : f.copies) {
      if (c.group < f.copy_group - pending)
        engine->copy_now(f, c);
      else
        left.push_back(c);
    }
    f.copies = std::move(left);
  });
}

void store_async(void* to, const uint32_t* words, int bytes, void* barrier, const char* file, int line) {
  check_aligned(to, bytes, "store_async", file, line);
  in_scheduler("store_async", file, line, [=](Fibre& f) {
    Block& block = engine->block_of(f, to, bytes);
    if (!block.holds(barrier, sizeof(Mbarrier))) fail(f, "the mbarrier is in another block than the destination");
    engine->find_mbarrier(f, barrier, true);
    Delivery d{&f, &block, static_cast<char*>(to), barrier, {}, bytes, engine->new_token(), file, line};
    copy_words(d.words, words, bytes);
    release(f, d.token);
    engine->send(d);
  });
}

void let_others_run(const char* file, int line) {
  in_scheduler("load_acquire", file, line, [](Fibre& f) { f.polling = true; });
}

void counter_changed(const char* file, int line) {
  in_scheduler("a release to global memory", file, line, [](Fibre&) { engine->check_counters(); });
}

bool wait_for_counter(const uint32_t* counter, uint32_t target, const char* file, int line) {
  bool skip = false;
  in_scheduler("wait_until_at_least", file, line, [&](Fibre& f) {
    if ((skip = skipped(f))) return;
    f.waiting = true;
    engine->counter_waits.push_back({&f, counter, target});
    engine->check_counters();
  });
  return !skip;
}

}  // namespace detail

void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line) {
  detail::ProductArgument argument{d, a, b};
  in_scheduler("multiply_add_tf32", file, line, [&](Fibre& f) {
    engine->meet_warp(f, &argument, [](Warp& w) { detail::multiply_fragments(w, 8, detail::a_tf32, detail::b_tf32); });
  });
}

void copy_async_16(void* shared, const void* global, const char* file, int line) {
  detail::check_shared(shared, 16, "copy_async_16", file, line);
  detail::check_aligned(global, 16, "copy_async_16", file, line);
  in_scheduler("copy_async_16", file, line, [=](Fibre& f) {
    const Copy c{static_cast<char*>(shared), static_cast<const char*>(global), f.copy_group};
    if (engine->copies_early() || (!engine->copies_late() && engine->coin(2)))
      engine->copy_now(f, c);
    else
      f.copies.push_back(c);
  });
}

void copy_async_commit() { ++current().copy_group; }

// Both halves are instructions of a whole warp.
void cluster_arrive(const char* file, int line) {
  in_scheduler("cluster_arrive", file, line, [](Fibre& f) {
    if (f.cluster_arrivals != f.cluster_waits) fail(f, "a second arrival without a wait in between");
    Cluster& cluster = *f.block->cluster;
    const int phase = f.cluster_arrivals++;
    release(f, engine->cluster_phase(cluster, phase));
    ++cluster.phases[phase - cluster.ended].first;
    engine->meet_warp(f, nullptr, [](Warp&) {});
    engine->end_cluster_phases(cluster);
  });
}

// By its own name: what is taken out by FRNN_SKIP_SITE and should be missed are waits.
static void wait_for_cluster(const char* function, bool may_be_skipped, const char* file, int line) {
  in_scheduler(function, file, line, [=](Fibre& f) {
    if (f.cluster_arrivals == f.cluster_waits) fail(f, "a wait without an arrival");
    Cluster& cluster = *f.block->cluster;
    const int phase = f.cluster_waits++;
    if (may_be_skipped && skipped(f)) return;
    if (cluster.ended > phase) {
      acquire(f, cluster.ended_tokens[phase]);
      return;
    }
    f.waiting = true;
    cluster.waiting.push_back(&f);
  });
}
void cluster_wait(const char* file, int line) { wait_for_cluster("cluster_wait", true, file, line); }
void cluster_keep_up(const char* file, int line) { wait_for_cluster("cluster_keep_up", false, file, line); }

void mbarrier_init(Mbarrier* barrier, int count, const char* file, int line) {
  detail::check_shared(barrier, sizeof(Mbarrier), "mbarrier_init", file, line);
  in_scheduler("mbarrier_init", file, line, [=](Fibre& f) {
    if (count < 1) fail(f, "expected at least one arrival, got " + std::to_string(count));
    MbarrierState& m = f.block->mbarriers[barrier] = {};
    m.count = m.pending = count;
    m.initialiser = &f;
    m.token = engine->new_token();
    static_cast<volatile Mbarrier*>(barrier)->state = mbarrier_mark;
  });
}

void fence_mbarrier_init(const char* file, int line) {
  in_scheduler("fence_mbarrier_init", file, line, [](Fibre& f) {
    for (auto& [address, m] : f.block->mbarriers)
      if (m.initialiser == &f) m.fenced = true;
  });
}

static void arrive_at_mbarrier(Fibre& f, void* barrier, bool from_outside, int bytes) {
  MbarrierState& m = engine->find_mbarrier(f, barrier, from_outside);
  if (m.pending == 0) fail(f, "more arrivals than the mbarrier counts");
  release(f, m.token);
  m.expected_bytes += bytes;
  --m.pending;
  engine->end_mbarrier_phase(m);
}

void mbarrier_arrive(Mbarrier* barrier, const char* file, int line) {
  in_scheduler("mbarrier_arrive", file, line, [=](Fibre& f) { arrive_at_mbarrier(f, barrier, false, 0); });
}
void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, const char* file, int line) {
  in_scheduler("mbarrier_arrive_expect", file, line, [=](Fibre& f) { arrive_at_mbarrier(f, barrier, false, bytes); });
}
void mbarrier_arrive_remote(RemoteAddress barrier, const char* file, int line) {
  in_scheduler("mbarrier_arrive_remote", file, line,
               [=](Fibre& f) { arrive_at_mbarrier(f, barrier.address, true, 0); });
}

void mbarrier_wait(Mbarrier* barrier, int parity, int, const char* file, int line) {
  detail::check_shared(barrier, sizeof(Mbarrier), "mbarrier_wait", file, line);
  in_scheduler("mbarrier_wait", file, line, [=](Fibre& f) {
    if (parity != 0 && parity != 1) fail(f, "expected parity 0 or 1, got " + std::to_string(parity));
    MbarrierState& m = engine->find_mbarrier(f, barrier, false);
    if (skipped(f)) return;
    if (int(m.phase & 1) != parity) {
      acquire(f, m.ended[parity]);
      return;
    }
    f.waiting = true;
    m.waiting.push_back({&f, parity});
  });
}

// Says no now and then, as hardware may at any time; otherwise waits.
bool mbarrier_try_wait(Mbarrier* barrier, int parity, const char* file, int line) {
  if (engine->coin(3)) {
    detail::let_others_run(file, line);
    return false;
  }
  mbarrier_wait(barrier, parity, -1, file, line);
  return true;
}

}  // namespace cuda
}  // namespace fused_rnn
