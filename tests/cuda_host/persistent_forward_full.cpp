// persistent_forward with the kernels' full shapes: what a GPU gets, for the sizes it gets it for.
#define FRNN_ALL_REGISTERS
#include "persistent_forward.cpp"
