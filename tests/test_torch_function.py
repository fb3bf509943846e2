"""Whatever has `__torch_function__` sees a call of a layer, a cell or a function as one call of a public function."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase
from support.compare import assert_same
from test_masks import random_mask
from torch import Tensor, fx, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode

import fused_rnn
from fused_rnn import functional

CASES: list[Any] = [
    *(Case(cell=cell, num_layers=2, bidirectional=True, hx=True) for cell in CELLS),
    Case(proj=True, batch_first=True, bias=False),
    Case(cell="GRU", num_layers=2, dropout=0.4),
    *(CellCase(cell=cell) for cell in CELLS),
    CellCase(cell="LSTM", bias=False, hx=False),
]


def function_of(case: Case | CellCase) -> Any:
    name = case.cell.partition("_")[0].lower()
    return getattr(functional, name + "_cell" if isinstance(case, CellCase) else name)


class _Model(nn.Module):
    """A layer between other operations; `options` are tensors that the call gets by keyword."""

    def __init__(self, case: Any, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.case, self.names = case, names
        self.layer = case.build(fused_rnn)

    def forward(self, x: Tensor, h: Any = None, c: Any = None, option: Any = None) -> Any:
        if self.case.hx:
            hx = (h, c) if self.case.has_cell_state else h
        else:
            hx = None
        options = dict.fromkeys(self.names, option)
        result = self.layer(self.case.argument(2 * x), hx, **options)
        if isinstance(self.case, CellCase):
            return result[0] - 1 if self.case.has_cell_state else result - 1
        output, states = result
        return output - 1, states


def tensors_in(result: Any) -> dict[str, Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return {str(i): leaf.detach() for i, leaf in enumerate(leaves)}


def our_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target.__module__.startswith("fused_rnn")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_symbolic_trace_records_one_node_that_runs_to_the_same_numbers(case: Any) -> None:
    model, data = _Model(case), case.data()
    traced = fx.symbolic_trace(model)
    (node,) = our_nodes(traced.graph)
    assert node.target is function_of(case)
    assert f" = fused_rnn_functional_{function_of(case).__name__}(" in traced.code
    torch.manual_seed(3)
    expected = model(data.sequence, *data.states)
    torch.manual_seed(3)
    found = traced(data.sequence, *data.states)
    assert_same(tensors_in(found), tensors_in(expected))
    # a graph that was traced can be traced again, and written down and read
    again = fx.symbolic_trace(traced)
    torch.manual_seed(3)
    assert_same(tensors_in(again(data.sequence, *data.states)), tensors_in(expected))


@pytest.mark.parametrize("option", ["mask", "lengths"])
@pytest.mark.parametrize("cell", CELLS)
def test_symbolic_trace_records_what_counts_as_an_argument(cell: str, option: str) -> None:
    case = Case(cell=cell, num_layers=2)
    model, data, mask = _Model(case, (option,)), case.data(), random_mask(case)
    traced = fx.symbolic_trace(model, concrete_args={"h": None, "c": None})
    (node,) = our_nodes(traced.graph)
    assert isinstance(node.kwargs[option], fx.Node)
    value = mask if option == "mask" else mask.sum(0)
    assert_same(tensors_in(traced(data.sequence, None, None, value)), tensors_in(model(data.sequence, option=value)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_of_a_traced_layer_are_its_own_and_train(case: Any) -> None:
    model, data = _Model(case), case.data()
    traced = fx.symbolic_trace(model)
    assert {id(p) for p in traced.parameters()} == {id(p) for p in model.parameters()}
    sum(t.sum() for t in torch.utils._pytree.tree_leaves(traced(data.sequence, *data.states))).backward()
    assert all(p.grad is not None for p in model.parameters())


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Logged(Tensor):
    seen: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mode_sees_one_call_with_arguments_of_that_functions_signature(case: Any, backend: str) -> None:
    module, data = case.build(fused_rnn), case.data()
    arguments = data.input, data.hx
    with fused_rnn.use_backend(backend):
        torch.manual_seed(3)
        expected = module(*arguments)
        torch.manual_seed(3)
        with _Watch() as mode:
            found = module(*arguments)
    ((function, args, kwargs),) = mode.calls
    assert function is function_of(case)
    inspect.signature(function).bind(*args, **kwargs)
    assert_same(tensors_in(found), tensors_in(expected))


@pytest.mark.parametrize("which", ["input", "hx", "parameter", "mask"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_subclass_as_any_argument_sees_one_call(case: Any, which: str) -> None:
    module, data = case.build(fused_rnn).requires_grad_(False), case.data()
    sequence, states, options = data.sequence.detach(), [s.detach() for s in data.states], {}
    if which == "input":
        sequence = sequence.as_subclass(_Logged)
    elif which == "hx":
        if not states:
            pytest.skip("a call without a state")
        states[-1] = states[-1].as_subclass(_Logged)
    elif which == "parameter":
        name, parameter = list(module.named_parameters())[-1]
        delattr(module, name)
        setattr(module, name, parameter.detach().as_subclass(_Logged))
    elif isinstance(case, CellCase):
        pytest.skip("a cell has no mask")
    else:
        mask = random_mask(case)
        options["mask"] = (mask.T if case.batch_first else mask).as_subclass(_Logged)
    data = type(data)(case, sequence, tuple(states))
    argument = data.input
    _Logged.seen.clear()
    result = module(argument, data.hx, **options)
    # what is not the functions' own, as a property of a tensor, is no call of one
    assert _Logged.seen == [function_of(case)]
    assert all(isinstance(t, _Logged) for t in torch.utils._pytree.tree_leaves(result))


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_functions_called_by_themselves_are_seen_too(name: str) -> None:
    layer = getattr(fused_rnn, name.upper())(3, 4)
    x = torch.zeros(5, 2, 3).as_subclass(_Logged)
    _Logged.seen.clear()
    getattr(functional, name)(x, None, list(layer.parameters()))
    assert _Logged.seen == [getattr(functional, name)]


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_a_function_of_its_parameters_is_traced_as_one_node(name: str) -> None:
    function, layer = getattr(functional, name), getattr(fused_rnn, name.upper())(3, 4, 2, bidirectional=True)
    params, x, lengths = list(layer.parameters()), torch.randn(5, 2, 3), torch.tensor([5, 3])

    def of_a_list(x: Tensor, params: Any, lengths: Tensor) -> Any:
        return function(x, None, params, num_layers=2, bidirectional=True, lengths=lengths)[0] + 1

    def of_each(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Any:
        return function(x, None, [w_ih, w_hh, b_ih, b_hh])[0] + 1

    for traced_function, arguments in ((of_a_list, (x, params, lengths)), (of_each, (x, *params[:4]))):
        traced = fx.symbolic_trace(traced_function)
        (node,) = our_nodes(traced.graph)
        assert node.target is function
        inspect.signature(function).bind(*node.args, **node.kwargs)
        assert_same({"output": traced(*arguments).detach()}, {"output": traced_function(*arguments).detach()})


@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell", "rnn_cell"])
def test_a_cell_of_its_parameters_is_traced_as_one_node(name: str) -> None:
    function = getattr(functional, name)
    cell = getattr(fused_rnn, name.partition("_")[0].upper() + "Cell")(3, 4)
    more = {"nonlinearity": "relu"} if name == "rnn_cell" else {}

    def step(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Any:
        return function(x, None, w_ih, w_hh, b_ih, b_hh, **more)

    traced, arguments = fx.symbolic_trace(step), (torch.randn(2, 3), *cell.parameters())
    (node,) = our_nodes(traced.graph)
    assert node.target is function
    assert_same(tensors_in(traced(*arguments)), tensors_in(step(*arguments)))


class _Answer:
    """No tensor at all, but it answers for one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, types, kwargs or {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_object_that_answers_for_a_tensor_is_asked(case: Any) -> None:
    module, data = case.build(fused_rnn), case.data()
    function, types, _ = module(_Answer(), data.hx)
    assert function is function_of(case) and _Answer in types


# ---- per-sample gradients of the older way --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [Case(batch_first=True), Case("GRU", batch_first=True), CellCase("GRU", hx=False)], ids=str
)
def test_call_for_per_sample_grads_says_which_function_it_cannot_handle(case: Any) -> None:
    """Its rules are a closed list of PyTorch's own functions. What a reader is told there, and what works."""
    module, data = case.build(fused_rnn), case.data()
    batched = data.sequence.detach()
    batched = batched.transpose(0, 1) if isinstance(case, Case) else batched
    with pytest.raises(RuntimeError, match=f"cannot handle function {function_of(case).__name__}"):
        call_for_per_sample_grads(module, batch_size=case.batch)(batched)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        result = torch.func.functional_call(module, parameters, (row.unsqueeze(0),))
        return next(iter(case.outputs(result).values())).square().sum()

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, batched)
    assert {name: g.shape for name, g in found.items()} == {n: (case.batch, *p.shape) for n, p in parameters.items()}
    for name, parameter in module.named_parameters():
        whole = torch.autograd.grad(loss(dict(module.named_parameters()), batched[0]), parameter)[0]
        torch.testing.assert_close(found[name][0], whole)
