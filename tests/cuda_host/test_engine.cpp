// Tests of the host execution itself: `test_engine instructions` compares every function of device.h with a plain
// computation, `test_engine misuse` wants every misuse and every missing wait reported or visible in the numbers, and
// `test_engine race NAME` does what ThreadSanitizer must find.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "engine.h"

using namespace fused_rnn;
using namespace fused_rnn::cuda;
using cuda_host::Failure;
using cuda_host::Launch;

namespace {

int failures = 0;
constexpr int seeds = 12;  // every order of threads with every order of arrivals

void expect(bool good, const std::string& name, const std::string& what) {
  if (good) return;
  ++failures;
  printf("FAILED %s: %s\n", name.c_str(), what.c_str());
}

Launch shape(int threads, uint64_t seed, int blocks = 1, int cluster = 1, size_t shared = 4096) {
  Launch l;
  l.grid_x = blocks;
  l.threads = threads;
  l.cluster = cluster;
  l.shared_bytes = shared;
  l.seed = seed;
  return l;
}

// Runs the kernel under every seed; afterwards `good` says whether its results are right.
void always(const std::string& name, Launch l, const std::function<void()>& kernel, const std::function<bool()>& good) {
  for (l.seed = 0; l.seed < seeds; ++l.seed) {
    try {
      cuda_host::launch(l, kernel);
      expect(good(), name, "wrong result under seed " + std::to_string(l.seed));
    } catch (const Failure& failure) {
      expect(false, name, failure.what());
    }
  }
}

// Under some seed the kernel must fail with a report that contains `text`.
void fails(const std::string& name, Launch l, const char* text, const std::function<void()>& kernel) {
  std::string reports;
  for (l.seed = 0; l.seed < seeds; ++l.seed) {
    try {
      cuda_host::launch(l, kernel);
    } catch (const Failure& failure) {
      if (std::string(failure.what()).find(text) != std::string::npos) return;
      reports += std::string("\n  ") + failure.what();
    }
  }
  expect(false, name, std::string("expected a failure with \"") + text + "\"" + reports);
}

// Under some seed the kernel must give wrong numbers.
void goes_wrong(const std::string& name, Launch l, const std::function<void()>& kernel,
                const std::function<bool()>& good) {
  for (l.seed = 0; l.seed < seeds; ++l.seed) {
    cuda_host::launch(l, kernel);
    if (!good()) return;
  }
  expect(false, name, "nothing showed the missing wait");
}

float value_at(int row, int column) { return float((row * 7 + column * 3) % 13 - 6) / 4; }

template <class S>
uint16_t bits_at(int row, int column) {
  return narrow<S>(value_at(row, column)).bits;
}

// d = 1 + a b of a 16 x K and b K x 8, filled through the layout that device.h states.
template <class Multiply>
void check_product(const std::string& name, int K, Multiply multiply) {
  static float d[16][8];
  always(
      name, shape(32, 0),
      [&] {
        const int g = lane_index() / 4, i = lane_index() % 4;
        float sums[4] = {1, 1, 1, 1};
        multiply(sums, g, i);
        d[g][2 * i] = sums[0];
        d[g][2 * i + 1] = sums[1];
        d[g + 8][2 * i] = sums[2];
        d[g + 8][2 * i + 1] = sums[3];
      },
      [&] {
        for (int row = 0; row < 16; ++row) {
          for (int column = 0; column < 8; ++column) {
            float sum = 1;
            for (int k = 0; k < K; ++k) sum += value_at(row, k) * value_at(k + 20, column);
            if (d[row][column] != sum) return false;
          }
        }
        return true;
      });
}

template <class S>
void multiply_half(float (&sums)[4], int g, int i) {
  const auto pair = [](auto first, auto second) { return uint32_t(first) | uint32_t(second) << 16; };
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) {
    const int row = g + r % 2 * 8, k = 2 * i + r / 2 * 8;
    a[r] = pair(bits_at<S>(row, k), bits_at<S>(row, k + 1));
  }
  for (int r = 0; r < 2; ++r) {
    const int k = 2 * i + r * 8;
    b[r] = pair(bits_at<S>(k + 20, g), bits_at<S>(k + 21, g));
  }
  multiply_add<S>(sums, a, b);
}

void multiply_tf32(float (&sums)[4], int g, int i) {
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) a[r] = to_tf32(value_at(g + r % 2 * 8, i + r / 2 * 4));
  for (int r = 0; r < 2; ++r) b[r] = to_tf32(value_at(i + r * 4 + 20, g));
  multiply_add_tf32(sums, a, b);
}

void instructions() {
  check_product("multiply_add bfloat16", 16, multiply_half<BFloat16>);
  check_product("multiply_add float16", 16, multiply_half<Half>);
  check_product("multiply_add tf32", 8, multiply_tf32);

  static uint32_t matrices[2][32][4];
  always(
      "load_matrices", shape(32, 0),
      [] {
        auto* tile = reinterpret_cast<uint16_t*>(shared_memory());  // value = tile * 64 + row * 8 + column
        for (int i = lane_index(); i < 256; i += 32) tile[i] = uint16_t(i);
        sync_warp();
        const uint16_t* row = tile + lane_index() * 8;
        load_matrices(matrices[0][lane_index()], row);
        load_matrices_transposed(matrices[1][lane_index()], row);
      },
      [] {
        for (int lane = 0; lane < 32; ++lane) {
          for (int j = 0; j < 4; ++j) {
            const uint32_t plain = j * 64 + lane / 4 * 8 + lane % 4 * 2;
            if (matrices[0][lane][j] != (plain | (plain + 1) << 16)) return false;
            const uint32_t first = j * 64 + lane % 4 * 2 * 8 + lane / 4;
            if (matrices[1][lane][j] != (first | (first + 8) << 16)) return false;
          }
        }
        return true;
      });

  static float floats[4][64];
  static double doubles[64];
  always(
      "shuffles", shape(64, 0),
      [] {
        const int t = thread_index();
        floats[0][t] = shuffle(float(t), 5);
        floats[1][t] = shuffle_xor(float(t), 9);
        floats[2][t] = shuffle_down(float(t), 4);
        floats[3][t] = any_in_warp(t == 40);
        doubles[t] = shuffle(t + 1e-12, (lane_index() + 1) % 32);
      },
      [] {
        for (int t = 0; t < 64; ++t) {
          const int w = t / 32 * 32, l = t % 32;
          if (floats[0][t] != w + 5 || floats[1][t] != w + (l ^ 9)) return false;
          if (floats[2][t] != w + (l < 28 ? l + 4 : l) || floats[3][t] != w / 32) return false;
          if (doubles[t] != w + (l + 1) % 32 + 1e-12) return false;
        }
        return true;
      });

  for (int i = 0; i < 65536; ++i) {  // every 16-bit pattern goes to float and back
    const Half h{uint16_t(i)};
    const BFloat16 b{uint16_t(i)};
    const bool same_half = narrow<Half>(widen(h)).bits == i || widen(h) != widen(h);
    const bool same_bfloat16 = narrow<BFloat16>(widen(b)).bits == i || widen(b) != widen(b);
    expect(same_half && same_bfloat16, "conversions", std::to_string(i));
  }
  expect(narrow<BFloat16>(1.00390625f).bits == 0x3f80 && narrow<BFloat16>(1.01171875f).bits == 0x3f82, "narrow",
         "ties go to even");
  expect(to_tf32(1.00048828125f) == 0x3f802000u, "to_tf32", "ties go away from zero");
  expect(pack<BFloat16>(1, -2) == 0xc0003f80u && pack<Half>(1, -2) == 0xc0003c00u, "pack", "order");

  static int numbers[1024];
  always(
      "sync_threads", shape(96, 0, 3),
      [] {
        int* shared = reinterpret_cast<int*>(shared_memory());
        for (int round = 0; round < 5; ++round) {
          shared[thread_index()] = thread_index() * round;
          sync_threads();
          numbers[block_x() * 96 + thread_index()] = shared[(thread_index() + 33) % 96];
          sync_threads();
        }
      },
      [] {
        for (int t = 0; t < 288; ++t)
          if (numbers[t] != (t % 96 + 33) % 96 * 4) return false;
        return true;
      });

  always(
      "named barriers hand over between warps", shape(64, 0),
      [] {
        int* shared = reinterpret_cast<int*>(shared_memory());
        for (int round = 0; round < 5; ++round) {
          if (warp_index() == 0) {
            shared[lane_index()] = round + lane_index();
            named_barrier_arrive(1, 64);
            named_barrier(2, 64);
          } else {
            named_barrier(1, 64);
            numbers[round * 32 + lane_index()] = shared[31 - lane_index()];
            named_barrier_arrive(2, 64);
          }
        }
      },
      [] {
        for (int i = 0; i < 160; ++i)
          if (numbers[i] != i / 32 + 31 - i % 32) return false;
        return true;
      });

  alignas(16) static float source[256];
  for (int i = 0; i < 256; ++i) source[i] = float(i);
  always(
      "copy_async", shape(32, 0),
      [] {
        float* shared = reinterpret_cast<float*>(shared_memory());
        copy_async_16(shared + lane_index() * 4, source + lane_index() * 4);
        copy_async_commit();
        copy_async_16(shared + 128 + lane_index() * 4, source + 128 + lane_index() * 4);
        copy_async_commit();
        copy_async_wait<1>();
        sync_warp();
        floats[0][lane_index()] = shared[127 - lane_index()];
        copy_async_wait<0>();
        sync_warp();
        floats[1][lane_index()] = shared[255 - lane_index()];
      },
      [] {
        for (int i = 0; i < 32; ++i)
          if (floats[0][i] != 127 - i || floats[1][i] != 255 - i) return false;
        return true;
      });

  always(
      "cluster barrier and map_shared", shape(32, 0, 8, 4),
      [] {
        int* shared = reinterpret_cast<int*>(shared_memory());
        shared[lane_index()] = cluster_rank() * 100 + lane_index();
        cluster_arrive();
        cluster_wait();
        const int next = (cluster_rank() + 1) % cluster_size();
        numbers[block_x() * 32 + lane_index()] = *map_shared(shared + lane_index(), next);
        cluster_arrive();
        cluster_wait();
      },
      [] {
        for (int i = 0; i < 256; ++i)
          if (numbers[i] != (i / 32 + 1) % 4 * 100 + i % 32) return false;
        return true;
      });

  // Every block sends a value of each lane to every block, for some rounds. There are two buffers, each with an
  // mbarrier of its own: bytes of the next round may come before the last ones of this round.
  always(
      "store_async and mbarriers", shape(32, 0, 4, 4),
      [] {
        auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
        int* buffer = reinterpret_cast<int*>(shared_memory() + 64);
        if (thread_index() == 0) {
          mbarrier_init(barrier, 1);
          mbarrier_init(barrier + 1, 1);
          fence_mbarrier_init();
        }
        cluster_arrive();
        cluster_wait();
        int sum = 0;
        for (int round = 0; round < 4; ++round) {
          int* own = buffer + round % 2 * 128;
          Mbarrier* full = barrier + round % 2;
          if (thread_index() == 0) mbarrier_arrive_expect(full, 4 * 32 * 4);
          for (int rank = 0; rank < 4; ++rank)
            store_async(remote_address(own, rank) + (cluster_rank() * 32 + lane_index()) * 4, round * lane_index(),
                        remote_address(full, rank));
          if (lane_index() % 2)
            mbarrier_wait(full, round / 2 & 1);
          else
            while (!mbarrier_try_wait(full, round / 2 & 1)) {
            }
          for (int rank = 0; rank < 4; ++rank) sum += own[rank * 32 + (lane_index() + 7) % 32];
          sync_warp();  // nobody sends the round after next before all have read this one
        }
        numbers[block_x() * 32 + lane_index()] = sum;
        cluster_arrive();
        cluster_wait();
      },
      [] {
        for (int i = 0; i < 128; ++i)
          if (numbers[i] != (i % 32 + 7) % 32 * 4 * 6) return false;
        return true;
      });

  static uint32_t counter, polled;
  Launch grid = shape(64, 0, 6);
  grid.cooperative = true;
  always(
      "grid barrier through a counter", grid,
      [] {
        for (uint32_t round = 1; round <= 3; ++round) {
          if (thread_index() == 0) numbers[block_x()] = int(round) * 10 + block_x();
          sync_threads();
          if (thread_index() == 0) {
            add_release(&counter, 1);
            wait_until_at_least(&counter, round * grid_x());
          }
          sync_threads();
          if (thread_index() == 63) numbers[100 + block_x()] = load_l2(&numbers[(block_x() + 1) % grid_x()]);
          sync_threads();
          if (thread_index() == 0) {
            add_release(&polled, 1);
            while (load_acquire(&polled) < round * grid_x()) {
            }
          }
          sync_threads();
        }
      },
      [] {
        counter = polled = 0;
        for (int b = 0; b < 6; ++b)
          if (numbers[100 + b] != 30 + (b + 1) % 6) return false;
        return true;
      });
}

void misuse() {
  fails("an exit before a barrier of the warp", shape(32, 0), "deadlock", [] {
    if (thread_index() == 3) return;
    sync_warp();
  });
  fails("a barrier in one branch", shape(64, 0), "different barriers", [] {
    if (thread_index() < 32)
      sync_threads();
    else
      sync_threads();
  });
  fails("a shuffle in one branch", shape(32, 0), "different places", [] {
    if (lane_index() < 8)
      shuffle(1, 0);
    else
      shuffle(1, 0);
  });
  fails("a product by half a warp", shape(32, 0), "deadlock", [] {
    float d[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    if (lane_index() < 16) multiply_add<Half>(d, a, b);
  });
  fails("a product by a small block", shape(16, 0), "only 16 lanes", [] { shuffle(1, 0); });
  fails("a named barrier that misses a warp", shape(96, 0), "deadlock", [] {
    if (warp_index() < 2) named_barrier(1, 96);
  });
  fails("two sizes of one named barrier", shape(64, 0), "expects", [] { named_barrier(1, warp_index() ? 64 : 96); });
  fails("warps that ask for registers that nobody gave up", shape(384, 0), "more registers", [] {
    if (thread_index() < 256)
      raise_registers<216>();
    else
      lower_registers<80>();  // 72 are left
  });
  fails("a block that returns from half of a named barrier", shape(64, 0), "half of named barrier 1",
        [] { named_barrier_arrive(1, 128); });
  fails("a named barrier of 20 threads", shape(32, 0), "multiple of 32", [] { named_barrier(1, 20); });
  fails("two arrivals at the cluster's barrier", shape(32, 0, 2, 2), "second arrival", [] {
    cluster_arrive();
    cluster_arrive();
  });
  fails("a wait without arrival", shape(32, 0, 2, 2), "without an arrival", [] { cluster_wait(); });
  fails("a rank that is not there", shape(32, 0, 2, 2), "no block of rank 2", [] { map_shared(shared_memory(), 2); });
  fails("a pointer that is not shared", shape(32, 0, 2, 2), "not in the block's shared memory", [] {
    int here = 0;
    map_shared(&here, 0);
  });
  fails("shared memory of a block that has not started", shape(32, 0, 2, 2), "not started",
        [] { store_remote(remote_address(shared_memory(), cluster_rank() ^ 1), 1); });
  fails("shared memory of a block that has returned", shape(32, 0, 2, 2), "has returned", [] {
    cluster_arrive();
    cluster_wait();
    if (cluster_rank() == 0) store_remote(remote_address(shared_memory(), 1), 1);
  });
  fails("a block that returns before its stores have come", shape(32, 0, 2, 2), "returned before", [] {
    auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
    if (thread_index() == 0) {
      mbarrier_init(barrier, 1);
      fence_mbarrier_init();
    }
    cluster_arrive();
    cluster_wait();
    if (thread_index() == 0)
      store_async(remote_address(shared_memory() + 64, cluster_rank() ^ 1), 1,
                  remote_address(barrier, cluster_rank() ^ 1));
    cluster_arrive();
    cluster_wait();
  });
  fails("an mbarrier that nobody has initialised", shape(32, 0), "not initialised",
        [] { mbarrier_wait(reinterpret_cast<Mbarrier*>(shared_memory()), 0); });
  fails("an mbarrier without its fence", shape(32, 0), "fence_mbarrier_init", [] {
    auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
    if (thread_index() == 0) mbarrier_init(barrier, 1);
    sync_threads();
    if (thread_index() == 0) mbarrier_arrive_remote(remote_address(barrier, 0));
  });
  fails("an mbarrier that data overwrote", shape(32, 0), "written over", [] {
    auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
    if (thread_index() == 0) mbarrier_init(barrier, 1);
    sync_threads();
    reinterpret_cast<int*>(shared_memory())[0] = 0;
    mbarrier_arrive(barrier);
  });
  fails("fewer bytes than expected", shape(32, 0), "deadlock", [] {
    auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
    if (thread_index() == 0) mbarrier_init(barrier, 1);
    sync_threads();
    if (thread_index() == 0) mbarrier_arrive_expect(barrier, 8);
    mbarrier_wait(barrier, 0);
  });
  fails("more arrivals than counted", shape(32, 0), "more arrivals", [] {
    auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
    if (thread_index() == 0) {
      mbarrier_init(barrier, 1);
      mbarrier_arrive_expect(barrier, 8);
      mbarrier_arrive(barrier);
    }
  });
  fails("a write past shared memory", shape(32, 0, 1, 1, 100), "past its shared memory",
        [] { shared_memory()[101] = 1; });
  fails("16 bytes at an address of 8", shape(32, 0), "not aligned", [] {
    alignas(16) static float source[16];
    copy_async_16(shared_memory(), source + 2);
  });
  fails("blocks that wait for each other without being resident together", shape(32, 0, 8), "deadlock", [] {
    static uint32_t counter;
    if (block_x() == 0 && thread_index() == 0) counter = 0;
    add_release(&counter, 1);
    wait_until_at_least(&counter, 8 * 32);
  });
  fails("polling for what never comes", shape(32, 0), "deadlock", [] {
    static uint32_t never;
    while (load_acquire(&never) == 0) {
    }
  });

  static float seen[64];
  const auto right = [] {
    for (int i = 0; i < 64; ++i)
      if (seen[i] != float((i + 40) % 64)) return false;
    return true;
  };
  alignas(16) static float source[64];
  for (int i = 0; i < 64; ++i) source[i] = float(i);
  goes_wrong(
      "a missing sync_threads", shape(64, 0),
      [] {
        float* shared = reinterpret_cast<float*>(shared_memory());
        shared[thread_index()] = float(thread_index());
        seen[thread_index()] = shared[(thread_index() + 40) % 64];
      },
      right);
  goes_wrong(
      "a missing copy_async_wait", shape(64, 0),
      [] {
        float* shared = reinterpret_cast<float*>(shared_memory());
        if (thread_index() < 16) copy_async_16(shared + thread_index() * 4, source + thread_index() * 4);
        copy_async_commit();
        sync_threads();
        seen[thread_index()] = shared[(thread_index() + 40) % 64];
        copy_async_wait<0>();
      },
      right);
  goes_wrong(
      "a missing mbarrier_wait", shape(64, 0),
      [] {
        auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
        float* shared = reinterpret_cast<float*>(shared_memory() + 64);
        if (thread_index() == 0) {
          mbarrier_init(barrier, 1);
          fence_mbarrier_init();
          mbarrier_arrive_expect(barrier, 256);
        }
        sync_threads();
        store_async(remote_address(shared + thread_index(), 0), float(thread_index()), remote_address(barrier, 0));
        sync_threads();
        seen[thread_index()] = shared[(thread_index() + 40) % 64];
        mbarrier_wait(barrier, 0);
      },
      right);
}

// Kernels whose numbers may be right, but only by luck. ThreadSanitizer must object to each (all but the last).
void race(const std::string& name) {
  static int value[64];
  static uint32_t flag;
  Launch l = shape(64, 0, 2, 2);
  if (name == "barrier") {
    cuda_host::launch(l, [] {
      int* shared = reinterpret_cast<int*>(shared_memory());
      if (thread_index() == 0) shared[0] = 1;
      if (thread_index() == 63) value[0] = shared[0];
    });
  } else if (name == "shuffle") {  // lanes that exchange values have not exchanged memory
    cuda_host::launch(l, [] {
      int* shared = reinterpret_cast<int*>(shared_memory());
      shared[thread_index()] = 1;
      value[block_x()] = shared[shuffle_xor(thread_index(), 1)];
    });
  } else if (name == "cluster") {  // sync_threads does not reach the other block
    cuda_host::launch(l, [] {
      int* shared = reinterpret_cast<int*>(shared_memory());
      cluster_arrive();
      cluster_wait();
      shared[thread_index()] = 1;
      sync_threads();
      value[thread_index()] = *map_shared(shared + thread_index(), cluster_rank() ^ 1);
      cluster_arrive();
      cluster_wait();
    });
  } else if (name == "overwrite") {  // the receiver may still be reading when the next value comes
    l.seed = 1;
    cuda_host::launch(l, [] {
      auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
      int* shared = reinterpret_cast<int*>(shared_memory() + 64);
      if (thread_index() == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
      }
      cluster_arrive();
      cluster_wait();
      for (int round = 0; round < 2; ++round) {
        if (thread_index() == 0) {
          mbarrier_arrive_expect(barrier, 4);
          store_async(remote_address(shared, cluster_rank() ^ 1), round, remote_address(barrier, cluster_rank() ^ 1));
        }
        mbarrier_wait(barrier, round & 1);
        if (thread_index() == 40) value[cluster_rank()] = shared[0];
      }
      cluster_arrive();
      cluster_wait();
    });
  } else if (name == "grid") {  // the release comes before the value
    l = shape(32, 0, 2);
    l.cooperative = true;
    cuda_host::launch(l, [] {
      if (thread_index() != 0) return;
      if (block_x() == 0) {
        add_release(&flag, 1);
        value[0] = 1;
      } else {
        wait_until_at_least(&flag, 1);
        value[1] = value[0];
      }
    });
  } else {  // "none": the same with the value first
    l = shape(32, 0, 2);
    l.cooperative = true;
    cuda_host::launch(l, [] {
      if (thread_index() != 0) return;
      if (block_x() == 0) {
        value[0] = 1;
        add_release(&flag, 1);
      } else {
        wait_until_at_least(&flag, 1);
        value[1] = value[0];
      }
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string group = argc > 1 ? argv[1] : "";
  if (group == "instructions")
    instructions();
  else if (group == "misuse")
    misuse();
  else if (group == "race" && argc > 2)
    race(argv[2]);
  else
    return fprintf(stderr, "usage: test_engine instructions|misuse|race NAME\n"), 2;
  printf("%s: %d failures\n", group.c_str(), failures);
  return failures > 0;
}
