// The short way of the usual call from Python to an operator: an ordinary tensor of three dimensions (two for a cell),
// eager, nothing that looks at calls from Python. torch.ops reads every argument by its schema and passes boxed values
// on, which takes longer than a small call computes.
#include "calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "cpu/plan.h"
#include "ops.h"

namespace py = pybind11;

namespace fused_rnn {

namespace {

// Arguments read from Python, as far as they are of the usual kind; `usual` turns false where one is not.
class Arguments {
 public:
  explicit Arguments(PyObject* const* args) : args_(args) {
    usual = !at::impl::torch_function_mode_enabled() && !torch_func_is_active() && !torch::jit::tracer::isTracing() &&
            !at::autocast::is_autocast_enabled(at::kCPU);
  }

  int64_t integer(int i) {
    const int64_t value = PyLong_AsLongLong(args_[i]);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      usual = false;
    }
    return value;
  }
  bool boolean(int i) const { return args_[i] == Py_True; }

  // A tensor of the CPU, of torch's own class, without a forward-mode tangent.
  Tensor tensor(PyObject* object) {
    if (!THPVariable_CheckExact(object)) {
      usual = false;
      return {};
    }
    const Tensor& t = THPVariable_Unpack(object);
    if (!t.is_cpu() || t.layout() != at::kStrided || t._fw_grad(0).defined()) usual = false;
    return t;
  }
  Tensor tensor(int i) { return tensor(args_[i]); }

  // None, h, or the tuple (h, c) of a cell with a cell state.
  void states(int i, bool has_cell, OptionalTensor& h, OptionalTensor& c) {
    PyObject* object = args_[i];
    if (object == Py_None) return;
    if (!has_cell) {
      h = tensor(object);
    } else if (PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2) {
      h = tensor(PyTuple_GET_ITEM(object, 0));
      c = tensor(PyTuple_GET_ITEM(object, 1));
    } else {
      usual = false;
    }
  }

  std::vector<Tensor> list(int i) {
    std::vector<Tensor> result;
    if (!PyList_CheckExact(args_[i])) {
      usual = false;
      return result;
    }
    const Py_ssize_t count = PyList_GET_SIZE(args_[i]);
    result.reserve(count);
    for (Py_ssize_t k = 0; k < count && usual; ++k) result.push_back(tensor(PyList_GET_ITEM(args_[i], k)));
    return result;
  }

  bool usual;

 private:
  PyObject* const* args_;
};

bool has_kernels_for(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

PyObject* tuple_of(std::initializer_list<Tensor*> tensors) {
  PyObject* result = PyTuple_New(Py_ssize_t(tensors.size()));
  if (!result) return nullptr;
  Py_ssize_t i = 0;
  for (Tensor* t : tensors) {
    PyObject* wrapped = t ? THPVariable_Wrap(std::move(*t)) : Py_NewRef(Py_None);
    if (!wrapped) {
      Py_DECREF(result);
      return nullptr;
    }
    PyTuple_SET_ITEM(result, i++, wrapped);
  }
  return result;
}

PyObject* decline() { Py_RETURN_NONE; }

PyObject* run_layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12, "run_layers: expected 12 arguments, got ", count);
  Arguments read(args);
  const int64_t kind = read.integer(0), I = read.integer(1), H = read.integer(2), P = read.integer(3);
  const bool has_biases = read.boolean(4), bidirectional = read.boolean(6), batch_first = read.boolean(7);
  const int64_t num_layers = read.integer(5);
  const bool recompute = read.boolean(8);
  const Tensor input = read.tensor(9);
  if (!read.usual || input.dim() != 3 || input.size(2) != I || !has_kernels_for(input.scalar_type())) return decline();
  OptionalTensor h, c;
  read.states(10, has_cell_state(CellKind(kind)), h, c);
  const std::vector<Tensor> params = read.list(11);
  if (!read.usual || params.size() < 2 || params[1].dim() != 2 || params[1].size(1) != P ||
      params[1].size(0) != gate_count(CellKind(kind)) * H)
    return decline();
  try {
    ForwardResult result;
    {
      py::gil_scoped_release no_gil;
      result = rnn_forward_operator().call(input, h, c, params, {}, std::nullopt, kind, has_biases, num_layers,
                                           bidirectional, batch_first, false, recompute, std::nullopt);
    }
    return tuple_of({&std::get<0>(result), &std::get<1>(result), &std::get<2>(result)});
  } catch (const c10::Error&) {
    return decline();  // the checks of the long way say it in the caller's words
  }
  END_HANDLE_TH_ERRORS
}

PyObject* run_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "run_cell: expected 6 arguments, got ", count);
  Arguments read(args);
  const int64_t kind = read.integer(0), I = read.integer(1), H = read.integer(2);
  const Tensor input = read.tensor(3);
  if (!read.usual || input.dim() != 2 || input.size(1) != I || I < 1 || H < 1 || !has_kernels_for(input.scalar_type()))
    return decline();
  const bool has_cell = has_cell_state(CellKind(kind));
  OptionalTensor h, c;
  read.states(4, has_cell, h, c);
  const std::vector<Tensor> params = read.list(5);
  if (!read.usual || (params.size() != 2 && params.size() != 4)) return decline();
  if (!h) {
    h = at::zeros({input.size(0), H}, input.options());
    if (has_cell) c = h;
  }
  if (h->dim() != 2 || h->size(1) != H) return decline();
  const bool has_biases = params.size() == 4;
  try {
    CellResult result;
    {
      py::gil_scoped_release no_gil;
      result = cell_forward_operator().call(input, *h, c, params[0], params[1],
                                            has_biases ? OptionalTensor(params[2]) : std::nullopt,
                                            has_biases ? OptionalTensor(params[3]) : std::nullopt, kind, false);
    }
    return tuple_of({&std::get<0>(result), has_cell ? &std::get<1>(result) : nullptr});
  } catch (const c10::Error&) {
    return decline();
  }
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"run_layers", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_layers)), METH_FASTCALL,
     "run_layers(kind, input_size, hidden_size, state_size, has_biases, num_layers, bidirectional, batch_first, "
     "recompute, "
     "input, hx, params): (output, h_n, c_n), or None where the call is not of the usual kind, or not valid."},
    {"run_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_cell)), METH_FASTCALL,
     "run_cell(kind, input_size, hidden_size, input, hx, params): (h, c), c None without a cell state; or None where "
     "the call is not of the usual kind, or not valid."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_calls(py::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fused_rnn
