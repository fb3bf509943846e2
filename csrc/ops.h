// The operators' C++ signatures, and the way to them through the dispatcher, on which autograd, modes, tracing and
// torch.compile see every call. Schemas stand in ops.cpp.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "settings.h"

namespace fused_rnn {

// output, h_n, c_n, gates, cells, hidden
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// grad_input, grad_h0, grad_c0, grad_params
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;
// h_next, c_next, gates, cells
using CellResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

using Integers = at::IntArrayRef;      // Settings::integers()
using Numbers = at::ArrayRef<double>;  // Settings::numbers()

using RnnForward = ForwardResult(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                 at::TensorList params, at::TensorList controls, Integers settings, Numbers numbers,
                                 bool save);
using RnnBackward = BackwardResult(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                   const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells,
                                   const OptionalTensor& grad_hidden, const Tensor& input, const OptionalTensor& h0,
                                   const OptionalTensor& c0, at::TensorList params, at::TensorList controls,
                                   const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                                   Integers settings, Numbers numbers, const c10::List<bool>& needs, bool reuse_gates);
using CellForward = CellResult(const Tensor& input, const Tensor& h, const OptionalTensor& c, at::TensorList params,
                               Integers settings, Numbers numbers, bool save);
using CellBackward = BackwardResult(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& input,
                                    const Tensor& h, const OptionalTensor& c, at::TensorList params,
                                    const Tensor& gates, const Tensor& cells, Integers settings, Numbers numbers,
                                    const c10::List<bool>& needs);

template <class Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

inline const c10::TypedOperatorHandle<RnnForward>& rnn_forward_operator() {
  static const auto handle = operator_named<RnnForward>("fused_rnn::rnn_forward");
  return handle;
}
inline const c10::TypedOperatorHandle<RnnBackward>& rnn_backward_operator() {
  static const auto handle = operator_named<RnnBackward>("fused_rnn::rnn_backward");
  return handle;
}
inline const c10::TypedOperatorHandle<CellForward>& cell_forward_operator() {
  static const auto handle = operator_named<CellForward>("fused_rnn::cell_forward");
  return handle;
}
inline const c10::TypedOperatorHandle<CellBackward>& cell_backward_operator() {
  static const auto handle = operator_named<CellBackward>("fused_rnn::cell_backward");
  return handle;
}

// at::empty, and at::zeros, for the CPU without the dispatcher, whose way a small call would notice.
inline Tensor make_empty(at::IntArrayRef shape, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(shape, options);
  return Tensor(at::detail::empty_cpu(shape, c10::typeMetaToScalarType(options.dtype())));
}
inline Tensor make_zeros(at::IntArrayRef shape, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::zeros(shape, options);
  Tensor t = make_empty(shape, options);
  if (t.nbytes() > 32768) return t.zero_();  // on all threads
  if (t.nbytes() > 0) std::memset(t.mutable_data_ptr(), 0, t.nbytes());
  return t;
}

// Whether a transform of torch.func is at work.
inline bool torch_func_is_active() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

}  // namespace fused_rnn
