// Stream and StreamPool (fused_rnn/stream.py) over csrc/stream/stack.h. A step of the usual kind is read here from the
// tensor or array as it stands and computed at once: no dispatcher, no allocation. Whatever is not usual, or not valid,
// goes to the object's own _long_step in Python, which says what is wrong or calls again with what is usual.
#include "stream_bindings.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "operators.h"
#include "quantized.h"
#include "stream/stack.h"

namespace py = pybind11;

namespace fused_rnn {

namespace {

// Multiply-adds of a call from which on the interpreter's lock is released for it. Below, a call takes a few
// microseconds, and threads that hand the lock to each other for that long wait for it longer than they compute.
constexpr int64_t least_work_without_lock = int64_t(1) << 18;

// Packed weights, which streams of the same weights share.
struct Packed {
  explicit Packed(const std::vector<LayerForward>& layers)
      : stack(PackedStack::create(layers.data(), int64_t(layers.size()))), sizes(layers.front().sizes) {
    TORCH_CHECK(stack, "fused_rnn: out of memory for packed weights");
    num_layers = int64_t(layers.size());
  }
  ~Packed() { PackedStack::destroy(stack); }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  PackedStack* stack;
  LayerSizes sizes;  // of the lowest layer
  int64_t num_layers = 0;
};

using PackedPtr = std::shared_ptr<Packed>;

// like: (1, 1, I), of the dtype of all but matrices that are stored in fewer bits; params, integers, numbers: as the
// operators take them (ops.h).
PackedPtr pack_stack(const Tensor& like, const std::vector<Tensor>& params, const std::vector<int64_t>& integers,
                     const std::vector<double>& numbers) {
  TORCH_CHECK(like.device().is_cpu(), "like: expected a tensor of the CPU, got one on ", like.device());
  Stack stack(like, {}, {}, params, Controls(), Settings::restore(integers, numbers), Takes{true});
  TORCH_CHECK(stack.D == 1, "settings: expected one direction");
  TORCH_CHECK(like.scalar_type() != at::kHalf, "like: expected float32, float64 or bfloat16, got ", like.scalar_type());
  TORCH_CHECK(!is_custom(stack.kind()), "settings: expected no custom cell");
  check_int8_values(stack);
  stack.fit_heads(kernels().vector_bytes / int64_t(c10::elementSize(accumulation_dtype(like))));
  std::vector<LayerForward> layers(size_t(stack.num_layers()));
  for (int64_t l = 0; l < stack.num_layers(); ++l) {
    LayerForward& layer = layers[size_t(l)];
    layer.sizes = stack.layer_sizes(l);
    layer.direction[0].weights = stack.weights(l, 0);
    layer.inference = true;
    stack.put_options(layer);
  }
  const py::gil_scoped_release no_gil;
  return std::make_shared<Packed>(layers);
}

at::ScalarType scalar_type(DType dtype) {
  return dtype == DType::float64 ? at::kDouble : dtype == DType::bfloat16 ? at::kBFloat16 : at::kFloat;
}

// What an object of either type has beside its Python attributes.
struct Held {
  PackedPtr packed;
  StackStates* states = nullptr;
  int64_t slots = 0;
  int64_t I = 0, P = 0, C = 0;  // features of x, of h, and of all private states
  at::ScalarType dtype = at::kFloat;
  char format = 0;  // of an array's elements; 0: arrays have no such
  size_t bytes = 0;
  Tensor output;  // (slots, P)
  // The same as Python has it; array: null where there is none. views: its first n rows, once they were asked for.
  PyObject* tensor = nullptr;
  PyObject* array = nullptr;
  std::vector<PyObject*> tensor_views, array_views;
  std::vector<uint8_t> open;  // of a pool: which slots are
  std::vector<int64_t> chosen;
  std::vector<uint64_t> last_call;  // in which a slot was chosen
  uint64_t calls = 0;

  ~Held() {
    StackStates::destroy(states);
    Py_XDECREF(tensor);
    Py_XDECREF(array);
    for (PyObject* view : tensor_views) Py_XDECREF(view);
    for (PyObject* view : array_views) Py_XDECREF(view);
  }
};

struct Object {
  PyObject_HEAD Held* held;  // null until _open()
};

Held& held_of(PyObject* self) {
  Held* held = reinterpret_cast<Object*>(self)->held;
  TORCH_CHECK(held, "Stream: expected an object whose constructor ran");
  return *held;
}

// Has the states of an object for one call.
class InUse {
 public:
  explicit InUse(StackStates& states) : states_(states) {
    TORCH_CHECK(states.enter(),
                "Stream: expected to be used by one thread at a time, got a call while another thread is in one; make "
                "a Stream for each thread, which share their weights");
  }
  ~InUse() { states_.leave(); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  StackStates& states_;
};

// Whether it is a plain tensor of so many dimensions, of the states' dtype, on the CPU, whose features stand side by
// side and want no gradient.
bool is_usual(const Tensor& t, const Held& held, int64_t dimensions, int64_t columns) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  // Nothing that PyTorch sees calls by: transforms, lazy negation, tensors without memory.
  constexpr c10::DispatchKeySet usual =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView}) |
      c10::autocast_dispatch_keyset;
  if ((impl->key_set().raw_repr() & ~usual.raw_repr()) != 0 || impl->dim() != dimensions || !t.has_storage())
    return false;
  if (t.scalar_type() != held.dtype || t.size(-1) != columns) return false;
  if (impl->autograd_meta() && ((t.requires_grad() && at::GradMode::is_enabled()) || t._fw_grad(0).defined()))
    return false;
  return columns == 1 || t.stride(-1) == 1;
}

// Where its first element stands, if `elements` from there on are in its memory; else null.
char* memory_of(const Tensor& t, const Held& held, int64_t elements) {
  const c10::Storage& storage = t.unsafeGetTensorImpl()->unsafe_storage();
  if (size_t(t.storage_offset() + elements) * held.bytes > storage.nbytes()) return nullptr;
  return static_cast<char*>(storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get()) +
         size_t(t.storage_offset()) * held.bytes;
}

// The steps (T, slots, columns) of a tensor of the usual kind.
struct UsualSteps {
  char* data = nullptr;
  int64_t steps = 0, time_stride = 0, batch_stride = 0, elements = 0;

  bool read(PyObject* object, const Held& held, int64_t columns, bool writable) {
    if (!THPVariable_CheckExact(object)) return false;
    const Tensor& t = THPVariable_Unpack(object);
    if (!is_usual(t, held, 3, columns) || t.size(1) != held.slots) return false;
    steps = t.size(0);
    time_stride = t.stride(0);
    batch_stride = t.stride(1);
    if (steps < 1 || time_stride < 0 || batch_stride < 0) return false;
    if (writable && ((held.slots > 1 && batch_stride < columns) || (steps > 1 && time_stride < held.slots * columns)))
      return false;
    elements = (steps - 1) * time_stride + (held.slots - 1) * batch_stride + columns;
    data = memory_of(t, held, elements);
    return data != nullptr;
  }

  bool overlaps(const UsualSteps& other, size_t bytes) const {
    return data < other.data + other.elements * int64_t(bytes) && other.data < data + elements * int64_t(bytes);
  }
};

// A matrix of rows as a caller gave it: a tensor, or an object with a buffer.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, stride = 0;
  Py_buffer buffer{};
  bool is_array = false;

  Matrix() = default;
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  ~Matrix() {
    if (is_array) PyBuffer_Release(&buffer);
  }

  // False: it is of another kind, dtype or size, or what its sizes speak of is not there as it stands.
  bool read(PyObject* object, const Held& held, int64_t columns, bool writable) {
    return THPVariable_CheckExact(object) ? read_tensor(THPVariable_Unpack(object), held, columns, writable)
                                          : read_array(object, held, columns, writable);
  }

  bool overlaps(const Matrix& other, int64_t columns, int64_t other_columns, size_t bytes) const {
    const Range own = range(columns, bytes), its = other.range(other_columns, bytes);
    return own.begin < its.end && its.begin < own.end;
  }

 private:
  struct Range {
    const char *begin, *end;
  };
  Range range(int64_t columns, size_t bytes) const {
    const char* first = static_cast<const char*>(data);
    const char* last = first + (rows - 1) * stride * int64_t(bytes);
    return {std::min(first, last), std::max(first, last) + columns * int64_t(bytes)};
  }

  bool read_tensor(const Tensor& t, const Held& held, int64_t columns, bool writable) {
    if (!is_usual(t, held, 2, columns)) return false;
    rows = t.size(0);
    stride = t.stride(0);
    if (rows < 1 || stride < 0 || (writable && rows > 1 && stride < columns)) return false;
    data = memory_of(t, held, (rows - 1) * stride + columns);
    return data != nullptr;
  }

  bool read_array(PyObject* object, const Held& held, int64_t columns, bool writable) {
    if (!held.format || !PyObject_CheckBuffer(object)) return false;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) != 0) {
      PyErr_Clear();
      return false;
    }
    is_array = true;
    const char* format = buffer.format ? buffer.format : "B";
    if (*format == '@' || *format == '=') ++format;
    const auto size = Py_ssize_t(held.bytes);
    if (format[0] != held.format || format[1] != 0 || buffer.ndim != 2 || buffer.shape[1] != columns) return false;
    if ((columns > 1 && buffer.strides[1] != size) || buffer.strides[0] % size != 0) return false;
    rows = buffer.shape[0];
    stride = buffer.strides[0] / size;
    data = buffer.buf;
    return rows >= 1 && (!writable || rows == 1 || stride >= columns || stride <= -columns);
  }
};

PyObject* output_of(Held& held, int64_t rows, bool array) {
  PyObject* whole = array && held.array ? held.array : held.tensor;
  if (rows == held.slots) return Py_NewRef(whole);
  PyObject*& view = (whole == held.array ? held.array_views : held.tensor_views)[size_t(rows)];
  if (!view) {
    const py::slice first(0, py::ssize_t(rows), 1);
    view = PyObject_GetItem(whole, first.ptr());
  }
  return Py_XNewRef(view);
}

// Reads slots, of a pool, into held.chosen; false: not as many as there are rows, or one that is not open, or twice.
bool choose(Held& held, PyObject* slots, int64_t rows) {
  if (rows > held.slots) return false;
  ++held.calls;
  int64_t count = 0;
  const auto add = [&](int64_t slot) {
    if (count == rows || slot < 0 || slot >= held.slots || !held.open[size_t(slot)] ||
        held.last_call[size_t(slot)] == held.calls)
      return false;
    held.last_call[size_t(slot)] = held.calls;
    held.chosen[size_t(count++)] = slot;
    return true;
  };
  if (PyList_CheckExact(slots) || PyTuple_CheckExact(slots)) {
    PyObject** items = PySequence_Fast_ITEMS(slots);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(slots); ++i) {
      if (!PyLong_CheckExact(items[i])) return false;
      const long long slot = PyLong_AsLongLong(items[i]);
      if (slot == -1 && PyErr_Occurred()) PyErr_Clear();
      if (!add(slot)) return false;
    }
    return count == rows;
  }
  if (!THPVariable_CheckExact(slots)) {
    Py_buffer buffer;
    if (!PyObject_CheckBuffer(slots)) return false;
    if (PyObject_GetBuffer(slots, &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      return false;
    }
    bool fits = buffer.ndim == 1 && buffer.itemsize == 8 && buffer.format &&
                (std::strcmp(buffer.format, "l") == 0 || std::strcmp(buffer.format, "q") == 0);
    for (Py_ssize_t i = 0; fits && i < buffer.shape[0]; ++i) {
      int64_t slot;
      std::memcpy(&slot, static_cast<const char*>(buffer.buf) + i * buffer.strides[0], sizeof slot);
      fits = add(slot);
    }
    PyBuffer_Release(&buffer);
    return fits && count == rows;
  }
  const Tensor& t = THPVariable_Unpack(slots);
  if (!t.is_cpu() || t.scalar_type() != at::kLong || t.dim() != 1 || !t.is_contiguous() || !t.has_storage() ||
      !has_memory(t))
    return false;
  const int64_t* data = t.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < t.size(0); ++i) {
    if (!add(data[i])) return false;
  }
  return count == rows;
}

// Reads the arguments of a step as they stand; false: not all are usual and valid.
template <bool pool>
bool usual_step(Held& held, PyObject* x, PyObject* slots, PyObject* out, Matrix& from, Matrix& to) {
  if (!from.read(x, held, held.I, false)) return false;
  if (pool ? !choose(held, slots, from.rows) : from.rows != held.slots) return false;
  if (out) {
    if (!to.read(out, held, held.P, true) || to.rows != from.rows) return false;
  } else {
    const c10::Storage& storage = held.output.unsafeGetTensorImpl()->unsafe_storage();
    TORCH_CHECK(storage.nbytes() >= size_t(held.slots * held.P) * held.bytes,
                "out: expected the tensor that step() returns to have its memory, got one whose storage was freed");
    to.data = storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get();
    to.rows = from.rows;
    to.stride = held.P;
  }
  // Rows that would be read after others were written.
  return from.rows <= held.states->block_rows() || !from.overlaps(to, held.I, held.P, held.bytes);
}

// Of states that the caller has claimed.
void compute(Held& held, const StreamRows& call) {
  if (held.packed->stack->multiply_adds() * call.rows * call.steps < least_work_without_lock)
    return held.states->advance(call);
  PyThreadState* thread = PyEval_SaveThread();
  held.states->advance(call);
  PyEval_RestoreThread(thread);
}

// step(x, out=None), or with `pool` step(x, slots, out=None). last: nothing is tried after this.
template <bool pool, bool last>
PyObject* step(PyObject* self, PyObject* const* args, Py_ssize_t positional, PyObject* names) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t most = pool ? 3 : 2;
  PyObject* given[3] = {};
  const Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
  const char* const known[] = {"x", pool ? "slots" : "out", "out"};
  TORCH_CHECK_TYPE(positional <= most, "step: expected at most ", most, " arguments, got ", positional);
  for (Py_ssize_t i = 0; i < positional; ++i) given[i] = args[i];
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, i);
    Py_ssize_t k = 0;
    while (k < most && PyUnicode_CompareWithASCIIString(name, known[k]) != 0) ++k;
    TORCH_CHECK_TYPE(k < most, "step: got an unexpected keyword argument ", py::repr(name).cast<std::string>());
    TORCH_CHECK_TYPE(!given[k], "step: got two values for ", known[k]);
    given[k] = args[positional + i];
  }
  PyObject *x = given[0], *slots = pool ? given[1] : nullptr, *out = given[most - 1];
  TORCH_CHECK_TYPE(x && (!pool || slots), "step: expected x", pool ? " and slots" : "");
  if (out == Py_None) out = nullptr;

  Held& held = held_of(self);
  Matrix from, to;
  {
    const InUse in_use(*held.states);
    if (usual_step<pool>(held, x, slots, out, from, to)) {
      StreamRows call;
      call.rows = from.rows;
      call.x = {from.data, 0, from.stride};
      call.y = {to.data, 0, to.stride};
      if (pool) call.slots = held.chosen.data();
      compute(held, call);
      return out ? Py_NewRef(out) : output_of(held, from.rows, from.is_array);
    }
  }
  TORCH_CHECK(!last, "x, out: expected plain tensors or arrays with memory of their own");
  return slots ? PyObject_CallMethod(self, "_long_step", "OOO", x, slots, out ? out : Py_None)
               : PyObject_CallMethod(self, "_long_step", "OO", x, out ? out : Py_None);
  END_HANDLE_TH_ERRORS
}

// _open(packed, slots, tensor, array, is_open): the states, all zeros, and what step() returns; array may be None,
// is_open says of a pool which slots are.
PyObject* open_states(PyObject* self, PyObject* args) {
  HANDLE_TH_ERRORS
  const auto given = py::reinterpret_borrow<py::tuple>(args);
  TORCH_CHECK_TYPE(given.size() == 5, "_open: expected 5 arguments, got ", given.size());
  auto held = std::make_unique<Held>();
  held->packed = given[0].cast<PackedPtr>();
  const LayerSizes& sizes = held->packed->sizes;
  held->slots = given[1].cast<int64_t>();
  held->I = sizes.input_size;
  held->P = sizes.state_size;
  held->C = private_states(sizes.kind) * sizes.hidden_size;
  held->dtype = scalar_type(sizes.dtype);
  held->format = sizes.dtype == DType::float64 ? 'd' : sizes.dtype == DType::float32 ? 'f' : 0;
  held->bytes = c10::elementSize(held->dtype);
  held->output = given[2].cast<Tensor>();
  TORCH_CHECK(held->slots >= 1, "slots: expected at least 1, got ", held->slots);
  check_like(held->output, held->output, {held->slots, held->P}, "output");
  TORCH_CHECK(held->output.scalar_type() == held->dtype && held->output.is_contiguous() &&
                  held->output.storage_offset() == 0 && held->output.is_cpu(),
              "output: expected one that is contiguous, of the CPU and of the dtype of the weights");
  held->tensor = Py_NewRef(given[2].ptr());
  held->array = given[3].is_none() ? nullptr : Py_NewRef(given[3].ptr());
  held->output = held->output.alias();  // keeps its sizes whatever a caller does to the other
  held->states = StackStates::create(*held->packed->stack, held->slots, held->slots);
  TORCH_CHECK(held->states, "fused_rnn: out of memory for the states of ", held->slots, " rows");
  const auto is_open = given[4].cast<std::vector<bool>>();
  if (!is_open.empty()) {
    TORCH_CHECK(int64_t(is_open.size()) == held->slots, "is_open: expected ", held->slots, ", got ", is_open.size());
    held->open.assign(is_open.begin(), is_open.end());
    held->chosen.resize(size_t(held->slots));
    held->last_call.resize(size_t(held->slots));
    held->tensor_views.resize(size_t(held->slots));
    held->array_views.resize(size_t(held->slots));
  }
  Held*& place = reinterpret_cast<Object*>(self)->held;
  if (place) const InUse in_use(*place->states);  // throws while another thread computes with it
  delete place;
  place = held.release();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// _run(x, y, lengths): tensors (T, B, I), (T, B, P), int64 (B) or None, checked by the caller.
PyObject* run(PyObject* self, PyObject* args) {
  HANDLE_TH_ERRORS
  const auto given = py::reinterpret_borrow<py::tuple>(args);
  TORCH_CHECK_TYPE(given.size() == 3, "_run: expected 3 arguments, got ", given.size());
  Held& held = held_of(self);
  const Tensor x = with_contiguous_rows(given[0].cast<Tensor>()), y = given[1].cast<Tensor>();
  TORCH_CHECK(x.dim() == 3 && x.size(0) >= 1, "x: expected 3 dimensions, got ", x.sizes());
  const int64_t T = x.size(0);
  check_like(x, held.output, {T, held.slots, held.I}, "x");
  check_like(y, held.output, {T, held.slots, held.P}, "out");
  TORCH_CHECK(held.P == 1 || y.stride(2) == 1, "out: expected features that stand side by side");
  Tensor lengths;
  StreamRows call;
  if (!given[2].is_none()) {
    lengths = given[2].cast<Tensor>();
    TORCH_CHECK(
        lengths.is_cpu() && lengths.scalar_type() == at::kLong && lengths.sizes() == at::IntArrayRef{held.slots},
        "lengths: expected int64 (", held.slots, ") on the CPU");
    lengths = lengths.contiguous();
    check_memory(lengths, "lengths");
    call.lengths = lengths.const_data_ptr<int64_t>();
  }
  call.steps = T;
  call.rows = held.slots;
  call.x = {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
  call.y = {y.mutable_data_ptr(), y.stride(0), y.stride(1)};
  const InUse in_use(*held.states);
  compute(held, call);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// _usual_chunk(x, out): steps of all rows, of tensors as most programs have them; None for any other call, and for one
// that is not valid.
PyObject* usual_chunk(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "_usual_chunk: expected 2 arguments, got ", count);
  Held& held = held_of(self);
  UsualSteps from, to;
  if (!from.read(args[0], held, held.I, false)) Py_RETURN_NONE;
  Tensor made;
  PyObject* result = args[1];
  if (result == Py_None) {
    made = Tensor(at::detail::empty_cpu({from.steps, held.slots, held.P}, held.dtype));
    to.data = static_cast<char*>(made.mutable_data_ptr());
    to.time_stride = held.slots * held.P;
    to.batch_stride = held.P;
  } else if (!to.read(result, held, held.P, true) || to.steps != from.steps || to.overlaps(from, held.bytes)) {
    Py_RETURN_NONE;
  }
  StreamRows call;
  call.steps = from.steps;
  call.rows = held.slots;
  call.x = {from.data, from.time_stride, from.batch_stride};
  call.y = {to.data, to.time_stride, to.batch_stride};
  {
    const InUse in_use(*held.states);
    compute(held, call);
  }
  return made.defined() ? THPVariable_Wrap(made) : Py_NewRef(result);
  END_HANDLE_TH_ERRORS
}

// Those of all slots for None, else of these.
std::vector<int64_t> slots_of(const Held& held, py::handle object) {
  std::vector<int64_t> slots;
  if (object.is_none()) {
    for (int64_t i = 0; i < held.slots; ++i) slots.push_back(i);
  } else {
    slots = object.cast<std::vector<int64_t>>();
    for (const int64_t slot : slots)
      TORCH_CHECK(slot >= 0 && slot < held.slots, "slots: expected 0 to ", held.slots - 1, ", got ", slot);
  }
  return slots;
}

at::ScalarType state_dtype(const Held& held, bool exact) {
  return exact && held.dtype != at::kDouble ? at::kFloat : held.dtype;
}

char* row_of(const Tensor& t, int64_t layer, int64_t row) {
  return static_cast<char*>(t.mutable_data_ptr()) + (layer * t.stride(0) + row * t.stride(1)) * t.element_size();
}

// _states(slots, exact): (h (L, n, P), c (L, n, states * H) or None), copies.
PyObject* states(PyObject* self, PyObject* args) {
  HANDLE_TH_ERRORS
  const auto given = py::reinterpret_borrow<py::tuple>(args);
  TORCH_CHECK_TYPE(given.size() == 2, "_states: expected 2 arguments, got ", given.size());
  Held& held = held_of(self);
  const std::vector<int64_t> slots = slots_of(held, given[0]);
  const bool exact = given[1].cast<bool>();
  const int64_t L = held.packed->num_layers, n = int64_t(slots.size());
  const Tensor h = at::empty({L, n, held.P}, held.dtype);
  Tensor c;
  if (held.C > 0) c = at::empty({L, n, held.C}, state_dtype(held, exact));
  const InUse in_use(*held.states);
  for (int64_t l = 0; l < L; ++l) {
    for (int64_t i = 0; i < n; ++i)
      held.states->read(l, slots[size_t(i)], row_of(h, l, i), held.C > 0 ? row_of(c, l, i) : nullptr, exact);
  }
  return py::make_tuple(h, held.C > 0 ? py::cast(c) : py::object(py::none())).release().ptr();
  END_HANDLE_TH_ERRORS
}

// _set_states(slots, h, c, exact): as _states() returns them; None is zeros.
PyObject* set_states(PyObject* self, PyObject* args) {
  HANDLE_TH_ERRORS
  const auto given = py::reinterpret_borrow<py::tuple>(args);
  TORCH_CHECK_TYPE(given.size() == 4, "_set_states: expected 4 arguments, got ", given.size());
  Held& held = held_of(self);
  const std::vector<int64_t> slots = slots_of(held, given[0]);
  const bool exact = given[3].cast<bool>();
  const int64_t L = held.packed->num_layers, n = int64_t(slots.size());
  Tensor h, c;
  const auto read = [&](py::handle object, int64_t size, at::ScalarType dtype, const char* name, Tensor& into) {
    if (object.is_none()) return;
    into = object.cast<Tensor>();
    check_like(into, at::empty({0}, dtype), {L, n, size}, name);
    into = into.contiguous();
  };
  read(given[1], held.P, held.dtype, "h", h);
  read(given[2], held.C, state_dtype(held, exact), "c", c);
  const InUse in_use(*held.states);
  for (int64_t l = 0; l < L; ++l) {
    for (int64_t i = 0; i < n; ++i)
      held.states->write(l, slots[size_t(i)], h.defined() ? row_of(h, l, i) : nullptr,
                         c.defined() ? row_of(c, l, i) : nullptr, exact);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// _set_open(slot, open): of a pool.
PyObject* set_open(PyObject* self, PyObject* args) {
  HANDLE_TH_ERRORS
  const auto given = py::reinterpret_borrow<py::tuple>(args);
  TORCH_CHECK_TYPE(given.size() == 2, "_set_open: expected 2 arguments, got ", given.size());
  Held& held = held_of(self);
  const auto slot = given[0].cast<int64_t>();
  TORCH_CHECK(slot >= 0 && slot < int64_t(held.open.size()), "slot: expected one of the pool, got ", slot);
  held.open[size_t(slot)] = given[1].cast<bool>();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

void destroy(PyObject* self) {
  delete reinterpret_cast<Object*>(self)->held;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

template <class F>
PyCFunction as_method(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

constexpr const char* step_of_stream = R"(step($self, x, out=None)
--

One step of all rows.

Args:
    x: (B, I), a Tensor or an array (anything with a buffer, as NumPy's arrays) of the stream's dtype, on the CPU. It is
        read where it stands if its features are side by side.
    out: (B, P), a Tensor or an array to write the result into; ``None`` for the stream's own.

Returns:
    h of the highest layer, (B, P): ``out``, or the stream's own tensor, the same object in every call, whose contents
    the next call replaces (an array of the same memory where ``x`` is one).

Raises:
    TypeError, ValueError, RuntimeError: naming the argument; the state is as it was before. Also where another thread
        is in a call of this stream.
)";

constexpr const char* step_of_pool = R"(step($self, x, slots, out=None)
--

One step of some sessions, which none of the others feels.

Args:
    x: (n, I): see :meth:`Stream.step`.
    slots: n different slots that are open, in any order: a list or tuple of ints, or int64 values in a Tensor or array.
        Slots that follow each other are a little faster.
    out: (n, P), to write into; ``None`` for the pool's own memory.

Returns:
    h of the highest layer, (n, P), in the order of ``slots``: ``out``, or rows of the pool's own tensor, whose contents
    the next call replaces.

Raises:
    TypeError, ValueError, RuntimeError, IndexError: as :meth:`Stream.step`, or a slot that is not open; no state has
        changed.
)";

template <bool pool>
PyObject* make_type(const char* name, const char* description) {
  static PyMethodDef methods[] = {
      {"step", as_method(&step<pool, false>), METH_FASTCALL | METH_KEYWORDS, pool ? step_of_pool : step_of_stream},
      {"_step", as_method(&step<pool, true>), METH_FASTCALL | METH_KEYWORDS, "step() without _long_step() behind it."},
      {"_open", &open_states, METH_VARARGS, "Packed weights, states of zeros, and what step() returns."},
      {"_run", &run, METH_VARARGS, "Steps of all rows."},
      {"_usual_chunk", as_method(&usual_chunk), METH_FASTCALL, "Steps of all rows, of the usual tensors; or None."},
      {"_states", &states, METH_VARARGS, "Copies of the states."},
      {"_set_states", &set_states, METH_VARARGS, "Their inverse."},
      {"_set_open", &set_open, METH_VARARGS, "Whether a slot of a pool may be used."},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
      {Py_tp_methods, methods},
      {Py_tp_doc, const_cast<char*>(description)},
      {0, nullptr},
  };
  static PyType_Spec spec = {name, sizeof(Object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace

void add_streams(py::module_& module) {
  py::class_<Packed, PackedPtr>(module, "PackedStack", "Packed weights of a stack of layers.")
      .def_property_readonly("bytes", [](const Packed& p) { return p.stack->bytes(); })
      .def_property_readonly("isa", [](const Packed& p) { return std::string(p.stack->isa()); })
      .def("equals", [](const Packed& a, const Packed& b) { return a.stack->equals(*b.stack); }, py::arg("other"));
  module.def("pack_stack", &pack_stack, py::arg("like"), py::arg("params"), py::arg("integers"), py::arg("numbers"),
             "Packs the weights of a stack of layers of one direction for Stream and StreamPool.");
  module.attr("StreamBase") =
      py::reinterpret_steal<py::object>(make_type<false>("fused_rnn._C.StreamBase", "What a Stream computes with."));
  module.attr("StreamPoolBase") = py::reinterpret_steal<py::object>(
      make_type<true>("fused_rnn._C.StreamPoolBase", "What a StreamPool computes with."));
}

}  // namespace fused_rnn
