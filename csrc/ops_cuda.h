// What bindings.cpp tells of the CUDA operators, where they are built.
#pragma once

#include "cuda/plan.h"

namespace fused_rnn {

// Read once per device; an error is raised as torch raises its own.
const cuda::DeviceInfo& device_info(int index);

// Whether torch's flags let float32 RNNs compute in TF32.
bool tf32_allowed();

// The plan that a call follows on this device, Variant::none for a launch a step; `options`: with those that kernels of
// all steps may have.
const cuda::Plan& cuda_plan(const LayerSizes& sizes, const Steps& steps, int device, bool backward, bool tf32,
                            bool options);

// How such layers, each the input of the next, run in wavefronts; Plan::layers is 1 where they do not.
const cuda::Plan& cuda_wavefront(const LayerSizes& sizes, int64_t layers, const Steps& steps, int device, bool backward,
                                 bool tf32);

// Persistent variants that may be chosen, for measurements and tests; returns what was set before. For all threads.
cuda::Allowed allow_variants(const cuda::Allowed& allowed);

}  // namespace fused_rnn
