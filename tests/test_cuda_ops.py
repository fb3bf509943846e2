"""The CUDA operators on the CPU: csrc/ops_cuda.cpp with products by at::mm and its kernels on the host engine.

What these tests cannot see: cuBLAS, streams, devices. Those are in test_cuda.py, which needs a GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support import cuda_ops
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_within
from support.pairwise import Row, pairwise

import fused_rnn
from fused_rnn import ops

pytestmark = pytest.mark.kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Few sizes: a fibre runs for each CUDA thread. H 8 and 16 have vectors of 16 bytes, the others have not.
FACTORS = {
    "cell": CELLS,
    "input_size": (1, 3, 17),
    "hidden_size": (1, 7, 8, 16),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "proj": (False, True),
    "batch_first": (False, True),
    "packing": ("padded", "sorted", "unsorted"),
    "batch": (1, 2, 5),
    "steps": (1, 2, 5),
    "hx": (False, True),
    "dtype": DTYPES,
}


def _has_projection(row: Row) -> bool:
    return not row["proj"] or (row["cell"] == "LSTM" and row["hidden_size"] > 1)


CASES = [Case(**row) for row in pairwise(FACTORS, allowed=_has_projection)]
CELL_CASES = [
    CellCase(cell=cell, hidden_size=hidden_size, bias=bias, batch=batch, dtype=dtype)
    for cell in CELLS
    for dtype, hidden_size, bias, batch in (
        (torch.float32, 7, True, 4),
        (torch.float64, 16, False, 1),
        (torch.bfloat16, 8, True, 3),
        (torch.float16, 5, False, None),
    )
]


@pytest.fixture(autouse=True)
def _cuda_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of fused_rnn.ops call the CUDA operators of this build instead of the CPU's."""
    cuda_ops.load()
    for name in ("rnn_forward", "rnn_backward", "cell_forward", "cell_backward"):
        monkeypatch.setattr(ops, f"_{name}", getattr(torch.ops.fused_rnn_host, name).default)


def _reference(case: Case | CellCase) -> dict[str, torch.Tensor]:
    with fused_rnn.use_backend("reference"):
        return run(copy.deepcopy(case.build(fused_rnn)).double(), case.data().to(torch.float64))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_matches_the_float64_reference(case: Case) -> None:
    assert_within(run(case.build(fused_rnn), case.data()), _reference(case))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_layer_without_gradients_matches_the_float64_reference(case: Case) -> None:
    module, data = case.build(fused_rnn), case.data()
    with torch.no_grad():
        found = run(module, data, gradients=False)
    assert_within(found, {name: value for name, value in _reference(case).items() if name in found})


@pytest.mark.parametrize("case", CELL_CASES, ids=str)
def test_cell_matches_the_float64_reference(case: CellCase) -> None:
    assert_within(run(case.build(fused_rnn), case.data()), _reference(case))
