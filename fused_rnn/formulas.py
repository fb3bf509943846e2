"""The recurrent layers in plain PyTorch: one step function per cell, one loop over time, one over the stack.

This is what the kernels are compared with, what forward mode and second derivatives go through, and what runs where no
kernel exists (complex numbers, devices other than the kernels'). It is written to be read beside the papers, not to be
fast: every line is an ordinary differentiable tensor operation, so it works for any dtype and device and to any
derivative.

:func:`run_stack` and :func:`run_step` have the signatures of the fused operators in :mod:`fused_rnn.ops`. Letters in
shapes: :mod:`fused_rnn.settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .settings import CellKind, Controls, Settings

__all__ = ["run_stack", "run_step"]


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


def run_stack(
    settings: Settings,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    controls: Controls,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions.

    Args:
        settings: ``recompute`` is without effect here, where autograd keeps every step.
        input: (T, B, I), or (B, T, I) with ``batch_first``, or packed data (N, I) with ``batch_sizes``.
        h0: (L*D, B, P) or ``None`` for zeros. c0: (L*D, B, H) or ``None``; LSTM only.
        params: for each layer and direction in turn w_ih (G*H, I of the layer), w_hh (G*H, P), with ``bias``
            b_ih (G*H) and b_hh (G*H), and for a projected LSTM w_hr (P, H).
        controls: which steps there are, and factors of the layers' outputs.

    Returns:
        ``(output, h_n, c_n)``: (T, B, D*P) — a transposed view of that with ``batch_first``, (N, D*P) if packed —,
        (L*D, B, P) and (L*D, B, H), the last an empty tensor unless the cell is an LSTM. All in the dtype of ``input``;
        for float16 and bfloat16 sums and c are float32 within the call and h is rounded at every step.
    """
    kind, num_layers, num_directions = settings.kind, settings.num_layers, settings.num_directions
    batch_sizes, mask, dropout = controls
    per_cell = len(params) // (num_layers * num_directions)
    has_projection = per_cell > (4 if settings.bias else 2)

    if batch_sizes is not None:
        inputs: Sequence[Tensor] = input.split(batch_sizes.tolist())
        join: Callable[..., Tensor] = torch.cat
    else:
        inputs = (input.transpose(0, 1) if settings.batch_first else input).unbind(0)
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
            w_ih, w_hh, b_ih, b_hh = weights if settings.bias else (*weights, None, None)
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
        if dropout is not None and layer < num_layers - 1:
            factors = dropout[layer]
            steps = factors.unbind(0) if batch_sizes is None else factors.split(batch_sizes.tolist())
            inputs = [x * f for x, f in zip(inputs, steps, strict=True)]

    output = join(inputs)
    if settings.batch_first and batch_sizes is None:
        output = output.transpose(0, 1)
    return output, torch.stack(h_n), torch.stack(c_n) if c_n else input.new_empty(0)


def run_step(
    settings: Settings, input: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """One step of one cell.

    Args:
        settings: which cell, and whether it has biases.
        input: (B, I).
        h: (B, H). c: (B, H) for an LSTM, else ``None``.
        params: w_ih (G*H, I), w_hh (G*H, H), with ``bias`` b_ih and b_hh (G*H).

    Returns:
        ``(h, c)`` after the step in the dtype of ``h``; ``c`` is ``None`` unless the cell is an LSTM.
    """
    weights = (*params, None) if settings.bias else (*params, None, None, None)
    _, h, c = _layer(settings.kind, [input], h, c, weights, reverse=False)
    return h, c
