"""Numbers below the smallest normal one: kernels take them for 0, and leave the arithmetic of everything else alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cases import Case, CellCase, run
from support.compare import assert_same, assert_within
from torch import Tensor, nn

import fused_rnn

pytestmark = pytest.mark.kernels

# Below the smallest normal number of each type that is accumulated in, and not 0 in any type it is stored in.
TINY = {torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float64: 1e-310}
CARRIERS = ["LSTM", "GRU", "RNN_RELU"]


def carrier(cell: str, dtype: torch.dtype, units: int = 24) -> nn.Module:
    """A layer that hands its state on as it is: gates held open by their biases, or ReLU of the identity."""
    module = Case(cell=cell, input_size=units, hidden_size=units, dtype=dtype).build(fused_rnn)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        if cell == "LSTM":
            module.bias_hh_l0[units : 2 * units] = 1e3  # forget gate
        elif cell == "GRU":
            module.bias_hh_l0[units : 2 * units] = 1e3  # update gate
        else:
            module.weight_hh_l0.copy_(torch.eye(units, dtype=dtype))
    return module


def carried(cell: str, states: Tensor, gradients: Tensor, steps: int = 6) -> dict[str, Tensor]:
    """The last state of `carrier` and the gradient of the first one, for rows of states and of gradients."""
    module = carrier(cell, states.dtype, states.shape[-1])
    state = states[None].clone().requires_grad_()
    sequence = torch.zeros(steps, *states.shape, dtype=states.dtype)
    if cell == "LSTM":
        last = module(sequence, (torch.zeros_like(states)[None], state))[1][1]
    else:
        last = module(sequence, state)[1]
    (gradient,) = torch.autograd.grad(last, state, gradients[None])
    return {"state": last.detach()[0], "gradient": gradient[0]}


@pytest.mark.asan
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("cell", CARRIERS)
def test_states_and_gradients_below_the_normal_numbers_are_zero(
    cell: str, dtype: torch.dtype, steps: int, isa: str
) -> None:
    tiny = torch.full((8, 24), TINY[dtype], dtype=dtype)
    assert tiny.count_nonzero() == tiny.numel()
    found = carried(cell, tiny, tiny, steps)
    assert found["state"].count_nonzero() == 0
    assert found["gradient"].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CARRIERS)
def test_all_other_numbers_beside_them_are_carried_as_they_are(cell: str, dtype: torch.dtype, isa: str) -> None:
    smallest = torch.finfo(dtype).tiny
    values = torch.tensor([0.5, 1.0, smallest, 1.5 * smallest, 3.0, 1e-3], dtype=dtype).repeat(8, 4)
    assert_same(carried(cell, values, values), {"state": values, "gradient": values})
    values[0, 0] = torch.nan
    values[1, 1] = torch.inf
    found = carried(cell, values, torch.ones_like(values))["state"]
    assert found[0, 0].isnan()
    assert found[1, 1].isinf() or cell != "LSTM"
    assert_same({"others": found[2:]}, {"others": values[2:]})


@pytest.mark.asan
@pytest.mark.parametrize("cell", CARRIERS)
def test_subnormal_numbers_of_float16_are_exact(cell: str, isa: str) -> None:
    """They are normal numbers of float32, which float16 is computed in: all 1023 of them, and the first after them."""
    units = 64
    values = (torch.arange(1, 1025, dtype=torch.float64) * 2.0**-24).to(torch.float16).reshape(16, units)
    assert values[:, 0].min() > 0
    assert_same(carried(cell, values, values), {"state": values, "gradient": values})


@pytest.mark.parametrize("case", [Case(steps=3, dtype=torch.float16), CellCase(dtype=torch.float16)], ids=str)
def test_float16_inputs_below_its_normal_numbers_match_float64(case: Case | CellCase, isa: str) -> None:
    data = case.data()
    with torch.no_grad():
        for leaf in data.leaves.values():
            leaf.mul_(1e-5)
    module = case.build(fused_rnn)
    twin = case.build(nn).double()
    assert_within(run(module, data), run(twin, data.to(torch.float64)))


# ---- the mode of the processor ------------------------------------------------------------------------------------


def flushes_here() -> bool:
    """Whether this thread takes denormal numbers for 0."""
    return bool((torch.full((1,), 1e-40) * 2.0).count_nonzero() == 0)


def flushing_elements() -> int:
    """How many of many denormal numbers any thread of PyTorch takes for 0."""
    numbers = torch.full((4_000_000,), 1e-40)
    return numbers.numel() - int((numbers * 2.0).count_nonzero())


@pytest.fixture
def flush() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_a_call_leaves_the_mode_of_its_thread_as_it_was(
    gradients: bool, count: int, before: bool, flush: None, threads: None, isa: str
) -> None:
    if not torch.set_flush_denormal(before):
        pytest.skip("PyTorch sets no mode on this processor")
    torch.set_num_threads(count)
    case = Case(input_size=64, hidden_size=128, batch=16, steps=10)
    module, data = case.build(fused_rnn), case.data()
    assert flushes_here() == before
    run(module, data, gradients=gradients)
    assert flushes_here() == before


def test_a_call_leaves_the_mode_of_the_other_threads_as_it_was(threads: None) -> None:
    from fused_rnn import _C

    previous = _C.set_processors(2)
    try:
        torch.set_num_threads(2)
        assert flushing_elements() == 0
        case = Case(input_size=64, hidden_size=128, batch=16, steps=10)
        run(case.build(fused_rnn), case.data())
        assert flushing_elements() == 0
    finally:
        _C.set_processors(previous)
