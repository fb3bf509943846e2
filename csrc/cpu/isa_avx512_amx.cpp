// AVX-512 with AMX's matrix tiles: only the bfloat16 kernels differ from AVX-512's, and of those the products differ
// from the ones with dot products. Streams of int8 matrices are AVX-512's, with products of bytes on tiles from here.
#define FRNN_ISA isa_avx512_amx
#define FRNN_ISA_TEXT "avx512_amx"
#define FRNN_VECTOR_BYTES 64
#define FRNN_TILES
#define FRNN_BFLOAT16_ONLY
#define FRNN_BASE_ISA isa_avx512
#include "isa_kernels.h"
