// AVX-512 with the bfloat16 dot product: only the bfloat16 kernels differ from AVX-512's.
#define FRNN_ISA isa_avx512_bf16
#define FRNN_ISA_TEXT "avx512_bf16"
#define FRNN_VECTOR_BYTES 64
#define FRNN_BFLOAT16_ONLY
#define FRNN_BASE_ISA isa_avx512
#include "isa_kernels.h"
