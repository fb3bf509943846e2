"""Recurrent layers and cells as functions of their parameters.

Shapes, with T steps, B batch rows, I ``input_size``, H ``hidden_size``, P ``proj_size`` (H without a projection),
L layers, D directions and G gates per unit (LSTM 4, GRU 3, RNN 1)::

    input        (T, B, I); (B, T, I) with batch_first; (T, I) without a batch; packed data (N, I) with batch_sizes
    h_0, h_n     (L*D, B, P), or (L*D, P) without a batch
    c_0, c_n     (L*D, B, H), or (L*D, H) without a batch
    output       as the input, with D*P in place of I
    lengths      (B), or () without a batch
    mask         (T, B); (B, T) with batch_first; (T) without a batch

``params`` is the flat list of :mod:`torch.nn`, for each layer, and in it each direction: ``weight_ih`` (G*H, I; D*P in
place of I above the first layer), ``weight_hh`` (G*H, P), with ``bias`` ``bias_ih`` (G*H) and ``bias_hh`` (G*H), with a
projection ``weight_hr`` (P, H). :func:`torch.nn.Module.parameters` of a layer gives it in this order. The rows of a
weight are in the order i, f, g, o for an LSTM and r, z, n for a GRU.

Dtypes: float32, float64, bfloat16 and float16, and the complex ones through the reference; input, states and
parameters share one. Under :class:`torch.autocast` they are cast as ``torch.nn`` has it: to the autocast dtype, except
that on the CPU a GRU, an LSTM with a packed input, ``lstm_cell`` and ``gru_cell`` keep the dtype of their state.

Errors: ``TypeError`` for an argument of another kind, ``ValueError`` for a wrong number of dimensions or an input of
another dtype than the parameters, ``RuntimeError`` for every other size, dtype or device that does not fit, each naming
the argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, backend
from .reference import CellKind

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

# What autocast casts; float64 and complex tensors it leaves alone.
_AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


def lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A stack of LSTM layers over a sequence (Hochreiter and Schmidhuber 1997; Gers 2000; projection: Sak 2014).

    Args:
        input, params: see the module for shapes and order.
        hx: ``(h_0, c_0)``, or ``None`` for zeros.
        bias: whether ``params`` holds biases.
        num_layers: L.
        dropout: probability with which an element of every layer's output but the last is zeroed while ``training``.
        training: whether dropout is applied.
        bidirectional: D = 2.
        batch_first: ``input`` and ``output`` are (B, T, .); without effect on unbatched and packed input.
        proj_size: P, 0 for none.
        batch_sizes: int64 (T) on the CPU, the number of sequences still running at each step, never rising; ``input``
            is then packed data as in :class:`torch.nn.utils.rnn.PackedSequence`.
        recompute: keep only the states for the backward pass, and compute the gates there again: less memory, more
            time, the same numbers.
        lengths: steps of each row from the first, any integer dtype on any device, 0 to T. On the CPU an error says if
            one is not in that range; on other devices, and under :func:`torch.compile`, a negative one counts as 0 and
            a larger one as T.
        mask: bool on the input's device, True for each step that counts. With ``lengths`` both must say so. In any
            other step a row keeps its state exactly, in either direction, and its output is 0; what stands in the input
            there, NaN included, changes nothing, and its gradient is 0. A row of no step ends in its initial state.
            Neither goes with ``batch_sizes``.

    Returns:
        ``(output, (h_n, c_n))``. With ``batch_first`` the output is a transposed view of (T, B, D*P) storage.
    """
    spec = _spec_of_params(CellKind.LSTM, params, proj_size, num_layers, bidirectional, bias)
    output, h_n, c_n = run_layers(
        spec, input, hx, params, batch_first, dropout, training, batch_sizes, recompute, lengths, mask
    )
    return output, (h_n, c_n)


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers over a sequence (Cho 2014; reset gate after the product with W_hh).

    Args:
        hx: ``h_0``, or ``None`` for zeros. The others: see :func:`lstm`.

    Returns:
        ``(output, h_n)``.
    """
    spec = _spec_of_params(CellKind.GRU, params, 0, num_layers, bidirectional, bias)
    output, h_n, _ = run_layers(
        spec, input, hx, params, batch_first, dropout, training, batch_sizes, recompute, lengths, mask
    )
    return output, h_n


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of Elman layers over a sequence (Elman 1990).

    Args:
        hx: ``h_0``, or ``None`` for zeros.
        nonlinearity: ``"tanh"`` or ``"relu"``. The others: see :func:`lstm`.

    Returns:
        ``(output, h_n)``.
    """
    spec = _spec_of_params(rnn_kind(nonlinearity), params, 0, num_layers, bidirectional, bias)
    output, h_n, _ = run_layers(
        spec, input, hx, params, batch_first, dropout, training, batch_sizes, recompute, lengths, mask
    )
    return output, h_n


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM.

    Args:
        input: (B, I), or (I) without a batch.
        hx: ``(h, c)``, each (B, H), or (H) without a batch; ``None`` for zeros.
        w_ih, w_hh: (4*H, I) and (4*H, H). b_ih, b_hh: (4*H), or ``None``.

    Returns:
        ``(h, c)`` after the step.
    """
    h, c = _functional_cell(CellKind.LSTM, input, hx, w_ih, w_hh, b_ih, b_hh)
    assert c is not None
    return h, c


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU: ``hx`` and the result are h, weights have 3*H rows, the rest is as for :func:`lstm_cell`."""
    return _functional_cell(CellKind.GRU, input, hx, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of an Elman network, ``"tanh"`` or ``"relu"``: weights have H rows, the rest as for :func:`gru_cell`."""
    return _functional_cell(rnn_kind(nonlinearity), input, hx, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_kind(nonlinearity: str) -> CellKind:
    _checks.check_nonlinearity(nonlinearity)
    return CellKind.RNN_TANH if nonlinearity == "tanh" else CellKind.RNN_RELU


def _spec_of_params(
    kind: CellKind, params: Sequence[Tensor], proj_size: int, num_layers: int, bidirectional: bool, bias: bool
) -> _checks.Spec:
    """Where no module says what the sizes are, the first input weight (G*H, I) does."""
    if not isinstance(params, (list, tuple)) or not params or not _is_matrix(params[0]):
        _checks.raise_first_weight(params)
    rows, input_size = params[0].shape
    hidden_size = rows // kind.num_gates
    _checks.check_counts(num_layers, proj_size, hidden_size)
    return _checks.layer_spec(kind, input_size, hidden_size, proj_size, num_layers, bidirectional, bias)


def _functional_cell(
    kind: CellKind,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if not _is_matrix(w_ih):
        _checks.raise_not_matrix("w_ih", w_ih)
    rows, input_size = w_ih.shape
    params = cell_params(w_ih, w_hh, b_ih, b_hh)
    names = ("w_ih", "w_hh", "b_ih", "b_hh")[: len(params)]
    return run_cell(_checks.cell_spec(kind, input_size, rows // kind.num_gates, names), input, hx, params)


def cell_params(w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> list[Any]:
    """Parameters of a cell as a list of four, or of two without biases; a bias missing beside the other is zeros."""
    if b_ih is None and b_hh is None:
        return [w_ih, w_hh]
    b_ih = torch.zeros_like(b_hh) if b_ih is None else b_ih
    b_hh = torch.zeros_like(b_ih) if b_hh is None else b_hh
    return [w_ih, w_hh, b_ih, b_hh]


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.dim() == 2


# What layers, cells and explain share.


class Call(NamedTuple):
    """A checked call, and who computes it."""

    input: Tensor
    h: Tensor | None
    c: Tensor | None
    num_steps: int
    batch: int | None  # None: no batch dimension
    why_reference: str | None  # None: the kernels compute it
    mask: Tensor | None  # (T, B), True where a row has a step; None: everywhere


def prepare_layers(
    spec: _checks.Spec,
    input: Tensor,
    hx: Any,
    params: Sequence[Any],
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Call:
    """Check a call of a whole stack."""
    h, c = (None, None) if hx is None else _checks.split_state(spec.kind, hx)
    num_steps, batch = _checks.check_layer_input(input, spec.input_size, batch_first, batch_sizes)
    _checks.check_params(spec, params, input)
    if h is not None:
        _checks.check_layer_states(spec, h, c, batch)
        _checks.check_states_like_input(input, h, c)
    if lengths is not None or mask is not None:
        _checks.check_lengths_and_mask(lengths, mask, input, num_steps, batch, batch_first, batch_sizes)
        mask = _live_steps(lengths, mask, input, num_steps, batch, batch_first)
    return Call(input, h, c, num_steps, batch, backend.why_reference(input), mask)


def _live_steps(
    lengths: Tensor | None, mask: Tensor | None, input: Tensor, num_steps: int, batch: int | None, batch_first: bool
) -> Tensor:
    """``lengths`` and ``mask``, one of which is given, as one mask (T, B) in the order of memory."""
    if mask is not None:
        if batch is None:
            mask = mask.unsqueeze(1)
        elif batch_first:
            mask = mask.transpose(0, 1)
    if lengths is not None:
        steps = torch.arange(num_steps, device=input.device).unsqueeze(1)
        # from the CPU to a GPU without waiting for it; the other way the values must have come before they are read
        before_end = steps < lengths.to(input.device, non_blocking=input.is_cuda).reshape(-1)
        mask = before_end if mask is None else mask & before_end
    assert mask is not None
    return mask.contiguous()


def run_layers(
    spec: _checks.Spec,
    input: Tensor,
    hx: Any,
    params: Sequence[Any],
    batch_first: bool,
    dropout: float,
    training: bool,
    batch_sizes: Tensor | None,
    recompute: bool,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole stack: ``(output, h_n, c_n)``, c_n empty unless it is an LSTM's."""
    drops = False
    if dropout:
        _checks.check_dropout(dropout)
        drops = training and spec.num_layers > 1
    usual = batch_sizes is None and lengths is None and mask is None and not drops
    # The operator checks what it is given, so the usual call need not be checked twice, which would take as long as a
    # small one computes. What is wrong with a call that is not valid, prepare_layers says in the user's terms.
    kernels = backend.eager_kernels() if usual else None
    if kernels is not None:
        done: tuple[Tensor, Tensor, Tensor] | None = kernels.try_rnn(
            spec.kind,
            spec.input_size,
            spec.hidden_size,
            spec.state_size,
            spec.bias,
            spec.num_layers,
            spec.bidirectional,
            batch_first,
            recompute,
            input,
            hx,
            params,
        )
        if done is not None:
            return done
    region = autocast_region(spec, input)
    if region is not None:
        input, hx, params = autocast(spec, region, input, hx, params, packed=batch_sizes is not None)
        with torch.autocast(region, enabled=False):
            return run_layers(
                spec, input, hx, params, batch_first, dropout, training, batch_sizes, recompute, lengths, mask
            )

    input, h, c, _, batch, why_reference, mask = prepare_layers(
        spec, input, hx, params, batch_first, batch_sizes, lengths, mask
    )
    if batch is None:
        input = input.unsqueeze(1)
        h = None if h is None else h.unsqueeze(1)
        c = None if c is None else c.unsqueeze(1)
    if batch is None or batch_sizes is not None:
        batch_first = False
    dropout_masks = _dropout_masks(spec, input, dropout, batch_first) if drops else []
    output, h_n, c_n = backend.implementation(why_reference).rnn(
        spec.kind,
        input,
        h,
        c,
        params,
        dropout_masks,
        batch_sizes,
        has_biases=spec.bias,
        num_layers=spec.num_layers,
        bidirectional=spec.bidirectional,
        batch_first=batch_first,
        recompute=recompute,
        mask=mask,
    )
    if batch is None:
        return output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1) if spec.kind == CellKind.LSTM else c_n
    return output, h_n, c_n


def prepare_cell(spec: _checks.Spec, input: Tensor, hx: Any, params: Sequence[Any]) -> Call:
    """Check a call of one cell. States that are not given are zeros afterwards."""
    h, c = (None, None) if hx is None else _checks.split_state(spec.kind, hx)
    sizes = _checks.check_cell_input(spec, input, h, c)
    _checks.check_params(spec, params, input)
    if h is None:
        h = input.new_zeros(*sizes, spec.hidden_size)
        c = h if spec.kind == CellKind.LSTM else None
    else:
        _checks.check_states_like_input(input, h, c)
    is_empty = spec.hidden_size == 0 or spec.input_size == 0
    why_reference = "a size of the cell is 0" if is_empty else backend.why_reference(input)
    return Call(input, h, c, 1, sizes[0] if sizes else None, why_reference, None)


def run_cell(spec: _checks.Spec, input: Tensor, hx: Any, params: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """One step of a cell: ``(h, c)``, c ``None`` unless it is an LSTM's."""
    kernels = backend.eager_kernels()  # as in run_layers
    if kernels is not None:
        done: tuple[Tensor, Tensor | None] | None = kernels.try_cell_step(
            spec.kind, spec.input_size, spec.hidden_size, input, hx, params
        )
        if done is not None:
            return done
    region = autocast_region(spec, input)
    if region is not None:
        input, hx, params = autocast(spec, region, input, hx, params)
        with torch.autocast(region, enabled=False):
            return run_cell(spec, input, hx, params)

    input, h, c, _, batch, why_reference, _ = prepare_cell(spec, input, hx, params)
    assert h is not None
    if batch is None:
        input, h, c = input.unsqueeze(0), h.unsqueeze(0), None if c is None else c.unsqueeze(0)
    weights = params if spec.bias else (*params, None, None)
    h, c = backend.implementation(why_reference).cell_step(spec.kind, input, h, c, *weights)
    if batch is None:
        return h.squeeze(0), None if c is None else c.squeeze(0)
    return h, c


def _dropout_masks(spec: _checks.Spec, input: Tensor, dropout: float, batch_first: bool) -> list[Tensor]:
    """A factor, 0 or 1 / (1 - dropout), for the output of every layer but the last, in order of time.

    Drawn as ``torch.nn`` draws: by :func:`torch.nn.functional.dropout` on a tensor of the output's shape, layer after
    layer, so that the same seed gives the same numbers.
    """
    sizes = input.shape[:-1]
    if batch_first:
        sizes = sizes[::-1]
    width = spec.state_size * (2 if spec.bidirectional else 1)
    ones = input.new_ones(*sizes, width)
    return [torch.nn.functional.dropout(ones, dropout, training=True) for _ in range(spec.num_layers - 1)]


def autocast_region(spec: _checks.Spec, input: Any) -> str | None:
    """Device type of the autocast region that a call with this input stands in, if any."""
    if not isinstance(input, Tensor):
        _checks.raise_input_type(spec, input)
    if input.is_cpu:
        return "cpu" if torch.is_autocast_enabled("cpu") else None
    device_type: str = input.device.type
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return device_type if enabled else None


def autocast(
    spec: _checks.Spec, device_type: str, input: Tensor, hx: Any, params: Sequence[Any], packed: bool = False
) -> tuple[Tensor, Any, Sequence[Any]]:
    """The casts that ``torch.nn`` makes under autocast.

    To the autocast dtype on every device but the CPU, and there for LSTM layers with a padded input, RNN layers and the
    RNN cell. The others keep the state's dtype on the CPU: ``torch.nn`` runs them op by op, with gates promoted
    to it.
    """
    h, c = _checks.split_state(spec.kind, hx)
    state_dtype = input.dtype if h is None else h.dtype
    dtype = torch.get_autocast_dtype(device_type)
    op_by_op = spec.kind == CellKind.GRU or (spec.kind == CellKind.LSTM and (spec.is_cell or packed))
    if op_by_op and device_type == "cpu" and state_dtype in _AUTOCAST_FROM:
        dtype = torch.promote_types(state_dtype, dtype)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.dtype in _AUTOCAST_FROM
        return tensor.to(dtype) if eligible else tensor

    hx = cast(h) if c is None else (cast(h), cast(c))
    return cast(input), hx, [cast(param) for param in params]
