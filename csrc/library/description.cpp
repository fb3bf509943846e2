#include "description.h"

#include <cstring>
#include <initializer_list>

namespace fused_rnn {

namespace {

// Bytes of the records of version 1.
constexpr size_t first_description = 120, first_layer = 104;
// No record will be as long; a program that says so has not set its size.
constexpr size_t longest_record = 4096;
static_assert(sizeof(fused_rnn_description) == first_description && sizeof(fused_rnn_layer) == first_layer,
              "a field was added: the first version's sizes stay as they are");

// Copies a record of which a program knows `given` bytes; what the library does not know of it must be zero.
int copy_record(void* to, size_t known, size_t first_version, const void* from, uint32_t given) {
  if (given < first_version || given > longest_record) return FUSED_RNN_ERROR_STRUCT_SIZE;
  std::memset(to, 0, known);
  std::memcpy(to, from, given < known ? given : known);
  for (size_t i = known; i < given; ++i) {
    if (static_cast<const char*>(from)[i] != 0) return FUSED_RNN_ERROR_NEWER;
  }
  return FUSED_RNN_OK;
}

static_assert(sizeof(void*) == 8, "the limits of fused_rnn.h keep sizes of 64 bits from overflowing");

bool are_sizes(uint32_t struct_size, uint32_t layer_size) {
  return struct_size >= first_description && struct_size <= longest_record && layer_size >= first_layer &&
         layer_size <= longest_record && layer_size % alignof(fused_rnn_layer) == 0;
}

void write_record(const void* from, size_t known, void* to, uint32_t wanted) {
  std::memset(to, 0, wanted);
  std::memcpy(to, from, wanted < known ? wanted : known);
}

bool is_flag(int32_t value) { return value == 0 || value == 1; }

bool is_activation(int32_t value) { return value >= 0 && value <= FUSED_RNN_IDENTITY; }

// False for NaN, too.
bool is_part(double value) { return value >= 0 && value <= 1; }

bool is_size(int64_t value) { return value >= 1 && value <= FUSED_RNN_MOST_FEATURES; }

bool has_lowest(const void* weights, int64_t count) { return std::memchr(weights, 0x80, size_t(count)) != nullptr; }

Activation activation_of(int32_t value, Activation own) { return value == 0 ? own : Activation(value - 1); }

}  // namespace

int write_description(const fused_rnn_description& description, fused_rnn_description* to) {
  if (!to) return FUSED_RNN_ERROR_RESULT_NULL;
  if (reinterpret_cast<uintptr_t>(to) % alignof(fused_rnn_description) != 0) return FUSED_RNN_ERROR_ALIGNMENT;
  const uint32_t struct_size = to->struct_size, layer_size = to->layer_size;
  if (!are_sizes(struct_size, layer_size)) return FUSED_RNN_ERROR_STRUCT_SIZE;
  fused_rnn_description own = description;
  own.struct_size = struct_size;
  own.layer_size = layer_size;
  write_record(&own, sizeof own, to, struct_size);
  return FUSED_RNN_OK;
}

void write_layers(const fused_rnn_layer* layers, int64_t count, uint32_t layer_size, fused_rnn_layer* to) {
  for (int64_t l = 0; l < count; ++l)
    write_record(layers + l, sizeof *layers, reinterpret_cast<char*>(to) + l * int64_t(layer_size), layer_size);
}

int read_description(const fused_rnn_description* given, fused_rnn_description& d) {
  if (!given) return FUSED_RNN_ERROR_DESCRIPTION_NULL;
  if (reinterpret_cast<uintptr_t>(given) % alignof(fused_rnn_description) != 0) return FUSED_RNN_ERROR_ALIGNMENT;
  if (const int error = copy_record(&d, sizeof d, first_description, given, given->struct_size)) return error;
  if (!are_sizes(d.struct_size, d.layer_size)) return FUSED_RNN_ERROR_STRUCT_SIZE;
  if (d.cell < FUSED_RNN_CELL_RNN || d.cell > FUSED_RNN_CELL_GRU) return FUSED_RNN_ERROR_CELL;
  if (d.dtype < FUSED_RNN_FLOAT32 || d.dtype > FUSED_RNN_BFLOAT16) return FUSED_RNN_ERROR_DTYPE;
  if (d.num_layers < 1 || d.num_layers > FUSED_RNN_MOST_LAYERS) return FUSED_RNN_ERROR_NUM_LAYERS;
  if (!is_size(d.input_size)) return FUSED_RNN_ERROR_INPUT_SIZE;
  if (!is_size(d.hidden_size)) return FUSED_RNN_ERROR_HIDDEN_SIZE;
  const bool is_lstm = d.cell == FUSED_RNN_CELL_LSTM;
  if (d.proj_size < 0 || d.proj_size >= d.hidden_size || (d.proj_size > 0 && !is_lstm))
    return FUSED_RNN_ERROR_PROJ_SIZE;
  if (d.num_heads < 0 || d.num_heads > d.hidden_size || d.hidden_size % heads_of(d) != 0 ||
      (d.num_heads > 1 && d.proj_size > 0))
    return FUSED_RNN_ERROR_NUM_HEADS;
  if (!is_activation(d.activation)) return FUSED_RNN_ERROR_ACTIVATION;
  if (!is_activation(d.recurrent_activation) || (d.cell == FUSED_RNN_CELL_RNN && d.recurrent_activation != 0))
    return FUSED_RNN_ERROR_RECURRENT_ACTIVATION;
  if (!is_flag(d.peephole) || (d.peephole && !is_lstm)) return FUSED_RNN_ERROR_PEEPHOLE;
  if (!is_flag(d.coupled_gates) || (d.coupled_gates && !is_lstm)) return FUSED_RNN_ERROR_COUPLED_GATES;
  if (!is_flag(d.layer_norm)) return FUSED_RNN_ERROR_LAYER_NORM;
  if (!(d.cell_clip >= 0) || (d.cell_clip > 0 && !is_lstm)) return FUSED_RNN_ERROR_CELL_CLIP;
  // Sums of 255 * 127 times as many products fit 32 bits.
  constexpr int64_t most_int8_features = 65536;
  if (d.matrix_format < 0 || d.matrix_format > FUSED_RNN_MATRIX_FLOAT16 ||
      (d.matrix_format != 0 && d.dtype != FUSED_RNN_FLOAT32) ||
      (d.matrix_format == FUSED_RNN_MATRIX_INT8 &&
       (d.input_size > most_int8_features || d.hidden_size > most_int8_features)))
    return FUSED_RNN_ERROR_MATRIX_FORMAT;
  if (!is_part(d.zoneout)) return FUSED_RNN_ERROR_ZONEOUT;
  if (!is_part(d.zoneout_cell) || (d.zoneout_cell > 0 && !is_lstm)) return FUSED_RNN_ERROR_ZONEOUT_CELL;
  return FUSED_RNN_OK;
}

int read_layers(const fused_rnn_description& d, fused_rnn_layer* layers) {
  if (!d.layers) return FUSED_RNN_ERROR_LAYERS_NULL;
  if (reinterpret_cast<uintptr_t>(d.layers) % alignof(fused_rnn_layer) != 0) return FUSED_RNN_ERROR_ALIGNMENT;
  const bool is_lstm = d.cell == FUSED_RNN_CELL_LSTM, normalises = d.layer_norm != 0;
  const uintptr_t misaligned = uintptr_t(bytes_of(d.dtype)) - 1;
  for (int64_t l = 0; l < d.num_layers; ++l) {
    fused_rnn_layer& w = layers[l];
    const char* from = reinterpret_cast<const char*>(d.layers) + l * int64_t(d.layer_size);
    if (const int error = copy_record(&w, sizeof w, first_layer, from, d.layer_size)) return error;
    if (!w.weight_ih) return FUSED_RNN_ERROR_WEIGHT_IH;
    if (!w.weight_hh) return FUSED_RNN_ERROR_WEIGHT_HH;
    const bool has_biases = w.bias_ih != nullptr;
    if (has_biases ? !w.bias_hh && d.cell == FUSED_RNN_CELL_GRU : w.bias_hh != nullptr) return FUSED_RNN_ERROR_BIAS;
    // All layers have biases, or none, as in torch.nn.
    if (has_biases != (layers[0].bias_ih != nullptr) || (w.bias_hh != nullptr) != (layers[0].bias_hh != nullptr))
      return FUSED_RNN_ERROR_BIAS;
    if ((w.weight_hr != nullptr) != (d.proj_size > 0)) return FUSED_RNN_ERROR_WEIGHT_HR;
    if ((w.weight_peephole != nullptr) != (d.peephole != 0)) return FUSED_RNN_ERROR_WEIGHT_PEEPHOLE;
    if ((w.weight_norm_ih != nullptr) != normalises || (w.weight_norm_hh != nullptr) != normalises ||
        (w.weight_norm_c != nullptr) != (normalises && is_lstm) ||
        (w.bias_norm_c != nullptr) != (normalises && is_lstm && has_biases))
      return FUSED_RNN_ERROR_NORM;
    for (const void* p : {w.bias_ih, w.bias_hh, w.weight_peephole, w.weight_norm_ih, w.weight_norm_hh, w.weight_norm_c,
                          w.bias_norm_c}) {
      if (reinterpret_cast<uintptr_t>(p) & misaligned) return FUSED_RNN_ERROR_WEIGHT_ALIGNMENT;
    }
    for (const void* p : {w.weight_ih, w.weight_hh, w.weight_hr}) {
      if (reinterpret_cast<uintptr_t>(p) & (uintptr_t(matrix_bytes_of(d)) - 1)) return FUSED_RNN_ERROR_WEIGHT_ALIGNMENT;
    }
    const bool scaled = d.matrix_format == FUSED_RNN_MATRIX_INT8;
    if ((w.scale_ih != nullptr) != scaled || (w.scale_hh != nullptr) != scaled ||
        (w.scale_hr != nullptr) != (scaled && d.proj_size > 0))
      return FUSED_RNN_ERROR_SCALES;
    for (const void* p : {w.scale_ih, w.scale_hh, w.scale_hr}) {
      if (reinterpret_cast<uintptr_t>(p) % alignof(float) != 0) return FUSED_RNN_ERROR_SCALES;
    }
    if (!scaled) continue;
    // Two products with -128 do not fit the 16 bits in which some processors sum them.
    const int64_t H = d.hidden_size, P = state_size_of(d), rows = gates_of(d.cell) * H;
    if (has_lowest(w.weight_ih, rows * (l == 0 ? d.input_size : P)) ||
        has_lowest(w.weight_hh, rows * P / heads_of(d)) || (w.weight_hr && has_lowest(w.weight_hr, P * H)))
      return FUSED_RNN_ERROR_INT8_RANGE;
  }
  return FUSED_RNN_OK;
}

LayerForward layer_of(const fused_rnn_description& d, int64_t index) {
  LayerForward layer;
  LayerSizes& s = layer.sizes;
  s.kind = d.cell == FUSED_RNN_CELL_LSTM  ? CellKind::lstm
           : d.cell == FUSED_RNN_CELL_GRU ? CellKind::gru
                                          : CellKind::rnn_tanh;
  s.dtype = d.dtype == FUSED_RNN_FLOAT64   ? DType::float64
            : d.dtype == FUSED_RNN_FLOAT32 ? DType::float32
                                           : DType::bfloat16;
  s.input_size = index == 0 ? d.input_size : state_size_of(d);
  s.hidden_size = d.hidden_size;
  s.state_size = state_size_of(d);
  s.heads = heads_of(d);
  s.layer_norm = d.layer_norm != 0;
  s.format = WeightFormat(d.matrix_format);
  Within& w = layer.within;
  w.activation = activation_of(d.activation, Activation::tanh);
  w.recurrent_activation = activation_of(d.recurrent_activation, Activation::sigmoid);
  w.peephole = d.peephole != 0;
  w.coupled_gates = d.coupled_gates != 0;
  w.num_heads = heads_of(d);
  w.layer_norm = d.layer_norm != 0;
  w.cell_clip = d.cell_clip;
  w.zoneout = d.zoneout;
  w.zoneout_cell = d.zoneout_cell;
  layer.plain_gates = w.activation == Activation::tanh && w.recurrent_activation == Activation::sigmoid &&
                      !w.peephole && !w.coupled_gates && !w.layer_norm && w.cell_clip == 0 && w.zoneout == 0 &&
                      w.zoneout_cell == 0;
  layer.inference = true;
  return layer;
}

}  // namespace fused_rnn
