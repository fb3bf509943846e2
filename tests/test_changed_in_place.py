"""Results changed in place before the backward pass: right gradients, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.cases import CELLS, CellCase
from support.compare import assert_close_to_twin
from torch import Tensor, nn

import fused_rnn

pytestmark = pytest.mark.kernels

CHANGES: dict[str, tuple[Callable[[Tensor], object], Callable[[Tensor], Tensor]]] = {
    "rows set to zero": (lambda h: h.__setitem__(0, 0), lambda h: torch.cat([torch.zeros_like(h[:1]), h[1:]])),
    "relu_": (lambda h: h.relu_(), torch.relu),
    "dropout": (
        lambda h: nn.functional.dropout(h, 0.5, inplace=True),
        lambda h: nn.functional.dropout(h, 0.5),
    ),
    "doubled": (lambda h: h.mul_(2), lambda h: h * 2),
}


def gradients(module: nn.Module, case: CellCase, change: Callable[[Tensor], object], copies: bool) -> dict[str, Tensor]:
    """Of three steps, with the states changed after each, in place or not."""
    torch.manual_seed(7)
    states: tuple[Tensor, ...] | None = None
    inputs = [torch.randn(case.batch, case.input_size, dtype=case.dtype, requires_grad=True) for _ in range(3)]
    for x in inputs:
        hx = states if states is None or len(states) > 1 else states[0]
        result = module(x, hx)
        states = result if isinstance(result, tuple) else (result,)
        if copies:
            states = tuple(change(state) for state in states)  # type: ignore[misc]
        else:
            for state in states:
                change(state)
    assert states is not None
    sum(state.square().sum() for state in states).backward()  # type: ignore[union-attr]
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    return found | {f"x{i}": x.grad for i, x in enumerate(inputs)}  # type: ignore[return-value]


def named(module: nn.Module, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip((name for name, _ in module.named_parameters()), values, strict=True))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_cells_new_state_may_be_changed_in_place(cell: str, change: str) -> None:
    case = CellCase(cell=cell, dtype=torch.float64)
    module = case.build(fused_rnn)
    in_place, copying = CHANGES[change]
    assert_close_to_twin(gradients(module, case, in_place, False), gradients(module, case, copying, True))


@pytest.mark.parametrize("cell", CELLS)
def test_a_compiled_cells_new_state_may_be_changed_in_place(cell: str) -> None:
    case = CellCase(cell=cell, dtype=torch.float64)
    module = case.build(fused_rnn)

    def loss(x: Tensor) -> Tensor:
        result = module(x)
        h = result[0] if isinstance(result, tuple) else result
        h[0] = 0
        return h.square().sum()

    x = case.data().sequence.detach()
    parameters = list(module.parameters())
    expected = torch.autograd.grad(loss(x), parameters)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), parameters)
    assert_close_to_twin(named(module, found), named(module, expected))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_layers_final_states_may_be_changed_in_place(name: str) -> None:
    layer = getattr(fused_rnn, name)(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    parameters = list(layer.parameters())

    def loss(in_place: bool) -> Tensor:
        states = layer(x)[1]
        states = states if isinstance(states, tuple) else (states,)
        if in_place:
            for state in states:
                state[:, 0] = 0
        return sum(state[:, 1:].square().sum() for state in states)

    found, expected = (torch.autograd.grad(loss(in_place), parameters) for in_place in (True, False))
    assert_close_to_twin(named(layer, found), named(layer, expected))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_changed_output_of_a_layer_is_an_error_that_says_what_to_do(name: str) -> None:
    layer = getattr(fused_rnn, name)(3, 4)
    output = layer(torch.randn(5, 2, 3))[0]
    output[0] = 0
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*change a copy of it, output\.clone\(\)"):
        output.sum().backward()
    copy = layer(torch.randn(5, 2, 3))[0].clone()
    copy[0] = 0
    copy.sum().backward()
