// Stream and StreamPool as Python sees them: stream_bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_rnn {

// Adds PackedStack, pack_stack, StreamBase and StreamPoolBase to the module.
void add_streams(pybind11::module_& module);

}  // namespace fused_rnn
