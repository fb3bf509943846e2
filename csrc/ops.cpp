// The operators' schemas, and the CPU's part of them.
#include <ATen/Parallel.h>

#include "cpu_backend.h"

namespace fused_rnn {

namespace {

// uint8 (entries, rows, ceil(units / 8)) from the seeds, int64: csrc/cells/draw.h. With the first the first entries are
// drawn, and so on, as by a call for each.
Tensor draw_bits(const Tensor& seed, int64_t entries, int64_t rows, int64_t units, double rate) {
  const Tensor bits = bits_to_draw(seed, entries, rows, units, rate);
  if (bits.numel() == 0) return bits;
  const Tensor seeds = seed.contiguous();
  const int64_t bytes = bits.size(2), of_seed = entries * rows / seeds.numel();
  const int64_t* values = seeds.const_data_ptr<int64_t>();
  uint8_t* data = bits.mutable_data_ptr<uint8_t>();
  const auto draw = kernels().draw_bits;
  const auto run = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / of_seed, stop = std::min(end, (i + 1) * of_seed);
      draw(uint64_t(values[i]), begin % of_seed, stop - begin, units, rate, data + begin * bytes);
      begin = stop;
    }
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
