// A layer forward and backward, as it is told (wire.h). In:
//   kind, dtype, T, B, I, H, P, directions, threads, whether gates are computed again
//   batch_sizes (T) int64, or none; x (N, I); h0 (directions, B, P); c0 (directions, B, H), or none
//   of each direction w_ih, w_hh, b_ih, b_hh, w_hr, of which the last three may be none
//   gradients of y (N, directions * P), h_n and c_n
// Out: the instruction set; y, h_n, c_n; gradients of x, h0, c0 and of each direction's parameters.
#include "layers.h"

#include <cstring>

#include "cpu/kernels.h"
#include "wire.h"

using namespace fused_rnn;
using wire::Array;
using wire::read_array;
using wire::read_integer;
using wire::room;

namespace fused_rnn {
// There are no others here: only the vector's size is read.
const KernelTable& kernels() {
  static const KernelTable table{
      first_kernels()->isa, 16, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  return table;
}
}  // namespace fused_rnn

namespace {

struct Sizes : LayerSizes {
  int64_t T, B, N;
  int64_t element;
};

char* part(const Array& array, int64_t index, int64_t elements, int64_t bytes) {
  return array.data ? static_cast<char*>(array.data) + index * elements * bytes : nullptr;
}

}  // namespace

int main() {
  Sizes s;
  s.kind = CellKind(read_integer());
  s.dtype = DType(read_integer());
  s.T = read_integer();
  s.B = read_integer();
  s.input_size = read_integer();
  s.hidden_size = read_integer();
  s.state_size = read_integer();
  s.num_directions = int32_t(read_integer());
  const int64_t threads = read_integer();
  const bool recomputes = read_integer() != 0;
  s.element = s.dtype == DType::float64 ? 8 : s.dtype == DType::float32 ? 4 : 2;
  const int64_t sum = s.dtype == DType::float64 ? 8 : 4;
  const int64_t D = s.num_directions, H = s.hidden_size, P = s.state_size, I = s.input_size, B = s.B;

  const LayerKernels* found = first_kernels();
  while (found && (found->kind != s.kind || found->dtype != s.dtype)) found = found->next;
  if (!found) wire::fail("no such kernels");

  Steps steps;
  steps.T = s.T;
  steps.B = B;
  const Array batch_sizes = read_array();
  std::vector<int64_t> offsets(size_t(s.T + 1), 0);
  if (batch_sizes.data) {
    steps.batch_sizes = static_cast<const int64_t*>(batch_sizes.data);
    for (int64_t t = 0; t < s.T; ++t) offsets[size_t(t + 1)] = offsets[size_t(t)] + steps.batch_sizes[t];
    steps.offsets = offsets.data();
  }
  s.N = steps.total_rows();
  const auto sequence = [&](const Array& array, int64_t features) {
    return Sequence{array.data, B * features, features};
  };

  const Array x = read_array(), h0 = read_array(), c0 = read_array();
  const Array y = room(s.N * D * P * s.element);
  const Array h_n = room(D * B * P * s.element), c_n = room(has_cell_state(s.kind) ? D * B * H * s.element : 0);
  LayerForward forward;
  forward.sizes = s;
  forward.steps = steps;
  forward.x = sequence(x, I);
  forward.y = sequence(y, D * P);
  LayerBackward backward;
  backward.sizes = s;
  backward.steps = steps;
  backward.x = forward.x;
  backward.y = forward.y;
  Array weights[2][5], gradients[2][5];
  for (int64_t d = 0; d < D; ++d) {
    for (int i = 0; i < 5; ++i) {
      weights[d][i] = read_array();
      gradients[d][i] = room(weights[d][i].bytes);
    }
    const Array gates = room(recomputes ? 0 : s.N * saved_gate_count(s.kind) * H * s.element);
    const Array cells = room(has_cell_state(s.kind) ? s.N * H * sum : 0);
    DirectionForward& to = forward.direction[d];
    to.weights.w_ih = weights[d][0].data;
    to.weights.w_hh = weights[d][1].data;
    to.weights.b_ih = weights[d][2].data;
    to.weights.b_hh = weights[d][3].data;
    to.weights.w_hr = weights[d][4].data;
    to.h0 = part(h0, d, B * P, s.element);
    to.c0 = part(c0, d, B * H, s.element);
    to.h_n = part(h_n, d, B * P, s.element);
    to.c_n = part(c_n, d, B * H, s.element);
    to.gates = gates.data;
    to.cells = cells.data;
    DirectionBackward& back = backward.direction[d];
    back.weights = to.weights;
    back.h0 = to.h0;
    back.c0 = to.c0;
    back.gates = gates.data;
    back.cells = cells.data;
    back.grad_w_ih = gradients[d][0].data;
    back.grad_w_hh = gradients[d][1].data;
    back.grad_b_ih = gradients[d][2].data;
    back.grad_b_hh = gradients[d][3].data;
    back.grad_w_hr = gradients[d][4].data;
  }
  const Array grad_y = read_array(), grad_h_n = read_array(), grad_c_n = read_array();
  const Array grad_x = room(x.bytes), grad_h0 = room(h0.bytes), grad_c0 = room(c0.bytes);
  backward.grad_y = sequence(grad_y, D * P);
  backward.grad_x = sequence(grad_x, I);
  for (int64_t d = 0; d < D; ++d) {
    DirectionBackward& back = backward.direction[d];
    back.grad_h_n = part(grad_h_n, d, B * P, s.element);
    back.grad_c_n = part(grad_c_n, d, B * H, s.element);
    back.grad_h0 = part(grad_h0, d, B * P, s.element);
    back.grad_c0 = part(grad_c0, d, B * H, s.element);
  }
  // All that are asked for, however small the layer: the plan's own choice may be one.
  const auto plan_of = [&](bool is_backward) {
    Plan plan = make_plan(s, steps, int(threads), 16, is_backward);
    if (plan.threads() < threads) {
      plan = {};
      plan.unit_groups = int(threads);
    }
    return plan;
  };
  if (!found->forward(forward, plan_of(false)) || !found->backward(backward, plan_of(true))) wire::fail("not computed");
  // In a call numbers below the smallest normal one are zero; afterwards the thread has its own mode.
  volatile float tiny = 1e-30f;
  if (tiny * 1e-10f == 0) wire::fail("the passes have left another floating-point mode");
  wire::write_text(found->isa);
  for (const Array& array : {y, h_n, c_n, grad_x, grad_h0, grad_c0}) wire::write(array);
  for (int64_t d = 0; d < D; ++d) {
    for (const Array& array : gradients[d]) wire::write(array);
  }
  return 0;
}
