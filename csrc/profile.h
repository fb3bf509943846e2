// Named ranges of layers for PyTorch's profiler, in its traces and, under torch.autograd.profiler.emit_nvtx, in those
// of a CUDA profiler.
#pragma once

#include <ATen/record_function.h>

#include <iterator>
#include <optional>
#include <string>
#include <utility>

#include "problem.h"

namespace fused_rnn {

// "fused_rnn LSTM backward T40 B64 I256 H512 float32"; with a projection also its size, and "x2" for two directions.
inline std::string describe_layer(const LayerSizes& sizes, const Steps& steps, bool backward) {
  const char* cells[] = {"RNN_TANH", "RNN_RELU", "LSTM", "GRU"};
  const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  const auto size = [](const char* letter, int64_t value) { return std::string(" ") + letter + std::to_string(value); };
  const char* cell = size_t(sizes.kind) < std::size(cells) ? cells[int(sizes.kind)] : "CUSTOM";
  std::string text = std::string("fused_rnn ") + cell + (backward ? " backward" : " forward");
  text += size("T", steps.T) + size("B", steps.B) + size("I", sizes.input_size) + size("H", sizes.hidden_size);
  if (sizes.state_size != sizes.hidden_size) text += size("P", sizes.state_size);
  if (sizes.num_directions > 1) text += " x2";
  return text + " " + dtypes[int(sizes.dtype)];
}

// A range that ends with the object. describe() makes its name, and is called only while something records.
class Range {
 public:
  template <class Describe>
  explicit Range(const Describe& describe) {
    auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE);
    if (!callbacks) return;
    function_.emplace(std::move(*callbacks));
    if (function_->isActive()) function_->before(describe());
  }

 private:
  std::optional<at::RecordFunction> function_;
};

}  // namespace fused_rnn
