"""`functional` and `reference` have one signature and give the layers' numbers, for parameters that live anywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_close_to_twin, assert_same
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import functional, reference

NAMESPACES = [functional, reference]
NAMES = ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")


def call_layer(
    namespace: ModuleType, case: Case, sequence: Tensor | PackedSequence, hx: Any, params: list[Tensor]
) -> Any:
    """The function that computes `case`, on parameters of a layer."""
    name, _, nonlinearity = case.cell.lower().partition("_")
    options: dict[str, Any] = {"nonlinearity": nonlinearity} if nonlinearity else {}
    if case.proj:
        options["proj_size"] = case.proj_size
    if isinstance(sequence, PackedSequence):
        sequence, options["batch_sizes"] = sequence.data, sequence.batch_sizes
    return getattr(namespace, name)(
        sequence,
        hx,
        params,
        bias=case.bias,
        num_layers=case.num_layers,
        bidirectional=case.bidirectional,
        batch_first=case.batch_first,
        **options,
    )


def call_cell(namespace: ModuleType, cell: str, *args: Any) -> Any:
    name, _, nonlinearity = cell.lower().partition("_")
    keywords = {"nonlinearity": nonlinearity} if nonlinearity else {}
    return getattr(namespace, f"{name}_cell")(*args, **keywords)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    "case",
    [
        *(Case(cell=cell, num_layers=2, bidirectional=True, hx=True) for cell in CELLS),
        *(Case(cell=cell, batch_first=True, bias=False) for cell in CELLS),
        *(Case(cell=cell, packing="sorted", dtype=torch.float64) for cell in CELLS),
        Case(proj=True, num_layers=2, hx=True, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_function_gives_the_numbers_of_the_layer(namespace: ModuleType, case: Case) -> None:
    module, data = case.build(fused_rnn), case.data()
    params = list(module.parameters())
    found = case.outputs(call_layer(namespace, case, data.input, data.hx, params))
    assert_close_to_twin(found, run(module, data, gradients=False))
    gradients = torch.autograd.grad(sum(output.sum() for output in found.values()), [data.sequence, *params])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("case", [CellCase(cell=cell, batch=batch) for cell in CELLS for batch in (3, None)], ids=str)
def test_function_gives_the_numbers_of_the_cell(namespace: ModuleType, case: CellCase) -> None:
    module, data = case.build(fused_rnn), case.data()
    found = case.outputs(call_cell(namespace, case.cell, data.input, data.hx, *module.parameters()))
    assert_close_to_twin(found, run(module, data, gradients=False))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    ("cell", "torch_function", "gates"),
    [
        ("LSTM", torch.lstm_cell, 4),
        ("GRU", torch.gru_cell, 3),
        ("RNN_TANH", torch.rnn_tanh_cell, 1),
    ],
)
def test_cell_takes_the_first_bias_alone_as_torch_does(
    namespace: ModuleType, cell: str, torch_function: Callable[..., Any], gates: int
) -> None:
    torch.manual_seed(0)
    args = [torch.randn(2, 3), torch.randn(2, 4), *(torch.randn(gates * 4, n) for n in (3, 4)), torch.randn(gates * 4)]
    if cell == "LSTM":
        args[1] = (args[1], torch.randn(2, 4))
    case = CellCase(cell=cell)
    assert_close_to_twin(case.outputs(call_cell(namespace, cell, *args)), case.outputs(torch_function(*args)))


@pytest.mark.parametrize("name", NAMES)
def test_reference_takes_what_functional_takes(name: str) -> None:
    ours = list(inspect.signature(getattr(functional, name)).parameters.values())
    theirs = inspect.signature(getattr(reference, name)).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in theirs):
        # passed on by name: shown by the calls of the other tests
        named = [parameter.name for parameter in theirs if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        assert named in (["args"], [parameter.name for parameter in ours][: len(named)])
    else:
        assert [(p.name, p.kind, p.default) for p in theirs] == [(p.name, p.kind, p.default) for p in ours]


@pytest.mark.parametrize("name", NAMES[:3])
def test_options_of_functional_are_keyword_only(name: str) -> None:
    parameters = list(inspect.signature(getattr(functional, name)).parameters.values())
    assert [parameter.name for parameter in parameters[:3]] == ["input", "hx", "params"]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters[3:])


@pytest.mark.parametrize("training", [False, True])
def test_dropout_acts_in_training_only(training: bool) -> None:
    case = Case(num_layers=2)
    params, sequence = list(case.build(fused_rnn).parameters()), case.data().sequence

    def output(dropout: float) -> Tensor:
        torch.manual_seed(0)
        return functional.lstm(sequence, None, params, num_layers=2, dropout=dropout, training=training)[0]

    assert torch.equal(output(0.5), output(0.0)) != training


@pytest.mark.parametrize("cell", CELLS)
def test_reference_runs_in_place_of_kernels_on_the_meta_device(cell: str) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True, hx=True)
    module, data = case.build(fused_rnn).to("meta"), case.data()
    with fused_rnn.use_backend("reference"):
        hx = tuple(state.to("meta") for state in data.states)
        result = module(data.sequence.to("meta"), hx if case.has_cell_state else hx[0])
    expected = case.outputs(case.build(fused_rnn)(data.input, data.hx))
    assert {k: v.shape for k, v in case.outputs(result).items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("cell", CELLS)
def test_reference_is_differentiable_three_times(cell: str) -> None:
    case = Case(cell=cell, steps=2, dtype=torch.float64)
    data = case.data()
    params = [parameter.detach().requires_grad_() for parameter in case.build(fused_rnn).parameters()]
    value = call_layer(reference, case, data.input, None, params)[0].square().sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, data.sequence, create_graph=True)
        value = gradient.square().sum()
    assert value.isfinite()
    assert value > 0


def test_function_leaves_its_arguments_alone() -> None:
    case = Case(num_layers=2, hx=True, dropout=0.3)
    module, data = case.build(fused_rnn), case.data()
    arguments = {**data.leaves, **dict(module.named_parameters())}
    before = {name: tensor.detach().clone() for name, tensor in arguments.items()}
    run(module, data)
    assert_same({name: tensor.detach() for name, tensor in arguments.items()}, before)
    assert all(tensor._version == 0 for tensor in data.leaves.values())
