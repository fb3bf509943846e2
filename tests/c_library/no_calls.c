/* What fused_rnn.h promises of its calls after creation, held by the system: they allocate nothing, take no lock and
 * make no system call, and the thread's floating-point mode is afterwards what it was.
 *
 *     no_calls FILE nothing      exit status 0
 *     no_calls FILE allocate     a mistake in between the calls: the program must not survive it. Also: free, lock,
 * call
 *
 * Linked with the library's archive and --wrap for the functions below, whose calls end the program with status 3 once
 * the calls have begun. Any system call but read, write and exit kills it (seccomp's strict mode). */
#define _GNU_SOURCE

#include <fenv.h>
#include <fused_rnn.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

enum { rows = 3, steps = 20, most_features = 64 };

static volatile int armed = 0;

/* exit_group, which _exit makes, is not allowed. */
static void leave(int status) {
  syscall(SYS_exit, status);
  abort();
}

static void refuse(const char* name) {
  if (!armed) return;
  if (write(2, name, strlen(name)) < 0 || write(2, " was called\n", 12) < 0) leave(4);
  leave(3);
}

void* __real_malloc(size_t bytes);
void* __wrap_malloc(size_t bytes);
void* __wrap_malloc(size_t bytes) {
  refuse("malloc");
  return __real_malloc(bytes);
}
void* __real_calloc(size_t count, size_t bytes);
void* __wrap_calloc(size_t count, size_t bytes);
void* __wrap_calloc(size_t count, size_t bytes) {
  refuse("calloc");
  return __real_calloc(count, bytes);
}
void* __real_realloc(void* memory, size_t bytes);
void* __wrap_realloc(void* memory, size_t bytes);
void* __wrap_realloc(void* memory, size_t bytes) {
  refuse("realloc");
  return __real_realloc(memory, bytes);
}
void* __real_aligned_alloc(size_t alignment, size_t bytes);
void* __wrap_aligned_alloc(size_t alignment, size_t bytes);
void* __wrap_aligned_alloc(size_t alignment, size_t bytes) {
  refuse("aligned_alloc");
  return __real_aligned_alloc(alignment, bytes);
}
void __real_free(void* memory);
void __wrap_free(void* memory);
void __wrap_free(void* memory) {
  refuse("free");
  __real_free(memory);
}
int __real_pthread_mutex_lock(pthread_mutex_t* mutex);
int __wrap_pthread_mutex_lock(pthread_mutex_t* mutex);
int __wrap_pthread_mutex_lock(pthread_mutex_t* mutex) {
  refuse("pthread_mutex_lock");
  return __real_pthread_mutex_lock(mutex);
}

static void check(int is_right, const char* what) {
  if (is_right) return;
  if (write(2, what, strlen(what)) < 0 || write(2, "\n", 1) < 0) leave(4);
  leave(2);
}

/* Every mode that a caller may have; flags of what happened are not a part of it. */
static unsigned long mode(void) {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3fu;
#elif defined(__aarch64__)
  unsigned long value;
  __asm__ __volatile__("mrs %0, fpcr" : "=r"(value));
  return value;
#else
  return 0;
#endif
}

static void every_call(fused_rnn_stream* stream, const fused_rnn_description* d) {
  static double x[steps * rows * most_features], y[steps * rows * most_features], h[most_features], c[most_features];
  const int64_t lengths[rows] = {steps, 0, 7}, chosen[2] = {2, 0};
  const int is_lstm = d->cell == FUSED_RNN_CELL_LSTM;
  const unsigned long before = mode();
  check(fused_rnn_step(stream, x, y) == 0, "step failed");
  check(mode() == before, "step changed the mode");
  check(fused_rnn_step_rows(stream, 2, chosen, x, y) == 0, "step_rows failed");
  check(mode() == before, "step_rows changed the mode");
  check(fused_rnn_chunk(stream, steps, lengths, x, y) == 0, "chunk failed");
  check(fused_rnn_chunk(stream, steps, NULL, x, y) == 0, "chunk failed");
  check(mode() == before, "chunk changed the mode");
  check(fused_rnn_read_state(stream, 0, 1, h, is_lstm ? c : NULL) == 0, "read_state failed");
  check(fused_rnn_write_state(stream, 0, 1, h, is_lstm ? c : NULL) == 0, "write_state failed");
  check(fused_rnn_reset(stream, 2) == 0, "reset failed");
  check(fused_rnn_step(stream, NULL, y) == FUSED_RNN_ERROR_X_NULL, "an error is not one");
  check(fused_rnn_error_text(FUSED_RNN_ERROR_X_NULL)[0] == 'x', "an error has no text");
  check(mode() == before, "a call changed the mode");
}

/* h of an RNN with relu that is the smallest weight times a small number: zero while denormal numbers are. */
static void check_denormals(void) {
  const float w_ih = 1e-30f, w_hh = 0, x = 1e-10f;
  float h = 1;
  fused_rnn_layer layer;
  fused_rnn_description d;
  fused_rnn_weights* weights;
  fused_rnn_stream* stream;
  memset(&layer, 0, sizeof layer);
  memset(&d, 0, sizeof d);
  layer.weight_ih = &w_ih;
  layer.weight_hh = &w_hh;
  d.struct_size = sizeof d;
  d.layer_size = sizeof layer;
  d.cell = FUSED_RNN_CELL_RNN;
  d.activation = FUSED_RNN_RELU;
  d.dtype = FUSED_RNN_FLOAT32;
  d.num_layers = d.input_size = d.hidden_size = 1;
  d.layers = &layer;
  check(fused_rnn_weights_create(&d, NULL, 0, &weights) == 0, "weights_create failed");
  check(fused_rnn_stream_create(weights, 1, NULL, 0, &stream) == 0, "stream_create failed");
  volatile float factor = w_ih;
  check(factor * x != 0, "the thread's mode is another one than it should be");
  check(fused_rnn_step(stream, &x, &h) == 0 && h == 0, "a denormal number is not zero");
  check(factor * x != 0, "step changed the mode");
  fused_rnn_stream_destroy(stream);
  fused_rnn_weights_destroy(weights);
}

int main(int argc, char** argv) {
  static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  if (argc != 3) return 2;
  const char* mistake = argv[2];
  fused_rnn_weights* weights = NULL;
  fused_rnn_stream* stream = NULL;
  fused_rnn_description d;
  memset(&d, 0, sizeof d);
  d.struct_size = sizeof d;
  d.layer_size = sizeof(fused_rnn_layer);
  int error = fused_rnn_weights_load(argv[1], NULL, &weights);
  if (!error) error = fused_rnn_weights_describe(weights, &d);
  if (!error) error = fused_rnn_stream_create(weights, rows, NULL, 0, &stream);
  if (error) {
    puts(fused_rnn_error_text(error));
    return 2;
  }
  check(d.input_size <= most_features && d.hidden_size <= most_features, "FILE: expected up to 64 features");
  check_denormals();
  fesetround(FE_UPWARD);
  every_call(stream, &d);
  fesetround(FE_TONEAREST);
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040u);
  every_call(stream, &d);
  _mm_setcsr(_mm_getcsr() & ~0x8040u);
#endif
  void* volatile held = malloc(8);
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0) return 5;
  armed = 1;
  for (int i = 0; i < 50; ++i) every_call(stream, &d);
  if (strcmp(mistake, "allocate") == 0) {
    void* volatile memory = malloc(8);
    (void)memory;
  }
  if (strcmp(mistake, "free") == 0) free(held);
  if (strcmp(mistake, "lock") == 0) pthread_mutex_lock(&mutex);
  if (strcmp(mistake, "call") == 0) getppid();
  every_call(stream, &d);
  leave(0);
}
