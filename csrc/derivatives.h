// The operators of csrc/derivatives.cpp, and the way to them through the dispatcher.
#pragma once

#include <ATen/ops/cat.h>

#include "ops.h"

namespace fused_rnn {

// output_t, h_n_t, c_n_t
using TangentResult = std::tuple<Tensor, Tensor, Tensor>;
// the same, and grad_input_t, grad_h0_t, grad_c0_t, grad_params_t
using BackwardTangentResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

using RnnTangent = TangentResult(const OptionalTensor& input_t, const OptionalTensor& h0_t, const OptionalTensor& c0_t,
                                 at::TensorList params_t, const Tensor& input, const OptionalTensor& h0,
                                 const OptionalTensor& c0, at::TensorList params, at::TensorList controls,
                                 const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                                 Integers settings, Numbers numbers);
using RnnBackwardTangent = BackwardTangentResult(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const OptionalTensor& grad_output_t, const OptionalTensor& grad_h_n_t, const OptionalTensor& grad_c_n_t,
    const OptionalTensor& input_t, const OptionalTensor& h0_t, const OptionalTensor& c0_t, at::TensorList params_t,
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
    at::TensorList controls, const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
    Integers settings, Numbers numbers, const c10::List<bool>& needs);

inline const c10::TypedOperatorHandle<RnnTangent>& rnn_tangent_operator() {
  static const auto handle = operator_named<RnnTangent>("fused_rnn::rnn_tangent");
  return handle;
}
inline const c10::TypedOperatorHandle<RnnBackwardTangent>& rnn_backward_tangent_operator() {
  static const auto handle = operator_named<RnnBackwardTangent>("fused_rnn::rnn_backward_tangent");
  return handle;
}

// Whether they take such a call: in float32 or float64 on the CPU, dense, without options or a projection.
bool has_derivative_kernels(const Tensor& input, at::TensorList params, at::TensorList controls, Integers settings,
                            Numbers numbers);

// Gradients of the sums of steps (., grad_gates * H) as those of the rows of W_ih, or of W_hh. Those of a GRU are of
// x_n, r, z and W_hn h (cells/gru.h).
inline Tensor gradients_of_input(CellKind kind, const Tensor& sums) {
  if (kind != CellKind::gru) return sums;
  const int64_t H = sums.size(-1) / 4;
  return at::cat({sums.narrow(-1, H, 2 * H), sums.narrow(-1, 0, H)}, -1);
}
inline Tensor gradients_of_state(CellKind kind, const Tensor& sums) {
  const int64_t H = sums.size(-1) / 4;
  return kind == CellKind::gru ? sums.narrow(-1, H, 3 * H) : sums;
}

}  // namespace fused_rnn
