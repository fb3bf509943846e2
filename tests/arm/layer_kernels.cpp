// Compiled with FRNN_ISA, FRNN_ISA_TEXT, FRNN_VECTOR_BYTES and FRNN_NEON as csrc/cpu/isa_*.cpp have them, CELL and
// ELEMENT.
#pragma GCC diagnostic ignored "-Wignored-attributes"

#include "cpu/run.h"
#include "layers.h"

namespace fused_rnn {
namespace {

template <class S>
constexpr DType dtype_of = DType::float32;
template <>
constexpr DType dtype_of<double> = DType::float64;
template <>
constexpr DType dtype_of<BFloat16> = DType::bfloat16;
template <>
constexpr DType dtype_of<Half> = DType::float16;

LayerKernels own = {FRNN_ISA_TEXT, CELL::kind, dtype_of<ELEMENT>, &FRNN_ISA::run_forward<CELL, ELEMENT>,
                    &FRNN_ISA::run_backward<CELL, ELEMENT>};

const bool added = [] {
  own.next = first_kernels();
  first_kernels() = &own;
  return true;
}();

}  // namespace
}  // namespace fused_rnn
