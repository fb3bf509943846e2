#define FRNN_ISA isa_portable
#define FRNN_ISA_TEXT "portable"
#define FRNN_VECTOR_BYTES 16
#include "isa_kernels.h"
