// What one instruction set has for streams, and its whole table where there is nothing else. Included by isa_kernels.h.
#pragma once

#include "../stream/pass.h"
#include "kernels.h"

namespace fused_rnn {

#if defined(FRNN_BFLOAT16_ONLY)
namespace FRNN_BASE_ISA {
extern const KernelTable table;
}
#endif

namespace FRNN_ISA {

const StreamKernel& stream(const LayerSizes& sizes) {
  if (sizes.dtype == DType::bfloat16) return stream_kernel_of<BFloat16>(sizes);
#if defined(FRNN_BFLOAT16_ONLY)
  return FRNN_BASE_ISA::table.stream(sizes);
#else
  return sizes.dtype == DType::float64 ? stream_kernel_of<double>(sizes) : stream_kernel_of<float>(sizes);
#endif
}

#if defined(FRNN_TILES)
inline constexpr ByteTiles own_byte_tiles = &product_of_byte_tiles;
#else
inline constexpr ByteTiles own_byte_tiles = nullptr;
#endif

#if defined(FRNN_STREAMS_ALONE)
extern const KernelTable table;
const KernelTable table = {FRNN_ISA_TEXT, FRNN_VECTOR_BYTES, &stream, own_byte_tiles};
#endif

}  // namespace FRNN_ISA
}  // namespace fused_rnn
