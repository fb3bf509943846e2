// What advances one layer whose packed weights and states stay in memory from call to call: functions of one
// instruction set, for one cell and dtype (pass.h). They allocate nothing and cannot fail; whoever calls them gives the
// memory (stack.h), each block aligned to 64 bytes.
#pragma once

#include <cstddef>

#include "../cpu/byte_tiles.h"
#include "../problem.h"

namespace fused_rnn {

// Rows that a call advances. Row r of step t begins at data + t * time_stride + r * batch_stride.
struct StreamRows {
  int64_t steps = 1;
  int64_t rows = 1;
  Sequence x;                        // (I features); only read
  Sequence y;                        // (P features); not written where a row has no step
  const int64_t* slots = nullptr;    // (rows) which of the states each row has, no two the same
  int64_t first_slot = 0;            // where that is null: the first row's, the next ones following it
  const int64_t* lengths = nullptr;  // (rows) steps that each row has; null: all
  // Of step t (rows), at mask + t * mask_stride: 0 where a row has no such step; null: none.
  const uint8_t* mask = nullptr;
  int64_t mask_stride = 0;
  int64_t first_step = 0;  // number of the first one for lengths and mask
};

// What the sizes of its memory follow from, of one cell, dtype and instruction set.
struct StreamShape {
  int64_t gates, states;    // of the cell
  int64_t width;            // lanes of a vector of sums
  int64_t unit_vectors;     // vectors of units in a panel
  int64_t group;            // k's that one instruction multiplies
  int64_t element_bytes;    // of what is multiplied
  int64_t sum_bytes;        // of what it is summed in
  bool converts_x;          // inputs are not multiplied in their storage type
  int64_t row_scale_bytes;  // how a row was quantized
};

// Packed weights, and those that are used as they are.
struct StreamWeights {
  void *w_ih, *w_hh, *w_hr;
  void *input_bias, *hidden_bias, *gain_ih, *gain_hh, *zeros;
  void *peephole, *norm_c, *norm_c_bias;
  // Of int8 matrices, in the order of their columns: the scales, and sums over the columns.
  float *scale_ih, *scale_hh, *scale_hr;
  int32_t *sum_ih, *sum_hh, *sum_hr;
};

// Of each slot: h as it is multiplied; h itself, where that is kept apart; private states.
struct StreamStates {
  void *multiplied, *carried, *cells;
};

// Of nobody while no call runs, so that layers of one stack share it.
struct StreamWork {
  void *projected, *sums, *state_sums, *x, *hidden, *output_gate, *new_cell;
  void *x_rows, *state_rows, *hidden_rows;
  int64_t rows, step_rows;  // of all steps of a call and of one step, at most
  // Of int8 matrices: rows of quantized_stride bytes, their addresses, and how each was quantized.
  void *quantized, *quantized_rows, *row_scales;
  int64_t quantized_stride;
  bool by_dots;        // with instructions that multiply bytes
  ByteTiles by_tiles;  // and many rows on matrix tiles; null: not
};

// `layer`: sizes, weights of direction 0, options; its steps are one of one row.
struct StreamKernel {
  const char* isa;
  StreamShape shape;
  size_t object_bytes;  // of the layer's own record, which create() makes
  void (*pack)(const LayerForward& layer, const StreamWeights& weights);
  // `layer` must stay where it is.
  void (*create)(LayerForward& layer, const StreamWeights& weights, const StreamStates& states, const StreamWork& work,
                 void* object);
  // While denormal numbers are zero (../cpu/denormals.h).
  void (*advance)(void* object, const StreamRows& call);
};

}  // namespace fused_rnn
