// NEON with the bfloat16 dot product (FEAT_BF16): only the bfloat16 kernels differ from NEON's.
#define FRNN_ISA isa_neon_bf16
#define FRNN_ISA_TEXT "neon_bf16"
#define FRNN_VECTOR_BYTES 16
#define FRNN_NEON
#define FRNN_BFLOAT16_ONLY
#define FRNN_BASE_ISA isa_neon
#include "isa_kernels.h"
