// Kernels of cells of somebody's own, a launch a step: compiled elsewhere, by nvcc and from the same headers
// (custom_kernels.cuh), and added to this process, each for one dtype and one architecture. What the cell is like the
// process has been told before (cpu/custom.h).
#pragma once

#include <cstddef>
#include <initializer_list>

#include "../cells/cell.h"
#include "cuda.h"

namespace fused_rnn {
namespace cuda {

// What both sides must agree on: 12 bits for each record.
constexpr uint64_t sizes_of_steps() {
  uint64_t sizes = 0;
  for (const std::size_t size :
       {sizeof(StepForward), sizeof(StepBackward), sizeof(ForwardOptions), sizeof(BackwardOptions), sizeof(Within)})
    sizes = sizes << 12 | size;
  return sizes;
}

struct CustomKernels {
  uint64_t sizes;
  CellKind kind;
  DType dtype;
  int arch;  // DeviceInfo::arch
  // As in cells/cell.h.
  int gates, saved, states, grad_gates;
  GateGrads input_grads, hidden_grads;
  // step_forward and step_backward, and where `options` is not null those with options.
  const char* (*forward)(int64_t hidden_size, const StepForward* directions, const ForwardOptions* options,
                         const Within& within, int count, void* stream);
  const char* (*backward)(int64_t hidden_size, const StepBackward* directions, const BackwardOptions* options,
                          const Within& within, int count, void* stream);
};

// Whoever has added kernels of the same kind, dtype and architecture before keeps its place. False: there is no more
// room.
bool add_custom_kernels(const CustomKernels* kernels);

// Adds the kernels of a cell for a dtype and an architecture, or throws.
using CustomCompiler = void (*)(CellKind kind, DType dtype, int arch);
void set_custom_compiler(CustomCompiler compiler);

// Those that were added, or else what the compiler adds; null: there are none.
const CustomKernels* custom_kernels(CellKind kind, DType dtype, int arch);

}  // namespace cuda
}  // namespace fused_rnn
