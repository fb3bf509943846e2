"""Layers and cells give the numbers of torch.nn and of the float64 reference: outputs and every gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_close_to_twin, assert_same, assert_within
from support.pairwise import Row, pairwise
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn.check import scaled_errors

# Sizes, packing and dtypes of every kind: what the sanitizers have to see of the kernels (pytest.mark.asan).

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Sizes on both sides of every vector width (4, 8, 16, 32 lanes), of one-element tails, and of row blocks.
LAYER_FACTORS = {
    "cell": CELLS,
    "input_size": (1, 3, 17, 33, 65),
    "hidden_size": (1, 3, 7, 17, 33, 65),
    "num_layers": (1, 2, 3),
    "bidirectional": (False, True),
    "bias": (True, False),
    "proj": (False, True),
    "batch_first": (False, True),
    "packing": ("padded", "sorted", "unsorted"),
    "batch": (1, 2, 5, 17, 70),
    "steps": (1, 2, 5, 16),
    "hx": (False, True),
    "dtype": DTYPES,
}


def _has_projection(row: Row) -> bool:
    return not row["proj"] or (row["cell"] == "LSTM" and row["hidden_size"] > 1)


# Two designs: most triples of options occur too.
DESIGNS = [[Case(**row) for row in pairwise(LAYER_FACTORS, seed=seed, allowed=_has_projection)] for seed in (0, 1)]
LAYER_CASES = [case for design in DESIGNS for case in design]

# Every cell in every dtype with sizes that are no multiple of any vector or tile.
ODD_CASES = [
    Case(
        cell=cell,
        input_size=17,
        hidden_size=hidden_size,
        num_layers=2,
        bidirectional=True,
        proj=cell == "LSTM" and packing == "padded",
        packing=packing,
        batch=batch,
        steps=5,
        hx=True,
        dtype=dtype,
    )
    for cell in CELLS
    for dtype in DTYPES
    for packing, hidden_size, batch in (("padded", 33, 19), ("unsorted", 7, 3))
]

# Rows and columns enough for operands that are packed 32 at a time.
ODD_CASES += [
    Case(cell=cell, input_size=70, hidden_size=100, batch=13, steps=9, dtype=torch.bfloat16) for cell in CELLS
]

CELL_FACTORS = {
    "cell": CELLS,
    "input_size": (1, 3, 17, 33, 65),
    "hidden_size": (1, 3, 7, 17, 33, 65),
    "batch": (None, 1, 2, 5, 17, 70),
    "bias": (True, False),
    "hx": (False, True),
    "dtype": DTYPES,
}
CELL_CASES = [CellCase(**row) for row in pairwise(CELL_FACTORS)]


@functools.cache
def _float64_reference(case: Case | CellCase) -> dict[str, torch.Tensor]:
    """Outputs and gradients by torch.nn in float64, from the same (already rounded) parameters and data."""
    twin = copy.deepcopy(case.build(nn)).double()
    return run(twin, case.data().to(torch.float64))


@functools.cache
def _torch_nn(case: Case | CellCase) -> dict[str, torch.Tensor]:
    return run(case.build(nn), case.data())


@pytest.mark.asan
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_layer_matches_float64_and_torch_nn(case: Case, isa: str) -> None:
    found = run(case.build(fused_rnn), case.data())
    assert_within(found, _float64_reference(case))
    assert_close_to_twin(found, _torch_nn(case))


@pytest.mark.asan
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_layer_with_tails_in_every_dimension_matches_float64(case: Case, isa: str) -> None:
    assert_within(run(case.build(fused_rnn), case.data()), _float64_reference(case))


@pytest.mark.asan
@pytest.mark.parametrize("case", CELL_CASES, ids=str)
def test_cell_matches_float64_and_torch_nn(case: CellCase, isa: str) -> None:
    found = run(case.build(fused_rnn), case.data())
    assert_within(found, _float64_reference(case))
    assert_close_to_twin(found, _torch_nn(case))


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_reference_layer_matches_float64(case: Case) -> None:
    with fused_rnn.use_backend("reference"):
        found = run(case.build(fused_rnn), case.data())
    assert_within(found, _float64_reference(case))


@pytest.mark.parametrize("case", CELL_CASES, ids=str)
def test_reference_cell_matches_float64(case: CellCase) -> None:
    with fused_rnn.use_backend("reference"):
        found = run(case.build(fused_rnn), case.data())
    assert_within(found, _float64_reference(case))


@pytest.mark.asan
@pytest.mark.parametrize("case", LAYER_CASES[::4], ids=str)
def test_inference_gives_the_numbers_of_training(case: Case, isa: str) -> None:
    module, data = case.build(fused_rnn), case.data()
    trained = run(module, data, gradients=False)
    with torch.inference_mode():
        inferred = run(module, data, gradients=False)
    # the two may choose other schedules, so sums may be taken in another order: nothing else may differ
    assert_within(inferred, {name: tensor.double() for name, tensor in trained.items()})


# Past every tile, cache block and row block of the kernels, and long enough for errors to pile up if they could.
LARGE_SIZES = [
    {"input_size": 70, "hidden_size": 259, "batch": 21, "steps": 40},
    {"input_size": 4, "hidden_size": 20, "batch": 1, "steps": 300},
    {"input_size": 1500, "hidden_size": 300, "batch": 5, "steps": 2},
    {"input_size": 5, "hidden_size": 1100, "batch": 2, "steps": 2},
    {"input_size": 3, "hidden_size": 5, "batch": 1300, "steps": 2},
]


@pytest.mark.asan
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", LARGE_SIZES, ids=str)
def test_large_sizes_match_float64(cell: str, dtype: torch.dtype, sizes: dict[str, int], isa: str) -> None:
    case = Case(cell=cell, hx=True, dtype=dtype, **sizes)
    assert_within(run(case.build(fused_rnn), case.data()), _float64_reference(case))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_mean_error_is_not_above_that_of_torch_nn(cell: str, dtype: torch.dtype, isa: str) -> None:
    """Over many cases, the mean error of results against float64 is at most 1.5 times torch.nn's.

    Means over some hundred tensors, since single ones vary by chance either way. ReLU's cases have integer data and no
    error at all.
    """
    factors = LAYER_FACTORS | {"cell": (cell,), "dtype": (dtype,)}
    cases = [Case(**row) for row in pairwise(factors, allowed=_has_projection)]

    def total_error(results: Callable[[Case], dict[str, torch.Tensor]]) -> float:
        return sum(error for case in cases for error in scaled_errors(results(case), _float64_reference(case)).values())

    assert total_error(lambda case: run(case.build(fused_rnn), case.data())) <= 1.5 * total_error(_torch_nn)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unused", ["output", "states"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_one_output_alone_matches_float64(cell: str, unused: str, dtype: torch.dtype, isa: str) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True, hx=True, dtype=dtype)

    def gradients(library: object, data_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        module = case.build(library).to(data_dtype)
        data = case.data().to(data_dtype)
        output, states = module(data.input, data.hx)
        last = states[-1] if isinstance(states, tuple) else states
        loss = last.sum() if unused == "output" else output.sum()
        leaves = data.leaves | dict(module.named_parameters())
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    assert_within(gradients(fused_rnn, dtype), gradients(nn, torch.float64))


@pytest.mark.asan
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_input_reaches_the_outputs_that_torch_nn_gives(
    cell: str, value: float, dtype: torch.dtype, isa: str
) -> None:
    case = Case(cell=cell, hidden_size=19, batch=5, dtype=dtype)
    module, twin = case.build(fused_rnn), case.build(nn).double()
    sequence = case.data().sequence.detach().clone()
    sequence[2, 1, 0] = value
    with torch.no_grad():
        found, expected = module(sequence)[0], twin(sequence.double())[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert_within({"output": found[finite]}, {"output": expected[finite]})


@pytest.mark.asan
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_saturated_gates_keep_exact_limits(cell: str, isa: str) -> None:
    case = Case(cell=cell, input_size=2, hidden_size=9, batch=3, steps=4)
    module, twin = case.build(fused_rnn), case.build(nn).double()
    sequence = case.data().sequence.detach() * 1e3
    with torch.no_grad():
        for layer in (module, twin):
            for parameter in layer.parameters():
                parameter.mul_(1e4)
        found, expected = module(sequence)[0], twin(sequence.double())[0]
    assert_within({"output": found}, {"output": expected})


@pytest.mark.asan
@pytest.mark.parametrize("packing", ["sorted", "unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_output_keeps_the_indices_of_its_input(cell: str, packing: str, isa: str) -> None:
    case = Case(cell=cell, packing=packing, bidirectional=True)
    data = case.data()
    packed = data.input
    output, _ = case.build(fused_rnn)(packed)
    assert isinstance(output, PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        expected = getattr(packed, name)
        found = getattr(output, name)
        assert found is expected or torch.equal(found, expected)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_of_a_batch_do_not_see_each_other(cell: str, dtype: torch.dtype, isa: str) -> None:
    case = Case(cell=cell, hidden_size=33, batch=37, steps=3, dtype=dtype)
    module, sequence = case.build(fused_rnn), case.data().sequence.detach()
    whole = module(sequence)[0]
    for row in (0, 18, 36):
        alone = module(sequence[:, row : row + 1])[0]
        assert_within({"output": alone}, {"output": whole[:, row : row + 1].double()})


@pytest.mark.asan
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_that_go_past_the_caches_are_those_that_do_not(cell: str, isa: str) -> None:
    """More than 16 MiB of output, in one call and in two."""
    case = Case(cell=cell, input_size=5, hidden_size=64, batch=1100, steps=64)
    module, sequence = case.build(fused_rnn), case.data().sequence.detach()
    halves = [half.clone().requires_grad_() for half in sequence.split(550, dim=1)]
    whole = sequence.clone().requires_grad_()
    outputs = [module(values)[0] for values in (whole, *halves)]
    weights = torch.randn(64)
    for output in outputs:
        (output @ weights).sum().backward()
    assert torch.equal(outputs[0], torch.cat(outputs[1:], dim=1))
    assert torch.equal(whole.grad, torch.cat([half.grad for half in halves], dim=1))
    with torch.no_grad():
        assert torch.equal(module(sequence)[0], outputs[0])


@pytest.mark.asan
@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_cut_in_two_calls_gives_the_whole(cell: str, isa: str) -> None:
    case = Case(cell=cell, num_layers=2, steps=9)
    module, sequence = case.build(fused_rnn), case.data().sequence.detach()
    whole, last = module(sequence)
    first, state = module(sequence[:4])
    second, final = module(sequence[4:], state)
    found = {"output": torch.cat([first, second]), "h_n": final[0] if isinstance(final, tuple) else final}
    expected = {"output": whole, "h_n": last[0] if isinstance(last, tuple) else last}
    assert_within(found, {name: tensor.double() for name, tensor in expected.items()})


@pytest.mark.asan
@pytest.mark.parametrize("case", LAYER_CASES[1::5], ids=str)
def test_same_call_twice_gives_the_same_bits(case: Case, isa: str) -> None:
    module = case.build(fused_rnn)
    assert_same(run(module, case.data()), run(module, case.data()))
