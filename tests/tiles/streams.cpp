// An LSTM of int8 matrices as a stream whose products of many rows go to emulated tiles, against the same without them:
// the same bits. Its other kernels are AVX2's, whose panels of 32 and 16 columns are two tiles and one; the processor
// is said to have AMX, so that the choice is made as on one that does. Exits with 1 at a difference, and where products
// do not go where they should.
#define FRNN_STREAMS_ALONE
#define FRNN_ISA_AVX512_AMX
#define FRNN_ISA_AVX2
#define FRNN_ISA_PORTABLE
#define FRNN_ISA isa_avx2
#define FRNN_ISA_TEXT "avx2"
#define FRNN_VECTOR_BYTES 32
#pragma GCC diagnostic ignored "-Wignored-attributes"

#include "processor.h"
// Behind what it replaces the functions of.
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/memory.cpp"
#include "cpu/tiles.h"
#include "stream/pass.h"
#include "stream/stack.cpp"

using namespace fused_rnn;

namespace {

int products_on_tiles = 0;

void counted(int64_t columns, int64_t rows, int64_t depth, const Int8* const* a, const Int8* b, int64_t panels,
             int32_t* c, int64_t c_stride) {
  ++products_on_tiles;
  isa_avx2::product_of_byte_tiles(columns, rows, depth, a, b, panels, c, c_stride);
}

const StreamKernel& lstm(const LayerSizes&) { return isa_avx2::stream_kernel_of<Lstm, float, 1>(); }

}  // namespace

namespace fused_rnn {
namespace isa_avx512_amx {
const KernelTable table = {"avx512_amx", 32, &lstm, &counted};
}
namespace isa_avx2 {
const KernelTable table = {"avx2", 32, &lstm, nullptr};
}
namespace isa_portable {
const KernelTable table = {"portable", 32, &lstm, nullptr};
}
}  // namespace fused_rnn

namespace {

std::mt19937 bits(1);
float number() { return float(int(bits() % 2001) - 1000) / 1000; }

struct Layer {
  int64_t I, H, P;
  std::vector<int8_t> w_ih, w_hh, w_hr;
  std::vector<float> b_ih, b_hh, scale_ih, scale_hh, scale_hr;

  Layer(int64_t I, int64_t H, int64_t P) : I(I), H(H), P(P) {
    const auto matrix = [](int64_t rows, int64_t k, std::vector<int8_t>& w, std::vector<float>& scale) {
      for (int64_t i = 0; i < rows * k; ++i) w.push_back(int8_t(int(bits() % 255) - 127));
      for (int64_t i = 0; i < rows; ++i) scale.push_back((1 + number() / 2) / 127 / float(k) * 4);
    };
    matrix(4 * H, I, w_ih, scale_ih);
    matrix(4 * H, P, w_hh, scale_hh);
    if (P != H) matrix(P, H, w_hr, scale_hr);
    for (int64_t i = 0; i < 4 * H; ++i) b_ih.push_back(number()), b_hh.push_back(number());
  }

  LayerForward record() const {
    LayerForward layer;
    layer.sizes.input_size = I;
    layer.sizes.hidden_size = H;
    layer.sizes.state_size = P;
    layer.sizes.format = WeightFormat::int8;
    layer.inference = true;
    Weights& w = layer.direction[0].weights;
    w.w_ih = w_ih.data(), w.w_hh = w_hh.data(), w.b_ih = b_ih.data(), w.b_hh = b_hh.data();
    w.scale_ih = scale_ih.data(), w.scale_hh = scale_hh.data();
    if (P != H) w.w_hr = w_hr.data(), w.scale_hr = scale_hr.data();
    return layer;
  }
};

// The outputs of all steps of x (steps, rows, I): (steps, rows, P), by the table of that name.
std::vector<float> outputs(const char* isa, const Layer& of, std::vector<float> x, int64_t steps, int64_t rows) {
  const LayerForward layer = of.record();
  if (!select_kernels(isa)) emulated::fault("no such kernels");
  PackedStack* packed = PackedStack::create(&layer, 1);
  StackStates* states = StackStates::create(*packed, rows, rows);
  std::vector<float> y(size_t(steps * rows * of.P));
  StreamRows call;
  call.steps = steps;
  call.rows = rows;
  call.x = {x.data(), rows * of.I, of.I};
  call.y = {y.data(), rows * of.P, of.P};
  states->advance(call);
  StackStates::destroy(states);
  PackedStack::destroy(packed);
  return y;
}

int check(int64_t I, int64_t H, int64_t P, int64_t rows) {
  constexpr int64_t steps = 3;
  const Layer layer(I, H, P);
  std::vector<float> x;
  for (int64_t i = 0; i < steps * rows * I; ++i) x.push_back(number());
  // Without AVX-VNNI, which this processor may lack.
  chosen::features = "avx2 fma";
  products_on_tiles = 0;
  const std::vector<float> expected = outputs("avx2", layer, x, steps, rows);
  if (products_on_tiles != 0) emulated::fault("products without AMX are on tiles");
  chosen::features =
      "avx2 fma avx512f avx512bw avx512dq avx512vl avx512bf16 avx512vnni avx_vnni amx_tile amx_bf16 amx_int8";
  const std::vector<float> found = outputs("avx512_amx", layer, x, steps, rows);
  // Of x, of h, and of what is projected, in two parts where that has panels of two widths: 64 rows at a time, of x
  // those of all steps that fit beside them.
  const int64_t of_step = P == H ? 1 : P == 48 ? 3 : 2;
  int64_t wanted = 0;
  for (int64_t row = 0; row < rows; row += 64) {
    const int64_t steps_at_once = std::min<int64_t>(64, rows) / std::min<int64_t>(64, rows - row);
    wanted += (steps + steps_at_once - 1) / steps_at_once + steps * of_step;
  }
  if (products_on_tiles != wanted) emulated::fault("products are not all on tiles");
  if (std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) != 0) {
    std::printf("I %ld H %ld P %ld rows %ld: results differ\n", long(I), long(H), long(P), long(rows));
    return 1;
  }
  return 0;
}

}  // namespace

int main() {
  isa_avx2::QuantizedRows quantized;
  if (quantized.on_tiles(64)) emulated::fault("rows without tiles");
  quantized.by_tiles = &counted;
  if (quantized.on_tiles(15) || !quantized.on_tiles(16)) emulated::fault("rows that tiles are for");
  int count = 0;
  for (const int64_t rows : {16, 17, 31, 33, 64, 80}) {
    if (check(40, 40, 40, rows) || check(7, 70, 70, rows) || check(130, 65, 48, rows) || check(64, 20, 16, rows))
      return 1;
    count += 4;
  }
  std::printf("%d streams are right\n", count);
  return 0;
}
