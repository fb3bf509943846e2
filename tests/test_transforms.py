"""torch.func over the layers: grad, vjp and vmap give what autograd and a loop give."""

from __future__ import annotations

import pytest
import torch
from support.cases import CELLS, Case, CellCase
from support.compare import assert_close_to_twin
from torch import Tensor
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap

import fused_rnn

CASES = [*(Case(cell=cell, num_layers=2, dtype=torch.float64) for cell in CELLS), CellCase(dtype=torch.float64)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_func_grad_equals_autograd(case: Case | CellCase) -> None:
    module, data = case.build(fused_rnn), case.data()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        outputs = case.outputs(functional_call(module, values, (data.sequence.detach(),)))
        return sum(output.square().sum() for output in outputs.values())

    found = grad(loss)(parameters)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    expected = torch.autograd.grad(loss(leaves), list(leaves.values()))
    assert_close_to_twin(found, dict(zip(leaves, expected, strict=True)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_func_vjp_equals_autograd(case: Case | CellCase) -> None:
    module, data = case.build(fused_rnn).requires_grad_(False), case.data()

    def outputs(sequence: Tensor) -> Tensor:
        return next(iter(case.outputs(module(sequence)).values()))

    value, pullback = vjp(outputs, data.sequence.detach())
    cotangent = torch.randn_like(value)
    expected = torch.autograd.grad(outputs(data.sequence), data.sequence, cotangent)
    assert_close_to_twin({"input": pullback(cotangent)[0]}, {"input": expected[0]})


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_over_an_ensemble_equals_a_loop(cell: str) -> None:
    case = Case(cell=cell, num_layers=2, dtype=torch.float64)
    modules = [case.build(fused_rnn, seed=seed) for seed in range(3)]
    sequence = case.data().sequence.detach()
    parameters, buffers = stack_module_state(modules)

    def output(values: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
        return functional_call(modules[0], (values, rest), (sequence,))[0]

    found = vmap(output)(parameters, buffers)
    assert_close_to_twin({"output": found}, {"output": torch.stack([module(sequence)[0] for module in modules])})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_mode_derivative_equals_finite_differences(case: Case | CellCase) -> None:
    module, data = case.build(fused_rnn).requires_grad_(False), case.data()

    def output(sequence: Tensor) -> Tensor:
        return next(iter(case.outputs(module(sequence)).values()))

    at = data.sequence.detach()
    along = torch.randn_like(at)
    value, tangent = jvp(output, (at,), (along,))
    assert_close_to_twin({"output": value}, {"output": output(at)})
    step = 1e-6
    expected = (output(at + step * along) - output(at - step * along)) / (2 * step)
    # the truncation error of central differences is step^2, their rounding error epsilon / step: 2e-10
    torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-8)


# ---- the older vmap, of torch.autograd ----------------------------------------------------------------------------

BATCHED_CASES = [
    *CASES,
    Case(num_layers=2, bidirectional=True, packing="unsorted", hx=True, dtype=torch.float64),
    Case(cell="GRU", num_layers=2, dropout=0.4, bias=False, dtype=torch.float64),
    CellCase(cell="GRU", bias=False, dtype=torch.float64),
]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("case", BATCHED_CASES, ids=str)
def test_a_batch_of_gradients_at_once_equals_one_after_the_other(case: Case | CellCase, create_graph: bool) -> None:
    module, data = case.build(fused_rnn), case.data()
    outputs = list(case.outputs(module(data.input, data.hx)).values())
    leaves = [*data.leaves.values(), *module.parameters()]
    seeds = [torch.randn(3, *output.shape, dtype=output.dtype) for output in outputs]
    expected = [torch.autograd.grad(outputs, leaves, seed, retain_graph=True) for seed in zip(*seeds, strict=True)]
    found = torch.autograd.grad(
        outputs, leaves, seeds, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    for gradient, rows in zip(found, zip(*expected, strict=True), strict=True):
        assert torch.equal(gradient, torch.stack(rows))
    # of the first output alone: the others' gradients are missing, not batched
    alone = torch.autograd.grad(outputs[0], leaves, seeds[0], is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(outputs[0], leaves, seed, retain_graph=True) for seed in seeds[0]]
    for gradient, one in zip(alone, zip(*rows, strict=True), strict=True):
        assert torch.equal(gradient, torch.stack(one))


@pytest.mark.parametrize(
    "case",
    [
        # Small, for there is a call for each element of the result; no two of the batches are of one size.
        Case(input_size=2, hidden_size=3, steps=2, batch=2, dtype=torch.float64),
        CellCase("GRU", input_size=2, hidden_size=3, batch=2, dtype=torch.float64),
    ],
    ids=str,
)
def test_vectorized_jacobian_of_a_vectorized_jacobian(case: Case | CellCase) -> None:
    """What the inner one records must not be mixed up with the outer one's batch."""
    module = case.build(fused_rnn).requires_grad_(False)
    jacobian = torch.autograd.functional.jacobian

    def second(vectorize: bool) -> Tensor:
        def first(x: Tensor) -> Tensor:
            return jacobian(lambda x: case.outputs(module(x)).popitem()[1], x, create_graph=True, vectorize=vectorize)

        return jacobian(first, case.data().sequence.detach(), vectorize=vectorize)

    assert_close_to_twin({"second": second(True)}, {"second": second(False)})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_without_a_graph_break_gives_the_same(case: Case | CellCase) -> None:
    module, data = case.build(fused_rnn), case.data()

    def loss(sequence: Tensor) -> Tensor:
        return sum(output.square().sum() for output in case.outputs(module(sequence)).values())

    leaves = [data.sequence, *module.parameters()]
    expected = torch.autograd.grad(loss(data.sequence), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(data.sequence), leaves)
    names = ["input", *dict(module.named_parameters())]
    assert_close_to_twin(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))
