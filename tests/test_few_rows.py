"""Calls of few rows read the weights where they stand: right at every size, and without memory for copies of them."""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from support.cases import CELLS, Case, CellCase, incoming_gradients, run
from support.compare import assert_same, assert_within
from support.pairwise import pairwise
from torch import Tensor, nn

import fused_rnn
from fused_rnn.settings import CellKind

# Both sides of every count of rows from which they are multiplied in another way, of 4 to 16 lanes, and of every tail.
LAYER_FACTORS = {
    "cell": CELLS,
    "input_size": (3, 64, 130),
    "hidden_size": (96, 100, 131),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "packing": ("padded", "sorted"),
    "batch_first": (False, True),
    "batch": (1, 2, 3, 5, 7, 8, 15, 17, 22, 27, 28, 33, 64),
    "steps": (1, 2, 4),
    "hx": (False, True),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
LAYERS = [Case(**row) for row in pairwise(LAYER_FACTORS, seed=3)]
CELL_FACTORS = {
    "cell": CELLS,
    "input_size": (5, 128, 200),
    "hidden_size": (96, 130, 260),
    "bias": (True, False),
    "batch": (None, 1, 4, 6, 16, 31, 65, 256, 257),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
CELL_CALLS = [CellCase(**row) for row in pairwise(CELL_FACTORS, seed=4)]


def reference(case: Case | CellCase) -> dict[str, Tensor]:
    return run(copy.deepcopy(case.build(nn)).double(), case.data().to(torch.float64))


@pytest.mark.asan
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers_of_few_steps_match_float64(case: Case, isa: str) -> None:
    assert_within(run(case.build(fused_rnn), case.data()), reference(case))


@pytest.mark.asan
@pytest.mark.parametrize("case", CELL_CALLS, ids=str)
def test_cells_match_float64(case: CellCase, isa: str) -> None:
    assert_within(run(case.build(fused_rnn), case.data()), reference(case))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("batch", "steps"), [(2, 8), (20, 5), (3, 1)])
def test_large_recurrent_weights_match_float64(cell: str, batch: int, steps: int, isa: str) -> None:
    case = Case(cell=cell, input_size=37, hidden_size=1030, batch=batch, steps=steps, hx=True)
    assert_within(run(case.build(fused_rnn), case.data()), reference(case))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 768), (torch.bfloat16, 1056)], ids=str)
@pytest.mark.parametrize("batch", [3, 16, 17])
def test_weight_gradients_that_go_past_the_caches_match_float64(
    batch: int, dtype: torch.dtype, size: int, isa: str
) -> None:
    """More than 16 MiB of weights, in whole lines."""
    case = CellCase(input_size=size, hidden_size=size, batch=batch, dtype=dtype)
    assert_within(run(case.build(fused_rnn), case.data()), reference(case))


@pytest.mark.kernels
@pytest.mark.asan
@pytest.mark.parametrize("case", [*LAYERS[::4], *CELL_CALLS[::4]], ids=str)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_team_gives_the_same_bits(case: Case | CellCase, count: int, threads: None) -> None:
    """A team divides columns and units, never a sum."""
    from fused_rnn import _C

    previous = _C.set_processors(8)
    try:
        module = case.build(fused_rnn)
        torch.set_num_threads(1)
        expected = run(module, case.data())
        torch.set_num_threads(count)
        assert_same(run(module, case.data()), expected)
    finally:
        _C.set_processors(previous)


@pytest.mark.kernels
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", [CellKind.RNN_TANH, CellKind.LSTM, CellKind.GRU], ids=str)
def test_a_team_shares_weights_that_come_from_memory_and_none_is_woken_for_small_ones(
    kind: CellKind, backward: bool, threads: None
) -> None:
    """One row has next to no arithmetic: what counts is how long the weights take to arrive."""
    from fused_rnn import _C

    def team(size: int) -> tuple[int, int]:
        plan = _C.plan(int(kind), 1, 1, None, size, size, size, 1, 0, backward)
        return plan["threads"], plan["unit_groups"]

    previous = _C.set_processors(2)
    try:
        torch.set_num_threads(2)
        assert team(384) == (2, 2)
        assert team(32) == (1, 1)
    finally:
        _C.set_processors(previous)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("steps", [1, 3])
def test_any_gradients_alone_are_those_of_all(cell: str, steps: int, isa: str) -> None:
    case = Case(cell=cell, input_size=40, hidden_size=100, batch=9, steps=steps, hx=True)
    module, data = case.build(fused_rnn), case.data()
    leaves = data.leaves | dict(module.named_parameters())

    def gradients(names: tuple[str, ...]) -> dict[str, Tensor]:
        outputs = list(case.outputs(module(data.input, data.hx)).values())
        incoming = incoming_gradients(outputs, integers=case.integers)
        found = torch.autograd.grad(outputs, [leaves[name] for name in names], incoming)
        return dict(zip(names, found, strict=True))

    expected = gradients(tuple(leaves))
    for names in itertools.chain(itertools.combinations(leaves, 1), itertools.combinations(leaves, 2)):
        assert_same(gradients(names), {name: expected[name] for name in names})


# ---- memory -------------------------------------------------------------------------------------------------------


def _buffers_of(call: Callable[[], object]) -> int:
    """Bytes that the buffers of a thread have grown to in which nothing but `call` runs."""
    from fused_rnn import _C

    def work() -> int:
        call()
        return _C.scratch_held()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


@pytest.mark.kernels
@pytest.mark.parametrize("rows", [1, 3, 20, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_of_a_cell_copies_no_weight_matrix(cell: str, rows: int, isa: str) -> None:
    case = CellCase(cell=cell, input_size=512, hidden_size=512, batch=rows)
    module, data = case.build(fused_rnn), case.data()
    smallest = min(p.numel() * 4 for p in module.parameters() if p.dim() == 2)
    operands = rows * 4 * (512 * 4) * 8  # inputs, states and gradients, each in some places
    assert _buffers_of(lambda: run(module, data)) < 0.5 * smallest + operands


@pytest.mark.kernels
@pytest.mark.parametrize("cell", CELLS)
def test_a_layer_of_one_step_copies_no_weight_matrix(cell: str, isa: str) -> None:
    case = Case(cell=cell, input_size=768, hidden_size=512, batch=3, steps=1)
    module, data = case.build(fused_rnn), case.data()
    smallest = min(p.numel() * 4 for p in module.parameters() if p.dim() == 2)
    assert _buffers_of(lambda: run(module, data)) < 0.5 * smallest
