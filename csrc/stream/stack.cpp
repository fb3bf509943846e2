#include "stack.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../cpu/denormals.h"
#include "../cpu/kernels.h"
#include "../cpu/team.h"

namespace fused_rnn {

namespace {

// Rows that are multiplied together: enough that the packed weights, which are read once for all of them, cost little
// beside the products, and so few that their sums stay in the second-level cache.
constexpr int64_t most_rows_at_once = 64;
// Of all steps of a chunk, even where each has fewer: two tiles of a product.
constexpr int64_t least_rows_at_once = 12;

int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Sizes as ForwardPass (../cpu/forward.h) has them.
struct Measures {
  const StreamShape& shape;
  const char* isa;
  int64_t I, H, P, K;
  bool projects, normalises, keeps_h;
  int64_t panels, panel_columns, state_stride, unit_stride, cell_stride, x_stride;

  Measures(const LayerForward& layer, const StreamKernel& kernel)
      : shape(kernel.shape),
        isa(kernel.isa),
        I(layer.sizes.input_size),
        H(layer.sizes.hidden_size),
        P(layer.sizes.state_size),
        K(P / layer.sizes.heads),
        projects(layer.direction[0].weights.w_hr != nullptr),
        normalises(layer.within.layer_norm),
        keeps_h(layer.within.zoneout > 0),
        panels(units_of(H, shape.unit_vectors * shape.width)),
        panel_columns(shape.gates * shape.unit_vectors * shape.width),
        state_stride(padded(P) + 16),
        unit_stride(panels * shape.unit_vectors * shape.width + 16),
        cell_stride(shape.states * unit_stride),
        x_stride(padded(I) + 16) {}

  static int64_t units_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
  int64_t padded(int64_t n) const { return units_of(n, shape.width) * shape.width; }
  int64_t depth(int64_t n) const { return units_of(n, shape.group) * shape.group; }

  static bool is_int8(const LayerForward& layer) { return layer.sizes.format == WeightFormat::int8; }

  // A matrix of so many columns with K numbers each.
  char* take_matrix(Layout& layout, const LayerForward& layer, int64_t columns, int64_t k) const {
    switch (layer.sizes.format) {
      case WeightFormat::same: return take_elements(layout, columns * depth(k));
      case WeightFormat::int8: return layout.take<char>(columns * units_of(k, 4) * 4);
      default: return layout.take<char>(columns * k * 2);
    }
  }

  char* take_elements(Layout& layout, int64_t count) const { return layout.take<char>(count * shape.element_bytes); }
  char* take_sums(Layout& layout, int64_t count) const { return layout.take<char>(count * shape.sum_bytes); }

  StreamWeights weights(Layout& layout, const LayerForward& layer) const {
    const int64_t columns = panels * panel_columns, of_norm = normalises ? columns : 0;
    const int64_t stored = element_bytes(layer.sizes.dtype);
    const Weights& given = layer.direction[0].weights;
    StreamWeights w;
    w.w_ih = take_matrix(layout, layer, columns, I);
    w.w_hh = take_matrix(layout, layer, columns, K);
    w.w_hr = take_matrix(layout, layer, projects ? padded(P) : 0, H);
    w.input_bias = take_sums(layout, columns);
    w.hidden_bias = take_sums(layout, columns);
    w.gain_ih = take_sums(layout, of_norm);
    w.gain_hh = take_sums(layout, of_norm);
    w.zeros = take_sums(layout, of_norm);
    w.peephole = layout.take<char>(given.peephole ? 3 * H * stored : 0);
    w.norm_c = layout.take<char>(given.norm_c ? H * stored : 0);
    w.norm_c_bias = layout.take<char>(given.norm_c_bias ? H * stored : 0);
    const int64_t scaled = is_int8(layer) ? columns : 0, scaled_hr = is_int8(layer) && projects ? padded(P) : 0;
    w.scale_ih = layout.take<float>(scaled);
    w.scale_hh = layout.take<float>(scaled);
    w.scale_hr = layout.take<float>(scaled_hr);
    w.sum_ih = layout.take<int32_t>(scaled);
    w.sum_hh = layout.take<int32_t>(scaled);
    w.sum_hr = layout.take<int32_t>(scaled_hr);
    return w;
  }

  StreamStates states(Layout& layout, int64_t slots) const {
    StreamStates s;
    s.multiplied = take_elements(layout, slots * state_stride);
    s.carried = take_sums(layout, keeps_h ? slots * state_stride : 0);
    s.cells = take_sums(layout, slots * cell_stride);
    return s;
  }

  StreamWork work(Layout& layout, const KernelTable& table, const LayerForward& layer, int64_t rows,
                  int64_t step_rows) const {
    const int64_t of_norm = normalises && shape.states > 0 ? step_rows * unit_stride : 0;
    StreamWork w;
    w.projected = take_sums(layout, rows * panels * panel_columns);
    w.sums = take_sums(layout, step_rows * panels * panel_columns);
    w.state_sums = take_sums(layout, projects ? step_rows * padded(P) : 0);
    w.x = take_elements(layout, shape.converts_x ? rows * x_stride : 0);
    w.hidden = take_elements(layout, projects ? step_rows * unit_stride : 0);
    w.output_gate = take_sums(layout, of_norm);
    w.new_cell = take_sums(layout, of_norm);
    w.x_rows = layout.take<void*>(rows);
    w.state_rows = layout.take<void*>(layer.sizes.heads * step_rows);
    w.hidden_rows = layout.take<void*>(projects ? step_rows : 0);
    w.rows = rows;
    w.step_rows = step_rows;
    const int64_t quantized = is_int8(layer) ? rows : 0;
    w.quantized_stride = padded(std::max({I, K, projects ? H : 0})) + 16;
    w.quantized = layout.take<char>(quantized * w.quantized_stride);
    w.quantized_rows = layout.take<void*>(quantized);
    w.row_scales = layout.take<char>(quantized * shape.row_scale_bytes);
    w.by_dots = multiplies_bytes(isa);
    w.by_tiles = w.by_dots ? byte_tiles(table) : nullptr;
    return w;
  }
};

double load(const void* from, int64_t i, DType dtype) {
  if (dtype == DType::float64) return static_cast<const double*>(from)[i];
  if (dtype == DType::float32) return static_cast<const float*>(from)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Of a double that is a float, but for float64: rounded to nearest even.
void store(void* to, int64_t i, DType dtype, double value) {
  if (dtype == DType::float64) {
    static_cast<double*>(to)[i] = value;
  } else if (dtype == DType::float32) {
    static_cast<float*>(to)[i] = float(value);
  } else {
    const float rounded = float(value);
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits = rounded == rounded ? bits + 0x7fffu + ((bits >> 16) & 1u) : 0x7fc00000u;
    static_cast<uint16_t*>(to)[i] = uint16_t(bits >> 16);
  }
}

// of a state's memory: elements as they are multiplied are floats, or of the layers' dtype.
DType element_dtype(const LayerForward& layer, const StreamKernel& kernel) {
  return kernel.shape.element_bytes == element_bytes(layer.sizes.dtype) ? layer.sizes.dtype : DType::float32;
}

DType sum_dtype(const LayerForward& layer) {
  return layer.sizes.dtype == DType::float64 ? DType::float64 : DType::float32;
}

void copy(const void* from, int64_t first, DType dtype, void* to, int64_t to_first, DType to_dtype, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(to, to_first + i, to_dtype, from ? load(from, first + i, dtype) : 0);
}

char* shifted(const Sequence& s, int64_t step, int64_t row, int64_t bytes) {
  return static_cast<char*>(s.data) + (step * s.time_stride + row * s.batch_stride) * bytes;
}

bool same_layer(const LayerForward& a, const LayerForward& b) {
  const LayerSizes &s = a.sizes, &z = b.sizes;
  const Within &v = a.within, &w = b.within;
  return s.kind == z.kind && s.dtype == z.dtype && s.input_size == z.input_size && s.hidden_size == z.hidden_size &&
         s.state_size == z.state_size && s.heads == z.heads && s.layer_norm == z.layer_norm && s.format == z.format &&
         a.plain_gates == b.plain_gates && v.activation == w.activation &&
         v.recurrent_activation == w.recurrent_activation && v.peephole == w.peephole &&
         v.coupled_gates == w.coupled_gates && v.cell_clip == w.cell_clip && v.zoneout == w.zoneout &&
         v.zoneout_cell == w.zoneout_cell;
}

}  // namespace

// With null memory it only counts.
PackedStack* PackedStack::lay_out(void* memory, const KernelTable& table, const LayerForward* layers, int64_t count,
                                  size_t& bytes) {
  Layout layout(memory);
  PackedStack* place = layout.take<PackedStack>(1);
  LayerForward* own = layout.take<LayerForward>(count);
  const StreamKernel** kernels_of = layout.take<const StreamKernel*>(count);
  StreamWeights* weights_of = layout.take<StreamWeights>(count);
  PackedStack* packed = memory ? new (place) PackedStack() : nullptr;
  const size_t before = layout.used();
  char* first = layout.take<char>(0);
  int64_t multiply_adds = 0;
  for (int64_t l = 0; l < count; ++l) {
    LayerForward layer = layers[l];
    if (layer.sizes.kind == CellKind::rnn_relu) {
      layer.sizes.kind = CellKind::rnn_tanh;
      layer.within.activation = Activation::relu;
      layer.plain_gates = false;
    }
    layer.steps.T = layer.steps.B = 1;
    const StreamKernel& kernel = table.stream(layer.sizes);
    StreamWeights weights = Measures(layer, kernel).weights(layout, layer);
    const LayerSizes& s = layer.sizes;
    multiply_adds += kernel.shape.gates * s.hidden_size * (s.input_size + s.state_size / s.heads) +
                     (s.state_size != s.hidden_size ? s.state_size * s.hidden_size : 0);
    if (!packed) continue;
    kernels_of[l] = &kernel;
    weights_of[l] = weights;
    new (own + l) LayerForward(layer);
  }
  bytes = layout.used();
  if (!packed) return nullptr;
  packed->count_ = count;
  packed->bytes_ = bytes;
  packed->multiply_adds_ = multiply_adds;
  packed->layers_ = own;
  packed->kernels_ = kernels_of;
  packed->table_ = &table;
  packed->weights_ = weights_of;
  packed->packed_ = first;
  packed->packed_bytes_ = bytes - before;
  // What stands between and behind the weights, so that equal weights are equal bytes.
  std::memset(first, 0, packed->packed_bytes_);
  for (int64_t l = 0; l < count; ++l) packed->pack(own[l], *kernels_of[l], weights_of[l]);
  return packed;
}

void PackedStack::pack(LayerForward& layer, const StreamKernel& kernel, const StreamWeights& weights) {
  kernel.pack(layer, weights);
  const size_t of_units = size_t(layer.sizes.hidden_size * element_bytes(layer.sizes.dtype));
  Weights& w = layer.direction[0].weights;
  const auto keep = [](const void*& given, void* own, size_t bytes) {
    if (!given) return;
    std::memcpy(own, given, bytes);
    given = own;
  };
  keep(w.peephole, weights.peephole, 3 * of_units);
  keep(w.norm_c, weights.norm_c, of_units);
  keep(w.norm_c_bias, weights.norm_c_bias, of_units);
  // What was packed is not read again; w_hr says that there is a projection.
  w.w_ih = w.w_hh = w.b_ih = w.b_hh = w.norm_ih = w.norm_hh = nullptr;
  w.scale_ih = w.scale_hh = w.scale_hr = nullptr;
  if (w.w_hr) w.w_hr = weights.w_hr;
}

PackedStack* PackedStack::create(const LayerForward* layers, int64_t count) {
  const KernelTable& table = kernels();
  void* memory = large_memory(bytes_for(table, layers, count));
  return memory ? place(memory, table, layers, count) : nullptr;
}

size_t PackedStack::bytes_for(const KernelTable& table, const LayerForward* layers, int64_t count) {
  size_t bytes = 0;
  lay_out(nullptr, table, layers, count, bytes);
  return bytes;
}

PackedStack* PackedStack::place(void* memory, const KernelTable& table, const LayerForward* layers, int64_t count) {
  size_t bytes = 0;
  return lay_out(memory, table, layers, count, bytes);
}

void PackedStack::destroy(PackedStack* packed) { std::free(packed); }

bool PackedStack::equals(const PackedStack& other) const {
  if (table_ != other.table_ || count_ != other.count_ || packed_bytes_ != other.packed_bytes_) return false;
  for (int64_t l = 0; l < count_; ++l) {
    if (kernels_[l] != other.kernels_[l] || !same_layer(layers_[l], other.layers_[l])) return false;
  }
  return std::memcmp(packed_, other.packed_, packed_bytes_) == 0;
}

StackStates* StackStates::lay_out(void* memory, const PackedStack& packed, int64_t slots, int64_t rows, size_t& bytes) {
  const int64_t count = packed.count_;
  Layout layout(memory);
  StackStates* place = layout.take<StackStates>(1);
  LayerForward* layers = layout.take<LayerForward>(count);
  void** objects = layout.take<void*>(count);
  StreamStates* states_of = layout.take<StreamStates>(count);
  StackStates* states = memory ? new (place) StackStates() : nullptr;
  const int64_t step_rows = std::min(rows, most_rows_at_once);
  const int64_t all_rows = std::max(step_rows, least_rows_at_once);
  const LayerSizes& sizes = packed.layers_[0].sizes;
  const int64_t output_bytes = count > 1 ? all_rows * sizes.state_size * element_bytes(sizes.dtype) : 0;
  char* between[2] = {layout.take<char>(output_bytes), layout.take<char>(output_bytes)};
  for (int64_t l = 0; l < count; ++l) {
    void* object = layout.take<char>(int64_t(packed.kernels_[l]->object_bytes));
    const StreamStates own = Measures(packed.layers_[l], *packed.kernels_[l]).states(layout, slots);
    if (!states) continue;
    objects[l] = object;
    states_of[l] = own;
  }
  const size_t begin = layout.used();  // of the work, which needs no zeros
  size_t end = begin;
  for (int64_t l = 0; l < count; ++l) {
    Layout shared = layout;  // each layer works where the others do
    const LayerForward& layer = packed.layers_[l];
    const Measures size(layer, *packed.kernels_[l]);
    const StreamWork work = size.work(shared, *packed.table_, layer, all_rows, step_rows);
    end = std::max(end, shared.used());
    if (!states) continue;
    if (l == 0) std::memset(between[0], 0, begin - size_t(between[0] - static_cast<char*>(memory)));
    new (layers + l) LayerForward(layer);
    packed.kernels_[l]->create(layers[l], packed.weights_[l], states_of[l], work, objects[l]);
  }
  bytes = end;
  if (states) {
    states->packed_ = &packed;
    states->slots_ = slots;
    states->rows_ = all_rows;
    states->step_rows_ = step_rows;
    states->layers_ = layers;
    states->objects_ = objects;
    states->states_ = states_of;
    states->between_[0] = between[0];
    states->between_[1] = between[1];
  }
  return states;
}

StackStates* StackStates::create(const PackedStack& packed, int64_t slots, int64_t rows) {
  void* memory = large_memory(bytes_for(packed, slots, rows));
  return memory ? place(memory, packed, slots, rows) : nullptr;
}

size_t StackStates::bytes_for(const PackedStack& packed, int64_t slots, int64_t rows) {
  size_t bytes = 0;
  lay_out(nullptr, packed, slots, rows, bytes);
  return bytes;
}

StackStates* StackStates::place(void* memory, const PackedStack& packed, int64_t slots, int64_t rows) {
  size_t bytes = 0;
  return lay_out(memory, packed, slots, rows, bytes);
}

void StackStates::destroy(StackStates* states) { std::free(states); }

void StackStates::advance(const StreamRows& call) {
  const DenormalsAreZero denormals_are_zero;
  advance_block(call);
}

void StackStates::advance_block(const StreamRows& call) {
  const int64_t count = packed_->count_, bytes = element_bytes(layers_[0].sizes.dtype);
  const int64_t state_size = layers_[0].sizes.state_size;
  for (int64_t row = 0; row < call.rows; row += step_rows_) {
    StreamRows part;
    part.rows = std::min(call.rows - row, step_rows_);
    part.slots = call.slots ? call.slots + row : nullptr;
    part.first_slot = call.first_slot + row;
    part.lengths = call.lengths ? call.lengths + row : nullptr;
    part.mask = call.mask ? call.mask + row : nullptr;
    part.mask_stride = call.mask_stride;
    const int64_t steps_at_once = call.steps == 1 ? 1 : rows_ / part.rows;
    for (int64_t step = 0; step < call.steps; step += steps_at_once) {
      part.steps = std::min(call.steps - step, steps_at_once);
      part.first_step = call.first_step + step;
      const Sequence first{shifted(call.x, step, row, bytes), call.x.time_stride, call.x.batch_stride};
      const Sequence last{shifted(call.y, step, row, bytes), call.y.time_stride, call.y.batch_stride};
      const Sequence between[2] = {{between_[0], part.rows * state_size, state_size},
                                   {between_[1], part.rows * state_size, state_size}};
      for (int64_t l = 0; l < count; ++l) {
        part.x = l == 0 ? first : between[(l - 1) & 1];
        part.y = l + 1 == count ? last : between[l & 1];
        packed_->kernels_[l]->advance(objects_[l], part);
      }
    }
  }
}

void StackStates::read(int64_t layer, int64_t slot, void* h, void* c, bool exact) const {
  const LayerForward& of = layers_[layer];
  const Measures size(of, *packed_->kernels_[layer]);
  const StreamStates& s = states_[layer];
  const DType sums = sum_dtype(of), stored = of.sizes.dtype;
  const bool apart = size.keeps_h;
  if (h) {
    copy(apart ? s.carried : s.multiplied, slot * size.state_stride,
         apart ? sums : element_dtype(of, *packed_->kernels_[layer]), h, 0, stored, size.P);
  }
  for (int64_t i = 0; c && i < size.shape.states; ++i)
    copy(s.cells, slot * size.cell_stride + i * size.unit_stride, sums, c, i * size.H, exact ? sums : stored, size.H);
}

void StackStates::write(int64_t layer, int64_t slot, const void* h, const void* c, bool exact) {
  const LayerForward& of = layers_[layer];
  const Measures size(of, *packed_->kernels_[layer]);
  const StreamStates& s = states_[layer];
  const DType sums = sum_dtype(of), stored = of.sizes.dtype;
  const int64_t place = slot * size.state_stride;
  copy(h, 0, stored, s.multiplied, place, element_dtype(of, *packed_->kernels_[layer]), size.P);
  if (size.keeps_h) copy(h, 0, stored, s.carried, place, sums, size.P);
  for (int64_t i = 0; i < size.shape.states; ++i)
    copy(c, i * size.H, exact ? sums : stored, s.cells, slot * size.cell_stride + i * size.unit_stride, sums, size.H);
}

void StackStates::reset(int64_t slot) {
  for (int64_t l = 0; l < packed_->count_; ++l) write(l, slot, nullptr, nullptr, false);
}

}  // namespace fused_rnn
