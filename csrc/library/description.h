// What a description of the C interface (include/fused_rnn.h) says, checked.
#pragma once

#include "../problem.h"
#include "fused_rnn.h"

namespace fused_rnn {

// What a cell is to those who describe it; the streams' own record of it (stream/kernels.h) is of an instruction set.
inline int64_t gates_of(int32_t cell) { return cell == FUSED_RNN_CELL_LSTM ? 4 : cell == FUSED_RNN_CELL_GRU ? 3 : 1; }

inline int64_t bytes_of(int32_t dtype) { return dtype == FUSED_RNN_FLOAT64 ? 8 : dtype == FUSED_RNN_FLOAT32 ? 4 : 2; }

inline int64_t heads_of(const fused_rnn_description& d) { return d.num_heads > 1 ? d.num_heads : 1; }

inline int64_t state_size_of(const fused_rnn_description& d) { return d.proj_size ? d.proj_size : d.hidden_size; }

// Writes a description into that of a program, which has set its struct_size and layer_size: as much of it as the
// program knows; what it knows beyond that is zero. An error, or 0: nothing is written.
int write_description(const fused_rnn_description& description, fused_rnn_description* to);

// The same of layers, for an array of records of layer_size bytes each.
void write_layers(const fused_rnn_layer* layers, int64_t count, uint32_t layer_size, fused_rnn_layer* to);

// A description of a program that may be older or newer than the library, as this version has it. Its sizes and options
// are checked, its layers and their weights are not. An error, or 0.
int read_description(const fused_rnn_description* given, fused_rnn_description& description);

// The layers, of `description` as read_description has it: whether each has the weights that it needs.
int read_layers(const fused_rnn_description& description, fused_rnn_layer* layers);

// The sizes and options of a layer; its weights are added by the caller.
LayerForward layer_of(const fused_rnn_description& description, int64_t index);

}  // namespace fused_rnn
