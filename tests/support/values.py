"""Numbers for calls, and the parts of what a call returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def data(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, which are those of the seed in float64 whatever the dtype."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat(states: Any) -> list[Tensor]:
    """h, or h and c, of what a call returns beside its output."""
    return list(states) if isinstance(states, tuple) else [states]


def with_small_gains(module: Any) -> Any:
    """The module with gains of layer normalisation of 0.3: with 1, rounding in a layer of a few units grows from step
    to step, to hundreds of epsilons in the gradients of two right results."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "weight_norm" in name:
                parameter.fill_(0.3)
    return module
