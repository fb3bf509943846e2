// Cells of somebody's own: kernels that were compiled elsewhere, from the same headers, and are added to this process
// by a number that takes the place of their kind. They are for one instruction set each.
#pragma once

#include "../problem.h"
#include "plan.h"

namespace fused_rnn {

// What both sides must agree on.
inline constexpr uint64_t sizes_of_layers = uint64_t(sizeof(LayerForward)) << 32 | sizeof(LayerBackward);

struct CustomCell {
  uint64_t sizes;
  CellKind kind;
  const char* isa;
  int gates, saved, states;  // as in cells/cell.h
  bool (*forward)(const LayerForward& layer, const Plan& plan);
  bool (*backward)(const LayerBackward& layer, const Plan& plan);
};

inline constexpr int most_custom_gates = 6;

// Whoever has added a cell before, of the same kind and instruction set, keeps it. False: there is no more room.
bool add_custom_cell(const CustomCell* cell);

// The cell of this kind for the instruction set in use, or else for any that was added; null: there is none.
const CustomCell* custom_cell(CellKind kind);

inline bool is_custom(CellKind kind) { return kind >= CellKind::custom; }

}  // namespace fused_rnn
