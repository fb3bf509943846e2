/* Sound through a recurrent layer in blocks, as an audio plug-in has it: each block has to be done before the next one
 * comes. What the layer says is not music; what is shown is that a block takes the time that it takes, every time.
 *
 *     make library
 *     cc -O2 examples/realtime.c -Ibuild/library/include build/library/lib/libfused_rnn.a -lm -o realtime && ./realtime
 *
 *     realtime [--weights FILE] [--wav FILE] [--out FILE] [--block SAMPLES] [--seconds S] [--rate HZ] [--fast]
 *
 * --weights: of a float32 layer, written by fused_rnn.save_weights; without it a GRU of 32 units with made-up weights.
 *            A step of the layer takes input_size samples.
 * --wav:     16-bit PCM, of which the first channel is taken; without it a sweep from 50 Hz up.
 * --out:     the layer's output of all steps, float32, as it stands in memory.
 * --fast:    one block after the other, without waiting until it would have come. */
#define _POSIX_C_SOURCE 200809L

#include <fused_rnn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct options {
  const char *weights, *wav, *out;
  int64_t block, rate;
  double seconds;
  int fast;
};

struct sound {
  float* samples;
  int64_t count, rate;
};

static void fail(const char* what, const char* why) {
  fprintf(stderr, "error: %s: %s\n", what, why);
  exit(1);
}

static void check(int error, const char* what) {
  if (error) fail(what, fused_rnn_error_text(error));
}

static void* allocate(size_t bytes) {
  void* memory = malloc(bytes > 0 ? bytes : 1);
  if (!memory) fail("memory", "there is none left");
  return memory;
}

static struct options read_options(int argc, char** argv) {
  struct options o = {NULL, NULL, NULL, 64, 48000, 2, 0};
  for (int i = 1; i < argc; ++i) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (strcmp(name, "--fast") == 0) {
      o.fast = 1;
      continue;
    }
    if (!value) fail(name, "expected --weights, --wav, --out, --block, --seconds, --rate with a value, or --fast");
    ++i;
    if (strcmp(name, "--weights") == 0) {
      o.weights = value;
    } else if (strcmp(name, "--wav") == 0) {
      o.wav = value;
    } else if (strcmp(name, "--out") == 0) {
      o.out = value;
    } else if (strcmp(name, "--block") == 0) {
      o.block = atoll(value);
    } else if (strcmp(name, "--seconds") == 0) {
      o.seconds = atof(value);
    } else if (strcmp(name, "--rate") == 0) {
      o.rate = atoll(value);
    } else {
      fail(name, "expected --weights, --wav, --out, --block, --seconds, --rate or --fast");
    }
  }
  if (o.block < 1 || o.block > 1 << 20) fail("--block", "expected 1 to 1048576 samples");
  if (o.rate < 1 || o.rate > 1000000) fail("--rate", "expected 1 to 1000000 samples a second");
  if (!(o.seconds > 0 && o.seconds <= 3600)) fail("--seconds", "expected up to 3600");
  return o;
}

static uint32_t little_endian(const unsigned char* p, int bytes) {
  uint32_t value = 0;
  for (int i = bytes; i-- > 0;) value = value << 8 | p[i];
  return value;
}

static struct sound read_wav(const char* path) {
  struct sound sound = {NULL, 0, 0};
  unsigned char head[12], chunk[8], format[16] = {0};
  FILE* file = fopen(path, "rb");
  if (!file) fail(path, "cannot be opened");
  if (fread(head, 1, 12, file) != 12 || memcmp(head, "RIFF", 4) != 0 || memcmp(head + 8, "WAVE", 4) != 0)
    fail(path, "is no WAV file");
  while (!sound.samples && fread(chunk, 1, 8, file) == 8) {
    const uint32_t bytes = little_endian(chunk + 4, 4);
    if (memcmp(chunk, "fmt ", 4) == 0 && bytes >= 16) {
      if (fread(format, 1, 16, file) != 16 || fseek(file, (long)(bytes - 16 + bytes % 2), SEEK_CUR) != 0)
        fail(path, "ends too early");
    } else if (memcmp(chunk, "data", 4) == 0) {
      const uint32_t channels = little_endian(format + 2, 2);
      if (little_endian(format, 2) != 1 || little_endian(format + 14, 2) != 16 || channels == 0)
        fail(path, "expected 16-bit PCM");
      sound.rate = little_endian(format + 4, 4);
      if (sound.rate < 1) fail(path, "says that it has no samples a second");
      sound.count = bytes / 2 / channels;
      sound.samples = allocate((size_t)sound.count * sizeof(float));
      unsigned char* frame = allocate(2 * (size_t)channels);
      for (int64_t i = 0; i < sound.count; ++i) {
        if (fread(frame, 2, channels, file) != channels) fail(path, "ends too early");
        sound.samples[i] = (float)(int16_t)little_endian(frame, 2) / 32768;
      }
      free(frame);
    } else if (fseek(file, (long)(bytes + bytes % 2), SEEK_CUR) != 0) {
      fail(path, "ends too early");
    }
  }
  if (!sound.samples) fail(path, "has no sound");
  fclose(file);
  return sound;
}

static struct sound make_sweep(double seconds, int64_t rate) {
  struct sound sound = {NULL, (int64_t)(seconds * (double)rate), rate};
  sound.samples = allocate((size_t)sound.count * sizeof(float));
  double phase = 0;
  for (int64_t i = 0; i < sound.count; ++i) {
    const double frequency = 50 * pow(100, (double)i / (double)sound.count);
    phase += 2 * 3.14159265358979 * frequency / (double)rate;
    sound.samples[i] = (float)(0.5 * sin(phase));
  }
  return sound;
}

static fused_rnn_weights* make_up_weights(void) {
  enum { I = 1, H = 32, G = 3 };
  static float values[G * H * (I + H + 2)];
  uint32_t random = 1;
  for (size_t i = 0; i < sizeof values / sizeof *values; ++i) {
    random = random * 1664525u + 1013904223u;
    values[i] = ((float)(random >> 8) / (float)(1 << 23) - 1) * 0.17f;
  }
  fused_rnn_layer layer = {0};
  layer.weight_ih = values;
  layer.weight_hh = values + G * H * I;
  layer.bias_ih = values + G * H * (I + H);
  layer.bias_hh = values + G * H * (I + H + 1);
  fused_rnn_description description = {0};
  description.struct_size = sizeof description;
  description.layer_size = sizeof layer;
  description.cell = FUSED_RNN_CELL_GRU;
  description.dtype = FUSED_RNN_FLOAT32;
  description.num_layers = 1;
  description.input_size = I;
  description.hidden_size = H;
  description.layers = &layer;
  fused_rnn_weights* weights = NULL;
  check(fused_rnn_weights_create(&description, NULL, 0, &weights), "weights");
  return weights;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void wait_until(double time) {
  struct timespec t;
  t.tv_sec = (time_t)time;
  t.tv_nsec = (long)((time - (double)t.tv_sec) * 1e9);
  clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static int by_value(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

int main(int argc, char** argv) {
  const struct options options = read_options(argc, argv);
  fused_rnn_weights* weights = NULL;
  if (options.weights) {
    check(fused_rnn_weights_load(options.weights, NULL, &weights), options.weights);
  } else {
    weights = make_up_weights();
  }
  fused_rnn_description layer = {0};
  layer.struct_size = sizeof layer;
  layer.layer_size = sizeof(fused_rnn_layer);
  check(fused_rnn_weights_describe(weights, &layer), "weights");
  if (layer.dtype != FUSED_RNN_FLOAT32) fail("--weights", "expected a layer of float32");
  if (options.block % layer.input_size != 0) fail("--block", "expected a multiple of the layer's input_size");

  const struct sound sound = options.wav ? read_wav(options.wav) : make_sweep(options.seconds, options.rate);
  const int64_t output_size = layer.proj_size ? layer.proj_size : layer.hidden_size;
  const int64_t steps = options.block / layer.input_size, blocks = sound.count / options.block;
  if (blocks < 1) fail("--block", "expected no more samples than the sound has");

  /* The stream's memory is ours: once, before the first block. */
  fused_rnn_stream* stream = NULL;
  size_t bytes = 0;
  check(fused_rnn_stream_memory_size(weights, 1, &bytes), "stream");
  bytes = (bytes + FUSED_RNN_ALIGNMENT - 1) / FUSED_RNN_ALIGNMENT * FUSED_RNN_ALIGNMENT;
  void* memory = aligned_alloc(FUSED_RNN_ALIGNMENT, bytes);
  check(fused_rnn_stream_create(weights, 1, memory, bytes, &stream), "stream");

  float* output = allocate((size_t)(blocks * steps * output_size) * sizeof(float));
  double* times = allocate((size_t)blocks * sizeof(double));
  const double period = (double)options.block / (double)sound.rate;
  int64_t misses = 0;
  const double start = now() + 0.01;
  for (int64_t i = 0; i < blocks; ++i) {
    /* A block is there when its last sample is, and has to be done when the next one is. */
    const double due = start + (double)i * period;
    if (!options.fast) wait_until(due);
    const double begin = now();
    check(fused_rnn_chunk(stream, steps, NULL, sound.samples + i * options.block, output + i * steps * output_size),
          "chunk");
    const double end = now();
    times[i] = end - begin;
    if (options.fast ? end - begin > period : end > due + period) ++misses;
  }

  if (options.out) {
    FILE* file = fopen(options.out, "wb");
    const size_t count = (size_t)(blocks * steps * output_size);
    if (!file || fwrite(output, sizeof(float), count, file) != count || fclose(file) != 0)
      fail(options.out, "cannot be written");
  }
  qsort(times, (size_t)blocks, sizeof *times, by_value);
  const double parts[] = {0.5, 0.9, 0.99, 0.999};
  printf("%lld layers, H %lld, %s: %lld blocks of %lld samples, one every %.3f ms\n", (long long)layer.num_layers,
         (long long)layer.hidden_size, layer.instruction_set, (long long)blocks, (long long)options.block,
         1e3 * period);
  printf("us per block:");
  for (size_t i = 0; i < sizeof parts / sizeof *parts; ++i)
    printf(" %.3g%% %.2f,", 100 * parts[i], 1e6 * times[(int64_t)((double)(blocks - 1) * parts[i])]);
  printf(" longest %.2f\ndeadlines missed: %lld\n", 1e6 * times[blocks - 1], (long long)misses);

  fused_rnn_stream_destroy(stream);
  fused_rnn_weights_destroy(weights);
  free(memory);
  free(output);
  free(times);
  free(sound.samples);
  return 0;
}
