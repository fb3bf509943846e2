// The passes of one cell in one dtype (layer_kernels.cpp), of which a program (layers.cpp) is linked with some.
#pragma once

#include "cpu/plan.h"
#include "problem.h"

struct LayerKernels {
  const char* isa;
  fused_rnn::CellKind kind;
  fused_rnn::DType dtype;
  bool (*forward)(const fused_rnn::LayerForward& layer, const fused_rnn::Plan& plan);
  bool (*backward)(const fused_rnn::LayerBackward& layer, const fused_rnn::Plan& plan);
  const LayerKernels* next = nullptr;
};

// Those that are linked in.
inline const LayerKernels*& first_kernels() {
  static const LayerKernels* first = nullptr;
  return first;
}
