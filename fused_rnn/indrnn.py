"""Independently recurrent layers, which ``torch.nn`` lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from . import _checks, functional
from .cells import _SingleStateCell
from .layers import _SingleState
from .options import changed_options
from .settings import (
    CELL_OPTIONS,
    INDRNN_OPTIONS,
    INDRNN_STEP_OPTIONS,
    LAYER_OPTIONS,
    NOTHING_AROUND,
    OF_INDEPENDENT_UNITS,
    CellKind,
    IndRNNOptions,
    IndRNNStepFunctionOptions,
    Within,
    show_options,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["IndRNN", "IndRNNCell"]


class IndRNN(_SingleState):
    r"""Independently recurrent layers over a sequence (Li, Li, Cook, Zhu and Gao 2018), with :class:`RNN`'s arguments.

    For each layer and step, with a weight :math:`u` for each unit in place of a matrix:

    .. math::
        h_t = \max(0, W_{ih} x_t + b + u \odot h_{t-1}), \quad\text{or another function in place of } \max(0, \cdot)

    A unit sees its own h alone, units meet in the layer above. The gradient that comes back through T steps is
    :math:`u^T` at the most: it neither vanishes nor explodes while :math:`|u|` is near 1, which lets rectified units
    and many layers learn.

    Args:
        nonlinearity: ``"relu"``, or one of the others that :class:`RNN` has.
        bias: whether there is ``bias_ih``. There is no second bias.
        recurrent_range: the first values of u are drawn uniformly between these two. The authors' 0 and 1 give units
            memories of all lengths; where only the last of T steps is read, they have
            ``(0.5 ** (1 / T), 2 ** (1 / T))`` in the last layer.
        input_dropout, recurrent_dropout, weight_dropout, zoneout, recurrent_grad_clip, bptt_steps, stateful: as
            :class:`LSTM` has them. ``weight_dropout`` is of u.
        input_size, hidden_size, num_layers, batch_first, dropout, bidirectional, device, dtype: the same.

    Raises:
        TypeError, ValueError: naming the argument that has another type or is out of range.

    Parameters, for layer k, and with suffix ``_reverse`` for the second direction: ``weight_ih_l{k}`` (H, I; D*H in
    place of I for k > 0) and ``bias_ih_l{k}`` (H), drawn uniformly between :math:`\pm 1 / \sqrt{H}`, and u,
    ``weight_hh_l{k}`` (H).

    It is :class:`RNN` with ``num_heads=hidden_size`` and ``recurrent_bias=False``, whose ``weight_hh`` is (H, 1), in
    the same kernels. ``torch.nn`` has nothing to :func:`revert` it to.

    Example::

        >>> layer = fused_rnn.IndRNN(10, 20, num_layers=6)
        >>> output, h_n = layer(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([6, 3, 20]))
    """

    @show_options(INDRNN_OPTIONS)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        recurrent_range: tuple[float, float] = (0.0, 1.0),
        **options: Unpack[IndRNNOptions],
    ) -> None:
        _checks.check_names("an IndRNN", options, INDRNN_OPTIONS)
        _checks.check_nonlinearity(nonlinearity)
        _checks.check_range("recurrent_range", recurrent_range)
        self.nonlinearity = nonlinearity
        self.recurrent_range = recurrent_range
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
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
            {**options, "num_heads": hidden_size, "recurrent_bias": False},
        )
        self._around = (self._around or NOTHING_AROUND)._replace(independent=True)
        _narrow_to_vectors(self)
        self._init_flat_weights()
        self.reset_parameters()

    def _prepare_option(self, name: str, value: Any) -> None:
        if name not in INDRNN_OPTIONS:
            only = {"num_heads": self.hidden_size, "recurrent_bias": False}.get(name, LAYER_OPTIONS[name])
            _checks.check_only_value(name, only, value)
        super()._prepare_option(name, value)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, u as ``recurrent_range`` says."""
        if self._around is None or not self._around.independent:  # the parameters are not yet what they will be
            return
        super().reset_parameters()
        _draw_vectors(self)

    def extra_repr(self) -> str:
        return nn.RNNBase.extra_repr(self) + _show_changed(self, INDRNN_OPTIONS)


class IndRNNCell(_SingleStateCell):
    """One step of an independently recurrent network, whose layers and formula are :class:`IndRNN`'s.

    Args:
        input_size, hidden_size, bias, device, dtype: as :class:`fused_rnn.RNNCell`, with sizes of at least 1.
        nonlinearity, recurrent_range: as :class:`IndRNN` has them.
        recurrent_dropout, zoneout: the same, drawn for each step.

    Raises:
        TypeError, ValueError: naming the argument that has another type or is out of range.

    Parameters: ``weight_ih`` (H, I), u as ``weight_hh`` (H), and ``bias_ih`` (H) or ``None``, drawn as the layer's.

    Example::

        >>> cell = fused_rnn.IndRNNCell(10, 20)
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]

    _names = ("weight_ih", "weight_hh", "bias_ih")
    _params_of = staticmethod(functional.indrnn_cell_params)
    _least_size = 1
    _around = OF_INDEPENDENT_UNITS
    _has_vectors: bool = False  # while the constructors of what it derives from run

    @show_options(INDRNN_STEP_OPTIONS)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device: Any = None,
        dtype: Any = None,
        *,
        recurrent_range: tuple[float, float] = (0.0, 1.0),
        **options: Unpack[IndRNNStepFunctionOptions],
    ) -> None:
        _checks.check_names("an IndRNNCell", options, INDRNN_STEP_OPTIONS)
        _checks.check_nonlinearity(nonlinearity)
        _checks.check_range("recurrent_range", recurrent_range)
        self.nonlinearity = nonlinearity
        self.recurrent_range = recurrent_range
        as_rnn: Any = {**options, "num_heads": hidden_size}
        super().__init__(CellKind.RNN_TANH, input_size, hidden_size, bias, device, dtype, as_rnn)
        _narrow_to_vectors(self)
        del self.bias_hh
        self._has_vectors = True
        self.reset_parameters()

    def _kind(self) -> CellKind:
        return functional.rnn_kind(self.nonlinearity)

    def _call_within(self) -> Within | None:
        return functional.with_nonlinearity(super()._call_within(), self.nonlinearity)

    def _prepare_option(self, name: str, value: Any) -> None:
        if name not in INDRNN_STEP_OPTIONS:
            only = self.hidden_size if name == "num_heads" else CELL_OPTIONS[name]
            _checks.check_only_value(name, only, value)
        super()._prepare_option(name, value)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, u as ``recurrent_range`` says."""
        if self._has_vectors:
            super().reset_parameters()
            _draw_vectors(self)

    def extra_repr(self) -> str:
        bias = "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}" + _show_changed(self, INDRNN_STEP_OPTIONS)


# What the layer and the cell share.


def _narrow_to_vectors(module: nn.Module) -> None:
    """Every W_hh (H, 1) as a vector (H)."""
    for name, weight in list(module.named_parameters(recurse=False)):
        if name.startswith("weight_hh"):
            setattr(module, name, nn.Parameter(weight.detach().squeeze(1)))


def _draw_vectors(module: Any) -> None:
    for name, weight in module.named_parameters(recurse=False):
        if name.startswith("weight_hh"):
            nn.init.uniform_(weight, *module.recurrent_range)


def _show_changed(module: Any, options: Mapping[str, Any]) -> str:
    changed: dict[str, Any] = {"nonlinearity": module.nonlinearity} if module.nonlinearity != "relu" else {}
    if module.recurrent_range != (0.0, 1.0):
        changed["recurrent_range"] = module.recurrent_range
    changed |= changed_options(module, options)
    return "".join(f", {name}={value!r}" for name, value in changed.items())
