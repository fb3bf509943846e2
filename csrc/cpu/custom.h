// Cells of somebody's own: a number takes the place of their kind. What the kind is like is told once; its kernels are
// compiled elsewhere, from the same headers, and added to this process, each for one instruction set and dtype, when a
// call wants them.
#pragma once

#include "../problem.h"
#include "plan.h"

namespace fused_rnn {

struct CustomCell {
  CellKind kind;
  int gates, saved, states;  // as in cells/cell.h
};

// What both sides must agree on.
inline constexpr uint64_t sizes_of_layers = uint64_t(sizeof(LayerForward)) << 32 | sizeof(LayerBackward);

struct CustomKernels {
  uint64_t sizes;
  CellKind kind;
  const char* isa;
  DType dtype;
  bool (*forward)(const LayerForward& layer, const Plan& plan);
  bool (*backward)(const LayerBackward& layer, const Plan& plan);
};

inline constexpr int most_custom_gates = 6;

// Whoever has added a cell, or kernels, before, of the same kind, instruction set and dtype, keeps its place. False:
// there is no more room.
bool add_custom_cell(const CustomCell& cell);
bool add_custom_kernels(const CustomKernels* kernels);

// Null: there is none of this kind.
const CustomCell* custom_cell(CellKind kind);

// Adds the kernels of a cell for the instruction set in use and a dtype, or throws.
using CustomCompiler = void (*)(CellKind kind, DType dtype);
void set_custom_compiler(CustomCompiler compiler);

// The kernels of a cell for the instruction set in use: those that were added, or else what the compiler adds; null:
// there are none.
const CustomKernels* custom_kernels(CellKind kind, DType dtype);

inline bool is_custom(CellKind kind) { return kind >= CellKind::custom; }

}  // namespace fused_rnn
