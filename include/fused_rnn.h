/* Recurrent layers step by step, without PyTorch and without Python: the kernels of fused_rnn.Stream as a C library.
 *
 * Weights are packed once and shared by any number of streams; a stream is the states of some rows:
 *
 *   fused_rnn_weights* weights;
 *   fused_rnn_stream* stream;
 *   int error = fused_rnn_weights_load("gru.safetensors", NULL, &weights);    // written by fused_rnn.save_weights
 *   if (!error) error = fused_rnn_stream_create(weights, 1, NULL, 0, &stream);
 *   while (!error && next(x)) error = fused_rnn_step(stream, x, y);           // x: (rows, I), y: (rows, P)
 *   if (error) puts(fused_rnn_error_text(error));
 *
 * fused_rnn_step, fused_rnn_step_rows, fused_rnn_chunk, fused_rnn_reset, fused_rnn_read_state and fused_rnn_write_state
 * allocate nothing, take no lock, make no system call, start no thread and throw nothing. Numbers below the smallest
 * normal one are zero during a call; afterwards the thread's floating-point mode is what it was. Numbers are those of
 * fused_rnn.Stream, bit for bit on the same instruction set (docs/c-library.md).
 *
 * Letters in shapes: T steps, I input_size, H hidden_size, P proj_size, or H without a projection, G gates (LSTM 4, GRU
 * 3, RNN 1). Arrays are contiguous, the last index fastest, aligned to their elements, of the dtype of the weights
 * (bfloat16: the upper half of a float, uint16_t). Every function but those that return void or a text returns 0 or an
 * error, which fused_rnn_error_text puts in words; what an error leaves behind is what was there before.
 *
 * Threads: different streams may be used at once, also those of the same weights. A stream is for one thread at a time;
 * a second one gets an error.
 */
#ifndef FUSED_RNN_H
#define FUSED_RNN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(FUSED_RNN_BUILDS_LIBRARY)
#define FUSED_RNN_API __attribute__((visibility("default")))
#else
#define FUSED_RNN_API
#endif

/* Raised when a program that was compiled with an older header would misunderstand the library. */
#define FUSED_RNN_ABI_VERSION 1

/* What memory of the caller's is aligned to. */
#define FUSED_RNN_ALIGNMENT 64

/* The largest sizes; with them no number of bytes overflows. */
#define FUSED_RNN_MOST_LAYERS 64
#define FUSED_RNN_MOST_FEATURES (1 << 20) /* of I, H */
#define FUSED_RNN_MOST_ROWS (1 << 24)
#define FUSED_RNN_MOST_STEPS (INT64_C(1) << 32) /* of a call */

enum { FUSED_RNN_CELL_RNN = 1, FUSED_RNN_CELL_LSTM = 2, FUSED_RNN_CELL_GRU = 3 };

enum { FUSED_RNN_FLOAT32 = 1, FUSED_RNN_FLOAT64 = 2, FUSED_RNN_BFLOAT16 = 3 };

/* 0 stands for the cell's own: tanh, and sigmoid of gates. hard_sigmoid is x / 6 + 1 / 2 within 0 and 1. */
enum {
  FUSED_RNN_TANH = 1,
  FUSED_RNN_SIGMOID = 2,
  FUSED_RNN_RELU = 3,
  FUSED_RNN_HARD_SIGMOID = 4,
  FUSED_RNN_SOFTSIGN = 5,
  FUSED_RNN_IDENTITY = 6
};

enum {
  FUSED_RNN_MATRIX_INT8 = 1,     /* -127 to 127, with scales; x and h are rounded to 256 values at every step */
  FUSED_RNN_MATRIX_BFLOAT16 = 2, /* computed in float32 */
  FUSED_RNN_MATRIX_FLOAT16 = 3
};

enum {
  FUSED_RNN_OK = 0,
  /* of a description */
  FUSED_RNN_ERROR_DESCRIPTION_NULL = 1,
  FUSED_RNN_ERROR_STRUCT_SIZE = 2,
  FUSED_RNN_ERROR_NEWER = 3,
  FUSED_RNN_ERROR_LAYERS_NULL = 4,
  FUSED_RNN_ERROR_CELL = 5,
  FUSED_RNN_ERROR_DTYPE = 6,
  FUSED_RNN_ERROR_NUM_LAYERS = 7,
  FUSED_RNN_ERROR_INPUT_SIZE = 8,
  FUSED_RNN_ERROR_HIDDEN_SIZE = 9,
  FUSED_RNN_ERROR_PROJ_SIZE = 10,
  FUSED_RNN_ERROR_NUM_HEADS = 11,
  FUSED_RNN_ERROR_ACTIVATION = 12,
  FUSED_RNN_ERROR_RECURRENT_ACTIVATION = 13,
  FUSED_RNN_ERROR_PEEPHOLE = 14,
  FUSED_RNN_ERROR_COUPLED_GATES = 15,
  FUSED_RNN_ERROR_LAYER_NORM = 16,
  FUSED_RNN_ERROR_CELL_CLIP = 17,
  FUSED_RNN_ERROR_ZONEOUT = 18,
  FUSED_RNN_ERROR_ZONEOUT_CELL = 19,
  FUSED_RNN_ERROR_INSTRUCTION_SET = 20,
  FUSED_RNN_ERROR_WEIGHT_IH = 21,
  FUSED_RNN_ERROR_WEIGHT_HH = 22,
  FUSED_RNN_ERROR_BIAS = 23,
  FUSED_RNN_ERROR_WEIGHT_HR = 24,
  FUSED_RNN_ERROR_WEIGHT_PEEPHOLE = 25,
  FUSED_RNN_ERROR_NORM = 26,
  FUSED_RNN_ERROR_WEIGHT_ALIGNMENT = 27,
  FUSED_RNN_ERROR_MATRIX_FORMAT = 28,
  FUSED_RNN_ERROR_SCALES = 29,
  FUSED_RNN_ERROR_INT8_RANGE = 31,
  /* of memory and objects */
  FUSED_RNN_ERROR_RESULT_NULL = 40,
  FUSED_RNN_ERROR_MEMORY_NULL = 41,
  FUSED_RNN_ERROR_MEMORY_ALIGNMENT = 42,
  FUSED_RNN_ERROR_MEMORY_SIZE = 43,
  FUSED_RNN_ERROR_OUT_OF_MEMORY = 44,
  FUSED_RNN_ERROR_WEIGHTS = 45,
  FUSED_RNN_ERROR_STREAM = 46,
  FUSED_RNN_ERROR_ROWS = 47,
  /* of a call */
  FUSED_RNN_ERROR_X_NULL = 60,
  FUSED_RNN_ERROR_Y_NULL = 61,
  FUSED_RNN_ERROR_ALIGNMENT = 62,
  FUSED_RNN_ERROR_OVERLAP = 63,
  FUSED_RNN_ERROR_STEPS = 64,
  FUSED_RNN_ERROR_LENGTHS = 65,
  FUSED_RNN_ERROR_LAYER = 66,
  FUSED_RNN_ERROR_ROW = 67,
  FUSED_RNN_ERROR_STATE = 68,
  FUSED_RNN_ERROR_IN_USE = 69,
  FUSED_RNN_ERROR_CHOSEN = 70,
  /* of a file */
  FUSED_RNN_ERROR_PATH_NULL = 80,
  FUSED_RNN_ERROR_FILE_OPEN = 81,
  FUSED_RNN_ERROR_FILE_READ = 82,
  FUSED_RNN_ERROR_DATA_NULL = 83,
  FUSED_RNN_ERROR_DATA_ALIGNMENT = 84,
  FUSED_RNN_ERROR_FILE_SIZE = 85,
  FUSED_RNN_ERROR_FILE_HEADER = 86,
  FUSED_RNN_ERROR_FILE_METADATA = 87,
  FUSED_RNN_ERROR_FILE_VERSION = 88,
  FUSED_RNN_ERROR_FILE_TENSOR_NAME = 89,
  FUSED_RNN_ERROR_FILE_TENSOR_TWICE = 90,
  FUSED_RNN_ERROR_FILE_TENSOR_MISSING = 91,
  FUSED_RNN_ERROR_FILE_TENSOR_DTYPE = 92,
  FUSED_RNN_ERROR_FILE_TENSOR_SHAPE = 93,
  FUSED_RNN_ERROR_FILE_OFFSETS = 94,
  FUSED_RNN_ERROR_CAPACITY = 95
};

/* Weights of one layer as torch.nn's modules have them (gates of an LSTM in the order i, f, g, o, of a GRU r, z, n),
 * only read while fused_rnn_weights_create runs. */
typedef struct fused_rnn_layer {
  const void* weight_ih;       /* (G * H, I), of all layers but the lowest (G * H, P) */
  const void* weight_hh;       /* (G * H, P / num_heads) */
  const void* bias_ih;         /* (G * H), or null: no biases */
  const void* bias_hh;         /* (G * H), or null: zeros. Not null without bias_ih, nor null beside it for a GRU */
  const void* weight_hr;       /* (P, H), where there is a projection; else null */
  const void* weight_peephole; /* (3 * H) of i, f, o, with peephole; else null */
  /* With layer_norm: the gains of W_ih x and W_hh h, and of an LSTM those of c and its bias, which is null where there
   * are no biases. Else null. */
  const void* weight_norm_ih; /* (G * H) */
  const void* weight_norm_hh; /* (G * H) */
  const void* weight_norm_c;  /* (H) */
  const void* bias_norm_c;    /* (H) */
  /* With FUSED_RNN_MATRIX_INT8: what each row of a matrix is multiplied with. Else null. */
  const float* scale_ih; /* (G * H) */
  const float* scale_hh; /* (G * H) */
  const float* scale_hr; /* (P), where there is a projection */
} fused_rnn_layer;

/* Layers on top of each other, each with the same cell and options. Set all of it to zero, then struct_size and
 * layer_size, then what is not zero. */
typedef struct fused_rnn_description {
  uint32_t struct_size; /* sizeof(fused_rnn_description), by which the library knows the fields that there are */
  uint32_t layer_size;  /* sizeof(fused_rnn_layer) */
  int32_t cell;         /* FUSED_RNN_CELL_... */
  int32_t dtype;        /* FUSED_RNN_FLOAT32, ..._FLOAT64 or ..._BFLOAT16, of weights, inputs and outputs */
  int64_t num_layers;
  int64_t input_size;
  int64_t hidden_size;
  int64_t proj_size; /* P of an LSTM, less than H; 0: no projection */
  int64_t num_heads; /* blocks of a block-diagonal W_hh; 0 and 1: one */
  /* Options, as fused_rnn.LSTM describes them; 0: without. */
  int32_t activation;           /* of the candidate and the state; of an RNN its nonlinearity */
  int32_t recurrent_activation; /* of gates */
  int32_t peephole;             /* 1: of an LSTM alone, as the next */
  int32_t coupled_gates;
  int32_t layer_norm;
  /* FUSED_RNN_MATRIX_...: in what weight_ih, weight_hh and weight_hr are stored, where all else is float32, as
   * fused_rnn.quantize makes them; 0: of the dtype of all. */
  int32_t matrix_format;
  double cell_clip; /* of an LSTM alone; 0: none */
  double zoneout;   /* the part of h (c) that a step keeps of the one before, from 0 to 1 */
  double zoneout_cell;
  const fused_rnn_layer* layers; /* (num_layers), the lowest first */
  /* "portable", "avx2", "avx512", "avx512_bf16", "avx512_amx", "neon", "neon_bf16": one that was compiled and runs
   * here. Null: the best that does, or the one that the environment variable FUSED_RNN_ISA names. */
  const char* instruction_set;
} fused_rnn_description;

typedef struct fused_rnn_weights fused_rnn_weights; /* packed */
typedef struct fused_rnn_stream fused_rnn_stream;   /* states of some rows */

/* That of the library, FUSED_RNN_ABI_VERSION being that of the header. */
FUSED_RNN_API uint32_t fused_rnn_abi_version(void);

/* One sentence, never null, that stays for ever. */
FUSED_RNN_API const char* fused_rnn_error_text(int error);

/* ---- weights ---- */

/* Bytes that fused_rnn_weights_create needs of the caller for this description, on this machine. */
FUSED_RNN_API int fused_rnn_weights_memory_size(const fused_rnn_description* description, size_t* size);

/* Packs weights. memory: `size` bytes, at least as many as fused_rnn_weights_memory_size says, aligned to
 * FUSED_RNN_ALIGNMENT, which stay as they are until the weights are destroyed; with them nothing is allocated. Null,
 * and size 0: the library allocates. */
FUSED_RNN_API int fused_rnn_weights_create(const fused_rnn_description* description, void* memory, size_t size,
                                           fused_rnn_weights** weights);

/* After all streams of these weights. Gives back what the library has allocated. Null: nothing happens. */
FUSED_RNN_API void fused_rnn_weights_destroy(fused_rnn_weights* weights);

/* The sizes and options, of which struct_size and layer_size must be set; layers is null, instruction_set the one in
 * use. */
FUSED_RNN_API int fused_rnn_weights_describe(const fused_rnn_weights* weights, fused_rnn_description* description);

/* ---- files that fused_rnn.save_weights has written (safetensors) ---- */

/* Reads a file that is in memory, aligned to 8 bytes, without a copy and without memory of its own: the description, of
 * which struct_size and layer_size must be set, and its layers, which are `layers`, an array of `capacity` of them,
 * point into it. Every file that is not wholly what save_weights writes is an error. */
FUSED_RNN_API int fused_rnn_describe_file(const void* data, size_t size, fused_rnn_layer* layers, int64_t capacity,
                                          fused_rnn_description* description);

/* Reads the file, packs its weights into memory that the library allocates. instruction_set: see
 * fused_rnn_description. */
FUSED_RNN_API int fused_rnn_weights_load(const char* path, const char* instruction_set, fused_rnn_weights** weights);

/* ---- streams ---- */

FUSED_RNN_API int fused_rnn_stream_memory_size(const fused_rnn_weights* weights, int64_t rows, size_t* size);

/* States of `rows` rows, all zeros. weights, which must stay until the stream is destroyed, are not changed by it.
 * memory, size: as for fused_rnn_weights_create. */
FUSED_RNN_API int fused_rnn_stream_create(const fused_rnn_weights* weights, int64_t rows, void* memory, size_t size,
                                          fused_rnn_stream** stream);

FUSED_RNN_API void fused_rnn_stream_destroy(fused_rnn_stream* stream);

/* One step of all rows. x: (rows, I); y: (rows, P), h of the highest layer. They may share memory if there are no more
 * than 64 rows. */
FUSED_RNN_API int fused_rnn_step(fused_rnn_stream* stream, const void* x, void* y);

/* One step of some rows, the others stay as they are: of a program whose rows are sessions that come and go. chosen:
 * (count) different rows in any order; rows that follow each other are a little faster. x: (count, I); y: (count, P),
 * in that order. */
FUSED_RNN_API int fused_rnn_step_rows(fused_rnn_stream* stream, int64_t count, const int64_t* chosen, const void* x,
                                      void* y);

/* `steps` steps, 1 or more: the same as one after the other, bit for bit, in less time. x: (T, rows, I); y: (T, rows,
 * P), in no part of the memory of x. lengths: (rows), the steps that each row has, from 0 to T, after which its state
 * stays and its y are zeros; null: all have T. */
FUSED_RNN_API int fused_rnn_chunk(fused_rnn_stream* stream, int64_t steps, const int64_t* lengths, const void* x,
                                  void* y);

/* Makes the states of a row zeros; of all rows for -1. */
FUSED_RNN_API int fused_rnn_reset(fused_rnn_stream* stream, int64_t row);

/* The state of one row of one layer. h: (P), of the dtype of the weights; c: (H), of an LSTM alone, in float for
 * bfloat16, so that what was read goes on bit for bit when it is written. Null: is not read; where it is written:
 * zeros. */
FUSED_RNN_API int fused_rnn_read_state(fused_rnn_stream* stream, int64_t layer, int64_t row, void* h, void* c);
FUSED_RNN_API int fused_rnn_write_state(fused_rnn_stream* stream, int64_t layer, int64_t row, const void* h,
                                        const void* c);

#ifdef __cplusplus
}
#endif

#endif
