// The CPU as a backend of the operators: operators.h says what one has to have.
#pragma once

#include <ATen/Parallel.h>

#include <cstring>

#include "cpu/custom.h"
#include "operators.h"
#include "run_layer.h"

namespace fused_rnn {

// Whether there are these bytes, and all of them are zero.
inline bool is_zeros(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  return p && (bytes == 0 || (p[0] == 0 && std::memcmp(p, p + 1, bytes - 1) == 0));
}

struct Cpu {
  static constexpr bool one_matrix = false;
  static constexpr bool adds_into_grad_x = true;
  static constexpr bool masks_in_kernels = false;
  static constexpr bool wavefronts = false;
  static constexpr bool resets_before_product = false;
  explicit Cpu(const Tensor&) {}
  static int64_t vector_units(const Tensor& input) {
    return kernels().vector_bytes / int64_t(c10::elementSize(accumulation_dtype(input)));
  }
  static void copy(const Tensor& to, const Tensor& from) {
    char* target = static_cast<char*>(to.mutable_data_ptr());
    const char* source = static_cast<const char*>(from.const_data_ptr());
    const auto run = [&](int64_t begin, int64_t end) { std::memcpy(target + begin, source + begin, end - begin); };
    constexpr int64_t bytes_of_a_thread = 1 << 18;
    const int64_t bytes = int64_t(to.nbytes());
    if (bytes <= bytes_of_a_thread || team_is_late() || usable_threads(at::get_num_threads()) == 1) {
      run(0, bytes);
    } else {
      at::parallel_for(0, bytes, bytes_of_a_thread, run);
    }
  }
  void forward(LayerForward layer) {
    // Zeros that a caller made are those that stand for no state: their product with w_hh is not computed.
    const size_t state = size_t(layer.steps.B * layer.sizes.state_size * stored_bytes(layer.sizes.dtype));
    for (int d = 0; d < layer.sizes.num_directions; ++d) {
      if (is_zeros(layer.direction[d].h0, state)) layer.direction[d].h0 = nullptr;
    }
    const CustomKernels* custom = custom_of(layer.sizes);
    run_layer(layer, custom ? custom->forward : kernels().forward, false);
  }
  void backward(const LayerBackward& layer) {
    const CustomKernels* custom = custom_of(layer.sizes);
    run_layer(layer, custom ? custom->backward : kernels().backward, true);
  }
  // Null: a cell of our own.
  static const CustomKernels* custom_of(const LayerSizes& sizes) {
    if (!is_custom(sizes.kind)) return nullptr;
    const CustomKernels* found = custom_kernels(sizes.kind, sizes.dtype);
    TORCH_CHECK(found, "kind: this custom cell has no kernels here, and without Python none are compiled");
    return found;
  }
};

}  // namespace fused_rnn
