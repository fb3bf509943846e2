"""Layers that are called step by step, with weights that were packed once and states that stay: for serving."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checks, backend, carried, functional
from .convert import convert
from .quantized import QuantizedCell, QuantizedLayer
from .settings import NOTHING_WITHIN, Settings, Within
from .twin import HasTwin

if TYPE_CHECKING:
    from ._C import PackedStack, StreamBase, StreamPoolBase
elif backend.ops is None:

    class StreamBase:
        """Without kernels there are no streams: the constructor says so."""

    StreamPoolBase = StreamBase
else:
    StreamBase, StreamPoolBase = backend.ops.StreamBase, backend.ops.StreamPoolBase

__all__ = ["Stream", "StreamPool"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class StreamDescription:
    """What the kernels need of a module, read anew each time: its weights may have been replaced.

    Raises as :class:`Stream` does.
    """

    def __init__(self, module: Any, dtype: torch.dtype | None) -> None:
        is_quantized = isinstance(module, (QuantizedLayer, QuantizedCell))
        if not is_quantized:
            _checks.check_stream_module(module)
        fused = module if is_quantized else _fused(module)
        settings: Settings = fused._settings()
        params = fused._operator_params() if is_quantized else fused._params()
        within = None if settings.within is None else settings.within.in_mode(False)
        _checks.check_stream_runs(module, _why_no_stream(settings, within))
        if is_quantized:
            _checks.check_stream_dtype(dtype)
            self.dtype = torch.float32
        else:
            example = params[0] if params and isinstance(params[0], Tensor) else torch.empty(0, device="cpu")
            _checks.check_params(settings, params, torch.empty(0, dtype=example.dtype, device="cpu"))
            self.dtype = example.dtype if dtype is None else dtype
        self.is_quantized = is_quantized
        self.matrix_dtype: torch.dtype | None = module.weight_dtype if is_quantized else None
        self.kind, self.is_cell = settings.kind, settings.is_cell
        self.input_size, self.hidden_size, self.state_size = settings[:3]
        self.num_layers = settings.num_layers
        # Of each layer; a recurrent bias that there is not is zeros to the kernels.
        self.num_biases = 2 if settings.bias else 0
        self.num_norms = settings.num_norms
        self.within = NOTHING_WITHIN if within is None else within
        with torch.no_grad():
            if settings.around is not None:
                around = settings.around.in_eval_mode()
                params = functional._params_of_operator(settings, around, params)
            self._params = params
        of_kernels = settings._replace(around=None, within=within, batch_first=False, recompute=False, dropout=0.0)
        self._integers, self._numbers = of_kernels.flatten()

    @property
    def sizes(self) -> tuple[int, ...]:
        """What states depend on."""
        return int(self.kind), self.input_size, self.hidden_size, self.state_size, self.num_layers

    @property
    def largest_size(self) -> int:
        """Of I and H."""
        return max(self.input_size, self.hidden_size)

    def named_weights(self) -> dict[str, Tensor]:
        """Copies of the weights as the kernels take them, by the names that layers have for them."""
        names = ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"][: self.num_biases]]
        if self.state_size != self.hidden_size:
            names.append("weight_hr")
        if self.within.peephole:
            names.append("weight_peephole")
        names += ["weight_norm_ih", "weight_norm_hh", "weight_norm_c", "bias_norm_c"][: self.num_norms]
        if self.matrix_dtype is torch.int8:
            names += ["scale_ih", "scale_hh", *(["scale_hr"] if "weight_hr" in names else [])]
        all_names = [f"{name}_l{layer}" for layer in range(self.num_layers) for name in names]
        kept = self._params if self.is_quantized else [param.detach().to(self.dtype) for param in self._params]
        params = [param.detach().clone(memory_format=torch.contiguous_format) for param in kept]
        return dict(zip(all_names, params, strict=True))

    def pack(self) -> PackedStack:
        """The packed weights, of which there is one copy for all that are equal."""
        ops: Any = backend.ops
        with torch.no_grad():
            params = self._params if self.is_quantized else [param.detach().to(self.dtype) for param in self._params]
            self._params = []  # that may be the last reference to them
            like = torch.empty(1, 1, self.input_size, dtype=self.dtype, device="cpu")
            packed: PackedStack = ops.pack_stack(like, params, self._integers, self._numbers)
        key = (packed.isa, packed.bytes, self.dtype, tuple(self._integers), tuple(self._numbers))
        with _lock:
            others = [reference for reference in _packed.get(key, ()) if reference() is not None]
            for reference in others:
                other = reference()
                if other is not None and other.equals(packed):
                    return other
            _packed[key] = [*others, weakref.ref(packed)]
        return packed


_lock = threading.Lock()
_packed: dict[tuple[Any, ...], list[weakref.ref[PackedStack]]] = {}


def _fused(module: Any) -> Any:
    """The module, or, of one of ``torch.nn``'s, a fused one with the same Parameters."""
    if isinstance(module, HasTwin):
        return module
    fused, report = convert(module, inplace=False, return_report=True)
    if not isinstance(fused, HasTwin):
        _checks.check_stream_runs(module, report.left_alone.get("", "it is none of torch.nn's LSTM, GRU and RNN"))
    return fused


def _why_no_stream(settings: Settings, within: Within | None) -> str | None:
    if backend.ops is None or backend.current_backend() == "reference":
        return "the kernels are not built, or not in use, and formulas have no streams"
    if settings.bidirectional:
        return "it has bidirectional=True, and a stream cannot look ahead"
    if settings.kind not in (0, 1, 2, 3):
        return "it is a custom cell, and there are streams of the built-in ones alone"
    if within is not None:
        reason: str | None = backend.ops.why_not_within(settings.kind, within, torch.empty(0, device="cpu"), False)
        return reason
    return None


class _Streams:
    """What :class:`Stream` and :class:`StreamPool` share: everything but the call of a step."""

    module: nn.Module | Any
    dtype: torch.dtype
    _description: StreamDescription
    _packed: PackedStack
    _output: Tensor
    _array: Any  # of the same memory; None without NumPy, and of bfloat16

    # Of the compiled class.
    _open: Callable[..., None]
    _states: Callable[..., tuple[Tensor, Tensor | None]]
    _set_states: Callable[..., None]
    _step: Callable[..., Any]
    _run: Callable[..., None]
    _usual_chunk: Callable[[Any, Any], Any]
    _set_open: Callable[..., None]

    def _start(self, module: Any, slots: int, dtype: torch.dtype | None, is_open: Sequence[bool]) -> None:
        description = StreamDescription(module, dtype)
        _checks.check_stream_sizes(self._name_of_slots, slots, description.dtype, _DTYPES)
        self.module = module
        self._begin(description, description.pack(), slots, is_open)

    _name_of_slots = "batch_size"

    def _begin(self, description: StreamDescription, packed: PackedStack, slots: int, is_open: Sequence[bool]) -> None:
        with torch.inference_mode(False):  # so that it is an ordinary tensor wherever it is used
            output = torch.zeros(slots, description.state_size, dtype=description.dtype, device="cpu")
        array = _as_array(output)
        self._open(packed, slots, output, array, list(is_open))
        self._description, self._packed, self._output, self._array = description, packed, output, array
        self.dtype = description.dtype

    @property
    def input_size(self) -> int:
        """Features of x, I."""
        return self._description.input_size

    @property
    def output_size(self) -> int:
        """Features of what a step returns, P: ``proj_size``, or ``hidden_size`` without a projection."""
        return self._description.state_size

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights, which streams of equal weights share."""
        return self._packed.bytes

    def refresh(self) -> None:
        """Read the weights of ``module`` anew. The states go on as they are.

        A stream does not see by itself that weights have changed.

        Raises:
            TypeError, ValueError, RuntimeError: the module is no longer one that a stream can run, or of other sizes;
                everything is as it was before.
        """
        description = StreamDescription(self.module, self.dtype)
        _checks.check_same_sizes(description.sizes, self._description.sizes)
        packed = description.pack()
        if packed is self._packed:
            return
        h, c = self._states(None, True)
        output, array = self._output, self._array
        self._open(packed, len(output), output, array, self._is_open())
        self._set_states(None, h, c, True)
        self._description, self._packed = description, packed

    def _is_open(self) -> list[bool]:
        return []

    def _state_as_hx(self, slots: Sequence[int] | None) -> Any:
        h, c = self._states(slots, False)
        if self._description.is_cell:
            h, c = h[0], None if c is None else c[0]
        return h if c is None else (h, c)

    def _set_state_from_hx(self, name: str, slots: Sequence[int] | None, rows: int, hx: Any) -> None:
        of = self._description
        h, c = _checks.split_state(of.kind, hx, name)
        shape: tuple[int, ...] = (rows,) if of.is_cell else (of.num_layers, rows)
        names = (name, name) if c is None else (f"{name}[0]", f"{name}[1]")
        for state_name, state, size in zip(names, (h, c), (of.state_size, of.hidden_size), strict=True):
            if state is not None:
                _checks.check_stream_tensor(state_name, state, (*shape, size), self.dtype)
        if of.is_cell:
            h, c = None if h is None else h[None], None if c is None else c[None]
        self._set_states(slots, *(None if state is None else state.detach() for state in (h, c)), False)

    def __copy__(self) -> Any:
        return self._copied(self.module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._copied(copy.deepcopy(self.module, memo))

    def _copied(self, module: Any) -> Any:
        """With the same packed weights, which nobody changes, and a state of its own."""
        new: Any = type(self).__new__(type(self))
        own = ("_output", "_array")
        vars(new).update({name: value for name, value in vars(self).items() if name not in own} | {"module": module})
        new._begin(self._description, self._packed, len(self._output), self._is_open())
        new._set_states(None, *self._states(None, True), True)
        return new

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in _NOT_PICKLED}
        return own | {"slots": len(self._output), "states": self._states(None, True)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {name: value for name, value in state.items() if name not in ("slots", "states")}
        vars(self).update(own)
        self._start(self.module, state["slots"], self.dtype, self._is_open())
        self._set_states(None, *state["states"], True)

    def _read(self, name: str, value: Any, shape: Sequence[int | None], writable: bool = False) -> Tensor:
        """A checked tensor, of whose memory an array is the owner where one was given."""
        tensor = value if isinstance(value, Tensor) else _from_array(name, value, writable)
        _checks.check_stream_tensor(name, tensor, shape, self.dtype)
        return tensor.detach()

    def _compute(self, given: Any, x: Tensor, out: Any, *slots: Any) -> Any:
        """A step of what was checked, of a copy of x, which is as the kernels want it."""
        x = x.resolve_neg().clone(memory_format=torch.contiguous_format)
        if out is not None:
            shape = (x.shape[0], self.output_size)
            _checks.check_stream_out(self._read("out", out, shape, writable=True))
        if x.shape[0] > 0:
            self._step(x, *slots, out)
        if out is not None:
            return out
        whole = self._output if isinstance(given, Tensor) or self._array is None else self._array
        return whole if x.shape[0] == len(self._output) else whole[: x.shape[0]]


_NOT_PICKLED = ("_description", "_packed", "_output", "_array")


def _as_array(tensor: Tensor) -> Any:
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError):  # without NumPy, and of bfloat16
        return None


def _from_array(name: str, value: Any, writable: bool) -> Tensor:
    """A tensor of the same memory; a copy where PyTorch has no such tensors and it is only read."""
    if isinstance(value, (bytes, bytearray)) or not _has_buffer(value):
        _checks.raise_stream_type(name, value)
    import numpy

    array = numpy.asarray(value)
    if array.dtype.kind not in "fiu" or not array.dtype.isnative:
        _checks.raise_stream_type(name, value)
    if writable:
        _checks.check_writable(array.flags.writeable, array.strides)
    elif not array.flags.writeable or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _has_buffer(value: Any) -> bool:
    try:
        memoryview(value).release()
    except TypeError:
        return False
    return True


class Stream(_Streams, StreamBase):
    """A recurrent layer that is given its input step by step, as it comes: the state stays between the calls.

    The weights are packed once, into a copy that all streams of equal weights share, and results are written into
    memory of the stream, so that :meth:`step` allocates nothing. The numbers are those of the module in eval mode, bit
    for bit those of its calls of more than 12 steps and rows and more than 8 steps (docs/serving.md). No gradients.

    A stream does not see that a weight of the module changed, until :meth:`refresh`.

    Args:
        module: an LSTM, GRU, RNN or IndRNN, of one direction, or a cell, of :mod:`fused_rnn` or :mod:`torch.nn`, with
            any number of layers and any option but ``reset_after=False``. The module keeps its weights and its own
            state; ``batch_first`` and ``stateful`` mean nothing here.
        batch_size: rows, B, each with a state of its own.
        dtype: float32, float64 or bfloat16, to which the weights are rounded; ``None`` for that of the module.

    Raises:
        TypeError: ``module`` is another kind of object.
        ValueError: a module that cannot be a stream, with the reason, or another dtype.

    One thread at a time may use a stream; several streams run at once in several threads. A call of more than some
    microseconds releases the interpreter's lock. ``copy.copy`` gives a stream of the same module and the same packed
    weights with a state of its own, which goes on from this one's; pickles have the module and the state, and the
    weights are packed anew from the module.

    Example::

        >>> layer = fused_rnn.LSTM(20, 32)
        >>> stream = fused_rnn.Stream(layer)
        >>> stream.step(torch.randn(1, 20)).shape
        torch.Size([1, 32])
        >>> h, c = stream.state
        >>> h.shape, c.shape
        (torch.Size([1, 1, 32]), torch.Size([1, 1, 32]))
    """

    def __init__(self, module: Any, batch_size: int = 1, dtype: torch.dtype | None = None) -> None:
        self._start(module, batch_size, dtype, ())

    @property
    def batch_size(self) -> int:
        """Rows, B."""
        return len(self._output)

    def __repr__(self) -> str:
        return f"Stream({self.module!r}, batch_size={self.batch_size}, dtype={self.dtype})"

    def _long_step(self, x: Any, out: Any) -> Any:
        return self._compute(x, self._read("x", x, (self.batch_size, self.input_size)), out)

    def chunk(self, x: Any, lengths: Any = None, *, out: Any = None) -> Any:
        """Several steps of all rows: the same as one after the other, bit for bit, in less time.

        Args:
            x: (T, B, I), whatever ``batch_first`` the module has.
            lengths: (B) integers from 0 to T, the steps that each row has, from the first on; ``None`` for all.
            out: (T, B, P), to write into, in no part of the memory of ``x``; ``None`` for a new Tensor.

        Returns:
            h of the highest layer at every step, (T, B, P): ``out``, or a new Tensor, or an array where ``x`` is one;
            zeros where a row has no step, in which its state stays what it was.

        Raises:
            As :meth:`step`.
        """
        if lengths is None:
            result = self._usual_chunk(x, out)
            if result is not None:
                return result
        steps = self._read("x", x, (None, self.batch_size, self.input_size))
        T, shape = steps.shape[0], (steps.shape[0], self.batch_size, self.output_size)
        if lengths is not None:
            try:
                lengths = torch.as_tensor(lengths, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                _checks.raise_stream_type("lengths", lengths)
            _checks.check_lengths_of_chunk(lengths, self.batch_size, T)
            lengths = lengths.long()
        if out is None:
            result = torch.empty(shape, dtype=self.dtype, device="cpu")
        else:
            result = self._read("out", out, shape, writable=True)
            _checks.check_stream_out(result)
            _checks.check_chunk_out(_overlap(result, steps))
        if lengths is not None:
            result.zero_()
        if T > 0:
            self._run(steps.resolve_neg(), result, lengths)
        if out is not None:
            return out
        return result if isinstance(x, Tensor) or self._array is None else result.numpy()

    @property
    def state(self) -> Any:
        """The state as the module's ``hx``, a copy: h (L, B, P), for an LSTM (h, c) with c (L, B, H); of a cell (B, H).

        May be set to such, or to ``None`` for zeros. c of a stream in bfloat16 is kept in float32, and rounded here.
        """
        return self._state_as_hx(None)

    @state.setter
    def state(self, hx: Any) -> None:
        self._set_state_from_hx("state", None, self.batch_size, hx)

    def reset(self, rows: Any = None) -> None:
        """Make the state zeros.

        Args:
            rows: a bool tensor (B), or indices; ``None`` for all.

        Raises:
            TypeError, IndexError: ``rows`` is another kind of object, or has rows that there are not.
        """
        if rows is not None:
            rows = carried.rows_of(rows, self.batch_size, torch.device("cpu")).tolist()
        self._set_states(rows, None, None, False)


class StreamPool(_Streams, StreamPoolBase):
    """States of many sessions that share a module: each step is of those sessions that have input.

    What :class:`Stream` says of weights, results, threads and copies holds here.

    Args:
        module, dtype: as :class:`Stream` takes them.
        capacity: sessions at a time.

    Raises:
        As :class:`Stream`.

    Example::

        >>> pool = fused_rnn.StreamPool(fused_rnn.GRU(20, 32), capacity=100)
        >>> first, second = pool.open(), pool.open()
        >>> pool.step(torch.randn(2, 20), [second, first]).shape
        torch.Size([2, 32])
        >>> pool.close(first)
    """

    _name_of_slots = "capacity"

    def __init__(self, module: Any, capacity: int, dtype: torch.dtype | None = None) -> None:
        self._start(module, capacity, dtype, (False,) * capacity if isinstance(capacity, int) else ())
        self._free = list(range(capacity - 1, -1, -1))
        self._opened = [False] * capacity

    @property
    def capacity(self) -> int:
        """Sessions at a time."""
        return len(self._output)

    def __len__(self) -> int:
        """Slots that are open."""
        return self.capacity - len(self._free)

    def __repr__(self) -> str:
        return f"StreamPool({self.module!r}, capacity={self.capacity}, dtype={self.dtype})"

    def _is_open(self) -> list[bool]:
        return self._opened

    def open(self, state: Any = None) -> int:
        """Begin a session.

        Args:
            state: that it begins with, as :meth:`state` returns it; ``None`` for zeros.

        Returns:
            its slot.

        Raises:
            RuntimeError: all slots are open.
        """
        if not self._free:
            _checks.raise_pool_is_full(self.capacity)
        slot = self._free[-1]
        self._set_state_from_hx("state", [slot], 1, state)
        self._set_open(slot, True)
        self._opened[slot] = True
        self._free.pop()
        return slot

    def close(self, slot: int) -> None:
        """End a session, whose slot another one may get.

        Raises:
            TypeError, IndexError: ``slot`` is none that is open.
        """
        _checks.check_slot("slot", slot, self._opened)
        self._set_open(slot, False)
        self._opened[slot] = False
        self._free.append(slot)

    def reset(self, slot: int) -> None:
        """Make a session's state zeros.

        Raises:
            TypeError, IndexError: ``slot`` is none that is open.
        """
        self.set_state(slot, None)

    def state(self, slot: int) -> Any:
        """A session's state as the module's ``hx`` of a batch of 1, a copy: see :attr:`Stream.state`.

        Raises:
            TypeError, IndexError: ``slot`` is none that is open.
        """
        _checks.check_slot("slot", slot, self._opened)
        return self._state_as_hx([slot])

    def set_state(self, slot: int, state: Any) -> None:
        """The inverse of :meth:`state`; ``None`` for zeros."""
        _checks.check_slot("slot", slot, self._opened)
        self._set_state_from_hx("state", [slot], 1, state)

    def _copied(self, module: Any) -> Any:
        new = super()._copied(module)
        new._free, new._opened = list(self._free), list(self._opened)
        return new

    def _long_step(self, x: Any, slots: Any, out: Any) -> Any:
        rows = self._read("x", x, (None, self.input_size))
        if isinstance(slots, Tensor) or _has_buffer(slots):
            slots = torch.as_tensor(slots, device="cpu").tolist()
        elif not isinstance(slots, (list, tuple, range)):
            _checks.raise_slots_type(slots)
        _checks.check_slots(slots, rows.shape[0], self._opened)
        return self._compute(x, rows, out, list(slots))


def _overlap(a: Tensor, b: Tensor) -> bool:
    def extent(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    (begin, end), (other_begin, other_end) = extent(a), extent(b)
    return a.numel() > 0 and b.numel() > 0 and begin < other_end and other_begin < end
