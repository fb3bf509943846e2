/* A stream of the C library that makes steps of zeros, for whoever counts instructions (tools/arm_steps.py):
 *
 *     steps WEIGHTS ROWS STEPS */
#include <fused_rnn.h>
#include <stdlib.h>

int main(int argc, char** argv) {
  fused_rnn_weights* weights;
  fused_rnn_stream* stream;
  if (argc != 4 || fused_rnn_weights_load(argv[1], NULL, &weights)) return 1;
  const int64_t rows = atol(argv[2]);
  if (fused_rnn_stream_create(weights, rows, NULL, 0, &stream)) return 1;
  fused_rnn_description d = {0};
  d.struct_size = sizeof d;
  d.layer_size = sizeof(fused_rnn_layer);
  if (fused_rnn_weights_describe(weights, &d)) return 1;
  const size_t bytes = (size_t)rows * sizeof(double);
  void *x = calloc((size_t)d.input_size, bytes), *y = calloc((size_t)d.hidden_size, bytes);
  if (!x || !y) return 1;
  const long steps = atol(argv[3]);
  for (long step = 0; step < steps; ++step) {
    if (fused_rnn_step(stream, x, y)) return 1;
  }
  free(x);
  free(y);
  fused_rnn_stream_destroy(stream);
  fused_rnn_weights_destroy(weights);
  return 0;
}
