// Layers whose matrices are stored in fewer bits (WeightFormat of problem.h): the operator rnn_quantized. Each
// direction of a layer is a stream (stream/stack.h) that begins with the call and ends with it; what stays is its
// packed weights.
#include "quantized.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "cpu/kernels.h"
#include "cpu/team.h"
#include "operators.h"
#include "stream/stack.h"

namespace fused_rnn {

namespace {

using PackedLayer = std::shared_ptr<PackedStack>;

// Of every layer and direction.
using PackedLayers = std::shared_ptr<std::vector<PackedLayer>>;

PackedLayers pack_layers(Stack stack) {
  check_int8_values(stack);
  stack.fit_heads(kernels().vector_bytes / int64_t(sizeof(float)));
  auto result = std::make_shared<std::vector<PackedLayer>>();
  for (int64_t l = 0; l < stack.num_layers(); ++l) {
    for (int64_t d = 0; d < stack.D; ++d) {
      LayerForward layer;
      layer.sizes = stack.layer_sizes(l);
      layer.sizes.num_directions = 1;
      layer.direction[0].weights = stack.weights(l, d);
      layer.inference = true;
      stack.put_options(layer);
      PackedStack* packed = PackedStack::create(&layer, 1);
      TORCH_CHECK(packed, "fused_rnn: out of memory for packed weights");
      result->push_back(PackedLayer(packed, &PackedStack::destroy));
    }
  }
  return result;
}

// The packed weights of parameters that are the same tensors as before and were not changed in place since. What
// PyTorch does not count, a change through other owners of the memory, is not seen.
class PackedWeights {
 public:
  PackedLayers of(const Stack& stack, at::TensorList params, Integers settings, Numbers numbers) {
    for (const Tensor& t : params) {
      if (t.is_inference()) return pack_layers(stack);  // such a tensor does not count its changes
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    const Key key(params, settings, numbers);
    if (const auto found = entries_.find(key.tensors[0]); found != entries_.end()) {
      for (const Entry& entry : found->second) {
        if (entry.key == key && entry.alive()) return entry.packed;
      }
    }
    // The tensors may have died without their module, or changed: their memory serves again.
    forget_where([&](const Entry& entry) { return !entry.alive() || entry.key.is_before(key); });
    PackedLayers packed = pack_layers(stack);
    entries_[key.tensors[0]].push_back({key, params, packed});
    return packed;
  }

  void forget(const Tensor& first_param) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.erase(first_param.unsafeGetTensorImpl());
    forget_where([](const Entry& entry) { return !entry.alive(); });
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.clear();
  }

  size_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t sum = 0;
    for (const auto& [first, list] : entries_) {
      for (const Entry& entry : list) {
        for (const PackedLayer& layer : *entry.packed) sum += layer->bytes();
      }
    }
    return sum;
  }

 private:
  struct Key {
    Key(at::TensorList params, Integers settings, Numbers numbers)
        : isa(kernels().isa), settings(settings.vec()), numbers(numbers.vec()) {
      for (const Tensor& t : params) {
        tensors.push_back(t.unsafeGetTensorImpl());
        data.push_back(t.const_data_ptr());
        versions.push_back(t._version());
      }
    }
    bool operator==(const Key& other) const {
      return tensors == other.tensors && data == other.data && versions == other.versions && isa == other.isa &&
             settings == other.settings && numbers == other.numbers;
    }
    // Whether this is of the same tensors, which have changed since.
    bool is_before(const Key& now) const {
      return tensors == now.tensors && isa == now.isa && (versions != now.versions || data != now.data);
    }
    std::vector<const c10::TensorImpl*> tensors;
    std::vector<const void*> data;
    std::vector<int64_t> versions;
    std::string isa;
    std::vector<int64_t> settings;
    std::vector<double> numbers;
  };

  struct Entry {
    Entry(Key key_, at::TensorList params, PackedLayers packed_) : key(std::move(key_)), packed(std::move(packed_)) {
      for (const Tensor& t : params) owners.emplace_back(t.getIntrusivePtr());
    }
    // Whether no tensor was freed, so that none has another's address.
    bool alive() const {
      for (const auto& owner : owners) {
        if (owner.expired()) return false;
      }
      return true;
    }
    Key key;
    std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> owners;
    PackedLayers packed;
  };

  template <class Predicate>
  void forget_where(const Predicate& predicate) {
    for (auto it = entries_.begin(); it != entries_.end();) {
      auto& list = it->second;
      list.erase(std::remove_if(list.begin(), list.end(), predicate), list.end());
      it = list.empty() ? entries_.erase(it) : std::next(it);
    }
  }

  std::mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, std::vector<Entry>> entries_;
};

PackedWeights& packed_weights() {
  static PackedWeights* weights = new PackedWeights;  // never destroyed: PyTorch may be gone by then
  return *weights;
}

// Multiply-adds of a call from which on its rows are split over threads.
constexpr int64_t least_work_of_a_thread = int64_t(1) << 19;

char* at_row(const Tensor& t, int64_t layer, int64_t row) {
  return t.defined() ? static_cast<char*>(t.mutable_data_ptr()) + (layer * t.stride(0) + row * t.stride(1)) * 4
                     : nullptr;
}

// One layer, whose directions stand in packed[0] and [1].
void run_layer_of_streams(const Stack& stack, const PackedLayer* packed, int64_t layer, const Tensor& x,
                          const Tensor& y, const Tensor& h_n, const Tensor& c_n) {
  const int64_t T = stack.T, B = stack.B, D = stack.D;
  const int64_t threads = team_is_late() ? 1 : usable_threads(at::get_num_threads());
  const int64_t work = packed[0]->multiply_adds() * T * B * D;
  const int64_t wanted = std::min<int64_t>(threads, 1 + work / least_work_of_a_thread);
  const int64_t groups = std::min(B, (wanted + D - 1) / D);
  const uint8_t* mask = stack.mask.defined() ? static_cast<const uint8_t*>(stack.mask.const_data_ptr()) : nullptr;
  std::atomic<bool> has_memory{true};
  const auto run = [&](int64_t task) {
    const int64_t d = task % D, group = task / D;
    const int64_t first = B * group / groups, rows = B * (group + 1) / groups - first, i = layer * D + d;
    StackStates* states = StackStates::create(*packed[d], rows, rows);
    if (!states) {
      has_memory = false;
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (stack.h0.defined() || stack.c0.defined())
        states->write(0, r, at_row(stack.h0, i, first + r), at_row(stack.c0, i, first + r), false);
    }
    StreamRows call;
    call.steps = T;
    call.rows = rows;
    const int64_t begin = d == 1 ? T - 1 : 0, sign = d == 1 ? -1 : 1;
    const auto sequence = [&](const Tensor& t, int64_t feature) {
      return Sequence{static_cast<float*>(const_cast<void*>(t.const_data_ptr())) + begin * t.stride(0) +
                          first * t.stride(1) + feature,
                      sign * t.stride(0), t.stride(1)};
    };
    call.x = sequence(x, 0);
    call.y = sequence(y, d * stack.P);
    if (mask) {
      call.mask = mask + begin * B + first;
      call.mask_stride = sign * B;
    }
    states->advance(call);
    for (int64_t r = 0; r < rows; ++r)
      states->read(0, r, at_row(h_n, i, first + r), stack.C > 0 ? at_row(c_n, i, first + r) : nullptr, false);
    StackStates::destroy(states);
  };
  const int64_t tasks = groups * D;
  if (threads == 1 || wanted == 1) {
    for (int64_t task = 0; task < tasks; ++task) run(task);
  } else {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) run(task);
    });
  }
  TORCH_CHECK(has_memory, "fused_rnn: out of memory for the states of ", B, " rows");
}

std::tuple<Tensor, Tensor, Tensor> rnn_quantized(const Tensor& input, const OptionalTensor& h0,
                                                 const OptionalTensor& c0, at::TensorList params,
                                                 const OptionalTensor& mask, Integers settings, Numbers numbers) {
  Controls controls;
  controls.mask = mask;
  const Stack stack(input, h0, c0, params, controls, Settings::restore(settings, numbers), Takes{true});
  TORCH_CHECK(input.scalar_type() == at::kFloat, "input: expected float32, got ", input.scalar_type());
  TORCH_CHECK(!is_custom(stack.kind()), "settings: expected no custom cell");
  // Sums of 255 * 127 * K fit 32 bits.
  constexpr int64_t most_features = 65536;
  TORCH_CHECK(stack.format != WeightFormat::int8 || std::max({stack.I, stack.H, stack.D * stack.P}) <= most_features,
              "params: expected int8 matrices of at most ", most_features, " columns");
  const int64_t L = stack.num_layers(), D = stack.D, T = stack.T, B = stack.B, P = stack.P;
  const auto options = input.options();
  const bool has_cell = has_cell_state(stack.kind());
  const Tensor h_n = make_empty({L * D, B, P}, options);
  const Tensor c_n = has_cell ? make_empty({L * D, B, stack.C}, options) : make_empty({0}, options);
  const auto outputs = [&] { return mask ? make_zeros({T, B, D * P}, options) : make_empty({T, B, D * P}, options); };
  Tensor x = stack.input, y = outputs();
  if (B > 0) {
    const PackedLayers packed = packed_weights().of(stack, params, settings, numbers);
    for (int64_t l = 0; l < L; ++l) {
      if (l > 0) {
        x = y;
        y = outputs();
      }
      run_layer_of_streams(stack, packed->data() + l * D, l, x, y, h_n, has_cell ? c_n : Tensor());
    }
  }
  return {stack.batch_first ? y.transpose(0, 1) : y, h_n, c_n};
}

}  // namespace

void check_int8_values(const Stack& stack) {
  if (stack.format != WeightFormat::int8) return;
  for (size_t i = 0; i < stack.params.size(); ++i) {
    const Tensor& t = stack.params[i];  // contiguous
    TORCH_CHECK(t.scalar_type() != at::kChar || !std::memchr(t.const_data_ptr(), 0x80, t.nbytes()), "params[", i,
                "]: expected int8 values from -127 to 127, got -128");
  }
}

size_t quantized_bytes_held() { return packed_weights().bytes(); }
void forget_quantized(const Tensor& first_param) { packed_weights().forget(first_param); }
void clear_quantized() { packed_weights().clear(); }

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "rnn_quantized(Tensor input, Tensor? h0, Tensor? c0, Tensor[] params, Tensor? mask, int[] settings, float[] "
      "numbers) -> (Tensor output, Tensor h_n, Tensor c_n)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) { m.impl("rnn_quantized", &rnn_quantized); }

}  // namespace fused_rnn
