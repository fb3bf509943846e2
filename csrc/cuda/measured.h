// Constants of the planner's cost model, which decide between variants and divisions of the batch.
//
// tools/gpu_constants.py writes this file anew from what a GPU run measured (`make gpu`): a value, where it is from
// ("guess": data sheets and published microbenchmarks; "calculated": from the cycles of a step that
// tools/cuda_cycles.py finds in machine code), what it means. What no run has measured keeps its value. Cycles and
// bytes per cycle are those of one SM.
#pragma once

namespace fused_rnn {
namespace cuda {
namespace measured {

// clang-format off
constexpr double shared_bytes_per_cycle = 128;  // guess; of shared memory
constexpr double remote_bytes_per_cycle = 14;  // guess; into one SM from the others of its cluster
constexpr double l2_bytes_per_cycle = 32;  // guess; into one SM
constexpr double remote_cycles = 350;  // guess; from the last store to the receivers' next instruction
constexpr double cluster_barrier_cycles = 500;  // guess; the same with a barrier of the cluster
constexpr double memory_cycles = 2153;  // calculated (tools/cuda_cycles.py); the same through L2: stores, counter, waiting thread, copy
constexpr double multiply_cycles = 6.5;  // guess; between two m16n8k16 (TF32: m16n8k8) of a scheduler, on sm_90 and sm_100
constexpr double gates_cycles = 805.1;  // calculated (tools/cuda_cycles.py); of a forward step, beside products and the way: barriers, sums, gates, sends
constexpr double backward_gates_cycles = 929.8;  // calculated (tools/cuda_cycles.py); the same of a backward step
constexpr double issue_cycles = 150;  // guess; of the same, what cannot overlap with other column tiles
constexpr double step_launch_us = 5;  // guess; product and kernel of a step of its own
constexpr double l2_bytes_per_us = 3.5e6;  // guess; of weights read again every step
constexpr double memory_bytes_per_us = 2.5e6;  // guess; the same where L2 does not hold them
constexpr double launch_us = 6;  // guess; of a kernel
constexpr double load_bytes_per_us = 0.02e6;  // guess; of W_hh into one block
// clang-format on

}  // namespace measured
}  // namespace cuda
}  // namespace fused_rnn
