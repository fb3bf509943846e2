"""What a program assigns to ``layer._flat_weights``, or writes into it, is used as torch.nn uses it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, run
from support.compare import assert_close_to_twin, assert_same
from torch import Tensor, nn
from torch.func import functional_call

import fused_rnn

CASES = [Case(cell=cell, num_layers=2, bidirectional=True) for cell in CELLS] + [Case(proj=True, bias=False)]


def other_values(layer: nn.Module, index: int) -> Tensor:
    """Such as weight dropout makes: a plain tensor that depends on the Parameter."""
    return list(layer.parameters())[index] * 0.5


def write_one(layer: nn.Module) -> None:
    layer._flat_weights[1] = other_values(layer, 1)


def write_several(layer: nn.Module) -> None:
    layer._flat_weights[:2] = [other_values(layer, 0), other_values(layer, 1)]


def assign_list(layer: nn.Module) -> None:
    layer._flat_weights = [other_values(layer, index) for index in range(len(layer._flat_weights))]


def assign_twice(layer: nn.Module) -> None:
    assign_list(layer)
    layer._flat_weights[0] = layer.weight_ih_l0


def refill(layer: nn.Module) -> None:
    weights = [other_values(layer, index) for index in range(len(layer._flat_weights))]
    layer._flat_weights.clear()
    layer._flat_weights.extend(weights)


def change_parameters_in_place(layer: nn.Module) -> None:
    write_one(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.9)


def numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(index): tensor for index, tensor in enumerate(tensors)}


WRITES = [write_one, write_several, assign_list, assign_twice, refill, change_parameters_in_place]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_written_weights_are_used_and_their_graph_gets_the_gradient(
    case: Case, write: Callable[[nn.Module], None]
) -> None:
    results = []
    for layer in case.twins():
        before = run(layer, case.data(), gradients=False)
        registered = dict(layer.named_parameters())
        write(layer)
        results.append(run(layer, case.data()))
        assert any(not torch.equal(before[name], results[-1][name]) for name in before)
        after = dict(layer.named_parameters())
        assert list(after) == list(registered) and all(after[name] is registered[name] for name in after)
    assert_close_to_twin(*results)


def test_written_weights_are_read_back() -> None:
    for layer in Case(num_layers=2).twins():
        weight = other_values(layer, 1)
        layer._flat_weights[1] = weight
        assert layer._flat_weights[1] is weight
        assert layer._flat_weights[0] is layer.weight_ih_l0
        layer._flat_weights[1] = layer.weight_hh_l0
        assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))


# ---- how long they hold -------------------------------------------------------------------------------------------


def _assign_the_parameter(layer: nn.Module) -> Any:
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)


def _assign_another_parameter(layer: nn.Module) -> Any:
    layer.bias_ih_l0 = nn.Parameter(layer.bias_ih_l0.detach() * 2)


def _assign_the_same_parameter(layer: nn.Module) -> Any:
    layer.weight_hh_l0 = layer.weight_hh_l0


def _assign_another_weights_own_parameter(layer: nn.Module) -> Any:
    layer.weight_ih_l0 = layer.weight_ih_l0


def _replace_by_plain_tensor(layer: nn.Module) -> Any:
    values = layer.weight_hh_l0.detach() * 2
    del layer.weight_hh_l0
    layer.weight_hh_l0 = values


def _write_parameters_dict(layer: nn.Module) -> Any:
    layer._parameters["bias_hh_l0"] = nn.Parameter(layer.bias_hh_l0.detach() * 2)


def _to_another_dtype_and_back(layer: nn.Module) -> Any:
    layer.double().float()


def _load_state_dict(layer: nn.Module) -> Any:
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})


def _load_state_dict_by_assignment(layer: nn.Module) -> Any:
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()}, assign=True)


def _call_with_other_parameters(layer: nn.Module) -> Any:
    given = {name: value.detach() * 2 for name, value in layer.named_parameters()}
    return functional_call(layer, given, (Case(num_layers=2).data().input,))


def _copy(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer)


def _save_and_load(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _call(layer: nn.Module) -> Any:
    layer(Case(num_layers=2).data().input)


CHANGES = [
    _assign_the_parameter,
    _assign_another_parameter,
    _assign_the_same_parameter,
    _assign_another_weights_own_parameter,
    _replace_by_plain_tensor,
    _write_parameters_dict,
    _to_another_dtype_and_back,
    _load_state_dict,
    _load_state_dict_by_assignment,
    _call_with_other_parameters,
    _copy,
    _save_and_load,
    _call,
]


@pytest.mark.parametrize("change", CHANGES)
def test_written_weights_hold_exactly_as_long_as_in_torch_nn(change: Callable[[nn.Module], Any]) -> None:
    case = Case(num_layers=2)
    results = []
    for layer in case.twins():
        layer._flat_weights[1] = other_values(layer, 1).detach()
        layer._flat_weights[5] = other_values(layer, 5).detach()
        changed = change(layer)
        layer = changed if isinstance(changed, nn.Module) else layer
        results.append([run(layer, case.data(), gradients=False) for _ in range(2)])
    for found, expected in zip(*results, strict=True):
        assert_close_to_twin(found, expected)


def test_replica_for_data_parallel_has_the_tensors_that_it_is_given() -> None:
    case = Case(num_layers=2)
    results = []
    for layer in case.twins():
        write_one(layer)
        for written in (True, False):
            if not written:
                layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach())
            replica = layer._replicate_for_data_parallel()
            for name, parameter in layer.named_parameters():
                setattr(replica, name, parameter.detach() * 2)
            results.append(replica(case.data().input)[0])
        layer(case.data().input)  # torch.nn notices here, and in no earlier place, that a Parameter is another one
        write_one(layer)
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer.named_parameters():
            setattr(replica, name, parameter.detach() * 2)
        results.append(layer(case.data().input)[0])  # the layer itself keeps what was written
    assert_close_to_twin(numbered(results[:3]), numbered(results[3:]))


def test_weights_of_a_layer_that_has_no_parameters_of_its_own() -> None:
    """Code that generates the weights deletes the Parameters and assigns the list before each call."""
    case = Case(num_layers=2, dtype=torch.float64)
    results = []
    for layer in case.twins():
        generated = [parameter.detach() * 0.7 for parameter in layer.parameters()]
        for name in list(layer._parameters):
            delattr(layer, name)
        layer._flat_weights = []
        for factor in (1, 2):
            leaves = [(weight * factor).requires_grad_() for weight in generated]
            layer._flat_weights = leaves
            output = layer(case.data().input)[0]
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for found, expected in zip(results[:2], results[2:], strict=True):
        assert_close_to_twin(numbered(found), numbered(expected))


def test_layer_keeps_no_tensor_alive_that_no_longer_counts() -> None:
    layer = fused_rnn.LSTM(3, 4)
    write_one(layer)
    forgotten = weakref.ref(layer._flat_weights[1])
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach())
    gc.collect()
    assert forgotten() is None
    assert not {"_assigned_weights", "_params"} & set(vars(layer))


def test_assigning_the_weights_by_name_changes_nothing() -> None:
    layer = fused_rnn.LSTM(3, 4)
    before = dict(vars(layer))
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
    assert vars(layer) == before


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_weight_that_does_not_fit_is_named_by_the_call() -> None:
    layer, sequence = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    layer._flat_weights[1] = torch.zeros(5, 5)
    with pytest.raises(RuntimeError, match=r"^weight_hh_l0: expected \(12, 4\), got \(5, 5\)"):
        layer(sequence)
    layer._flat_weights = [layer.weight_ih_l0]
    with pytest.raises(RuntimeError, match=r"expected 4 tensors \(weight_ih_l0, .*got 1"):
        layer(sequence)
    layer._flat_weights[0] = None
    with pytest.raises((RuntimeError, TypeError)):
        layer(sequence)


@pytest.mark.parametrize("value", [None, (), torch.zeros(2)], ids=["None", "tuple", "Tensor"])
def test_value_that_is_no_list_is_refused_by_name(value: Any) -> None:
    layer = fused_rnn.GRU(3, 4)
    with pytest.raises(TypeError, match=r"^_flat_weights: expected a list of 4 Tensors \(weight_ih_l0.*got"):
        layer._flat_weights = value


# ---- convert ------------------------------------------------------------------------------------------------------


def test_written_weights_survive_convert_and_revert() -> None:
    case = Case("GRU", num_layers=2)
    layer = case.build(nn)
    write_one(layer)
    expected = run(layer, case.data(), gradients=False)
    assert_close_to_twin(run(fused_rnn.convert(layer), case.data(), gradients=False), expected)
    assert_same(run(fused_rnn.revert(layer), case.data(), gradients=False), expected)


@pytest.mark.slow
def test_wrapper_that_writes_weights_compiles_to_the_same_numbers() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fused_rnn.GRU(3, 4)

        def forward(self, sequence: Tensor) -> Tensor:
            self.layer._flat_weights[1] = self.layer.weight_hh_l0 * 0.5
            return self.layer(sequence)[0]

    model, sequence = Dropped(), torch.randn(5, 2, 3)
    expected = model(sequence)
    assert torch.equal(torch.compile(model, backend="eager")(sequence), expected)
