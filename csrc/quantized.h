// What others ask of layers whose matrices are stored in fewer bits (quantized.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

namespace fused_rnn {

struct Stack;

// An error where a matrix of int8 has a -128: two products with it do not fit the 16 bits in which some processors sum
// them. Reads all of them.
void check_int8_values(const Stack& stack);

// Bytes of the packed weights that the operator rnn_quantized keeps from call to call.
size_t quantized_bytes_held();
// Away with those of the parameters of which this is the first, and of all that were freed.
void forget_quantized(const at::Tensor& first_param);
// Away with all of them.
void clear_quantized();

}  // namespace fused_rnn
