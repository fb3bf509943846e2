"""Derivatives of derivatives in every order of forward and reverse mode: those of torch.nn, or an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.cases import CELLS, Case, CellCase, Data
from support.compare import assert_within
from test_masks import random_mask, step_by_step
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn.utils.rnn import PackedSequence

import fused_rnn

F64 = torch.float64
SMALL: dict[str, Any] = {"input_size": 2, "hidden_size": 3, "batch": 2, "dtype": F64}
Scalar = Callable[[Tensor], Tensor]


class Function(NamedTuple):
    """A sum over the outputs of a call, of all that the call is given: input, states and parameters in one vector."""

    case: Case | CellCase
    masked: bool = False

    def __str__(self) -> str:
        return f"{self.case}{'-mask' if self.masked else ''}"

    def at(self) -> Tensor:
        module, data = self.case.build(fused_rnn), self.case.data()
        return torch.cat([t.detach().flatten() for t in (*data.leaves.values(), *module.parameters())])

    def of(self, library: Any) -> Scalar:
        """With the module of torch.nn or fused_rnn."""
        case, data = self.case, self.case.data()
        module = case.build(library)
        like = [*data.leaves.values(), *module.parameters()]
        count = len(data.leaves)
        options: dict[str, Tensor] = {}
        if self.masked:
            assert isinstance(case, Case)
            mask = random_mask(case)
            options["mask"] = mask.T if case.batch_first else mask
            module = _StepByStep(module, mask) if library is nn else module
        names = [name for name, _ in module.named_parameters()]
        argument = _packing(case) if getattr(case, "packing", "padded") != "padded" else case.argument

        def function(vector: Tensor) -> Tensor:
            parts = vector.split([t.numel() for t in like])
            values = [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
            given = Data(case, values[0], tuple(values[1:count]))
            parameters = dict(zip(names, values[count:], strict=True))
            if isinstance(module, _StepByStep):
                outputs = functional_call(module, parameters, (given,))
            else:
                outputs = case.outputs(functional_call(module, parameters, (argument(values[0]), given.hx), options))
            # every output counts, none as the others do, and no derivative of the sum itself vanishes
            return sum((k + 2) * output.exp().sum() for k, output in enumerate(outputs.values()))

        return function


def _packing(case: Case) -> Callable[[Tensor], PackedSequence]:
    """`case.argument` by an index: PyTorch's own packing has no forward mode and no batching rule."""
    order = case.argument(torch.arange(case.steps * case.batch).view(case.steps, case.batch, 1))
    assert isinstance(order, PackedSequence)
    return lambda sequence: order._replace(data=sequence.flatten(0, 1)[order.data[:, 0]])


class _StepByStep(nn.Module):
    """torch.nn's layer with a mask: the definition."""

    def __init__(self, twin: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.twin, self.mask = twin, mask

    def forward(self, data: Data) -> dict[str, Tensor]:
        return step_by_step(self.twin, data, self.mask)


def directions(vector: Tensor, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(vector.shape, generator=generator, dtype=vector.dtype) for _ in range(count)]


@functools.cache
def expected(function: Function) -> dict[str, Tensor]:
    """From torch.nn, by reverse mode alone: H u, u H v, and the third derivative along u, v, w."""
    f, vector = function.of(nn), function.at().requires_grad_()
    u, v, w = directions(vector, 3)
    (first,) = torch.autograd.grad(f(vector), vector, create_graph=True)
    (second,) = torch.autograd.grad(first @ u, vector, create_graph=True)
    (third,) = torch.autograd.grad(second @ v, vector)
    return {"first": first.detach(), "Hu": second.detach(), "uHv": (second @ v).detach(), "uvw": third @ w, "uv": third}


@functools.cache
def expected_hessian(function: Function) -> Tensor:
    return torch.autograd.functional.hessian(function.of(nn), function.at())


def along(f: Scalar, direction: Tensor) -> Scalar:
    """The derivative of a function along a direction, by forward mode."""
    return lambda x: jvp(f, (x,), (direction,))[1]


def along_dual(f: Callable[..., Tensor], direction: Tensor) -> Callable[..., Tensor]:
    """As :func:`along`, the way of eager code."""

    def derivative(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent

    return derivative


def recorded_grad(f: Scalar) -> Callable[[Tensor], Tensor]:
    """The gradient by torch.autograd, of a function that may be called in a dual level."""

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(f(x), x, create_graph=True)[0]

    return lambda x: gradient(x if x.requires_grad else x.requires_grad_())


FUNCTIONS = [
    *(Function(Case(cell=cell, num_layers=2, bidirectional=True, hx=True, steps=3, **SMALL)) for cell in CELLS),
    *(Function(Case(cell=cell, hx=True, steps=4, **SMALL), masked=True) for cell in CELLS),
    Function(Case(proj=True, num_layers=2, hx=True, batch_first=True, steps=2, **SMALL)),
    Function(Case(packing="unsorted", bias=False, hx=True, steps=3, **SMALL)),
    Function(Case(cell="GRU", bidirectional=True, num_layers=2, steps=3, **SMALL), masked=True),
    *(Function(CellCase(cell=cell, **SMALL)) for cell in CELLS),
    Function(CellCase(cell="GRU", bias=False, hx=False, **SMALL | {"batch": None})),
]
# One of each kind, for what takes longer.
SMALLEST = [
    *(Function(Case(cell=cell, hx=True, steps=2, **SMALL | {"hidden_size": 2})) for cell in CELLS),
    Function(Case(cell="LSTM", hx=True, steps=3, **SMALL | {"hidden_size": 2}), masked=True),
    *(Function(CellCase(cell=cell, **SMALL | {"hidden_size": 2})) for cell in ("LSTM", "GRU")),
]

# Name, what it must give, how: of the function and three directions.
PRODUCTS: list[tuple[str, str, Callable[..., Any]]] = [
    ("jvp of jvp", "uHv", lambda f, x, u, v, w: along(along(f, u), v)(x)),
    ("jvp of grad", "Hu", lambda f, x, u, v, w: along(grad(f), u)(x)),
    ("grad of jvp", "Hu", lambda f, x, u, v, w: grad(along(f, u))(x)),
    ("vjp of grad", "Hu", lambda f, x, u, v, w: vjp(grad(f), x)[1](u)[0]),
    ("grad of grad", "Hu", lambda f, x, u, v, w: grad(lambda x: grad(f)(x) @ u)(x)),
    ("dual of grad", "Hu", lambda f, x, u, v, w: along_dual(grad(f), u)(x)),
    ("dual of recorded grad", "Hu", lambda f, x, u, v, w: along_dual(recorded_grad(f), u)(x)),
    ("recorded grad of dual", "Hu", lambda f, x, u, v, w: recorded_grad(along_dual(f, u))(x)),
    ("vmap of jvp of grad", "Hu", lambda f, x, u, v, w: vmap(lambda d: along(grad(f), d)(x))(torch.stack([u, v]))[0]),
    ("vmap of grad of jvp", "Hu", lambda f, x, u, v, w: vmap(lambda d: grad(along(f, d))(x))(torch.stack([u, v]))[0]),
    (
        "vmap of jvp of jvp",
        "uHv",
        lambda f, x, u, v, w: vmap(lambda d: along(along(f, d), v)(x))(torch.stack([w, u]))[1],
    ),
    (
        "jvp of vmap of jvp",
        "uHv",
        lambda f, x, u, v, w: along(lambda x: vmap(lambda d: along(f, d)(x))(torch.stack([w, u])), v)(x)[1],
    ),
    (
        "jvp of jvp of vmap",
        "uHv",
        lambda f, x, u, v, w: along(along(lambda x: vmap(f)(torch.stack([x, 2 * x]))[0], u), v)(x),
    ),
    (
        "grad of vmap of jvp",
        "Hu",
        lambda f, x, u, v, w: grad(lambda x: vmap(lambda d: along(f, d)(x))(torch.stack([w, u]))[1])(x),
    ),
    (
        "jvp of grad of vmap",
        "Hu",
        lambda f, x, u, v, w: along(grad(lambda x: vmap(f)(torch.stack([x, 2 * x]))[0]), u)(x),
    ),
    ("hvp", "Hu", lambda f, x, u, v, w: torch.autograd.functional.hvp(f, x, u)[1]),
    ("vhp", "Hu", lambda f, x, u, v, w: torch.autograd.functional.vhp(f, x, u)[1]),
    ("jvp of jvp of jvp", "uvw", lambda f, x, u, v, w: along(along(along(f, u), v), w)(x)),
    ("grad of jvp of jvp", "uv", lambda f, x, u, v, w: grad(along(along(f, u), v))(x)),
    ("jvp of grad of jvp", "uv", lambda f, x, u, v, w: along(grad(along(f, u)), v)(x)),
    ("jvp of jvp of grad", "uv", lambda f, x, u, v, w: along(along(grad(f), u), v)(x)),
    ("jvp of grad of grad", "uv", lambda f, x, u, v, w: along(grad(lambda x: grad(f)(x) @ u), v)(x)),
    ("grad of grad of jvp", "uv", lambda f, x, u, v, w: grad(lambda x: grad(along(f, u))(x) @ v)(x)),
    ("grad of jvp of grad", "uv", lambda f, x, u, v, w: grad(lambda x: along(grad(f), u)(x) @ v)(x)),
    (
        "vmap of jvp of jvp of jvp",
        "uvw",
        lambda f, x, u, v, w: vmap(lambda d: along(along(along(f, u), d), w)(x))(torch.stack([u, v]))[1],
    ),
]


@pytest.mark.parametrize(("how", "what", "compute"), PRODUCTS, ids=[row[0].replace(" ", "-") for row in PRODUCTS])
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_every_nesting_gives_the_derivatives_of_torch_nn(
    function: Function, how: str, what: str, compute: Callable[..., Any]
) -> None:
    f, vector = function.of(fused_rnn), function.at()
    found = compute(f, vector, *directions(vector, 3))
    assert_within({what: found}, {what: expected(function)[what]})


# ---- whole matrices -------------------------------------------------------------------------------------------------

HESSIANS: list[tuple[str, Callable[..., Any]]] = [
    ("jacfwd-jacfwd", lambda f: jacfwd(jacfwd(f))),
    ("jacfwd-jacrev", lambda f: jacfwd(jacrev(f))),
    ("jacrev-jacfwd", lambda f: jacrev(jacfwd(f))),
    ("jacrev-jacrev", lambda f: jacrev(jacrev(f))),
    ("func-hessian", hessian),
    ("jacfwd-grad", lambda f: jacfwd(grad(f))),
    ("linearize-grad", lambda f: lambda x: vmap(linearize(grad(f), x)[1])(torch.eye(len(x), dtype=x.dtype))),
    (
        "autograd-forward-mode",
        lambda f: (
            lambda x: torch.autograd.functional.hessian(f, x, outer_jacobian_strategy="forward-mode", vectorize=True)
        ),
    ),
    ("autograd-vectorized", lambda f: lambda x: torch.autograd.functional.hessian(f, x, vectorize=True)),
]


@pytest.mark.parametrize(("how", "of"), HESSIANS, ids=[row[0] for row in HESSIANS])
@pytest.mark.parametrize("function", SMALLEST, ids=str)
def test_every_hessian_is_that_of_torch_nn(function: Function, how: str, of: Callable[..., Any]) -> None:
    found = of(function.of(fused_rnn))(function.at())
    assert_within({"hessian": found}, {"hessian": expected_hessian(function)})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("function", [SMALLEST[0], SMALLEST[-1]], ids=str)
def test_the_third_derivative_by_forward_mode_alone(function: Function, backend: str) -> None:
    u, v, _ = directions(function.at(), 3)
    with fused_rnn.use_backend(backend):
        found = jacfwd(jacfwd(along(function.of(fused_rnn), u)))(function.at())
    assert_within({"uv": found @ v}, {"uv": expected(function)["uv"]})


# ---- tangents that come in by another way than the arguments --------------------------------------------------------


@pytest.mark.parametrize(
    "case", [*(f.case for f in FUNCTIONS[:4]), *(CellCase(cell=c, **SMALL) for c in CELLS)], ids=str
)
def test_a_dual_gradient_of_an_output_from_outside(case: Any) -> None:
    """The backward pass is linear in it: its tangent is what the tangent gives."""
    module, data = case.build(fused_rnn), case.data()
    leaves = [*data.leaves.values(), *module.parameters()]
    outputs = list(case.outputs(module(data.input, data.hx)).values())
    seeds, tangents = ([torch.randn_like(t) for t in outputs] for _ in range(2))
    right = torch.autograd.grad(outputs, leaves, tangents, retain_graph=True)
    values = torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(seeds, tangents, strict=True)]
        found = [forward_ad.unpack_dual(g) for g in torch.autograd.grad(outputs, leaves, duals, retain_graph=True)]
        # of one output alone, and with a graph
        alone = torch.autograd.grad(outputs[-1], leaves, duals[-1], create_graph=True)
        one = [forward_ad.unpack_dual(g).tangent.detach() for g in alone]
    assert not any(g.primal.requires_grad for g in found)
    names = [str(i) for i in range(len(leaves))]
    assert_within({n: g.tangent for n, g in zip(names, found)}, dict(zip(names, right, strict=True)))
    assert_within({n: g.primal for n, g in zip(names, found)}, dict(zip(names, values, strict=True)))
    right = torch.autograd.grad(outputs[-1], leaves, tangents[-1])
    assert_within(dict(zip(names, one, strict=True)), dict(zip(names, right, strict=True)))


@pytest.mark.parametrize("which", ["input", "state", "parameter"])
@pytest.mark.parametrize(
    "case", [*(f.case for f in FUNCTIONS[:4]), *(CellCase(cell=c, **SMALL) for c in CELLS)], ids=str
)
def test_a_tangent_of_one_argument_alone(case: Any, which: str) -> None:
    """Forward over reverse: the gradients of all, along a direction of one."""

    def product(library: Any, dual: bool) -> dict[str, Tensor]:
        module, data = case.build(library), case.data()
        names = [name for name, _ in module.named_parameters()]
        leaves = data.leaves | dict(module.named_parameters())
        name = {"input": "input", "state": list(data.leaves)[-1], "parameter": names[1]}[which]
        direction = directions(leaves[name].detach(), 1)[0]

        def gradients(values: dict[str, Tensor]) -> dict[str, Tensor]:
            given = Data(case, values["input"], tuple(values[n] for n in data.leaves if n != "input"))
            outputs = case.outputs(functional_call(module, {n: values[n] for n in names}, (given.input, given.hx)))
            loss = sum(output.exp().sum() for output in outputs.values())
            return dict(zip(values, torch.autograd.grad(loss, list(values.values()), create_graph=True), strict=True))

        if dual:
            with forward_ad.dual_level():
                values = leaves | {name: forward_ad.make_dual(leaves[name], direction)}
                return {n: forward_ad.unpack_dual(g).tangent.detach() for n, g in gradients(values).items()}
        first = gradients(leaves)
        # H is symmetric: the product with a direction is the gradient of the derivative along it
        along_it = (first[name] * direction).sum()
        return dict(zip(leaves, torch.autograd.grad(along_it, list(leaves.values())), strict=True))

    assert_within(product(fused_rnn, dual=True), product(nn, dual=False))


@pytest.mark.parametrize("case", [Case("GRU", num_layers=3, dropout=0.4, steps=3, **SMALL)], ids=str)
@pytest.mark.parametrize("how", ["jvp of grad", "grad of jvp", "jvp of jvp", "dual of recorded grad"])
def test_dropout_is_the_same_at_every_level(case: Case, how: str) -> None:
    function = Function(case)
    u, v, w = directions(function.at(), 3)
    what, compute = next(row[1:] for row in PRODUCTS if row[0] == how)

    def seeded(library: Any) -> Scalar:
        f = function.of(library)

        def with_a_seed(x: Tensor) -> Tensor:
            torch.manual_seed(3)
            return f(x)

        return with_a_seed

    found = compute(seeded(fused_rnn), function.at(), u, v, w)
    at = function.at().requires_grad_()
    (first,) = torch.autograd.grad(seeded(nn)(at), at, create_graph=True)
    (second,) = torch.autograd.grad(first @ u, at)
    assert_within({what: found}, {"Hu": {"Hu": second}, "uHv": {"uHv": second @ v}}[what])


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_gates_give_the_same_second_derivatives(recompute: bool) -> None:
    case = Case(num_layers=2, steps=3, **SMALL)
    module, data = case.build(fused_rnn), case.data()
    module.recompute = recompute
    direction = directions(data.sequence.detach(), 1)[0]

    def loss(library_module: nn.Module, x: Tensor) -> Tensor:
        return library_module(x)[0].exp().sum()

    found = jvp(grad(lambda x: loss(module, x)), (data.sequence.detach(),), (direction,))[1]
    twin = case.build(nn)
    (first,) = torch.autograd.grad(loss(twin, data.sequence), data.sequence, create_graph=True)
    (right,) = torch.autograd.grad((first * direction).sum(), data.sequence)
    assert_within({"Hu": found.detach()}, {"Hu": right})
