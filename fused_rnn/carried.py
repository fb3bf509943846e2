"""The state that a stateful layer carries from call to call, in buffers that are no part of its ``state_dict``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _checks

__all__ = ["add_buffers", "keep", "reset", "rows_of", "state_of"]

_NAMES = ("carried_h", "carried_c")


def add_buffers(layer: Any) -> None:
    for name in _NAMES:
        if name not in layer._buffers:
            layer.register_buffer(name, None, persistent=False)


def state_of(layer: Any, input: Any, hx: Any) -> Any:
    """``hx``, or, where it is ``None``, what the last call left."""
    h, c = layer.carried_h, layer.carried_c
    if hx is not None or h is None:
        return hx
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor):
        return hx  # the call itself says what is wrong with it
    _check_batch(layer, input, h)
    if h.dtype != data.dtype and h.is_floating_point() and data.is_floating_point():
        h, c = h.to(data.dtype), None if c is None else c.to(data.dtype)  # left by a call under autocast
    if not torch.compiler.is_compiling() and h.is_inference() and not torch.is_inference_mode_enabled():
        h, c = h.clone(), None if c is None else c.clone()
    return h if c is None else (h, c)


def _check_batch(layer: Any, input: Any, h: Tensor) -> None:
    if isinstance(input, PackedSequence):
        batch = int(input.batch_sizes[0]) if input.batch_sizes.numel() else None
    elif input.dim() == 3:
        batch = input.shape[0 if layer.batch_first else 1]
    else:
        batch = None
    carried = h.shape[1] if h.dim() == 3 else None
    if batch != carried:
        of = "a sequence without a batch" if carried is None else f"a batch of {carried} rows"
        got = "one without" if batch is None else f"{batch} rows"
        raise RuntimeError(
            f"input: expected {of}, of which this stateful layer carries the state, got {got}; "
            "call reset_state() to begin anew"
        )


def keep(layer: Any, states: Any) -> None:
    """A copy, because a program may change the states that it was given in place."""
    h, c = states if isinstance(states, tuple) else (states, None)
    layer.carried_h = h.detach().clone()
    layer.carried_c = None if c is None else c.detach().clone()


def reset(layer: Any, rows: Any) -> None:
    if not layer.stateful:
        raise RuntimeError(f"reset_state: expected a layer with stateful=True, got {layer}")
    h, c = layer.carried_h, layer.carried_c
    if h is None or rows is None:
        layer.carried_h = layer.carried_c = None
        return
    if h.dim() != 3:
        raise RuntimeError("rows: expected None, the state that is carried is of a sequence without a batch")
    index = rows_of(rows, h.shape[1], h.device)
    layer.carried_h = h.index_fill(1, index, 0)
    layer.carried_c = None if c is None else c.index_fill(1, index, 0)


def rows_of(rows: Any, batch: int, device: torch.device) -> Tensor:
    """Indices of the rows that a bool tensor or indices stand for, none of them negative."""
    try:
        index = torch.as_tensor(rows, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"rows: expected a bool tensor, indices or None, got {_checks._describe(rows)}") from error
    if index.dtype is torch.bool:
        if index.shape != (batch,):
            raise IndexError(f"rows: expected ({batch},), one for each row of the batch, got {tuple(index.shape)}")
        return index.nonzero().squeeze(1)
    if index.numel() == 0:
        return index.reshape(0).long()
    if index.is_floating_point() or index.is_complex() or index.dim() > 1:
        raise TypeError(f"rows: expected a bool tensor, indices or None, got {_checks._describe(rows)}")
    index = index.reshape(-1).long()
    if bool((index < -batch).any()) or bool((index >= batch).any()):
        raise IndexError(f"rows: expected indices of the {batch} rows of the batch, got {index.tolist()}")
    return index % batch
