// The short way of the usual call from Python to an operator: an ordinary tensor of three dimensions (two for a cell),
// eager, nothing that looks at calls from Python. torch.ops reads every argument by its schema and passes boxed values
// on, which takes longer than a small call computes.
#include "calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "cpu/plan.h"
#include "ops.h"

namespace py = pybind11;

namespace fused_rnn {

namespace {

// A record of fused_rnn.settings.Settings, as far as a call needs it here.
struct Record {
  int64_t input_size = 0, hidden_size = 0, state_size = 0;
  Settings::Integers integers;
  Settings::Numbers numbers;

  CellKind kind() const { return CellKind(integers[0]); }
  bool has_cell() const { return has_cell_state(kind()); }
  bool fits(const Tensor& w_hh) const {
    return hidden_size >= 1 && w_hh.dim() == 2 && w_hh.size(1) == state_size &&
           w_hh.size(0) == gate_count(kind()) * hidden_size;
  }
};

// Arguments read from Python, as far as they are of the usual kind; `usual` turns false where one is not.
class Arguments {
 public:
  Arguments() {
    usual = !at::impl::torch_function_mode_enabled() && !torch_func_is_active() && !torch::jit::tracer::isTracing() &&
            !at::autocast::is_autocast_enabled(at::kCPU);
  }

  // The tuple's first three items are sizes, the following those that an operator gets, the rest is Python's.
  Record settings(PyObject* tuple) {
    static const size_t count = Settings::integer_names().size();
    Record record;
    if (!PyTuple_Check(tuple) || size_t(PyTuple_GET_SIZE(tuple)) < 3 + count) {
      usual = false;
      record.integers = Settings().integers();
      return record;
    }
    const auto item = [&](size_t i) { return integer(PyTuple_GET_ITEM(tuple, Py_ssize_t(i))); };
    record.input_size = item(0);
    record.hidden_size = item(1);
    record.state_size = item(2);
    for (size_t i = 0; i < count; ++i) record.integers.push_back(item(3 + i));
    record.integers.push_back(operators_version);
    if (record.integers[0] < 0 || record.integers[0] > int64_t(CellKind::gru)) {
      usual = false;
      record.integers[0] = 0;
    }
    return record;
  }

  int64_t integer(PyObject* object) {
    if (object == Py_True) return 1;
    if (object == Py_False) return 0;
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      usual = false;
    }
    return value;
  }

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

  // None, h, or the tuple (h, c) of a cell with a cell state.
  void states(PyObject* object, bool has_cell, OptionalTensor& h, OptionalTensor& c) {
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

  std::vector<Tensor> list(PyObject* object) {
    std::vector<Tensor> result;
    if (!PyList_CheckExact(object)) {
      usual = false;
      return result;
    }
    const Py_ssize_t count = PyList_GET_SIZE(object);
    result.reserve(count);
    for (Py_ssize_t k = 0; k < count && usual; ++k) result.push_back(tensor(PyList_GET_ITEM(object, k)));
    return result;
  }

  bool usual;
};

// The operators' Autograd kernels have nothing to do for a call of the usual kind that is not recorded.
struct BelowAutograd {
  BelowAutograd() {
    if (!at::GradMode::is_enabled()) guard.emplace();
  }
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
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
  TORCH_CHECK_TYPE(count == 4 || count == 5, "run_layers: expected 4 or 5 arguments, got ", count);
  Arguments read;
  Record record = read.settings(args[0]);
  const bool returns_states = count == 5 && args[4] == Py_True;
  if (returns_states) Settings::return_states(record.integers, record.numbers);
  const Tensor input = read.tensor(args[1]);
  if (!read.usual || input.dim() != 3 || input.size(2) != record.input_size || !has_kernels_for(input.scalar_type()))
    return decline();
  OptionalTensor h, c;
  read.states(args[2], record.has_cell(), h, c);
  const std::vector<Tensor> params = read.list(args[3]);
  if (!read.usual || params.size() < 2 || !record.fits(params[1])) return decline();
  try {
    ForwardResult result;
    {
      py::gil_scoped_release no_gil;
      const BelowAutograd below_autograd;
      result = rnn_forward_operator().call(input, h, c, params, {}, record.integers, record.numbers, false);
    }
    auto& [output, h_n, c_n, gates, cells, hidden] = result;
    if (returns_states) return tuple_of({&output, &h_n, &c_n, &cells, &hidden});
    return tuple_of({&output, &h_n, &c_n});
  } catch (const c10::Error&) {
    return decline();  // the checks of the long way say it in the caller's words
  }
  END_HANDLE_TH_ERRORS
}

PyObject* run_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "run_cell: expected 4 arguments, got ", count);
  Arguments read;
  const Record record = read.settings(args[0]);
  const Tensor input = read.tensor(args[1]);
  if (!read.usual || input.dim() != 2 || input.size(1) != record.input_size || !has_kernels_for(input.scalar_type()))
    return decline();
  const bool has_cell = record.has_cell();
  OptionalTensor h, c;
  read.states(args[2], has_cell, h, c);
  const std::vector<Tensor> params = read.list(args[3]);
  if (!read.usual || params.size() < 2 || !record.fits(params[1])) return decline();
  if (!h) {
    h = make_zeros({input.size(0), record.state_size}, input.options());
    if (has_cell) c = h;
  }
  if (h->dim() != 2) return decline();
  try {
    CellResult result;
    {
      py::gil_scoped_release no_gil;
      const BelowAutograd below_autograd;
      result = cell_forward_operator().call(input, *h, c, params, record.integers, record.numbers, false);
    }
    return tuple_of({&std::get<0>(result), has_cell ? &std::get<1>(result) : nullptr});
  } catch (const c10::Error&) {
    return decline();
  }
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"run_layers", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_layers)), METH_FASTCALL,
     "run_layers(settings, input, hx, params, return_states=False): (output, h_n, c_n) and, with return_states, cells "
     "and hidden; or None where the call is not of the usual kind, or not valid."},
    {"run_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_cell)), METH_FASTCALL,
     "run_cell(settings, input, hx, params): (h, c), c None without a cell state; or None where the call is not of the "
     "usual kind, or not valid."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_calls(py::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fused_rnn
