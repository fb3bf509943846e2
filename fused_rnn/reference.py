"""The recurrent layers in plain PyTorch: one step function per cell, one loop over time, one over the stack.

This is what the kernels are compared with, what second derivatives go through, and what runs where no kernel exists
(complex numbers, devices other than the kernels'). It is written to be read beside the papers, not to be fast: every
line is an ordinary differentiable tensor operation, so it works for any dtype and device and to any derivative.

Letters in shapes: T steps, B batch rows, N rows of packed data, I input_size, H hidden_size, P proj_size (H without a
projection), G gates per unit (LSTM 4, GRU 3, RNN 1), L layers, D directions.

:func:`rnn` and :func:`cell_step` have the signature of the fused operators in :mod:`fused_rnn.ops`; the functions
named after cells have the signatures of :mod:`fused_rnn.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["CellKind", "cell_step", "gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]


class CellKind(IntEnum):
    """Which cell a layer repeats; the values are those of the enumeration in ``csrc/problem.h``."""

    RNN_TANH = 0
    RNN_RELU = 1
    LSTM = 2
    GRU = 3

    @property
    def num_gates(self) -> int:
        """G: rows of W_ih and W_hh per hidden unit."""
        return (1, 1, 4, 3)[self.value]


State = tuple[Tensor, Tensor | None]
Step = Callable[[Tensor, Tensor, Tensor, Any], State]


# The cells. x_gates = W_ih x_t + b_ih and h_gates = W_hh h_{t-1} + b_hh, both (B, G*H); h (B, H or P), c (B, H).


def rnn_tanh_step(x_gates: Tensor, h_gates: Tensor, h: Tensor, c: Tensor | None) -> State:
    """Elman network (Elman 1990): h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return torch.tanh(x_gates + h_gates), c


def rnn_relu_step(x_gates: Tensor, h_gates: Tensor, h: Tensor, c: Tensor | None) -> State:
    """Elman network of rectified units (Le, Jaitly and Hinton 2015): h' = max(0, W_ih x + b_ih + W_hh h + b_hh)."""
    return torch.relu(x_gates + h_gates), c


def lstm_step(x_gates: Tensor, h_gates: Tensor, h: Tensor, c: Tensor) -> State:
    """Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate (Gers 2000); gates i, f, g, o."""
    i, f, g, o = (x_gates + h_gates).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h, c


def gru_step(x_gates: Tensor, h_gates: Tensor, h: Tensor, c: Tensor | None) -> State:
    """Gated recurrent unit (Cho 2014), the reset gate after the product with W_hh as in cuDNN; gates r, z, n."""
    x_r, x_z, x_n = x_gates.chunk(3, dim=-1)
    h_r, h_z, h_n = h_gates.chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h, c


STEPS: dict[int, Step] = {
    CellKind.RNN_TANH: rnn_tanh_step,
    CellKind.RNN_RELU: rnn_relu_step,
    CellKind.LSTM: lstm_step,
    CellKind.GRU: gru_step,
}


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed, and c kept, in float32 as the kernels do; every other dtype is its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _carry(new: Tensor, old: Tensor) -> Tensor:
    """The state after a step that concerned only the first rows: the others keep theirs."""
    b = new.shape[0]
    return new if b == old.shape[0] else torch.cat([new, old[b:]])


def _layer(
    kind: int,
    inputs: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    reverse: bool,
    live: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """One layer in one direction.

    ``inputs`` holds T tensors (b_t, I). Sequences are sorted by falling length, so step t concerns the first b_t rows
    of the state; of the others the forward direction has passed the end, the backward one not yet reached it. With
    ``live``, T tensors (B, 1), the rows that are False there keep their state at that step, and their output is 0.
    Returns the T outputs (b_t, P) in order of time, h_n (B, P) and c_n (B, H).
    """
    dtype = h.dtype
    accumulate = _accumulation_dtype(dtype)
    w_ih, w_hh, b_ih, b_hh, w_hr = (None if w is None else w.to(accumulate) for w in weights)
    assert w_ih is not None and w_hh is not None
    if c is not None:
        c = c.to(accumulate)
    outputs = []
    order = reversed(range(len(inputs))) if reverse else range(len(inputs))
    for t in order:
        x = inputs[t]
        b = x.shape[0]
        h_previous, c_previous = h[:b].to(accumulate), None if c is None else c[:b]
        if live is not None:
            # The state of a row without any step is whatever the caller gave: it must meet neither a product, which
            # would bring it into the weights' gradients, nor another gate.
            h_previous = torch.where(live[t], h_previous, 0)
            c_previous = None if c_previous is None else torch.where(live[t], c_previous, 0)
        x_gates = linear(x.to(accumulate), w_ih, b_ih)
        h_gates = linear(h_previous, w_hh, b_hh)
        h_t, c_t = STEPS[kind](x_gates, h_gates, h_previous, c_previous)
        if w_hr is not None:  # Sak, Senior and Beaufays 2014: h is projected from H to P before it is used again
            h_t = linear(h_t, w_hr)
        h_t = h_t.to(dtype)
        if live is None:
            outputs.append(h_t)
        else:
            outputs.append(torch.where(live[t], h_t, 0))
            h_t = torch.where(live[t], h_t, h)
            c_t = None if c is None or c_t is None else torch.where(live[t], c_t, c)
        h = _carry(h_t, h)
        c = None if c is None or c_t is None else _carry(c_t, c)
    if reverse:
        outputs.reverse()
    return outputs, h, None if c is None else c.to(dtype)


def _stack(
    kind: int,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    batch_sizes: Tensor | None,
    *,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    recompute: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions; arguments and results as :func:`rnn` with a kind has them."""
    num_directions = 2 if bidirectional else 1
    per_cell = len(params) // (num_layers * num_directions)
    has_projection = per_cell > (4 if has_biases else 2)

    if batch_sizes is not None:
        inputs: Sequence[Tensor] = input.split(batch_sizes.tolist())
        join: Callable[..., Tensor] = torch.cat
    else:
        inputs = (input.transpose(0, 1) if batch_first else input).unbind(0)
        join = torch.stack
    batch = inputs[0].shape[0]
    live = None
    if mask is not None:
        live = mask.unsqueeze(-1).unbind(0)
        # What stands in a masked step, NaN included, must not meet a product, nor its gradient.
        inputs = [torch.where(counts, x, 0) for counts, x in zip(live, inputs, strict=True)]

    h_n, c_n = [], []
    for layer in range(num_layers):
        directions = []
        for direction in range(num_directions):
            index = layer * num_directions + direction
            weights: list[Tensor | None] = list(params[index * per_cell : (index + 1) * per_cell])
            w_hr = weights.pop() if has_projection else None
            w_ih, w_hh, b_ih, b_hh = weights if has_biases else (*weights, None, None)
            assert w_hh is not None
            h = h0[index] if h0 is not None else input.new_zeros(batch, w_hh.shape[1])
            c = None
            if kind == CellKind.LSTM:
                c = c0[index] if c0 is not None else input.new_zeros(batch, w_hh.shape[0] // 4)
            outputs, h, c = _layer(kind, inputs, h, c, (w_ih, w_hh, b_ih, b_hh, w_hr), direction == 1, live)
            directions.append(outputs)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
        inputs = [torch.cat(both, dim=-1) for both in zip(*directions, strict=True)]
        if dropout_masks and layer < num_layers - 1:
            factors = dropout_masks[layer]
            steps = factors.unbind(0) if batch_sizes is None else factors.split(batch_sizes.tolist())
            inputs = [x * f for x, f in zip(inputs, steps, strict=True)]

    output = join(inputs)
    if batch_first and batch_sizes is None:
        output = output.transpose(0, 1)
    return output, torch.stack(h_n), torch.stack(c_n) if c_n else input.new_empty(0)


def cell_step(
    kind: int,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> State:
    """One step of one cell.

    Args:
        kind: which cell, a :class:`CellKind`.
        input: (B, I).
        h: (B, H). c: (B, H) for an LSTM, else ``None``.
        w_ih, w_hh: (G*H, I) and (G*H, H). b_ih, b_hh: (G*H) or ``None``.

    Returns:
        ``(h, c)`` after the step in the dtype of ``h``; ``c`` is ``None`` unless the cell is an LSTM.
    """
    _, h, c = _layer(kind, [input], h, c, (w_ih, w_hh, b_ih, b_hh, None), reverse=False)
    return h, c


# The same names and arguments as fused_rnn.functional.


def _with_reference(name: str, *args: Any, **options: Any) -> Any:
    from . import functional  # functional imports this module
    from .backend import use_backend

    with use_backend("reference"):
        return getattr(functional, name)(*args, **options)


def lstm(input: Tensor, hx: Sequence[Tensor] | None, params: Sequence[Tensor], **options: Any) -> Any:
    """:func:`fused_rnn.functional.lstm` through this module's loops, whatever backend is in use."""
    return _with_reference("lstm", input, hx, params, **options)


def gru(input: Tensor, hx: Tensor | None, params: Sequence[Tensor], **options: Any) -> Any:
    """:func:`fused_rnn.functional.gru` through this module's loops, whatever backend is in use."""
    return _with_reference("gru", input, hx, params, **options)


def rnn(*args: Any, **options: Any) -> Any:
    """An Elman network, or the whole-stack operator for any cell; the first argument decides.

    ``rnn(input, hx, params, *, nonlinearity="tanh", ...)`` with a tensor first is
    :func:`fused_rnn.functional.rnn` through this module's loops, whatever backend is in use.

    ``rnn(kind, input, h0, c0, params, dropout_masks, batch_sizes, *, has_biases, num_layers, bidirectional,
    batch_first, recompute=False, mask=None)`` with a :class:`CellKind` first is the twin of :func:`fused_rnn.ops.rnn`:

    Args:
        kind: which cell.
        input: (T, B, I), or (B, T, I) with ``batch_first``, or packed data (N, I) with ``batch_sizes``.
        h0: (L*D, B, P) or ``None`` for zeros. c0: (L*D, B, H) or ``None``; LSTM only.
        params: for each layer and direction in turn w_ih (G*H, I of the layer), w_hh (G*H, P), with ``has_biases``
            b_ih (G*H) and b_hh (G*H), and for a projected LSTM w_hr (P, H).
        dropout_masks: empty, or for every layer but the last a factor of its output, (T, B, D*P) or (N, D*P).
        batch_sizes: int64 (T) of falling numbers of sequences still running, or ``None``.
        recompute: without effect here, where autograd keeps every step.
        mask: bool (T, B), False where a row has no step: it keeps its state, and its output is 0. Not with batch_sizes.

    Returns:
        ``(output, h_n, c_n)``: (T, B, D*P) — a transposed view of that with ``batch_first``, (N, D*P) if packed —,
        (L*D, B, P) and (L*D, B, H), the last an empty tensor unless the cell is an LSTM. All in the dtype of ``input``;
        for float16 and bfloat16 sums and c are float32 within the call and h is rounded at every step.
    """
    if "kind" in options or (args and isinstance(args[0], int)):
        return _stack(*args, **options)
    return _with_reference("rnn", *args, **options)


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """:func:`fused_rnn.functional.lstm_cell` through this module, whatever backend is in use."""
    return _with_reference("lstm_cell", input, hx, w_ih, w_hh, b_ih, b_hh)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """:func:`fused_rnn.functional.gru_cell` through this module, whatever backend is in use."""
    return _with_reference("gru_cell", input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Any:
    """:func:`fused_rnn.functional.rnn_cell` through this module, whatever backend is in use."""
    return _with_reference("rnn_cell", input, hx, w_ih, w_hh, b_ih, b_hh, nonlinearity)
