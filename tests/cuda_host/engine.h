// Runs a kernel on the CPU: every CUDA thread is a fibre (a stack of its own), and one scheduler on one CPU thread
// decides which runs until it next calls a function of csrc/cuda/device.h that concerns other threads.
//
// What hardware leaves open is chosen by a seed: which thread runs next, when asynchronous copies and stores arrive and
// in which order. What it leaves undefined is a Failure, as is a launch in which nobody can go on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace fused_rnn {
namespace cuda_host {

struct Launch {
  int grid_x = 1, grid_y = 1, grid_z = 1;
  int threads = 32;
  int cluster = 1;           // blocks of a cluster, along x
  size_t shared_bytes = 0;   // dynamic shared memory of a block
  bool cooperative = false;  // all blocks are resident together; otherwise few clusters are, and they start in turn
  uint64_t seed = 0;
};

// The report of a launch that went wrong: who waits for what, or what was misused where.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Returns when every thread of the grid has returned; throws Failure.
void launch(const Launch& launch, const std::function<void()>& kernel);

// A call in a kernel's source that waits for other threads or for memory.
struct Site {
  std::string function, file;
  int line;
};

// The sites met since the program started, each once. The one that the environment variable FRNN_SKIP_SITE names
// (file:line, without folders) is met without waiting, to show that a test notices.
std::vector<Site> sites();

}  // namespace cuda_host
}  // namespace fused_rnn
