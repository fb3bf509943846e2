#define FRNN_ISA isa_avx512
#define FRNN_ISA_TEXT "avx512"
#define FRNN_VECTOR_BYTES 64
#include "isa_kernels.h"
