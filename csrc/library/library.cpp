// The C interface over csrc/stream/stack.h: arguments are checked, memory is divided, nothing is computed here.
#define FUSED_RNN_BUILDS_LIBRARY
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../cpu/kernels.h"
#include "../cpu/team.h"
#include "../stream/stack.h"
#include "description.h"
#include "fused_rnn.h"

using namespace fused_rnn;

// What stands first in the memory of each object. magic: whose bits nothing else is likely to have there, so that a
// pointer to something else, or to what was destroyed, gets an error.
struct fused_rnn_weights {
  uint64_t magic;
  bool is_own;  // the library allocated it
  fused_rnn_description description;
  const char* isa;
  PackedStack* packed;
};

struct fused_rnn_stream {
  uint64_t magic;
  bool is_own;
  const fused_rnn_weights* weights;
  StackStates* states;
  int64_t rows, input_size, state_size, element_bytes;
  uint64_t calls;     // of fused_rnn_step_rows
  uint64_t* last_in;  // (rows) in which of them a row was chosen
};

namespace {

constexpr uint64_t weights_magic = 0x7374686769657752u, stream_magic = 0x6d61657274736652u;

bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes) == 0; }

template <class Object>
bool is_object(const Object* object, uint64_t magic) {
  return object && is_aligned(object, FUSED_RNN_ALIGNMENT) && object->magic == magic;
}

bool is_weights(const fused_rnn_weights* weights) { return is_object(weights, weights_magic); }
bool is_stream(const fused_rnn_stream* stream) { return is_object(stream, stream_magic); }

// A description in all its parts: what PackedStack is made of.
struct Request {
  fused_rnn_description description;
  fused_rnn_layer weights[FUSED_RNN_MOST_LAYERS];
  LayerForward layers[FUSED_RNN_MOST_LAYERS];
  const KernelTable* kernels;
  // Where heads are no whole vectors of units, kernels get w_hh in larger blocks, with zeros between the heads in each.
  int64_t heads_in_block;

  int64_t count() const { return description.num_layers; }

  int read(const fused_rnn_description* given, bool has_weights) {
    if (const int error = read_description(given, description)) return error;
    if (has_weights) {
      if (const int error = read_layers(description, weights)) return error;
    }
    kernels = description.instruction_set ? find_kernels(description.instruction_set) : &fused_rnn::kernels();
    if (!kernels) return FUSED_RNN_ERROR_INSTRUCTION_SET;
    const int64_t accumulated = description.dtype == FUSED_RNN_FLOAT64 ? 8 : 4;
    heads_in_block =
        heads_together(description.hidden_size, heads_of(description), kernels->vector_bytes / accumulated);
    for (int64_t l = 0; l < count(); ++l) {
      layers[l] = layer_of(description, l);
      LayerSizes& s = layers[l].sizes;
      s.heads /= heads_in_block;
      // Whether there is a projection is what sizes need to know of the weights, and of options whose vectors are kept.
      Weights& w = layers[l].direction[0].weights;
      w.w_hr = description.proj_size ? &description : nullptr;
      w.peephole = description.peephole ? &description : nullptr;
      if (description.layer_norm && description.cell == FUSED_RNN_CELL_LSTM) w.norm_c = w.norm_c_bias = &description;
    }
    return FUSED_RNN_OK;
  }

  int64_t block_columns() const { return state_size_of(description) / heads_of(description) * heads_in_block; }
  int64_t gate_rows() const { return gates_of(description.cell) * description.hidden_size; }

  // Parts of the memory of weights, in this order.
  struct Parts {
    void *object, *packed;
    char* blocks;  // (L, G * H, columns of a block), where heads are not whole vectors
    char* zeros;   // (G * H), in place of bias_hh where there is none
    size_t bytes;
  };
  Parts divide(void* memory) const {
    const size_t element = size_t(bytes_of(description.dtype));
    const size_t packed_bytes = PackedStack::bytes_for(*kernels, layers, count());
    Layout layout(memory);
    Parts parts;
    parts.object = layout.take<fused_rnn_weights>(1);
    parts.packed = layout.take<char>(int64_t(packed_bytes));
    const int64_t of_blocks = heads_in_block > 1 ? count() * gate_rows() * block_columns() : 0;
    parts.blocks = layout.take<char>(of_blocks * int64_t(element));
    parts.zeros = layout.take<char>(gate_rows() * int64_t(element));
    parts.bytes = layout.used();
    return parts;
  }

  // The weights themselves, as kernels take them.
  void fill(const Parts& parts) {
    const int64_t element = bytes_of(description.dtype);
    std::memset(parts.zeros, 0, size_t(gate_rows() * element));
    for (int64_t l = 0; l < count(); ++l) {
      const fused_rnn_layer& from = weights[l];
      Weights& w = layers[l].direction[0].weights;
      w = Weights();
      w.w_ih = from.weight_ih;
      w.w_hh = from.weight_hh;
      if (heads_in_block > 1) {
        char* blocks = parts.blocks + l * gate_rows() * block_columns() * element;
        spread_heads(static_cast<const char*>(from.weight_hh), blocks, element);
        w.w_hh = blocks;
      }
      w.b_ih = from.bias_ih;
      w.b_hh = from.bias_ih && !from.bias_hh ? parts.zeros : from.bias_hh;
      w.w_hr = from.weight_hr;
      w.peephole = from.weight_peephole;
      w.norm_ih = from.weight_norm_ih;
      w.norm_hh = from.weight_norm_hh;
      w.norm_c = from.weight_norm_c;
      w.norm_c_bias = from.bias_norm_c;
    }
  }

  // (G * H, K) of heads, to (G * H, K * heads in a block): a row's columns go where its head stands in the block.
  void spread_heads(const char* from, char* to, int64_t element) const {
    const int64_t K = state_size_of(description) / heads_of(description), columns = block_columns();
    std::memset(to, 0, size_t(gate_rows() * columns * element));
    for (int64_t row = 0; row < gate_rows(); ++row) {
      const int64_t head = row % description.hidden_size / K % heads_in_block;
      std::memcpy(to + (row * columns + head * K) * element, from + row * K * element, size_t(K * element));
    }
  }
};

// Memory for an object of so many bytes: the caller's, or, for null and 0, the library's own.
int take_memory(void*& memory, size_t size, size_t needed, bool& is_own) {
  is_own = !memory && size == 0;
  if (is_own) {
    memory = large_memory(needed);
    return memory ? FUSED_RNN_OK : FUSED_RNN_ERROR_OUT_OF_MEMORY;
  }
  if (!memory) return FUSED_RNN_ERROR_MEMORY_NULL;
  if (!is_aligned(memory, FUSED_RNN_ALIGNMENT)) return FUSED_RNN_ERROR_MEMORY_ALIGNMENT;
  return size < needed ? FUSED_RNN_ERROR_MEMORY_SIZE : FUSED_RNN_OK;
}

// Parts of the memory of a stream, in this order.
struct StreamParts {
  void *object, *last_in, *states;
  size_t bytes;

  StreamParts(void* memory, const PackedStack& packed, int64_t rows) {
    Layout layout(memory);
    object = layout.take<fused_rnn_stream>(1);
    last_in = layout.take<uint64_t>(rows);
    states = layout.take<char>(int64_t(StackStates::bytes_for(packed, rows, rows)));
    bytes = layout.used();
  }
};

bool is_rows(int64_t rows) { return rows >= 1 && rows <= FUSED_RNN_MOST_ROWS; }

bool overlap(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  const uintptr_t x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
  return x < y + uintptr_t(b_bytes) && y < x + uintptr_t(a_bytes);
}

// Advances a checked call, if nobody else is in one.
int advance(fused_rnn_stream* stream, const StreamRows& call) {
  if (!stream->states->enter()) return FUSED_RNN_ERROR_IN_USE;
  stream->states->advance(call);
  stream->states->leave();
  return FUSED_RNN_OK;
}

// rows: of all steps.
int check_io(const fused_rnn_stream* stream, int64_t rows, const void* x, const void* y, bool may_share) {
  if (!x) return FUSED_RNN_ERROR_X_NULL;
  if (!y) return FUSED_RNN_ERROR_Y_NULL;
  const int64_t element = stream->element_bytes;
  if (!is_aligned(x, element) || !is_aligned(y, element)) return FUSED_RNN_ERROR_ALIGNMENT;
  if (!may_share && overlap(x, rows * stream->input_size * element, y, rows * stream->state_size * element))
    return FUSED_RNN_ERROR_OVERLAP;
  return FUSED_RNN_OK;
}

int check_state(const fused_rnn_stream* stream, int64_t layer, int64_t row, const void* h, const void* c) {
  if (!is_stream(stream)) return FUSED_RNN_ERROR_STREAM;
  if (layer < 0 || layer >= stream->states->num_layers()) return FUSED_RNN_ERROR_LAYER;
  if (row < 0 || row >= stream->rows) return FUSED_RNN_ERROR_ROW;
  if (c && stream->weights->description.cell != FUSED_RNN_CELL_LSTM) return FUSED_RNN_ERROR_STATE;
  const int64_t of_c = stream->element_bytes == 8 ? 8 : 4;
  if (!is_aligned(h, stream->element_bytes) || !is_aligned(c, of_c)) return FUSED_RNN_ERROR_ALIGNMENT;
  return FUSED_RNN_OK;
}

}  // namespace

int fused_rnn_weights_memory_size(const fused_rnn_description* description, size_t* size) {
  if (!size) return FUSED_RNN_ERROR_RESULT_NULL;
  Request request;
  if (const int error = request.read(description, false)) return error;
  *size = request.divide(nullptr).bytes;
  return FUSED_RNN_OK;
}

int fused_rnn_weights_create(const fused_rnn_description* description, void* memory, size_t size,
                             fused_rnn_weights** weights) {
  if (!weights) return FUSED_RNN_ERROR_RESULT_NULL;
  Request request;
  if (const int error = request.read(description, true)) return error;
  bool is_own = false;
  if (const int error = take_memory(memory, size, request.divide(nullptr).bytes, is_own)) return error;
  const Request::Parts parts = request.divide(memory);
  request.fill(parts);
  fused_rnn_weights* made = new (parts.object) fused_rnn_weights();
  made->is_own = is_own;
  made->description = request.description;
  made->description.layers = nullptr;
  made->description.instruction_set = made->isa = request.kernels->isa;
  made->packed = PackedStack::place(parts.packed, *request.kernels, request.layers, request.count());
  made->magic = weights_magic;
  *weights = made;
  return FUSED_RNN_OK;
}

void fused_rnn_weights_destroy(fused_rnn_weights* weights) {
  if (!is_weights(weights)) return;
  weights->magic = 0;
  if (weights->is_own) std::free(weights);
}

int fused_rnn_weights_describe(const fused_rnn_weights* weights, fused_rnn_description* description) {
  if (!is_weights(weights)) return FUSED_RNN_ERROR_WEIGHTS;
  return write_description(weights->description, description);
}

int fused_rnn_stream_memory_size(const fused_rnn_weights* weights, int64_t rows, size_t* size) {
  if (!is_weights(weights)) return FUSED_RNN_ERROR_WEIGHTS;
  if (!is_rows(rows)) return FUSED_RNN_ERROR_ROWS;
  if (!size) return FUSED_RNN_ERROR_RESULT_NULL;
  *size = StreamParts(nullptr, *weights->packed, rows).bytes;
  return FUSED_RNN_OK;
}

int fused_rnn_stream_create(const fused_rnn_weights* weights, int64_t rows, void* memory, size_t size,
                            fused_rnn_stream** stream) {
  if (!is_weights(weights)) return FUSED_RNN_ERROR_WEIGHTS;
  if (!is_rows(rows)) return FUSED_RNN_ERROR_ROWS;
  if (!stream) return FUSED_RNN_ERROR_RESULT_NULL;
  bool is_own = false;
  if (const int error = take_memory(memory, size, StreamParts(nullptr, *weights->packed, rows).bytes, is_own))
    return error;
  const StreamParts parts(memory, *weights->packed, rows);
  fused_rnn_stream* made = new (parts.object) fused_rnn_stream();
  made->is_own = is_own;
  made->weights = weights;
  made->states = StackStates::place(parts.states, *weights->packed, rows, rows);
  made->last_in = static_cast<uint64_t*>(parts.last_in);
  std::memset(made->last_in, 0, size_t(rows) * sizeof(uint64_t));
  made->rows = rows;
  made->input_size = weights->description.input_size;
  made->state_size = state_size_of(weights->description);
  made->element_bytes = bytes_of(weights->description.dtype);
  made->magic = stream_magic;
  *stream = made;
  return FUSED_RNN_OK;
}

void fused_rnn_stream_destroy(fused_rnn_stream* stream) {
  if (!is_stream(stream)) return;
  stream->magic = 0;
  if (stream->is_own) std::free(stream);
}

int fused_rnn_step(fused_rnn_stream* stream, const void* x, void* y) {
  if (!is_stream(stream)) return FUSED_RNN_ERROR_STREAM;
  if (const int error = check_io(stream, stream->rows, x, y, stream->rows <= stream->states->block_rows()))
    return error;
  StreamRows call;
  call.rows = stream->rows;
  call.x = {const_cast<void*>(x), 0, stream->input_size};
  call.y = {y, 0, stream->state_size};
  return advance(stream, call);
}

int fused_rnn_step_rows(fused_rnn_stream* stream, int64_t count, const int64_t* chosen, const void* x, void* y) {
  if (!is_stream(stream)) return FUSED_RNN_ERROR_STREAM;
  if (!chosen || count < 1 || count > stream->rows) return FUSED_RNN_ERROR_CHOSEN;
  if (!is_aligned(chosen, alignof(int64_t))) return FUSED_RNN_ERROR_ALIGNMENT;
  if (const int error = check_io(stream, count, x, y, count <= stream->states->block_rows())) return error;
  if (!stream->states->enter()) return FUSED_RNN_ERROR_IN_USE;
  int error = FUSED_RNN_OK;
  const uint64_t call_number = ++stream->calls;
  for (int64_t i = 0; i < count && !error; ++i) {
    const int64_t row = chosen[i];
    if (row < 0 || row >= stream->rows || stream->last_in[row] == call_number) {
      error = FUSED_RNN_ERROR_CHOSEN;
    } else {
      stream->last_in[row] = call_number;
    }
  }
  if (!error) {
    StreamRows call;
    call.rows = count;
    call.slots = chosen;
    call.x = {const_cast<void*>(x), 0, stream->input_size};
    call.y = {y, 0, stream->state_size};
    stream->states->advance(call);
  }
  stream->states->leave();
  return error;
}

int fused_rnn_chunk(fused_rnn_stream* stream, int64_t steps, const int64_t* lengths, const void* x, void* y) {
  if (!is_stream(stream)) return FUSED_RNN_ERROR_STREAM;
  if (steps < 1 || steps > FUSED_RNN_MOST_STEPS) return FUSED_RNN_ERROR_STEPS;
  // Of x and y together less than the address space, so that no product of these numbers overflows.
  constexpr int64_t most = int64_t(1) << 56;
  if (steps > most / (stream->rows * std::max(stream->input_size, stream->state_size) * stream->element_bytes))
    return FUSED_RNN_ERROR_STEPS;
  if (const int error = check_io(stream, steps * stream->rows, x, y, false)) return error;
  if (lengths) {
    if (!is_aligned(lengths, alignof(int64_t))) return FUSED_RNN_ERROR_ALIGNMENT;
    for (int64_t row = 0; row < stream->rows; ++row) {
      if (lengths[row] < 0 || lengths[row] > steps) return FUSED_RNN_ERROR_LENGTHS;
    }
  }
  StreamRows call;
  call.steps = steps;
  call.rows = stream->rows;
  call.x = {const_cast<void*>(x), stream->rows * stream->input_size, stream->input_size};
  call.y = {y, stream->rows * stream->state_size, stream->state_size};
  call.lengths = lengths;
  if (const int error = advance(stream, call)) return error;
  const size_t row_bytes = size_t(stream->state_size * stream->element_bytes);
  for (int64_t row = 0; lengths && row < stream->rows; ++row) {
    for (int64_t t = lengths[row]; t < steps; ++t)
      std::memset(static_cast<char*>(y) + size_t(t * stream->rows + row) * row_bytes, 0, row_bytes);
  }
  return FUSED_RNN_OK;
}

int fused_rnn_reset(fused_rnn_stream* stream, int64_t row) {
  if (!is_stream(stream)) return FUSED_RNN_ERROR_STREAM;
  if (row < -1 || row >= stream->rows) return FUSED_RNN_ERROR_ROW;
  if (!stream->states->enter()) return FUSED_RNN_ERROR_IN_USE;
  for (int64_t r = row < 0 ? 0 : row; r < (row < 0 ? stream->rows : row + 1); ++r) stream->states->reset(r);
  stream->states->leave();
  return FUSED_RNN_OK;
}

int fused_rnn_read_state(fused_rnn_stream* stream, int64_t layer, int64_t row, void* h, void* c) {
  if (const int error = check_state(stream, layer, row, h, c)) return error;
  if (!stream->states->enter()) return FUSED_RNN_ERROR_IN_USE;
  stream->states->read(layer, row, h, c, true);
  stream->states->leave();
  return FUSED_RNN_OK;
}

int fused_rnn_write_state(fused_rnn_stream* stream, int64_t layer, int64_t row, const void* h, const void* c) {
  if (const int error = check_state(stream, layer, row, h, c)) return error;
  if (!stream->states->enter()) return FUSED_RNN_ERROR_IN_USE;
  stream->states->write(layer, row, h, c, true);
  stream->states->leave();
  return FUSED_RNN_OK;
}
