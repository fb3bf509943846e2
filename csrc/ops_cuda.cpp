// The operators torch.ops.fused_rnn.* on CUDA tensors.
//
// A layer is one product for the projections of all steps, then its steps, all in one launch where the planner finds a
// persistent variant (cuda/plan.h) and one product and one launch a step where it does not, and, in the backward pass,
// products over all rows for the gradients of weights and input. Nothing here waits for the device, and nothing is
// allocated inside the loops over steps, so a call can be captured in a CUDA graph. All products have a fixed order and
// all sums too: a call gives the same bits each time.
#include "ops_cuda.h"

#include <ATen/ops/from_blob.h>

#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "cells/gru.h"
#include "cells/gru_reset_before.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/cuda.h"
#include "cuda/custom.h"
#include "operators.h"
#include "ops_cuda_stream.h"
#include "profile.h"

namespace fused_rnn {

namespace {

void check(const char* error) { TORCH_CHECK(!error, "fused_rnn: ", error); }

std::mutex allowed_mutex;
cuda::Allowed allowed_now;
int allowed_version = 0;

// All that a plan depends on; the layers are those of a stack, 0 for a layer by itself.
using PlanKey = std::tuple<int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, bool, bool, int64_t, bool>;

cuda::Plan make_resident_plan(const LayerSizes& sizes, const Steps& steps, const cuda::DeviceInfo& device,
                              bool backward, bool tf32, cuda::Allowed allowed, bool options) {
  for (;;) {
    cuda::Plan plan = cuda::make_plan(sizes, steps, device, backward, tf32, allowed);
    if (plan.variant == cuda::Variant::none) return plan;
    if (options && plan.merged) {
      cuda::Plan none;
      none.reason = "options are of the h after its projection, which kernels of all steps do not have";
      return none;
    }
    if (options && !cuda::persistent_has_options(sizes, plan, device)) {
      cuda::Plan none;
      none.reason = "kernels of all steps have options where warps can hand registers to others (sm_90a) alone";
      return none;
    }
    if (cuda::persistent_fits(sizes, plan, device)) return plan;
    switch (plan.variant) {
      case cuda::Variant::block: allowed.block = false; break;
      case cuda::Variant::cluster: allowed.cluster = false; break;
      default: allowed.grid = false;
    }
  }
}

cuda::Plan make_resident_wavefront(const LayerSizes& sizes, int64_t layers, const Steps& steps,
                                   const cuda::DeviceInfo& device, bool backward, bool tf32,
                                   const cuda::Allowed& allowed) {
  cuda::Plan plan = cuda::make_wavefront_plan(sizes, layers, steps, device, backward, tf32, allowed);
  if (plan.layers == 1 || cuda::persistent_fits(sizes, plan, device)) return plan;
  cuda::Plan none;
  none.reason = "its clusters are not resident";
  return none;
}

}  // namespace

const cuda::DeviceInfo& device_info(int index) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<cuda::DeviceInfo>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (int(known.size()) <= index) known.resize(index + 1);
  if (!known[index]) {
    auto info = std::make_unique<cuda::DeviceInfo>();
    check(cuda::read_device(index, *info));
    known[index] = std::move(info);
  }
  return *known[index];
}

bool tf32_allowed() {
  return !at::NoTF32Guard::should_disable_tf32() && at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
}

cuda::Allowed allow_variants(const cuda::Allowed& allowed) {
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  ++allowed_version;
  return std::exchange(allowed_now, allowed);
}

static int64_t most_steps() {
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  return allowed_now.most_steps;
}

static const cuda::Plan& find_plan(const LayerSizes& sizes, int64_t layers, const Steps& steps, int device,
                                   bool backward, bool tf32, bool options) {
  // A call asks for its plan each time, and planning costs as much as some launches.
  static thread_local std::map<PlanKey, cuda::Plan> plans;
  static thread_local int version = -1;
  cuda::Allowed allowed;
  {
    const std::lock_guard<std::mutex> lock(allowed_mutex);
    allowed = allowed_now;
    if (version != allowed_version || plans.size() >= 1000) plans.clear();
    version = allowed_version;
  }
  const PlanKey key(int(sizes.kind), int(sizes.dtype), sizes.input_size, sizes.hidden_size, sizes.state_size, steps.T,
                    steps.B, sizes.num_directions, device, backward, tf32, layers, options);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  const cuda::DeviceInfo& info = device_info(device);
  return plans[key] = layers == 0 ? make_resident_plan(sizes, steps, info, backward, tf32, allowed, options)
                                  : make_resident_wavefront(sizes, layers, steps, info, backward, tf32, allowed);
}

const cuda::Plan& cuda_plan(const LayerSizes& sizes, const Steps& steps, int device, bool backward, bool tf32,
                            bool options) {
  return find_plan(sizes, 0, steps, device, backward, tf32, options);
}

const cuda::Plan& cuda_wavefront(const LayerSizes& sizes, int64_t layers, const Steps& steps, int device, bool backward,
                                 bool tf32) {
  return find_plan(sizes, layers, steps, device, backward, tf32, false);
}

namespace {

// What is known of a cell at run time (cells/cell.h).
struct Cell {
  int gates, saved, grad_gates, states;
  GateGrads input_grads, hidden_grads;  // of what W_ih and W_hh have multiplied
  GateGrads input_bias_grads, hidden_bias_grads;
  int own_saved;  // of these those of the gates; with layer normalisation those of both sides follow (cuda/cuda.h)
  // Of the gates those whose W_hh multiplies h, the first ones; that of the others multiplies what the reset gate has
  // left of it.
  int gates_of_h;
  const cuda::CustomKernels* custom = nullptr;  // of a custom cell

  bool has_cell() const { return states > 0; }
  bool resets_before() const { return gates_of_h < gates; }
  // Whether a gradient of h goes past W_hh.
  bool passes_h(CellKind kind) const { return kind == CellKind::gru || custom; }
};

template <class C>
Cell describe(bool layer_norm) {
  Cell cell{C::gates,        C::saved,       C::grad_gates,   C::states, C::input_grads,
            C::hidden_grads, C::input_grads, C::hidden_grads, C::saved,  C::gates};
  if (layer_norm) {
    cell.input_grads.first = C::grad_gates;
    cell.hidden_grads.first = C::grad_gates + C::gates;
    cell.saved += 2 * C::gates;
    cell.grad_gates += 2 * C::gates;
  }
  return cell;
}

// Its kernels are compiled now where nobody has asked for them before.
Cell describe_custom(const LayerSizes& sizes, int device) {
  const int arch = device_info(device).arch;
  const cuda::CustomKernels* found = cuda::custom_kernels(sizes.kind, sizes.dtype, arch);
  TORCH_CHECK(found, "kind: this custom cell has no CUDA kernels here, and without Python none are compiled");
  const cuda::CustomKernels& c = *found;
  return {c.gates,       c.saved,        c.grad_gates, c.states, c.input_grads, c.hidden_grads,
          c.input_grads, c.hidden_grads, c.saved,      c.gates,  found};
}

Cell cell_of(const LayerSizes& sizes, const Within& within, int device) {
  if (sizes.kind >= CellKind::custom) return describe_custom(sizes, device);
  if (!within.reset_after) {
    Cell cell = describe<GruResetBefore>(false);
    cell.gates_of_h = GruResetBefore::gates_of_h;
    return cell;
  }
  switch (sizes.kind) {
    case CellKind::rnn_tanh: return describe<RnnTanh>(sizes.layer_norm);
    case CellKind::rnn_relu: return describe<RnnRelu>(sizes.layer_norm);
    case CellKind::lstm: return describe<Lstm>(sizes.layer_norm);
    case CellKind::gru: return describe<Gru>(sizes.layer_norm);
    case CellKind::custom: break;
  }
  TORCH_CHECK(false, "kind: not one of a cell");
}

// Gradients `grad` ... belong to the weight gates `gate` ..., `count` of them.
struct GateRun {
  int grad, gate, count;
};

// Of the gates from the `begin`-th to before the `end`-th. Neighbours in one product: an LSTM has one run, the input
// part of a GRU two.
c10::SmallVector<GateRun, 4> runs_of(const GateGrads& grads, int end, int begin = 0) {
  c10::SmallVector<GateRun, 4> runs;
  for (int j = begin; j < end; ++j) {
    if (!runs.empty() && grads.gate[j] == runs.back().gate + runs.back().count) {
      ++runs.back().count;
    } else {
      runs.push_back({grads.first + j, grads.gate[j], 1});
    }
  }
  return runs;
}

// data + count elements of the layer's dtype.
template <class T>
T* advance(T* data, int64_t count, int64_t element_size) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data ? static_cast<Byte*>(data) + count * element_size : nullptr;
}

// What steps do beside the plain cell: nothing, what kernels of all steps in one launch may have as well, or more.
enum class Options { none, in_launches, in_steps };

class Cuda {
 public:
  static constexpr bool one_matrix = true;
  static constexpr bool adds_into_grad_x = false;
  static constexpr bool masks_in_kernels = true;
  static constexpr bool wavefronts = true;
  static constexpr bool resets_before_product = true;

  explicit Cuda(const Tensor& input) : stream_(input), options_(input.options()) {
    sum_dtype_ = accumulation_dtype(input);
    size_ = int64_t(input.element_size());
    sum_size_ = int64_t(c10::elementSize(sum_dtype_));
  }

  // W_hh of heads is one matrix here, with zeros between the heads: a step's product costs as much as without heads,
  // which is little where a launch takes longer, and every kernel there is takes it, the persistent ones included.
  static int64_t vector_units(const Tensor&) { return std::numeric_limits<int64_t>::max(); }

  static void copy(const Tensor& to, const Tensor& from) { to.copy_(from.view(to.sizes())); }
  int64_t layers_at_once(const LayerSizes& sizes, int64_t layers, const Steps& steps, bool backward) const {
    return cuda_wavefront(sizes, layers, steps, stream_.device(), backward, tf32_).layers;
  }

  void forward(const LayerForward* layers, int64_t count);
  void forward(const LayerForward& layer) { forward(&layer, 1); }
  void backward(const LayerBackward* layers, int64_t count);
  void backward(const LayerBackward& layer) { backward(&layer, 1); }

 private:
  Tensor buffer(at::IntArrayRef shape) const { return at::empty(shape, options_); }
  Tensor sum_buffer(at::IntArrayRef shape) const { return at::empty(shape, options_.dtype(sum_dtype_)); }

  // Memory of another tensor as one.
  Tensor view(const void* data, at::IntArrayRef shape, at::IntArrayRef strides, at::ScalarType dtype) const {
    return at::for_blob(const_cast<void*>(data), shape)
        .strides(strides)
        .options(options_.dtype(dtype))
        .target_device(options_.device())
        .make_tensor();
  }

  // to (rows, columns) in the sum type = from in the layer's dtype, or zeros.
  void widen(const Tensor& to, const void* from) const {
    if (from) {
      to.copy_(view(from, to.sizes(), to.strides(), options_.dtype().toScalarType()));
    } else {
      stream_.clear(to.mutable_data_ptr(), to.numel() * sum_size_);
    }
  }

  // Which rows of which steps count, (T, B).
  Tensor live_mask(const Steps& steps) const {
    return view(steps.mask, {steps.T, steps.B}, {steps.B, 1}, at::kByte).ne(0);
  }

  // Which rows live in step t, (B, 1).
  Tensor mask_of(const Steps& steps, int64_t t) const {
    return view(steps.mask + t * steps.B, {steps.B, 1}, {1, 1}, at::kBool);
  }

  // States before the first step: of rows that begin anew there `reset`, of the others `initial`; null: zeros.
  Tensor begun(const uint8_t* anew, const void* reset, const void* initial, at::IntArrayRef shape) const {
    const auto state = [&](const void* data) {
      return data ? view(data, shape, {shape[1], 1}, options_.dtype().toScalarType()) : at::zeros(shape, options_);
    };
    const Tensor rows = view(anew, {shape[0], 1}, {1, 1}, at::kByte).ne(0);
    return at::where(rows, state(reset), state(initial)).contiguous();
  }

  // The steps with their arrays in device memory.
  Steps device_steps(const Steps& steps) {
    Steps result = steps;
    if (!steps.batch_sizes) return result;
    if (!steps_.defined()) {
      steps_ = at::empty({2 * steps.T + 1}, options_.dtype(at::kLong));
      int64_t* data = steps_.mutable_data_ptr<int64_t>();
      check(cuda::upload_steps(steps.batch_sizes, steps.T, data, data + steps.T, stream_.handle()));
    }
    result.batch_sizes = steps_.const_data_ptr<int64_t>();
    result.offsets = result.batch_sizes + steps.T;
    return result;
  }

  // The projected inputs of a layer, as they stand in memory; of some steps at a time where the memory is their own.
  struct Projections {
    void* data[2] = {};
    int64_t stride = 0;
    int64_t steps = 0;  // at once
    bool apart = false;
    int64_t first_step[2] = {}, end_step[2] = {}, first_row[2] = {};  // those that are there
    Tensor buffers[2];
  };

  // Of so many layers at once.
  cuda::Plan plan(const LayerSizes& sizes, int64_t layers, const Steps& steps, bool backward, Options options) const {
    if (layers == 1 && options == Options::in_steps) return {};
    if (layers == 1) return cuda_plan(sizes, steps, stream_.device(), backward, tf32_, options == Options::in_launches);
    cuda::Plan plan = cuda_wavefront(sizes, layers, steps, stream_.device(), backward, tf32_);
    TORCH_CHECK(plan.layers == layers, "fused_rnn: no plan for ", layers, " layers at once: ", plan.reason);
    return plan;
  }

  // What a direction begins from: the caller's states, or for rows that begin anew before the first step theirs.
  struct FirstStates {
    const void *h = nullptr, *c = nullptr;
    Tensor h_made, c_made;
  };
  FirstStates first_states(const LayerForward& layer, const Cell& cell, int d) const;

  // A layer with a projection as kernels of all steps run it: as one without. Between its steps travels the h before
  // W_hr, W_hh W_hr multiplies it, and what is left of the projection are products over all rows.
  struct Merged {
    LayerForward layer;         // without its projection and the state before the first step
    const LayerForward* given;  // as it is
    Tensor w_hh[2];
    Tensor h[2];      // before the projection, of the steps whose projected inputs are there: (rows, H)
    Tensor begin[2];  // where rows are masked and have an initial state: first_live
  };

  Projections make_projections(const LayerForward& layer, const Cell& cell) const;
  void project(const LayerForward& layer, const Cell& cell, const Products& product, int64_t k, Projections& to) const;
  void persistent_forward(const LayerForward* layers, const Cell& cell, const Products& product,
                          const cuda::Plan& chosen, Projections& projections, const Merged* merged = nullptr);
  Tensor merged_weights(const LayerSizes& sizes, const Cell& cell, const Weights& weights) const;
  Tensor first_live(const Steps& steps, int d) const;
  Merged merge(const LayerForward& layer, const Cell& cell, const Projections& projections) const;
  void add_initial_states(const Merged& merged, const Cell& cell, const Products& product,
                          const Projections& projections) const;
  void project_states(const Merged& merged, const Products& product, const Projections& projections) const;
  Tensor later_live_gradients(const Steps& steps, int d, const Tensor& gradients, const void* final) const;
  void gradients_past_merging(const LayerBackward& layer, const Cell& cell, const Products& product, int d,
                              const void* grad_gates, Tensor& grad_projected);
  void steps_forward(const LayerForward& layer, const Cell& cell, const Products& product, Projections& projections);
  void steps_backward(const LayerBackward& layer, const Cell& cell, const Products& product, void* const* grad_gates,
                      const Tensor* grad_projected, const Tensor* hidden, const Tensor* of_cell);
  void norm_gradients(const LayerBackward& layer, const Cell& cell, int d, const void* grad_gates,
                      const Tensor& of_cell) const;
  Tensor clipped_rows(const Steps& steps, int d) const;
  void compute_gates_again(const LayerBackward& layer, const Cell& cell, Tensor* gates);
  void weight_gradients(const LayerBackward& layer, const Cell& cell, const Products& product, int d,
                        const void* grad_gates, const void* grad_projected, const Tensor& hidden);

  Stream stream_;
  at::TensorOptions options_;
  at::ScalarType sum_dtype_;
  int64_t size_, sum_size_;  // bytes of an element
  bool tf32_ = tf32_allowed();
  Tensor steps_;
};

// Whether steps do more than the plain cell does.
bool has_options(const LayerForward& layer) { return !layer.plain_gates || layer.steps.reset; }
bool has_options(const LayerBackward& layer) {
  const Within& within = layer.within;
  return !layer.plain_gates || layer.steps.reset || within.bptt_steps > 0 || within.recurrent_grad_clip > 0 ||
         layer.grad_h.data || layer.direction[0].grad_cells;
}

// Whether the functions of its gates are the cell's own.
bool has_own_gates(const LayerSizes& sizes, const Within& w) {
  const Activation own = sizes.kind == CellKind::rnn_relu ? Activation::relu : Activation::tanh;
  return w.activation == own && w.recurrent_activation == Activation::sigmoid && w.reset_after && !w.peephole &&
         !w.coupled_gates && !w.layer_norm;
}
Options options_of(const LayerForward& layer) {
  if (!has_options(layer)) return Options::none;
  return layer.plain_gates || has_own_gates(layer.sizes, layer.within) ? Options::in_launches : Options::in_steps;
}
Options options_of(const LayerBackward& layer) {
  if (!has_options(layer)) return Options::none;
  const bool in_launches = (layer.plain_gates || has_own_gates(layer.sizes, layer.within)) && !layer.grad_h.data &&
                           !layer.direction[0].grad_cells;
  return in_launches ? Options::in_launches : Options::in_steps;
}

// Those of a direction, for a kernel of all steps.
cuda::PersistentOptions persistent_options(const Extras& extras, const Within& within) {
  cuda::PersistentOptions o;
  o.any = 1;
  o.zoneout = extras.zoneout;
  o.zoneout_cell = extras.zoneout_cell;
  o.rate = float(within.zoneout);
  o.cell_rate = float(within.zoneout_cell);
  o.cell_clip = float(within.cell_clip);
  o.reset_h = extras.reset_h;
  o.reset_c = extras.reset_c;
  o.dropout = extras.dropout;
  return o;
}

// Of the rows of a step, the k-th in direction d: which begin anew before it. Null: none.
const uint8_t* rows_anew(const Steps& steps, int d, int64_t k) {
  const int64_t mark = d == 0 ? k : steps.T - k;
  return steps.reset && k < steps.T && mark < steps.T ? steps.reset + mark * steps.B : nullptr;
}

// From row `row` of all steps on.
const uint8_t* rows_of_bits(const uint8_t* bits, int64_t row, int64_t units) {
  return bits ? bits + row * ((units + 7) / 8) : nullptr;
}

// What kernels of H units are told: with a projection, zoneout is of the h after it.
Within within_of_units(const Within& within, bool projects) {
  Within result = within;
  if (projects) result.zoneout = 0;
  return result;
}

// Where rows of the batch begin in a direction: `count` of them from `first` on, with `row` the first one's of all
// rows. They end where they begin in the other direction.
struct Beginning {
  int64_t step, row, first, count;
};
c10::SmallVector<Beginning, 4> beginnings(const Steps& steps, int d) {
  if (d == 0) return {{0, 0, 0, steps.rows(0)}};
  c10::SmallVector<Beginning, 4> result;
  int64_t begun = 0;
  for (int64_t t = steps.T - 1; t >= 0; --t) {
    const int64_t rows = steps.rows(t);
    if (rows > begun) result.push_back({t, steps.first_row(t) + begun, begun, rows - begun});
    begun = rows;
  }
  return result;
}

// What a profiler shows.
std::string describe(const LayerSizes& sizes, const Steps& steps, const cuda::Plan& plan, bool backward) {
  std::string text = describe_layer(sizes, steps, backward);
  if (plan.variant == cuda::Variant::none) return text + " step by step";
  text += std::string(" persistent ") + cuda::name(plan.variant);
  return plan.layers > 1 ? text + " " + std::to_string(plan.layers) + " layers" : text;
}

// One layer, or several in a wavefront, of which the lowest alone has projections.
void Cuda::forward(const LayerForward* layers, int64_t count) {
  const LayerForward& lowest = layers[0];
  const Cell cell = cell_of(lowest.sizes, lowest.within, stream_.device());
  const Products product(lowest.sizes.dtype, tf32_);
  Projections projections = make_projections(lowest, cell);
  const cuda::Plan chosen = plan(layers[count - 1].sizes, count, lowest.steps, false, options_of(lowest));
  const Range range([&] { return describe(lowest.sizes, lowest.steps, chosen, false); });
  if (chosen.variant == cuda::Variant::none) {
    steps_forward(lowest, cell, product, projections);
  } else if (chosen.merged) {
    const Merged merged = merge(lowest, cell, projections);
    persistent_forward(&merged.layer, cell, product, chosen, projections, &merged);
  } else {
    persistent_forward(layers, cell, product, chosen, projections);
  }
}

// The projections stand where the kernels will put what they compute from them: a GRU's three in the first part of the
// four values that it saves, the plain recurrence's in its output. Those of a custom cell that saves fewer have memory
// of their own, as without a backward pass.
Cuda::Projections Cuda::make_projections(const LayerForward& layer, const Cell& cell) const {
  const LayerSizes& s = layer.sizes;
  const int64_t H = s.hidden_size, GH = cell.gates * H, T = layer.steps.T;
  const bool save = layer.direction[0].gates;
  Projections p;
  p.apart = cell.saved > 0 && !(save && cell.saved >= cell.gates);
  p.stride = p.apart ? GH : cell.saved == 0 ? layer.y.batch_stride : cell.saved * H;
  p.steps = T;
  if (p.apart)
    p.steps = std::min(T, most_steps() > 0 ? most_steps() : cuda::projection_steps(s, cell.gates, layer.steps));
  const int64_t rows = layer.steps.first_row(p.steps);  // no part has more than the first
  for (int d = 0; d < s.num_directions; ++d) {
    if (p.apart) p.buffers[d] = buffer({rows, GH});
    p.data[d] = p.apart          ? p.buffers[d].mutable_data_ptr()
                : cell.saved > 0 ? layer.direction[d].gates
                                 : advance(layer.y.data, d * H, size_);
  }
  return p;
}

// Those of the steps from the k-th on, in each direction's order.
void Cuda::project(const LayerForward& layer, const Cell& cell, const Products& product, int64_t k,
                   Projections& to) const {
  const int64_t GH = cell.gates * layer.sizes.hidden_size, I = layer.sizes.input_size, T = layer.steps.T;
  const int64_t end = std::min(T, k + to.steps);
  for (int d = 0; d < layer.sizes.num_directions; ++d) {
    to.first_step[d] = d == 0 ? k : T - end;
    to.end_step[d] = d == 0 ? end : T - k;
    const int64_t row = layer.steps.first_row(to.first_step[d]), rows = layer.steps.first_row(to.end_step[d]) - row;
    to.first_row[d] = to.apart ? row : 0;
    product(rows, GH, I, {advance(layer.x.data, row * layer.x.batch_stride, size_), layer.x.batch_stride},
            {layer.direction[d].weights.w_ih, I, true}, advance(to.data[d], (row - to.first_row[d]) * to.stride, size_),
            to.stride, 0);
  }
}

Cuda::FirstStates Cuda::first_states(const LayerForward& layer, const Cell& cell, int d) const {
  const DirectionForward& dir = layer.direction[d];
  const int64_t B = layer.steps.B;
  FirstStates first;
  first.h = dir.h0;
  first.c = dir.c0;
  const uint8_t* const anew = rows_anew(layer.steps, d, 0);
  if (!anew) return first;
  first.h_made = begun(anew, dir.extras.reset_h, dir.h0, {B, layer.sizes.state_size});
  first.h = first.h_made.const_data_ptr();
  if (!cell.has_cell()) return first;
  first.c_made = begun(anew, dir.extras.reset_c, dir.c0, {B, cell.states * layer.sizes.hidden_size});
  first.c = first.c_made.const_data_ptr();
  return first;
}

void Cuda::persistent_forward(const LayerForward* layers, const Cell& cell, const Products& product,
                              const cuda::Plan& chosen, Projections& projections, const Merged* merged) {
  const LayerForward& layer = layers[0];
  const LayerSizes& s = layer.sizes;
  const int64_t H = s.hidden_size, B = layer.steps.B, T = layer.steps.T;
  const Steps steps = device_steps(layer.steps);
  const Tensor workspace = at::empty({chosen.workspace_bytes}, options_.dtype(at::kByte));

  // States between two launches: h twice, because blocks may still read the one while others write the other, and c as
  // the kernels sum it.
  const bool several = projections.steps < T;
  Tensor between[cuda::most_layers], cells[cuda::most_layers];
  const auto part_of = [&](int p) -> const DirectionForward& {
    return chosen.layers > 1 ? layers[p].direction[0] : layer.direction[p];
  };
  const bool options = chosen.layers == 1 && has_options(layer);
  FirstStates first[cuda::most_layers];
  for (int p = 0; p < chosen.parts(); ++p) {
    if (options) {
      first[p] = first_states(layer, cell, p);
    } else {
      first[p].h = part_of(p).h0;
      first[p].c = part_of(p).c0;
    }
  }
  for (int p = 0; p < chosen.parts() && several; ++p) {
    between[p] = buffer({2, B, H});
    if (!cell.has_cell()) continue;
    cells[p] = sum_buffer({B, H});
    widen(cells[p], first[p].c);
  }
  int64_t part = 0;
  for (int64_t k = 0; k < T; k += projections.steps, ++part) {
    project(layer, cell, product, k, projections);
    if (merged) add_initial_states(*merged, cell, product, projections);
    cuda::PersistentForward parts[cuda::most_layers];
    for (int p = 0; p < chosen.parts(); ++p) {
      const DirectionForward& from = part_of(p);
      cuda::PersistentForward& to = parts[p];
      const int l = chosen.layers > 1 ? p : 0, d = p - l;
      const bool last = k + projections.steps >= T;
      to.first_step = projections.first_step[d];
      to.end_step = projections.end_step[d];
      to.w_hh = from.weights.w_hh;
      to.b_ih = from.weights.b_ih;
      to.b_hh = from.weights.b_hh;
      if (l == 0) {
        to.projection = advance(projections.data[d], -projections.first_row[d] * projections.stride, size_);
        to.projection_stride = projections.stride;
      } else {
        to.w_ih = from.weights.w_ih;
      }
      to.h0 = k == 0 ? first[p].h : const_slice(between[p], (part + 1) % 2);
      to.c0 = first[p].c;
      to.c = mutable_data_or_null(cells[p]);
      to.h_n = last ? from.h_n : mutable_slice(between[p], part % 2);
      to.c_n = from.c_n;
      to.y = advance(layers[l].y.data, d * H, size_);
      to.y_stride = layers[l].y.batch_stride;
      if (merged) {
        to.y = advance(merged->h[d].mutable_data_ptr(), -projections.first_row[d] * H, size_);
        to.y_stride = H;
      }
      to.factors = layers[l].factors.data;
      to.factors_stride = layers[l].factors.batch_stride;
      to.gates = from.gates;
      to.cells = from.cells;
      if (options) to.options = persistent_options(from.extras, layer.within);
    }
    check(cuda::persistent_forward(s, steps, parts, chosen, device_info(stream_.device()), workspace.mutable_data_ptr(),
                                   stream_.handle()));
    if (merged) project_states(*merged, product, projections);
  }
}

// Rounded as W_hh is: once, from a product in the sum type.
Tensor Cuda::merged_weights(const LayerSizes& sizes, const Cell& cell, const Weights& weights) const {
  const int64_t H = sizes.hidden_size, P = sizes.state_size, GH = cell.gates * H;
  const Tensor result = buffer({GH, H});
  const Products exact(sizes.dtype, false);
  exact(GH, H, P, {weights.w_hh, P}, {weights.w_hr, H}, result.mutable_data_ptr(), H, 0);
  return result;
}

// Of masked rows, (B): the step in which each begins in direction d; T or -1, past the last, of those without any.
Tensor Cuda::first_live(const Steps& steps, int d) const {
  const Tensor live = live_mask(steps);
  const Tensor step = at::arange(steps.T, options_.dtype(at::kLong)).unsqueeze(1);
  return d == 0 ? at::where(live, step, steps.T).amin(0) : at::where(live, step, -1).amax(0);
}

Cuda::Merged Cuda::merge(const LayerForward& layer, const Cell& cell, const Projections& projections) const {
  const LayerSizes& s = layer.sizes;
  const int64_t H = s.hidden_size, rows = layer.steps.first_row(projections.steps);
  Merged merged;
  merged.layer = layer;
  merged.layer.sizes.state_size = H;
  merged.given = &layer;
  for (int d = 0; d < s.num_directions; ++d) {
    merged.w_hh[d] = merged_weights(s, cell, layer.direction[d].weights);
    merged.h[d] = buffer({rows, H});
    if (layer.steps.mask && layer.direction[d].h0) merged.begin[d] = first_live(layer.steps, d);
    DirectionForward& dir = merged.layer.direction[d];
    dir.weights.w_hh = merged.w_hh[d].const_data_ptr();
    dir.h0 = nullptr;
    dir.h_n = nullptr;
  }
  return merged;
}

// W_hh h of the first steps, whose h has not come from a product with W_hr: to the projected inputs that are there.
void Cuda::add_initial_states(const Merged& merged, const Cell& cell, const Products& product,
                              const Projections& projections) const {
  const LayerForward& layer = *merged.given;
  const LayerSizes& s = layer.sizes;
  const int64_t P = s.state_size, GH = cell.gates * s.hidden_size, B = layer.steps.B, stride = projections.stride;
  for (int d = 0; d < s.num_directions; ++d) {
    const DirectionForward& dir = layer.direction[d];
    if (!dir.h0) continue;
    const int64_t first = projections.first_step[d], end = projections.end_step[d];
    const auto projection = [&](int64_t row) {
      return advance(projections.data[d], (row - projections.first_row[d]) * stride, size_);
    };
    if (merged.begin[d].defined()) {
      const Tensor& begin = merged.begin[d];
      const Tensor sums = sum_buffer({B, GH});
      product(B, GH, P, {dir.h0, P}, {dir.weights.w_hh, P, true}, sums.mutable_data_ptr(), GH, 0, true);
      Tensor there =
          view(projection(first * B), {end - first, B, GH}, {B * stride, stride, 1}, options_.dtype().toScalarType());
      const std::array<at::indexing::TensorIndex, 2> at{begin.clamp(first, end - 1) - first,
                                                        at::arange(B, begin.options())};
      const Tensor here = begin.ge(first).logical_and(begin.lt(end)).unsqueeze(1), input = there.index(at);
      there.index_put_(at, at::where(here, (input + sums).to(input.scalar_type()), input));
      continue;
    }
    for (const Beginning& b : beginnings(layer.steps, d)) {
      if (b.step < first || b.step >= end) continue;
      product(b.count, GH, P, {advance(dir.h0, b.first * P, size_), P}, {dir.weights.w_hh, P, true}, projection(b.row),
              stride, 1);
    }
  }
}

// The output of the steps that a launch has run.
void Cuda::project_states(const Merged& merged, const Products& product, const Projections& projections) const {
  const LayerForward& layer = *merged.given;
  const LayerSizes& s = layer.sizes;
  const Steps& steps = layer.steps;
  const int64_t H = s.hidden_size, P = s.state_size, B = steps.B, stride = layer.y.batch_stride;
  const at::ScalarType dtype = options_.dtype().toScalarType();
  for (int d = 0; d < s.num_directions; ++d) {
    const DirectionForward& dir = layer.direction[d];
    const int64_t first = projections.first_step[d], end = projections.end_step[d];
    const int64_t row = steps.first_row(first), rows = steps.first_row(end) - row;
    const auto y = [&](int64_t of_row) { return advance(layer.y.data, of_row * stride + d * P, size_); };
    const void* h = advance(merged.h[d].const_data_ptr(), (row - projections.first_row[d]) * H, size_);
    product(rows, P, H, {h, H}, {dir.weights.w_hr, H, true}, y(row), stride, 0);
    if (merged.begin[d].defined()) {
      // Up to their first step rows carry what they were given.
      Tensor there = view(y(row), {end - first, B, P}, {B * stride, stride, 1}, dtype);
      const Tensor step = at::arange(first, end, merged.begin[d].options()).unsqueeze(1);
      const Tensor begun = d == 0 ? step.ge(merged.begin[d]) : step.le(merged.begin[d]);
      at::where_out(there, begun.unsqueeze(2), there, view(dir.h0, {B, P}, {P, 1}, dtype));
    }
    if (!dir.h_n) continue;
    for (const Beginning& last : beginnings(steps, 1 - d)) {
      if (last.step < first || last.step >= end) continue;
      stream_.copy_rows(advance(dir.h_n, last.first * P, size_), P * size_, y(last.row), stride * size_, P * size_,
                        last.count);
    }
  }
}

void Cuda::steps_forward(const LayerForward& layer, const Cell& cell, const Products& product,
                         Projections& projections) {
  const LayerSizes& s = layer.sizes;
  const Steps& steps = layer.steps;
  const int64_t H = s.hidden_size, P = s.state_size, GH = cell.gates * H, B = steps.B, T = steps.T;
  const int64_t C = cell.states * H;
  const int D = s.num_directions;
  const bool projects = P != H, options = has_options(layer);
  const Within within = within_of_units(layer.within, projects);

  Tensor products[2], running_h[2], running_c[2], unprojected[2], projected[2], multiplied[2], gated[2];
  FirstStates first[2];
  Tensor of_cell[2];
  cuda::ForwardNorm norms[2];
  void* h[2] = {};
  void* c[2] = {};
  const void* h0[2] = {};
  const void* c0[2] = {};
  for (int d = 0; d < D; ++d) {
    const DirectionForward& dir = layer.direction[d];
    products[d] = sum_buffer({B, GH});
    h[d] = dir.h_n;
    if (!h[d] && (T > 1 || projects)) h[d] = (running_h[d] = buffer({B, P})).mutable_data_ptr();
    if (cell.has_cell() && T > 1) {
      c[d] = sum_size_ == size_ ? dir.c_n : nullptr;
      if (!c[d]) c[d] = (running_c[d] = sum_buffer({B, C})).mutable_data_ptr();
    }
    if (projects) unprojected[d] = buffer({B, H});
    if (projects && options) projected[d] = sum_buffer({B, P});
    if (cell.resets_before() && !dir.gates) gated[d] = buffer({B, H});
    if (s.layer_norm) {
      norms[d] = {dir.weights.norm_ih, dir.weights.norm_hh, dir.weights.norm_c, dir.weights.norm_c_bias};
      if (cell.has_cell()) {
        of_cell[d] = sum_buffer({2, B, H});
        norms[d].output_gate = mutable_slice(of_cell[d], 0);
        norms[d].new_cell = mutable_slice(of_cell[d], 1);
      }
    }
    first[d] = first_states(layer, cell, d);
    h0[d] = first[d].h;
    c0[d] = first[d].c;
    if (dir.extras.dropout) {
      const auto dtype = options_.dtype().toScalarType();
      multiplied[d] = buffer({B, P});
      if (h0[d]) {
        at::mul_out(multiplied[d], view(h0[d], {B, P}, {P, 1}, dtype), view(dir.extras.dropout, {B, P}, {P, 1}, dtype));
      } else {
        multiplied[d].zero_();
      }
    }
    if ((d == 1 && steps.batch_sizes && T > 1) || (projects && (steps.mask || options))) {
      // Rows that begin later in this direction are part of earlier rows' matrix; masked ones keep what is there.
      if (h0[d]) {
        stream_.copy(h[d], h0[d], B * P * size_);
      } else {
        stream_.clear(h[d], B * P * size_);
      }
    }
  }

  for (int64_t k = 0; k < T; ++k) {
    if (k % projections.steps == 0) project(layer, cell, product, k, projections);
    cuda::StepForward step[2];
    cuda::ForwardOptions more[2];
    for (int d = 0; d < D; ++d) {
      const DirectionForward& dir = layer.direction[d];
      const int64_t t = d == 0 ? k : T - 1 - k, row = steps.first_row(t);
      cuda::StepForward& to = step[d];
      to.rows = steps.rows(t);
      to.previous_rows = k == 0 ? 0 : std::min(to.rows, steps.rows(d == 0 ? t - 1 : t + 1));
      const void* previous = k == 0 ? h0[d] : h[d];
      if (previous && multiplied[d].defined()) previous = multiplied[d].const_data_ptr();
      if (previous) {
        product(to.rows, cell.gates_of_h * H, P, {previous, P}, {dir.weights.w_hh, P, true},
                products[d].mutable_data_ptr(), GH, 0, true);
        to.product = products[d].const_data_ptr();
      }
      to.mask = steps.mask ? steps.mask + row : nullptr;
      to.projection = advance(projections.data[d], (row - projections.first_row[d]) * projections.stride, size_);
      to.projection_stride = projections.stride;
      to.b_ih = dir.weights.b_ih;
      to.b_hh = dir.weights.b_hh;
      to.h0 = projects ? nullptr : h0[d];
      to.c0 = c0[d];
      to.c = c[d];
      to.c_n = c[d] == dir.c_n ? nullptr : dir.c_n;
      to.h = projects ? nullptr : h[d];
      to.y = projects ? unprojected[d].mutable_data_ptr()
                      : advance(layer.y.data, row * layer.y.batch_stride + d * P, size_);
      to.y_stride = projects ? H : layer.y.batch_stride;
      to.gates = advance(dir.gates, row * cell.saved * H, size_);
      to.cells = advance(dir.cells, row * C, sum_size_);
      if (!options) continue;
      const Extras& extras = dir.extras;
      cuda::ForwardOptions& also = more[d];
      also.zoneout_cell = rows_of_bits(extras.zoneout_cell, row, H);
      also.anew = rows_anew(steps, d, k + 1);
      also.reset_c = extras.reset_c;
      also.peephole = dir.weights.peephole;
      if (projects) continue;
      also.zoneout = rows_of_bits(extras.zoneout, row, H);
      also.reset_h = extras.reset_h;
      also.dropout = extras.dropout;
      also.multiplied = mutable_data_or_null(multiplied[d]);
      if (!cell.resets_before()) continue;
      // Of the saved values that which no projection stands in the place of.
      also.gated = dir.gates ? advance(to.gates, (cell.saved - 1) * H, size_) : mutable_data_or_null(gated[d]);
      also.gated_stride = dir.gates ? cell.saved * H : H;
    }
    if (cell.resets_before()) {
      check(cuda::reset_forward(s.dtype, H, step, more, within, D, stream_.handle()));
      for (int d = 0; d < D; ++d) {
        if (!step[d].product) continue;
        const int64_t first = cell.gates_of_h * H;
        product(step[d].rows, GH - first, H, {more[d].gated, more[d].gated_stride},
                {advance(layer.direction[d].weights.w_hh, first * H, size_), H, true},
                advance(products[d].mutable_data_ptr(), first, sum_size_), GH, 0, true);
      }
    }
    if (s.layer_norm) {
      check(cuda::step_forward_with_norm(s.kind, s.dtype, H, step, more, norms, within, D, stream_.handle()));
    } else if (cell.custom) {
      check(cell.custom->forward(H, step, options ? more : nullptr, within, D, stream_.handle()));
    } else if (options) {
      check(cuda::step_forward_with_options(s.kind, s.dtype, H, step, more, within, D, stream_.handle()));
    } else {
      check(cuda::step_forward(s.kind, s.dtype, H, step, D, stream_.handle()));
    }
    if (projects && options) {
      cuda::ProjectedForward states[2];
      for (int d = 0; d < D; ++d) {
        const DirectionForward& dir = layer.direction[d];
        const Extras& extras = dir.extras;
        const int64_t row = steps.first_row(d == 0 ? k : T - 1 - k);
        product(step[d].rows, P, H, {unprojected[d].const_data_ptr(), H}, {dir.weights.w_hr, H, true},
                projected[d].mutable_data_ptr(), P, 0, true);
        cuda::ProjectedForward& to = states[d];
        to.rows = step[d].rows;
        to.mask = step[d].mask;
        to.projected = projected[d].const_data_ptr();
        to.zoneout = rows_of_bits(extras.zoneout, row, P);
        to.rate = layer.within.zoneout;
        to.anew = more[d].anew;
        to.reset_h = extras.reset_h;
        to.dropout = extras.dropout;
        to.multiplied = mutable_data_or_null(multiplied[d]);
        to.h = h[d];
        to.y = advance(layer.y.data, row * layer.y.batch_stride + d * P, size_);
        to.y_stride = layer.y.batch_stride;
      }
      check(cuda::projected_forward(s.dtype, P, states, D, stream_.handle()));
    }
    for (int d = 0; d < D && projects && !options; ++d) {
      const int64_t t = d == 0 ? k : T - 1 - k;
      void* y = advance(layer.y.data, steps.first_row(t) * layer.y.batch_stride + d * P, size_);
      product(step[d].rows, P, H, {unprojected[d].const_data_ptr(), H}, {layer.direction[d].weights.w_hr, H, true}, y,
              layer.y.batch_stride, 0);
      if (steps.mask) {
        Tensor projected = view(y, {B, P}, {layer.y.batch_stride, 1}, options_.dtype().toScalarType());
        const Tensor before = view(h[d], {B, P}, {P, 1}, options_.dtype().toScalarType());
        at::where_out(projected, mask_of(steps, t), projected, before);
      }
      stream_.copy_rows(h[d], P * size_, y, layer.y.batch_stride * size_, P * size_, step[d].rows);
    }
  }
}

// One layer, or several in a wavefront.
void Cuda::backward(const LayerBackward* given, int64_t count) {
  const LayerSizes& s = given[count - 1].sizes;
  const Cell cell = cell_of(s, given[0].within, stream_.device());
  const Products product(s.dtype, tf32_);
  const int64_t H = s.hidden_size, P = s.state_size, N = given[0].steps.total_rows(), width = cell.grad_gates * H;
  const int D = s.num_directions;
  const Options options = options_of(given[0]);
  const cuda::Plan chosen = plan(s, count, given[0].steps, true, options);
  const Range range([&] { return describe(given[0].sizes, given[0].steps, chosen, true); });

  LayerBackward recomputed;
  Tensor gates[2];
  const LayerBackward* layers = given;
  if (cell.saved > 0 && !given[0].direction[0].gates) {
    TORCH_CHECK(count == 1, "fused_rnn: gates are computed again for one layer at a time, got ", count);
    recomputed = given[0];
    compute_gates_again(given[0], cell, gates);
    for (int d = 0; d < D; ++d) recomputed.direction[d].gates = gates[d].const_data_ptr();
    recomputed.reuse_gates = true;
    layers = &recomputed;
  }
  cuda::PersistentBackward parts[cuda::most_layers];
  Tensor buffers[cuda::most_layers], grad_projected[2], hidden[2], of_cell[2];
  void* grad_gates[cuda::most_layers] = {};
  for (int64_t l = 0; l < count; ++l) {
    const LayerBackward& layer = layers[l];
    // A training step then needs no more than what the forward pass saved. (W_hr's gradient wants the gates once more.)
    const bool in_place = layer.reuse_gates && cell.saved == cell.grad_gates && P == H && !s.layer_norm;
    for (int d = 0; d < D; ++d) {
      const DirectionBackward& from = layer.direction[d];
      cuda::PersistentBackward& to = parts[l + d];
      Tensor& apart = buffers[l + d];
      if (!in_place) apart = buffer({N, width});
      grad_gates[l + d] = in_place ? const_cast<void*>(from.gates) : apart.mutable_data_ptr();
      to.w_hh = from.weights.w_hh;
      if (l > 0) to.w_ih = from.weights.w_ih;
      to.gates = from.gates;
      to.cells = from.cells;
      to.y = advance(layer.y.data, d * H, size_);
      to.y_stride = layer.y.batch_stride;
      to.h0 = from.h0;
      to.c0 = from.c0;
      to.grad_y = advance(layer.grad_y.data, d * H, size_);
      to.grad_y_stride = layer.grad_y.batch_stride;
      to.factors = layer.factors.data;
      to.factors_stride = layer.factors.batch_stride;
      to.grad_h_n = from.grad_h_n;
      to.grad_c_n = from.grad_c_n;
      to.grad_gates = grad_gates[l + d];
      to.grad_h0 = from.grad_h0;
      to.grad_c0 = from.grad_c0;
    }
  }

  const int64_t B = given[0].steps.B;
  Tensor w_hh[2], grad_hidden[2], grad_final[2];
  for (int d = 0; d < D && chosen.merged; ++d) {
    const DirectionBackward& dir = layers[0].direction[d];
    const Matrix w_hr{dir.weights.w_hr, H};
    cuda::PersistentBackward& to = parts[d];
    to.w_hh = (w_hh[d] = merged_weights(s, cell, dir.weights)).const_data_ptr();
    to.y = to.h0 = nullptr;
    to.grad_y = to.grad_h_n = nullptr;
    to.grad_h0 = nullptr;
    if (layers[0].grad_y.data) {
      grad_hidden[d] = buffer({N, H});
      const int64_t stride = layers[0].grad_y.batch_stride;
      product(N, H, P, {advance(layers[0].grad_y.data, d * P, size_), stride}, w_hr, grad_hidden[d].mutable_data_ptr(),
              H, 0);
      to.grad_y = grad_hidden[d].const_data_ptr();
      to.grad_y_stride = H;
    }
    if (!dir.grad_h_n) continue;
    grad_final[d] = buffer({B, H});
    product(B, H, P, {dir.grad_h_n, P}, w_hr, grad_final[d].mutable_data_ptr(), H, 0);
    to.grad_h_n = grad_final[d].const_data_ptr();
  }

  if (chosen.variant != cuda::Variant::none) {
    const Tensor workspace = at::empty({chosen.workspace_bytes}, options_.dtype(at::kByte));
    // Gradients of what rows began anew from, in the sum type; with them that of h0 is made, if nobody wants it.
    Tensor grad_reset_h[2], grad_reset_c[2], grad_h0[2], clipped[2];
    for (int d = 0; d < D && options != Options::none; ++d) {
      const DirectionBackward& dir = layers[0].direction[d];
      cuda::PersistentBackward& to = parts[d];
      const Within& within = layers[0].within;
      to.options = persistent_options(dir.extras, within);
      to.options.grad_clip = float(within.recurrent_grad_clip);
      to.options.bptt_steps = int32_t(std::min(within.bptt_steps, given[0].steps.T));  // from which on none ends
      if (within.recurrent_grad_clip > 0 && given[0].steps.mask)
        to.options.clips = static_cast<const uint8_t*>((clipped[d] = clipped_rows(given[0].steps, d)).const_data_ptr());
      if (dir.grad_reset_h) {
        to.options.grad_reset_h = (grad_reset_h[d] = sum_buffer({B, H}).zero_()).mutable_data_ptr();
        if (!to.grad_h0) to.grad_h0 = (grad_h0[d] = buffer({B, H})).mutable_data_ptr();
      }
      if (dir.grad_reset_c) to.options.grad_reset_c = (grad_reset_c[d] = sum_buffer({B, H}).zero_()).mutable_data_ptr();
    }
    check(cuda::persistent_backward(s, device_steps(given[0].steps), parts, chosen, device_info(stream_.device()),
                                    workspace.mutable_data_ptr(), stream_.handle()));
    const at::ScalarType dtype = options_.dtype().toScalarType();
    for (int d = 0; d < D; ++d) {
      const DirectionBackward& dir = layers[0].direction[d];
      if (grad_reset_h[d].defined()) view(dir.grad_reset_h, {B, H}, {H, 1}, dtype).copy_(grad_reset_h[d]);
      if (grad_reset_c[d].defined()) view(dir.grad_reset_c, {B, H}, {H, 1}, dtype).copy_(grad_reset_c[d]);
      if (chosen.merged) gradients_past_merging(layers[0], cell, product, d, grad_gates[d], grad_projected[d]);
    }
  } else {
    for (int d = 0; d < D && P != H; ++d) {
      grad_projected[d] = buffer({N, P});
      if (layers[0].direction[d].grad_w_hr && has_options(layers[0])) hidden[d] = buffer({N, H});
    }
    // With layer normalisation: of c, what the gradients of its gain and bias are made of.
    for (int d = 0; d < D && s.layer_norm && cell.has_cell(); ++d) of_cell[d] = sum_buffer({2, N, H});
    steps_backward(layers[0], cell, product, grad_gates, grad_projected, hidden, of_cell);
  }

  for (int64_t l = 0; l < count; ++l) {
    const LayerBackward& layer = layers[l];
    const int64_t I = layer.sizes.input_size;
    for (int d = 0; d < D; ++d) {
      weight_gradients(layer, cell, product, d, grad_gates[l + d], P != H ? data_or_null(grad_projected[d]) : nullptr,
                       hidden[d]);
      if (s.layer_norm) norm_gradients(layer, cell, d, grad_gates[l + d], of_cell[d]);
      if (!layer.grad_x.data) continue;
      double beta = d == 0 ? 0 : 1;
      for (const GateRun& run : runs_of(cell.input_grads, cell.gates)) {
        product(N, I, run.count * H, {advance(grad_gates[l + d], run.grad * H, size_), width},
                {advance(layer.direction[d].weights.w_ih, run.gate * H * I, size_), I}, layer.grad_x.data,
                layer.grad_x.batch_stride, beta);
        beta = 1;
      }
    }
  }
}

// The forward pass once more, for gates that were not kept. Its other results are those that are there.
void Cuda::compute_gates_again(const LayerBackward& layer, const Cell& cell, Tensor* gates) {
  const LayerSizes& s = layer.sizes;
  const int64_t H = s.hidden_size, P = s.state_size, B = layer.steps.B, N = layer.steps.total_rows();
  const int64_t D = s.num_directions;
  const Tensor y = buffer({N, D * P}), h_n = buffer({D, B, P});
  const Tensor c_n = cell.has_cell() ? buffer({D, B, cell.states * H}) : Tensor();
  LayerForward again;
  again.sizes = s;
  again.steps = layer.steps;
  again.x = layer.x;
  again.plain_gates = layer.plain_gates;
  again.within = layer.within;
  again.y.data = y.mutable_data_ptr();
  again.y.batch_stride = D * P;
  again.y.time_stride = B * D * P;
  for (int64_t d = 0; d < D; ++d) {
    DirectionForward& dir = again.direction[d];
    gates[d] = buffer({N, cell.saved * H});
    dir.weights = layer.direction[d].weights;
    dir.extras = layer.direction[d].extras;
    dir.h0 = layer.direction[d].h0;
    dir.c0 = layer.direction[d].c0;
    dir.h_n = mutable_slice(h_n, d);
    dir.c_n = mutable_slice(c_n, d);
    dir.gates = gates[d].mutable_data_ptr();
  }
  forward(again);
}

// Which rows hand a gradient back to the h that an earlier live step of theirs has made, (T, B) in order of time: the
// steps between may be masked.
Tensor Cuda::clipped_rows(const Steps& steps, int d) const {
  const int64_t T = steps.T, B = steps.B;
  const auto in_order = [&](const Tensor& t) { return d == 0 ? t : t.flip(0); };
  const Tensor live = in_order(live_mask(steps));
  Tensor anew = at::zeros({T, B}, live.options());
  if (steps.reset) {
    const Tensor marks = view(steps.reset, {T, B}, {B, 1}, at::kByte).ne(0);
    if (d == 0) {
      anew = marks;
    } else {
      anew.narrow(0, 1, T - 1).copy_(marks.narrow(0, 1, T - 1).flip(0));
    }
  }
  const Tensor step = at::arange(T, options_.dtype(at::kLong)).unsqueeze(1);
  const auto last = [&](const Tensor& marked) { return std::get<0>(at::where(marked, step, -1).cummax(0)); };
  const Tensor last_live = last(live);
  const Tensor made = last_live.ge(0).logical_and_(last_live.ge(last(anew)));
  Tensor clipped = at::zeros({T, B}, live.options());
  clipped.narrow(0, 1, T - 1).copy_(live.narrow(0, 1, T - 1).logical_and(made.narrow(0, 0, T - 1)));
  return in_order(clipped).contiguous();
}

// Of masked rows, (T, B, P): what the next live step hands back, of `gradients` (T, B, P) in the sum type, and the
// gradient of the final state where there is none. Those of masked steps' outputs are zeros.
Tensor Cuda::later_live_gradients(const Steps& steps, int d, const Tensor& gradients, const void* final) const {
  const int64_t T = steps.T, B = steps.B, P = gradients.size(2);
  const auto in_order = [&](const Tensor& t) { return d == 0 ? t : t.flip(0); };
  const Tensor live = in_order(live_mask(steps));
  const Tensor step = at::arange(T, options_.dtype(at::kLong)).unsqueeze(1);
  // The first live step from each on, T where there is none; from the one after it on.
  const Tensor from_here = std::get<0>(at::where(live, step, T).flip(0).cummin(0)).flip(0);
  const Tensor next = at::cat({from_here.narrow(0, 1, T - 1), at::full({1, B}, T, step.options())});
  const Tensor last = sum_buffer({1, B, P});
  widen(last.select(0, 0), final);
  const Tensor all = at::cat({in_order(gradients), last});
  return in_order(all.gather(0, next.unsqueeze(2).expand({T, B, P}))).contiguous();
}

// What the kernel of a merged layer leaves: the gradient of h after its projection, for that of W_hr, and of h0.
void Cuda::gradients_past_merging(const LayerBackward& layer, const Cell& cell, const Products& product, int d,
                                  const void* grad_gates, Tensor& grad_projected) {
  const LayerSizes& s = layer.sizes;
  const Steps& steps = layer.steps;
  const DirectionBackward& dir = layer.direction[d];
  const int64_t H = s.hidden_size, P = s.state_size, T = steps.T, B = steps.B, N = steps.total_rows();
  const int64_t width = cell.grad_gates * H;
  const at::ScalarType dtype = options_.dtype().toScalarType();
  // What W_hh^T makes of gate gradients.
  const auto hand_back = [&](const void* grads, int64_t rows, void* out, bool sums) {
    double beta = 0;
    for (const GateRun& run : runs_of(cell.hidden_grads, cell.gates)) {
      product(rows, P, run.count * H, {advance(grads, run.grad * H, size_), width},
              {advance(dir.weights.w_hh, run.gate * H * P, size_), P}, out, P, beta, sums);
      beta = 1;
    }
  };

  if (dir.grad_h0 && steps.mask) {
    const Tensor begin = first_live(steps, d);
    const Tensor grads = view(grad_gates, {T, B, width}, {B * width, width, 1}, dtype)
                             .index({begin.clamp(0, T - 1), at::arange(B, begin.options())});
    hand_back(grads.const_data_ptr(), B, dir.grad_h0, false);
    if (dir.grad_h_n) {
      // Rows without a step hand on what they are given.
      Tensor grad_h0 = view(dir.grad_h0, {B, P}, {P, 1}, dtype);
      const Tensor steps_of = begin.ge(0).logical_and(begin.lt(T)).unsqueeze(1);
      at::where_out(grad_h0, steps_of, grad_h0, view(dir.grad_h_n, {B, P}, {P, 1}, dtype));
    }
  } else if (dir.grad_h0) {
    for (const Beginning& b : beginnings(steps, d))
      hand_back(advance(grad_gates, b.row * width, size_), b.count, advance(dir.grad_h0, b.first * P, size_), false);
  }

  if (!dir.grad_w_hr) return;
  Tensor later = sum_buffer({N, P});
  if (steps.mask) {
    hand_back(grad_gates, N, later.mutable_data_ptr(), true);
    later = later_live_gradients(steps, d, later.view({T, B, P}), dir.grad_h_n).view({N, P});
  } else if (steps.batch_sizes) {
    // The row after another is the one before it in the other direction.
    const Tensor of_row = sum_buffer({N, P}), last = sum_buffer({B, P});
    hand_back(grad_gates, N, of_row.mutable_data_ptr(), true);
    widen(last, dir.grad_h_n);
    Sequence rows;
    rows.data = of_row.mutable_data_ptr();
    rows.batch_stride = P;
    check(cuda::previous_states(DType::float32, P, device_steps(steps), N, d == 0, rows, last.const_data_ptr(),
                                later.mutable_data_ptr(), stream_.handle()));
  } else {
    const int64_t from = d == 0 ? B : 0, to = d == 0 ? 0 : B;
    hand_back(advance(grad_gates, from * width, size_), N - B, advance(later.mutable_data_ptr(), to * P, sum_size_),
              true);
    widen(later.narrow(0, d == 0 ? N - B : 0, B), dir.grad_h_n);
  }
  grad_projected = buffer({N, P});
  if (layer.grad_y.data) {
    const void* grad_y = advance(layer.grad_y.data, d * P, size_);
    at::add_out(grad_projected, later, view(grad_y, {N, P}, {layer.grad_y.batch_stride, 1}, dtype));
  } else {
    grad_projected.copy_(later);
  }
}

void Cuda::steps_backward(const LayerBackward& layer, const Cell& cell, const Products& product,
                          void* const* grad_gates, const Tensor* grad_projected, const Tensor* hidden,
                          const Tensor* of_cell) {
  const LayerSizes& s = layer.sizes;
  const Steps& steps = layer.steps;
  const int64_t H = s.hidden_size, P = s.state_size, B = steps.B, T = steps.T, width = cell.grad_gates * H;
  const int64_t C = cell.states * H;
  const int D = s.num_directions;
  const bool projects = P != H, options = has_options(layer);
  const Within within = within_of_units(layer.within, projects);
  const at::ScalarType dtype = options_.dtype().toScalarType();
  const auto runs = runs_of(cell.hidden_grads, cell.gates_of_h);
  const auto runs_of_gated = runs_of(cell.hidden_grads, cell.gates, cell.gates_of_h);
  // What of a gradient of h goes past W_hh: that of a GRU's kept part, of rows whose state goes on as it is, of
  // zoneout.
  const bool has_direct_part = cell.passes_h(s.kind) || steps.mask || options;

  Tensor dh[2], dc[2], unprojected[2], dropped[2], clipped[2], grad_peephole[2], grad_reset_h[2], grad_reset_c[2];
  Tensor to_output[2], grad_gated[2];
  // The running gradient ends as that of the initial state; where both have one type, they share the memory.
  const auto running = [&](void* final, int64_t columns, const void* seed) {
    const Tensor t =
        final && sum_size_ == size_ ? view(final, {B, columns}, {columns, 1}, sum_dtype_) : sum_buffer({B, columns});
    widen(t, seed);
    return t;
  };
  for (int d = 0; d < D; ++d) {
    const DirectionBackward& dir = layer.direction[d];
    dh[d] = running(dir.grad_h0, P, dir.grad_h_n);
    if (cell.has_cell()) dc[d] = running(dir.grad_c0, C, dir.grad_c_n);
    if (projects) unprojected[d] = sum_buffer({B, H});
    if (dir.extras.dropout) dropped[d] = sum_buffer({B, P});
    if (cell.resets_before()) grad_gated[d] = sum_buffer({B, H});
    if (s.layer_norm && cell.has_cell()) to_output[d] = sum_buffer({B, H});
    if (within.recurrent_grad_clip > 0 && steps.mask) clipped[d] = clipped_rows(steps, d);
    if (dir.grad_peephole) grad_peephole[d] = sum_buffer({B, 3 * H}).zero_();
    if (dir.grad_reset_h) grad_reset_h[d] = sum_buffer({B, P}).zero_();
    if (dir.grad_reset_c) grad_reset_c[d] = sum_buffer({B, C}).zero_();
  }

  for (int64_t k = 0; k < T; ++k) {
    cuda::StepBackward step[2];
    cuda::BackwardOptions more[2];
    cuda::BackwardNorm norms[2];
    cuda::ProjectedBackward states[2];
    for (int d = 0; d < D; ++d) {
      const DirectionBackward& dir = layer.direction[d];
      const int64_t t = d == 0 ? T - 1 - k : k, row = steps.first_row(t), rows = steps.rows(t);
      const int64_t y_stride = layer.y.batch_stride, grad_y_stride = layer.grad_y.batch_stride;
      const void* grad_y = advance(layer.grad_y.data, row * grad_y_stride + d * P, size_);
      cuda::StepBackward& to = step[d];
      to.rows = rows;
      to.mask = steps.mask ? steps.mask + row : nullptr;
      to.gates = advance(dir.gates, row * cell.saved * H, size_);
      to.cells = advance(dir.cells, row * C, sum_size_);
      to.y = advance(layer.y.data, row * y_stride + d * P, size_);
      to.y_stride = y_stride;
      if (k < T - 1) {
        const int64_t previous = d == 0 ? t - 1 : t + 1, previous_row = steps.first_row(previous);
        to.previous_rows = std::min(rows, steps.rows(previous));
        to.previous_cells = advance(dir.cells, previous_row * C, sum_size_);
        to.previous_y = advance(layer.y.data, previous_row * y_stride + d * P, size_);
      }
      to.h0 = dir.h0;
      to.c0 = dir.c0;
      to.dc = mutable_data_or_null(dc[d]);
      to.grad_gates = advance(grad_gates[d], row * width, size_);
      const int64_t grad_h_stride = layer.grad_h.batch_stride;
      const void* grad_h = advance(layer.grad_h.data, row * grad_h_stride + d * P, size_);
      if (options) {
        const Extras& extras = dir.extras;
        cuda::BackwardOptions& also = more[d];
        also.zoneout_cell = rows_of_bits(extras.zoneout_cell, row, H);
        also.anew = rows_anew(steps, d, T - 1 - k);
        also.reset_c = extras.reset_c;
        also.grad_cells = advance(dir.grad_cells, row * C, sum_size_);
        also.peephole = dir.weights.peephole;
        also.grad_peephole = mutable_data_or_null(grad_peephole[d]);
        also.hidden = advance(mutable_data_or_null(hidden[d]), row * H, size_);
        also.grad_gated = data_or_null(grad_gated[d]);
        also.dropout = extras.dropout;
        also.grad_multiplied = mutable_data_or_null(dropped[d]);
        const Weights& w = dir.weights;
        norms[d] = {w.norm_ih, w.norm_hh, w.norm_c, w.norm_c_bias, mutable_data_or_null(to_output[d])};
        norms[d].normal_c = advance(mutable_slice(of_cell[d], 0), row * H, sum_size_);
        norms[d].grad_c = advance(mutable_slice(of_cell[d], 1), row * H, sum_size_);
        if (!projects) {
          also.zoneout = rows_of_bits(extras.zoneout, row, H);
          also.reset_h = extras.reset_h;
          also.grad_h = grad_h;
          also.grad_h_stride = grad_h_stride;
        }
      }
      if (projects && options) {
        cuda::ProjectedBackward& of_h = states[d];
        of_h.rows = rows;
        of_h.mask = to.mask;
        of_h.zoneout = rows_of_bits(dir.extras.zoneout, row, P);
        of_h.rate = layer.within.zoneout;
        of_h.grad_y = grad_y;
        of_h.grad_y_stride = grad_y_stride;
        of_h.grad_h = grad_h;
        of_h.grad_h_stride = grad_h_stride;
        of_h.dh = dh[d].mutable_data_ptr();
        of_h.projected = grad_projected[d].narrow(0, row, rows).mutable_data_ptr();
        to.dh = unprojected[d].mutable_data_ptr();
        continue;
      }
      if (!projects) {
        to.grad_y = grad_y;
        to.grad_y_stride = grad_y_stride;
        to.dh = dh[d].mutable_data_ptr();
        continue;
      }
      Tensor sum = grad_projected[d].narrow(0, row, rows);
      const Tensor later = dh[d].narrow(0, 0, rows);
      if (grad_y) {
        at::add_out(sum, later, view(grad_y, {rows, P}, {grad_y_stride, 1}, dtype));
      } else {
        sum.copy_(later);
      }
      if (steps.mask) {
        // What is not through W_hr goes on past this step; the rest of dh is the product's.
        if (grad_y) dh[d].add_(view(grad_y, {rows, P}, {grad_y_stride, 1}, dtype));
        dh[d].masked_fill_(mask_of(steps, t), 0);
      }
      to.dh = unprojected[d].mutable_data_ptr();
      product(rows, H, P, {sum.const_data_ptr(), P}, {dir.weights.w_hr, H}, to.dh, H, 0, true);
    }
    if (projects && options) {
      check(cuda::projected_backward(s.dtype, P, states, D, stream_.handle()));
      for (int d = 0; d < D; ++d)
        product(step[d].rows, H, P, {states[d].projected, P}, {layer.direction[d].weights.w_hr, H}, step[d].dh, H, 0,
                true);
    }
    if (s.layer_norm) {
      check(cuda::step_backward_with_norm(s.kind, s.dtype, H, step, more, norms, within, D, stream_.handle()));
    } else if (cell.custom) {
      check(cell.custom->backward(H, step, options ? more : nullptr, within, D, stream_.handle()));
    } else if (options) {
      check(cuda::step_backward_with_options(s.kind, s.dtype, H, step, more, within, D, stream_.handle()));
    } else {
      check(cuda::step_backward(s.kind, s.dtype, H, step, D, stream_.handle()));
    }
    if (cell.resets_before()) {
      for (int d = 0; d < D; ++d) {
        for (const GateRun& run : runs_of_gated)
          product(step[d].rows, H, run.count * H, {advance(step[d].grad_gates, run.grad * H, size_), width},
                  {advance(layer.direction[d].weights.w_hh, run.gate * H * H, size_), H},
                  grad_gated[d].mutable_data_ptr(), H, 0, true);
      }
      check(cuda::reset_backward(s.dtype, H, step, more, within, D, stream_.handle()));
    }
    cuda::HandedBack handed_back[2];
    bool hands_back = false;
    for (int d = 0; d < D; ++d) {
      const DirectionBackward& dir = layer.direction[d];
      const bool wanted = k < T - 1 || dir.grad_h0 || dir.grad_reset_h, drops = dropped[d].defined();
      double beta = (has_direct_part && !drops) || cell.resets_before() ? 1 : 0;
      for (const GateRun& run : runs) {
        if (!wanted) break;
        product(step[d].rows, P, run.count * H, {advance(step[d].grad_gates, run.grad * H, size_), width},
                {advance(dir.weights.w_hh, run.gate * H * P, size_), P}, (drops ? dropped : dh)[d].mutable_data_ptr(),
                P, beta, true);
        beta = 1;
      }
      if (!options) continue;
      const int64_t t = d == 0 ? T - 1 - k : k;
      cuda::HandedBack& to = handed_back[d];
      to.anew = more[d].anew;
      to.ends = within.bptt_steps > 0 && t > 0 && t % within.bptt_steps == 0;
      to.clip = k < T - 1 ? within.recurrent_grad_clip : 0;
      if (drops && wanted) to.product = dropped[d].const_data_ptr();
      if (!to.anew && !to.ends && to.clip == 0 && !to.product) continue;
      hands_back = true;
      to.rows = step[d].rows;
      to.previous_rows = step[d].previous_rows;
      to.dropout = dir.extras.dropout;
      to.grad_reset_h = mutable_data_or_null(grad_reset_h[d]);
      to.grad_reset_c = mutable_data_or_null(grad_reset_c[d]);
      if (clipped[d].defined()) to.clips = static_cast<const uint8_t*>(clipped[d].const_data_ptr()) + t * B;
      to.dh = dh[d].mutable_data_ptr();
      to.dc = mutable_data_or_null(dc[d]);
    }
    if (hands_back) check(cuda::hand_back(s.dtype, P, C, handed_back, D, stream_.handle()));
  }

  for (int d = 0; d < D && sum_size_ != size_; ++d) {
    const DirectionBackward& dir = layer.direction[d];
    if (dir.grad_h0) view(dir.grad_h0, {B, P}, {P, 1}, dtype).copy_(dh[d]);
    if (dir.grad_c0) view(dir.grad_c0, {B, C}, {C, 1}, dtype).copy_(dc[d]);
  }
  for (int d = 0; d < D; ++d) {
    const DirectionBackward& dir = layer.direction[d];
    if (dir.grad_reset_h) view(dir.grad_reset_h, {B, P}, {P, 1}, dtype).copy_(grad_reset_h[d]);
    if (dir.grad_reset_c) view(dir.grad_reset_c, {B, C}, {C, 1}, dtype).copy_(grad_reset_c[d]);
    if (dir.grad_peephole) view(dir.grad_peephole, {3 * H}, {1}, dtype).copy_(grad_peephole[d].sum(0));
  }
}

// Of one direction, from the gradients of its gates for all rows.
void Cuda::weight_gradients(const LayerBackward& layer, const Cell& cell, const Products& product, int d,
                            const void* grad_gates, const void* grad_projected, const Tensor& hidden_kept) {
  const LayerSizes& s = layer.sizes;
  const Steps& steps = layer.steps;
  const DirectionBackward& dir = layer.direction[d];
  const int64_t H = s.hidden_size, P = s.state_size, I = s.input_size, B = steps.B, N = steps.total_rows();
  const int64_t width = cell.grad_gates * H;
  const auto input_runs = runs_of(cell.input_grads, cell.gates);
  const auto hidden_runs = runs_of(cell.hidden_grads, cell.gates_of_h);
  // The gradients of `run` in rows from `row` on, as the transposed factor.
  const auto grads = [&](const GateRun& run, int64_t row) {
    return Matrix{advance(grad_gates, row * width + run.grad * H, size_), width, true};
  };

  for (const GateRun& run : input_runs) {
    if (!dir.grad_w_ih) break;
    product(run.count * H, I, N, grads(run, 0), {layer.x.data, layer.x.batch_stride},
            advance(dir.grad_w_ih, run.gate * H * I, size_), I, 0);
  }

  if (dir.grad_w_hh) {
    Tensor previous;
    if (steps.reset || dir.extras.dropout) {
      previous = buffer({N, P});
      Sequence y = layer.y;
      y.data = advance(y.data, d * P, size_);
      check(cuda::multiplied_states(s.dtype, P, device_steps(steps), N, d == 1, y, dir.h0, dir.extras.reset_h,
                                    dir.extras.dropout, previous.mutable_data_ptr(), stream_.handle()));
    } else if (steps.batch_sizes) {
      previous = buffer({N, P});
      Sequence y = layer.y;
      y.data = advance(y.data, d * P, size_);
      check(cuda::previous_states(s.dtype, P, device_steps(steps), N, d == 1, y, dir.h0, previous.mutable_data_ptr(),
                                  stream_.handle()));
    }
    for (const GateRun& run : hidden_runs) {
      void* out = advance(dir.grad_w_hh, run.gate * H * P, size_);
      if (previous.defined()) {
        product(run.count * H, P, N, grads(run, 0), {previous.const_data_ptr(), P}, out, P, 0);
        continue;
      }
      // h before the steps of a padded batch: y itself, a step off, and the initial state.
      const int64_t stride = layer.y.batch_stride, later = N - B;
      double beta = 0;
      if (later > 0) {
        const void* y = advance(layer.y.data, (d == 0 ? 0 : B * stride) + d * P, size_);
        product(run.count * H, P, later, grads(run, d == 0 ? B : 0), {y, stride}, out, P, 0);
        beta = 1;
      }
      if (dir.h0) {
        product(run.count * H, P, B, grads(run, d == 0 ? 0 : later), {dir.h0, P}, out, P, beta);
      } else if (later == 0) {
        stream_.clear(out, run.count * H * P * size_);
      }
    }
  }

  for (const GateRun& run : runs_of(cell.hidden_grads, cell.gates, cell.gates_of_h)) {
    if (!dir.grad_w_hh) break;
    const void* gated = advance(dir.gates, (cell.saved - 1) * H, size_);
    product(run.count * H, H, N, grads(run, 0), {gated, cell.saved * H},
            advance(dir.grad_w_hh, run.gate * H * H, size_), H, 0);
  }

  if (dir.grad_b_ih || dir.grad_b_hh) {
    const Tensor workspace = at::empty({cuda::column_sums_workspace(s.dtype, N, width)}, options_.dtype(at::kByte));
    const auto sums = [&](const GateRun& run, void* out, void* again) {
      if (!out) std::swap(out, again);
      if (!out) return;
      check(cuda::column_sums(s.dtype, advance(grad_gates, run.grad * H, size_), N, run.count * H, width,
                              advance(out, run.gate * H, size_), advance(again, run.gate * H, size_),
                              workspace.mutable_data_ptr(), stream_.handle()));
    };
    const auto input_biases = runs_of(cell.input_bias_grads, cell.gates);
    // Where both biases have the same gradient, it is summed once.
    if (cell.input_bias_grads.first == cell.hidden_bias_grads.first) {
      for (const GateRun& run : input_biases) sums(run, dir.grad_b_ih, dir.grad_b_hh);
    } else {
      for (const GateRun& run : input_biases) sums(run, dir.grad_b_ih, nullptr);
      for (const GateRun& run : runs_of(cell.hidden_bias_grads, cell.gates)) sums(run, dir.grad_b_hh, nullptr);
    }
  }

  if (dir.grad_w_hr && hidden_kept.defined()) {
    product(P, H, N, {grad_projected, P, true}, {hidden_kept.const_data_ptr(), H}, dir.grad_w_hr, H, 0);
  } else if (dir.grad_w_hr) {
    // h before its projection was not kept: o * tanh(c).
    const Tensor cells = view(dir.cells, {N, H}, {H, 1}, sum_dtype_);
    const Tensor o =
        view(advance(dir.gates, 3 * H, size_), {N, H}, {cell.saved * H, 1}, options_.dtype().toScalarType());
    const Tensor hidden = at::tanh(cells).mul_(o).to(o.scalar_type());
    product(P, H, N, {grad_projected, P, true}, {hidden.const_data_ptr(), H}, dir.grad_w_hr, H, 0);
  }
}

// Of the gains of layer normalisation, and of the bias of c: sums over all rows, in a fixed order.
void Cuda::norm_gradients(const LayerBackward& layer, const Cell& cell, int d, const void* grad_gates,
                          const Tensor& of_cell) const {
  const DirectionBackward& dir = layer.direction[d];
  const at::ScalarType dtype = options_.dtype().toScalarType();
  const int64_t H = layer.sizes.hidden_size, N = layer.steps.total_rows(), G = cell.gates;
  const auto store = [&](void* result, const Tensor& sums) {
    if (result) view(result, {sums.numel()}, {1}, dtype).copy_(sums);
  };
  for (int side = 0; side < 2; ++side) {
    void* result = side == 0 ? dir.grad_norm_ih : dir.grad_norm_hh;
    if (!result) continue;
    const Tensor centred =
        view(advance(dir.gates, (cell.own_saved + side * G) * H, size_), {N, G * H}, {cell.saved * H, 1}, dtype)
            .to(sum_dtype_);
    const Tensor normal = centred * (centred.square().mean(1, true) + layer_norm_epsilon).rsqrt_();
    for (const GateRun& run : runs_of(side == 0 ? cell.input_bias_grads : cell.hidden_bias_grads, cell.gates)) {
      const Tensor grads =
          view(advance(grad_gates, run.grad * H, size_), {N, run.count * H}, {cell.grad_gates * H, 1}, dtype);
      store(advance(result, run.gate * H, size_), (normal.narrow(1, run.gate * H, run.count * H) * grads).sum(0));
    }
  }
  if (dir.grad_norm_c) store(dir.grad_norm_c, (of_cell[0] * of_cell[1]).sum(0));
  if (dir.grad_norm_c_bias) store(dir.grad_norm_c_bias, of_cell[1].sum(0));
}

// Seeds stay on the device, so that nothing waits and a captured graph draws anew.
Tensor draw_bits(const Tensor& seed, int64_t entries, int64_t rows, int64_t units, double rate) {
  const Tensor bits = bits_to_draw(seed, entries, rows, units, rate);
  if (bits.numel() == 0) return bits;
  const Stream stream(seed);
  const Tensor seeds = seed.contiguous();
  const int64_t count = seeds.numel(), of_seed = entries * rows / count;
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* to = bits.mutable_data_ptr<uint8_t>() + i * of_seed * bits.size(2);
    check(cuda::draw_bits(seeds.const_data_ptr<int64_t>() + i, of_seed, units, rate, to, stream.handle()));
  }
  return bits;
}

}  // namespace

TORCH_LIBRARY_IMPL(FRNN_LIBRARY, FRNN_DISPATCH_KEY, m) {
  m.impl("rnn_forward", &rnn_forward<Cuda>);
  m.impl("rnn_backward", &rnn_backward<Cuda>);
  m.impl("cell_forward", &cell_forward<Cuda>);
  m.impl("cell_backward", &cell_backward<Cuda>);
  m.impl("draw_bits", &draw_bits);
}

}  // namespace fused_rnn
