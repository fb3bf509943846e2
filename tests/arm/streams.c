/* A stream of the C library, for an emulated processor:
 *
 *     streams FILE INSTRUCTION_SET ROWS STEPS_OF_A_CALL ... <x >y
 *
 * of a file that fused_rnn.save_weights has written; `-` for the instruction set: the library's choice. x: (T, rows, I),
 * y: (T, rows, P); behind y follow, of each layer and row, h and c as fused_rnn_read_state gives them. Steps are 1: by
 * fused_rnn_step. The instruction set in use is written to the standard error. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fused_rnn.h"

static void must(int error, const char* what) {
  if (!error) return;
  fprintf(stderr, "%s: %s\n", what, fused_rnn_error_text(error));
  exit(2);
}

static void* room(size_t bytes) {
  void* memory = calloc(bytes ? bytes : 1, 1);
  if (!memory) exit(2);
  return memory;
}

/* Whether this thread computes with numbers below the smallest normal one. */
static int keeps_denormals(void) {
  volatile float tiny = 1e-30f;
  volatile float product = tiny * 1e-10f;
  return product > 0;
}

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  fused_rnn_weights* weights;
  fused_rnn_stream* stream;
  must(fused_rnn_weights_load(argv[1], strcmp(argv[2], "-") == 0 ? NULL : argv[2], &weights), "weights");
  fused_rnn_description d;
  memset(&d, 0, sizeof d);
  d.struct_size = sizeof d;
  d.layer_size = sizeof(fused_rnn_layer);
  must(fused_rnn_weights_describe(weights, &d), "description");
  fprintf(stderr, "%s\n", d.instruction_set);
  const size_t element = d.dtype == FUSED_RNN_FLOAT64 ? 8 : d.dtype == FUSED_RNN_FLOAT32 ? 4 : 2;
  const size_t rows = (size_t)atol(argv[3]), features = (size_t)(d.proj_size ? d.proj_size : d.hidden_size);
  const size_t of_x = rows * (size_t)d.input_size * element, of_y = rows * features * element;
  must(fused_rnn_stream_create(weights, (int64_t)rows, NULL, 0, &stream), "stream");
  for (int i = 4; i < argc; ++i) {
    const size_t steps = (size_t)atol(argv[i]);
    void *x = room(steps * of_x), *y = room(steps * of_y);
    if (fread(x, 1, steps * of_x, stdin) != steps * of_x) return 2;
    must(steps == 1 ? fused_rnn_step(stream, x, y) : fused_rnn_chunk(stream, (int64_t)steps, NULL, x, y), "call");
    if (!keeps_denormals()) {
      fprintf(stderr, "the call has left another floating-point mode\n");
      return 2;
    }
    fwrite(y, 1, steps * of_y, stdout);
    free(x);
    free(y);
  }
  const size_t of_c = d.cell == FUSED_RNN_CELL_LSTM ? (size_t)d.hidden_size * (element < 4 ? 4 : element) : 0;
  void *h = room(features * element), *c = room(of_c);
  for (int64_t layer = 0; layer < d.num_layers; ++layer) {
    for (size_t row = 0; row < rows; ++row) {
      must(fused_rnn_read_state(stream, layer, (int64_t)row, h, of_c ? c : NULL), "state");
      fwrite(h, 1, features * element, stdout);
      fwrite(c, 1, of_c, stdout);
    }
  }
  free(h);
  free(c);
  fused_rnn_stream_destroy(stream);
  fused_rnn_weights_destroy(weights);
  return 0;
}
