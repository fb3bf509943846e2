"""Independently recurrent layers, which ``torch.nn`` lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from . import _checks
from .layers import _SingleState
from .options import changed_options
from .settings import INDRNN_OPTIONS, LAYER_OPTIONS, NOTHING_AROUND, IndRNNOptions, show_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["IndRNN"]


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
        for name, weight in list(self.named_parameters(recurse=False)):
            if name.startswith("weight_hh"):
                setattr(self, name, nn.Parameter(weight.detach().squeeze(1)))
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
        for name, weight in self.named_parameters(recurse=False):
            if name.startswith("weight_hh"):
                nn.init.uniform_(weight, *self.recurrent_range)

    def extra_repr(self) -> str:
        changed: dict[str, Any] = {"nonlinearity": self.nonlinearity} if self.nonlinearity != "relu" else {}
        if self.recurrent_range != (0.0, 1.0):
            changed["recurrent_range"] = self.recurrent_range
        changed |= changed_options(self, INDRNN_OPTIONS)
        return nn.RNNBase.extra_repr(self) + "".join(f", {name}={value!r}" for name, value in changed.items())
