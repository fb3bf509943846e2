// The settings of a call, and the tensors that steer it: each a record that is written down here and in
// fused_rnn/settings.py, and nowhere else. An operator's schema has them as lists; restore() and its inverse are the
// way between. What gets a setting from the call to where it acts is the record.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string>
#include <vector>

#include "problem.h"

namespace fused_rnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Stands last in the list of integers, and so in every compiled or exported program: what PyTorch's caches and files
// keep of an operator is its name and its arguments, and calls of another version must not look the same. To be raised
// with every change of a schema, or of what an operator computes (tests/test_operators.py).
inline constexpr int64_t operators_version = 2;

struct Settings {
  CellKind kind = CellKind::lstm;
  bool has_biases = true;
  int64_t num_layers = 1;
  bool bidirectional = false;
  bool batch_first = false;  // of the input and the output
  bool recompute = false;    // a backward pass computes the gates again

  int64_t num_directions() const { return bidirectional ? 2 : 1; }

  using Integers = c10::SmallVector<int64_t, 8>;
  using Numbers = c10::SmallVector<double, 1>;

  Integers integers() const {
    Integers list;
    each_integer(*this, [&](const char*, const auto& field, int64_t, int64_t) { list.push_back(int64_t(field)); });
    list.push_back(operators_version);
    return list;
  }
  // No setting is a real number yet.
  Numbers numbers() const { return {}; }

  static Settings restore(at::IntArrayRef integers, at::ArrayRef<double> numbers) {
    Settings settings;
    size_t next = 0;
    TORCH_CHECK(!integers.empty() && integers.back() == operators_version, "settings: expected those of version ",
                operators_version, " of the operators, got ", integers,
                ": compile or export the model again with this version of fused_rnn");
    integers = integers.slice(0, integers.size() - 1);
    each_integer(settings, [&](const char* name, auto& field, int64_t least, int64_t most) {
      TORCH_CHECK(next < integers.size(), "settings: ", name, " is missing, got ", integers.size(), " values");
      const int64_t value = integers[next++];
      TORCH_CHECK(value >= least && value <= most, name, ": expected ", least, " to ", most, ", got ", value);
      field = static_cast<std::remove_reference_t<decltype(field)>>(value);
    });
    TORCH_CHECK(next == integers.size(), "settings: expected ", next, " values, got ", integers.size());
    TORCH_CHECK(numbers.empty(), "numbers: expected none, got ", numbers.size());
    return settings;
  }

  // Names of the settings in the order of the list of integers.
  static std::vector<std::string> integer_names() {
    std::vector<std::string> names;
    each_integer(Settings(), [&](const char* name, const auto&, int64_t, int64_t) { names.emplace_back(name); });
    return names;
  }

 private:
  // visit(name, field, least, most) for each, in the order of fused_rnn/settings.py.
  template <class Self, class Visit>
  static void each_integer(Self&& self, Visit visit) {
    // a stack has parameters for each layer, so no layer beyond this can be
    constexpr int64_t most_layers = int64_t(1) << 31;
    visit("kind", self.kind, 0, 3);
    visit("bias", self.has_biases, 0, 1);
    visit("num_layers", self.num_layers, 1, most_layers);
    visit("bidirectional", self.bidirectional, 0, 1);
    visit("batch_first", self.batch_first, 0, 1);
    visit("recompute", self.recompute, 0, 1);
  }
};

// Tensors without a gradient that steer a call of a stack; letters as in problem.h.
struct Controls {
  OptionalTensor batch_sizes;  // int64 (T) on the CPU: the batch is packed
  OptionalTensor mask;         // bool (T, B): which steps are live
  // Factors of the outputs of all layers but the last: (L - 1, T, B, D * P) or (L - 1, N, D * P).
  OptionalTensor dropout;

  static constexpr size_t count = 3;

  // None for a call without any; else one for each field, (0,) for one that there is not. (PyTorch's tracer knows no
  // list of optional tensors.)
  static Controls restore(at::TensorList list) {
    if (list.empty()) return {};
    TORCH_CHECK(list.size() == count, "controls: expected ", count, " tensors or none, got ", list.size());
    const auto given = [&](size_t i) {
      return list[i].dim() == 1 && list[i].size(0) == 0 ? std::nullopt : OptionalTensor(list[i]);
    };
    return {given(0), given(1), given(2)};
  }
};

}  // namespace fused_rnn
