// step with what nvcc made of the kernels: the file of environment variable FRNN_PTX.
#define FRNN_INTERPRETED
#include "ptx.h"
#include "step.cpp"
