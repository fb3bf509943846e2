// The operators' schemas, and the CPU's part of them.
#include <ATen/Parallel.h>

#include "cpu/custom.h"
#include "operators.h"
#include "run_layer.h"

namespace fused_rnn {

namespace {

// uint8 (entries, rows, ceil(units / 8)) from the seed, int64 of one element: csrc/cells/draw.h.
Tensor draw_bits(const Tensor& seed, int64_t entries, int64_t rows, int64_t units, double rate) {
  const Tensor bits = bits_to_draw(seed, entries, rows, units, rate);
  if (bits.numel() == 0) return bits;
  const int64_t bytes = bits.size(2);
  const uint64_t value = uint64_t(*seed.const_data_ptr<int64_t>());
  uint8_t* data = bits.mutable_data_ptr<uint8_t>();
  const auto draw = kernels().draw_bits;
  const auto run = [&](int64_t begin, int64_t end) {
    draw(value, begin, end - begin, units, rate, data + begin * bytes);
  };
  constexpr int64_t bytes_of_a_thread = 4096;
  const int64_t all = entries * rows, grain = std::max<int64_t>(1, bytes_of_a_thread / bytes);
  if (all <= grain || team_is_late() || usable_threads(at::get_num_threads()) == 1) {
    run(0, all);
  } else {
    at::parallel_for(0, all, grain, run);
  }
  return bits;
}

struct Cpu {
  static constexpr bool one_matrix = false;
  static constexpr bool adds_into_grad_x = true;
  static constexpr bool masks_in_kernels = false;
  static constexpr bool wavefronts = false;
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
  void forward(const LayerForward& layer) {
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

}  // namespace

TORCH_LIBRARY(fused_rnn, m) {
  m.def(
      "rnn_forward(Tensor input, Tensor? h0, Tensor? c0, Tensor[] params, Tensor[] controls, int[] settings, "
      "float[] numbers, bool save) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor "
      "hidden)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, Tensor? grad_hidden, "
      "Tensor input, Tensor? h0, Tensor? c0, Tensor[] params, Tensor[] controls, Tensor output, Tensor gates, Tensor "
      "cells, Tensor hidden, int[] settings, float[] numbers, bool[] needs, bool reuse_gates) -> (Tensor grad_input, "
      "Tensor grad_h0, Tensor grad_c0, Tensor[] grad_params)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "cell_forward(Tensor input, Tensor h, Tensor? c, Tensor[] params, int[] settings, float[] numbers, bool save) "
      "-> (Tensor h_next, Tensor c_next, Tensor gates, Tensor cells)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "cell_backward(Tensor? grad_h, Tensor? grad_c, Tensor input, Tensor h, Tensor? c, Tensor[] params, "
      "Tensor gates, Tensor cells, int[] settings, float[] numbers, bool[] needs) "
      "-> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_params)",
      {at::Tag::pt2_compliant_tag});
  m.def("draw_bits(Tensor seed, SymInt entries, SymInt rows, SymInt units, float rate) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("rnn_forward", &rnn_forward<Cpu>);
  m.impl("rnn_backward", &rnn_backward<Cpu>);
  m.impl("cell_forward", &cell_forward<Cpu>);
  m.impl("cell_backward", &cell_backward<Cpu>);
  m.impl("draw_bits", &draw_bits);
}

}  // namespace fused_rnn
