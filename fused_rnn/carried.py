"""The state that a stateful layer carries from call to call, in buffers that are no part of its ``state_dict``.

In a process group they are plain attributes: each process carries the states of the sequences that it reads, and
``DistributedDataParallel`` overwrites every buffer with that of the first process before each call. Outside of one they
are buffers, which :func:`torch.export.export` knows to be changed by a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.utils.rnn import PackedSequence

from . import _checks

__all__ = ["convert", "keep", "make_room", "reset", "rows_of", "state_of"]

_NAMES = ("carried_h", "carried_c")


def make_room(layer: Any) -> None:
    """Before a layer carries its first state."""
    for name in _NAMES:
        if not hasattr(layer, name):
            layer.register_buffer(name, None, persistent=False)
    if _is_in_group():
        _take_from_buffers(layer)


def convert(layer: Any, function: Callable[[Tensor], Tensor]) -> None:
    """What ``layer.to(...)`` and the like do with buffers, of attributes."""
    held = vars(layer)
    for name in _NAMES:
        if held.get(name) is not None:
            held[name] = function(held[name])


def _is_in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _take_from_buffers(layer: Any) -> None:
    for name in _NAMES:
        if name in layer._buffers:
            vars(layer)[name] = layer._buffers.pop(name)
            layer._non_persistent_buffers_set.discard(name)


def state_of(layer: Any, input: Any, hx: Any) -> Any:
    """``hx``, or, where it is ``None``, what the last call left."""
    # Dynamo of some versions says of every compilation that it exports.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "stateful: expected False in torch.export, as a program keeps nothing from call to call, got True; make "
            "the states inputs and outputs of the model"
        )
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
    if not torch.compiler.is_compiling() and _is_in_group():  # the layer may be older than the group
        _take_from_buffers(layer)
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
