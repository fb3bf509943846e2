"""Single-step recurrent cells with the constructor, parameters and results of ``torch.nn``'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from . import _checks, functional, initial
from .options import HasOptionsWithin, changed_options, set_options
from .settings import (
    CELL_OPTIONS,
    NOTHING_WITHIN,
    AnyCellKind,
    Around,
    CellKind,
    CellOptions,
    ForwardOptions,
    Settings,
    Within,
    cell_settings,
    show_options,
)
from .twin import HasTwin
from .weights import ByAttribute, narrow_to_heads

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class RecurrentCell(HasTwin, HasOptionsWithin, ByAttribute, nn.RNNCellBase):
    """What all cells share; ``RNNCellBase`` creates and initialises the parameters."""

    # Of torch.nn's cells; others say what they have in place of it.
    _names: ClassVar[tuple[str, ...]] = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    _params_of: ClassVar[Callable[..., list[Any]]] = staticmethod(functional.cell_params)  # of these, one by one
    _least_size: ClassVar[int] = 0
    _around: ClassVar[Around | None] = None

    def __init__(
        self,
        kind: AnyCellKind,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Any,
        dtype: Any,
        options: CellOptions,
    ) -> None:
        _checks.check_cell_constructor(input_size, hidden_size, self._least_size)
        _checks.check_names("a cell", options, CELL_OPTIONS)
        _checks.check_options(options)
        is_lstm, is_gru = kind == CellKind.LSTM, kind == CellKind.GRU
        _checks.check_fit(options, is_lstm=is_lstm, is_gru=is_gru, hidden_size=hidden_size)
        num_heads = options.get("num_heads", 1)
        if num_heads > 1:
            self._has_shapes = False
        super().__init__(input_size, hidden_size, bias, kind.num_gates, device, dtype)
        if num_heads > 1:
            narrow_to_heads(self, num_heads)
            self._within = NOTHING_WITHIN._replace(num_heads=num_heads)
            del self._has_shapes
            self.reset_parameters()
        set_options(self, options, CELL_OPTIONS)
        if self.peephole:
            initial.draw_peepholes(self)

    _has_shapes: bool = True  # False while RNNCellBase's constructor runs, whose W_hh is no heads'
    __jit_unused_properties__ = list(CELL_OPTIONS)  # torch.jit.script of a subclass passes them by

    def _prepare_option(self, name: str, value: Any) -> None:
        """Before an option is set: see that it fits, and that what belongs to it is there."""
        _checks.check_options({name: value})
        kind = self._kind()
        is_lstm, is_gru = kind == CellKind.LSTM, kind == CellKind.GRU
        _checks.check_fit({name: value}, is_lstm=is_lstm, is_gru=is_gru, hidden_size=self.hidden_size)
        if name == "num_heads":
            _checks.check_same_heads(value, self.num_heads)
        if name == "peephole" and value != self.peephole:
            if value:
                zeros = self.weight_ih.detach().new_zeros(3 * self.hidden_size)
                self.register_parameter("weight_peephole", nn.Parameter(zeros))
            else:
                del self.weight_peephole
        if name == "layer_norm" and value != self.layer_norm:
            rows = kind.num_gates * self.hidden_size
            for norm in self._norm_names():
                if value:
                    size = self.hidden_size if norm.endswith("_c") else rows
                    self.register_parameter(norm, nn.Parameter(self.weight_ih.detach().new_zeros(size)))
                else:
                    delattr(self, norm)
            initial.set_norms(self)

    def _norm_names(self) -> tuple[str, ...]:
        """Parameters of layer normalisation."""
        names = ("weight_norm_ih", "weight_norm_hh", "weight_norm_c", "bias_norm_c")
        return names[: 2 if self._kind() != CellKind.LSTM else 3 + self.bias]

    def reset_parameters(self) -> None:
        """Draw the parameters anew, uniformly between plus and minus 1 / sqrt(H); peepholes too. Gains of layer
        normalisation are 1, biases 0."""
        if self._has_shapes:
            super().reset_parameters()
            initial.set_norms(self)

    def extra_repr(self) -> str:
        changed = [f", {name}={value!r}" for name, value in changed_options(self, CELL_OPTIONS).items()]
        return super().extra_repr() + "".join(changed)

    def _kind(self) -> AnyCellKind:
        raise NotImplementedError

    def _params(self) -> list[Any]:
        """The parameters as they are now: see the layers. Biases are left out if there are none."""
        parameters: dict[str, Any] = self._parameters
        try:
            tensors = [parameters[name] for name in self._names]
        except KeyError:  # parametrized, or replaced by a plain tensor
            tensors = [getattr(self, name) for name in self._names]
        params = self._params_of(*tensors)
        return params if self._within is None else [*params, *self._params_of_options()]

    def _params_by_attribute(self) -> list[Any]:
        return [*self._params_of(*[getattr(self, name) for name in self._names]), *self._params_of_options()]

    def _params_of_options(self) -> list[Any]:
        return [getattr(self, name) for name in self._names_of_options()]

    def _names_of_options(self) -> tuple[str, ...]:
        peephole = ("weight_peephole",) if self.peephole else ()
        return (*peephole, *self._norm_names()) if self.layer_norm else peephole

    def _call_within(self) -> Within | None:
        """What the next call has beside the plain cell; of an RNN also its nonlinearity."""
        within = None if self._within is None else self._within.in_mode(self.training)
        return None if within == NOTHING_WITHIN else within

    def _settings(self) -> Settings:
        """Everything a call needs to know but its tensors."""
        return self._settings_for(self._params())

    def _settings_for(self, params: list[Any]) -> Settings:
        kind, within = self._kind(), self._within
        if within is not None or kind == CellKind.RNN_TANH:
            within = self._call_within()
        if within is None:
            names = self._names[: len(params)]
            return cell_settings(kind, self.input_size, self.hidden_size, names, None, self._around)
        of_options = self._names_of_options()
        names = (*self._names[: len(params) - len(of_options)], *of_options)
        return cell_settings(kind, self.input_size, self.hidden_size, names, within, self._around)

    def _run(self, input: Tensor, hx: Any, reset: Any, reset_state: Any) -> Any:
        params = self._params()
        steps = functional.cell_steps(reset, reset_state)
        return functional.call_cell(self._settings_for(params), input, hx, params, steps)

    def _for_operators(self, hx: Any, steps: ForwardOptions) -> tuple[Any, ForwardOptions]:
        """States as functions and operators have them: h, or (h, c)."""
        return hx, steps


class LSTMCell(RecurrentCell):
    """One step of an LSTM, drop-in for :class:`torch.nn.LSTMCell`; the formula is :class:`fused_rnn.LSTM`'s.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.
        activation, recurrent_activation, coupled_gates, cell_clip, peephole: as :class:`fused_rnn.LSTM` has them.
        num_heads, layer_norm: the same.
        recurrent_dropout, zoneout, zoneout_cell: the same, drawn for each step.

    Raises:
        TypeError, ValueError: a size that is no int, or negative; an option of another type, or out of range.

    Parameters, drawn uniformly between plus and minus 1 / sqrt(H): ``weight_ih`` (4*H, I), ``weight_hh``
    (4*H, H / num_heads), ``bias_ih`` and ``bias_hh`` (4*H), or ``None``. Rows in the order i, f, g, o. With
    ``peephole`` also ``weight_peephole`` (3*H), in the order i, f, o. With ``layer_norm`` also ``weight_norm_ih``,
    ``weight_norm_hh`` (4*H), ``weight_norm_c`` and, with ``bias``, ``bias_norm_c`` (H), gains of 1 and a bias of 0.
    """

    _torch_class = nn.LSTMCell

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
        super().__init__(CellKind.LSTM, input_size, hidden_size, bias, device, dtype, options)

    def _kind(self) -> CellKind:
        return CellKind.LSTM

    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        reset: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: (B, I), or (I) without a batch.
            hx: ``(h, c)``, each (B, H), or (H) without a batch; ``None`` for zeros.
            reset: bool (B), or () without a batch, on the input's device: rows whose state is thrown away before the
                step.
            reset_state: ``(h, c)`` that they begin anew from, shaped like ``hx``; ``None`` for zeros. Only with
                ``reset``.

        Returns:
            ``(h, c)`` after the step, shaped as ``hx``.

        Raises:
            TypeError: ``input`` or ``hx`` is another kind of object.
            ValueError: a wrong number of dimensions, or an input of another dtype than the parameters.
            RuntimeError: another size, dtype or device that does not fit.
        """
        return self._run(input, hx, reset, reset_state)


class _SingleStateCell(RecurrentCell):
    """Cells whose state is h alone."""

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> Tensor:
        """One step: ``hx`` is h (B, H), or (H) without a batch, and so are ``reset_state`` and the result.

        The rest, and errors: see :class:`LSTMCell`.
        """
        return self._run(input, hx, reset, reset_state)


class GRUCell(_SingleStateCell):
    """One step of a GRU, drop-in for :class:`torch.nn.GRUCell`; the formula is :class:`fused_rnn.GRU`'s.

    Arguments, errors and parameters: see :class:`LSTMCell`, with 3*H rows in the order r, z, n. Of the options those
    of :class:`fused_rnn.GRU`.
    """

    _torch_class = nn.GRUCell

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
        super().__init__(CellKind.GRU, input_size, hidden_size, bias, device, dtype, options)

    def _kind(self) -> CellKind:
        return CellKind.GRU


class RNNCell(_SingleStateCell):
    """One step of an Elman network, drop-in for :class:`torch.nn.RNNCell`; the formula is :class:`fused_rnn.RNN`'s.

    Arguments, errors and parameters: see :class:`LSTMCell`, with H rows, and ``nonlinearity``, one of
    :class:`fused_rnn.RNN`'s. Of the options ``recurrent_dropout``, ``zoneout``, ``num_heads`` and ``layer_norm``.
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]

    _torch_class = nn.RNNCell

    @show_options(CELL_OPTIONS)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[CellOptions],
    ) -> None:
        _checks.check_nonlinearity(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(CellKind.RNN_TANH, input_size, hidden_size, bias, device, dtype, options)

    def _kind(self) -> CellKind:
        return functional.rnn_kind(self.nonlinearity)

    def _call_within(self) -> Within | None:
        if self._within is None and self.nonlinearity == "tanh":  # the usual one
            return None
        return functional.with_nonlinearity(super()._call_within(), self.nonlinearity)
