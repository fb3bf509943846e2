#include "stack.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../cpu/kernels.h"
#include "../cpu/plan.h"
#include "../cpu/team.h"

namespace fused_rnn {

namespace {

// Rows that are multiplied together: enough that the packed weights, which are read once for all of them, cost little
// beside the products, and so few that their sums stay in the second-level cache.
constexpr int64_t most_rows_at_once = 64;
// Of all steps of a chunk, even where each has fewer: two tiles of a product.
constexpr int64_t least_rows_at_once = 12;

int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

char* shifted(const Sequence& s, int64_t step, int64_t row, int64_t bytes) {
  return static_cast<char*>(s.data) + (step * s.time_stride + row * s.batch_stride) * bytes;
}

bool same_layer(const LayerForward& a, const LayerForward& b) {
  const LayerSizes &s = a.sizes, &z = b.sizes;
  const Within &v = a.within, &w = b.within;
  return s.kind == z.kind && s.dtype == z.dtype && s.input_size == z.input_size && s.hidden_size == z.hidden_size &&
         s.state_size == z.state_size && s.heads == z.heads && s.layer_norm == z.layer_norm &&
         a.plain_gates == b.plain_gates && v.activation == w.activation &&
         v.recurrent_activation == w.recurrent_activation && v.peephole == w.peephole &&
         v.coupled_gates == w.coupled_gates && v.cell_clip == w.cell_clip && v.zoneout == w.zoneout &&
         v.zoneout_cell == w.zoneout_cell;
}

}  // namespace

// With null memory it only counts.
PackedStack* PackedStack::lay_out(void* memory, const LayerForward* layers, int64_t count, size_t& bytes) {
  Layout layout(memory);
  PackedStack* place = layout.take<PackedStack>(1);
  LayerForward* own = layout.take<LayerForward>(count);
  const StreamKernel** kernels_of = layout.take<const StreamKernel*>(count);
  char** weights = layout.take<char*>(count);
  size_t* weight_bytes = layout.take<size_t>(count);
  PackedStack* packed = memory ? new (place) PackedStack() : nullptr;
  for (int64_t l = 0; l < count; ++l) {
    const StreamKernel& kernel = kernels().stream(layers[l].sizes);
    const size_t size = kernel.weight_bytes(layers[l]);
    char* data = layout.take<char>(int64_t(size));
    if (!packed) continue;
    kernels_of[l] = &kernel;
    weights[l] = data;
    weight_bytes[l] = size;
    new (own + l) LayerForward(layers[l]);
    kernel.pack(layers[l], data);
    const LayerSizes& s = layers[l].sizes;
    packed->multiply_adds_ += gate_count(s.kind) * s.hidden_size * (s.input_size + s.state_size / s.heads) +
                              (s.state_size != s.hidden_size ? s.state_size * s.hidden_size : 0);
  }
  bytes = layout.used();
  if (packed) {
    packed->count_ = count;
    packed->bytes_ = bytes;
    packed->layers_ = own;
    packed->kernels_ = kernels_of;
    packed->weights_ = weights;
    packed->weight_bytes_ = weight_bytes;
  }
  return packed;
}

PackedStack* PackedStack::create(const LayerForward* layers, int64_t count) {
  size_t bytes = 0;
  lay_out(nullptr, layers, count, bytes);
  void* memory = large_memory(bytes);
  return memory ? lay_out(memory, layers, count, bytes) : nullptr;
}

void PackedStack::destroy(PackedStack* packed) { std::free(packed); }

bool PackedStack::equals(const PackedStack& other) const {
  if (count_ != other.count_) return false;
  for (int64_t l = 0; l < count_; ++l) {
    if (kernels_[l] != other.kernels_[l] || weight_bytes_[l] != other.weight_bytes_[l] ||
        !same_layer(layers_[l], other.layers_[l]) || std::memcmp(weights_[l], other.weights_[l], weight_bytes_[l]) != 0)
      return false;
  }
  return true;
}

StackStates* StackStates::lay_out(void* memory, const PackedStack& packed, int64_t slots, int64_t rows, size_t& bytes) {
  const int64_t count = packed.count_;
  Layout layout(memory);
  StackStates* place = layout.take<StackStates>(1);
  LayerForward* layers = layout.take<LayerForward>(count);
  void** objects = layout.take<void*>(count);
  StackStates* states = memory ? new (place) StackStates() : nullptr;
  const int64_t step_rows = std::min(rows, most_rows_at_once);
  const int64_t all_rows = std::max(step_rows, least_rows_at_once);
  size_t work_bytes = 0;
  for (int64_t l = 0; l < count; ++l)
    work_bytes = std::max(work_bytes, packed.kernels_[l]->work_bytes(packed.layers_[l], all_rows, step_rows));
  char* work = layout.take<char>(int64_t(work_bytes));
  const LayerSizes& sizes = packed.layers_[0].sizes;
  const int64_t output_bytes = count > 1 ? all_rows * sizes.state_size * element_bytes(sizes.dtype) : 0;
  char* between[2] = {layout.take<char>(output_bytes), layout.take<char>(output_bytes)};
  for (int64_t l = 0; l < count; ++l) {
    const StreamKernel& kernel = *packed.kernels_[l];
    void* object = layout.take<char>(int64_t(kernel.object_bytes));
    void* own = layout.take<char>(int64_t(kernel.state_bytes(packed.layers_[l], slots)));
    if (!states) continue;
    objects[l] = object;
    new (layers + l) LayerForward(packed.layers_[l]);
    kernel.create(layers[l], {packed.weights_[l], own, work, slots, all_rows, step_rows}, object);
  }
  bytes = layout.used();
  if (states) {
    states->packed_ = &packed;
    states->slots_ = slots;
    states->rows_ = all_rows;
    states->step_rows_ = step_rows;
    states->layers_ = layers;
    states->objects_ = objects;
    states->between_[0] = between[0];
    states->between_[1] = between[1];
    // Rows that have no step are multiplied, and their results not looked at.
    if (output_bytes > 0) {
      std::memset(between[0], 0, size_t(output_bytes));
      std::memset(between[1], 0, size_t(output_bytes));
    }
  }
  return states;
}

StackStates* StackStates::create(const PackedStack& packed, int64_t slots, int64_t rows) {
  size_t bytes = 0;
  lay_out(nullptr, packed, slots, rows, bytes);
  void* memory = large_memory(bytes);
  return memory ? lay_out(memory, packed, slots, rows, bytes) : nullptr;
}

void StackStates::destroy(StackStates* states) { std::free(states); }

void StackStates::advance(const StreamRows& call) {
  struct Task {
    StackStates* self;
    const StreamRows* call;
  } task{this, &call};
  const auto run = [](void* context, int) {
    const Task& mine = *static_cast<Task*>(context);
    mine.self->advance_block(*mine.call);
  };
  run_team(1, run, &task);
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
  packed_->kernels_[layer]->read(objects_[layer], slot, h, c, exact);
}

void StackStates::write(int64_t layer, int64_t slot, const void* h, const void* c, bool exact) {
  packed_->kernels_[layer]->write(objects_[layer], slot, h, c, exact);
}

void StackStates::reset(int64_t slot) {
  for (int64_t l = 0; l < packed_->count_; ++l) write(l, slot, nullptr, nullptr, false);
}

}  // namespace fused_rnn
