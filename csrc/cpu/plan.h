// How the work of one layer is divided over threads: along directions, batch rows, and hidden units. Threads that share
// rows of one direction but split its units meet at a barrier in every step; the other splits need none.
#pragma once

#include "../problem.h"

namespace fused_rnn {

struct Plan {
  int direction_groups = 1;
  int row_groups = 1;
  int unit_groups = 1;
  double predicted_us = 0;
  double serial_us = 0;  // the same on one thread

  FRNN_HOST_DEVICE int threads() const { return direction_groups * row_groups * unit_groups; }
};

// A call of no more rows than this over all steps reads w_ih where it stands whatever else it is like; and w_hh, if it
// has few steps.
inline constexpr int64_t most_rows_in_place_of_any_size = 12;

// Whether a call reads its weights where they stand, because it has so few rows and steps that packing them would cost
// more than it saves (in_place.h). The same on any number of threads.
FRNN_EXPORT bool reads_weights_in_place(const LayerSizes& sizes, const Steps& steps);

// Whether a forward pass reads w_ih where it stands, at least: it is used for all steps at once, w_hh for one after the
// other.
FRNN_EXPORT bool reads_input_weights_in_place(const LayerSizes& sizes, const Steps& steps);

// How many neighbouring heads of H / heads units the kernels take for one, whose block of w_hh has zeros between
// theirs: the fewest whose units are whole vectors, all where no number that divides the heads has such.
inline int64_t heads_together(int64_t hidden_size, int64_t heads, int64_t vector_units) {
  const int64_t head_size = hidden_size / heads;
  int64_t together = 1;
  while (together < heads && (heads % together != 0 || together * head_size % vector_units != 0)) ++together;
  return together;
}

// `threads`: at most so many; `vector_bytes`: of the instruction set in use; `backward`: which pass; `from_zeros`:
// forward, the first step has no recurrent product.
Plan make_plan(const LayerSizes& sizes, const Steps& steps, int threads, int vector_bytes, bool backward,
               bool from_zeros = false);

// The time that a pass of a layer cannot go below on the threads of `plan`, by the constants of the cost model.
struct Bound {
  double us = 0;
  const char* by = "";  // what it takes that long for
};
Bound time_bound(const LayerSizes& sizes, const Steps& steps, const Plan& plan, int vector_bytes, bool backward);

// Gates of a cell: rows of its weights over the hidden size.
int gate_count(CellKind kind);

// Values that the forward pass saves per unit and step (0 for the plain recurrence). With layer normalisation also what
// is normalised of the input's side and of the state's.
int saved_gate_count(CellKind kind, bool layer_norm = false);

// Private states beside h: one of an LSTM, none of a GRU.
int private_states(CellKind kind);
inline bool has_cell_state(CellKind kind) { return private_states(kind) > 0; }

// Whether there is such a cell.
bool is_known(CellKind kind);

// First row of group `group` of `groups`, so that each group gets about the same number of live rows over all steps.
FRNN_EXPORT int64_t row_boundary(const Steps& steps, int group, int groups);

}  // namespace fused_rnn
