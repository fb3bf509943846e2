// What advances one layer whose packed weights and states stay in memory from call to call: functions of one
// instruction set, for one cell and dtype (pass.h). They allocate nothing and cannot fail; whoever calls them gives the
// memory (stack.h), each block aligned to 64 bytes.
#pragma once

#include <cstddef>

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
  int64_t first_step = 0;            // number of the first one for lengths
};

// What a layer works in.
struct StreamMemory {
  void* weights = nullptr;  // as pack() left them; only read
  void* states = nullptr;
  void* work = nullptr;   // of nobody while no call runs, so that layers of one stack share it
  int64_t slots = 0;      // states
  int64_t rows = 0;       // rows of all steps of a call, at most
  int64_t step_rows = 0;  // rows of one step, at most
};

// `layer`: sizes, weights of direction 0, options; within its steps and sequences nothing counts.
struct StreamKernel {
  const char* isa;
  size_t object_bytes;  // of the layer's own record, which create() makes
  size_t (*weight_bytes)(const LayerForward& layer);
  // All bytes are written, so that equal weights are equal bytes.
  void (*pack)(const LayerForward& layer, void* weights);
  size_t (*state_bytes)(const LayerForward& layer, int64_t slots);
  size_t (*work_bytes)(const LayerForward& layer, int64_t rows, int64_t step_rows);
  // `layer` must stay where it is; its weights become those of the packed ones that are used as they are. States are
  // zeros.
  void (*create)(LayerForward& layer, const StreamMemory& memory, void* object);
  // In a task of run_team (../cpu/team.h), where denormal numbers are zero.
  void (*advance)(void* object, const StreamRows& call);
  // h (P) in the layer's dtype and c (states * H): in that, too, or, `exact`, as it is kept, in the accumulation
  // dtype. Null c: none. For write() null is zeros.
  void (*read)(const void* object, int64_t slot, void* h, void* c, bool exact);
  void (*write)(void* object, int64_t slot, const void* h, const void* c, bool exact);
};

}  // namespace fused_rnn
