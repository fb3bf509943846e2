#define FRNN_ISA isa_avx2
#define FRNN_ISA_TEXT "avx2"
#define FRNN_VECTOR_BYTES 32
#include "isa_kernels.h"
