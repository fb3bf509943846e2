"""Single-step recurrent cells with the constructor, parameters and results of ``torch.nn``'s."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import _checks, functional
from .settings import CellKind, Settings, cell_settings
from .twin import HasTwin
from .weights import ByAttribute

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(HasTwin, ByAttribute, nn.RNNCellBase):
    """What the three cells share; ``RNNCellBase`` creates and initialises the parameters."""

    def __init__(self, kind: CellKind, input_size: int, hidden_size: int, bias: bool, device: Any, dtype: Any) -> None:
        _checks.check_cell_constructor(input_size, hidden_size)
        super().__init__(input_size, hidden_size, bias, kind.num_gates, device, dtype)

    def _kind(self) -> CellKind:
        raise NotImplementedError

    def _params(self) -> list[Any]:
        """The parameters as they are now: see the layers. Biases are left out if there are none."""
        parameters: dict[str, Any] = self._parameters
        try:
            tensors = [parameters[name] for name in _NAMES]
        except KeyError:  # parametrized, or replaced by a plain tensor
            tensors = [getattr(self, name) for name in _NAMES]
        return functional.cell_params(*tensors)

    def _params_by_attribute(self) -> list[Any]:
        return functional.cell_params(*[getattr(self, name) for name in _NAMES])

    def _settings(self) -> Settings:
        """Everything a call needs to know but its tensors."""
        return cell_settings(self._kind(), self.input_size, self.hidden_size, _NAMES[: len(self._params())])

    def _run(self, input: Tensor, hx: Any, reset: Any, reset_state: Any) -> Any:
        params = self._params()
        settings = cell_settings(self._kind(), self.input_size, self.hidden_size, _NAMES[: len(params)])
        return functional.call_cell(settings, input, hx, params, functional.cell_steps(reset, reset_state))


class LSTMCell(_Cell):
    """One step of an LSTM, drop-in for :class:`torch.nn.LSTMCell`; the formula is :class:`fused_rnn.LSTM`'s.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: a size that is no int, or negative.

    Parameters, drawn uniformly between plus and minus 1 / sqrt(H): ``weight_ih`` (4*H, I), ``weight_hh`` (4*H, H),
    ``bias_ih`` and ``bias_hh`` (4*H), or ``None``. Rows in the order i, f, g, o.
    """

    _torch_class = nn.LSTMCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(CellKind.LSTM, input_size, hidden_size, bias, device, dtype)

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


class GRUCell(_Cell):
    """One step of a GRU, drop-in for :class:`torch.nn.GRUCell`; the formula is :class:`fused_rnn.GRU`'s.

    Arguments, errors and parameters: see :class:`LSTMCell`, with 3*H rows in the order r, z, n.
    """

    _torch_class = nn.GRUCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(CellKind.GRU, input_size, hidden_size, bias, device, dtype)

    def _kind(self) -> CellKind:
        return CellKind.GRU

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


class RNNCell(_Cell):
    """One step of an Elman network, drop-in for :class:`torch.nn.RNNCell`; the formula is :class:`fused_rnn.RNN`'s.

    Arguments, errors and parameters: see :class:`LSTMCell`, with H rows, and ``nonlinearity`` ``"tanh"`` or ``"relu"``.
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]

    _torch_class = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _checks.check_nonlinearity(nonlinearity)
        super().__init__(CellKind.RNN_TANH, input_size, hidden_size, bias, device, dtype)
        self.nonlinearity = nonlinearity

    def _kind(self) -> CellKind:
        return functional.rnn_kind(self.nonlinearity)

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
