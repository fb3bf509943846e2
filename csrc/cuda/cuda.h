// What crosses from the CUDA operators (ops_cuda.cpp) to the kernels. No torch header, no CUDA header: streams are
// cudaStream_t as void*, and every function returns null, or a text that says what went wrong.
//
// Letters as in problem.h. Every pointer is to device memory unless it says "host"; "sum type" is float, and double for
// float64. Nothing here allocates, synchronises, or keeps a pointer after it returned; all work goes to the stream
// given, and every launch can be captured in a CUDA graph.
//
// A layer, forward: one product x W_ih^T for all steps writes the projections, then the steps run, either one launch a
// step (step_forward, after the step's product h W_hh^T), or all in one launch (persistent_forward). Backward: the
// steps give the gradients of the gates for all rows, and products over all rows follow.
#pragma once

#include "../problem.h"

namespace fused_rnn {
namespace cuda {

// Of one GPU, read once.
struct DeviceInfo {
  int index = 0;
  int arch = 0;  // 80, 90, 100, 120: ten times the compute capability
  int sms = 0;
  int64_t shared_per_block = 0;  // the largest dynamic shared memory of a block (opt-in)
  int64_t shared_per_sm = 0;
  int64_t registers_per_sm = 0;  // of 32 bits
  int64_t l2_bytes = 0;
  int max_cluster = 1;  // blocks; 1: no clusters
  // Clusters of 1, 2, 4, 8 and 16 blocks that are resident together when a block takes a whole SM; -1: not known.
  int resident_clusters[5] = {-1, -1, -1, -1, -1};
  bool cooperative = false;
  int clock_khz = 0;
};

const char* read_device(int index, DeviceInfo& info);

// plan.h: which persistent variant holds a layer, if any.
struct Plan;

// One launch a step

// One direction at one step. Its live rows are the first `rows` of the batch; of these, the first previous_rows were
// live in the step before (in this direction's order) and go on from the running state; the others begin from the
// initial one.
struct StepForward {
  int64_t rows = 0;
  int64_t previous_rows = 0;  // not above rows
  // (rows) bytes, or null. Where 0, the state of the row goes on as it is: it is the new h and c, the saved gates are
  // zeros, and the projection may be anything.
  const uint8_t* mask = nullptr;
  const void* projection = nullptr;  // (rows, gates * H), row r at + r * projection_stride; may be where gates or y is
  int64_t projection_stride = 0;
  const void* product = nullptr;  // (rows, gates * H) of h W_hh^T, sum type; null: zeros
  const void* b_ih = nullptr;     // (gates * H), null: zeros; added here
  const void* b_hh = nullptr;
  const void* h0 = nullptr;  // (B, H), the layer's dtype, null: zeros; only GRU reads it, or a mask is why
  const void* c0 = nullptr;  // (B, H), the layer's dtype, null: zeros
  void* c = nullptr;         // (B, H), sum type, the running cell state; null: no cell state, or never needed again
  void* c_n = nullptr;       // (B, H), the layer's dtype: the new cell state again; null: not wanted
  void* h = nullptr;         // (B, H), the running h, which is read where h0 is; null: not wanted (read as zeros)
  void* y = nullptr;         // (rows, H), row r at + r * y_stride: the new h again
  int64_t y_stride = 0;
  void* gates = nullptr;  // (rows, saved * H), or null
  void* cells = nullptr;  // (rows, H), sum type, or null
};

// Both directions that are at their own steps now; count is 1 or 2. The two may have different rows.
const char* step_forward(CellKind kind, DType dtype, int64_t hidden_size, const StepForward* directions, int count,
                         void* stream);

struct StepBackward {
  int64_t rows = 0;
  // As forward. Where 0, the gradients of the gates are zeros, and those of h (grad_y included) and c go on as they
  // are.
  const uint8_t* mask = nullptr;
  const void* gates = nullptr;  // (rows, saved * H)
  const void* cells = nullptr;  // (rows, H), sum type
  const void* y = nullptr;      // (rows, H) at this step, row r at + r * y_stride; only the plain recurrence reads it
  int64_t y_stride = 0;
  // The step before in this direction's order: its first previous_rows rows are these, the others are the initial
  // state, (rows, H) in the layer's dtype; null: zeros.
  int64_t previous_rows = 0;
  const void* previous_cells = nullptr;  // (previous_rows, H), sum type
  const void* previous_y = nullptr;      // (previous_rows, H), row r at + r * y_stride; only GRU reads it
  const void* h0 = nullptr;
  const void* c0 = nullptr;
  const void* grad_y = nullptr;  // (rows, H), row r at + r * grad_y_stride; null: zeros
  int64_t grad_y_stride = 0;
  // (rows, H), sum type: gradient of this step's h from the steps after it. Replaced, in a GRU or with a mask alone, by
  // the part of the gradient of the previous h that does not go through W_hh.
  void* dh = nullptr;
  void* dc = nullptr;          // (rows, H), sum type: gradient of this step's c; replaced by that of the previous c
  void* grad_gates = nullptr;  // (rows, grad_gates * H); may be where gates is
};

const char* step_backward(CellKind kind, DType dtype, int64_t hidden_size, const StepBackward* directions, int count,
                          void* stream);

// A step with options

// What options do in a step of one direction, beside its StepForward. Null: nothing.
struct ForwardOptions {
  // (rows, ceil(H / 8)): bit u % 8 of byte u / 8 says whether unit u keeps its h, or c.
  const uint8_t* zoneout = nullptr;
  const uint8_t* zoneout_cell = nullptr;
  // (rows) bytes: where not 0 the row begins anew before the next step, and what goes on from this one is reset_h and
  // reset_c (B, H), null: zeros. y, c_n, gates and cells are those of the step all the same.
  const uint8_t* anew = nullptr;
  const void* reset_h = nullptr;
  const void* reset_c = nullptr;
  const void* dropout = nullptr;   // (B, H), the layer's dtype: factors of h before W_hh
  void* multiplied = nullptr;      // (B, H), the layer's dtype: what goes on of h, times the factors
  const void* peephole = nullptr;  // (3 * H)
  // (rows, H), row r at + r * gated_stride: with the reset gate before the product what W_hn multiplies, r times h and
  // its factors. reset_forward writes it, in place of the last saved value where those are kept; nobody else does.
  void* gated = nullptr;
  int64_t gated_stride = 0;
};

// With a projection, step_forward gives y before it, and this the h after it, of both directions.
struct ProjectedForward {
  int64_t rows = 0;
  const uint8_t* mask = nullptr;     // as StepForward
  const void* projected = nullptr;   // (rows, P), sum type
  const uint8_t* zoneout = nullptr;  // (rows, ceil(P / 8))
  double rate = 0;                   // without those bits: how much of the old h every unit keeps
  const uint8_t* anew = nullptr;     // as ForwardOptions
  const void* reset_h = nullptr;     // (B, P)
  const void* dropout = nullptr;     // (B, P)
  void* multiplied = nullptr;        // (B, P)
  void* h = nullptr;                 // (B, P): the old h, replaced by what goes on
  void* y = nullptr;                 // (rows, P), row r at + r * y_stride
  int64_t y_stride = 0;
};

struct BackwardOptions {
  const uint8_t* zoneout = nullptr;  // as ForwardOptions
  const uint8_t* zoneout_cell = nullptr;
  // (rows) bytes: where not 0 the row began anew before this step: the state before it is reset_h and reset_c.
  const uint8_t* anew = nullptr;
  const void* reset_h = nullptr;
  const void* reset_c = nullptr;
  const void* grad_h = nullptr;  // (rows, H), row r at + r * grad_h_stride: more of what comes to this step's h
  int64_t grad_h_stride = 0;
  const void* grad_cells = nullptr;  // (rows, H), sum type: more of what comes to its c
  const void* peephole = nullptr;    // (3 * H)
  void* grad_peephole = nullptr;     // (B, 3 * H), sum type: this step's are added; null: not wanted
  void* hidden = nullptr;            // (rows, H), the layer's dtype: h before a projection; null: not wanted
  // For reset_backward, with the reset gate before the product. The gradient of ForwardOptions::gated, (rows, H) in the
  // sum type; the factors of h that are in it, (B, H) in the layer's dtype; and where what it is to h times its factors
  // goes, (rows, H) in the sum type. Null: it is added to dh.
  const void* grad_gated = nullptr;
  const void* dropout = nullptr;
  void* grad_multiplied = nullptr;
};

// With a projection: from the gradient of the h after it to the gradient of what was projected.
struct ProjectedBackward {
  int64_t rows = 0;
  const uint8_t* mask = nullptr;
  const uint8_t* zoneout = nullptr;  // (rows, ceil(P / 8))
  double rate = 0;
  const void* grad_y = nullptr;  // (rows, P), row r at + r * grad_y_stride; null: zeros
  int64_t grad_y_stride = 0;
  const void* grad_h = nullptr;  // the same
  int64_t grad_h_stride = 0;
  void* dh = nullptr;         // (rows, P), sum type: from the steps after; replaced by what passes this step by
  void* projected = nullptr;  // (rows, P), the layer's dtype: gradient of the projection's result
};

// With layer normalisation `saved` is followed by 2 * gates values of a unit, of w_ih x and of w_hh h less their means,
// and `grad_gates` by the gradients of both before they are normalised. Of one direction; null where there is none.
struct ForwardNorm {
  const void* gain_ih = nullptr;  // (gates * H), the layer's dtype
  const void* gain_hh = nullptr;
  const void* gain_c = nullptr;  // (H), of an LSTM
  const void* bias_c = nullptr;  // (H)
  void* output_gate = nullptr;   // (B, H), sum type: of an LSTM, for the kernel alone
  void* new_cell = nullptr;
};
struct BackwardNorm {
  const void* gain_ih = nullptr;
  const void* gain_hh = nullptr;
  const void* gain_c = nullptr;
  const void* bias_c = nullptr;
  void* to_output = nullptr;  // (B, H), sum type, for the kernel alone
  void* normal_c = nullptr;   // (rows, H), sum type: c normalised, without gain and bias
  void* grad_c = nullptr;     // (rows, H), sum type: gradient of what gain and bias make of it
};

// Between two steps of the backward pass: what the step has handed back to the state before it.
struct HandedBack {
  int64_t rows = 0;
  int64_t previous_rows = 0;       // as StepBackward: the others' state before the step is that of the caller
  const void* product = nullptr;   // (rows, P), sum type: what came through W_hh; null: it is in dh already
  const void* dropout = nullptr;   // (B, P), the layer's dtype: by which that is multiplied before it is added to dh
  const uint8_t* anew = nullptr;   // (rows) bytes: the gradient belongs to what the row began anew from, not to before
  void* grad_reset_h = nullptr;    // (B, P), sum type: to which it is added there; null: not wanted
  void* grad_reset_c = nullptr;    // (B, H)
  bool ends = false;               // no gradient goes further back
  double clip = 0;                 // the largest that h of an earlier step gets; 0: any
  const uint8_t* clips = nullptr;  // (rows) bytes: where; null: in the first previous_rows rows
  void* dh = nullptr;              // (rows, P), sum type
  void* dc = nullptr;              // (rows, H), sum type, or null
};

// step_forward and step_backward with what `within` says and the options of each direction. dh is replaced in every
// cell. within.zoneout is 0 with a projection. state_size: P; cell_size: H, or 0 without a cell state.
const char* step_forward_with_options(CellKind kind, DType dtype, int64_t hidden_size, const StepForward* directions,
                                      const ForwardOptions* options, const Within& within, int count, void* stream);
const char* step_backward_with_options(CellKind kind, DType dtype, int64_t hidden_size, const StepBackward* directions,
                                       const BackwardOptions* options, const Within& within, int count, void* stream);
// Of a GRU with within.reset_after false, where step_forward_with_options follows, with the product of `gated` and W_hn
// in n's part of StepForward::product, and step_backward_with_options goes before, whose gradient of n's sum times W_hn
// is grad_gated: it gives no gradient of r, which these do.
const char* reset_forward(DType dtype, int64_t hidden_size, const StepForward* directions,
                          const ForwardOptions* options, const Within& within, int count, void* stream);
const char* reset_backward(DType dtype, int64_t hidden_size, const StepBackward* directions,
                           const BackwardOptions* options, const Within& within, int count, void* stream);
const char* step_forward_with_norm(CellKind kind, DType dtype, int64_t hidden_size, const StepForward* directions,
                                   const ForwardOptions* options, const ForwardNorm* norms, const Within& within,
                                   int count, void* stream);
const char* step_backward_with_norm(CellKind kind, DType dtype, int64_t hidden_size, const StepBackward* directions,
                                    const BackwardOptions* options, const BackwardNorm* norms, const Within& within,
                                    int count, void* stream);
const char* projected_forward(DType dtype, int64_t state_size, const ProjectedForward* directions, int count,
                              void* stream);
const char* projected_backward(DType dtype, int64_t state_size, const ProjectedBackward* directions, int count,
                               void* stream);
const char* hand_back(DType dtype, int64_t state_size, int64_t cell_size, const HandedBack* directions, int count,
                      void* stream);

// Over all rows

// Sums of the columns of (rows, columns), row r at data + r * stride, in a fixed order: out[k] = sum, again[k] = the
// same (null: not wanted). workspace: column_sums_workspace bytes.
int64_t column_sums_workspace(DType dtype, int64_t rows, int64_t columns);
const char* column_sums(DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride, void* out,
                        void* again, void* workspace, void* stream);

// Puts the rows of each step and their prefix sums into device memory: sizes (T), offsets (T + 1). batch_sizes is in
// host memory and travels as kernel arguments, so there is nothing to wait for, and a captured graph keeps it.
const char* upload_steps(const int64_t* batch_sizes, int64_t T, int64_t* sizes, int64_t* offsets, void* stream);

// h before each row's step, (N, P) contiguous: row b of step t is that of the step before (t - 1, or t + 1 in reverse),
// or of h0 (B, P), or zeros. steps: device arrays when packed; rows: N.
const char* previous_states(DType dtype, int64_t size, const Steps& steps, int64_t rows, bool reverse,
                            const Sequence& y, const void* h0, void* out, void* stream);

// The same as it was multiplied by W_hh: where the row began anew before the step, of reset_h (B, P), null: zeros;
// times dropout (B, P), null: ones; zeros where steps.mask has no step, whatever stands there.
const char* multiplied_states(DType dtype, int64_t size, const Steps& steps, int64_t rows, bool reverse,
                              const Sequence& y, const void* h0, const void* reset_h, const void* dropout, void* out,
                              void* stream);

// bits (rows, ceil(units / 8)) from the number at `seed`: cells/draw.h.
const char* draw_bits(const int64_t* seed, int64_t rows, int64_t units, double rate, uint8_t* bits, void* stream);

// All steps in one launch

// What options do in the steps of one direction, beside its PersistentForward or PersistentBackward. Null: nothing.
struct PersistentOptions {
  int32_t any = 0;  // 0: nothing of this is looked at, nor Steps::reset
  // (N, ceil(H / 8)): bit u % 8 of byte u / 8 says whether unit u keeps its h, or c; without those bits every unit
  // keeps so much of it.
  const uint8_t* zoneout = nullptr;
  const uint8_t* zoneout_cell = nullptr;
  float rate = 0, cell_rate = 0;
  float cell_clip = 0;  // the largest c of an LSTM; 0: any
  // (B, H), the layer's dtype: what rows begin anew from (null: zeros), and factors of h before W_hh.
  const void* reset_h = nullptr;
  const void* reset_c = nullptr;
  const void* dropout = nullptr;
  // Backward. (B, H), sum type: the gradients of what rows began anew from are added; null: not wanted. With the first,
  // grad_h0 is wanted, too.
  void* grad_reset_h = nullptr;
  void* grad_reset_c = nullptr;
  // Backward. The largest of what a step hands back to h of an earlier one, 0: any; with a mask in the steps where
  // clips, (T, B) bytes, is not 0. No gradient goes back from steps at multiples of bptt_steps; 0: from none.
  float grad_clip = 0;
  const uint8_t* clips = nullptr;
  int32_t bptt_steps = 0;
};

struct PersistentForward {
  // The steps of this launch, in order of time: from first_step to before end_step. Everything that belongs to a row or
  // a step is where it is for all steps.
  int64_t first_step = 0, end_step = 0;
  const void* w_hh = nullptr;        // (gates * H, H)
  const void* w_ih = nullptr;        // (gates * H, H), of a layer above another in a wavefront, which has no projection
  const void* projection = nullptr;  // (N, gates * H), row n at + n * projection_stride; may be where gates or y is
  int64_t projection_stride = 0;
  const void* b_ih = nullptr;  // (gates * H), null: zeros; added here
  const void* b_hh = nullptr;
  const void* h0 = nullptr;  // (B, H), null: zeros; before the first of these steps
  const void* c0 = nullptr;
  void* c = nullptr;    // (B, H), sum type: read in place of c0, and written at the end; null: neither
  void* h_n = nullptr;  // (B, H), after the last of these steps; not where h0 is
  void* c_n = nullptr;  // (B, H), null unless the cell has a cell state
  void* y = nullptr;    // (N, H), row n at + n * y_stride; null: not wanted, of a layer below another in a wavefront
  int64_t y_stride = 0;
  // (N, H), row n at + n * factors_stride: of h on its way to the layer above in a wavefront; null: ones.
  const void* factors = nullptr;
  int64_t factors_stride = 0;
  void* gates = nullptr;  // (N, saved * H), or null
  void* cells = nullptr;  // (N, H), sum type, or null
  // Of a layer that runs by itself. h0 and c0 are what rows that begin anew before the first of all steps begin from.
  PersistentOptions options;
};

struct PersistentBackward {
  const void* w_hh = nullptr;  // (gates * H, H)
  const void* w_ih = nullptr;  // (gates * H, H), of a layer above another in a wavefront
  const void* gates = nullptr;
  const void* cells = nullptr;
  const void* y = nullptr;  // (N, H), row n at + n * y_stride
  int64_t y_stride = 0;
  const void* h0 = nullptr;
  const void* c0 = nullptr;
  const void* grad_y = nullptr;  // (N, H), row n at + n * grad_y_stride; null: zeros, or from the layer above
  int64_t grad_y_stride = 0;
  const void* factors = nullptr;  // as forward, of what comes from the layer above
  int64_t factors_stride = 0;
  const void* grad_h_n = nullptr;  // (B, H), null: zeros
  const void* grad_c_n = nullptr;
  void* grad_gates = nullptr;  // (N, grad_gates * H); may be where gates is
  void* grad_h0 = nullptr;     // (B, H), null: not wanted
  void* grad_c0 = nullptr;
  PersistentOptions options;  // as forward, but that h0 and c0 are those of the caller
};

// Whether the kernel of this plan has the options above: where its warps have two roles, those of the gates have
// registers for them.
bool persistent_has_options(const LayerSizes& sizes, const Plan& plan, const DeviceInfo& device);

// Whether all blocks that wait for each other can be resident together, as the driver says of this device (not whether
// the plan is a good one). What cannot is not launched: the caller plans again without the variant.
bool persistent_fits(const LayerSizes& sizes, const Plan& plan, const DeviceInfo& device);

// parts, plan.parts() of them, are the directions of a layer, of which part[1] runs from the last step to the first, or
// the layers of a wavefront, lowest first. steps: device arrays when packed, and a mask in device memory: what it does
// to a row is said at StepForward and StepBackward. workspace: plan.workspace_bytes, not initialised. sizes.state_size
// == sizes.hidden_size.
const char* persistent_forward(const LayerSizes& sizes, const Steps& steps, const PersistentForward* parts,
                               const Plan& plan, const DeviceInfo& device, void* workspace, void* stream);
const char* persistent_backward(const LayerSizes& sizes, const Steps& steps, const PersistentBackward* parts,
                                const Plan& plan, const DeviceInfo& device, void* workspace, void* stream);

// Barriers

// So many barriers, one after the other: of one cluster of the most blocks, or of a grid of one block per SM. counter
// is a word of device memory. Exchanges: every block of the cluster sends a word to every block and waits for theirs.
const char* run_cluster_barriers(int64_t rounds, const DeviceInfo& device, void* stream);
const char* run_cluster_exchanges(int64_t rounds, const DeviceInfo& device, void* stream);
const char* run_grid_barriers(int64_t rounds, const DeviceInfo& device, uint32_t* counter, void* stream);

}  // namespace cuda
}  // namespace fused_rnn
