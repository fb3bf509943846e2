// What each instruction set offers, and the choice between them.
#pragma once

#include "../problem.h"
#include "../stream/kernels.h"
#include "plan.h"

namespace fused_rnn {

#if !defined(FRNN_STREAMS_ALONE)
// Steps of a direction whose gradients change because the steps do, in float32 or float64: rows as KnownSteps has them,
// those of gradients (N, .).
struct ChangedSteps {
  CellKind kind = CellKind::lstm;
  DType dtype = DType::float32;
  int64_t T = 0, B = 0, H = 0, h_stride = 0;
  bool reverse = false;
  KnownSteps known, change;
  const void *grad_h = nullptr, *grad_c = nullptr;  // gradients of h and c after each step
  // Results: of the sums (grad_gates * H), of h before each step but through the sums, of c before it; null: not
  // wanted.
  void *sums = nullptr, *h = nullptr, *c = nullptr;
};

#endif

// Functions of one instruction set. They return false, having written nothing, when memory is lacking.
// FRNN_STREAMS_ALONE: in the C library (tools/build_library.py) there are those of streams alone.
struct KernelTable {
  const char* isa;
  int vector_bytes;
#if !defined(FRNN_STREAMS_ALONE)
  bool (*forward)(const LayerForward& layer, const Plan& plan);
  bool (*backward)(const LayerBackward& layer, const Plan& plan);
  // out[i] = activation(in[i]) as layers of this dtype compute it: float64 for float64, else float32. For tests.
  void (*activation)(Activation activation, DType dtype, const void* in, void* out, int64_t count);
  // Floating-point operations a second of the multiply-adds that products of this dtype are made of: one thread, no
  // memory, for about `seconds`. For benchmarks.
  double (*peak)(DType dtype, double seconds);
  // Rows of bits that are 1 with probability `rate` (draw.h).
  void (*draw_bits)(uint64_t seed, int64_t first_row, int64_t rows, int64_t units, double rate, uint8_t* bits);
  // How gradients change, of rows [begin, end) of all steps (derivatives.h).
  void (*gradient_changes)(const ChangedSteps& steps, int64_t begin, int64_t end);
#endif
  // Of a layer that stays (stream/pass.h), by its sizes: float32, float64 and bfloat16, no rnn_relu.
  const StreamKernel& (*stream)(const LayerSizes& sizes);
  // For int8 matrices of such layers, whichever kernels they have; null: this instruction set has no tiles.
  ByteTiles byte_tiles;
};

// The tables that were compiled, best first; ended by null.
const KernelTable* const* compiled_kernels();

bool runs_here(const KernelTable& table);

// The table called `isa`; null when it was not compiled or does not run here.
const KernelTable* find_kernels(const char* isa);

// The table in use: the best that runs here, or the one that FUSED_RNN_ISA or select_kernels names.
const KernelTable& kernels();

// Switches to the table called `isa`; false when it was not compiled or does not run here.
bool select_kernels(const char* isa);

// Whether the processor has instructions that multiply bytes, which not all have that run this instruction set, one
// that has float32 kernels (stored.h); and whether to use them where it has, for tests.
bool multiplies_bytes(const char* isa);
void allow_byte_products(bool allowed);

// The table's byte_tiles where the processor multiplies bytes on tiles, which not all have that have tiles; else null.
ByteTiles byte_tiles(const KernelTable& table);

// Whether the processor by itself follows as many streams through memory as dot products with a weight read
// (in_place.h), so that what is fetched ahead only takes its time.
#if defined(__x86_64__)
FRNN_EXPORT bool follows_streams();
#else
inline bool follows_streams() { return false; }
#endif

}  // namespace fused_rnn
