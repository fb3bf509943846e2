"""Cells of one's own: a step written down once, as a C++ header, and layers that run it as those that are built in."""

from __future__ import annotations

import copyreg
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import _checks, backend, compiling, formulas
from .cells import RecurrentCell
from .expressions import Step, Trace, evaluate
from .layers import Recurrent
from .settings import (
    CELL_OPTIONS,
    LAYER_OPTIONS,
    STEP_OPTIONS,
    AnyCellKind,
    CellOptions,
    CellShape,
    ForwardOptions,
    LayerOptions,
    add_kind,
    kind_of,
    show_options,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SLSTM", "CustomCell", "CustomLayer", "SLSTMCell", "load_cell"]

_log = logging.getLogger("fused_rnn")

_FIRST_NUMBER, _LAST_NUMBER = 1 << 16, (1 << 31) - 1  # csrc/problem.h, CellKind

_OF_GATES: tuple[str, ...] = (
    "zoneout_cell",
    "activation",
    "recurrent_activation",
    "reset_after",
    "peephole",
    "coupled_gates",
    "cell_clip",
)
_OF_GATES += ("forget_bias", "layer_norm")

_classes: dict[tuple[str, str], type[CustomLayer]] = {}


class _OfCustomStep:
    """What layers and cells of a custom step share."""

    _custom: ClassVar[AnyCellKind]
    _header: ClassVar[str]  # its text
    _step: ClassVar[Step]

    def _check_gates(self, options: Mapping[str, Any]) -> None:
        """Options that concern gates have no meaning here."""
        for name, value in options.items():
            if name in _OF_GATES and value != LAYER_OPTIONS[name]:
                raise ValueError(
                    f"{name}: expected {LAYER_OPTIONS[name]!r} for a {type(self).__name__}, a custom cell, whose gates "
                    f"are as its header has them, got {value!r}"
                )

    def _for_operators(self, hx: Any, steps: ForwardOptions) -> tuple[Any, ForwardOptions]:
        """Operators have the private states side by side."""
        if self._custom.num_states <= 1:
            return hx, steps
        if steps.get("reset_state") is not None:
            steps = {**steps, "reset_state": self._join(steps["reset_state"], "reset_state")}
        return self._join(hx, "hx"), steps

    def _join(self, states: Any, name: str) -> Any:
        if states is None:
            return None
        count = self._custom.num_states + 1
        if not isinstance(states, (tuple, list)) or len(states) != count:
            error = RuntimeError if isinstance(states, (tuple, list)) else TypeError
            raise error(f"{name}: expected a tuple of {count} Tensors or None, got {_checks._describe(states)}")
        for index, state in enumerate(states):
            if not isinstance(state, Tensor):
                raise TypeError(f"{name}[{index}]: expected a Tensor, got {_checks._describe(state)}")
            if state.shape != states[0].shape:
                expected = tuple(states[0].shape)
                raise RuntimeError(f"{name}[{index}]: expected {expected} as {name}[0] has, got {tuple(state.shape)}")
        return states[0], torch.cat(tuple(states[1:]), dim=-1)

    def _apart(self, states: Any) -> Any:
        """The inverse of :meth:`_join`."""
        count = self._custom.num_states
        return (states[0], *states[1].chunk(count, dim=-1)) if count > 1 else states

    def __reduce_ex__(self, protocol: Any) -> Any:
        """With its header instead of a class that no module has."""
        reduced = super().__reduce_ex__(protocol)
        if "_header" not in vars(type(self)) or not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (self._maker, (self._header, self._name), *reduced[2:])

    _maker: ClassVar[Any]  # a function: of an empty module, from the header and the name of the step
    _name: ClassVar[str]


class CustomCell(_OfCustomStep, RecurrentCell):
    """One step of a custom cell. :func:`load_cell` makes a class of this kind for each header, ``Cell`` of the layer's.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias, device, dtype: as :class:`fused_rnn.LSTMCell`.
        num_heads, recurrent_dropout, zoneout: the same.

    Raises:
        TypeError, ValueError: a size that is no int, or less than 1; an option that concerns gates, or is out of range.

    Parameters, each drawn uniformly between :math:`\\pm 1 / \\sqrt{H}`: ``weight_ih`` (G*H, I), ``weight_hh``
    (G*H, H / num_heads), ``bias_ih`` and ``bias_hh`` (G*H), or ``None``, with G gates in the order of the header. They
    are those of a layer without the ``_l0`` of their names.
    """

    _least_size = 1

    @show_options(CELL_OPTIONS)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[CellOptions],
    ) -> None:
        self._check_gates(options)
        super().__init__(self._custom, input_size, hidden_size, bias, device, dtype, options)

    def _kind(self) -> AnyCellKind:
        return self._custom

    def _prepare_option(self, name: str, value: Any) -> None:
        self._check_gates({name: value})
        super()._prepare_option(name, value)

    def forward(self, input: Tensor, hx: Any = None, *, reset: Tensor | None = None, reset_state: Any = None) -> Any:
        """One step.

        Args:
            input: (B, I), or (I) without a batch.
            hx: h (B, H), or for a cell with private states the tuple of h and each of them, all of this shape, without
                B for an input without a batch; ``None`` for zeros.
            reset: as :meth:`fused_rnn.LSTMCell.forward` has it; reset_state: as ``hx``.

        Returns:
            What ``hx`` is, after the step.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`fused_rnn.LSTMCell.forward`.
        """
        hx, steps = self._for_operators(hx, {"reset": reset, "reset_state": reset_state})
        return self._apart(self._run(input, hx, steps.get("reset"), steps.get("reset_state")))


class CustomLayer(_OfCustomStep, Recurrent):
    """Layers of a custom cell, over a sequence. :func:`load_cell` makes a class of this kind for each header.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as :class:`fused_rnn.LSTM`.
        options: those of :class:`fused_rnn.RNN` but ``activation``.

    Parameters, for layer k, and with suffix ``_reverse`` for the second direction, each drawn uniformly between
    :math:`\\pm 1 / \\sqrt{H}`: ``weight_ih_l{k}`` (G*H, I; D*H in place of I for k > 0), ``weight_hh_l{k}`` (G*H, H),
    ``bias_ih_l{k}`` and ``bias_hh_l{k}`` (G*H), with G gates in the order of the header.

    ``Cell``, of the class, is the class of a single step: :class:`CustomCell`.
    """

    Cell: ClassVar[type[CustomCell]]
    _custom: ClassVar[AnyCellKind]

    @show_options(LAYER_OPTIONS)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        self._check_options(options)
        super().__init__(
            self._custom.name,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            options,
        )

    def _check_options(self, options: Mapping[str, Any]) -> None:
        self._check_gates(options)
        if not options.get("recurrent_bias", True) and self._step.apart > 0:
            raise ValueError(
                f"recurrent_bias: expected True for a {type(self).__name__}, in which W_hh h + b_hh of a gate is used "
                "without W_ih x + b_ih"
            )

    def _prepare_option(self, name: str, value: Any) -> None:
        self._check_options({name: value})
        super()._prepare_option(name, value)

    @show_options(STEP_OPTIONS)
    def forward(self, input: Any, hx: Any = None, **steps: Unpack[ForwardOptions]) -> Any:
        """Run the layers.

        Args:
            input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) without a batch, or a PackedSequence.
            hx: h_0 (L*D, B, H), or for a cell with private states the tuple of h_0 and each of them, all of this
                shape, without B for unbatched input; ``None`` for zeros.
            lengths, mask, reset, reset_state, return_states: as :meth:`fused_rnn.LSTM.forward` has them,
                ``reset_state`` as ``hx``.

        Returns:
            ``(output, states)``: h of the last layer at all steps, and what ``hx`` is, after the last step; with
            ``return_states`` also what it is after every step, of every layer.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`fused_rnn.LSTM.forward`.
        """
        output, *states = self._run(input, *self._for_operators(hx, steps))
        return output, *map(self._apart, states)


def _new_layer(header: str, name: str) -> CustomLayer:
    cls = load_cell_text(header, name, name)
    return cls.__new__(cls)


def _new_cell(header: str, name: str) -> CustomCell:
    cls = load_cell_text(header, name, name).Cell
    return cls.__new__(cls)


CustomLayer._maker, CustomCell._maker = staticmethod(_new_layer), staticmethod(_new_cell)


def load_cell(path: str | os.PathLike[str], name: str | None = None) -> type[CustomLayer]:
    """A class of layers, like :class:`fused_rnn.LSTM`, whose step is written in a C++ header of your own.

    The header has a struct with the number of gates and a function of one step, a template on the value ``V``; the
    backward step follows from it by reverse-mode differentiation. Everything else is there: both directions, stacks,
    lengths, masks, packed batches, resets, recompute, zoneout and the other options that concern no gate, second
    derivatives, :func:`torch.compile`. The documentation's page about new cells has the whole vocabulary::

        struct MinimalGatedUnit {
          static constexpr int gates = 2;
          template <class V>
          static void forward(const V* x, const V* r, V h_prev, const V*, V& h, V*) {
            const V f = sigmoid(x[0] + r[0]);
            const V n = tanh(x[1] + f * r[1]);
            h = (1 - f) * h_prev + f * n;
          }
        };

    The kernels for a dtype are compiled when a call first has it, for this machine's processor or by ``nvcc`` for its
    GPU, which takes some seconds, and kept in the folder ``FUSED_RNN_CACHE`` (``~/.cache/fused_rnn``) by content. The
    formulas run on every device, and on a GPU where there is no ``nvcc``, as :func:`explain` then says.

    Args:
        path: of the header.
        name: of the struct, where the header has several; the class gets its name.

    Returns:
        the class, the same for the same text and name; its ``Cell`` is the class of a single step, like
        :class:`fused_rnn.LSTMCell`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the header has no struct of that name, or several and none is named.
        RuntimeError: it does not compile, there is no C++ compiler, or a value is not assigned.
    """
    text = Path(path).read_text(encoding="utf-8")
    structs = re.findall(r"^\s*struct\s+(\w+)\s*(?::[^{;]*)?\{", text, re.MULTILINE)
    if name is None:
        if len(structs) != 1:
            found = "none" if not structs else ", ".join(structs)
            raise ValueError(f"name: expected the name of a struct in {path}, which has {found}; got None")
        name = structs[0]
    elif name not in structs:
        raise ValueError(f"name: expected one of {', '.join(structs) or 'no struct'} in {path}, got {name!r}")
    return load_cell_text(text, name, str(path))


def load_cell_text(text: str, name: str, origin: str) -> type[CustomLayer]:
    """:func:`load_cell` of a header's text; ``origin``: what messages call it."""
    cls = _classes.get((text, name))
    if cls is None:
        trace = Trace(compiling.trace_of(text, name, origin))
        cls = _classes[text, name] = _make_class(text, name, trace)
    return cls


def _make_class(text: str, name: str, trace: Trace) -> type[CustomLayer]:
    members = {**_members(name, trace), "_header": text, "_name": name, "__module__": __name__}

    def derive(base: type, class_name: str, what: str, **more: Any) -> Any:
        documentation = f"{what} of the custom cell {name}.\n\n{(base.__doc__ or '').partition(chr(10) * 2)[2]}"
        return type(class_name, (base,), {**members, "__doc__": documentation, **more})

    cell = derive(CustomCell, f"{name}Cell", "One step", __qualname__=f"{name}.Cell")
    layer: type[CustomLayer] = derive(CustomLayer, name, "Layers", Cell=cell)
    return layer


def _members(name: str, trace: Trace) -> dict[str, Any]:
    """What the class of a cell has, whose formula is added to the others."""
    step = Step(trace)
    content = json.dumps([trace.gates, trace.states, step.cpp("Cell")])
    span = _LAST_NUMBER - _FIRST_NUMBER
    number = _FIRST_NUMBER + int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % span
    kind = add_kind(f"CUSTOM_{name}", number, CellShape(trace.gates, trace.states, step.saved))
    formulas.STEPS[kind] = _formula_of(trace)
    _steps[number] = step
    if backend.ops is not None:
        backend.ops.add_custom_cell(number, trace.gates, step.saved, trace.states)
    return {"_custom": kind, "_step": step}


_steps: dict[int, Step] = {}  # of custom cells, by the numbers of their kinds


def _formula_of(trace: Trace) -> Any:
    """The step in PyTorch's operations, as those in :mod:`fused_rnn.formulas`."""
    gates, states = trace.gates, trace.states
    wanted = [trace.outputs["h", 0], *(trace.outputs["state", i] for i in range(states))]

    def step(
        cell: formulas.Cell, x_gates: Tensor, h_dropped: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        inputs = {("x", g): x for g, x in enumerate(x_gates.chunk(gates, dim=-1))}
        inputs |= {("r", g): r for g, r in enumerate(cell.recurrent(h_dropped).chunk(gates, dim=-1))}
        inputs["h", 0] = h
        if c is not None:
            inputs |= {("state", i): state for i, state in enumerate(c.chunk(states, dim=-1))}
        new_h, *new_states = evaluate(trace.graph, wanted, inputs)
        return new_h, torch.cat(new_states, dim=-1) if states else None

    return step


def _add_kernels(number: int, dtype: torch.dtype) -> None:
    """Those of a cell, by its kind's number, for the instruction set in use: from the cache, or compiled now."""
    assert backend.ops is not None
    isa = backend.ops.instruction_set()
    if (number, isa, dtype) in _added:
        return
    compiling.add_kernels(compiling.compile_kernels(_steps[number], number, isa, dtype))
    _added.add((number, isa, dtype))


def _add_cuda_kernels(number: int, dtype: torch.dtype, arch: int) -> None:
    """The same for GPUs of an architecture, 90 for sm_90."""
    if (number, arch, dtype) in _added:
        return
    compiling.add_cuda_kernels(compiling.compile_cuda_kernels(_steps[number], number, arch, dtype))
    _added.add((number, arch, dtype))


_added: set[tuple[int, str | int, torch.dtype]] = set()


def _why_no_kernels(number: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """None when there are some after this: see :data:`fused_rnn.backend.why_no_kernels`."""
    assert backend.ops is not None
    arch = backend.ops.cuda_architecture(device) if device.type == "cuda" else None
    problem = _problems.get((number, dtype, arch))
    if problem is not None:
        return problem
    try:
        if arch is None:
            _add_kernels(number, dtype)
        else:
            _add_cuda_kernels(number, dtype, arch)
    except RuntimeError as error:
        # With a compiler for the CPU alone a program goes on where its tensors are on a GPU, and so does SLSTM, which
        # nobody has loaded, without any.
        if arch is None and number != SLSTM._custom.value:
            raise
        kernels = "kernels" if arch is None else "CUDA kernels"
        name = kind_of(number).name.removeprefix("CUSTOM_")
        problem = _problems[number, dtype, arch] = f"the {kernels} of {name} could not be compiled: {error}"
        _log.warning("%s", problem)
    return problem


_problems: dict[tuple[int, torch.dtype, int | None], str] = {}
# The compiler calls it once, when it traces the call, instead of looking into it.
_why_no_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]

backend.why_no_kernels = _why_no_kernels
if backend.ops is not None:
    backend.ops.set_custom_compiler(_add_kernels, _add_cuda_kernels)  # of a program that was compiled or exported


_SLSTM = _members("SLSTM", Trace((Path(__file__).parent / "headers" / "slstm.trace").read_text()))


class SLSTMCell(CustomCell):
    """One step of a scalar LSTM, whose layers and formula are :class:`SLSTM`'s.

    Args:
        input_size, hidden_size, bias, device, dtype: as :class:`fused_rnn.LSTMCell`, with sizes of at least 1.
        num_heads, recurrent_dropout, zoneout: the same.

    Raises:
        TypeError, ValueError: naming the argument that has another type or is out of range.

    ``hx``, ``reset_state`` and the result are ``(h, c, n, m)``, each (B, H), or (H) without a batch.

    Parameters: as :class:`fused_rnn.LSTMCell`, rows in the order z, i, f, o.

    Example::

        >>> cell = fused_rnn.SLSTMCell(10, 20, num_heads=4)
        >>> h, c, n, m = cell(torch.randn(3, 10))
        >>> h.shape
        torch.Size([3, 20])
    """

    _custom = _SLSTM["_custom"]
    _step = _SLSTM["_step"]


class SLSTM(CustomLayer):
    r"""Scalar LSTM layers (Beck et al. 2024, "xLSTM"): exponential input gates, and heads with ``num_heads``.

    For each layer and step:

    .. math::
        z &= \tanh(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        \tilde\imath, \tilde f, \tilde o &= W_i x_t + b_i + W_h h_{t-1} + b_h \quad\text{(rows of i, of f, of o)} \\
        c_t &= \sigma(\tilde f) \odot c_{t-1} + e^{\tilde\imath} \odot z \\
        n_t &= \sigma(\tilde f) \odot n_{t-1} + e^{\tilde\imath} \\
        h_t &= \sigma(\tilde o) \odot c_t / n_t

    so that no exponential overflows, c and n are kept over :math:`e^{m_t}`, with
    :math:`m_t = \max(\log \sigma(\tilde f) + m_{t-1}, \tilde\imath)`, which changes no h. In a row's first step, and
    wherever n is 0, :math:`m_t = \tilde\imath`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as :class:`LSTM`.
        options: those of :class:`RNN` but ``activation``; ``num_heads`` as the paper has them.

    ``hx`` and the states that a call returns are ``(h, c, n, m)``, each (L*D, B, H). A single step is
    :class:`SLSTMCell`.

    Parameters: as :class:`LSTM` without a projection, rows in the order z, i, f, o.

    It is a custom cell (:func:`load_cell`) that comes with the package: the first call in a dtype on a machine has its
    kernels compiled, which takes some seconds and a C++ compiler. Without one it runs by the formulas, in PyTorch's
    operations, and :func:`explain` says so.
    """

    Cell = SLSTMCell
    _custom = _SLSTM["_custom"]
    _step = _SLSTM["_step"]
