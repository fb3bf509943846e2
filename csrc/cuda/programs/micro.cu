// What the design and the planner assume of a GPU, measured: a program of its own, which needs nvcc and a driver alone.
//
//   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -Icsrc -arch=sm_90a csrc/cuda/programs/micro.cu -o micro
//   ./micro                what can be measured, a name a line
//   ./micro multiply       measures it, and prints one line of JSON: names and numbers, cycles if nothing else is said
//
// One measurement a process: one that faults or hangs costs itself (tools/gpu_micro.py runs them all). They call the
// functions of device.h that the kernels call. What a loop measures is one instruction again and again, and all that it
// computes is stored, so nothing of it can be left out. Times are those of one thread's clock, the least of several
// runs.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "../device.h"

using namespace fused_rnn;
using namespace fused_rnn::cuda;

namespace {

using Values = std::vector<std::pair<std::string, double>>;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fflush(stdout);
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  exit(3);
}
#define CHECK(call) check(call, #call)

int attribute(cudaDeviceAttr which) {
  int value = 0;
  CHECK(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

constexpr int kept = 64;  // what threads leave behind, so that it has to be computed

// Cycles in cycles[0], and what else the kernel tells; in memory that host and device see.
struct Results {
  long long* cycles = nullptr;
  uint32_t* sink = nullptr;
  Results() {
    CHECK(cudaMallocHost(&cycles, kept * sizeof *cycles));
    CHECK(cudaMalloc(&sink, 1 << 20));
    CHECK(cudaMemset(sink, 0, 1 << 20));
  }
};

struct Launch {
  int blocks = 1, threads = 32, cluster = 1;
  size_t shared = 0;
  bool cooperative = false;
};

// Runs the kernel several times; the least of what it wrote to cycles[0], over so many rounds.
template <class... Parameters, class... Arguments>
double least(const Launch& how, void (*kernel)(Parameters...), Results& results, double rounds,
             Arguments... arguments) {
  if (how.shared > 0) CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared)));
  if (how.cluster > 8) CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute extra = {};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = unsigned(how.blocks);
  launch.blockDim = unsigned(how.threads);
  launch.dynamicSmemBytes = how.shared;
  launch.attrs = &extra;
  if (how.cluster > 1) {
    extra.id = cudaLaunchAttributeClusterDimension;
    extra.val.clusterDim.x = unsigned(how.cluster);
    extra.val.clusterDim.y = extra.val.clusterDim.z = 1;
    launch.numAttrs = 1;
  } else if (how.cooperative) {
    extra.id = cudaLaunchAttributeCooperative;
    extra.val.cooperative = 1;
    launch.numAttrs = 1;
  }
  double found = 0;
  for (int i = 0; i < 5; ++i) {
    results.cycles[0] = -1;
    CHECK(cudaMemset(results.sink, 0, 4096));
    CHECK(cudaLaunchKernelEx(&launch, kernel, results, arguments...));
    CHECK(cudaDeviceSynchronize());
    const double now = double(results.cycles[0]) / rounds;
    if (i == 0 || now < found) found = now;
  }
  return found;
}

// Clocks and launches

__global__ void spin(Results results, long long cycles) {
  unsigned long long began_ns, ended_ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(began_ns));
  const long long began = clock64();
  while (clock64() - began < cycles) {
  }
  const long long ended = clock64();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ended_ns));
  results.cycles[1] = (long long)(ended_ns - began_ns);
  results.cycles[0] = ended - began;
}

Values clock_of_sm() {
  Results results;
  const long long cycles = 100000000;  // some 50 ms, beside which the ticks of globaltimer are nothing
  const double spent = least({}, spin, results, 1, cycles);
  int told = 0;
  if (cudaDeviceGetAttribute(&told, cudaDevAttrClockRate, 0) != cudaSuccess) cudaGetLastError();
  return {{"mhz", spent / double(results.cycles[1]) * 1e3}, {"mhz_told", told / 1e3}};
}

__global__ void nothing() {}

double milliseconds(cudaStream_t stream, cudaGraphExec_t graph, int count) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaEventRecord(begin, stream));
  for (int i = 0; i < count; ++i) {
    if (graph) {
      CHECK(cudaGraphLaunch(graph, stream));
    } else {
      nothing<<<1, 32, 0, stream>>>();
    }
  }
  CHECK(cudaEventRecord(end, stream));
  CHECK(cudaEventSynchronize(end));
  float found = 0;
  CHECK(cudaEventElapsedTime(&found, begin, end));
  return found;
}

// Microseconds from one launch to the next.
Values launches() {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  const int many = 200, inside = 100;
  // The least of many: compilers may be at work beside it.
  double plain = 1e9;
  for (int i = 0; i < 30; ++i) plain = std::min(plain, milliseconds(stream, nullptr, many) * 1e3 / many);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < inside; ++i) nothing<<<1, 32, 0, stream>>>();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  double replayed = 1e9;
  for (int i = 0; i < 10; ++i)
    replayed = std::min(replayed, milliseconds(stream, executable, 10) * 1e3 / (10 * inside));
  return {{"stream_us", plain}, {"graph_us", replayed}};
}

// Clusters

__global__ void __launch_bounds__(256, 1) occupant(Results results) {
  results.cycles[0] = reinterpret_cast<long long*>(shared_memory())[thread_index()];
}

bool takes(cudaFuncAttribute which, int value) {
  if (cudaFuncSetAttribute(occupant, which, value) == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

// Clusters of this size that are resident together when each block takes so much shared memory; -1: refused.
int resident(int size, int shared) {
  cudaLaunchAttribute extra = {};
  extra.id = cudaLaunchAttributeClusterDimension;
  extra.val.clusterDim.x = unsigned(size);
  extra.val.clusterDim.y = extra.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = unsigned(size);
  launch.blockDim = 256;
  launch.dynamicSmemBytes = size_t(shared);
  launch.attrs = &extra;
  launch.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, occupant, &launch) == cudaSuccess) return clusters;
  cudaGetLastError();
  return -1;
}

int largest_cluster() {
  takes(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int size = 16;
  while (size > 1 && resident(size, 0) < 1) size /= 2;
  return size;
}

// With all shared memory of an SM for each block, and whether the device takes what such a kernel asks for.
Values resident_clusters() {
  const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  Values values = {{"shared_bytes", double(shared)},
                   {"sms", double(attribute(cudaDevAttrMultiProcessorCount))},
                   {"takes_shared_bytes", takes(cudaFuncAttributeMaxDynamicSharedMemorySize, shared) ? 1.0 : 0.0},
                   {"takes_size_16", takes(cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ? 1.0 : 0.0}};
  for (int size = 1; size <= 16; size *= 2)
    values.push_back({"size_" + std::to_string(size), double(resident(size, shared))});
  return values;
}

#if defined(FRNN_CUDA_CLUSTERS)
FRNN_DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
#endif

template <bool relaxed>
__global__ void cluster_barriers(Results results, int rounds) {
#if defined(FRNN_CUDA_CLUSTERS)
  const auto round = [] {
    if (relaxed) {
      cluster_arrive_relaxed();
    } else {
      cluster_arrive();
    }
    cluster_wait();
  };
  round();
  const long long began = clock64();
  for (int r = 0; r < rounds; ++r) round();
  if (block_x() == 0 && thread_index() == 0) results.cycles[0] = clock64() - began;
#endif
}

Values cluster_barrier() {
  Results results;
  const int rounds = 2000;
  Values values;
  const int largest = largest_cluster();
  for (int size = 2; size <= largest; size *= 2) {
    const Launch how{size, 256, size};
    values.push_back({"release_" + std::to_string(size), least(how, cluster_barriers<false>, results, rounds, rounds)});
    values.push_back({"relaxed_" + std::to_string(size), least(how, cluster_barriers<true>, results, rounds, rounds)});
  }
  return values;
}

// Asynchronous stores

struct Mailbox {
  Mbarrier barrier;
  uint4 letter;
};

// Block 0 sends a word to block `to`, which sends it back; to itself it is one way. Wrong words are counted.
__global__ void async_letters(Results results, int rounds, int to) {
#if defined(FRNN_CUDA_CLUSTERS)
  Mailbox* const own = reinterpret_cast<Mailbox*>(shared_memory());
  const int rank = cluster_rank();
  const int bytes = int(sizeof own->letter);
  if (thread_index() == 0) {
    mbarrier_init(&own->barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(&own->barrier, bytes);
  }
  sync_warp();
  cluster_arrive();
  cluster_wait();
  if (thread_index() == 0 && (rank == 0 || rank == to)) {
    const int peer = rank == 0 ? to : 0;
    const RemoteAddress letter = remote_address(&own->letter, peer), barrier = remote_address(&own->barrier, peer);
    uint32_t wrong = 0;
    const auto receive = [&](int r) {
      mbarrier_wait(&own->barrier, r & 1, r);
      // As a volatile: the compiler does not know who writes it.
      wrong += reinterpret_cast<volatile uint4*>(&own->letter)->x != uint32_t(r + 1);
      mbarrier_arrive_expect(&own->barrier, bytes);
    };
    const long long began = clock64();
    for (int r = 0; r < rounds; ++r) {
      if (rank != 0) receive(r);
      store_async(letter, uint4{uint32_t(r + 1), 0, 0, 0}, barrier);
      if (rank == 0) receive(r);
    }
    if (rank == 0) results.cycles[0] = clock64() - began;
    results.cycles[1 + (rank != 0)] = wrong;
  }
  sync_warp();
  cluster_arrive();
  cluster_wait();
#endif
}

Values letters(int size, int to) {
  Results results;
  const int rounds = 2000;
  results.cycles[1] = results.cycles[2] = 0;
  const double cycles = least({size, 32, size, sizeof(Mailbox)}, async_letters, results, rounds, rounds, to);
  return {{to == 0 ? "one_way" : "round_trip", cycles}, {"wrong", double(results.cycles[1] + results.cycles[2])}};
}

// As a step does it: every block sends each block `words` words and waits for theirs. T is what one store carries.
template <class T>
__global__ void __launch_bounds__(256) async_exchange(Results results, int rounds, int words) {
#if defined(FRNN_CUDA_CLUSTERS)
  Mbarrier* const barriers = reinterpret_cast<Mbarrier*>(shared_memory());
  T* const received = reinterpret_cast<T*>(shared_memory() + 128);
  const int rank = cluster_rank(), blocks = cluster_size();
  const int bytes = blocks * words * int(sizeof(T)), shift = 31 - __clz(blocks);  // a power of two
  if (thread_index() == 0) {
    for (int p = 0; p < 2; ++p) mbarrier_init(&barriers[p], 1);
    fence_mbarrier_init();
    for (int p = 0; p < 2; ++p) mbarrier_arrive_expect(&barriers[p], bytes);
  }
  sync_threads();
  cluster_arrive();
  cluster_wait();
  const long long began = clock64();
  T value = {};
  for (int r = 0; r < rounds; ++r) {
    const int p = r & 1;
    for (int i = thread_index(); i < blocks * words; i += block_size()) {
      const int to = i & (blocks - 1), word = i >> shift;
      store_async(remote_address(&received[(p * blocks + rank) * words + word], to), value,
                  remote_address(&barriers[p], to));
    }
    mbarrier_wait(&barriers[p], r >> 1 & 1, r);
    if (thread_index() == 0) mbarrier_arrive_expect(&barriers[p], bytes);
    sync_threads();
  }
  if (block_x() == 0 && thread_index() == 0) results.cycles[0] = clock64() - began;
  cluster_arrive();
  cluster_wait();
#endif
}

template <class T>
double exchange_cycles(Results& results, int size, int words) {
  const int rounds = 1000;
  return least({size, 256, size, 128 + 2 * size_t(size) * words * sizeof(T)}, async_exchange<T>, results, rounds,
               rounds, words);
}

Values exchange() {
  Results results;
  Values values;
  const int largest = largest_cluster();
  for (int size = 2; size <= largest; size *= 2)
    values.push_back({"step_" + std::to_string(size), exchange_cycles<uint4>(results, size, 1)});
  // At the anchor a block of 16 gets 3 KiB a step forward, 12 such words of each; backward 6 KiB, 48 words of 8 bytes.
  const double few = exchange_cycles<uint4>(results, largest, 12), many = exchange_cycles<uint4>(results, largest, 60);
  const double few8 = exchange_cycles<uint2>(results, largest, 48);
  const double many8 = exchange_cycles<uint2>(results, largest, 144);
  values.push_back({"blocks", double(largest)});
  values.push_back({"forward_step", few});
  values.push_back({"backward_step", few8});
  values.push_back({"bytes_per_cycle", largest * 48 * 16 / std::max(many - few, 1e-3)});
  values.push_back({"bytes_per_cycle_of_8", largest * 96 * 8 / std::max(many8 - few8, 1e-3)});
  return values;
}

// Matrix products

template <int sums, bool tf32>
__global__ void __launch_bounds__(512) products(Results results, int rounds, uint32_t a0, uint32_t b0) {
  float d[sums][4] = {};
  const uint32_t a[4] = {a0, a0 + 1, a0, a0}, b[2] = {b0, b0};
  sync_threads();
  const long long began = clock64();
  for (int r = 0; r < rounds; ++r) {
    FRNN_UNROLL
    for (int repeat = 0; repeat < 32 / sums; ++repeat) {
      FRNN_UNROLL
      for (int j = 0; j < sums; ++j) {
        if (tf32) {
          multiply_add_tf32(d[j], a, b);
        } else {
          multiply_add<BFloat16>(d[j], a, b);
        }
      }
    }
  }
  sync_threads();
  if (thread_index() == 0) results.cycles[0] = clock64() - began;
  float sum = 0;
  for (int j = 0; j < sums; ++j) sum += d[j][0] + d[j][1] + d[j][2] + d[j][3];
  results.sink[1024 + thread_index()] = __float_as_uint(sum);
}

template <int sums, bool tf32>
double product_cycles(Results& results, int warps) {
  const int rounds = 500;
  // 1/1024 in both halves, and in TF32 nearly the same: sums stay finite.
  const double cycles = least({1, 32 * warps}, products<sums, tf32>, results, rounds * 32.0, rounds,
                              uint32_t(0x3a803a80), uint32_t(0x3a803a80));
  return cycles / std::max(1, warps / 4);  // of one scheduler, of which there are four
}

Values multiply() {
  Results results;
  return {{"latency", product_cycles<1, false>(results, 1)},
          {"interval_of_one_warp", product_cycles<8, false>(results, 1)},
          {"interval_of_4_sums", product_cycles<4, false>(results, 1)},
          {"interval", product_cycles<8, false>(results, 8)},
          {"interval_of_4_warps", product_cycles<8, false>(results, 16)},
          {"tf32_latency", product_cycles<1, true>(results, 1)},
          {"tf32_interval", product_cycles<8, true>(results, 8)}};
}

// Shared memory

enum class Lanes { all, eight, guarded, repeated, one };

// 16 loads of 16 bytes by a warp, as tile.cuh loads operands: lane / 4 is the column, lane % 4 the chunk.
template <Lanes which>
__global__ void __launch_bounds__(256) shared_loads(Results results, int rounds, int columns) {
  uint4* const memory = reinterpret_cast<uint4*>(shared_memory());
  for (int i = thread_index(); i < 1024; i += block_size()) memory[i] = uint4{};
  sync_threads();
  const int lane = lane_index(), column = lane / 4;
  int at = lane;
  if (which == Lanes::repeated) at = std::min(column, columns - 1) * 4 + lane % 4;
  if (which == Lanes::one) at = 0;
  const bool loads = (which != Lanes::eight || lane < 8) && (which != Lanes::guarded || column < columns);
  const uint32_t from = uint32_t(__cvta_generic_to_shared(memory + at + warp_index() * 32));
  uint32_t sum = 0;
  const long long began = clock64();
  for (int r = 0; r < rounds; ++r) {
    if (loads) {
      uint4 v[16];
      FRNN_UNROLL
      for (int i = 0; i < 16; ++i)
        asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[i].x), "=r"(v[i].y), "=r"(v[i].z), "=r"(v[i].w)
                     : "r"(from + 512 * (i % 8)));
      FRNN_UNROLL
      for (int i = 0; i < 16; ++i) sum += v[i].x ^ v[i].w;
    }
  }
  sync_threads();
  if (thread_index() == 0) results.cycles[0] = clock64() - began;
  results.sink[1024 + thread_index()] = sum;
}

template <Lanes which>
double load_cycles(Results& results) {
  const int rounds = 500, warps = 8;
  return least({1, 32 * warps, 1, 1024 * 16}, shared_loads<which>, results, rounds * 16.0 * warps, rounds, 2);
}

__global__ void shared_chain(Results results, int rounds) {
  uint32_t* const memory = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t base = uint32_t(__cvta_generic_to_shared(memory));
  memory[thread_index()] = base + 4 * uint32_t((thread_index() + 1) % 32);
  sync_threads();
  uint32_t at = base;
  const long long began = clock64();
  for (int r = 0; r < rounds; ++r) asm volatile("ld.volatile.shared.u32 %0, [%0];" : "+r"(at));
  if (thread_index() == 0) results.cycles[0] = clock64() - began;
  results.sink[1024 + thread_index()] = at;
}

// Cycles of the SM for one load of a warp: 4 of 128 bytes each where all lanes have their own 16 bytes.
Values shared_memory_passes() {
  Results results;
  const double all = load_cycles<Lanes::all>(results);
  return {{"all_lanes", all},
          {"eight_lanes", load_cycles<Lanes::eight>(results)},
          {"two_columns_guarded", load_cycles<Lanes::guarded>(results)},
          {"two_columns_repeated", load_cycles<Lanes::repeated>(results)},
          {"one_address", load_cycles<Lanes::one>(results)},
          {"bytes_per_cycle", 512 / all},
          {"latency", least({1, 32, 1, 128}, shared_chain, results, 2000, 2000)}};
}

// What stands between the products and the send

enum class Chain { exp, reciprocal, shuffle, barrier };

template <Chain which>
__global__ void __launch_bounds__(512) chains(Results results, int rounds, float x) {
  sync_threads();
  const long long began = clock64();
  _Pragma("unroll 20") for (int r = 0; r < rounds; ++r) {
    if (which == Chain::exp) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    if (which == Chain::reciprocal) asm volatile("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    if (which == Chain::shuffle) x = shuffle_xor(x, 1);
    if (which == Chain::barrier) sync_threads();
  }
  if (thread_index() == 0) results.cycles[0] = clock64() - began;
  results.sink[1024 + thread_index()] = __float_as_uint(x);
}

Values latencies() {
  Results results;
  const int rounds = 2000;
  return {{"exp2", least({}, chains<Chain::exp>, results, rounds, rounds, 0.5f)},
          {"reciprocal", least({}, chains<Chain::reciprocal>, results, rounds, rounds, 0.5f)},
          {"shuffle", least({}, chains<Chain::shuffle>, results, rounds, rounds, 0.5f)},
          {"barrier_of_256", least({1, 256}, chains<Chain::barrier>, results, rounds, rounds, 0.5f)},
          {"barrier_of_384", least({1, 384}, chains<Chain::barrier>, results, rounds, rounds, 0.5f)}};
}

// Through L2

// As Exchange::memory has it.
__global__ void grid_barriers(Results results, int rounds) {
  const long long began = clock64();
  for (int r = 1; r <= rounds; ++r) {
    sync_threads();
    if (thread_index() == 0) {
      add_release(results.sink, 1);
      wait_until_at_least(results.sink, uint32_t(r) * uint32_t(grid_x()), r);
    }
    sync_threads();
  }
  if (block_x() == 0 && thread_index() == 0) results.cycles[0] = clock64() - began;
}

FRNN_DEVICE void store_word(uint64_t* to, uint64_t word) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}
FRNN_DEVICE uint64_t load_word(const uint64_t* from) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}
// Until the upper half, the step, is there: data and flag in one word need no fence.
FRNN_DEVICE uint32_t wait_for_word(const uint64_t* from, uint32_t step) {
  const long long began = clock64();
  uint64_t word;
  while (uint32_t((word = load_word(from)) >> 32) != step)
    if (clock64() - began > 2000000000) __trap();
  return uint32_t(word);
}

// Every block writes a word for each step and reads those of all.
__global__ void flagged_words(Results results, int rounds) {
  uint64_t* const words = reinterpret_cast<uint64_t*>(results.sink);
  const int readers = grid_x();
  uint32_t sum = 0;
  sync_threads();
  const long long began = clock64();
  for (int r = 1; r <= rounds; ++r) {
    uint64_t* const of_step = words + (r & 1) * 256;
    if (thread_index() == 0) store_word(of_step + block_x(), uint64_t(r) << 32 | uint32_t(r));
    if (thread_index() < readers) sum += wait_for_word(of_step + thread_index(), uint32_t(r));
    sync_threads();
  }
  if (block_x() == 0 && thread_index() == 0) results.cycles[0] = clock64() - began;
  results.sink[2048 + thread_index()] = sum;
}

Values grid() {
  Results results;
  const int sms = std::min(attribute(cudaDevAttrMultiProcessorCount), 256), rounds = 1000;
  Values values;
  for (int blocks : {16, 32, sms}) {
    const Launch how{blocks, 256, 1, 0, true};
    const std::string name = blocks == sms ? "all" : std::to_string(blocks);
    values.push_back({"counter_" + name, least(how, grid_barriers, results, rounds, rounds)});
    values.push_back({"flagged_" + name, least(how, flagged_words, results, rounds, rounds)});
  }
  return values;
}

__global__ void l2_chain(Results results, int rounds) {
  // Each word has the index of the next, 128 bytes on; all of it fits any L2.
  uint32_t* const words = results.sink + 1024;
  for (int i = 0; i < 1024; ++i) store_l2(words + 32 * i, uint32_t(32 * ((i + 1) % 1024)));
  uint32_t at = load_l2(words);
  const long long began = clock64();
  for (int r = 0; r < rounds; ++r) at = load_l2(words + at);
  results.cycles[0] = clock64() - began;
  results.sink[512] = at;
}

// 16-byte copies of the same 128 KiB into shared memory, by all SMs or by one.
__global__ void __launch_bounds__(256) l2_copies(Results results, int rounds) {
  char* const to = shared_memory();
  const char* const from = reinterpret_cast<const char*>(results.sink) + 4096;
  const long long began = clock64();
  for (int r = 0; r < rounds; ++r) {
    for (int64_t i = int64_t(thread_index()) * 16; i < 128 << 10; i += int64_t(block_size()) * 16)
      copy_async_16(to + i % (32 << 10), from + i);
    copy_async_commit();
    copy_async_wait<0>();
    sync_threads();
  }
  if (block_x() == 0 && thread_index() == 0) results.cycles[0] = clock64() - began;
}

Values through_l2() {
  Results results;
  const int sms = attribute(cudaDevAttrMultiProcessorCount), rounds = 50;
  const double bytes = double(128 << 10);
  return {
      {"latency", least({}, l2_chain, results, 4000, 4000)},
      {"bytes_per_cycle_of_one", bytes / least({1, 256, 1, 32 << 10}, l2_copies, results, rounds, rounds)},
      {"bytes_per_cycle_of_all", bytes / least({sms, 256, 1, 32 << 10}, l2_copies, results, rounds, rounds)},
  };
}

struct Measurement {
  const char* name;
  bool clusters;  // needs them
  Values (*run)();
};

// What decides most comes first.
const Measurement measurements[] = {
    {"clusters", true, resident_clusters},
    {"async_to_self", true, [] { return letters(2, 0); }},
    {"async_to_peer", true, [] { return letters(2, 1); }},
    {"async_to_16", true, [] { return letters(16, 15); }},
    {"exchange", true, exchange},
    {"multiply", false, multiply},
    {"shared", false, shared_memory_passes},
    {"cluster_barrier", true, cluster_barrier},
    {"grid", false, grid},
    {"latencies", false, latencies},
    {"l2", false, through_l2},
    {"launch", false, launches},
    {"clock", false, clock_of_sm},
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    for (const Measurement& one : measurements) printf("%s\n", one.name);
    return 0;
  }
  for (const Measurement& one : measurements) {
    if (std::string(arguments[1]) != one.name) continue;
    if (one.clusters && !attribute(cudaDevAttrClusterLaunch)) {
      fprintf(stderr, "this GPU has no clusters\n");
      return 4;
    }
    const Values values = one.run();
    printf("{");
    for (size_t i = 0; i < values.size(); ++i)
      printf("%s\"%s\": %.6g", i > 0 ? ", " : "", values[i].first.c_str(), values[i].second);
    printf("}\n");
    return 0;
  }
  fprintf(stderr, "%s: no measurement of this name; without a name they are listed\n", arguments[1]);
  return 2;
}
