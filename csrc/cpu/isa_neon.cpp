// NEON of every 64-bit Arm processor: multiply-adds by one lane, conversions of float16.
#define FRNN_ISA isa_neon
#define FRNN_ISA_TEXT "neon"
#define FRNN_VECTOR_BYTES 16
#define FRNN_NEON
#include "isa_kernels.h"
