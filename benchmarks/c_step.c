/* What a step of the C library takes, for benchmarks/c_library.py:
 *
 *     c_step FILE SECONDS
 *
 * Prints nanoseconds of a step of one row, of a step in chunks of 100, where the checks and the reading of the thread's
 * mode are those of one call, and of a call that fails at its last check: the shortest of many samples each. */
#define _POSIX_C_SOURCE 200809L

#include <fused_rnn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { steps_of_chunk = 100, calls_of_sample = 500 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void keep_shortest(double* shortest, double seconds, double steps) {
  const double ns = 1e9 * seconds / steps;
  if (*shortest == 0 || ns < *shortest) *shortest = ns;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  fused_rnn_weights* weights = NULL;
  fused_rnn_stream* stream = NULL;
  fused_rnn_description d = {0};
  d.struct_size = sizeof d;
  d.layer_size = sizeof(fused_rnn_layer);
  int error = fused_rnn_weights_load(argv[1], NULL, &weights);
  if (!error) error = fused_rnn_weights_describe(weights, &d);
  if (!error) error = fused_rnn_stream_create(weights, 1, NULL, 0, &stream);
  if (error) {
    fprintf(stderr, "%s\n", fused_rnn_error_text(error));
    return 1;
  }
  const size_t outputs = (size_t)(d.proj_size ? d.proj_size : d.hidden_size);
  float* x = calloc(steps_of_chunk * (size_t)d.input_size, sizeof(float));
  float* y = calloc(steps_of_chunk * outputs, sizeof(float));
  if (d.dtype != FUSED_RNN_FLOAT32 || !x || !y) return 1;
  for (int64_t i = 0; i < d.input_size; ++i) x[i] = 0.1f * (float)(i % 7);
  double step = 0, chunk = 0, refused = 0;
  const double end = now() + atof(argv[2]);
  do {
    double begin = now();
    for (int i = 0; i < calls_of_sample; ++i) error |= fused_rnn_step(stream, x, y);
    keep_shortest(&step, now() - begin, calls_of_sample);
    begin = now();
    for (int i = 0; i < calls_of_sample / steps_of_chunk; ++i)
      error |= fused_rnn_chunk(stream, steps_of_chunk, NULL, x, y);
    keep_shortest(&chunk, now() - begin, calls_of_sample);
    begin = now();
    for (int i = 0; i < calls_of_sample; ++i) error |= fused_rnn_step(stream, x, NULL) != FUSED_RNN_ERROR_Y_NULL;
    keep_shortest(&refused, now() - begin, calls_of_sample);
  } while (now() < end);
  if (error) return 1;
  printf("%s %.1f %.1f %.1f\n", d.instruction_set, step, chunk, refused);
  fused_rnn_stream_destroy(stream);
  fused_rnn_weights_destroy(weights);
  free(x);
  free(y);
  return 0;
}
