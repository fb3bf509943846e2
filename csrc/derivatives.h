// The operators of csrc/derivatives.cpp, and the way to them through the dispatcher.
#pragma once

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

// grad_input, grad_h0, grad_c0, and of each group of rows grad_params
using RnnBackwardEach = BackwardResult(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                       const OptionalTensor& grad_c_n, const Tensor& input, const OptionalTensor& h0,
                                       const OptionalTensor& c0, at::TensorList params, const Tensor& output,
                                       const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                                       Integers settings, Numbers numbers, const c10::List<bool>& needs,
                                       int64_t groups);

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

}  // namespace fused_rnn
