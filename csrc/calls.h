// The short way of the usual call: calls.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_rnn {

// Adds run_layers and run_cell to the module.
void add_calls(pybind11::module_& module);

}  // namespace fused_rnn
