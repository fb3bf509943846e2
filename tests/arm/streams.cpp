// A stack of layers that stays, advanced as it is told (wire.h). In:
//   kind, dtype, layers, steps, rows, I, H, P
//   within, as fused_rnn/settings.py flattens it: 10 integers, 4 numbers
//   the steps of each call, a count and so many
//   of each layer the 10 arrays of Weights (problem.h), in its order
//   x (steps, rows, I); lengths (rows) int64 or none
// Out: the instruction set; y (steps, rows, P); of each layer h (rows, P) and c (rows, H), or none.
// With an argument it says instead what the processor runs.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "stream/stack.h"
#include "wire.h"

using namespace fused_rnn;
using wire::Array;
using wire::read_array;
using wire::read_integer;
using wire::read_number;

namespace {

int64_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

Within read_within() {
  Within w;
  w.activation = Activation(read_integer());
  w.recurrent_activation = Activation(read_integer());
  w.reset_after = read_integer() != 0;
  w.peephole = read_integer() != 0;
  w.coupled_gates = read_integer() != 0;
  w.num_heads = read_integer();
  w.layer_norm = read_integer() != 0;
  w.bptt_steps = read_integer();
  w.reset_state = read_integer() != 0;
  w.return_states = read_integer() != 0;
  w.cell_clip = read_number();
  w.recurrent_grad_clip = read_number();
  w.zoneout = read_number();
  w.zoneout_cell = read_number();
  return w;
}

bool is_plain(CellKind kind, const Within& w) {
  return w.activation == (kind == CellKind::rnn_relu ? Activation::relu : Activation::tanh) &&
         w.recurrent_activation == Activation::sigmoid && !w.peephole && !w.coupled_gates && !w.layer_norm &&
         w.cell_clip == 0 && w.zoneout == 0 && w.zoneout_cell == 0;
}

// What this processor runs, and the mode in which it does.
int describe_machine() {
  std::printf("kernels:");
  for (const KernelTable* const* table = compiled_kernels(); *table; ++table) {
    if (runs_here(**table)) std::printf(" %s", (*table)->isa);
  }
  struct Products {
    volatile float tiny = 1e-30f;
    float before = 0, within = 1, after = 0;
  } products;
  products.before = products.tiny * 1e-10f;
  run_team(
      1,
      [](void* context, int) {
        Products& p = *static_cast<Products*>(context);
        p.within = p.tiny * 1e-10f;
      },
      &products);
  products.after = products.tiny * 1e-10f;
  const bool flushed = products.within == 0 && products.before > 0 && products.after > 0;
  std::printf("\n%s\n", flushed ? "denormal numbers are zero in tasks alone" : "denormal numbers are treated wrongly");
  return flushed ? 0 : 1;
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) return describe_machine();
  const CellKind kind = CellKind(read_integer());
  const DType dtype = DType(read_integer());
  const int64_t count = read_integer(), steps = read_integer(), rows = read_integer();
  const int64_t I = read_integer(), H = read_integer(), P = read_integer();
  const Within within = read_within();
  std::vector<int64_t> calls{std::vector<int64_t>(size_t(read_integer()))};
  for (int64_t& call : calls) call = read_integer();
  std::vector<LayerForward> layers{size_t(count)};
  for (int64_t l = 0; l < count; ++l) {
    LayerForward& layer = layers[size_t(l)];
    layer.sizes = {kind, dtype, l == 0 ? I : P, H, P, within.num_heads, within.layer_norm, 1};
    layer.within = within;
    layer.plain_gates = is_plain(kind, within);
    Weights& w = layer.direction[0].weights;
    for (const void** part :
         {&w.w_ih, &w.w_hh, &w.b_ih, &w.b_hh, &w.w_hr, &w.peephole, &w.norm_ih, &w.norm_hh, &w.norm_c, &w.norm_c_bias})
      *part = read_array().data;
  }
  const Array x = read_array(), lengths = read_array();
  const Array y = wire::room(steps * rows * P * bytes_of(dtype));

  PackedStack* packed = PackedStack::create(layers.data(), count);
  if (!packed) wire::fail("out of memory");
  StackStates* states = StackStates::create(*packed, rows, rows);
  if (!states || !states->enter()) wire::fail("no states");
  int64_t step = 0;
  for (const int64_t length : calls) {
    StreamRows call;
    call.steps = length;
    call.rows = rows;
    call.x = {static_cast<char*>(x.data) + step * rows * I * bytes_of(dtype), rows * I, I};
    call.y = {static_cast<char*>(y.data) + step * rows * P * bytes_of(dtype), rows * P, P};
    call.lengths = static_cast<const int64_t*>(lengths.data);
    call.first_step = step;
    states->advance(call);
    step += length;
  }
  states->leave();
  if (step != steps) wire::fail("other steps than there are");
  wire::write_text(packed->isa());
  wire::write(y);
  for (int64_t l = 0; l < count; ++l) {
    const Array h = wire::room(rows * P * bytes_of(dtype));
    const Array c = wire::room(has_cell_state(kind) ? rows * H * bytes_of(dtype) : 0);
    for (int64_t r = 0; r < rows; ++r) {
      states->read(l, r, static_cast<char*>(h.data) + r * P * bytes_of(dtype),
                   c.data ? static_cast<char*>(c.data) + r * H * bytes_of(dtype) : nullptr, false);
    }
    wire::write(h);
    wire::write(c);
  }
  StackStates::destroy(states);
  PackedStack::destroy(packed);
  return 0;
}
