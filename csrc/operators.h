// The operators torch.ops.fused_rnn.* for any backend: checks, and the loop over layers. Shapes stand in
// fused_rnn/ops.py, beside the fake kernels and the autograd formulas.
//
// The checks here keep the kernels inside their memory whatever is passed; messages for users come from
// fused_rnn/_checks.py, which sees the arguments first.
//
// A Backend runs one layer whose tensors are on one device:
//   Backend(input)                     chooses the device; lives until the last layer was given to it
//   forward(layer), backward(layer)
//   one_matrix                         whether x, y and their gradients must be matrices of N rows at one distance
//   adds_into_grad_x                   whether the directions of a layer add into grad_x, which then holds zeros
//   copy(to, from)                     of one size, both contiguous
//   masks_in_kernels                   whether steps may have a mask; the others get the packed batch of its pieces
//   resets_before_product              whether a GRU may have its reset gate before the product (reset_after=False)
//   vector_units(input)                how many units each head has a multiple of
//   wavefronts                         whether it may run several layers at once; with
//     layers_at_once(sizes, layers, steps, backward)     how many of so many equal layers
//     forward(layer, count), backward(layer, count)      those: lowest first, each with a y or a grad_x only where it
//     is
//                                                        wanted, x only where the weights' gradients want it
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cpu/custom.h"
#include "cpu/plan.h"
#include "ops.h"
#include "pieces.h"

namespace fused_rnn {

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::float32;
    case at::kDouble: return DType::float64;
    case at::kBFloat16: return DType::bfloat16;
    case at::kHalf: return DType::float16;
    default: break;
  }
  TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16, got ", t.scalar_type());
}

inline at::ScalarType accumulation_dtype(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Whether the memory that the tensor's sizes speak of is there: not after its storage was freed, as sharding and
// offloading do.
inline bool has_memory(const Tensor& t) {
  if (t.numel() == 0 || !t.has_storage()) return true;
  int64_t last = t.storage_offset();
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return t.unsafeGetTensorImpl()->unsafe_storage().nbytes() >= size_t(last + 1) * t.element_size();
}
inline constexpr const char* without_memory = ": expected a tensor with memory, got one whose storage was freed";
inline void check_memory(const Tensor& t, const char* name) { TORCH_CHECK(has_memory(t), name, without_memory); }

// What a forward pass saved.
inline void check_saved(const Tensor& t, const Tensor& input, at::IntArrayRef shape, at::ScalarType dtype,
                        const char* name) {
  TORCH_CHECK(t.device() == input.device() && t.scalar_type() == dtype && t.sizes() == shape && t.is_contiguous(), name,
              ": expected those of this call, ", dtype, " ", shape, " on ", input.device(), ", got ", t.scalar_type(),
              " ", t.sizes(), " on ", t.device());
  check_memory(t, name);
}

inline void check_like(const Tensor& t, const Tensor& input, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(t.device() == input.device(), name, ": expected a tensor on ", input.device(), ", got ", t.device());
  TORCH_CHECK(t.scalar_type() == input.scalar_type(), name, ": expected ", input.scalar_type(), ", got ",
              t.scalar_type());
  TORCH_CHECK(t.sizes() == shape, name, ": expected ", shape, ", got ", t.sizes());
  check_memory(t, name);
}

// Features must be contiguous; steps and rows may have any stride.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

// All rows as one matrix (N, features): contiguous features, rows at one distance, not above each other.
inline Tensor as_matrix(const Tensor& t) {
  const Tensor m = t.dim() == 3 ? t.flatten(0, 1) : t;
  const int64_t width = m.size(1);
  return (width <= 1 || m.stride(1) == 1) && (m.size(0) <= 1 || m.stride(0) >= width) ? m : m.contiguous();
}

template <class Backend>
Tensor rows_for(const Tensor& t) {
  return Backend::one_matrix && t.defined() ? as_matrix(t) : t;
}

inline const void* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* mutable_data_or_null(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// t[index] of a contiguous tensor with a leading dimension.
template <class T>
T* slice(T* data, const Tensor& t, int64_t index) {
  if (!t.defined() || t.numel() == 0) return nullptr;
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + index * t.stride(0) * t.element_size();
}
inline const void* const_slice(const Tensor& t, int64_t index) { return slice(data_or_null(t), t, index); }
inline void* mutable_slice(const Tensor& t, int64_t index) { return slice(mutable_data_or_null(t), t, index); }

// What a caller has kernels for that not all have.
struct Takes {
  bool stored = false;  // matrices in another format than the rest, which is float32 then
  bool reset_before = false;
};

// Arguments that forward and backward share, checked.
struct Stack {
  Settings settings;
  int64_t D;
  bool batch_first, packed;  // of the tensors here
  int64_t T, B, N, I, H, P;
  int64_t C;                   // private states of a unit times H: size of c
  Tensor input;                // (T, B, I) view, or (N, I)
  std::vector<Tensor> params;  // contiguous
  std::vector<int64_t> sizes, offsets;
  std::vector<Tensor> dropout;  // factors, (N, D * P)
  Tensor mask;                  // (T, B), or undefined
  Tensor reset;                 // (T, B), or undefined
  Tensor h0, c0;
  Tensor reset_h, reset_c;       // what rows begin anew from; undefined: zeros
  Tensor recurrent_dropout;      // (L * D, B, P)
  Tensor zoneout, zoneout_cell;  // (L * D, N, bytes)

  CellKind kind() const { return settings.kind; }
  int64_t num_layers() const { return settings.num_layers; }
  int64_t params_per_direction() const { return first_scale() + num_scales(); }
  // Of int8 matrices: the scales of their rows, behind everything else of a direction.
  int64_t num_scales() const { return format != WeightFormat::int8 ? 0 : projects() ? 3 : 2; }
  int64_t first_scale() const { return first_norm() + num_norms(); }
  // Of layer normalisation: how many parameters, behind the others of a direction.
  int64_t num_norms() const {
    if (!settings.within.layer_norm) return 0;
    return 2 + (!has_cell_state(kind()) ? 0 : settings.has_biases ? 2 : 1);
  }
  int64_t first_norm() const { return peephole() + (settings.within.peephole ? 1 : 0); }
  int64_t peephole() const { return projection() + (projects() ? 1 : 0); }
  bool projects() const { return P != H; }

  Stack(const Tensor& input_, const OptionalTensor& h0_, const OptionalTensor& c0_, at::TensorList params_,
        const Controls& controls, const Settings& settings_, Takes takes = {})
      : settings(settings_),
        D(settings.num_directions()),
        batch_first(settings.batch_first && !controls.batch_sizes),
        packed(controls.batch_sizes.has_value()) {
    dtype_of(input_, "input");
    check_memory(input_, "input");
    TORCH_CHECK(input_.dim() == (packed ? 2 : 3), "input: expected ", packed ? 2 : 3, " dimensions, got ",
                input_.dim());
    input = with_contiguous_rows(batch_first ? input_.transpose(0, 1) : input_);
    I = input.size(-1);
    // Before the steps, whose number is no more than that of the input's elements only then.
    TORCH_CHECK(I >= 1, "input: expected at least 1 feature, got ", input_.sizes());
    read_steps(controls.batch_sizes);
    if (controls.mask) mask = read_marks(*controls.mask, "mask");
    if (controls.reset) reset = read_marks(*controls.reset, "reset");
    check_within(controls, takes);

    const int64_t layers = num_layers(), fewest = settings.has_biases ? 4 : 2, given = int64_t(params_.size());
    TORCH_CHECK(given >= fewest, "params: expected at least ", fewest, " tensors, got ", given);
    if (takes.stored && input_.scalar_type() == at::kFloat) read_format(params_[0]);
    TORCH_CHECK(params_[1].dim() == 2, "params[1]: expected 2 dimensions, got ", params_[1].dim());
    H = params_[1].size(0) / gate_count(kind());
    const int64_t heads = settings.within.num_heads;
    // Before they are multiplied.
    TORCH_CHECK(heads == 1 || (H % heads == 0 && params_[1].size(1) == H / heads), "params[1]: expected [",
                gate_count(kind()) * H, ", ", H / heads, "] for ", heads, " heads, got ", params_[1].sizes());
    P = heads == 1 ? params_[1].size(1) : H;
    C = private_states(kind()) * H;
    TORCH_CHECK(H >= 1 && P >= 1, "params[1]: expected at least 1 unit, got ", params_[1].sizes());
    TORCH_CHECK(P == H || kind() == CellKind::lstm, "params[1]: only an LSTM has a projection, got ",
                params_[1].sizes());
    const int64_t states = settings.within.reset_state ? 1 + has_cell_state(kind()) : 0;
    const int64_t expected = layers * D * params_per_direction() + states;
    TORCH_CHECK(given == expected, "params: expected ", expected, " tensors, got ", given);
    params.reserve(expected - states);
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t d = 0; d < D; ++d) read_params(params_, l);
    }
    h0 = initial(h0_, P, "h0");
    TORCH_CHECK(!c0_ || has_cell_state(kind()), "c0: expected none without a cell state");
    c0 = initial(c0_, C, "c0");
    if (states > 0) reset_h = initial(params_[expected - states], P, "reset_state");
    if (states > 1) reset_c = initial(params_[expected - 1], C, "reset_state");
    if (controls.dropout) read_dropout(*controls.dropout);
    if (controls.recurrent_dropout) recurrent_dropout = initial(controls.recurrent_dropout, P, "recurrent_dropout");
    if (controls.zoneout) zoneout = read_bits(*controls.zoneout, P, "zoneout");
    if (controls.zoneout_cell) zoneout_cell = read_bits(*controls.zoneout_cell, H, "zoneout_cell");
  }

  void check_within(const Controls& controls, Takes takes) {
    Within& within = settings.within;
    const bool is_lstm = kind() == CellKind::lstm;
    TORCH_CHECK(within.reset_after || takes.reset_before, "reset_after: no kernel for a reset gate before the product");
    TORCH_CHECK(within.reset_after || (kind() == CellKind::gru && !within.layer_norm),
                "reset_after: expected True but for a GRU without layer_norm");
    TORCH_CHECK(is_lstm || (!within.peephole && !within.coupled_gates && within.cell_clip == 0 &&
                            within.zoneout_cell == 0 && !controls.zoneout_cell),
                "settings: peephole, coupled_gates, cell_clip and zoneout_cell are of an LSTM alone");
    TORCH_CHECK(within.bptt_steps == 0 || (!packed && !mask.defined() && D == 1),
                "bptt_steps: expected a padded batch without a mask, in one direction");
    TORCH_CHECK(!within.reset_state || reset.defined(), "reset_state: expected none without reset");
    if (kind() == CellKind::rnn_relu) within.activation = Activation::relu;
  }

  // Whether nothing concerns the gates and states of a step but the cell's own formulas.
  bool plain_gates() const {
    const Within& w = settings.within;
    const Activation own = kind() == CellKind::rnn_relu ? Activation::relu : Activation::tanh;
    return settings.plain ||
           (w.activation == own && w.recurrent_activation == Activation::sigmoid && w.reset_after && !w.peephole &&
            !w.coupled_gates && !w.layer_norm && w.cell_clip == 0 && w.zoneout == 0 && w.zoneout_cell == 0);
  }
  // Whether nothing was drawn for them either.
  bool plain_states() const {
    return plain_gates() && !recurrent_dropout.defined() && !zoneout.defined() && !zoneout_cell.defined();
  }
  template <class Layer>
  void put_options(Layer& layer) const {
    layer.plain_gates = plain_states();
    layer.within = settings.within;
  }
  Extras extras(int64_t i) const {
    Extras e;
    e.reset_h = const_slice(reset_h, i);
    e.reset_c = const_slice(reset_c, i);
    e.dropout = const_slice(recurrent_dropout, i);
    e.zoneout = static_cast<const uint8_t*>(const_slice(zoneout, i));
    e.zoneout_cell = static_cast<const uint8_t*>(const_slice(zoneout_cell, i));
    return e;
  }

  Tensor read_bits(const Tensor& given, int64_t size, const char* name) const {
    const std::vector<int64_t> shape{num_layers() * D, N, (size + 7) / 8};
    TORCH_CHECK(given.device() == input.device() && given.scalar_type() == at::kByte && given.sizes() == shape, name,
                ": expected uint8 ", shape, " on ", input.device(), ", got ", given.scalar_type(), " ", given.sizes(),
                " on ", given.device());
    check_memory(given, name);
    return given.contiguous();
  }

  void read_dropout(const Tensor& factors) {
    std::vector<int64_t> shape = output_shape();
    shape.insert(shape.begin(), num_layers() - 1);
    check_like(factors, input, shape, "dropout");
    for (int64_t l = 0; l < num_layers() - 1; ++l)
      dropout.push_back(as_matrix(factors.select(0, l).reshape({N, D * P})));
  }

  void read_steps(const OptionalTensor& batch_sizes) {
    if (!packed) {
      T = input.size(0);
      B = input.size(1);
      N = T * B;
      TORCH_CHECK(T >= 1, "input: expected at least 1 step, got ", T);
      return;
    }
    check_memory(*batch_sizes, "batch_sizes");
    TORCH_CHECK(batch_sizes->device().is_cpu() && batch_sizes->scalar_type() == at::kLong && batch_sizes->dim() == 1,
                "batch_sizes: expected a 1-D int64 tensor on the CPU, got ", batch_sizes->scalar_type(), " with ",
                batch_sizes->dim(), " dimensions on ", batch_sizes->device());
    const Tensor contiguous = batch_sizes->contiguous();
    const int64_t* data = contiguous.const_data_ptr<int64_t>();
    T = contiguous.numel();
    TORCH_CHECK(T >= 1, "batch_sizes: expected at least 1 step, got ", T);
    sizes.assign(data, data + T);
    offsets.assign(1, 0);
    for (int64_t t = 0; t < T; ++t) {
      TORCH_CHECK(sizes[t] >= 1 && (t == 0 || sizes[t] <= sizes[t - 1]),
                  "batch_sizes: expected positive sizes that never increase, got ", sizes[t], " at step ", t);
      // Before they are added, which could overflow.
      TORCH_CHECK(sizes[t] <= input.size(0) - offsets.back(), "batch_sizes: expected a sum of ", input.size(0),
                  ", got more");
      offsets.push_back(offsets.back() + sizes[t]);
    }
    B = sizes[0];
    N = offsets.back();
    TORCH_CHECK(N == input.size(0), "batch_sizes: expected a sum of ", input.size(0), ", got ", N);
  }

  Tensor read_marks(const Tensor& given, const char* name) const {
    TORCH_CHECK(!packed, name, ": expected none with batch_sizes");
    TORCH_CHECK(given.device() == input.device() && given.scalar_type() == at::kBool &&
                    given.sizes() == at::IntArrayRef({T, B}),
                name, ": expected bool [", T, ", ", B, "] on ", input.device(), ", got ", given.scalar_type(), " ",
                given.sizes(), " on ", given.device());
    check_memory(given, name);
    return given.contiguous();
  }

  void read_format(const Tensor& matrix) {
    switch (matrix.scalar_type()) {
      case at::kChar: format = WeightFormat::int8; break;
      case at::kBFloat16: format = WeightFormat::bfloat16; break;
      case at::kHalf: format = WeightFormat::float16; break;
      default: return;
    }
    matrix_dtype = matrix.scalar_type();
  }
  WeightFormat format = WeightFormat::same;
  std::optional<at::ScalarType> matrix_dtype;  // none: that of the input

  void read_params(at::TensorList given, int64_t layer) {
    const int64_t G = gate_count(kind());
    const int64_t width = layer == 0 ? I : D * P;
    const auto read_as = [&](at::ScalarType dtype, at::IntArrayRef shape) {
      const Tensor& t = given[params.size()];
      TORCH_CHECK(has_memory(t), "params[", params.size(), "]", without_memory);
      TORCH_CHECK(t.device() == input.device() && t.scalar_type() == dtype && t.sizes() == shape, "params[",
                  params.size(), "]: expected ", dtype, " ", shape, " on ", input.device(), ", got ", t.scalar_type(),
                  " ", t.sizes(), " on ", t.device());
      params.push_back(t.contiguous());
    };
    const auto read = [&](at::IntArrayRef shape) { read_as(input.scalar_type(), shape); };
    const auto read_matrix = [&](at::IntArrayRef shape) { read_as(matrix_dtype.value_or(input.scalar_type()), shape); };
    read_matrix({G * H, width});
    read_matrix({G * H, P / settings.within.num_heads});
    if (settings.has_biases) {
      read({G * H});
      read({G * H});
    }
    if (projects()) read_matrix({P, H});
    if (settings.within.peephole) read({3 * H});
    for (int64_t k = 0; k < num_norms(); ++k) read({k < 2 ? G * H : H});
    for (int64_t k = 0; k < num_scales(); ++k) read({k < 2 ? G * H : P});
  }

  Tensor initial(const OptionalTensor& state, int64_t size, const char* name) const {
    if (!state) return {};
    check_like(*state, input, {num_layers() * D, B, size}, name);
    return state->contiguous();
  }

  LayerSizes layer_sizes(int64_t layer) const {
    LayerSizes s;
    s.kind = kind();
    s.dtype = dtype_of(input, "input");
    s.input_size = layer == 0 ? I : D * P;
    s.hidden_size = H;
    s.state_size = P;
    s.heads = settings.within.num_heads / heads_in_block;
    s.layer_norm = settings.within.layer_norm;
    s.num_directions = int32_t(D);
    s.format = format;
    return s;
  }

  // Where heads are no whole vectors of units, kernels get w_hh in larger blocks, with zeros between the heads in each.
  void fit_heads(int64_t vector_units) {
    const int64_t heads = settings.within.num_heads;
    heads_in_block = heads_together(H, heads, vector_units);
    if (heads_in_block == 1) return;
    const int64_t G = gate_count(kind()), K = H / heads, M = heads_in_block;
    for (size_t i = 1; i < params.size(); i += params_per_direction()) {
      const Tensor blocks = at::zeros({G, heads / M, M, K, M, K}, params[i].options());
      blocks.diagonal(0, 2, 4).copy_(params[i].view({G, heads / M, M, K, K}).permute({0, 1, 3, 4, 2}));
      params[i] = blocks.view({G * H, M * K});
    }
  }
  int64_t heads_in_block = 1;  // that the kernels have

  // Of gradients of the parameters, those of such a w_hh as it is stored.
  void take_blocks(std::vector<Tensor>& grads) const {
    if (heads_in_block == 1) return;
    const int64_t G = gate_count(kind()), heads = settings.within.num_heads, K = H / heads, M = heads_in_block;
    for (size_t i = 1; i < params.size(); i += params_per_direction()) {
      if (grads[i].numel() == 0) continue;
      const Tensor own = grads[i].view({G, heads / M, M, K, M, K}).diagonal(0, 2, 4);
      grads[i] = own.permute({0, 1, 4, 2, 3}).reshape({G * H, K});
    }
  }

  Steps steps() const {
    Steps s;
    s.T = T;
    s.B = B;
    if (packed) {
      s.batch_sizes = sizes.data();
      s.offsets = offsets.data();
    }
    if (mask.defined()) s.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    if (reset.defined()) s.reset = static_cast<const uint8_t*>(reset.const_data_ptr());
    return s;
  }

  // Of the parameters of a direction.
  int64_t projection() const { return settings.has_biases ? 4 : 2; }

  int64_t first_param(int64_t layer, int64_t d) const { return (layer * D + d) * params_per_direction(); }

  Weights weights(int64_t layer, int64_t d) const {
    const Tensor* p = &params[first_param(layer, d)];
    Weights w;
    w.w_ih = p[0].const_data_ptr();
    w.w_hh = p[1].const_data_ptr();
    if (settings.has_biases) {
      w.b_ih = p[2].const_data_ptr();
      w.b_hh = p[3].const_data_ptr();
    }
    if (projects()) w.w_hr = p[projection()].const_data_ptr();
    if (settings.within.peephole) w.peephole = p[peephole()].const_data_ptr();
    const void** norms[] = {&w.norm_ih, &w.norm_hh, &w.norm_c, &w.norm_c_bias};
    for (int64_t k = 0; k < num_norms(); ++k) *norms[k] = p[first_norm() + k].const_data_ptr();
    const float** scales[] = {&w.scale_ih, &w.scale_hh, &w.scale_hr};
    for (int64_t k = 0; k < num_scales(); ++k) *scales[k] = p[first_scale() + k].const_data_ptr<float>();
    return w;
  }

  // Values that are saved per unit and step.
  int64_t saved_values() const { return saved_gate_count(kind(), settings.within.layer_norm); }

  // A tensor of rows, (T, B, F), or (N, F) in the order of the packed batch.
  Sequence sequence(const Tensor& t) const {
    Sequence s;
    if (!t.defined()) return s;
    s.data = const_cast<void*>(t.const_data_ptr());  // the kernels write only through y and grad_x
    if (t.dim() == 3) {
      s.time_stride = t.stride(0);
      s.batch_stride = t.stride(1);
    } else {
      s.batch_stride = t.stride(0);
      s.time_stride = B * s.batch_stride;
    }
    return s;
  }

  // The input of a layer: that of the stack, or the output of the layer below after its dropout.
  Tensor layer_input(int64_t layer, const Tensor& hidden) const {
    if (layer == 0) return without_masked(input);
    Tensor below = hidden.select(0, layer - 1);
    // In its masked steps a row carries what it began anew from, whatever that is where no step follows.
    if (mask.defined() && reset.defined()) below = without_masked(below.view({T, B, D * P})).view({N, D * P});
    return dropout.empty() ? below : below * dropout[layer - 1];
  }

  // Rows of steps, with zeros in those that are masked: what stands there, NaN included, must not meet a product.
  Tensor without_masked(const Tensor& t) const {
    return mask.defined() && t.defined() ? at::where(mask.unsqueeze(2), t, 0) : t;
  }

  // Which rows have any step, (B, 1).
  Tensor rows_with_steps() const { return mask.any(0).unsqueeze(1); }

  // Initial states, with zeros in rows without any step: what stands there, NaN included, must not meet a product.
  Tensor without_idle(const Tensor& state) const {
    return mask.defined() && state.defined() ? at::where(rows_with_steps(), state, 0) : state;
  }

  // Final states, of which rows without any step have the initial ones, or what they began anew from.
  Tensor with_idle(const Tensor& final, const Tensor& state) const {
    if (!mask.defined() || !state.defined()) return final;
    Tensor changed = rows_with_steps();
    if (reset.defined()) {
      std::vector<Tensor> marked{reset.any(0)};
      if (D == 2) marked.push_back(T > 1 ? reset.narrow(0, 1, T - 1).any(0) : at::zeros_like(marked[0]));
      changed = changed.logical_or(at::stack(marked).repeat({num_layers(), 1}).unsqueeze(2));
    }
    return at::where(changed, final, state);
  }

  // The pieces that the batch is run as, if it is not run as it stands; mask and reset are no more afterwards, then.
  std::optional<Pieces> take_pieces() {
    if (!mask.defined() && !(reset.defined() && B <= most_rows_in_pieces && settings.within.bptt_steps == 0)) return {};
    const auto bytes = [](const Tensor& t) { return static_cast<const uint8_t*>(data_or_null(t)); };
    std::optional<Pieces> pieces(std::in_place, T, B, bytes(mask), bytes(reset));
    const bool masks = mask.defined() && pieces->count() != T * B;
    mask.reset();
    // Pieces side by side are worth their copies where there are too few rows to keep the units of multiplication busy,
    // and they make the batch so much shorter (docs/performance.md).
    const bool worth = !pieces->whole() && 2 * int64_t(pieces->sizes().size()) <= T;
    if (!masks && !worth) return {};
    reset.reset();
    return pieces;
  }
  static constexpr int64_t most_rows_in_pieces = 2;

  // The stack over the pieces of its batch.
  Stack packed_as(const Pieces& pieces) const {
    Stack result = *this;
    result.packed = true;
    result.batch_first = false;
    result.input = pieces.pack(input);
    result.sizes = pieces.sizes();
    result.offsets = pieces.offsets();
    result.T = int64_t(result.sizes.size());
    result.B = result.T > 0 ? result.sizes[0] : 0;
    result.N = pieces.count();
    for (Tensor& factors : result.dropout) factors = pieces.pack(factors.view({T, B, D * P}));
    result.h0 = pieces.initial_states(h0, reset_h, D);
    result.c0 = pieces.initial_states(c0, reset_c, D);
    result.reset_h.reset();
    result.reset_c.reset();
    if (recurrent_dropout.defined()) result.recurrent_dropout = pieces.pack_rows(recurrent_dropout);
    if (zoneout.defined()) result.zoneout = pieces.pack_each(zoneout);
    if (zoneout_cell.defined()) result.zoneout_cell = pieces.pack_each(zoneout_cell);
    return result;
  }

  // How many layers run at once, from the lowest or the highest on; what is left over runs one by one.
  // plain: whether its steps are those of the plain cell alone.
  template <class Backend>
  int64_t layers_at_once(const Backend& backend, bool backward, bool plain) const {
    if constexpr (Backend::wavefronts) {
      // Layers but the first are equal; above a first of other input they all could be, as its projection is apart.
      if (num_layers() > 1 && plain)
        return backend.layers_at_once(layer_sizes(num_layers() - 1), num_layers(), steps(), backward);
    }
    return 1;
  }

  // Whether the h and c of every step are results of the call.
  bool returns_states() const { return settings.within.return_states; }

  // Layers whose states are a tensor of their own: those below the output, which has none in masked steps.
  int64_t hidden_layers() const { return mask.defined() || returns_states() ? num_layers() : num_layers() - 1; }

  std::vector<int64_t> output_shape() const {
    return packed ? std::vector<int64_t>{N, D * P} : std::vector<int64_t>{T, B, D * P};
  }
};

// Runs layers, lowest first, at once.
template <class Backend>
void run_together(Backend& backend, const c10::SmallVectorImpl<LayerForward>& layers) {
  if constexpr (Backend::wavefronts) {
    backend.forward(layers.data(), int64_t(layers.size()));
  } else {
    backend.forward(layers[0]);
  }
}
template <class Backend>
void run_together(Backend& backend, const c10::SmallVectorImpl<LayerBackward>& layers) {
  if constexpr (Backend::wavefronts) {
    backend.backward(layers.data(), int64_t(layers.size()));
  } else {
    backend.backward(layers[0]);
  }
}

// t (entries, room, ...), contiguous, as one of `rows` rows an entry, at the front of its memory.
inline Tensor front(const Tensor& t, int64_t rows) {
  if (t.dim() < 2 || t.size(1) == rows) return t;
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes[1] = rows;
  return t.flatten().narrow(0, 0, c10::multiply_integers(sizes)).view(sizes);
}

// Memory (entries, room, ...) of what a call saves for `rows` rows an entry, which stand at its front. The rest has
// defined contents, because the operator returns it; and all of it where kernels skip masked steps.
inline Tensor saved_rows(at::IntArrayRef shape, const at::TensorOptions& options, int64_t rows, bool skips) {
  if (skips) return make_zeros(shape, options);
  const Tensor t = make_empty(shape, options);
  if (shape[1] > rows) {
    const int64_t used = t.numel() / shape[1] * rows;
    t.view(-1).narrow(0, used, t.numel() - used).zero_();
  }
  return t;
}

// The forward pass of a stack in order of time, packed or dense; what is saved has room for `room` rows.
template <class Backend>
ForwardResult run_forward(Backend& backend, const Stack& stack, bool save, int64_t room) {
  const auto options = stack.input.options();
  const int64_t L = stack.num_layers(), D = stack.D, B = stack.B, N = stack.N, H = stack.H, P = stack.P;
  const int64_t saved = stack.saved_values();
  const bool has_cell = has_cell_state(stack.kind()), carries = stack.mask.defined();
  const bool recompute = stack.settings.recompute, returns = stack.returns_states();
  // States of every step that are results have their rows alone: rnn_forward puts them where masked steps are, too.
  const int64_t room_of_states = returns ? N : room;
  const Tensor h_n = make_empty({L * D, B, P}, options);
  const Tensor c_n = make_empty(has_cell ? std::vector<int64_t>{L * D, B, stack.C} : std::vector<int64_t>{0}, options);
  const auto sums = options.dtype(accumulation_dtype(stack.input));
  const auto nothing = [](const at::TensorOptions& o) { return make_empty({0}, o); };
  Tensor all_gates = nothing(options), all_cells = nothing(sums), all_hidden = nothing(options);
  if (save && !recompute && saved > 0) all_gates = saved_rows({L * D, room, saved, H}, options, N, carries);
  if ((save || returns) && has_cell) all_cells = saved_rows({L * D, room_of_states, stack.C}, sums, N, carries);
  const int64_t below = stack.hidden_layers();
  // Layers whose gates are computed again go one by one in both passes: to have all gates at once is what they avoid.
  const int64_t at_once = N == 0 || (save && recompute)
                              ? 1
                              : stack.layers_at_once(backend, false, stack.plain_states() && !stack.reset.defined());
  // Without a backward pass only those outputs are there of which somebody reads, two at a time.
  const int64_t read = L / at_once + L % at_once - (L - below);
  const bool keeps = save || returns;
  const int64_t kept = keeps ? below : std::min<int64_t>(read, 2);
  if (kept > 0) all_hidden = saved_rows({kept, room_of_states, D * P}, options, N, keeps && carries);
  const Tensor gates = front(all_gates, N), cells = front(all_cells, N), hidden = front(all_hidden, N);
  // Where kernels carry states over masked steps, those are not the output.
  Tensor output = carries && N > 0 ? Tensor() : make_empty(stack.output_shape(), options);
  const auto result = [&] {
    return ForwardResult(output, stack.with_idle(h_n, stack.h0), has_cell ? stack.with_idle(c_n, stack.c0) : c_n,
                         all_gates, all_cells, keeps ? all_hidden : nothing(options));
  };
  if (N == 0) return result();

  const Tensor h0 = stack.without_idle(stack.h0), c0 = stack.without_idle(stack.c0);
  const Steps steps = stack.steps();
  c10::SmallVector<LayerForward, 1> together;
  Tensor x = rows_for<Backend>(stack.without_masked(stack.input)), y;
  int64_t turn = 0;
  for (int64_t l = 0; l < L; ++l) {
    LayerForward& layer = together.emplace_back();
    layer.sizes = stack.layer_sizes(l);
    layer.steps = steps;
    layer.inference = !save;
    stack.put_options(layer);
    if (together.size() == 1) layer.x = stack.sequence(x);
    const int64_t first = l + 1 - int64_t(together.size());
    const bool goes_on = first + at_once <= L && l + 1 < first + at_once;  // the next layer runs with this one
    if (l == below) {
      y = output;
    } else if (keeps) {
      y = hidden.select(0, l);
    } else {
      y = goes_on ? Tensor() : hidden.select(0, turn++ % 2);
    }
    layer.y = stack.sequence(y);
    if (goes_on && !stack.dropout.empty()) layer.factors = stack.sequence(stack.dropout[l]);
    for (int64_t d = 0; d < D; ++d) {
      DirectionForward& dir = layer.direction[d];
      const int64_t i = l * D + d;
      dir.weights = stack.weights(l, d);
      dir.extras = stack.extras(i);
      dir.h0 = const_slice(h0, i);
      dir.c0 = const_slice(c0, i);
      dir.h_n = mutable_slice(h_n, i);
      dir.c_n = mutable_slice(c_n, i);
      dir.gates = mutable_slice(gates, i);
      dir.cells = mutable_slice(cells, i);
    }
    if (goes_on) continue;
    run_together(backend, together);
    together.clear();
    if (l == L - 1) break;
    x = y;
    if (!stack.dropout.empty()) x = keeps ? x * stack.dropout[l] : x.mul_(stack.dropout[l]);
    x = rows_for<Backend>(x);
  }
  if (carries) {
    output = stack.without_masked(y.view(stack.output_shape()));
  } else if (returns) {  // which are no output that a program may change in place
    backend.copy(output, y);
  }
  return result();
}

template <class Backend>
ForwardResult rnn_forward(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                          at::TensorList params, at::TensorList controls, Integers settings, Numbers numbers,
                          bool save) {
  Backend backend(input);
  Stack stack(input, h0, c0, params, Controls::restore(controls), Settings::restore(settings, numbers),
              {false, Backend::resets_before_product});
  stack.fit_heads(Backend::vector_units(input));
  std::optional<Pieces> pieces;
  if constexpr (!Backend::masks_in_kernels) pieces = stack.take_pieces();
  ForwardResult result;
  if (!pieces) {
    result = run_forward(backend, stack, save, stack.N);
  } else if constexpr (!Backend::masks_in_kernels) {
    result = run_forward(backend, stack.packed_as(*pieces), save, stack.N);
    auto& [output, h_n, c_n, gates, cells, hidden] = result;
    output = pieces->unpack(output);
    if (stack.returns_states()) {
      if (has_cell_state(stack.kind())) cells = pieces->unpack_each(cells);
      hidden = pieces->unpack_each(hidden);
    }
    h_n = pieces->final_states(h_n, stack.h0, stack.reset_h, stack.D);
    if (has_cell_state(stack.kind())) c_n = pieces->final_states(c_n, stack.c0, stack.reset_c, stack.D);
  }
  if (stack.batch_first) std::get<0>(result) = std::get<0>(result).transpose(0, 1);
  return result;
}

// What comes into a backward pass, in order of time: gradients, undefined for zeros, and what the forward pass gave.
struct BackwardInput {
  Tensor grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, output, gates, cells, hidden;
};

// What a direction's backward pass is given beside its initial states.
inline void put_given(DirectionBackward& dir, const Stack& stack, const BackwardInput& given, int64_t l, int64_t d) {
  const int64_t i = l * stack.D + d;
  dir.weights = stack.weights(l, d);
  dir.extras = stack.extras(i);
  dir.gates = const_slice(given.gates, i);
  dir.cells = const_slice(given.cells, i);
  dir.grad_h_n = const_slice(given.grad_h_n, i);
  dir.grad_c_n = const_slice(given.grad_c_n, i);
  dir.grad_cells = const_slice(given.grad_cells, i);
}

// The backward pass of a stack in order of time, packed or dense.
template <class Backend>
BackwardResult run_backward(Backend& backend, const Stack& stack, const BackwardInput& given,
                            const c10::List<bool>& needs, bool reuse_gates) {
  const int64_t L = stack.num_layers(), D = stack.D, B = stack.B, N = stack.N, P = stack.P;
  const bool carries = stack.mask.defined();
  const auto options = stack.input.options();
  const auto make = [&](bool needed, at::IntArrayRef shape) {
    return needed ? (N == 0 ? make_zeros(shape, options) : make_empty(shape, options)) : make_empty({0}, options);
  };
  const auto make_rows = [&](at::IntArrayRef shape) {
    return (D > 1 && Backend::adds_into_grad_x) || N == 0 ? make_zeros(shape, options) : make_empty(shape, options);
  };
  const Tensor grad_input = needs[0] ? make_rows(stack.input.sizes()) : make_empty({0}, options);
  const Tensor grad_h0 = make(needs[1] && stack.h0.defined(), {L * D, B, P});
  const Tensor grad_c0 = make(needs[2] && stack.c0.defined() && has_cell_state(stack.kind()), {L * D, B, stack.C});
  std::vector<Tensor> grad_params;
  grad_params.reserve(stack.params.size());
  for (size_t i = 0; i < stack.params.size(); ++i) grad_params.push_back(make(needs[3 + i], stack.params[i].sizes()));
  // Of the states behind the parameters, where rows begin anew in the kernels.
  const size_t behind = 3 + stack.params.size();
  const bool kernels_reset = stack.reset.defined();
  const Tensor grad_reset_h = make(kernels_reset && stack.reset_h.defined() && needs[behind], {L * D, B, P});
  const Tensor grad_reset_c = make(kernels_reset && stack.reset_c.defined() && needs[behind + 1], {L * D, B, stack.C});
  if (stack.reset_h.defined()) grad_params.push_back(grad_reset_h);
  if (stack.reset_c.defined()) grad_params.push_back(grad_reset_c);
  BackwardResult result(grad_input, grad_h0, grad_c0, grad_params);
  if (N == 0) return result;

  // The lowest layer of which something is needed; nothing runs below it.
  int64_t lowest = 0;
  const auto layer_needed = [&](int64_t l) {
    if (l == 0 && needs[0]) return true;
    for (int64_t i = stack.first_param(l, 0); i < stack.first_param(l + 1, 0); ++i)
      if (needs[3 + i]) return true;
    return grad_h0.numel() > 0 || grad_c0.numel() > 0 || grad_reset_h.numel() > 0 || grad_reset_c.numel() > 0;
  };
  while (lowest < L && !layer_needed(lowest)) ++lowest;

  const Tensor y = carries ? given.hidden.select(0, L - 1) : rows_for<Backend>(given.output);
  Tensor grad_y = rows_for<Backend>(stack.without_masked(given.grad_output));
  const Tensor h0 = stack.without_idle(stack.h0), c0 = stack.without_idle(stack.c0);
  const Steps steps = stack.steps();
  const bool recomputes = given.gates.numel() == 0 && stack.saved_values() > 0;
  const Within& within = stack.settings.within;
  const bool plain = stack.plain_states() && !stack.reset.defined() && within.bptt_steps == 0 &&
                     within.recurrent_grad_clip == 0 && !given.grad_cells.defined() && !given.grad_hidden.defined();
  const int64_t at_once = lowest < L && !recomputes ? stack.layers_at_once(backend, true, plain) : 1;
  c10::SmallVector<LayerBackward, 1> together;  // highest first, until they run
  c10::SmallVector<Tensor, 4> inputs;           // theirs, which live until then
  for (int64_t l = L - 1; l >= lowest; --l) {
    LayerBackward& layer = together.emplace_back();
    layer.sizes = stack.layer_sizes(l);
    layer.steps = steps;
    const Tensor x = inputs.emplace_back(rows_for<Backend>(stack.layer_input(l, given.hidden)));
    const int64_t highest = l + int64_t(together.size()) - 1;
    const bool goes_on = highest - at_once + 1 >= lowest && l > highest - at_once + 1;  // the next runs with this one
    Tensor grad_x;
    if (l > lowest) {
      if (!goes_on) grad_x = make_rows({N, D * P});
    } else if (l == 0 && needs[0]) {
      grad_x = grad_input;
    }
    layer.x = stack.sequence(x);
    layer.y = stack.sequence(l == L - 1 ? y : given.hidden.select(0, l));
    if (l == highest) layer.grad_y = stack.sequence(grad_y);
    if (given.grad_hidden.defined()) layer.grad_h = stack.sequence(given.grad_hidden.select(0, l));
    layer.grad_x = stack.sequence(grad_x);
    if (l < highest && !stack.dropout.empty()) layer.factors = stack.sequence(stack.dropout[l]);
    layer.reuse_gates = reuse_gates;
    stack.put_options(layer);
    for (int64_t d = 0; d < D; ++d) {
      DirectionBackward& dir = layer.direction[d];
      const int64_t i = l * D + d;
      put_given(dir, stack, given, l, d);
      dir.h0 = const_slice(h0, i);
      dir.c0 = const_slice(c0, i);
      dir.grad_h0 = mutable_slice(grad_h0, i);
      dir.grad_c0 = mutable_slice(grad_c0, i);
      const int64_t p = stack.first_param(l, d);
      const auto grad = [&](int64_t k) -> void* {
        return needs[3 + p + k] ? grad_params[p + k].mutable_data_ptr() : nullptr;
      };
      dir.grad_w_ih = grad(0);
      dir.grad_w_hh = grad(1);
      if (stack.settings.has_biases) {
        dir.grad_b_ih = grad(2);
        dir.grad_b_hh = grad(3);
      }
      if (stack.projects()) dir.grad_w_hr = grad(stack.projection());
      if (stack.settings.within.peephole) dir.grad_peephole = grad(stack.peephole());
      void** norms[] = {&dir.grad_norm_ih, &dir.grad_norm_hh, &dir.grad_norm_c, &dir.grad_norm_c_bias};
      for (int64_t k = 0; k < stack.num_norms(); ++k) *norms[k] = grad(stack.first_norm() + k);
      dir.grad_reset_h = mutable_slice(grad_reset_h, i);
      dir.grad_reset_c = mutable_slice(grad_reset_c, i);
    }
    if (goes_on) continue;
    std::reverse(together.begin(), together.end());
    run_together(backend, together);
    together.clear();
    inputs.clear();
    if (l > lowest) grad_y = stack.dropout.empty() ? grad_x : grad_x.mul_(stack.dropout[l - 1]);
  }
  return result;
}

// The backward pass of a stack as run(backend, stack, given, needs, pieces) computes it: what is given checked, in
// order of time, and where the batch is run as pieces theirs; pieces is null where it is not.
template <class Backend, class Run>
BackwardResult rnn_backward_by(Run run, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                               const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                               const OptionalTensor& grad_hidden, const Tensor& input, const OptionalTensor& h0,
                               const OptionalTensor& c0, at::TensorList params, at::TensorList controls,
                               const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                               Integers settings, Numbers numbers, const c10::List<bool>& needs) {
  Backend backend(input);
  Stack stack(input, h0, c0, params, Controls::restore(controls), Settings::restore(settings, numbers),
              {false, Backend::resets_before_product});
  const int64_t L = stack.num_layers(), D = stack.D, B = stack.B, N = stack.N, H = stack.H, P = stack.P;
  const bool has_cell = has_cell_state(stack.kind());
  stack.fit_heads(Backend::vector_units(input));
  std::optional<Pieces> pieces;
  if constexpr (!Backend::masks_in_kernels) pieces = stack.take_pieces();
  TORCH_CHECK(int64_t(needs.size()) == 3 + int64_t(params.size()), "needs: expected ", 3 + params.size(),
              " values, got ", needs.size());
  const auto rows_first = [&](const Tensor& t, const char* name) {
    TORCH_CHECK(t.dim() == (stack.packed ? 2 : 3), name, ": expected ", stack.packed ? 2 : 3, " dimensions, got ",
                t.dim());
    const Tensor time_major = stack.batch_first ? t.transpose(0, 1) : t;
    check_like(time_major, stack.input, stack.output_shape(), name);
    return with_contiguous_rows(time_major);
  };
  const auto final_gradient = [&](const OptionalTensor& t, int64_t size, const char* name) {
    if (!t) return Tensor();
    check_like(*t, stack.input, {L * D, B, size}, name);
    return t->contiguous();
  };
  TORCH_CHECK(has_cell || !grad_c_n, "grad_c_n: expected none without a cell state");
  const bool returns = stack.returns_states();
  TORCH_CHECK((returns && has_cell) || !grad_cells, "grad_cells: expected none, the call returns no c of every step");
  TORCH_CHECK(returns || !grad_hidden, "grad_hidden: expected none, the call returns no h of every step");
  const auto gradient_of_states = [&](const OptionalTensor& t, at::IntArrayRef shape, at::ScalarType dtype,
                                      const char* name) {
    if (!t) return Tensor();
    TORCH_CHECK(t->device() == input.device() && t->scalar_type() == dtype && t->sizes() == shape, name, ": expected ",
                dtype, " ", shape, " on ", input.device(), ", got ", t->scalar_type(), " ", t->sizes(), " on ",
                t->device());
    check_memory(*t, name);
    return t->contiguous();
  };
  BackwardInput given{grad_output ? rows_first(*grad_output, "grad_output") : Tensor(),
                      final_gradient(grad_h_n, P, "grad_h_n"),
                      final_gradient(grad_c_n, stack.C, "grad_c_n"),
                      gradient_of_states(grad_cells, {L * D, N, stack.C}, accumulation_dtype(input), "grad_cells"),
                      gradient_of_states(grad_hidden, {L, N, D * P}, input.scalar_type(), "grad_hidden"),
                      rows_first(output, "output"),
                      gates,
                      cells,
                      hidden};
  const auto saved = [&](const Tensor& t, bool there, at::IntArrayRef shape, at::ScalarType dtype, const char* name) {
    check_saved(t, stack.input, there ? shape : at::IntArrayRef{0}, dtype, name);
  };
  const int64_t kept = stack.saved_values(), below = stack.hidden_layers();
  // The slope of the plain recurrence is that of its h, which the average with the h before hides.
  TORCH_CHECK(saved_gate_count(stack.kind()) > 0 || stack.zoneout.defined() || stack.settings.within.zoneout == 0,
              "zoneout: the plain recurrence has no backward kernel for states on average");
  const at::ScalarType dtype = stack.input.scalar_type();
  saved(gates, kept > 0 && !stack.settings.recompute, {L * D, N, kept, H}, dtype, "gates");
  saved(cells, has_cell, {L * D, N, stack.C}, accumulation_dtype(stack.input), "cells");
  saved(hidden, below > 0, {below, N, D * P}, dtype, "hidden");

  BackwardResult result;
  if (!pieces) {
    result = run(backend, stack, given, needs, nullptr);
  } else if constexpr (!Backend::masks_in_kernels) {
    const Tensor final_h = given.grad_h_n, final_c = given.grad_c_n;
    const auto states = [&](const Tensor& t) { return returns ? pieces->pack_each(t) : front(t, pieces->count()); };
    given = {given.grad_output.defined() ? pieces->pack(given.grad_output) : Tensor(),
             pieces->final_gradients(final_h, D),
             pieces->final_gradients(final_c, D),
             given.grad_cells.defined() ? pieces->pack_each(given.grad_cells) : Tensor(),
             given.grad_hidden.defined() ? pieces->pack_each(given.grad_hidden) : Tensor(),
             pieces->pack(given.output),
             front(gates, pieces->count()),
             has_cell ? states(cells) : cells,
             states(hidden)};
    // The initial states of pieces are those of rows, and what they begin anew from.
    const size_t behind = 3 + stack.params.size();
    const bool anew_h = stack.reset_h.defined() && needs[behind];
    const bool anew_c = stack.reset_c.defined() && needs[behind + 1];
    const bool first_h = needs[1] && stack.h0.defined(), first_c = needs[2] && stack.c0.defined() && has_cell;
    c10::List<bool> of_pieces = needs.copy();
    of_pieces[1] = first_h || anew_h;
    of_pieces[2] = first_c || anew_c;
    result = run(backend, stack.packed_as(*pieces), given, of_pieces, &*pieces);
    auto& [grad_input, grad_h0, grad_c0, grad_params] = result;
    const Tensor of_h = grad_h0, of_c = grad_c0, none = grad_h0.new_empty({0});
    if (needs[0]) grad_input = pieces->unpack(grad_input);
    grad_h0 = first_h ? pieces->initial_gradient(of_h, final_h, D) : none;
    grad_c0 = first_c ? pieces->initial_gradient(of_c, final_c, D) : none.clone();
    if (stack.reset_h.defined()) grad_params.push_back(anew_h ? pieces->anew_gradient(of_h, final_h, D) : none.clone());
    if (stack.reset_c.defined()) grad_params.push_back(anew_c ? pieces->anew_gradient(of_c, final_c, D) : none.clone());
  }
  if (needs[0] && stack.batch_first) std::get<0>(result) = std::get<0>(result).transpose(0, 1);
  return result;
}

template <class Backend>
BackwardResult rnn_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                            const OptionalTensor& grad_hidden, const Tensor& input, const OptionalTensor& h0,
                            const OptionalTensor& c0, at::TensorList params, at::TensorList controls,
                            const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                            Integers settings, Numbers numbers, const c10::List<bool>& needs, bool reuse_gates) {
  const auto run = [&](Backend& backend, const Stack& stack, const BackwardInput& given, const c10::List<bool>& needed,
                       const Pieces*) {
    BackwardResult result = run_backward(backend, stack, given, needed, reuse_gates);
    stack.take_blocks(std::get<3>(result));
    return result;
  };
  return rnn_backward_by<Backend>(run, grad_output, grad_h_n, grad_c_n, grad_cells, grad_hidden, input, h0, c0, params,
                                  controls, output, gates, cells, hidden, settings, numbers, needs);
}

// Memory for bits that are to be drawn, uint8 (entries, rows, ceil(units / 8)), from the seeds, int64: an equal share
// of the entries from each.
inline Tensor bits_to_draw(const Tensor& seed, int64_t entries, int64_t rows, int64_t units, double rate) {
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() >= 1 && entries % seed.numel() == 0,
              "seed: expected one int64, or a number of them that divides the ", entries, " entries, got ",
              seed.scalar_type(), " ", seed.sizes());
  check_memory(seed, "seed");
  TORCH_CHECK(entries >= 0 && rows >= 0 && units >= 0, "draw_bits: expected sizes that are not negative, got ", entries,
              ", ", rows, ", ", units);
  TORCH_CHECK(rate >= 0 && rate <= 1, "rate: expected 0 to 1, got ", rate);
  return at::empty({entries, rows, units / 8 + (units % 8 > 0)}, seed.options().dtype(at::kByte));
}

// One step is a layer over a sequence of one step. The tensors of a step, checked; what a cell needs of Stack, without
// its vectors, which would cost as much as the step itself.
struct Step {
  Tensor input, h, c, w_ih, w_hh, b_ih, b_hh;
  LayerSizes sizes;
  Steps steps;

  Step(const Tensor& input_, const Tensor& h_, const OptionalTensor& c_, at::TensorList params,
       const Settings& settings) {
    sizes.kind = settings.kind;
    TORCH_CHECK(!is_custom(sizes.kind), "kind: a custom cell has layers alone");
    sizes.dtype = dtype_of(input_, "input");
    check_memory(input_, "input");
    TORCH_CHECK(input_.dim() == 2, "input: expected 2 dimensions, got ", input_.dim());
    const size_t expected = settings.has_biases ? 4 : 2;
    TORCH_CHECK(params.size() == expected, "params: expected ", expected, " tensors, got ", params.size());
    TORCH_CHECK(params[1].dim() == 2, "params[1]: expected 2 dimensions, got ", params[1].dim());
    const int64_t B = input_.size(0), I = input_.size(1), H = params[1].size(1);
    TORCH_CHECK(I >= 1 && H >= 1, "params[1]: expected at least 1 unit, got ", params[1].sizes());
    // Before a product with H is made.
    TORCH_CHECK(params[1].size(0) / gate_count(sizes.kind) == H, "params[1]: expected ", gate_count(sizes.kind),
                " gates of ", H, " units, got ", params[1].sizes());
    const int64_t GH = gate_count(sizes.kind) * H;
    TORCH_CHECK(c_.has_value() == has_cell_state(sizes.kind),
                "c: expected one exactly where the cell has a cell state");
    const auto take = [&](const Tensor& t, at::IntArrayRef shape, const char* name) {
      check_like(t, input_, shape, name);
      return t.contiguous();
    };
    input = with_contiguous_rows(input_);
    h = take(h_, {B, H}, "h");
    if (c_) c = take(*c_, {B, H}, "c");
    w_ih = take(params[0], {GH, I}, "params[0]");
    w_hh = take(params[1], {GH, H}, "params[1]");
    if (settings.has_biases) {
      b_ih = take(params[2], {GH}, "params[2]");
      b_hh = take(params[3], {GH}, "params[3]");
    }
    sizes.input_size = I;
    sizes.hidden_size = sizes.state_size = H;
    steps.T = 1;
    steps.B = B;
  }

  Weights weights() const {
    Weights w;
    w.w_ih = w_ih.const_data_ptr();
    w.w_hh = w_hh.const_data_ptr();
    w.b_ih = data_or_null(b_ih);
    w.b_hh = data_or_null(b_hh);
    return w;
  }

  static Sequence sequence(const Tensor& t) {
    Sequence s;
    s.data = const_cast<void*>(t.const_data_ptr());
    s.batch_stride = t.stride(0);
    return s;
  }
};

template <class Backend>
CellResult cell_forward(const Tensor& input, const Tensor& h, const OptionalTensor& c, at::TensorList params,
                        Integers settings, Numbers numbers, bool save) {
  Backend backend(input);
  const Step step(input, h, c, params, Settings::restore(settings, numbers));
  const int64_t B = step.steps.B, H = step.sizes.hidden_size;
  const int64_t values = saved_gate_count(step.sizes.kind), saved = save ? values : 0;
  const bool has_cell = has_cell_state(step.sizes.kind), saves_state = save && values == 0;
  const auto options = step.input.options();
  const Tensor h_next = make_empty({B, H}, options);
  // An operator must not return one tensor twice, so each that is empty is its own.
  const Tensor c_next = has_cell ? make_empty({B, H}, options) : make_empty({0}, options);
  const Tensor gates = save ? make_empty({1, B, saves_state ? 1 : values, H}, options) : make_empty({0}, options);
  const Tensor cells = save && has_cell ? make_empty({1, B, H}, options.dtype(accumulation_dtype(input)))
                                        : make_empty({0}, options.dtype(accumulation_dtype(input)));
  if (B > 0) {
    LayerForward layer;
    layer.sizes = step.sizes;
    layer.steps = step.steps;
    layer.inference = !save;
    const Tensor x = rows_for<Backend>(step.input);
    layer.x = Step::sequence(x);
    layer.y = Step::sequence(h_next);
    DirectionForward& dir = layer.direction[0];
    dir.weights = step.weights();
    dir.h0 = step.h.const_data_ptr();
    dir.c0 = data_or_null(step.c);
    if (has_cell) dir.c_n = c_next.mutable_data_ptr();
    if (saved > 0) dir.gates = gates.mutable_data_ptr();
    if (save && has_cell) dir.cells = cells.mutable_data_ptr();
    backend.forward(layer);
    if (saves_state) backend.copy(gates, h_next);
  }
  return {h_next, c_next, gates, cells};
}

template <class Backend>
BackwardResult cell_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& input,
                             const Tensor& h, const OptionalTensor& c, at::TensorList given, const Tensor& gates,
                             const Tensor& cells, Integers settings, Numbers numbers, const c10::List<bool>& needs) {
  Backend backend(input);
  const Step step(input, h, c, given, Settings::restore(settings, numbers));
  const int64_t B = step.steps.B, H = step.sizes.hidden_size;
  const bool has_cell = has_cell_state(step.sizes.kind);
  const size_t params = step.b_ih.defined() ? 4 : 2;
  TORCH_CHECK(needs.size() == 3 + params, "needs: expected ", 3 + params, " values, got ", needs.size());
  const int64_t saved = saved_gate_count(step.sizes.kind);
  const int64_t none = 0;
  const at::IntArrayRef nothing(none);
  check_saved(gates, step.input, {1, B, std::max<int64_t>(saved, 1), H}, step.input.scalar_type(), "gates");
  check_saved(cells, step.input, has_cell ? at::IntArrayRef{1, B, H} : nothing, accumulation_dtype(step.input),
              "cells");
  const auto seed = [&](const OptionalTensor& t, const char* name) {
    if (!t) return Tensor();
    check_like(*t, step.input, {B, H}, name);
    return t->contiguous();
  };
  TORCH_CHECK(has_cell || !grad_c, "grad_c: expected none without a cell state");
  const Tensor seed_h = seed(grad_h, "grad_h"), seed_c = seed(grad_c, "grad_c");
  const auto options = step.input.options();
  const auto make = [&](bool needed, const Tensor& like) {
    if (!needed || !like.defined()) return make_empty({0}, options);
    return B > 0 ? make_empty(like.sizes(), options) : make_zeros(like.sizes(), options);
  };
  const Tensor grad_input = make(needs[0], step.input), grad_h0 = make(needs[1], step.h);
  const Tensor grad_c0 = make(needs[2], step.c);
  std::vector<Tensor> grads{make(needs[3], step.w_ih), make(needs[4], step.w_hh)};
  if (params == 4) {
    grads.push_back(make(needs[5], step.b_ih));
    grads.push_back(make(needs[6], step.b_hh));
  }
  if (B > 0) {
    LayerBackward layer;
    layer.sizes = step.sizes;
    layer.steps = step.steps;
    const Tensor x = rows_for<Backend>(step.input);
    layer.x = Step::sequence(x);
    // Where gates are saved no kernel reads the new state, and they stand for it.
    layer.y.data = const_cast<void*>(gates.const_data_ptr());
    layer.y.batch_stride = H;
    if (seed_h.defined()) layer.grad_y = Step::sequence(seed_h);
    if (needs[0]) layer.grad_x = Step::sequence(grad_input);
    DirectionBackward& dir = layer.direction[0];
    dir.weights = step.weights();
    dir.h0 = step.h.const_data_ptr();
    dir.c0 = data_or_null(step.c);
    if (saved > 0) dir.gates = gates.const_data_ptr();
    dir.cells = cells.const_data_ptr();
    dir.grad_c_n = data_or_null(seed_c);
    const auto target = [](const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
    dir.grad_h0 = target(grad_h0);
    dir.grad_c0 = target(grad_c0);
    dir.grad_w_ih = target(grads[0]);
    dir.grad_w_hh = target(grads[1]);
    if (params == 4) {
      dir.grad_b_ih = target(grads[2]);
      dir.grad_b_hh = target(grads[3]);
    }
    backend.backward(layer);
  }
  return {grad_input, grad_h0, grad_c0, grads};
}

}  // namespace fused_rnn
