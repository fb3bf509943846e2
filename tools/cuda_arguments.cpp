// What the planner and the launch hand a persistent kernel for one case, for tools/cuda_cycles.py: prints the plan, and
// the bytes of the kernel's argument. Built for the host, without CUDA. Pointers are made up: where the launch passes
// null, they are null, and elsewhere they tell what they point to by their upper half alone.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/persistent.cuh"

using namespace fused_rnn;
using namespace fused_rnn::cuda;

namespace {

int64_t pointers = 0;
template <class T>
void point(T*& p) {
  p = reinterpret_cast<T*>(++pointers << 32);
}

[[noreturn]] void fail(const std::string& why) {
  fprintf(stderr, "%s\n", why.c_str());
  exit(1);
}

PersistentForward forward_part(const LayerSizes& sizes, int gates, int layer, int layers, bool training) {
  PersistentForward part;
  const bool lstm = sizes.kind == CellKind::lstm;
  point(part.w_hh);
  if (layer > 0) {
    point(part.w_ih);
  } else {
    point(part.projection);
    part.projection_stride = gates * sizes.hidden_size;
  }
  point(part.b_ih);
  point(part.b_hh);
  point(part.h_n);
  if (lstm) point(part.c_n);
  if (training || layer + 1 == layers) point(part.y);
  part.y_stride = sizes.hidden_size;
  if (training) {
    point(part.gates);
    if (lstm) point(part.cells);
  }
  return part;
}

PersistentBackward backward_part(const LayerSizes& sizes, int layer, int layers) {
  PersistentBackward part;
  point(part.w_hh);
  if (layer > 0) point(part.w_ih);
  point(part.gates);
  if (sizes.kind == CellKind::lstm) point(part.cells);
  point(part.y);
  part.y_stride = sizes.hidden_size;
  if (layer + 1 == layers) point(part.grad_y);
  part.grad_y_stride = sizes.hidden_size;
  point(part.grad_gates);
  return part;
}

template <class Arguments>
void print(const Arguments& arguments) {
  unsigned char bytes[sizeof arguments];
  memcpy(bytes, &arguments, sizeof bytes);
  for (unsigned char byte : bytes) printf("%02x", byte);
}

}  // namespace

int main(int count, char** words) {
  if (count != 10) fail("usage: kind dtype tf32 hidden batch layers backward training steps");
  const auto number = [&](int i) { return atoll(words[i]); };
  LayerSizes sizes;
  sizes.kind = CellKind(number(1));
  sizes.dtype = DType(number(2));
  sizes.input_size = sizes.hidden_size = sizes.state_size = number(4);
  const bool tf32 = number(3), backward = number(7), training = number(8);
  const int layers = int(number(6));
  Steps steps;
  steps.B = number(5);
  steps.T = 1024;
  // An H200.
  DeviceInfo device;
  device.arch = 90;
  device.sms = 132;
  device.shared_per_block = 227 * 1024;
  device.shared_per_sm = 228 * 1024;
  device.registers_per_sm = 65536;
  device.l2_bytes = int64_t(50) << 20;
  device.max_cluster = 16;
  device.cooperative = true;
  device.clock_khz = 1980000;
  const Plan plan = layers > 1 ? make_wavefront_plan(sizes, layers, steps, device, backward, tf32)
                               : make_plan(sizes, steps, device, backward, tf32);
  if (plan.variant == Variant::none) fail("the plan has no persistent kernel: " + plan.reason);
  if (plan.layers != layers) fail("the plan has no wavefront: " + plan.reason);
  int gates = 1;
  with_cell(sizes.kind, [&](auto cell) { gates = decltype(cell)::gates; });

  const Tiling& t = plan.tiling;
  printf("{\"variant\": \"%s\", \"exchange\": \"%s\", \"multiply\": \"%s\", \"shape\": %d, ", name(plan.variant),
         name(t.exchange), name(plan.multiply), int(plan.shape));
  printf("\"predicted_cycles\": %.1f, ", plan.predicted_step_us * device.clock_khz / 1e3);
  printf("\"team_blocks\": %d, \"active\": %d, \"teams\": %d, \"columns\": %d, \"layers\": %d, \"arguments\": \"",
         int(t.blocks), int(t.active), int(t.teams), int(t.columns), int(plan.layers));
  // Planned for many steps, run for a few.
  steps.T = number(9);
  if (backward) {
    BackwardArguments a = {};
    a.hidden_size = sizes.hidden_size;
    a.steps = steps;
    for (int layer = 0; layer < layers; ++layer) a.part[layer] = backward_part(sizes, layer, layers);
    a.tiling = t;
    point(a.workspace);
    print(a);
  } else {
    ForwardArguments a = {};
    a.hidden_size = sizes.hidden_size;
    a.steps = steps;
    for (int layer = 0; layer < layers; ++layer) {
      a.part[layer] = forward_part(sizes, gates, layer, layers, training);
      a.part[layer].end_step = steps.T;
    }
    a.tiling = t;
    point(a.workspace);
    print(a);
  }
  printf("\"}\n");
  return 0;
}
