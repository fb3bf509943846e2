#define FUSED_RNN_BUILDS_LIBRARY
#include "fused_rnn.h"

const char* fused_rnn_error_text(int error) {
  switch (error) {
    case FUSED_RNN_OK: return "no error";
    case FUSED_RNN_ERROR_DESCRIPTION_NULL: return "description: expected one, got null";
    case FUSED_RNN_ERROR_STRUCT_SIZE:
      return "struct_size, layer_size: expected sizeof(fused_rnn_description) and sizeof(fused_rnn_layer)";
    case FUSED_RNN_ERROR_NEWER:
      return "description: a field is set that this version of the library does not know; it is older than the header";
    case FUSED_RNN_ERROR_LAYERS_NULL: return "layers: expected an array, got null";
    case FUSED_RNN_ERROR_CELL: return "cell: expected one of FUSED_RNN_CELL_RNN, _LSTM and _GRU";
    case FUSED_RNN_ERROR_DTYPE: return "dtype: expected one of FUSED_RNN_FLOAT32, _FLOAT64 and _BFLOAT16";
    case FUSED_RNN_ERROR_NUM_LAYERS: return "num_layers: expected 1 to FUSED_RNN_MOST_LAYERS (64)";
    case FUSED_RNN_ERROR_INPUT_SIZE: return "input_size: expected 1 to FUSED_RNN_MOST_FEATURES (1048576)";
    case FUSED_RNN_ERROR_HIDDEN_SIZE: return "hidden_size: expected 1 to FUSED_RNN_MOST_FEATURES (1048576)";
    case FUSED_RNN_ERROR_PROJ_SIZE: return "proj_size: expected 0, or of an LSTM less than hidden_size";
    case FUSED_RNN_ERROR_NUM_HEADS: return "num_heads: expected a divisor of hidden_size, and 1 with proj_size";
    case FUSED_RNN_ERROR_ACTIVATION: return "activation: expected 0 or one from FUSED_RNN_TANH to FUSED_RNN_IDENTITY";
    case FUSED_RNN_ERROR_RECURRENT_ACTIVATION:
      return "recurrent_activation: expected 0 or one from FUSED_RNN_TANH to FUSED_RNN_IDENTITY, and 0 for an RNN, "
             "which "
             "has no gates";
    case FUSED_RNN_ERROR_PEEPHOLE: return "peephole: expected 0, or 1 for an LSTM";
    case FUSED_RNN_ERROR_COUPLED_GATES: return "coupled_gates: expected 0, or 1 for an LSTM";
    case FUSED_RNN_ERROR_LAYER_NORM: return "layer_norm: expected 0 or 1";
    case FUSED_RNN_ERROR_CELL_CLIP: return "cell_clip: expected 0, or of an LSTM a number above 0";
    case FUSED_RNN_ERROR_ZONEOUT: return "zoneout: expected a number from 0 to 1";
    case FUSED_RNN_ERROR_ZONEOUT_CELL: return "zoneout_cell: expected 0, or of an LSTM a number from 0 to 1";
    case FUSED_RNN_ERROR_INSTRUCTION_SET:
      return "instruction_set: expected one that this library was compiled with and that runs on this processor";
    case FUSED_RNN_ERROR_WEIGHT_IH: return "weight_ih: expected the weights of each layer, got null";
    case FUSED_RNN_ERROR_WEIGHT_HH: return "weight_hh: expected the weights of each layer, got null";
    case FUSED_RNN_ERROR_BIAS:
      return "bias_ih, bias_hh: expected both, none, or bias_ih alone where the cell is no GRU, alike in all layers";
    case FUSED_RNN_ERROR_WEIGHT_HR: return "weight_hr: expected the weights of each layer with proj_size, else null";
    case FUSED_RNN_ERROR_WEIGHT_PEEPHOLE:
      return "weight_peephole: expected the weights of each layer with peephole, else null";
    case FUSED_RNN_ERROR_NORM:
      return "weight_norm_ih, weight_norm_hh, weight_norm_c, bias_norm_c: expected with layer_norm the first two, "
             "those "
             "of c for an LSTM, and the last where there are biases; else null";
    case FUSED_RNN_ERROR_MATRIX_FORMAT:
      return "matrix_format: expected 0, or with float32 FUSED_RNN_MATRIX_INT8, ..._BFLOAT16 or ..._FLOAT16 and, for "
             "int8, at most 65536 features";
    case FUSED_RNN_ERROR_INT8_RANGE: return "int8 range: expected weights from -127 to 127, got -128";
    case FUSED_RNN_ERROR_SCALES:
      return "scales: expected scale_ih, scale_hh and, with a projection, scale_hr of int8 matrices, aligned, and none "
             "of others";
    case FUSED_RNN_ERROR_WEIGHT_ALIGNMENT: return "layers: expected weights that are aligned to their elements";
    case FUSED_RNN_ERROR_RESULT_NULL: return "the argument that takes the result: expected an address, got null";
    case FUSED_RNN_ERROR_MEMORY_NULL: return "memory: expected an address with this size; null goes with size 0";
    case FUSED_RNN_ERROR_MEMORY_ALIGNMENT: return "memory: expected an address aligned to FUSED_RNN_ALIGNMENT (64)";
    case FUSED_RNN_ERROR_MEMORY_SIZE:
      return "size: expected as many bytes as the _memory_size function says, got fewer";
    case FUSED_RNN_ERROR_OUT_OF_MEMORY: return "out of memory";
    case FUSED_RNN_ERROR_WEIGHTS:
      return "weights: expected what fused_rnn_weights_create has made and nobody destroyed";
    case FUSED_RNN_ERROR_STREAM: return "stream: expected what fused_rnn_stream_create has made and nobody destroyed";
    case FUSED_RNN_ERROR_ROWS: return "rows: expected 1 to FUSED_RNN_MOST_ROWS (16777216)";
    case FUSED_RNN_ERROR_X_NULL: return "x: expected an address, got null";
    case FUSED_RNN_ERROR_Y_NULL: return "y: expected an address, got null";
    case FUSED_RNN_ERROR_ALIGNMENT: return "an argument: expected an address aligned to its elements";
    case FUSED_RNN_ERROR_OVERLAP:
      return "y: expected memory of its own, got some of x, which is read after y is written; only a step of up to 64 "
             "rows may share it";
    case FUSED_RNN_ERROR_STEPS: return "steps: expected 1 to FUSED_RNN_MOST_STEPS (4294967296)";
    case FUSED_RNN_ERROR_LENGTHS: return "lengths: expected numbers from 0 to steps";
    case FUSED_RNN_ERROR_LAYER: return "layer: expected 0 to num_layers - 1";
    case FUSED_RNN_ERROR_ROW: return "row: expected 0 to rows - 1, or for fused_rnn_reset -1";
    case FUSED_RNN_ERROR_STATE: return "c: expected null, for only an LSTM has a cell state";
    case FUSED_RNN_ERROR_IN_USE: return "stream: expected one thread at a time, got a call while another one is in one";
    case FUSED_RNN_ERROR_CHOSEN: return "count, chosen: expected 1 to rows different numbers from 0 to rows - 1";
    case FUSED_RNN_ERROR_PATH_NULL: return "path: expected a text, got null";
    case FUSED_RNN_ERROR_FILE_OPEN: return "path: the file cannot be opened";
    case FUSED_RNN_ERROR_FILE_READ: return "path: the file cannot be read";
    case FUSED_RNN_ERROR_DATA_NULL: return "data: expected an address, got null";
    case FUSED_RNN_ERROR_DATA_ALIGNMENT: return "data: expected an address aligned to 8 bytes";
    case FUSED_RNN_ERROR_FILE_SIZE: return "file: it is shorter than it says, or than its header";
    case FUSED_RNN_ERROR_FILE_HEADER: return "file: its header is not one that fused_rnn.save_weights writes";
    case FUSED_RNN_ERROR_FILE_METADATA:
      return "file: its header does not describe a stack of layers; expected one that fused_rnn.save_weights has "
             "written";
    case FUSED_RNN_ERROR_FILE_VERSION: return "file: it is of another version of the format than the library reads";
    case FUSED_RNN_ERROR_FILE_TENSOR_NAME: return "file: it has a tensor that the layers do not have";
    case FUSED_RNN_ERROR_FILE_TENSOR_TWICE: return "file: it names a tensor twice";
    case FUSED_RNN_ERROR_FILE_TENSOR_MISSING: return "file: a tensor of the layers is missing";
    case FUSED_RNN_ERROR_FILE_TENSOR_DTYPE: return "file: a tensor has another dtype than the layers";
    case FUSED_RNN_ERROR_FILE_TENSOR_SHAPE: return "file: a tensor has another shape than the layers need";
    case FUSED_RNN_ERROR_FILE_OFFSETS:
      return "file: its tensors do not stand in its data side by side, without gaps, each as long as its shape says";
    case FUSED_RNN_ERROR_CAPACITY: return "layers, capacity: expected an array with room for all layers of the file";
    default: return "unknown error";
  }
}

uint32_t fused_rnn_abi_version(void) { return FUSED_RNN_ABI_VERSION; }
