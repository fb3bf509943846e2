// Models of one shape, each with parameters of its own, in one call: the operators rnn_forward_stacked and
// rnn_backward_stacked, which vmap over parameters is. All tensors have the models as their first dimension. Small
// models run side by side, one on each thread; large ones one after the other, each on all.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/team.h"
#include "ops.h"

namespace fused_rnn {

namespace {

// A model of at most so many multiply-adds has a thread to itself: its own threads would wait for each other too often.
constexpr int64_t most_work_of_a_thread = int64_t(1) << 26;

// The tensors of each model. (0,) and none are those of all.
class OfModels {
 public:
  explicit OfModels(int64_t count) : count_(count) {}

  Tensor operator()(const Tensor& t, int64_t model, const char* name) const {
    if (t.dim() == 1 && t.size(0) == 0) return t;
    TORCH_CHECK(t.dim() >= 1 && t.size(0) == count_, name, ": expected those of ", count_, " models, got ", t.sizes());
    return t.select(0, model);
  }
  OptionalTensor operator()(const OptionalTensor& t, int64_t model, const char* name) const {
    return t ? OptionalTensor((*this)(*t, model, name)) : std::nullopt;
  }
  std::vector<Tensor> operator()(at::TensorList list, int64_t model, const char* name) const {
    std::vector<Tensor> result;
    for (const Tensor& t : list) result.push_back((*this)(t, model, name));
    return result;
  }

 private:
  int64_t count_;
};

template <class F>
void for_models(int64_t count, const Tensor& input, at::TensorList params, F f) {
  int64_t weights = 0;
  for (const Tensor& t : params) weights += t.numel();
  // Of all models, of which each has its share of both.
  const double work = double(weights) * double(input.numel() / input.size(-1)) / double(count) / double(count);
  const bool apart =
      count > 1 && work < double(most_work_of_a_thread) && !team_is_late() && usable_threads(at::get_num_threads()) > 1;
  if (apart) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  } else {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
}

Tensor stacked(const std::vector<Tensor>& results) {
  const Tensor& first = results[0];
  return first.dim() == 1 && first.size(0) == 0 ? at::empty({0}, first.options()) : at::stack(results);
}

int64_t count_of(const Tensor& input) {
  TORCH_CHECK(input.dim() >= 1 && input.size(0) >= 1, "input: expected that of at least 1 model, got ", input.sizes());
  TORCH_CHECK(input.dim() >= 2 && input.size(-1) >= 1, "input: expected at least 1 feature, got ", input.sizes());
  return input.size(0);
}

const c10::DispatchKeySet& cpu_kernels() {
  static const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return keys;
}

ForwardResult rnn_forward_stacked(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                  at::TensorList params, Integers settings, Numbers numbers, bool save) {
  const int64_t count = count_of(input);
  const OfModels of(count);
  struct Model {
    Tensor input;
    OptionalTensor h0, c0;
    std::vector<Tensor> params;
  };
  std::vector<Model> models;
  for (int64_t i = 0; i < count; ++i)
    models.push_back({of(input, i, "input"), of(h0, i, "h0"), of(c0, i, "c0"), of(params, i, "params")});
  std::vector<Tensor> results[6];
  for (auto& list : results) list.resize(size_t(count));
  for_models(count, input, params, [&](int64_t i) {
    const Model& m = models[size_t(i)];
    auto [output, h_n, c_n, gates, cells, hidden] = rnn_forward_operator().redispatch(
        cpu_kernels(), m.input, m.h0, m.c0, m.params, at::TensorList(), settings, numbers, save);
    Tensor found[] = {output, h_n, c_n, gates, cells, hidden};
    for (size_t k = 0; k < 6; ++k) results[k][size_t(i)] = std::move(found[k]);
  });
  return {stacked(results[0]), stacked(results[1]), stacked(results[2]),
          stacked(results[3]), stacked(results[4]), stacked(results[5])};
}

BackwardResult rnn_backward_stacked(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                    const OptionalTensor& grad_c_n, const Tensor& input, const OptionalTensor& h0,
                                    const OptionalTensor& c0, at::TensorList params, const Tensor& output,
                                    const Tensor& gates, const Tensor& cells, const Tensor& hidden, Integers settings,
                                    Numbers numbers, const c10::List<bool>& needs) {
  const int64_t count = count_of(input);
  const OfModels of(count);
  struct Model {
    OptionalTensor grad_output, grad_h_n, grad_c_n;
    Tensor input;
    OptionalTensor h0, c0;
    std::vector<Tensor> params;
    Tensor output, gates, cells, hidden;
  };
  std::vector<Model> models;
  for (int64_t i = 0; i < count; ++i)
    models.push_back({of(grad_output, i, "grad_output"), of(grad_h_n, i, "grad_h_n"), of(grad_c_n, i, "grad_c_n"),
                      of(input, i, "input"), of(h0, i, "h0"), of(c0, i, "c0"), of(params, i, "params"),
                      of(output, i, "output"), of(gates, i, "gates"), of(cells, i, "cells"), of(hidden, i, "hidden")});
  std::vector<std::vector<Tensor>> results(3 + params.size(), std::vector<Tensor>(size_t(count)));
  for_models(count, input, params, [&](int64_t i) {
    const Model& m = models[size_t(i)];
    auto [grad_input, grad_h0, grad_c0, grad_params] = rnn_backward_operator().redispatch(
        cpu_kernels(), m.grad_output, m.grad_h_n, m.grad_c_n, std::nullopt, std::nullopt, m.input, m.h0, m.c0, m.params,
        at::TensorList(), m.output, m.gates, m.cells, m.hidden, settings, numbers, needs, false);
    results[0][size_t(i)] = grad_input;
    results[1][size_t(i)] = grad_h0;
    results[2][size_t(i)] = grad_c0;
    for (size_t k = 0; k < grad_params.size(); ++k) results[3 + k][size_t(i)] = grad_params[k];
  });
  std::vector<Tensor> grad_params;
  for (size_t k = 3; k < results.size(); ++k) grad_params.push_back(stacked(results[k]));
  return {stacked(results[0]), stacked(results[1]), stacked(results[2]), grad_params};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "rnn_forward_stacked(Tensor input, Tensor? h0, Tensor? c0, Tensor[] params, int[] settings, float[] numbers, "
      "bool "
      "save) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor hidden)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rnn_backward_stacked(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? h0, Tensor? "
      "c0, Tensor[] params, Tensor output, Tensor gates, Tensor cells, Tensor hidden, int[] settings, float[] numbers, "
      "bool[] needs) -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_params)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("rnn_forward_stacked", &rnn_forward_stacked);
  m.impl("rnn_backward_stacked", &rnn_backward_stacked);
}

}  // namespace fused_rnn
