"""What is measured on a GPU, as data: the grids of the papers and libraries that are compared with, and the bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NUM_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
PASSES = ("forward", "forward+backward")
# In which order the dtypes of a grid take turns.
TURNS = ("bfloat16", "float32", "float16")


# What can run a layer: the two exchanges of clusters by themselves, layers that run at once, a launch a step.
VARIANTS = ("block", "barriers", "counted", "grid", "wavefront", "none")


def variant_of(plan: Mapping[str, Any]) -> str:
    """Which of VARIANTS a plan is (`explain(...).plan`)."""
    if plan["layers"] > 1:
        return "wavefront"
    return str(plan["exchange"] if plan["variant"] == "cluster" else plan["variant"])


def allowed_only(variant: str) -> dict[str, Any]:
    """What `_C.cuda_allow` is asked for so that this one of VARIANTS is used wherever it can be."""
    exchanges = {"counted": variant in ("counted", "wavefront"), "barriers": variant == "barriers"}
    kernels = {name: name == variant for name in ("block", "grid", "none")}
    return kernels | exchanges | {"cluster": any(exchanges.values()), "layers": 2 if variant == "wavefront" else 1}


def allowed_without(variants: Iterable[str]) -> dict[str, Any]:
    """What `_C.cuda_allow` is asked for so that none of these of VARIANTS, or no "cluster", is used."""
    return dict(("layers", 1) if name == "wavefront" else (name, False) for name in variants)


@dataclass(frozen=True)
class GpuCase:
    """One layer and a padded batch. float32 runs with TF32 allowed, as torch does by default."""

    grid: str
    cell: str
    batch_size: int
    seq_length: int
    input_size: int
    hidden_size: int
    dtype: str
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0

    @property
    def name(self) -> str:
        sizes = f"B{self.batch_size} T{self.seq_length} I{self.input_size} H{self.hidden_size}"
        sizes += f" P{self.proj_size}" if self.proj_size else ""
        sizes += f" L{self.num_layers}" if self.num_layers > 1 else ""
        return f"{self.cell} {sizes}{' bidir' if self.bidirectional else ''} {self.dtype}"

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def state_size(self) -> int:
        """Units of h, after its projection if there is one."""
        return self.proj_size or self.hidden_size

    @property
    def layers_overlap(self) -> bool:
        """Whether a layer can begin before the one below has ended: not above one that also runs backwards."""
        return self.num_layers > 1 and not self.bidirectional

    @property
    def chain(self) -> int:
        """Steps of which each needs the one before it, at the least."""
        if self.layers_overlap:
            return self.seq_length + self.num_layers - 1
        return self.seq_length * self.num_layers

    @property
    def step_flops(self) -> float:
        """Floating-point operations of the recurrent products of one step of one layer, both directions."""
        projection = 2.0 * self.batch_size * self.hidden_size * self.proj_size
        return self.num_directions * (self._flops(self.state_size) + projection)

    def input_flops(self, layer: int) -> float:
        """The same of the products of one step with a layer's W_ih."""
        depth = self.input_size if layer == 0 else self.num_directions * self.state_size
        return self.num_directions * self._flops(depth)

    def _flops(self, depth: int) -> float:
        return 2.0 * self.batch_size * NUM_GATES[self.cell] * self.hidden_size * depth

    def floor_us(self, which: str, rate: float, barrier_us: float) -> float:
        """What no arrangement of the kernels can be faster than, in microseconds.

        Forward: every step of the chain takes the longer of a barrier, without which blocks do not hear of each other's
        h, and the arithmetic of that step; the product of all rows with the first layer's W_ih comes before. Layers
        that can overlap do: their chain has T + L - 1 steps, and the arithmetic of one is that of all layers. Others
        follow each other, their projections too. Backward: the same with the transposed weights, and the gradients of
        all weights as products over all rows. One pass knows nothing of the other's time: a training step takes both.

        Args:
            which: of PASSES.
            rate: floating-point operations a second of a large product.
            barrier_us: of the blocks that share one W_hh.
        """
        layers = range(self.num_layers)
        if self.layers_overlap:
            step = self.num_layers * self.step_flops + sum(self.input_flops(layer) for layer in layers[1:])
            projections = self.seq_length * self.input_flops(0)
        else:
            step = self.step_flops
            projections = self.seq_length * sum(self.input_flops(layer) for layer in layers)
        chain_us = self.chain * max(step / rate * 1e6, barrier_us)
        forward_us = chain_us + projections / rate * 1e6
        if which == "forward":
            return forward_us
        weights = self.seq_length * sum(self.step_flops + self.input_flops(layer) for layer in layers)
        return 2 * forward_us + weights / rate * 1e6


def cases() -> list[GpuCase]:
    """The most telling first, because a run may end before the last: the anchor, then grids and dtypes in turns."""
    anchor = GpuCase("flashrnn", "lstm", 16, 1024, 768, 768, "bfloat16")
    everything = [*_flashrnn(), *_cpu_table(), *_haste(), *_stacks(), *_projections(), *_large()]
    grids = dict.fromkeys(case.grid for case in everything)
    turns = [[case for case in everything if (case.dtype, case.grid) == turn] for turn in product(TURNS, grids)]
    found = {anchor: None}
    while any(turns):
        for waiting in turns:
            if waiting:
                found[waiting.pop(0)] = None
    return list(found)


def _flashrnn() -> Iterator[GpuCase]:
    """The grid of FlashRNN's report (Poeppel 2024): H 768 as one head, B from 2 to 256, T from 256 to 2048."""
    for dtype in ("bfloat16", "float16", "float32"):
        for batch_size in (16, 2, 64, 256, 4, 8, 32, 128):
            yield GpuCase("flashrnn", "lstm", batch_size, 1024, 768, 768, dtype)
        for seq_length in (256, 512, 2048):
            yield GpuCase("flashrnn", "lstm", 16, seq_length, 768, 768, dtype)
        for cell in ("gru", "rnn"):
            yield GpuCase("flashrnn", cell, 16, 1024, 768, 768, dtype)


def _haste() -> Iterator[GpuCase]:
    """The sizes of haste's charts: B 1 to 128, I 64 to 512, H 128 to 4096; T is 100 here."""
    for dtype in ("bfloat16", "float32", "float16"):
        for batch_size, input_size in ((64, 128), (1, 64), (32, 512), (128, 256)):
            for hidden_size in (128, 256, 512, 1024, 2048, 4096):
                yield GpuCase("haste", "lstm", batch_size, 100, input_size, hidden_size, dtype)
        for hidden_size in (128, 512, 1024):
            yield GpuCase("haste", "gru", 64, 100, 128, hidden_size, dtype)


def _cpu_table() -> Iterator[GpuCase]:
    """The shapes that the CPU is measured with."""
    for dtype in ("bfloat16", "float32", "float16"):
        for cell in ("lstm", "gru", "rnn"):
            yield GpuCase("cpu table", cell, 64, 40, 256, 512, dtype)
            yield GpuCase("cpu table", cell, 32, 200, 20, 64, dtype, bidirectional=True)
            yield GpuCase("cpu table", cell, 1, 100, 256, 256, dtype)
            yield GpuCase("cpu table", cell, 64, 100, 1024, 1024, dtype)
            yield GpuCase("cpu table", cell, 20, 35, 650, 650, dtype, num_layers=2)


def _stacks() -> Iterator[GpuCase]:
    """Layers that can run in a wavefront: small ones, of which several fit on the GPU together."""
    for dtype in ("bfloat16", "float16"):
        for hidden_size, batch_size in product((256, 128, 384), (16, 1, 64)):
            for num_layers, cell in product((2, 4), ("lstm", "gru")):
                yield GpuCase("stacks", cell, batch_size, 256, hidden_size, hidden_size, dtype, num_layers)


def _projections() -> Iterator[GpuCase]:
    """LSTMs with a projection of h, which run merged: W_hh W_hr in the place of W_hh."""
    for dtype in ("bfloat16", "float16", "float32"):
        for batch_size, seq_length, hidden_size, proj_size in (
            (16, 1024, 768, 384),
            (16, 256, 512, 128),
            (64, 100, 1024, 512),
            (64, 100, 1024, 256),
        ):
            sizes = (batch_size, seq_length, hidden_size, hidden_size)
            yield GpuCase("projections", "lstm", *sizes, dtype, proj_size=proj_size)


def _large() -> Iterator[GpuCase]:
    """Weights that no cluster holds, and some that no grid holds."""
    for hidden_size in (1536, 3072, 6144):
        for dtype in ("bfloat16", "float32"):
            yield GpuCase("large", "lstm", 64, 100, 512, hidden_size, dtype)


# Grids that bars are about. The others are reported beside them.
BAR_GRIDS = ("flashrnn", "haste", "cpu table", "large")


@dataclass(frozen=True)
class Bar:
    """What the project aims at: cuDNN's time over ours, over all cases of BAR_GRIDS that it applies to."""

    what: str
    mean: float
    worst: float
    dtypes: tuple[str, ...]
    most_hidden: int = 1024
    persistent: bool = True  # of cases that a persistent variant holds; False: of the others, whatever their size


BARS = (
    Bar("float16 and bfloat16, H <= 1024", 1.5, 1.0, ("float16", "bfloat16")),
    Bar("float32 with TF32, H <= 1024", 1.3, 0.95, ("float32",)),
    Bar("sizes that no persistent variant holds", 0.9, 0.9, tuple(DTYPES), most_hidden=1 << 30, persistent=False),
)

# Microseconds a step at the anchor on an H200, forward and backward.
ANCHOR_US = {"forward": 1.3, "backward": 2.2}

# Our time over the floor, at most, in persistent variants of several blocks. A block of its own needs no barrier.
MOST_FLOORS = 2.0
