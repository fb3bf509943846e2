"""Forward mode, derivatives of the backward pass and gradients per example in the kernels: those of the formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, Data, incoming_gradients
from support.compare import assert_same, assert_within
from support.mutations import OF_DERIVATIVES, Recorder, recorded
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_leaves

import fused_rnn
from fused_rnn import ops

pytestmark = pytest.mark.kernels
F64 = torch.float64

CASES: list[Any] = [
    *(Case(cell, num_layers=2, bidirectional=True, hx=True, steps=4, dtype=F64) for cell in CELLS),
    *(Case(cell, hidden_size=37, steps=1, batch=1, dtype=F64) for cell in CELLS),
    Case("LSTM", batch_first=True, hx=True, bias=False, steps=6, dtype=F64),
    Case("GRU", num_layers=3, bias=False, dropout=0.4, batch_first=True, dtype=F64),
    Case("RNN_TANH", num_layers=2, bidirectional=True, batch=9, dtype=F64),
    *(CellCase(cell, dtype=F64) for cell in CELLS),
]
# Of the leaves of a call, those that change: all, or the first, the last, every second.
CHANGES: dict[str, Callable[[int, int], bool]] = {
    "all": lambda i, count: True,
    "input": lambda i, count: i == 0,
    "last": lambda i, count: i == count - 1,
    "every-second": lambda i, count: i % 2 == 1,
}


@pytest.fixture
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Formulas are an error."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("a derivative went through the formulas")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "forward_by_formulas", refuse)
        patch.setattr(ops, "second_derivative", refuse)
        yield


class Call:
    """A call with its leaves, and what depends on them."""

    def __init__(self, case: Any) -> None:
        self.case, self.module, data = case, case.build(fused_rnn), case.data()
        self.names = [name for name, _ in self.module.named_parameters()]
        self.states = len(data.leaves) - 1
        self.leaves = [t.detach() for t in (*data.leaves.values(), *self.module.parameters())]

    def __call__(self, *leaves: Tensor) -> list[Tensor]:
        torch.manual_seed(5)
        parameters = dict(zip(self.names, leaves[1 + self.states :], strict=True))
        given = Data(self.case, leaves[0], tuple(leaves[1 : 1 + self.states]))
        return list(self.case.outputs(functional_call(self.module, parameters, (given.input, given.hx))).values())

    def directions(self, which: str) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(3)
        count = len(self.leaves)
        drawn = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in self.leaves]
        return [t if CHANGES[which](i, count) else None for i, t in enumerate(drawn)]

    def tangents(self, along: list[Tensor | None], of: Callable[..., Any] | None = None) -> list[Tensor]:
        """Of the outputs, or of what ``of`` makes of the leaves."""
        with torch.no_grad(), forward_ad.dual_level():
            pairs = zip(self.leaves, along, strict=True)
            results = (of or self)(*(t if v is None else forward_ad.make_dual(t, v) for t, v in pairs))
            found = [forward_ad.unpack_dual(t) for t in results]
            return [torch.zeros_like(f.primal) if f.tangent is None else f.tangent.clone() for f in found]

    def second(self, which: str) -> list[Tensor]:
        """Gradients, of leaves and of seeds, of a sum over those gradients of the leaves that change."""
        leaves = [t.clone().requires_grad_() for t in self.leaves]
        outputs = self(*leaves)
        seeds = [seed.requires_grad_() for seed in incoming_gradients(outputs)]
        gradients = torch.autograd.grad(outputs, leaves, seeds, create_graph=True)
        loss = sum((g * v).sum() for g, v in zip(gradients, self.directions(which), strict=True) if v is not None)
        return list(torch.autograd.grad(loss, [*leaves, *seeds], materialize_grads=True))


def named(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): t for i, t in enumerate(tensors)}


@pytest.mark.parametrize("which", CHANGES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangents_are_those_of_the_formulas(case: Any, which: str, isa: str, kernels_alone: None) -> None:
    call = Call(case)
    found = call.tangents(call.directions(which))
    with fused_rnn.use_backend("reference"):
        assert_within(named(found), named(call.tangents(call.directions(which))))


@pytest.mark.parametrize("which", CHANGES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivatives_are_those_of_the_formulas(case: Any, which: str, isa: str, kernels_alone: None) -> None:
    call = Call(case)
    found = call.second(which)
    with fused_rnn.use_backend("reference"):
        assert_within(named(found), named(call.second(which)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangents_of_gradients_are_those_of_the_formulas(case: Any, isa: str, kernels_alone: None) -> None:
    """Forward over reverse, with seeds that change, too."""
    call = Call(case)

    def gradients(*leaves: Tensor) -> list[Tensor]:
        loss = lambda *values: sum(t.exp().sum() for t in call(*values))  # noqa: E731
        return list(grad(loss, argnums=tuple(range(len(leaves))))(*leaves))

    along = tuple(v for v in call.directions("all") if v is not None)
    found = jvp(gradients, tuple(call.leaves), along)[1]
    with fused_rnn.use_backend("reference"):
        assert_within(named(found), named(jvp(gradients, tuple(call.leaves), along)[1]))


@pytest.mark.parametrize("cell", CELLS)
def test_accuracy_in_float32(cell: str, kernels_alone: None) -> None:
    """As far from float64 as the gradients of a layer may be."""
    single, double = (Call(Case(cell, num_layers=2, hx=True, steps=9, dtype=dtype)) for dtype in (torch.float32, F64))
    double.leaves = [t.double() for t in single.leaves]
    along = single.directions("all")
    exact = double.tangents([None if v is None else v.double() for v in along])
    assert_within(named(single.tangents(along)), named(exact))
    double.directions = lambda which: [v.double() for v in along]  # type: ignore[union-attr, method-assign]
    assert_within(named(single.second("all")), named(double.second("all")))


@pytest.mark.alone
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_on_any_number_of_threads(cell: str, threads: int, kernels_alone: None) -> None:
    def found(count: int) -> list[Tensor]:
        before, processors = torch.get_num_threads(), fused_rnn._C.set_processors(4)
        torch.set_num_threads(count)
        try:
            call = Call(Case(cell, batch=5, hidden_size=40, steps=6, hx=True))
            return call.tangents(call.directions("input"))
        finally:
            torch.set_num_threads(before)
            fused_rnn._C.set_processors(processors)

    assert_same(found(threads), found(4))


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CellCase("GRU", dtype=F64)], ids=str)
def test_gradients_of_what_torch_func_gives(case: Any) -> None:
    """Where parameters of plain autograd are in what forward mode, or vmap of gradients, goes through."""
    call = Call(case)
    along = call.directions("all")[0]
    count = 1 + call.states

    def found() -> list[Tensor]:
        params = [t.clone().requires_grad_() for t in call.leaves[count:]]

        def loss(x: Tensor) -> Tensor:
            return sum(t.square().sum() for t in call(x, *call.leaves[1:count], *params))

        first = jvp(loss, (call.leaves[0],), (along,))[1]
        second = jvp(grad(loss), (call.leaves[0],), (along,))[1]
        return list(torch.autograd.grad(first + second.square().sum(), params))

    own = found()
    with fused_rnn.use_backend("reference"):
        assert_within(named(own), named(found()))


# ---- vmap -----------------------------------------------------------------------------------------------------------

BATCHED: list[Any] = [
    Case("LSTM", num_layers=2, bidirectional=True, hx=True, dtype=F64),
    Case("GRU", batch_first=True, hx=True, bias=False, dtype=F64),
    Case("RNN_TANH", num_layers=2, steps=1, dtype=F64),
    *(CellCase(cell, dtype=F64) for cell in ("LSTM", "GRU", "RNN_RELU")),
]


def of_examples(call: Call, count: int) -> list[Tensor]:
    """Input and states of some examples."""
    generator = torch.Generator().manual_seed(7)
    shapes = [t.shape for t in call.leaves[: 1 + call.states]]
    return [torch.randn((count, *shape), generator=generator, dtype=F64) for shape in shapes]


@pytest.mark.parametrize("case", BATCHED, ids=str)
def test_examples_are_one_call(case: Any, kernels_alone: None) -> None:
    call = Call(case)
    given, params = of_examples(call, 4), call.leaves[1 + call.states :]
    with torch.no_grad(), Recorder() as recorder:
        found = vmap(lambda *x: tuple(call(*x, *params)))(*given)
    assert len(recorder.calls) == 1
    expected = [call(*x, *params) for x in zip(*given, strict=True)]
    stacked = [torch.stack(all_of) for all_of in zip(*expected, strict=True)]
    assert_within(named(list(found)), named(stacked))


@pytest.mark.parametrize("inputs_too", [False, True])
@pytest.mark.parametrize("case", BATCHED, ids=str)
def test_gradients_of_examples_are_two_calls(case: Any, inputs_too: bool, kernels_alone: None) -> None:
    call = Call(case)
    given, params = of_examples(call, 4), call.leaves[1 + call.states :]
    wanted = tuple(range(0 if inputs_too else len(given), len(call.leaves)))

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = grad(lambda *values: sum(t.square().sum() for t in call(*values)), argnums=wanted)(
            *leaves
        )
        return result

    dims = (*([0] * len(given)), *([None] * len(params)))
    with Recorder() as recorder:
        found = vmap(gradients, in_dims=dims)(*given, *params)
    names = [operator.overloadpacket.__name__.rpartition("_")[2] for operator, _ in recorder.calls]
    assert names == ["forward", "each"]
    expected = [gradients(*x, *params) for x in zip(*given, strict=True)]
    stacked = [torch.stack(all_of) for all_of in zip(*expected, strict=True)]
    assert_within(named(list(found)), named(stacked))


@pytest.mark.parametrize(
    "case",
    [
        Case("LSTM", num_layers=2, proj=True, hx=True, dtype=F64),
        Case("GRU", num_layers=2, bidirectional=True, dtype=torch.bfloat16),
        CellCase("LSTM", dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_gradients_of_examples_that_no_kernel_gives_at_once(case: Any) -> None:
    """A forward pass of all examples, then a backward pass for each."""
    call = Call(case)
    given = [t.to(case.dtype) for t in of_examples(call, 3)]
    params = call.leaves[1 + call.states :]
    wanted = tuple(range(len(call.leaves)))

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        loss = lambda *values: sum(t.square().sum() for t in call(*values))  # noqa: E731
        result: tuple[Tensor, ...] = grad(loss, argnums=wanted)(*leaves)
        return result

    found = vmap(gradients, in_dims=(*([0] * len(given)), *([None] * len(params))))(*given, *params)
    expected = [gradients(*x, *params) for x in zip(*given, strict=True)]
    stacked = [torch.stack(all_of).double() for all_of in zip(*expected, strict=True)]
    assert_within(named(list(found)), named(stacked))


@pytest.mark.parametrize("option", ["return_states", "layer_norm", "num_heads", "recompute"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_examples_and_models_of_layers_with_options(cell: str, option: str) -> None:
    built: dict[str, Any] = {"return_states": {}, "num_heads": {"num_heads": 2}}.get(option, {option: True})
    layer = getattr(fused_rnn, cell)(3, 4, 2, bidirectional=True, batch_first=True, **built).double()
    called = {"return_states": True} if option == "return_states" else {}
    # With gains of 1 a normalised recurrence is very sensitive to rounding.
    parameters = {name: p.detach() * (0.2 if "norm" in name else 1) for name, p in layer.named_parameters()}
    x = torch.randn(3, 2, 5, 3, dtype=F64)

    def gradients(parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return sum(t.square().sum() for t in tree_leaves(functional_call(layer, parameters, (x,), called)))

        return tree_leaves(grad(loss, argnums=(0, 1))(parameters, x))

    def stacked(results: list[list[Tensor]]) -> dict[str, Tensor]:
        return named([torch.stack(all_of) for all_of in zip(*results, strict=True)])

    found = vmap(gradients, in_dims=(None, 0))(parameters, x)
    assert_within(named(found), stacked([gradients(parameters, one) for one in x]))
    models = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    found = vmap(gradients, in_dims=(0, None))(models, x[0])
    assert_within(named(found), stacked([gradients({n: p[i] for n, p in models.items()}, x[0]) for i in range(2)]))


@pytest.mark.parametrize(("of_x", "of_h"), [(1, None), (None, 2), (2, 1), (-1, -1)])
def test_examples_in_any_dimension(of_x: int | None, of_h: int | None, kernels_alone: None) -> None:
    layer = fused_rnn.GRU(3, 4).double()
    generator = torch.Generator().manual_seed(0)

    def some(shape: tuple[int, ...], dim: int | None) -> Tensor:
        drawn = torch.randn((6, *shape), generator=generator, dtype=F64)
        return drawn[0] if dim is None else drawn.movedim(0, dim)

    x, h = some((5, 2, 3), of_x), some((1, 2, 4), of_h)
    found = vmap(layer, in_dims=(of_x, of_h))(x, h)
    for i in range(6):
        one = [t if dim is None else t.select(dim, i) for t, dim in ((x, of_x), (h, of_h))]
        assert_within(named([t[i].detach() for t in found]), named([t.detach() for t in layer(*one)]))


ENSEMBLES = [
    Case("LSTM", num_layers=2, bidirectional=True, batch_first=True, hx=True, dtype=F64),
    Case("GRU", steps=1, bias=False, dtype=F64),
    Case("RNN_RELU", num_layers=2, dtype=F64),
]


@pytest.mark.parametrize("threads_of_machine", [1, 4])
@pytest.mark.parametrize("case", ENSEMBLES, ids=str)
def test_an_ensemble_is_a_call_for_each_pass(case: Any, threads_of_machine: int, kernels_alone: None) -> None:
    """Outputs and gradients of models with their own parameters, by plain autograd through vmap and by vmap(grad)."""
    call = Call(case)
    models = [case.build(fused_rnn, seed=seed) for seed in range(3)]
    own = [torch.stack(of).detach().requires_grad_() for of in zip(*(m.parameters() for m in models), strict=True)]
    inputs = call.leaves[: 1 + call.states]
    processors = fused_rnn._C.set_processors(threads_of_machine)
    try:
        with Recorder() as recorder:
            outputs = vmap(lambda *params: tuple(call(*inputs, *params)))(*own)
            gradients = torch.autograd.grad([t.sin().sum() for t in outputs], own)
            loss = lambda *params: sum(t.sin().sum() for t in call(*inputs, *params))  # noqa: E731
            by_func = vmap(grad(loss, tuple(range(len(own)))))
            assert_same(list(by_func(*(t.detach() for t in own))), list(gradients))
    finally:
        fused_rnn._C.set_processors(processors)
    names = [operator.overloadpacket.__name__ for operator, _ in recorder.calls]
    assert names == ["rnn_forward_stacked", "rnn_backward_stacked"] * 2
    for i in range(3):
        parameters = [t[i].detach().requires_grad_() for t in own]
        right = call(*inputs, *parameters)
        assert_same([t[i].detach() for t in outputs], [t.detach() for t in right])
        expected = torch.autograd.grad([t.sin().sum() for t in right], parameters)
        assert_within(named([g[i] for g in gradients]), named(list(expected)))


@pytest.mark.parametrize("case", ENSEMBLES, ids=str)
def test_second_derivatives_of_an_ensemble(case: Any) -> None:
    call = Call(case)
    inputs, one = call.leaves[: 1 + call.states], call.leaves[1 + call.states :]

    def second(of: Callable[..., Any], parameters: list[Tensor]) -> list[Tensor]:
        loss = sum(t.sin().sum() for t in of(*parameters))
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))

    own = [torch.stack([t, 2 * t]).requires_grad_() for t in one]
    found = second(vmap(lambda *params: tuple(call(*inputs, *params))), own)
    for i in range(2):
        expected = second(lambda *params: call(*inputs, *params), [t[i].detach().requires_grad_() for t in own])
        assert_within(named([g[i] for g in found]), named(expected))


@pytest.mark.parametrize("shared", [True, False])
def test_tangents_of_plain_forward_mode_go_through_vmap(shared: bool) -> None:
    """They are no transform of torch.func: operators without tangents of their own must not be reached."""
    layer = fused_rnn.LSTM(3, 4).double()
    x, along = torch.randn(2, 5, 6, 2, 3, dtype=F64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = functional_call(layer, parameters, (x,))[0].exp().sum()
        return result

    given = parameters if shared else {name: torch.stack([p] * 6) for name, p in parameters.items()}

    def found() -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, along)
            each = vmap(grad(loss), in_dims=(None if shared else 0, 1))(given, dual)
            return torch.cat([forward_ad.unpack_dual(g).tangent.flatten() for g in each.values()])

    own = found()
    with fused_rnn.use_backend("reference"):
        assert_within({"tangents": own}, {"tangents": found()})


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("case", [Case("GRU", num_layers=2, hx=True), Case(batch_first=True, dtype=F64)], ids=str)
def test_operators_of_derivatives_pass_opcheck(case: Any, mask: bool) -> None:
    calls = recorded(case, {"derivatives": True, "mask": mask})
    assert {operator.overloadpacket.__name__ for operator, _ in calls} >= {*OF_DERIVATIVES[: 3 if mask else None]}
    for operator, args in calls:
        torch.library.opcheck(operator, args)
