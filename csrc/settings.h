// The settings of a call, and the tensors that steer it: each a record that is written down here and in
// fused_rnn/settings.py, and nowhere else. An operator's schema has them as lists; restore() and its inverse are the
// way between. What gets a setting from the call to where it acts is the record.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/plan.h"
#include "problem.h"

namespace fused_rnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Stands last in the list of integers, and so in every compiled or exported program: what PyTorch's caches and files
// keep of an operator is its name and its arguments, and calls of another version must not look the same. To be raised
// with every change of a schema, or of what an operator computes (tests/test_operators.py).
inline constexpr int64_t operators_version = 8;

struct Settings {
  CellKind kind = CellKind::lstm;
  bool has_biases = true;
  int64_t num_layers = 1;
  bool bidirectional = false;
  bool batch_first = false;  // of the input and the output
  bool recompute = false;    // a backward pass computes the gates again
  bool plain = true;         // nothing within
  Within within;

  int64_t num_directions() const { return bidirectional ? 2 : 1; }

  using Integers = c10::SmallVector<int64_t, 8>;
  using Numbers = c10::SmallVector<double, 1>;

  // Of a plain cell; those of others are made in Python.
  Integers integers() const {
    Integers list;
    each_integer(*this, [&](const char*, const auto& field, int64_t, int64_t) { list.push_back(int64_t(field)); });
    list.push_back(operators_version);
    return list;
  }

  static Settings restore(at::IntArrayRef integers, at::ArrayRef<double> numbers) {
    Settings settings;
    TORCH_CHECK(!integers.empty() && integers.back() == operators_version, "settings: expected those of version ",
                operators_version, " of the operators, got ", integers,
                ": compile or export the model again with this version of fused_rnn");
    integers = integers.slice(0, integers.size() - 1);
    size_t next = 0;
    const auto read = [&](const char* name, auto& field, int64_t least, int64_t most) {
      TORCH_CHECK(next < integers.size(), "settings: ", name, " is missing, got ", integers.size(), " values");
      const int64_t value = integers[next++];
      TORCH_CHECK(value >= least && value <= most, name, ": expected ", least, " to ", most, ", got ", value);
      field = static_cast<std::remove_reference_t<decltype(field)>>(value);
    };
    each_integer(settings, read);
    TORCH_CHECK(is_known(settings.kind), "kind: expected 0 to 3 or that of a loaded cell, got ",
                int64_t(settings.kind));
    settings.plain = numbers.empty();
    size_t next_number = 0;
    if (!settings.plain) {
      each_integer_within(settings.within, read);
      each_number_within(settings.within, [&](const char* name, double& field, double most) {
        TORCH_CHECK(next_number < numbers.size(), "numbers: ", name, " is missing, got ", numbers.size(), " values");
        field = numbers[next_number++];
        TORCH_CHECK(field >= 0 && field <= most, name, ": expected 0 to ", most, ", got ", field);
      });
      // In an exported program, where no list is empty (fused_rnn/ops.py).
      settings.plain = lists_of(settings.within) == lists_of(Within());
    }
    TORCH_CHECK(next == integers.size(), "settings: expected ", next, " values, got ", integers.size());
    TORCH_CHECK(next_number == numbers.size(), "numbers: expected ", next_number, ", got ", numbers.size());
    return settings;
  }

  // Makes lists of a plain cell ask for the states of every step, too.
  static void return_states(Integers& integers, Numbers& numbers) {
    Within within;
    within.return_states = true;
    const auto [of_within, numbers_of_within] = lists_of(within);
    integers.pop_back();  // the version, which stands last
    integers.append(of_within.begin(), of_within.end());
    integers.push_back(operators_version);
    numbers.append(numbers_of_within.begin(), numbers_of_within.end());
  }
  // Whether the lists of a call do so, without the time that restore() takes.
  static bool returns_states(at::IntArrayRef integers, at::ArrayRef<double> numbers) {
    return !numbers.empty() && integers.size() >= 2 && integers[integers.size() - 2] != 0;
  }

  // Names of the settings of a plain cell in the order of the list of integers.
  static std::vector<std::string> integer_names() {
    std::vector<std::string> names;
    each_integer(Settings(), [&](const char* name, const auto&, int64_t, int64_t) { names.emplace_back(name); });
    return names;
  }

 private:
  static std::pair<c10::SmallVector<int64_t, 10>, c10::SmallVector<double, 4>> lists_of(Within within) {
    std::pair<c10::SmallVector<int64_t, 10>, c10::SmallVector<double, 4>> lists;
    each_integer_within(within,
                        [&](const char*, auto field, int64_t, int64_t) { lists.first.push_back(int64_t(field)); });
    each_number_within(within, [&](const char*, double number, double) { lists.second.push_back(number); });
    return lists;
  }

  // A stack has parameters for each layer, so no layer beyond this can be; nor a head.
  static constexpr int64_t most_layers = int64_t(1) << 31;

  // visit(name, field, least, most) for each, in the order of fused_rnn/settings.py.
  template <class Self, class Visit>
  static void each_integer(Self&& self, Visit visit) {
    visit("kind", self.kind, 0, std::numeric_limits<int32_t>::max());
    visit("bias", self.has_biases, 0, 1);
    visit("num_layers", self.num_layers, 1, most_layers);
    visit("bidirectional", self.bidirectional, 0, 1);
    visit("batch_first", self.batch_first, 0, 1);
    visit("recompute", self.recompute, 0, 1);
  }

  template <class Visit>
  static void each_integer_within(Within& within, Visit visit) {
    visit("activation", within.activation, 0, 5);
    visit("recurrent_activation", within.recurrent_activation, 0, 5);
    visit("reset_after", within.reset_after, 0, 1);
    visit("peephole", within.peephole, 0, 1);
    visit("coupled_gates", within.coupled_gates, 0, 1);
    visit("num_heads", within.num_heads, 1, most_layers);
    visit("layer_norm", within.layer_norm, 0, 1);
    visit("bptt_steps", within.bptt_steps, 0, std::numeric_limits<int64_t>::max());
    visit("reset_state", within.reset_state, 0, 1);
    visit("return_states", within.return_states, 0, 1);  // the last: returns_states()
  }

  template <class Visit>
  static void each_number_within(Within& within, Visit visit) {
    constexpr double any = std::numeric_limits<double>::infinity();
    visit("cell_clip", within.cell_clip, any);
    visit("recurrent_grad_clip", within.recurrent_grad_clip, any);
    visit("zoneout", within.zoneout, 1.0);
    visit("zoneout_cell", within.zoneout_cell, 1.0);
  }
};

// Tensors without a gradient that steer a call of a stack; letters as in problem.h.
struct Controls {
  OptionalTensor batch_sizes;  // int64 (T) on the CPU: the batch is packed
  OptionalTensor mask;         // bool (T, B): which steps are live
  // Factors of the outputs of all layers but the last: (L - 1, T, B, D * P) or (L - 1, N, D * P).
  OptionalTensor dropout;
  OptionalTensor reset;              // bool (T, B): rows that begin anew before a step; in the reverse direction after
  OptionalTensor recurrent_dropout;  // (L * D, B, P): factors of h before w_hh
  // uint8 (L * D, N, ceil(size / 8)), bit u % 8 of byte u / 8 for unit u: which keep the state before the step.
  OptionalTensor zoneout;       // of h, size P
  OptionalTensor zoneout_cell;  // of c, size H

  static constexpr size_t count = 7;

  // None for a call without any; else one for each field, (0,) for one that there is not. (PyTorch's tracer knows no
  // list of optional tensors.)
  static Controls restore(at::TensorList list) {
    if (list.empty()) return {};
    TORCH_CHECK(list.size() == count, "controls: expected ", count, " tensors or none, got ", list.size());
    const auto given = [&](size_t i) {
      return list[i].dim() == 1 && list[i].size(0) == 0 ? std::nullopt : OptionalTensor(list[i]);
    };
    return {given(0), given(1), given(2), given(3), given(4), given(5), given(6)};
  }
};

}  // namespace fused_rnn
