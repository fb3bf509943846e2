// Which table and which products of bytes are chosen, on a processor with the features of the first argument, separated
// by spaces, where the system permits tiles if the second is 1; FUSED_RNN_ISA may name a table. Prints the table,
// whether bytes are multiplied by an instruction for it, whether on tiles, and how often the system was asked.
#define FRNN_STREAMS_ALONE
#define FRNN_ISA_AVX512_AMX
#define FRNN_ISA_AVX512_BF16
#define FRNN_ISA_AVX512
#define FRNN_ISA_AVX2
#define FRNN_ISA_PORTABLE
#include <cstdio>

#include "processor.h"

namespace fused_rnn {

namespace {

void no_product(int64_t, int64_t, int64_t, const Int8* const*, const Int8*, int64_t, int32_t*, int64_t) {}

}  // namespace

// As the sources of the kernels have them: what is called is not here.
namespace isa_avx512_amx {
const KernelTable table = {"avx512_amx", 64, nullptr, &no_product};
}
namespace isa_avx512_bf16 {
const KernelTable table = {"avx512_bf16", 64, nullptr, nullptr};
}
namespace isa_avx512 {
const KernelTable table = {"avx512", 64, nullptr, nullptr};
}
namespace isa_avx2 {
const KernelTable table = {"avx2", 32, nullptr, nullptr};
}
namespace isa_portable {
const KernelTable table = {"portable", 16, nullptr, nullptr};
}

}  // namespace fused_rnn

int main(int, char** arguments) {
  using namespace fused_rnn;
  chosen::features = arguments[1];
  chosen::permitted = arguments[2][0] == '1';
  const KernelTable& table = kernels();
  // float32 kernels of the sets with AMX or bfloat16 dot products are those of avx512.
  const bool is_avx512 = std::strncmp(table.isa, "avx512", 6) == 0;
  const bool dots = multiplies_bytes(is_avx512 ? "avx512" : table.isa), tiles = byte_tiles(table) != nullptr;
  byte_tiles(table);
  allow_byte_products(false);
  if (byte_tiles(table)) return 1;
  std::printf("%s dots=%d tiles=%d asked=%d\n", table.isa, dots, tiles, chosen::questions);
  return 0;
}
