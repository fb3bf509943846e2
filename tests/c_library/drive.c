/* What a stream says, from files to a file, for whoever compares it: on another processor, or under the sanitizers.
 *
 *     drive WEIGHTS ROWS X RESULT
 *
 * X: (T, ROWS, I) of the dtype of the weights, T being 4 or more. The first step is one by fused_rnn_step, the second
 * of all rows in the opposite order by fused_rnn_step_rows, the others are a chunk in which the last row ends one step
 * earlier. RESULT: y (T, ROWS, P), then for each layer and row h (P) and, of an LSTM, c (H), which is float for
 * bfloat16; everything was written into another stream and read from there once more. Prints the instruction set. All
 * memory of weights and streams is the program's own. */
#include <fused_rnn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(int error, const char* what) {
  if (!error) return;
  fprintf(stderr, "%s: %s\n", what, fused_rnn_error_text(error));
  exit(1);
}

static void require(int is_right, const char* what) {
  if (is_right) return;
  fprintf(stderr, "%s\n", what);
  exit(1);
}

static char* read_file(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  require(file != NULL, path);
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char* data = malloc(*size + 1);
  require(data && fread(data, 1, *size, file) == *size, path);
  fclose(file);
  return data;
}

static void* aligned(size_t* size) {
  *size = (*size + FUSED_RNN_ALIGNMENT - 1) / FUSED_RNN_ALIGNMENT * FUSED_RNN_ALIGNMENT;
  void* memory = aligned_alloc(FUSED_RNN_ALIGNMENT, *size);
  require(memory != NULL, "out of memory");
  return memory;
}

static fused_rnn_stream* make_stream(const fused_rnn_weights* weights, int64_t rows, void** memory) {
  size_t size = 0;
  fused_rnn_stream* stream = NULL;
  check(fused_rnn_stream_memory_size(weights, rows, &size), "stream_memory_size");
  *memory = aligned(&size);
  check(fused_rnn_stream_create(weights, rows, *memory, size, &stream), "stream_create");
  return stream;
}

int main(int argc, char** argv) {
  require(argc == 5, "expected WEIGHTS ROWS X RESULT");
  size_t file_size = 0, x_size = 0, size = 0;
  char *file = read_file(argv[1], &file_size), *x = read_file(argv[3], &x_size);
  const int64_t rows = atoll(argv[2]);

  fused_rnn_layer layers[FUSED_RNN_MOST_LAYERS];
  fused_rnn_description d;
  fused_rnn_weights* weights = NULL;
  memset(&d, 0, sizeof d);
  d.struct_size = sizeof d;
  d.layer_size = sizeof *layers;
  check(fused_rnn_describe_file(file, file_size, layers, FUSED_RNN_MOST_LAYERS, &d), argv[1]);
  check(fused_rnn_weights_memory_size(&d, &size), "weights_memory_size");
  void *memory = aligned(&size), *of_stream = NULL, *of_twin = NULL;
  check(fused_rnn_weights_create(&d, memory, size, &weights), "weights_create");
  memset(file, 0, file_size); /* nobody needs it any more */
  free(file);
  check(fused_rnn_weights_describe(weights, &d), "weights_describe");
  fused_rnn_stream* stream = make_stream(weights, rows, &of_stream);
  fused_rnn_stream* twin = make_stream(weights, rows, &of_twin);

  const size_t element = d.dtype == FUSED_RNN_FLOAT64 ? 8 : d.dtype == FUSED_RNN_FLOAT32 ? 4 : 2;
  const size_t H = (size_t)d.hidden_size, P = d.proj_size ? (size_t)d.proj_size : H;
  const size_t x_step = (size_t)rows * (size_t)d.input_size * element, y_step = (size_t)rows * P * element;
  const size_t steps = x_size / x_step;
  require(steps >= 4 && steps * x_step == x_size, "X: expected 4 whole steps or more");
  char *y = malloc(steps * y_step), *rows_of_x = malloc(x_step), *rows_of_y = malloc(y_step);
  int64_t* numbers = malloc((size_t)rows * sizeof *numbers);
  require(y && rows_of_x && rows_of_y && numbers, "out of memory");

  check(fused_rnn_step(stream, x, y), "step");
  for (int64_t i = 0; i < rows; ++i) {
    numbers[i] = rows - 1 - i;
    memcpy(rows_of_x + (size_t)i * x_step / (size_t)rows, x + x_step + (size_t)numbers[i] * x_step / (size_t)rows,
           x_step / (size_t)rows);
  }
  check(fused_rnn_step_rows(stream, rows, numbers, rows_of_x, rows_of_y), "step_rows");
  for (int64_t i = 0; i < rows; ++i)
    memcpy(y + y_step + (size_t)numbers[i] * P * element, rows_of_y + (size_t)i * P * element, P * element);
  for (int64_t i = 0; i < rows; ++i) numbers[i] = (int64_t)steps - 2 - (i == rows - 1);
  check(fused_rnn_chunk(stream, (int64_t)steps - 2, numbers, x + 2 * x_step, y + 2 * y_step), "chunk");

  FILE* result = fopen(argv[4], "wb");
  require(result && fwrite(y, y_step, steps, result) == steps, argv[4]);
  const int is_lstm = d.cell == FUSED_RNN_CELL_LSTM;
  const size_t of_c = H * (element == 8 ? 8 : 4);
  char *h = malloc(P * element), *c = malloc(of_c);
  require(h && c, "out of memory");
  for (int64_t layer = 0; layer < d.num_layers; ++layer) {
    for (int64_t row = 0; row < rows; ++row) {
      check(fused_rnn_read_state(stream, layer, row, h, is_lstm ? c : NULL), "read_state");
      check(fused_rnn_write_state(twin, layer, row, h, is_lstm ? c : NULL), "write_state");
      memset(h, 0, P * element);
      memset(c, 0, of_c);
      check(fused_rnn_read_state(twin, layer, row, h, is_lstm ? c : NULL), "read_state");
      require(fwrite(h, element, P, result) == P && (!is_lstm || fwrite(c, 1, of_c, result) == of_c), argv[4]);
    }
  }
  require(fclose(result) == 0, argv[4]);
  check(fused_rnn_reset(stream, -1), "reset");
  puts(d.instruction_set);
  fused_rnn_stream_destroy(twin);
  fused_rnn_stream_destroy(stream);
  fused_rnn_weights_destroy(weights);
  free(of_twin);
  free(of_stream);
  free(memory);
  free(x);
  free(y);
  free(rows_of_x);
  free(rows_of_y);
  free(numbers);
  free(h);
  free(c);
  return 0;
}
