"""First and second derivatives are right, and autograd's rules hold: what is saved, freed, skipped and refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from support.cases import CELLS, Case, CellCase, Data, incoming_gradients, run
from support.compare import assert_close_to_twin, assert_same, assert_within
from torch import Tensor, nn
from torch.func import functional_call

import fused_rnn

F64 = torch.float64
# autograd words it differently for views
REFUSED = r"modified (by an )?inplace"
SMALL = {"input_size": 3, "hidden_size": 4, "batch": 2, "steps": 3, "dtype": F64}

# Random parameters keep the sums of ReLU away from its kink by far more than gradcheck's step of 1e-6.
DERIVATIVE_CASES = [
    *(Case(cell=cell, hx=True, **SMALL) for cell in CELLS),
    *(Case(cell=cell, num_layers=2, bidirectional=True, **SMALL) for cell in CELLS),
    Case(proj=True, num_layers=2, hx=True, **SMALL),
    *(Case(cell=cell, packing="unsorted", hx=True, bias=False, **SMALL) for cell in ("LSTM", "GRU")),
    *(CellCase(cell=cell, input_size=3, hidden_size=4, batch=2, dtype=F64) for cell in CELLS),
    CellCase(cell="GRU", bias=False, hx=False, batch=None, dtype=F64),
]


def as_function(case: Case | CellCase) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The call as a function of all its leaves and parameters, and their values."""
    module, data = case.build(fused_rnn), case.data()
    names = [name for name, _ in module.named_parameters()]
    leaf_count = len(data.leaves)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        hx = Data(case, values[0], values[1:leaf_count]).hx
        parameters = dict(zip(names, values[leaf_count:], strict=True))
        result = functional_call(module, parameters, (case.argument(values[0]), hx))
        return tuple(case.outputs(result).values())

    values = (*data.leaves.values(), *(p.detach().clone().requires_grad_() for p in module.parameters()))
    return function, values


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_gradient_equals_finite_differences(case: Case | CellCase) -> None:
    function, values = as_function(case)
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_second_derivative_equals_finite_differences(case: Case | CellCase) -> None:
    # the fast mode projects on random vectors; the slow one takes minutes and finds the same faults
    function, values = as_function(case)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize(
    "case",
    [
        *(Case(cell=cell, num_layers=2, bidirectional=True, dtype=F64) for cell in CELLS),
        *(Case(cell=cell, packing="unsorted", hx=True, bias=False, dtype=F64) for cell in CELLS),
        *(Case(cell=cell, num_layers=3, dropout=0.4, batch_first=True, dtype=F64) for cell in CELLS),
        Case(proj=True, num_layers=2, hx=True, dtype=F64),
        *(CellCase(cell=cell, dtype=F64) for cell in CELLS),
    ],
    ids=str,
)
def test_gradient_penalty_through_the_module_equals_torch_nn(case: Case | CellCase) -> None:
    def penalty_gradients(module: nn.Module) -> dict[str, Tensor]:
        data = case.data()
        torch.manual_seed(3)
        outputs = case.outputs(module(data.input, data.hx))
        leaves = list(data.leaves.values())
        loss = sum(output.square().sum() for output in outputs.values())
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        named = data.leaves | dict(module.named_parameters())
        return dict(zip(named, torch.autograd.grad(penalty, list(named.values())), strict=True))

    fused, twin = case.twins()
    assert_close_to_twin(penalty_gradients(fused), penalty_gradients(twin))


@pytest.mark.parametrize("cell", CELLS)
def test_third_derivative_equals_torch_nn(cell: str) -> None:
    case = Case(cell=cell, steps=3, dtype=F64)
    results = []
    for module in case.twins():
        data = case.data()
        value = module(data.input)[0].exp().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, data.sequence, create_graph=True)
            value = gradient.square().sum()
        results.append({"gradient": gradient})
    assert_close_to_twin(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_with_create_graph_gives_the_same_first_gradients(cell: str) -> None:
    case = Case(cell=cell, num_layers=2, hx=True)
    module, data = case.build(fused_rnn), case.data()
    leaves = [*data.leaves.values(), *module.parameters()]
    plain = torch.autograd.grad(module(data.input, data.hx)[0].square().sum(), leaves)
    recorded = torch.autograd.grad(module(data.input, data.hx)[0].square().sum(), leaves, create_graph=True)
    for before, after in zip(plain, recorded, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("cell", CELLS)
def test_hessian_vector_product_in_float32_is_near_float64(cell: str) -> None:
    case = Case(cell=cell)

    def product(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        data = case.data().to(dtype)
        (gradient,) = torch.autograd.grad(module(data.input)[0].exp().sum(), data.sequence, create_graph=True)
        (result,) = torch.autograd.grad((gradient * gradient.detach()).sum(), data.sequence)
        return {"product": result}

    fused, twin = case.twins()
    assert_within(product(fused, torch.float32), product(twin.double(), F64))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_in_eval_mode_equal_those_in_training(cell: str) -> None:
    case = Case(cell=cell, num_layers=2)
    module = case.build(fused_rnn)
    trained = run(module, case.data())
    assert_same(run(module.eval(), case.data()), trained)


# ---- what is not needed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l0", "bias_hh_l1_reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_frozen_parameter_gets_no_gradient_and_the_others_stay_right(cell: str, frozen: str) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True)
    module, whole = case.build(fused_rnn), case.build(fused_rnn)
    getattr(module, frozen).requires_grad_(False)
    for layer in (module, whole):
        layer(case.data().input)[0].square().sum().backward()
    assert getattr(module, frozen).grad is None
    others = [name for name, _ in module.named_parameters() if name != frozen]
    assert_within(
        {name: getattr(module, name).grad for name in others},
        {name: getattr(whole, name).grad.double() for name in others},
    )


@pytest.mark.parametrize("cell", CELLS)
def test_frozen_module_passes_the_gradient_of_its_input(cell: str) -> None:
    case = Case(cell=cell, hx=True, num_layers=2)
    module, twin = case.twins()
    gradients = []
    for layer in (module, twin):
        layer.requires_grad_(False)
        data = case.data()
        output, _ = layer(data.input, data.hx)
        output.square().sum().backward()
        gradients.append({name: leaf.grad for name, leaf in data.leaves.items()})
        assert all(parameter.grad is None for parameter in layer.parameters())
    assert_close_to_twin(*gradients)


@pytest.mark.parametrize("cell", CELLS)
def test_input_that_needs_no_gradient_gets_none(cell: str) -> None:
    case = Case(cell=cell, num_layers=2, hx=True)
    module, data = case.build(fused_rnn), case.data()
    for leaf in data.leaves.values():
        leaf.requires_grad_(False)
    expected = run(case.build(fused_rnn), case.data())
    module(data.input, data.hx)
    outputs = case.outputs(module(data.input, data.hx))
    incoming = incoming_gradients(list(outputs.values()), integers=case.integers)
    torch.autograd.backward(list(outputs.values()), incoming)
    assert all(leaf.grad is None for leaf in data.leaves.values())
    found = {f"grad({name})": parameter.grad for name, parameter in module.named_parameters()}
    assert_within(found, {name: expected[name].double() for name in found})


@pytest.mark.parametrize("cell", CELLS)
def test_no_graph_is_built_when_nothing_needs_a_gradient(cell: str) -> None:
    case = Case(cell=cell)
    module, data = case.build(fused_rnn).requires_grad_(False), case.data()
    assert not module(data.sequence.detach())[0].requires_grad
    module.requires_grad_(True)
    with torch.no_grad():
        assert not module(data.input)[0].requires_grad
    assert module(data.input)[0].requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_parameters_of_unused_outputs_get_zero_gradients_as_in_torch_nn(cell: str) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True)
    gradients = []
    for layer in case.twins():
        _, states = layer(case.data().input)
        h_n = states[0] if isinstance(states, tuple) else states
        # h_n of the first layer alone: nothing of the second layer is used
        h_n[:2].sum().backward()
        gradients.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    assert not any(gradient is None for gradient in gradients[0].values())
    assert_close_to_twin(*gradients)
    assert gradients[0]["weight_hh_l1"].count_nonzero() == 0


# ---- graphs that are used again or not at all ---------------------------------------------------------------------


@pytest.mark.parametrize("case", [*(Case(cell=cell) for cell in CELLS), CellCase(), CellCase("GRU")], ids=str)
def test_backward_twice_with_retain_graph_gives_the_same_and_a_third_is_refused(case: Case | CellCase) -> None:
    module, data = case.build(fused_rnn), case.data()
    loss = sum(output.square().sum() for output in case.outputs(module(data.input, data.hx)).values())
    leaves = [*data.leaves.values(), *module.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_accumulate_over_calls(cell: str) -> None:
    case = Case(cell=cell)
    module, twin = case.twins()
    for layer in (module, twin):
        for seed in (1, 2):
            layer(case.data(seed=seed).input)[0].sum().backward()
    assert_close_to_twin(
        {name: p.grad for name, p in module.named_parameters()}, {name: p.grad for name, p in twin.named_parameters()}
    )


@pytest.mark.parametrize("cell", CELLS)
def test_module_called_twice_in_one_graph_keeps_both_calls_apart(cell: str) -> None:
    case = Case(cell=cell, input_size=7, hidden_size=7)
    gradients = []
    for layer in case.twins():
        data = case.data()
        middle, _ = layer(data.input)
        layer(middle)[0].square().sum().backward()
        gradients.append({"input": data.sequence.grad} | {name: p.grad for name, p in layer.named_parameters()})
    assert_close_to_twin(*gradients)


# ---- writing in place between forward and backward ----------------------------------------------------------------


def _input_of(module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
    return inputs


def _output_of(module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
    return output


def _weight_of(module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
    return module.weight_hh_l0


@pytest.mark.parametrize("of", [_input_of, _output_of, _weight_of])
@pytest.mark.parametrize("cell", CELLS)
def test_writing_in_place_before_backward_raises_or_leaves_the_gradient_right(
    cell: str, of: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> None:
    case = Case(cell=cell, num_layers=2)

    def gradients(write: bool) -> dict[str, Tensor]:
        module, leaf = case.build(fused_rnn), case.data().sequence
        inputs = leaf * 1.0
        output, _ = module(inputs)
        # copied before the write, so that the loss itself does not change
        loss = (output * 1.0).sum()
        if write:
            with torch.no_grad():
                of(module, inputs, output).mul_(3.0)
        return dict(
            zip("ihg", torch.autograd.grad(loss, [leaf, module.weight_hh_l0, module.weight_ih_l1]), strict=True)
        )

    expected = gradients(write=False)
    try:
        found = gradients(write=True)
    except RuntimeError as error:
        assert re.search(REFUSED, str(error))
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("written", ["input", "weight_ih_l0", "weight_hh_l0"])
def test_writing_to_what_backward_needs_raises_as_in_torch_nn(cell: str, written: str) -> None:
    case = Case(cell=cell)
    for layer in case.twins():
        leaf = case.data().sequence
        inputs = leaf * 1.0
        loss = layer(inputs)[0].square().sum()
        with torch.no_grad():
            (inputs if written == "input" else getattr(layer, written)).add_(1.0)
        with pytest.raises(RuntimeError, match=REFUSED):
            loss.backward()


@pytest.mark.parametrize("cell", CELLS)
def test_in_place_arithmetic_on_the_output_that_autograd_records_is_right_or_refused(cell: str) -> None:
    case = Case(cell=cell, dtype=F64)

    def gradient(in_place: bool) -> dict[str, Tensor]:
        module, data = case.build(fused_rnn), case.data()
        output, _ = module(data.input)
        output = output.mul_(2.0) if in_place else output * 2.0
        return {"input": torch.autograd.grad(output.square().sum(), data.sequence)[0]}

    expected = gradient(in_place=False)
    try:
        found = gradient(in_place=True)
    except RuntimeError as error:
        assert re.search(REFUSED, str(error))
    else:
        assert_within(found, expected)


def test_output_and_states_share_no_memory() -> None:
    for cell in CELLS:
        for steps in (1, 3):
            case = Case(cell=cell, steps=steps, batch=1, hx=True)
            data = case.data()
            tensors = [*case.outputs(case.build(fused_rnn)(data.input, data.hx)).values(), *data.leaves.values()]
            addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors]
            assert len(set(addresses)) == len(addresses)


def test_deepcopied_module_trains_apart_from_its_original() -> None:
    case = Case()
    module = case.build(fused_rnn)
    twin = copy.deepcopy(module)
    twin(case.data().input)[0].sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())
