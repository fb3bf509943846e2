// persistent_backward with the kernels' full shapes: what a GPU gets, for the sizes it gets it for.
#define FRNN_ALL_REGISTERS
#include "persistent_backward.cpp"
