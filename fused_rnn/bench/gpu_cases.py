"""What is measured on a GPU, as data: the grids of the papers and libraries that are compared with, and the bars."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NUM_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
PASSES = ("forward", "forward+backward")


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

    @property
    def name(self) -> str:
        sizes = f"B{self.batch_size} T{self.seq_length} I{self.input_size} H{self.hidden_size}"
        sizes += f" L{self.num_layers}" if self.num_layers > 1 else ""
        return f"{self.cell} {sizes}{' bidir' if self.bidirectional else ''} {self.dtype}"

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def step_flops(self) -> float:
        """Floating-point operations of the recurrent products of one step, all layers and directions."""
        rows = NUM_GATES[self.cell] * self.hidden_size
        return 2.0 * self.num_layers * self.num_directions * self.batch_size * rows * self.hidden_size

    def projections(self) -> Iterator[tuple[int, int, int]]:
        """Rows, columns and depth of the products with W_ih, one for each layer and direction."""
        columns = NUM_GATES[self.cell] * self.hidden_size
        for layer in range(self.num_layers):
            depth = self.input_size if layer == 0 else self.num_directions * self.hidden_size
            for _ in range(self.num_directions):
                yield self.batch_size * self.seq_length, columns, depth


def cases() -> list[GpuCase]:
    """The most telling first, because a run may end before the last: the anchor, then the grids in turns."""
    anchor = GpuCase("flashrnn", "lstm", 16, 1024, 768, 768, "bfloat16")
    grids = [list(_flashrnn()), list(_cpu_table()), list(_haste()), list(_large())]
    found = {anchor: None}
    while any(grids):
        for grid in grids:
            if grid:
                found[grid.pop(0)] = None
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


def _large() -> Iterator[GpuCase]:
    """Weights that no cluster holds, and some that no grid holds."""
    for hidden_size in (1536, 3072, 6144):
        for dtype in ("bfloat16", "float32"):
            yield GpuCase("large", "lstm", 64, 100, 512, hidden_size, dtype)


@dataclass(frozen=True)
class Bar:
    """What the project aims at: cuDNN's time over ours, over all cases that it applies to."""

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

# Our time over the floor, at most, in persistent variants.
MOST_FLOORS = 2.0
