// csrc/cuda/device.h on the CPU: the same functions, on the engine of engine.h. Their meaning stands there.
//
// Functions that wait take their caller's place in the source, for reports and for FRNN_SKIP_SITE. Whatever touches a
// kernel's memory is inline here, so that sanitizers see it as the kernel's own; the rest is in engine.cpp, which no
// sanitizer instruments.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define FRNN_DEVICE inline
#define FRNN_UNROLL
#define FRNN_NO_UNROLL
#define FRNN_UNROLL_BY(count)
#define FRNN_PLACE FRNN_CALLER
#define FRNN_AND_PLACE , FRNN_CALLER
#define FRNN_GIVE_PLACE file, line
#define FRNN_PASS_PLACE , file, line
#define FRNN_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fused_rnn {
namespace cuda {

constexpr int warp_size = 32;

namespace detail {
void set_registers(int count, const char* file, int line);
}
template <int count>
void raise_registers(FRNN_CALLER) {
  detail::set_registers(count, file, line);
}
template <int count>
void lower_registers(FRNN_CALLER) {
  detail::set_registers(count, file, line);
}
inline uint32_t opaque(uint32_t value) { return value; }

int thread_index();
int block_size();
int block_x();
int block_y();
int block_z();
int grid_x();
int grid_y();
int grid_z();
int cluster_rank();
int cluster_size();
inline int lane_index() { return thread_index() % warp_size; }
inline int warp_index() { return thread_index() / warp_size; }

char* shared_memory();

void sync_threads(FRNN_CALLER);
void sync_warp(FRNN_CALLER);
void named_barrier(int id, int threads, FRNN_CALLER);
void named_barrier_arrive(int id, int threads, FRNN_CALLER);

namespace detail {
uint64_t shuffle_word(uint64_t word, int source_lane, const char* file, int line);
void check_aligned(const void* p, size_t bytes, const char* function, const char* file, int line);
void check_remote(const void* p, size_t bytes, const char* function, const char* file, int line);
// for_access: what comes of it will be read and written without another look; else an address may be asked for before
// its block has started.
void* map_shared(const void* p, int rank, bool for_access, const char* file, int line);
void store_async(void* to, const uint32_t* words, int bytes, void* barrier, const char* file, int line);
void copy_async_wait(int pending, const char* file, int line);
void multiply_add_bfloat16(float* d, const uint32_t* a, const uint32_t* b, const char* file, int line);
void multiply_add_half(float* d, const uint32_t* a, const uint32_t* b, const char* file, int line);
void check_shared(const void* p, size_t bytes, const char* function, const char* file, int line);
void distribute_matrices(uint32_t* r, const uint32_t* row, bool transposed, const char* file, int line);
void let_others_run(const char* file, int line);
void counter_changed(const char* file, int line);
// False if FRNN_SKIP_SITE names this place.
bool wait_for_counter(const uint32_t* counter, uint32_t target, const char* file, int line);
}  // namespace detail

template <class T>
T shuffle(T value, int source_lane, FRNN_CALLER) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  word = detail::shuffle_word(word, source_lane % warp_size, file, line);
  memcpy(&value, &word, sizeof value);
  return value;
}
template <class T>
T shuffle_xor(T value, int mask, FRNN_CALLER) {
  return shuffle(value, lane_index() ^ mask, file, line);
}
template <class T>
T shuffle_down(T value, int lanes, FRNN_CALLER) {
  const int source = lane_index() + lanes;
  return shuffle(value, source < warp_size ? source : lane_index(), file, line);
}
bool any_in_warp(bool condition, FRNN_CALLER);

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(Half x) { return to_float(x); }

template <class S, class A>
S narrow(A x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else if constexpr (std::is_same_v<S, Half>) {
    return to_half(x);
  } else {
    static_assert(std::is_same_v<S, A>, "float64 and float32 are stored as they are");
    return x;
  }
}
template <class S>
uint32_t pack(float low, float high) {
  return uint32_t(narrow<S>(low).bits) | uint32_t(narrow<S>(high).bits) << 16;
}
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & ~0x1fffu;
}

template <class S>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FRNN_CALLER) {
  if constexpr (std::is_same_v<S, BFloat16>)
    detail::multiply_add_bfloat16(d, a, b, file, line);
  else
    detail::multiply_add_half(d, a, b, file, line);
}
void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FRNN_CALLER);

inline void load_shared(uint32_t (&words)[4], const void* from, FRNN_CALLER) {
  detail::check_shared(from, 16, "load_shared", file, line);
  memcpy(words, from, sizeof words);
}
// NaN, as bfloat16, float16 and float32, where nothing is loaded.
inline void load_shared_if(bool loads, uint32_t (&words)[4], const void* from, FRNN_CALLER) {
  memset(words, 0xff, sizeof words);
  if (!loads) return;
  detail::check_shared(from, 16, "load_shared_if", file, line);
  memcpy(words, from, sizeof words);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, FRNN_CALLER) {
  detail::check_shared(row, 16, "load_matrices", file, line);
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) words[i] = static_cast<const uint32_t*>(row)[i];
  detail::distribute_matrices(r, words, false, file, line);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, FRNN_CALLER) {
  detail::check_shared(row, 16, "load_matrices_transposed", file, line);
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) words[i] = static_cast<const uint32_t*>(row)[i];
  detail::distribute_matrices(r, words, true, file, line);
}

void copy_async_16(void* shared, const void* global, FRNN_CALLER);
void copy_async_commit();
template <int pending>
void copy_async_wait(FRNN_CALLER) {
  detail::copy_async_wait(pending, file, line);
}

inline uint32_t load_acquire(const uint32_t* p, FRNN_CALLER) {
  detail::let_others_run(file, line);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void store_release(uint32_t* p, uint32_t value, FRNN_CALLER) {
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
  detail::counter_changed(file, line);
}
inline void add_release(uint32_t* p, uint32_t value, FRNN_CALLER) {
  __atomic_fetch_add(p, value, __ATOMIC_RELEASE);
  detail::counter_changed(file, line);
}
// No limit of time here: when nobody can go on, the engine says where all threads wait.
inline void wait_until_at_least(const uint32_t* counter, uint32_t target, int step = -1, FRNN_CALLER) {
  (void)step;
  // The load is what ThreadSanitizer sees of the wait.
  if (detail::wait_for_counter(counter, target, file, line)) (void)__atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

template <class T>
T load_l2(const T* p, FRNN_CALLER) {
  detail::check_aligned(p, sizeof(T), "load_l2", file, line);
  return *p;
}
template <class T>
void store_l2(T* p, T value, FRNN_CALLER) {
  detail::check_aligned(p, sizeof(T), "store_l2", file, line);
  *p = value;
}
template <class T>
T load_streaming(const T* p, FRNN_CALLER) {
  detail::check_aligned(p, sizeof(T), "load_streaming", file, line);
  return *p;
}
template <class T>
void store_streaming(T* p, T value, FRNN_CALLER) {
  detail::check_aligned(p, sizeof(T), "store_streaming", file, line);
  *p = value;
}
inline void prefetch_l2(const void*) {}

void cluster_arrive(FRNN_CALLER);
void cluster_wait(FRNN_CALLER);
void cluster_keep_up(FRNN_CALLER);

template <class T>
T* map_shared(T* p, int rank, FRNN_CALLER) {
  return static_cast<T*>(detail::map_shared(p, rank, true, file, line));
}

struct RemoteAddress {
  char* address;
  RemoteAddress operator+(int64_t bytes) const { return {address + bytes}; }
};
inline RemoteAddress remote_address(const void* p, int rank, FRNN_CALLER) {
  return {static_cast<char*>(detail::map_shared(p, rank, false, file, line))};
}

template <class T>
void store_remote(RemoteAddress to, T value, FRNN_CALLER) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  detail::check_remote(to.address, sizeof(T), "store_remote", file, line);
  memcpy(to.address, &value, sizeof value);
}

struct alignas(8) Mbarrier {
  uint64_t state;
};

void mbarrier_init(Mbarrier* barrier, int count, FRNN_CALLER);
void fence_mbarrier_init(FRNN_CALLER);
void mbarrier_arrive(Mbarrier* barrier, FRNN_CALLER);
void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, FRNN_CALLER);
void mbarrier_arrive_remote(RemoteAddress barrier, FRNN_CALLER);
bool mbarrier_try_wait(Mbarrier* barrier, int parity, FRNN_CALLER);
void mbarrier_wait(Mbarrier* barrier, int parity, int step = -1, FRNN_CALLER);

template <class T>
void store_async(RemoteAddress to, T value, RemoteAddress barrier, FRNN_CALLER) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  uint32_t words[4] = {};
  memcpy(words, &value, sizeof value);
  detail::store_async(to.address, words, sizeof(T), barrier.address, file, line);
}

}  // namespace cuda
}  // namespace fused_rnn
