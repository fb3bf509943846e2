"""What is measured, as data: shapes, and the cases (a shape with a cell, a mode and a dtype) made from them."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CELLS = ("lstm", "gru", "rnn")
MODES = ("inference", "training")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NUM_GATES = {"lstm": 4, "gru": 3, "rnn": 1}

# The table that results are summed up by; shapes of workloads; one size varied, the others held. (A part of its own,
# which is measured where it is asked for, are the shapes of `SERVING`.)
PARTS = ("table", "workloads", "sweeps")

# The table's groups, in the order of summaries. "large": one LSTM forward is 1 GFLOP or more, so the floating-point
# units are the limit; "small": less, where barriers, packing and gate arithmetic show; "call": one step, the cost of
# calling.
GROUPS = ("large", "small", "call")


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem. A single step (`seq_length` 1) with `single_step` is a cell's call, on 2-D input.

    `group` is one of `GROUPS`; of a workload its name; of a sweep the size that is varied; of what is served what
    limits it or what it is.
    """

    group: str
    batch_size: int
    seq_length: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    single_step: bool = False
    part: str = "table"
    cells: tuple[str, ...] = CELLS
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = ("float32",)
    quick: bool = False

    @property
    def name(self) -> str:
        if self.single_step:
            return f"B{self.batch_size} I{self.input_size} H{self.hidden_size} cell"
        name = f"B{self.batch_size} T{self.seq_length} I{self.input_size} H{self.hidden_size}"
        if self.num_layers > 1:
            name += f" L{self.num_layers}"
        return name + (" bidir" if self.bidirectional else "")

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1


TABLE = (
    Shape("large", 64, 40, 256, 512, dtypes=("float32", "bfloat16"), quick=True),
    Shape("small", 32, 200, 20, 64, bidirectional=True, quick=True),
    Shape("small", 16, 40, 64, 16, quick=True),
    Shape("small", 1, 100, 256, 256, dtypes=("float32", "bfloat16"), quick=True),
    Shape("large", 64, 100, 1024, 1024),
    Shape("large", 20, 35, 650, 650, num_layers=2),
    Shape("call", 1, 1, 8, 8, quick=True),
    Shape("call", 1, 1, 8, 8, single_step=True, quick=True),
    Shape("call", 64, 1, 256, 256, single_step=True),
    # More weights than caches keep, each used by a few rows: reading them, and writing their gradients, is the limit.
    Shape("call", 3, 1, 1024, 1024, single_step=True),
    Shape("call", 64, 1, 1024, 1024, single_step=True, dtypes=("float32", "bfloat16")),
    Shape("call", 3, 1, 1536, 1024),
    Shape("call", 32, 1, 1536, 1024),
)

# What models of these kinds ask of their recurrent layers. In the order of the fields: group, B, T, I, H.
_WORKLOADS = (
    # log-mel features, 3 s of speech at 10 ms a frame, two bidirectional layers of an acoustic model
    Shape("speech", 8, 300, 80, 256, num_layers=2, bidirectional=True),
    # characters of a book, embedded
    Shape("characters", 50, 50, 128, 256, num_layers=2),
    # reviews, word vectors in, a class out
    Shape("text classes", 32, 200, 100, 128, bidirectional=True),
    # an agent in 16 environments takes one step, and is trained on the steps between two updates
    Shape("agent's step", 16, 1, 128, 256),
    Shape("agent's update", 16, 64, 128, 256),
    # a week of hourly values
    Shape("time series", 32, 168, 8, 64),
    # one stream of audio, 0.3 s at a time
    Shape("stream", 1, 30, 40, 128),
)
WORKLOADS = tuple(dataclasses.replace(shape, part="workloads", cells=("lstm", "gru")) for shape in _WORKLOADS)

# By the size that is varied: the shape for each of its values. Sizes that fill no vector, no tile and no thread's share
# are among them on purpose.
_SWEPT = {
    "B": ((1, 2, 3, 5, 17, 33, 96), lambda size: Shape("B", size, 20, 128, 128)),
    "H": ((1, 7, 31, 33, 100, 127, 200, 257, 400, 650, 1024), lambda size: Shape("H", 8, 20, size, size)),
    "T": ((1, 2, 5, 20, 100, 1000), lambda size: Shape("T", 4, size, 64, 64)),
    "H of a cell": (
        (64, 128, 256, 384, 512, 768, 1024, 1500, 2048),
        lambda size: Shape("H of a cell", 16, 1, size, size, single_step=True),
    ),
}
SWEEPS = tuple(
    dataclasses.replace(shape_of(size), part="sweeps") for sizes, shape_of in _SWEPT.values() for size in sizes
)

# Layers as those who serve them call them. "weights": reading the weights is the limit, because few rows use each; in
# the order B, T, then I, H of both products large, of one, and of more than caches keep. "text line": a line of 80
# columns of a page is read in both directions.
_WEIGHT_BOUND = ((96, 1024), (1024, 96), (1024, 1024), (1536, 1024), (2048, 2048))
SERVING = (
    *(
        Shape("weights", B, T, inputs, H, part="serving", quick=(B, T, inputs) == (6, 4, 96))
        for inputs, H in _WEIGHT_BOUND
        for B in (1, 2, 6)
        for T in (1, 4, 8)
    ),
    dataclasses.replace(
        Shape("text line", 1, 80, 512, 256, num_layers=2, bidirectional=True),
        part="serving",
        cells=("lstm",),
        modes=("inference",),
        quick=True,
    ),
)

SHAPES = (*TABLE, *WORKLOADS, *SWEEPS, *SERVING)


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    shape: Shape
    cell: str
    mode: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.cell} {self.shape.name} {self.dtype} {self.mode}"

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of one run; the gate arithmetic is not counted.

        A multiply-add is 2. Forward, per layer and direction: the input projection 2 T B G H I and the recurrence
        2 T B G H H (G gates; I of a further layer is the D H outputs of the one below). Backward has two products of
        each of these sizes (the gradient of the data and the gradient of the weight), so training is three times
        inference. The first layer's gradient of the input is asked for, hence counted.
        """
        shape = self.shape
        gate_rows = NUM_GATES[self.cell] * shape.hidden_size
        columns = 0
        for layer in range(shape.num_layers):
            from_below = shape.input_size if layer == 0 else shape.num_directions * shape.hidden_size
            columns += shape.num_directions * (from_below + shape.hidden_size)
        forward = 2 * shape.seq_length * shape.batch_size * gate_rows * columns
        return 3 * forward if self.training else forward


def select(
    *,
    parts: Sequence[str] = PARTS,
    pattern: str = "",
    cells: Sequence[str] = CELLS,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Case]:
    """Return the cases to measure, in the order of the tables.

    Args:
        parts: of `PARTS`.
        pattern: regular expression searched in `Case.name`, in any case of letters; empty takes every case.
        dtypes: `None` takes for each shape its own; otherwise every shape is measured in each of these.
        quick: only the shapes marked quick and, unless `dtypes` says otherwise, only float32.
    """
    wanted = re.compile(pattern, re.IGNORECASE)
    cases = []
    for shape, cell, mode in itertools.product(SHAPES, cells, modes):
        if shape.part not in parts or cell not in shape.cells or mode not in shape.modes:
            continue
        if quick and not shape.quick:
            continue
        for dtype in dtypes or (("float32",) if quick else shape.dtypes):
            case = Case(shape, cell, mode, dtype)
            if wanted.search(case.name):
                cases.append(case)
    return cases
