#pragma GCC diagnostic ignored "-Wignored-attributes"
#include "cpu/kernels.h"
#include "stream/pass.h"
namespace fused_rnn {
#if defined(FRNN_BFLOAT16_ONLY)
namespace isa_neon {
extern const KernelTable table;
}
#endif
namespace FRNN_ISA {
const StreamKernel& stream(const LayerSizes& sizes) {
  if (sizes.dtype == DType::bfloat16) return stream_kernel_of<BFloat16>(sizes);
#if defined(FRNN_BFLOAT16_ONLY)
  return isa_neon::table.stream(sizes);
#else
  return sizes.dtype == DType::float64 ? stream_kernel_of<double>(sizes) : stream_kernel_of<float>(sizes);
#endif
}
extern const KernelTable table;
const KernelTable table = {FRNN_ISA_TEXT, 16, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, &stream};
}  // namespace FRNN_ISA
}  // namespace fused_rnn
