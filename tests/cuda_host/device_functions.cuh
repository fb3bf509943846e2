// A kernel for every function of csrc/cuda/device.h that is an intrinsic or PTX there: what a kernel writes to `out` is
// the same for what nvcc and what g++ make of it (test_ptx.cpp).
#pragma once

#include "cuda/device.h"

namespace fused_rnn {
namespace cuda_host {

using namespace fused_rnn::cuda;

// Words that each thread of each block reads and writes.
constexpr int words_in = 8, words_out = 16;

// This thread's words.
FRNN_DEVICE const uint32_t* words_of_thread(const uint32_t* in) {
  return in + (block_x() * block_size() + thread_index()) * words_in;
}
FRNN_DEVICE uint32_t* words_of_thread(uint32_t* out) {
  return out + (block_x() * block_size() + thread_index()) * words_out;
}
FRNN_DEVICE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FRNN_DEVICE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct alignas(8) Two {
  uint32_t w[2];
};
struct alignas(16) Four {
  uint32_t w[4];
};

__global__ void places(const uint32_t*, uint32_t* out) {
  const int values[] = {thread_index(), lane_index(), warp_index(), block_size(), block_x(),
                        block_y(),      block_z(),    grid_x(),     grid_y(),     grid_z()};
  for (int k = 0; k < 10; ++k) words_of_thread(out)[k] = uint32_t(values[k]);
}

// Two numbers of each thread; the test makes them of every kind (NaN, infinite, subnormal, ties).
__global__ void conversions(const uint32_t* in, uint32_t* out) {
  const uint32_t* const from = words_of_thread(in);
  uint32_t* const to = words_of_thread(out);
  const float x = as_float(from[0]), y = as_float(from[1]);
  to[0] = narrow<BFloat16>(x).bits;
  to[1] = narrow<Half>(x).bits;
  to[2] = pack<BFloat16>(x, y);
  to[3] = pack<Half>(x, y);
  to[4] = to_tf32(x);
  to[5] = as_bits(widen(BFloat16{uint16_t(from[0])}));
  to[6] = as_bits(widen(Half{uint16_t(from[0])}));
  to[7] = as_bits(widen(x));
  to[8] = as_bits(narrow<float>(x));
}

// Right to a few units in the last place.
__global__ void approximations(const uint32_t* in, uint32_t* out) {
  const float x = as_float(words_of_thread(in)[0]);
  words_of_thread(out)[0] = as_bits(approximate_exp(x));
  words_of_thread(out)[1] = as_bits(approximate_reciprocal(x));
}

// What nvcc makes of conditions now and then: a predicate and the constant of all ones, which is "true".
__global__ void predicates(const uint32_t* in, uint32_t* out) {
  const uint32_t x = words_of_thread(in)[0], y = words_of_thread(in)[1];
  uint32_t* const to = words_of_thread(out);
#ifdef __CUDA_ARCH__
  asm("{\n\t.reg .pred p;\n\tsetp.lt.u32 p, %2, %3;\n\txor.pred p, p, -1;\n\tselp.b32 %0, %2, %3, p;\n\t"
      "and.pred p, p, -1;\n\tselp.b32 %1, 5, 7, p;\n\t}"
      : "=r"(to[0]), "=r"(to[1])
      : "r"(x), "r"(y));
#else
  to[0] = x < y ? y : x;
  to[1] = x < y ? 7 : 5;
#endif
}

__global__ void exchange_in_warp(const uint32_t* in, uint32_t* out) {
  const uint32_t x = words_of_thread(in)[0];
  uint32_t* const to = words_of_thread(out);
  to[0] = shuffle(x, 5);
  to[1] = shuffle(x, (lane_index() * 7 + 3) % warp_size);
  to[2] = shuffle_xor(x, 9);
  to[3] = shuffle_down(x, 3);
  const double wide = shuffle_xor(double(as_float(x)), 1);
  to[4] = as_bits(float(wide));
  to[5] = any_in_warp(lane_index() == int(x % 64));
  sync_warp();
}

// The fragments are whatever the threads read: half of them in the first operand, and so on.
template <class S>
FRNN_DEVICE void product(const uint32_t* in, uint32_t* out) {
  const uint32_t* const from = words_of_thread(in);
  float d[4];
  uint32_t a[4], b[2];
  FRNN_UNROLL
  for (int k = 0; k < 4; ++k) {
    d[k] = float(lane_index() * 4 + k);
    a[k] = from[k];
  }
  FRNN_UNROLL
  for (int k = 0; k < 2; ++k) b[k] = from[4 + k];
  if constexpr (sizeof(S) == 4) {
    multiply_add_tf32(d, a, b);
  } else {
    multiply_add<S>(d, a, b);
  }
  FRNN_UNROLL
  for (int k = 0; k < 4; ++k) words_of_thread(out)[k] = as_bits(d[k]);
}
__global__ void product_bfloat16(const uint32_t* in, uint32_t* out) { product<BFloat16>(in, out); }
__global__ void product_float16(const uint32_t* in, uint32_t* out) { product<Half>(in, out); }
__global__ void product_tf32(const uint32_t* in, uint32_t* out) { product<float>(in, out); }

__global__ void matrices(const uint32_t* in, uint32_t* out) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (int k = 0; k < 4; ++k) shared[thread_index() * 4 + k] = words_of_thread(in)[k];
  sync_threads();
  uint32_t straight[4], transposed[4];
  load_matrices(straight, shared + thread_index() * 4);
  load_matrices_transposed(transposed, shared + (thread_index() ^ 1) * 4);
  FRNN_UNROLL
  for (int k = 0; k < 4; ++k) {
    words_of_thread(out)[k] = straight[k];
    words_of_thread(out)[4 + k] = transposed[k];
  }
}

__global__ void copies(const uint32_t* in, uint32_t* out) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int t = thread_index(), n = block_size();
  prefetch_l2(in);
  copy_async_16(shared + t * 4, words_of_thread(in));
  copy_async_commit();
  copy_async_16(shared + (n + t) * 4, words_of_thread(in) + 4);
  copy_async_commit();
  copy_async_wait<1>();
  sync_threads();
  words_of_thread(out)[0] = shared[(n - 1 - t) * 4 + 1];
  copy_async_wait<0>();
  sync_threads();
  words_of_thread(out)[1] = shared[(2 * n - 1 - t) * 4 + 2];
}

__global__ void global_accesses(const uint32_t* in, uint32_t* out) {
  const uint32_t* const from = words_of_thread(in);
  uint32_t* const to = words_of_thread(out);
  to[0] = load_l2(reinterpret_cast<const uint8_t*>(from) + 1);
  to[1] = load_l2(reinterpret_cast<const BFloat16*>(from) + 1).bits;
  to[2] = load_streaming(from + 1);
  store_l2(reinterpret_cast<Two*>(to + 4), load_streaming(reinterpret_cast<const Two*>(from) + 1));
  store_streaming(reinterpret_cast<Four*>(to + 8), load_l2(reinterpret_cast<const Four*>(from) + 1));
  store_l2(reinterpret_cast<Half*>(to + 12), Half{uint16_t(from[0])});
  store_streaming(reinterpret_cast<Half*>(to + 12) + 1, Half{uint16_t(from[1])});
  store_streaming(to + 13, load_streaming(from + 2));
  store_l2(to + 14, load_l2(from + 3));
}

// Two warps hand over to each other.
__global__ void named_barriers(const uint32_t* in, uint32_t* out) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (int round = 0; round < 3; ++round) {
    if (warp_index() == 0) {
      shared[lane_index()] = words_of_thread(in)[round];
      named_barrier_arrive(1, 64);
      named_barrier(2, 64);
    } else {
      named_barrier(1, 64);
      words_of_thread(out)[round] = shared[31 - lane_index()];
      named_barrier_arrive(2, 64);
    }
  }
}

// Blocks that are resident together meet; the last words of `in` are their counters.
__global__ void grid_barriers(const uint32_t* in, uint32_t* out) {
  uint32_t* const counters = const_cast<uint32_t*>(in) + grid_x() * block_size() * words_in;
  for (uint32_t round = 1; round <= 3; ++round) {
    store_l2(words_of_thread(out) + round, round * 100 + uint32_t(block_x()));
    sync_threads();
    if (thread_index() == 0) {
      add_release(counters, 1);
      wait_until_at_least(counters, round * uint32_t(grid_x()));
    }
    sync_threads();
    const int other = (block_x() + 1) % grid_x();
    words_of_thread(out)[4 + round] = load_l2(out + (other * block_size() + thread_index()) * words_out + round);
  }
  if (block_x() == 0 && thread_index() == 0) store_release(counters + 1, 7);
  if (block_x() == 1 && thread_index() == 0) {
    while (load_acquire(counters + 1) != 7) {
    }
  }
}

#if defined(FRNN_CUDA_CLUSTERS)

// Every block of a cluster writes to every other in the three ways there are.
__global__ void clusters(const uint32_t* in, uint32_t* out) {
  const int rank = cluster_rank(), blocks = cluster_size(), t = thread_index(), n = block_size();
  const uint32_t x = words_of_thread(in)[0];
  uint32_t* const to = words_of_thread(out);
  Mbarrier* const barriers = reinterpret_cast<Mbarrier*>(shared_memory());
  char* const remote = shared_memory() + 128;
  char* const received = remote + n * blocks * 32;
  if (t == 0) {
    mbarrier_init(barriers, 1);
    mbarrier_init(barriers + 1, n * blocks);
    mbarrier_init(barriers + 2, n + 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(barriers, n * blocks * 28);
  }
  cluster_arrive();
  cluster_wait();
  for (int other = 0; other < blocks; ++other) {
    const int place = rank * n + t;
    const Two two = {{x + 1, x + 2}};
    const Four four = {{x + 3, x + 4, x + 5, x + 6}};
    store_remote(remote_address(remote, other) + place * 4, x);
    store_remote(remote_address(remote + n * blocks * 4, other) + place * 8, two);
    store_remote(remote_address(remote + n * blocks * 16, other) + place * 16, four);
    const RemoteAddress full = remote_address(barriers, other);
    store_async(remote_address(received, other) + place * 4, x, full);
    store_async(remote_address(received + n * blocks * 4, other) + place * 8, two, full);
    store_async(remote_address(received + n * blocks * 16, other) + place * 16, four, full);
    mbarrier_arrive_remote(remote_address(barriers + 1, other));
  }
  mbarrier_arrive(barriers + 2);
  if (t == 0) mbarrier_arrive_expect(barriers + 2, 0);
  mbarrier_wait(barriers, 0);
  mbarrier_wait(barriers + 1, 0);
  while (!mbarrier_try_wait(barriers + 2, 0)) {
  }
  const int from = (rank + 1) % blocks * n + (t + 3) % n;
  for (int k = 0; k < 2; ++k) {
    const char* const part = k == 0 ? remote : received;
    to[k * 5] = reinterpret_cast<const uint32_t*>(part)[from];
    to[k * 5 + 1] = reinterpret_cast<const Two*>(part + n * blocks * 4)[from].w[1];
    to[k * 5 + 2] = reinterpret_cast<const Four*>(part + n * blocks * 16)[from].w[0];
    to[k * 5 + 3] = reinterpret_cast<const Four*>(part + n * blocks * 16)[from].w[3];
  }
  to[10] = uint32_t(rank) << 16 | uint32_t(blocks);
  cluster_arrive();
  cluster_wait();
  to[11] = *map_shared(reinterpret_cast<uint32_t*>(remote) + from, (rank + 1) % blocks);
  cluster_arrive();
  cluster_wait();
}

#endif

}  // namespace cuda_host
}  // namespace fused_rnn
