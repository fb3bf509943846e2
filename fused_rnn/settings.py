"""What a call computes, as records that every level hands on whole.

A setting is written down here and in ``csrc/settings.h``. The operators take it in lists, in the order of the fields:
:meth:`Settings.flatten` and :meth:`Settings.restore` are the way between, :class:`Controls` is the same for tensors. An
option that is added is a field here and there; no function between a layer and the kernel that acts on it names it.
What Python does around the operators is an :class:`Around`, what the operators do beside the plain cell a
:class:`Within`.

Letters in shapes, in the whole package: T steps, B batch rows, N rows of packed data, I input_size, H hidden_size, P
proj_size (H without a projection), G gates per unit (LSTM 4, GRU 3, RNN 1), L layers, D directions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

# csrc/settings.h
OPERATORS_VERSION = 8


class CellShape(NamedTuple):
    """What a cell has per unit."""

    num_gates: int  # G: rows of W_ih and W_hh
    num_states: int  # private states beside h
    num_saved: int  # values that the kernels' forward pass saves for each step: csrc/cells


class AnyCellKind(IntEnum):
    """Which cell a layer repeats, as a number that stands for it in the operators."""

    @property
    def num_gates(self) -> int:
        """G: rows of W_ih and W_hh per hidden unit."""
        return _shapes[self.value].num_gates

    @property
    def num_states(self) -> int:
        """Private states beside h: 1 of an LSTM, whose c it is. They stand side by side, H features each."""
        return _shapes[self.value].num_states

    @property
    def num_saved(self) -> int:
        """Values per unit and step that the kernels' forward pass saves for the backward pass."""
        return _shapes[self.value].num_saved


class CellKind(AnyCellKind):
    """The cells that are built in; the values are those of the enumeration in ``csrc/problem.h``."""

    RNN_TANH = 0
    RNN_RELU = 1
    LSTM = 2
    GRU = 3


_shapes = {0: CellShape(1, 0, 0), 1: CellShape(1, 0, 0), 2: CellShape(4, 1, 4), 3: CellShape(3, 0, 4)}
_kinds: dict[int, AnyCellKind] = {kind.value: kind for kind in CellKind}


def add_kind(name: str, number: int, shape: CellShape) -> AnyCellKind:
    """A custom cell, whose number is that in ``csrc/cpu/custom.h``."""
    if number not in _kinds:
        _shapes[number] = shape
        members: Any = AnyCellKind  # whose call makes an enumeration
        _kinds[number] = members(f"KindOf_{name}", {name: number})[name]
    return _kinds[number]


def kind_of(number: int) -> AnyCellKind:
    """The kind of cell that a number among the operators' settings stands for."""
    kind = _kinds.get(number)
    if kind is None:
        raise ValueError(f"kind: expected that of a cell, got {number}; load_cell() the custom cell first")
    return kind


class Activation(IntEnum):
    """Functions of a gate or state by the names that users give them, in lower case; those of ``csrc/problem.h``."""

    TANH = 0
    SIGMOID = 1
    RELU = 2
    HARD_SIGMOID = 3
    SOFTSIGN = 4
    IDENTITY = 5


ACTIVATIONS = tuple(activation.name.lower() for activation in Activation)
# Of an RNN that is no CellKind by itself, but one of tanh with another activation.
OTHER_NONLINEARITIES = tuple(name for name in ACTIVATIONS if name not in ("tanh", "relu"))


class FunctionOptions(TypedDict, total=False):
    """Keywords that ``torch.nn`` lacks and a functional call shares with a layer's constructor.

    Their defaults are those of :class:`Settings`, :class:`Around` and :class:`Within`.
    """

    recompute: bool
    input_dropout: float
    recurrent_dropout: float
    weight_dropout: float
    zoneout: float
    zoneout_cell: float
    activation: str
    recurrent_activation: str
    reset_after: bool
    recurrent_bias: bool
    peephole: bool
    coupled_gates: bool
    num_heads: int
    layer_norm: bool
    cell_clip: float | None
    recurrent_grad_clip: float | None
    bptt_steps: int | None


class LayerOptions(FunctionOptions, total=False):
    """Keywords of a layer's constructor that ``torch.nn`` lacks."""

    stateful: bool
    init: str
    forget_bias: float | None


class StepOptions(TypedDict, total=False):
    """Keywords of a call that say something of its steps: fields of :class:`Steps`."""

    lengths: Tensor | None
    mask: Tensor | None
    reset: Tensor | None
    reset_state: Tensor | tuple[Tensor, Tensor] | None


class ForwardOptions(StepOptions, total=False):
    """Keywords of a layer's ``forward`` that ``torch.nn`` lacks."""

    return_states: bool


class CallOptions(FunctionOptions, ForwardOptions, total=False):
    """Keywords of a functional call that ``torch.nn`` lacks."""


class IndRNNFunctionOptions(TypedDict, total=False):
    """Of :class:`FunctionOptions`, those that have a meaning for an IndRNN."""

    input_dropout: float
    recurrent_dropout: float
    weight_dropout: float
    zoneout: float
    recurrent_grad_clip: float | None
    bptt_steps: int | None


class IndRNNOptions(IndRNNFunctionOptions, total=False):
    """Keywords of an IndRNN's constructor that other layers have, too."""

    stateful: bool


class IndRNNCallOptions(IndRNNFunctionOptions, ForwardOptions, total=False):
    """Keywords of a functional call of an IndRNN."""


class FunctionKeywords(FunctionOptions, StepOptions, total=False):
    """All keywords of a functional GRU but ``return_states``, which decides what a call returns."""

    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    batch_sizes: Tensor | None


class LSTMKeywords(FunctionKeywords, total=False):
    proj_size: int


class RNNKeywords(FunctionKeywords, total=False):
    nonlinearity: str


class StepFunctionOptions(TypedDict, total=False):
    """Keywords of a functional cell: those of :class:`Within` that have a meaning for one step."""

    recurrent_dropout: float
    zoneout: float
    zoneout_cell: float
    activation: str
    recurrent_activation: str
    reset_after: bool
    coupled_gates: bool
    num_heads: int
    cell_clip: float | None


class CellOptions(StepFunctionOptions, total=False):
    """Keywords of a cell's constructor that ``torch.nn`` lacks; a function is given the parameters themselves."""

    peephole: bool
    layer_norm: bool


class IndRNNStepFunctionOptions(TypedDict, total=False):
    """Of :class:`StepFunctionOptions`, those that have a meaning for an IndRNN."""

    recurrent_dropout: float
    zoneout: float


class Around(NamedTuple):
    """What Python does around the operators of a call; see :class:`fused_rnn.LSTM` for the meaning of each."""

    input_dropout: float = 0.0  # in this call, as weight_dropout: 0 in eval mode
    weight_dropout: float = 0.0
    recurrent_bias: bool = True
    stateful: bool = False  # of a layer: no function has it
    independent: bool = False  # of an IndRNN, whose W_hh are vectors (H): the operators get (H, 1)

    def in_eval_mode(self) -> Around:
        return self._replace(input_dropout=0.0, weight_dropout=0.0)


NOTHING_AROUND = Around()
OF_INDEPENDENT_UNITS = Around(recurrent_bias=False, independent=True)


class Within(NamedTuple):
    """What the operators do beside the plain cell; see :class:`fused_rnn.LSTM` for the meaning of each.

    Up to ``return_states`` the fields go to the operators as integers, then up to ``zoneout_cell`` as numbers; the rest
    is for Python, which draws by it what :class:`Controls` have.
    """

    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    reset_after: bool = True
    peephole: bool = False
    coupled_gates: bool = False
    num_heads: int = 1
    layer_norm: bool = False
    bptt_steps: int | None = None
    reset_state: bool = False  # the parameters are followed by the states that rows begin anew from
    return_states: bool = False  # h and c of every step are results, with gradients

    cell_clip: float | None = None
    recurrent_grad_clip: float | None = None
    zoneout: float = 0.0
    zoneout_cell: float = 0.0

    recurrent_dropout: float = 0.0  # in this call: 0 in eval mode
    training: bool = False  # whether zoneout is drawn; else states are what they would be on average

    def in_mode(self, training: bool) -> Within:
        """Of a call in training mode, or in eval mode, where nothing is drawn."""
        if training:
            return self._replace(training=bool(self.zoneout or self.zoneout_cell))
        return self._replace(recurrent_dropout=0.0, training=False)

    def integers(self) -> list[int]:
        activations = [int(Activation[name.upper()]) for name in self[:2]]
        return activations + [0 if value is None else int(value) for value in self[2:_END_OF_WITHIN_INTEGERS]]

    def numbers(self) -> list[float]:
        return [0.0 if value is None else float(value) for value in self[_END_OF_WITHIN_INTEGERS:_END_OF_WITHIN]]

    @staticmethod
    def restore(integers: Sequence[int], numbers: Sequence[float]) -> Within:
        activation, recurrent_activation = (Activation(value).name.lower() for value in integers[:2])
        reset_after, peephole, coupled_gates, num_heads, layer_norm, bptt_steps, reset_state, return_states = integers[
            2:
        ]
        cell_clip, recurrent_grad_clip, zoneout, zoneout_cell = numbers
        return Within(
            activation=activation,
            recurrent_activation=recurrent_activation,
            reset_after=bool(reset_after),
            peephole=bool(peephole),
            coupled_gates=bool(coupled_gates),
            num_heads=num_heads,
            layer_norm=bool(layer_norm),
            bptt_steps=bptt_steps or None,
            reset_state=bool(reset_state),
            return_states=bool(return_states),
            cell_clip=cell_clip or None,
            recurrent_grad_clip=recurrent_grad_clip or None,
            zoneout=zoneout,
            zoneout_cell=zoneout_cell,
        )


_END_OF_WITHIN_INTEGERS = Within._fields.index("return_states") + 1
_END_OF_WITHIN = Within._fields.index("zoneout_cell") + 1
NOTHING_WITHIN = Within()


class Settings(NamedTuple):
    """Everything about a call of a layer or cell that is no tensor.

    After the sizes, the fields from ``kind`` on go to the operators; those from ``dropout`` on concern Python alone.
    """

    input_size: int
    hidden_size: int
    state_size: int  # P

    kind: AnyCellKind
    bias: bool = True
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    recompute: bool = False

    dropout: float = 0.0  # between layers, in this call: 0 in eval mode
    cell_names: tuple[str, ...] = ()  # of a cell: what its caller calls w_ih, w_hh[, b_ih, b_hh]
    around: Around | None = None  # None: nothing
    within: Within | None = None  # None: the plain cell

    @property
    def num_biases(self) -> int:
        """Of each layer and direction."""
        return 0 if not self.bias else 1 if self.around is not None and not self.around.recurrent_bias else 2

    @property
    def has_peepholes(self) -> bool:
        return self.within is not None and self.within.peephole

    @property
    def num_norms(self) -> int:
        """Parameters of layer normalisation of each layer and direction: gains, and for an LSTM the bias of c."""
        if self.within is None or not self.within.layer_norm:
            return 0
        return 2 if self.kind is not CellKind.LSTM else 3 + self.bias

    @property
    def num_heads(self) -> int:
        return 1 if self.within is None else self.within.num_heads

    @property
    def is_independent(self) -> bool:
        return self.around is not None and self.around.independent

    @property
    def is_cell(self) -> bool:
        return bool(self.cell_names)

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def flatten(self) -> tuple[list[int], list[float]]:
        """The arguments ``settings`` and ``numbers`` of the operators."""
        values: Any = self[_FIRST_INTEGER:_END_OF_INTEGERS]
        within = self.within
        if within is None:
            return [*map(int, values), OPERATORS_VERSION], []
        return [*map(int, values), *within.integers(), OPERATORS_VERSION], within.numbers()

    @staticmethod
    def restore(integers: Sequence[int], numbers: Sequence[float], input: Tensor, params: Sequence[Tensor]) -> Settings:
        """The settings that :meth:`flatten` made lists of; sizes are those of the tensors."""
        if integers[-1] != OPERATORS_VERSION:
            raise ValueError(
                f"settings: expected those of version {OPERATORS_VERSION} of the operators, got {list(integers)}: "
                "compile or export the model again with this version of fused_rnn"
            )
        kind = kind_of(integers[0])
        rows, columns = params[1].shape
        end = len(INTEGER_SETTINGS)
        values: Any = (kind, *integers[1:end])
        settings = Settings(input.shape[-1], rows // kind.num_gates, columns, *values)
        if not numbers:
            return settings
        within = Within.restore(integers[end:-1], numbers)
        return settings._replace(state_size=columns * within.num_heads, within=within)


# Settings from the tuple of all fields: what a small call of a layer feels less than Settings(...).
new_settings: Callable[[type[Settings], tuple[Any, ...]], Settings] = tuple.__new__

_FIRST_INTEGER = Settings._fields.index("kind")
_END_OF_INTEGERS = Settings._fields.index("dropout")

# In the order of the operators' list.
INTEGER_SETTINGS = Settings._fields[_FIRST_INTEGER:_END_OF_INTEGERS]
# Keywords with their defaults.
_DEFAULTS = Settings._field_defaults | Around._field_defaults | Within._field_defaults
FUNCTION_OPTIONS: dict[str, Any] = {name: _DEFAULTS[name] for name in FunctionOptions.__annotations__}
LAYER_OPTIONS: dict[str, Any] = FUNCTION_OPTIONS | {
    "stateful": _DEFAULTS["stateful"],
    "init": "torch",
    "forget_bias": None,
}
STEP_OPTIONS: dict[str, Any] = dict.fromkeys(StepOptions.__annotations__) | {"return_states": False}
CALL_OPTIONS = FUNCTION_OPTIONS | STEP_OPTIONS
INDRNN_OPTIONS: dict[str, Any] = {name: LAYER_OPTIONS[name] for name in IndRNNOptions.__annotations__}
INDRNN_CALL_OPTIONS: dict[str, Any] = {name: CALL_OPTIONS[name] for name in IndRNNCallOptions.__annotations__}
STEP_FUNCTION_OPTIONS: dict[str, Any] = {name: _DEFAULTS[name] for name in StepFunctionOptions.__annotations__}
CELL_OPTIONS: dict[str, Any] = {name: _DEFAULTS[name] for name in CellOptions.__annotations__}
INDRNN_STEP_OPTIONS: dict[str, Any] = {name: _DEFAULTS[name] for name in IndRNNStepFunctionOptions.__annotations__}
# Of layers that exist already: those that leave their parameters as they are.
CONVERT_OPTIONS = {
    name: default
    for name, default in LAYER_OPTIONS.items()
    if name not in ("recurrent_bias", "num_heads", "layer_norm", "init", "forget_bias")
}

# Every set of sizes in use, a few per model: a cell's step feels the making of a record.
_of_cells: dict[tuple[Any, ...], Settings] = {}


def cell_settings(*cell: Any) -> Settings:
    """Of a cell: kind, input_size, hidden_size, the names that its caller has for w_ih, w_hh[, b_ih[, b_hh]][,
    w_peephole][, those of its norms], and what is within and around, if anything."""
    if torch.compiler.is_compiling():  # what changes with every cell is no condition of what is compiled
        return _make_cell_settings(*cell)
    settings = _of_cells.get(cell)
    if settings is None:
        settings = _of_cells[cell] = _make_cell_settings(*cell)
    return settings


def _make_cell_settings(
    kind: AnyCellKind,
    input_size: int,
    hidden_size: int,
    names: tuple[str, ...],
    within: Within | None = None,
    around: Around | None = None,
) -> Settings:
    bias = len(names) > 2 and names[2].startswith("b")
    return Settings(input_size, hidden_size, hidden_size, kind, bias, cell_names=names, around=around, within=within)


class Steps(NamedTuple):
    """Which steps a call has, where rows begin anew, and whether all are wanted, as its caller says it."""

    batch_sizes: Tensor | None = None  # int64 (T) on the CPU: the batch is packed
    lengths: Tensor | None = None
    mask: Tensor | None = None
    reset: Tensor | None = None
    reset_state: Any = None  # as hx: h, or (h, c) of an LSTM
    return_states: bool = False  # the states of every step, beside the output and those after the last


EVERY_STEP = Steps()
STATES_OF_EVERY_STEP = Steps(return_states=True)


class Controls(NamedTuple):
    """Tensors without a gradient that steer a call of a stack, as the operators take them: ``csrc/settings.h``."""

    batch_sizes: Tensor | None = None  # int64 (T) on the CPU: the batch is packed
    mask: Tensor | None = None  # bool (T, B): which steps are live
    dropout: Tensor | None = None  # (L - 1, T, B, D * P) or (L - 1, N, D * P): factors of all outputs but the last
    reset: Tensor | None = None  # bool (T, B): rows that begin anew before a step, or in the reverse direction after it
    recurrent_dropout: Tensor | None = None  # (L * D, B, P): factors of h before W_hh
    # uint8 (L * D, T * B or N, size / 8), bit u % 8 of byte u / 8 for unit u: which keep the state before the step.
    zoneout: Tensor | None = None  # of h, size P
    zoneout_cell: Tensor | None = None  # of c, size H

    def flatten(self, input: Tensor) -> list[Tensor]:
        """The argument ``controls`` of the operators."""
        if all(t is None for t in self):
            return []
        nothing = input.new_empty(0)
        return [nothing if t is None else t for t in self]

    @staticmethod
    def restore(controls: Sequence[Tensor]) -> Controls:
        return Controls(*(None if tuple(t.shape) == (0,) else t for t in controls))


NO_CONTROLS = Controls()

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def show_options(defaults: Mapping[str, Any]) -> Callable[[FunctionT], FunctionT]:
    """Lets :func:`inspect.signature`, and with it ``help``, name the options that a function takes as keywords."""

    def decorate(function: FunctionT) -> FunctionT:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        named += [inspect.Parameter(name, keyword_only, default=default) for name, default in defaults.items()]
        function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
        return function

    return decorate
