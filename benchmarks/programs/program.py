"""What a program is: a few lines of another package's API, which build a model and say what is compared and timed."""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fused_rnn

from .wheels import import_without_libraries

TORCH_NN, FUSED = "torch.nn", "fused"
CONTESTANTS = (TORCH_NN, FUSED)

# How fused layers come into a program.
KEYWORD, PATCH, CONVERT = "keyword", "patch", "convert"
WAYS = {
    KEYWORD: "the package takes a layer or a class as an argument",
    PATCH: "the program builds its model in `with fused_rnn.patch():`",
    CONVERT: "`fused_rnn.convert` takes the model that the program has built",
}


@dataclass(frozen=True)
class Running:
    """A program that is set up.

    Attributes:
        model: what has the recurrent layers and all parameters in it.
        step: what is timed, and compared over the first steps: tensors, arrays or numbers, nested as the package
            returns them. It may draw random numbers and change the model.
        outputs: what the model computes, compared before and after the steps and from checkpoints. Changes nothing.
    """

    model: nn.Module
    step: Callable[[], Any]
    outputs: Callable[[], Any]


@dataclass(frozen=True)
class Program:
    """A program of another package.

    Attributes:
        name: unique; the package's own name and what of it.
        field: which chapter of the table it is in.
        requires: distributions as pip names them; the first is the package that the program is of.
        way: how fused layers come in, one of `WAYS`.
        timed: what `Running.step` does, in words.
        build: sets it up. One of the way `KEYWORD` gets the module to take layers from, `torch.nn` or `fused_rnn`.
        trains: whether `Running.step` changes parameters.
        note: what a user of this package has to know.
    """

    name: str
    field: str
    requires: tuple[str, ...]
    way: str
    timed: str
    build: Callable[..., Running]
    trains: bool = True
    note: str = ""

    def missing(self) -> list[str]:
        """Return the distributions that are not installed."""
        return [name for name in self.requires if _version(name) is None]

    def versions(self) -> dict[str, str]:
        """Return the versions of what the program requires, by distribution."""
        return {name: _version(name) or "not installed" for name in self.requires}

    def set_up(self, contestant: str, seed: int) -> Running:
        """Build it with the layers of the contestant, from the seed."""
        import_without_libraries()
        seed_everything(seed)
        fused = contestant == FUSED
        if self.way == KEYWORD:
            layers: ModuleType = fused_rnn if fused else nn
            return self.build(layers)
        if not fused:
            return self.build()
        if self.way == PATCH:
            with fused_rnn.patch():
                return self.build()
        running = self.build()
        fused_rnn.convert(running.model, return_report=True)
        return running


def seed_everything(seed: int) -> None:
    """Seed every generator that a package may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def training_step(model: nn.Module, loss: Callable[[], Tensor], learning_rate: float = 0.01) -> Callable[[], Tensor]:
    """Return the loop's body of a program that trains by itself: gradients of the loss, and a step of SGD.

    Not of Adam, which divides a gradient by its own magnitude: of one that is nothing but rounding, as that of a bias
    before a batch norm is, it makes a full step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value

    return step


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
