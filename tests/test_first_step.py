"""A sequence that begins from zeros multiplies none with w_hh, in whatever way a call reads its weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, run
from support.compare import assert_same, assert_within
from support.pairwise import pairwise
from torch import nn

import fused_rnn

# One step and several, for weights in place, packed for the call, and kept between calls.
FACTORS = {
    "cell": CELLS,
    "input_size": (3, 130),
    "hidden_size": (5, 40, 131),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "proj": (False, True),
    "packing": ("padded", "sorted"),
    "batch": (1, 6, 40),
    "steps": (1, 3, 20),
    "dtype": (torch.float32, torch.float64, torch.bfloat16),
}
CASES = [Case(**row) for row in pairwise(FACTORS, allowed=lambda row: row["cell"] == "LSTM" or not row["proj"], seed=5)]
OPTIONS: list[dict[str, Any]] = [
    {"layer_norm": True},
    {"num_heads": 4},
    {"zoneout": 0.3},
    {"recurrent_dropout": 0.4},
]


def zeros_like_states(case: Case) -> Any:
    states = tuple(torch.zeros(shape, dtype=case.dtype) for shape in case.replace(hx=True).state_shapes)
    return states if case.has_cell_state else states[0]


@pytest.mark.asan
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_state_matches_float64_and_equals_zeros(case: Case, isa: str) -> None:
    data = case.data()
    module = case.build(fused_rnn)
    found = run(module, data)
    assert_within(found, run(copy.deepcopy(case.build(nn)).double(), data.to(torch.float64)))
    with torch.no_grad():
        outputs = case.outputs(module(data.input, zeros_like_states(case)))
    assert_same(outputs, {name: found[name].detach() for name in outputs})


@pytest.mark.asan
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("steps", [1, 4])
def test_options_match_the_reference(options: dict[str, Any], cell: str, steps: int, isa: str) -> None:
    torch.manual_seed(0)
    module = getattr(fused_rnn, cell)(7, 48, dtype=torch.float64, **options)
    x = torch.randn(steps, 5, 7, dtype=torch.float64)
    torch.manual_seed(1)
    found = module(x)
    torch.manual_seed(1)
    with fused_rnn.use_backend("reference"):
        expected = module(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.asan
@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("marked", ["first row", "all rows", "none"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_reset_before_the_first_step_multiplies_its_state(
    marked: str, bidirectional: bool, batch: int, isa: str
) -> None:
    torch.manual_seed(0)
    module = fused_rnn.GRU(7, 100, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(3, batch, 7, dtype=torch.float64)
    reset = torch.zeros(3, batch, dtype=torch.bool)
    reset[0, : {"first row": 1, "all rows": batch, "none": 0}[marked]] = True
    state = torch.randn(1 + bidirectional, batch, 100, dtype=torch.float64)
    found = module(x, reset=reset, reset_state=state)
    with fused_rnn.use_backend("reference"):
        expected = module(x, reset=reset, reset_state=state)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 6, 40, 300])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("hidden_size", [24, 160])
def test_one_step_from_zeros_does_not_read_the_recurrent_weights(
    cell: str, batch: int, hidden_size: int, isa: str
) -> None:
    """NaN shows who reads them."""
    torch.manual_seed(0)
    module = getattr(fused_rnn, cell)(20, hidden_size)
    x = torch.randn(1, batch, 20)
    with torch.no_grad():
        expected = module(x)
        module.weight_hh_l0.fill_(torch.nan)
        for state in (None, torch.zeros(1, batch, hidden_size)):
            hx = (state, state) if cell == "LSTM" and state is not None else state
            for _ in range(3):  # the third call is of weights that may be kept
                torch.testing.assert_close(module(x, hx), expected, rtol=0, atol=0)
        one = torch.zeros(1, batch, hidden_size)
        one[0, -1, -1] = 1e-30
        assert module(x, (one, one) if cell == "LSTM" else one)[0].isnan()[0, -1].any()
        assert module(torch.cat([x, x]))[0][1].isnan().all()
