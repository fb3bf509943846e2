// The kernel table of one instruction set. Included by isa_*.cpp only, which define FRNN_ISA, FRNN_VECTOR_BYTES and
// FRNN_ISA_TEXT first; with FRNN_BFLOAT16_ONLY the source has only the bfloat16 kernels and takes the others from
// the table of FRNN_BASE_ISA. With FRNN_STREAMS_ALONE (kernels.h) there are the kernels of streams and no others.
#pragma once

#pragma GCC diagnostic ignored "-Wignored-attributes"

#include "isa_streams.h"
#if !defined(FRNN_STREAMS_ALONE)
#if !defined(FRNN_BFLOAT16_ONLY)
#include "derivatives.h"
#endif
#include "draw.h"
#include "kernels.h"
#include "peak.h"
#include "run.h"

namespace fused_rnn {
namespace FRNN_ISA {

template <class S>
bool forward_of(const LayerForward& layer, const Plan& plan) {
  switch (layer.sizes.kind) {
    case CellKind::rnn_tanh: return run_forward<RnnTanh, S>(layer, plan);
    case CellKind::rnn_relu: return run_forward<RnnRelu, S>(layer, plan);
    case CellKind::gru: return run_forward<Gru, S>(layer, plan);
    case CellKind::lstm:
    case CellKind::custom: break;
  }
  return run_forward<Lstm, S>(layer, plan);
}

template <class S>
bool backward_of(const LayerBackward& layer, const Plan& plan) {
  switch (layer.sizes.kind) {
    case CellKind::rnn_tanh: return run_backward<RnnTanh, S>(layer, plan);
    case CellKind::rnn_relu: return run_backward<RnnRelu, S>(layer, plan);
    case CellKind::gru: return run_backward<Gru, S>(layer, plan);
    case CellKind::lstm:
    case CellKind::custom: break;
  }
  return run_backward<Lstm, S>(layer, plan);
}

template <class S>
void activation_of(Activation which, const void* in, void* out, int64_t count) {
  using A = typename Accumulator<S>::type;
  using Values = Pack<typename Simd<A>::V, 1, rough_gates<S>>;
  constexpr int width = Simd<A>::width;
  for (int64_t i = 0; i < count; i += width) {
    const Values x{{Simd<A>::load_n(rows_of<A>(in) + i, count - i)}};
    const Values y = which == Activation::tanh ? tanh<Values>(x) : sigmoid<Values>(x);
    Simd<A>::store_n(rows_of<A>(out) + i, y.v[0], count - i);
  }
}

#if defined(FRNN_BFLOAT16_ONLY)
}  // namespace FRNN_ISA

namespace FRNN_BASE_ISA {
void gradient_changes(const ChangedSteps& steps, int64_t begin, int64_t end);
}  // namespace FRNN_BASE_ISA

namespace FRNN_ISA {

bool forward(const LayerForward& layer, const Plan& plan) {
  return layer.sizes.dtype == DType::bfloat16 ? forward_of<BFloat16>(layer, plan)
                                              : FRNN_BASE_ISA::table.forward(layer, plan);
}

bool backward(const LayerBackward& layer, const Plan& plan) {
  return layer.sizes.dtype == DType::bfloat16 ? backward_of<BFloat16>(layer, plan)
                                              : FRNN_BASE_ISA::table.backward(layer, plan);
}

void activation(Activation which, DType dtype, const void* in, void* out, int64_t count) {
  return dtype == DType::bfloat16 ? activation_of<BFloat16>(which, in, out, count)
                                  : FRNN_BASE_ISA::table.activation(which, dtype, in, out, count);
}

using FRNN_BASE_ISA::gradient_changes;

double peak(DType dtype, double seconds) {
  return dtype == DType::bfloat16 ? multiply_add_rate<BFloat16>(seconds) : FRNN_BASE_ISA::table.peak(dtype, seconds);
}
#else
bool forward(const LayerForward& layer, const Plan& plan) {
  switch (layer.sizes.dtype) {
    case DType::float64: return forward_of<double>(layer, plan);
    case DType::bfloat16: return forward_of<BFloat16>(layer, plan);
    case DType::float16: return forward_of<Half>(layer, plan);
    case DType::float32: break;
  }
  return forward_of<float>(layer, plan);
}

bool backward(const LayerBackward& layer, const Plan& plan) {
  switch (layer.sizes.dtype) {
    case DType::float64: return backward_of<double>(layer, plan);
    case DType::bfloat16: return backward_of<BFloat16>(layer, plan);
    case DType::float16: return backward_of<Half>(layer, plan);
    case DType::float32: break;
  }
  return backward_of<float>(layer, plan);
}

void activation(Activation which, DType dtype, const void* in, void* out, int64_t count) {
  switch (dtype) {
    case DType::float64: return activation_of<double>(which, in, out, count);
    case DType::bfloat16: return activation_of<BFloat16>(which, in, out, count);
    default: return activation_of<float>(which, in, out, count);
  }
}

// The 16-bit formats are multiplied as float here.
double peak(DType dtype, double seconds) {
  return dtype == DType::float64 ? multiply_add_rate<double>(seconds) : multiply_add_rate<float>(seconds);
}
#endif

extern const KernelTable table;
const KernelTable table = {FRNN_ISA_TEXT, FRNN_VECTOR_BYTES, &forward,          &backward, &activation,
                           &peak,         &draw_bits,        &gradient_changes, &stream,   own_byte_tiles};

}  // namespace FRNN_ISA
}  // namespace fused_rnn
#endif
