// What crosses from the framework to the kernels: sizes, strides and pointers, nothing else.
//
// Letters, here and in every kernel: T time steps, B batch rows, I input size, H hidden size, P state size of h
// (proj_size, or H without a projection), G gates of the cell, N rows of all steps together (T * B, or the sum of
// batch_sizes). Every index and stride is 64 bit and counts elements.
#pragma once

#include <cstdint>

// For every function that kernels of several instruction sets include: it has no symbol of its own, so the linker
// cannot give one instruction set's code to another.
#if defined(__CUDACC__)
#define FRNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FRNN_HOST_DEVICE inline __attribute__((always_inline))
#endif

// For what kernels that are compiled elsewhere (cpu/custom.h) call; there are none in the C library.
#if defined(FRNN_STREAMS_ALONE)
#define FRNN_EXPORT
#else
#define FRNN_EXPORT __attribute__((visibility("default")))
#endif

namespace fused_rnn {

// From `custom` on: cells of somebody's own (cpu/custom.h), each with a number that follows from its formulas.
enum class CellKind : int32_t { rnn_tanh = 0, rnn_relu = 1, lstm = 2, gru = 3, custom = 1 << 16 };

// Of a gate or a state.
enum class Activation : int32_t { tanh = 0, sigmoid = 1, relu = 2, hard_sigmoid = 3, softsign = 4, identity = 5 };

// What a call does beside the plain cell; fused_rnn/settings.py describes each. Numbers that are 0 stand for nothing.
struct Within {
  Activation activation = Activation::tanh;
  Activation recurrent_activation = Activation::sigmoid;
  bool reset_after = true;
  bool peephole = false;
  bool coupled_gates = false;
  int64_t num_heads = 1;
  bool layer_norm = false;
  int64_t bptt_steps = 0;
  bool reset_state = false;
  bool return_states = false;
  double cell_clip = 0;
  double recurrent_grad_clip = 0;
  double zoneout = 0;
  double zoneout_cell = 0;
};

enum class DType : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
constexpr int stored_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// In what the matrices of a float32 layer are stored, where streams run it (stream/).
enum class WeightFormat : int32_t { same = 0, int8 = 1, bfloat16 = 2, float16 = 3 };

// A sequence of rows. Row b of step t begins at data + step(t) + b * batch_stride; features are contiguous.
struct Sequence {
  void* data = nullptr;
  int64_t time_stride = 0;  // unused when the batch is packed
  int64_t batch_stride = 0;
};

// Which rows are live at which step. Dense: batch_sizes is null and each step has all B rows. Packed, as
// torch.nn.utils.rnn.PackedSequence: batch_sizes[t] rows (not increasing in t), and offsets[t] rows before step t.
struct Steps {
  int64_t T = 0;
  int64_t B = 0;
  const int64_t* batch_sizes = nullptr;
  const int64_t* offsets = nullptr;  // T + 1 entries, offsets[T] = N
  // Dense only: (T, B) bytes, 0 where row b has no step t: its state goes on as it is. Null: there are none.
  const uint8_t* mask = nullptr;
  // Dense only: (T, B) bytes; where not 0 row b begins anew before step t, in the reverse direction after it. Null:
  // none.
  const uint8_t* reset = nullptr;

  // Whether row b begins anew before step t.
  FRNN_HOST_DEVICE bool begins_anew(int64_t t, int64_t b, bool reverse) const {
    const int64_t mark = reverse ? t + 1 : t;
    return mark < T && reset[mark * B + b] != 0;
  }
  FRNN_HOST_DEVICE int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  FRNN_HOST_DEVICE int64_t first_row(int64_t t) const { return offsets ? offsets[t] : t * B; }
  FRNN_HOST_DEVICE int64_t total_rows() const { return offsets ? offsets[T] : T * B; }
  FRNN_HOST_DEVICE int64_t step(const Sequence& s, int64_t t) const {
    return offsets ? offsets[t] * s.batch_stride : t * s.time_stride;
  }
};

// Parameters of one direction, row-major and contiguous, in the layer's dtype.
struct Weights {
  const void* w_ih = nullptr;      // (G * H, I)
  const void* w_hh = nullptr;      // (G * H, P)
  const void* b_ih = nullptr;      // (G * H) or null
  const void* b_hh = nullptr;      // (G * H) or null
  const void* w_hr = nullptr;      // (P, H) or null: no projection
  const void* peephole = nullptr;  // (3 * H) or null, of i, f, o
  // Of layer normalisation, or null: the gains of w_ih x and w_hh h (G * H), the gain and bias of c (H). Without biases
  // norm_c_bias is null, too.
  const void* norm_ih = nullptr;
  const void* norm_hh = nullptr;
  const void* norm_c = nullptr;
  const void* norm_c_bias = nullptr;
  // Of int8 matrices: what each row is multiplied with, (G * H), (G * H) and (P).
  const float *scale_ih = nullptr, *scale_hh = nullptr, *scale_hr = nullptr;
};

// What options give a direction of a layer beside its weights. Null: nothing.
struct Extras {
  const void* reset_h = nullptr;          // (B, P), layer dtype: what rows begin anew from; null: zeros
  const void* reset_c = nullptr;          // (B, H)
  const void* dropout = nullptr;          // (B, P), layer dtype: factors of h before w_hh
  const uint8_t* zoneout = nullptr;       // (N, ceil(P / 8)): bit u % 8 of byte u / 8: unit u keeps its h
  const uint8_t* zoneout_cell = nullptr;  // (N, ceil(H / 8)): its c
};

struct LayerSizes {
  CellKind kind = CellKind::lstm;
  DType dtype = DType::float32;
  int64_t input_size = 0;
  int64_t hidden_size = 0;
  int64_t state_size = 0;  // P
  int64_t heads = 1;       // w_hh is block-diagonal, of so many blocks: (G * H, P / heads)
  bool layer_norm = false;
  int32_t num_directions = 1;
  WeightFormat format = WeightFormat::same;
};

// One direction of one layer, forward. Pointers without a word on null are never null.
struct DirectionForward {
  Weights weights;
  Extras extras;
  const void* h0 = nullptr;  // (B, P) or null: zeros
  const void* c0 = nullptr;  // (B, H) or null: zeros
  void* h_n = nullptr;       // (B, P) or null: not needed
  void* c_n = nullptr;       // (B, H), null unless the cell has a cell state
  // (N, saved_gates * H), layer dtype; null: not kept for the backward pass. With layer normalisation each row goes on
  // with w_ih x and w_hh h (2 * G * H) less their means.
  void* gates = nullptr;
  void* cells = nullptr;  // (N, H), accumulation dtype (float; double for float64); null: not kept
};

// A direction of a layer whose steps were computed, and perhaps how they change along a direction in which everything
// may change (cells/derivatives.h): dense, without options or a projection, the layer's dtype, which is that of sums.
// Rows (N, .), those of h D * H apart and its first at this direction's features; null where the cell has none.
struct KnownSteps {
  const void* saved = nullptr;              // (N, saved * H)
  const void *h = nullptr, *c = nullptr;    // after each step
  const void *h0 = nullptr, *c0 = nullptr;  // (B, H), or null: zeros
};

struct LayerForward {
  LayerSizes sizes;
  Steps steps;
  Sequence x;                     // (I features)
  Sequence y;                     // (num_directions * P features), direction d writes features d * P ...
  Sequence factors;               // of y on its way to a layer above that runs at the same time; data null: ones
  DirectionForward direction[2];  // direction[1] runs from the last step to the first
  bool inference = false;         // the weights may well be those of the next call
  bool plain_gates = true;        // nothing of what follows concerns the gates
  Within within;
  // Of each direction, or null. If set, the pass is of changes: x, h0, c0 and the biases are how those of the known
  // steps change, what is computed is how the results do, and changes of w_ih are columns beside w_ih, for inputs
  // beside x.
  const KnownSteps* known = nullptr;
  const void* more_of_sums[2] = {};  // of each direction, (N, gates * H): added to the recurrent products, or null

  // Whether h is zeros before the first step of a direction, in all rows.
  bool begins_at_zero(int d) const { return !direction[d].h0 && !(steps.reset && direction[d].extras.reset_h); }
};

// One direction of one layer, backward. A null gradient is one that nobody needs.
struct DirectionBackward {
  Weights weights;
  Extras extras;
  const void* h0 = nullptr;
  const void* c0 = nullptr;
  const void* gates = nullptr;  // null: computed again from x and the states
  const void* cells = nullptr;
  const void* grad_h_n = nullptr;    // (B, P) or null: zeros
  const void* grad_c_n = nullptr;    // (B, H) or null: zeros
  const void* grad_cells = nullptr;  // (N, H), accumulation dtype, of c after each step; null: zeros
  void* grad_h0 = nullptr;
  void* grad_c0 = nullptr;
  void* grad_w_ih = nullptr;
  void* grad_w_hh = nullptr;
  void* grad_b_ih = nullptr;
  void* grad_b_hh = nullptr;
  void* grad_w_hr = nullptr;
  void* grad_peephole = nullptr;
  void* grad_norm_ih = nullptr;
  void* grad_norm_hh = nullptr;
  void* grad_norm_c = nullptr;
  void* grad_norm_c_bias = nullptr;
  void* grad_reset_h = nullptr;  // (B, P)
  void* grad_reset_c = nullptr;  // (B, H)
};

// What a caller has to do with the gradients of every step of a direction: rows (N, .), null for none.
struct StepGradients {
  // Added to the gradients of the sums (grad_gates * H), of h before the step and of c before it.
  const void *more_of_sums = nullptr, *more_of_h = nullptr, *more_of_c = nullptr;
  // Where they go: those of the sums with what was added, and those of h and c after the step.
  void *sums = nullptr, *h = nullptr, *c = nullptr;
  // What else gradients of parameters are sums of: with a projection the gradient of the projected h (P) and h before
  // it (H), with peepholes the c that o sees (H). With layer normalisation W_ih x and W_hh h normalised and their
  // gradients before that, each (2 * G * H), and for an LSTM c normalised and its gradient, with gain and bias (H).
  void *projected = nullptr, *hidden = nullptr, *seen_c = nullptr;
  void *normal = nullptr, *before_norms = nullptr, *normal_c = nullptr, *of_normal_c = nullptr;
};

struct LayerBackward {
  LayerSizes sizes;
  Steps steps;
  Sequence x;                // the layer's input
  Sequence y;                // the layer's output
  Sequence grad_y;           // data null: zeros
  Sequence grad_h;           // beside it, of y as the states of the layer; data null: zeros
  Sequence grad_x;           // data null: not needed
  Sequence factors;          // as forward
  bool reuse_gates = false;  // nobody reads the saved gates after this: their memory may be written
  bool plain_gates = true;
  Within within;
  const StepGradients* step_gradients = nullptr;  // of each direction, in float32 and float64; or null
  DirectionBackward direction[2];
};

}  // namespace fused_rnn
