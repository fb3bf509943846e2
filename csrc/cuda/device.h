// Everything the kernels ask of the GPU beyond plain C++: one short function for each instruction or register.
//
// This is the only file with intrinsics and PTX. With FRNN_CUDA_ON_HOST, cuda_host.h (tests/cuda_host) supplies the
// same functions on the CPU, so the kernel sources run unchanged in tests; it adds keyword macros (__global__ and the
// like) and checks what hardware leaves undefined. Kernels therefore keep to four rules:
//   - shared memory is dynamic only: shared_memory() is the block's buffer, 128-byte aligned;
//   - blocks are one-dimensional, clusters lie along x;
//   - pointers that cross to another block's shared memory come from map_shared() or remote_address();
//   - a thread that waits for another block calls a function with `wait` in its name: it never spins by itself.
//
// With FRNN_WAIT_LIMIT, a number of clock cycles, mbarrier_wait and wait_until_at_least give up after so many: they
// print who waits, where, for what and in which step, and end the kernel. One that would hang then fails, and says at
// which wait. Barriers of a block or of the cluster need no limit of their own: what keeps a thread from one is one of
// these waits, or the end of its kernel. Without the macro a wait's `step`, `file` and `line` leave no instruction
// behind.
//
// "The warp" means all 32 lanes, which must arrive at the same call together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cpu/element.h"
#include "../problem.h"

namespace fused_rnn {
namespace cuda {

// Approximations of the special function unit, to a few units in the last place. What would be subnormal is zero.

FRNN_HOST_DEVICE float approximate_exp(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#else
  return std::exp(x);
#endif
}
FRNN_HOST_DEVICE float approximate_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

}  // namespace cuda
}  // namespace fused_rnn

#if defined(FRNN_CUDA_ON_HOST)
#define FRNN_CUDA_CLUSTERS 1
#include "cuda_host.h"
#else

// Thread-block clusters, distributed shared memory, mbarriers with transaction bytes. (Also where nvcc only parses
// device code, for the host.)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FRNN_CUDA_CLUSTERS 1
#endif

#if defined(FRNN_WAIT_LIMIT)
#include <cassert>
#include <cstdio>
#endif

#define FRNN_DEVICE __device__ __forceinline__
#define FRNN_UNROLL _Pragma("unroll")
#define FRNN_NO_UNROLL _Pragma("unroll 1")
#define FRNN_PRAGMA(text) _Pragma(#text)
#define FRNN_UNROLL_BY(count) FRNN_PRAGMA(unroll count)
// Of host execution, which reports where in a kernel its threads wait: a function's last parameter, and what is passed
// on for it.
#define FRNN_PLACE
#define FRNN_AND_PLACE
#define FRNN_GIVE_PLACE
#define FRNN_PASS_PLACE

namespace fused_rnn {
namespace cuda {

constexpr int warp_size = 32;

// Code for one architecture, or one family, alone: warps may hand registers to others. Four warps together, from a
// multiple of four; those that raise theirs wait until others have lowered theirs. `count`: a multiple of 8.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#define FRNN_CUDA_SET_REGISTERS 1
#endif
template <int count>
FRNN_DEVICE void raise_registers() {
#if defined(FRNN_CUDA_SET_REGISTERS)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
template <int count>
FRNN_DEVICE void lower_registers() {
#if defined(FRNN_CUDA_SET_REGISTERS)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

// The same value, of which the compiler knows nothing before this point: what is made of it is made here.
FRNN_DEVICE uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Where a thread is

FRNN_DEVICE int thread_index() { return int(threadIdx.x); }
FRNN_DEVICE int lane_index() { return int(threadIdx.x) % warp_size; }
FRNN_DEVICE int warp_index() { return int(threadIdx.x) / warp_size; }
FRNN_DEVICE int block_size() { return int(blockDim.x); }
FRNN_DEVICE int block_x() { return int(blockIdx.x); }
FRNN_DEVICE int block_y() { return int(blockIdx.y); }
FRNN_DEVICE int block_z() { return int(blockIdx.z); }
FRNN_DEVICE int grid_x() { return int(gridDim.x); }
FRNN_DEVICE int grid_y() { return int(gridDim.y); }
FRNN_DEVICE int grid_z() { return int(gridDim.z); }

// The block's dynamic shared memory.
FRNN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char frnn_shared_memory[];
  return frnn_shared_memory;
}

// Barriers and fences

FRNN_DEVICE void sync_threads() { __syncthreads(); }
FRNN_DEVICE void sync_warp() { __syncwarp(); }

// A barrier of `threads` threads (a multiple of 32) of the block; id from 1 to 15.
FRNN_DEVICE void named_barrier(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts towards named_barrier(id, threads) without waiting.
FRNN_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Exchange inside the warp

template <class T>
FRNN_DEVICE T shuffle(T value, int source_lane) {
  return __shfl_sync(0xffffffffu, value, source_lane);
}
template <class T>
FRNN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
FRNN_DEVICE T shuffle_down(T value, int lanes) {
  return __shfl_down_sync(0xffffffffu, value, lanes);
}
FRNN_DEVICE bool any_in_warp(bool condition) { return __any_sync(0xffffffffu, condition); }

// Conversions

FRNN_DEVICE float widen(float x) { return x; }
FRNN_DEVICE double widen(double x) { return x; }
FRNN_DEVICE float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FRNN_DEVICE float widen(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

namespace detail {
FRNN_DEVICE void narrow_to(float x, float& y) { y = x; }
FRNN_DEVICE void narrow_to(double x, double& y) { y = x; }
// As one of two: a conversion of one number is a slower instruction wherever its result is not only stored.
FRNN_DEVICE void narrow_to(float x, BFloat16& y) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(0.0f), "f"(x));
  y.bits = uint16_t(packed);
}
FRNN_DEVICE void narrow_to(float x, Half& y) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(0.0f), "f"(x));
  y.bits = uint16_t(packed);
}
}  // namespace detail

// To the storage type S, to nearest even.
template <class S, class A>
FRNN_DEVICE S narrow(A x) {
  S y;
  detail::narrow_to(x, y);
  return y;
}

// Two 16-bit numbers of type S in one register, `low` in the lower half.
template <class S>
FRNN_DEVICE uint32_t pack(float low, float high) {
  return uint32_t(narrow<S>(low).bits) | uint32_t(narrow<S>(high).bits) << 16;
}
template <>
FRNN_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
FRNN_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// A float32 rounded to TF32 (10 bits of fraction), to nearest, ties away from zero.
FRNN_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Matrix products of a warp: d += a b, sums in float32. With g = lane / 4 and i = lane % 4, a lane holds
//   d[0..3]   rows g, g, g + 8, g + 8, columns 2i, 2i + 1, 2i, 2i + 1
// 16-bit S, a 16 x 16, b 16 x 8 (two values a register, the lower k first):
//   a[0..3]   (row, k): (g, 2i), (g + 8, 2i), (g, 2i + 8), (g + 8, 2i + 8)
//   b[0..1]   (k, column): (2i, g), (2i + 8, g)
// TF32, a 16 x 8, b 8 x 8:
//   a[0..3]   (g, i), (g + 8, i), (g, i + 4), (g + 8, i + 4)
//   b[0..1]   (i, g), (i + 4, g)

template <class S>
FRNN_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
FRNN_DEVICE void multiply_add<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
FRNN_DEVICE void multiply_add<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FRNN_DEVICE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes of shared memory. In the order of these calls: compilers would load as early as they can, into registers
// that are not there.
FRNN_DEVICE void load_shared(uint32_t (&words)[4], const void* from) {
  asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(uint32_t(__cvta_generic_to_shared(from)))
               : "memory");
}
// The same where `loads`; else zeros. (Not anything: registers that are only perhaps written would be taken for all of
// a loop.)
FRNN_DEVICE void load_shared_if(bool loads, uint32_t (&words)[4], const void* from) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@p ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n"
      "}\n"
      : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
      : "r"(uint32_t(__cvta_generic_to_shared(from))), "r"(uint32_t(loads))
      : "memory");
}

// Four 8 x 8 tiles of 16-bit values from shared memory. Lane l gives the address of row l % 8 of tile l / 8 (16 bytes,
// 16-byte aligned); register j of lane l gets elements 2 (l % 4) and the next of row l / 4 of tile j.
FRNN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}
// The same with every tile transposed: register j of lane l gets rows 2 (l % 4) and the next, column l / 4 of tile j.
FRNN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// Copies from global to shared memory that run beside the program, 16 bytes each, both sides 16-byte aligned. Other
// threads see the bytes after the issuing thread's copy_async_wait and a barrier.

FRNN_DEVICE void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
// Closes a group of the copies issued since the last one.
FRNN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are unfinished.
template <int pending>
FRNN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Global memory that other blocks write while the kernel runs

FRNN_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(p)) : "memory");
  return value;
}
FRNN_DEVICE void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value) : "memory");
}
FRNN_DEVICE void add_release(uint32_t* p, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value) : "memory");
}

#if defined(FRNN_WAIT_LIMIT)

namespace detail {

// Of one source file: enough to see which blocks stand where, few enough to be read.
constexpr unsigned most_wait_reports = 48;
static __device__ unsigned wait_reports;

// Where a wait stands in the source.
struct WaitSite {
  const char* file;
  int line;
};

// Out of line and without a way back: its registers and its stack are no part of the loop that waits.
static __device__ __noinline__ void give_up(const char* what, WaitSite site, int step, uint64_t address,
                                            uint32_t wanted, uint32_t found) {
  const bool speaks =
      lane_index() == __ffs(int(__activemask())) - 1 && atomicAdd(&wait_reports, 1u) < most_wait_reports;
  if (speaks)
    printf("%s: %s:%d, step %d, block (%d,%d) of (%d,%d), thread %d, at %llx, wanted %u, found %u\n", what, site.file,
           site.line, step, block_x(), block_y(), grid_x(), grid_y(), thread_index(),
           static_cast<unsigned long long>(address), wanted, found);
  // What ends one thread here ends all blocks at once. The others began to wait at about the same time: let them say so
  // too. A driver may lose what was printed by a kernel that traps, and keeps what failed assertions say: these have
  // block, thread and line.
  const long long began = clock64();
  while (clock64() - began < (speaks ? 40000000 : 80000000)) {
  }
  if (speaks) __assert_fail(what, site.file, unsigned(site.line), "wait");
  __trap();
}

// Calls `done` until it says so, for at most FRNN_WAIT_LIMIT cycles; then `late`.
template <class Done, class Late>
FRNN_DEVICE void wait_for(const Done& done, const Late& late) {
  if (done()) return;
  const long long began = clock64();
  while (!done())
    if (clock64() - began > (FRNN_WAIT_LIMIT)) late();
}

}  // namespace detail

#endif

// Waits until the counter has reached `target` (modulo 2^32). Only between blocks that are resident together. step: the
// kernel's, if it says which, for reports of FRNN_WAIT_LIMIT.
FRNN_DEVICE void wait_until_at_least(const uint32_t* counter, uint32_t target, int step = -1,
                                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
#if defined(FRNN_WAIT_LIMIT)
  detail::wait_for([&] { return int32_t(load_acquire(counter) - target) >= 0; },
                   [&] {
                     detail::give_up("WAITED TOO LONG: counter", {file, line}, step, uint64_t(counter), target,
                                     load_acquire(counter));
                   });
#else
  (void)step, (void)file, (void)line;
  while (int32_t(load_acquire(counter) - target) < 0) {  // cycles: leaves
  }
#endif
}

namespace detail {
template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <class T>
using WordOf = typename Word<sizeof(T)>::type;
}  // namespace detail

// T has 1, 2, 4, 8 or 16 bytes and is aligned to them.

// From L2, past L1: for what another block wrote during this kernel.
template <class T>
FRNN_DEVICE T load_l2(const T* p) {
  const detail::WordOf<T> word = __ldcg(reinterpret_cast<const detail::WordOf<T>*>(p));
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}
template <class T>
FRNN_DEVICE void store_l2(T* p, T value) {
  detail::WordOf<T> word;
  memcpy(&word, &value, sizeof word);
  __stcg(reinterpret_cast<detail::WordOf<T>*>(p), word);
}
// For what is read or written once: evicted from the caches first.
template <class T>
FRNN_DEVICE T load_streaming(const T* p) {
  const detail::WordOf<T> word = __ldcs(reinterpret_cast<const detail::WordOf<T>*>(p));
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}
template <class T>
FRNN_DEVICE void store_streaming(T* p, T value) {
  detail::WordOf<T> word;
  memcpy(&word, &value, sizeof word);
  __stcs(reinterpret_cast<detail::WordOf<T>*>(p), word);
}
FRNN_DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// A barrier in shared memory; what it can do stands below.
struct alignas(8) Mbarrier {
  uint64_t state;
};

#if defined(FRNN_CUDA_CLUSTERS)

// PTX 8.6 has fences of shared memory alone. Without them a release to the cluster waits for all that was stored to
// global memory, and an acquire empties L1.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
#define FRNN_CUDA_SHARED_FENCES 1
#endif

// Clusters

FRNN_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
FRNN_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}

// The cluster's barrier in two halves: what a thread did before its arrive is seen by all threads after their wait.
FRNN_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
FRNN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same for threads that have nothing to wait for: between two arrivals there has to be one.
FRNN_DEVICE void cluster_keep_up() { cluster_wait(); }

// The object of block `rank` of the cluster that stands where *p stands in this block's shared memory; for ordinary
// loads and stores.
template <class T>
FRNN_DEVICE T* map_shared(T* p, int rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
}

// The same for the functions below.
struct RemoteAddress {
  uint32_t address;
  FRNN_DEVICE RemoteAddress operator+(int64_t bytes) const { return {address + uint32_t(bytes)}; }
};
FRNN_DEVICE RemoteAddress remote_address(const void* p, int rank) {
  RemoteAddress remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote.address)
      : "r"(uint32_t(__cvta_generic_to_shared(p))), "r"(rank));
  return remote;
}

// 4, 8 or 16 bytes, aligned to their size.
template <class T>
FRNN_DEVICE void store_remote(RemoteAddress to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  uint32_t w[4] = {};
  memcpy(w, &value, sizeof value);
  if (sizeof(T) == 4)
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(to.address), "r"(w[0]) : "memory");
  else if (sizeof(T) == 8)
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1,%2};" ::"r"(to.address), "r"(w[0]), "r"(w[1]) : "memory");
  else
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to.address), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                 "r"(w[3])
                 : "memory");
}

// Barriers in shared memory. A phase ends when `count` arrivals have come and as many bytes as were expected; phases
// have the parities 0, 1, 0, ...

// By one thread, before fence_mbarrier_init() and a barrier of the block or cluster.
FRNN_DEVICE void mbarrier_init(Mbarrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(uint32_t(__cvta_generic_to_shared(barrier))), "r"(count)
               : "memory");
}
// By the thread that has initialised: makes it visible to the cluster and to asynchronous stores.
FRNN_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FRNN_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(uint32_t(__cvta_generic_to_shared(barrier)))
               : "memory");
}
// An arrival that also adds `bytes` to what the phase expects.
FRNN_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(uint32_t(__cvta_generic_to_shared(barrier))),
      "r"(bytes)
      : "memory");
}
// Another block's. Whoever waits for it knows that this block's threads are done with their own shared memory as far as
// they were here or had met this thread; of global memory it need not know anything.
FRNN_DEVICE void mbarrier_arrive_remote(RemoteAddress barrier) {
#if defined(FRNN_CUDA_SHARED_FENCES)
  asm volatile(
      "fence.release.sync_restrict::shared::cta.cluster;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier.address)
      : "memory");
#else
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier.address) : "memory");
#endif
}
// Whether the phase of this parity has ended; may take a moment before it says no. Then what came with it is seen in
// the cluster's shared memory.
FRNN_DEVICE bool mbarrier_try_wait(Mbarrier* barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
#if defined(FRNN_CUDA_SHARED_FENCES)
      "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n"
      "fence.acquire.sync_restrict::shared::cluster.cluster;\n"
#else
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
#endif
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(uint32_t(__cvta_generic_to_shared(barrier))), "r"(parity)
      : "memory");
  return done != 0;
}
// Waits until the phase of this parity has ended. step: as for wait_until_at_least.
FRNN_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity, int step = -1, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
#if defined(FRNN_WAIT_LIMIT)
  detail::wait_for([&] { return mbarrier_try_wait(barrier, parity); },
                   [&] {
                     detail::give_up("WAITED TOO LONG: mbarrier", {file, line}, step, __cvta_generic_to_shared(barrier),
                                     uint32_t(parity), uint32_t(barrier->state >> 32));
                   });
#else
  (void)step, (void)file, (void)line;
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

// A store that runs beside the program and then counts its bytes on `barrier`, which is in the same block as `to`.
// 4, 8 or 16 bytes, aligned to their size.
template <class T>
FRNN_DEVICE void store_async(RemoteAddress to, T value, RemoteAddress barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  uint32_t w[4] = {};
  memcpy(w, &value, sizeof value);
  if (sizeof(T) == 4)
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to.address),
                 "r"(w[0]), "r"(barrier.address)
                 : "memory");
  else if (sizeof(T) == 8)
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(to.address),
        "r"(w[0]), "r"(w[1]), "r"(barrier.address)
        : "memory");
  else
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                     to.address),
                 "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(barrier.address)
                 : "memory");
}

#endif  // FRNN_CUDA_CLUSTERS

}  // namespace cuda
}  // namespace fused_rnn

#endif  // FRNN_CUDA_ON_HOST
