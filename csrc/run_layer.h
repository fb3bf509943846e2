// A pass of one layer on the CPU.
#pragma once

#include <ATen/Parallel.h>

#include <string>

#include "cpu/kernels.h"
#include "cpu/team.h"
#include "profile.h"

namespace fused_rnn {

// Whether the recurrent product of the first step is one of zeros, which is not computed.
inline bool begins_at_zero(const LayerForward& layer) {
  return layer.begins_at_zero(0) && (layer.sizes.num_directions == 1 || layer.begins_at_zero(1));
}
inline bool begins_at_zero(const LayerBackward&) { return false; }

// Runs a layer under the best plan, and once more on this thread alone where the team cannot be had.
template <class Layer, class Run>
void run_layer(const Layer& layer, Run run, bool backward) {
  const int bytes = kernels().vector_bytes;
  const int threads = team_is_late() ? 1 : usable_threads(at::get_num_threads());
  const Plan plan = make_plan(layer.sizes, layer.steps, threads, bytes, backward, begins_at_zero(layer));
  const Range range([&] {
    const int count = plan.threads();
    return describe_layer(layer.sizes, layer.steps, backward) + " " + kernels().isa + " " + std::to_string(count) +
           (count > 1 ? " threads" : " thread");
  });
  if (run(layer, plan)) return;
  TORCH_CHECK(plan.threads() > 1 && run(layer, make_plan(layer.sizes, layer.steps, 1, bytes, backward)),
              "fused_rnn: out of memory for packed weights and buffers");
}

}  // namespace fused_rnn
