"""First values of a layer's parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["draw_as_keras", "draw_peepholes", "set_forget_bias", "set_norms"]


def draw_as_keras(layer: Any) -> None:
    """As Keras draws them, of the same shapes transposed: W_ih by Glorot and Bengio 2010 over all gates together, W_hh
    orthogonal over all gates together (Saxe 2014), no bias but 1 for an LSTM's forget gate (Jozefowicz 2015).

    Of what Keras lacks, a projection is drawn as W_ih is, peepholes are zero, and W_hh is orthogonal head by head. The
    parameters of layer normalisation stay as they are.
    """
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            if is_of_norm(name):
                continue
            if name.startswith("weight_hh"):
                with _whole(parameter) as w_hh:
                    _draw_orthogonal(w_hh, layer.num_heads, layer.hidden_size)
            elif name.startswith("weight_peephole"):
                parameter.zero_()
            elif name.startswith("weight"):
                rows, columns = parameter.shape
                limit = math.sqrt(6 / (rows + columns))
                parameter.uniform_(-limit, limit)
            else:
                parameter.zero_()
    if layer.mode == "LSTM":
        set_forget_bias(layer, 1.0)


def _draw_orthogonal(w_hh: Tensor, num_heads: int, hidden_size: int) -> None:
    """The rows of each head's units, of all gates together."""
    of_heads = w_hh.unflatten(0, (-1, num_heads, hidden_size // num_heads))
    for head in range(num_heads):
        block = of_heads[:, head]
        block.copy_(nn.init.orthogonal_(torch.empty_like(block).flatten(0, 1)).view_as(block))


def draw_peepholes(layer: Any) -> None:
    """Uniformly between plus and minus 1 / sqrt(H), as ``torch.nn`` draws every parameter."""
    limit = 1 / math.sqrt(layer.hidden_size) if layer.hidden_size else 0.0
    for name, parameter in layer.named_parameters(recurse=False):
        if name.startswith("weight_peephole"):
            nn.init.uniform_(parameter, -limit, limit)


def is_of_norm(name: str) -> bool:
    """Whether a parameter of this name is one of layer normalisation."""
    return name.startswith(("weight_norm", "bias_norm"))


def set_norms(module: Any) -> None:
    """Gains of layer normalisation are 1 and biases 0, as those of :class:`torch.nn.LayerNorm`."""
    for name, parameter in module.named_parameters(recurse=False):
        if is_of_norm(name):
            nn.init.constant_(parameter, 1.0 if name.startswith("weight") else 0.0)


def set_forget_bias(layer: Any, value: float) -> None:
    """``bias_ih + bias_hh`` of the forget gate of an LSTM: ``value``."""
    H = layer.hidden_size
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            if name.startswith(("bias_ih", "bias_hh")):
                with _whole(parameter) as bias:
                    bias[H : 2 * H].fill_(value if name.startswith("bias_ih") else 0.0)


@contextlib.contextmanager
def _whole(parameter: Tensor) -> Iterator[Tensor]:
    """A tensor into which a part of the parameter's values can be written.

    Of a parameter in shards (``fully_shard``) a slice is a copy, and what is written there would be lost: all processes
    have the whole then, and what the first has written is what counts.
    """
    if not hasattr(parameter, "device_mesh"):
        yield parameter
        return
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    values = sharded.full_tensor()
    yield values
    sharded.copy_(distribute_tensor(values, sharded.device_mesh, sharded.placements))
