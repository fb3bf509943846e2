"""Masks on the CUDA operators, executed on the CPU as in test_cuda_ops.py."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cases import CELLS, Case, run
from support.compare import assert_same, assert_within
from support.pairwise import pairwise
from test_cuda_ops import (
    FACTORS,
    PERSISTENT,
    _allow,
    _cuda_operators,  # noqa: F401  (a fixture)
    _has_projection,
)
from test_masks import (
    as_argument,
    assert_idle_state_stays,
    assert_masked_steps_are_empty,
    float64_reference,
    random_mask,
)

import fused_rnn

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:.*verriding a previously registered kernel"),
]

CASES = [
    Case(**row)
    for row in pairwise(
        {name: levels for name, levels in FACTORS.items() if name != "packing"}, allowed=_has_projection
    )
]
SOME = [
    *(Case(cell=cell, hidden_size=16, num_layers=2, bidirectional=True, batch=5, steps=4, hx=True) for cell in CELLS),
    Case(hidden_size=8, proj=True, num_layers=2, batch=5, bidirectional=True, batch_first=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_matches_the_float64_definition(case: Case) -> None:
    found = run(case.build(fused_rnn), case.data(), mask=as_argument(case, random_mask(case)))
    assert_within(found, float64_reference(case))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_layer_without_gradients_matches_the_float64_definition(case: Case) -> None:
    with torch.no_grad():
        found = run(case.build(fused_rnn), case.data(), gradients=False, mask=as_argument(case, random_mask(case)))
    assert_within(found, {name: value for name, value in float64_reference(case).items() if name in found})


@pytest.mark.parametrize(("variant", "team_blocks", "dtype"), PERSISTENT, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_layer_matches_the_float64_definition(
    cell: str, variant: str, team_blocks: int, dtype: torch.dtype
) -> None:
    case = Case(
        cell=cell, hidden_size=16, num_layers=2, bidirectional=True, batch=9, steps=4, batch_first=True, hx=True,
        dtype=dtype,
    )  # fmt: skip
    _allow(variant, team_blocks=team_blocks)
    found = run(case.build(fused_rnn), case.data(), mask=as_argument(case, random_mask(case)))
    kernels = f"{variant} {str(dtype).removeprefix('torch.')}"
    assert torch.ops.fused_rnn_host.launches() == [f"{kernels} forward"] * 2 + [f"{kernels} backward"] * 2
    assert_within(found, float64_reference(case))


@pytest.mark.parametrize(("variant", "team_blocks", "dtype"), PERSISTENT, ids=str)
@pytest.mark.parametrize("hx", [False, True])
def test_a_layer_with_a_projection_in_one_launch_matches_the_float64_definition(
    hx: bool, variant: str, team_blocks: int, dtype: torch.dtype
) -> None:
    """Rows begin, at what they are given, in different steps; one has none."""
    case = Case(
        hidden_size=16, proj=True, num_layers=2, bidirectional=True, batch=9, steps=5, batch_first=True, hx=hx,
        dtype=dtype,
    )  # fmt: skip
    module, data, mask = case.build(fused_rnn), case.data(), as_argument(case, random_mask(case))
    expected = float64_reference(case)
    _allow(variant, team_blocks=team_blocks)
    found = run(module, data, mask=mask)
    kernels = f"{variant} {str(dtype).removeprefix('torch.')}"
    assert torch.ops.fused_rnn_host.launches() == [f"{kernels} forward"] * 2 + [f"{kernels} backward"] * 2
    assert_within(found, expected)
    for most_steps in (0, 2):
        _allow(variant, team_blocks=team_blocks, most_steps=most_steps)
        with torch.no_grad():
            inferred = run(module, data, gradients=False, mask=mask)
        assert_within(inferred, {name: expected[name] for name in inferred})


@pytest.mark.parametrize(("num_layers", "at_once"), [(2, 2), (5, 3)])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_layers_in_a_wavefront_match_the_float64_definition(cell: str, num_layers: int, at_once: int) -> None:
    case = Case(cell=cell, hidden_size=24, num_layers=num_layers, batch=9, steps=5, hx=True, dtype=torch.bfloat16)
    _allow("cluster", team_blocks=4, layers=at_once)
    module, data, mask = case.build(fused_rnn), case.data(), random_mask(case)
    found = run(module, data, mask=as_argument(case, mask))
    launches = torch.ops.fused_rnn_host.launches()
    for which in ("forward", "backward"):
        assert launches.count(f"cluster bfloat16 {which} of {at_once} layers") == num_layers // at_once
    assert_within(found, float64_reference(case))
    with torch.no_grad():
        inferred = run(module, data, gradients=False, mask=as_argument(case, mask))
    assert_same(inferred, {name: found[name] for name in inferred})
    spoilt = copy.deepcopy(data)
    with torch.no_grad():
        spoilt.sequence[~mask] = float("nan")
    assert_same(run(module, spoilt, mask=as_argument(case, mask)), found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", ["none", "cluster"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_what_stands_in_masked_steps_leaks_nowhere(case: Case, variant: str, recompute: bool, value: float) -> None:
    if variant == "cluster":
        case = case.replace(dtype=torch.bfloat16)
    _allow(variant, team_blocks=2)
    module, data, mask = case.build(fused_rnn), case.data(), random_mask(case)
    module.recompute = recompute
    expected = run(module, data, mask=as_argument(case, mask))
    spoilt = copy.deepcopy(data)
    with torch.no_grad():
        spoilt.sequence[~mask] = value
    found = run(module, spoilt, mask=as_argument(case, mask))
    assert_same(found, expected)
    assert_masked_steps_are_empty(found, case, mask)
    for name, initial in zip(("h_n", "c_n"), data.states, strict=False):
        assert torch.equal(found[name][:, 0], initial[:, 0])  # the row without a step


@pytest.mark.parametrize("variant", ["none", "cluster"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_initial_state_of_a_row_without_a_step_leaks_nowhere(case: Case, variant: str) -> None:
    case = case.replace(hx=True)
    if variant == "cluster":
        case = case.replace(dtype=torch.bfloat16)
    _allow(variant, team_blocks=2)
    module, mask = case.build(fused_rnn), random_mask(case)
    assert_idle_state_stays(
        case, lambda data: run(module, data, mask=as_argument(case, mask)), case.data(), mask, float("nan")
    )


@pytest.mark.parametrize("variant", ["none", "cluster"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_mask_of_true_and_gates_computed_again_change_no_bit(case: Case, variant: str) -> None:
    if variant == "cluster":
        case = case.replace(dtype=torch.bfloat16)
    _allow(variant, team_blocks=2)
    module, data, mask = case.build(fused_rnn), case.data(), as_argument(case, random_mask(case))
    assert_same(run(module, data, mask=torch.ones_like(mask)), run(module, data))
    expected = run(module, data, mask=mask)
    module.recompute = True
    assert_same(run(module, data, mask=mask), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_between_layers_matches_the_reference(cell: str) -> None:
    case = Case(cell=cell, num_layers=3, dropout=0.4, dtype=torch.float64, hidden_size=8, batch=3, steps=4)
    module, data, mask = case.build(fused_rnn), case.data(), random_mask(case)
    found = []
    for backend in ("fused", "reference"):
        torch.manual_seed(3)
        with fused_rnn.use_backend(backend):
            found.append(run(module, data, mask=mask))
    assert_within(*found)
