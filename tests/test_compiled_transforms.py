"""torch.compile around torch.func, and modules that are compiled once: eager's numbers, without a graph break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase
from support.compare import assert_close_to_twin
from test_masks import random_lengths, random_mask
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fused_rnn

pytestmark = pytest.mark.slow

F64 = torch.float64


@pytest.fixture(autouse=True)
def _compiler_without_a_past() -> Iterator[None]:
    """It counts the compilations of one function over all tests, and gives up after a few."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True)


def assert_equal_trees(found: Any, expected: Any) -> None:
    leaves, structure = torch.utils._pytree.tree_flatten(expected)
    found_leaves, found_structure = torch.utils._pytree.tree_flatten(found)
    assert structure == found_structure
    assert any(leaf.count_nonzero() > 0 for leaf in leaves)  # of a cell without states one weight's gradient is zero
    named = {str(i): leaf.detach() for i, leaf in enumerate(leaves)}
    assert_close_to_twin({str(i): leaf.detach() for i, leaf in enumerate(found_leaves)}, named)


class Call:
    """A loss of a call as a function of its tensors."""

    def __init__(self, case: Any, option: str | None = None) -> None:
        self.case, self.module, data = case, case.build(fused_rnn).eval(), case.data()
        self.x, self.states = data.sequence.detach(), tuple(s.detach() for s in data.states)
        self.parameters = {name: p.detach() for name, p in self.module.named_parameters()}
        self.options: dict[str, Tensor] = {}
        if option == "mask":
            mask = random_mask(case)
            self.options["mask"] = mask.T if case.batch_first else mask
        elif option == "lengths":
            self.options["lengths"] = random_lengths(case)

    def loss(self, parameters: dict[str, Tensor], x: Tensor, *states: Tensor) -> Tensor:
        return torch.stack([t.square().sum() for t in self.outputs(parameters, x, *states)]).sum()

    def outputs(self, parameters: dict[str, Tensor], x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        hx = None
        if states:
            hx = states if self.case.has_cell_state else states[0]
        arguments = (x.transpose(0, 1) if getattr(self.case, "batch_first", False) else x, hx)
        result = functional_call(self.module, parameters, arguments, self.options)
        if isinstance(self.case, CellCase):
            return result if isinstance(result, tuple) else (result,)
        output, final = result
        return output, *(final if isinstance(final, tuple) else (final,))


LAYERS = [Case(cell=cell, num_layers=2, bidirectional=True, hx=True, steps=3, dtype=F64) for cell in CELLS]
CELL_CASES = [CellCase(cell=cell, dtype=F64) for cell in CELLS]
OTHERS = [Case(proj=True, batch_first=True, dtype=F64), Case("GRU", bias=False, dtype=F64), CellCase("GRU", hx=False)]
# For what the compiler traces operation by operation, through the formulas.
SMALL: list[Any] = [Case("GRU", input_size=2, hidden_size=3, batch=1, steps=2, dtype=F64), CellCase("LSTM", dtype=F64)]


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *((case, "aot_eager") for case in (*LAYERS, *CELL_CASES, *OTHERS)),
        (LAYERS[0], "eager"),
        (CELL_CASES[1], "eager"),
    ],
    ids=str,
)
def test_compiled_grad_is_that_of_eager_code(case: Any, backend: str) -> None:
    call = Call(case)
    arguments = (call.parameters, call.x, *call.states)
    gradient = grad(call.loss, tuple(range(len(arguments))))
    assert_equal_trees(compiled(gradient, backend)(*arguments), gradient(*arguments))


@pytest.mark.parametrize("case", [LAYERS[0], CELL_CASES[1]], ids=str)
def test_compiled_grad_is_that_of_eager_code_under_inductor(case: Any) -> None:
    call = Call(case)
    gradient = grad(call.loss, (0, 1))
    arguments = (call.parameters, call.x, *call.states)
    assert_equal_trees(compiled(gradient, "inductor")(*arguments), gradient(*arguments))


@pytest.mark.parametrize("option", ["mask", "lengths"])
@pytest.mark.parametrize("case", [*LAYERS[:2], OTHERS[0]], ids=str)
def test_compiled_grad_with_steps_that_do_not_count(case: Any, option: str) -> None:
    call = Call(case, option)
    gradient = grad(call.loss, (0, 1))
    arguments = (call.parameters, call.x)
    assert_equal_trees(compiled(gradient)(*arguments), gradient(*arguments))


def test_compiled_grad_with_dropout_draws_the_same_numbers() -> None:
    call = Call(Case("GRU", num_layers=2, dropout=0.4, dtype=F64))
    call.module.train()
    gradient = grad(call.loss, (0, 1))
    results = []
    for function in (gradient, compiled(gradient, "eager")):
        torch.manual_seed(3)
        results.append(function(call.parameters, call.x))
    assert_equal_trees(results[1], results[0])


@pytest.mark.parametrize("case", [LAYERS[1], CELL_CASES[0]], ids=str)
def test_compiled_vjp_is_that_of_eager_code(case: Any) -> None:
    call = Call(case)

    def pulled_back(x: Tensor) -> Any:
        outputs, pullback = vjp(lambda x: call.outputs(call.parameters, x, *call.states), x)
        return outputs, pullback(tuple(torch.ones_like(t) for t in outputs))

    assert_equal_trees(compiled(pulled_back)(call.x), pulled_back(call.x))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiled_jacrev_is_that_of_eager_code(case: Any) -> None:
    call = Call(case)
    jacobian = jacrev(lambda x: call.outputs(call.parameters, x, *call.states)[-1])
    assert_equal_trees(compiled(jacobian)(call.x), jacobian(call.x))


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("how", ["jvp", "jacfwd"])
def test_compiled_forward_mode_is_that_of_eager_code(case: Any, how: str) -> None:
    call = Call(case)

    def value(x: Tensor) -> Tensor:
        return call.loss(call.parameters, x, *call.states)

    def derivative(x: Tensor) -> Any:
        return jvp(value, (x,), (torch.ones_like(x),)) if how == "jvp" else jacfwd(value)(x)

    assert_equal_trees(compiled(derivative)(call.x), derivative(call.x))


@pytest.mark.parametrize("option", [None, "mask"])
@pytest.mark.parametrize("case", [LAYERS[0].replace(num_layers=1), SMALL[0], CELL_CASES[0]], ids=str)
def test_compiled_per_sample_gradients_are_those_of_eager_code(case: Any, option: str | None) -> None:
    is_cell = isinstance(case, CellCase)
    if is_cell and option:
        pytest.skip("a cell has no mask")
    call = Call(case.replace(hx=False, batch=None if is_cell else 1), option)
    samples = torch.stack([call.x + k for k in range(3)])
    per_sample = vmap(grad(call.loss), (None, 0))
    found = compiled(per_sample)(call.parameters, samples)
    assert_equal_trees(found, per_sample(call.parameters, samples))
    by_autograd = []
    for sample in samples:
        leaves = {name: p.clone().requires_grad_() for name, p in call.parameters.items()}
        values = torch.autograd.grad(call.loss(leaves, sample), list(leaves.values()))
        by_autograd.append(dict(zip(leaves, values, strict=True)))
    assert_equal_trees(found, {name: torch.stack([row[name] for row in by_autograd]) for name in call.parameters})


SECOND: dict[str, Callable[..., Any]] = {
    "hessian": hessian,
    "jacrev-jacrev": lambda f: jacrev(jacrev(f)),
    "jacrev-jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacfwd-jacfwd": lambda f: jacfwd(jacfwd(f)),
}


@pytest.mark.parametrize("how", SECOND)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_compiled_second_derivative_is_that_of_eager_code(case: Any, how: str) -> None:
    """torch.nn's layers break the graph here."""
    call = Call(case)

    def value(x: Tensor) -> Tensor:
        return call.loss(call.parameters, x, *call.states)

    try:
        found = compiled(SECOND[how](value))(call.x)
    except torch._dynamo.exc.TorchRuntimeError as error:
        # PyTorch's own: its fake tensors lose the device of a product of tensors with two levels of tangents
        if how != "jacfwd-jacfwd" or "device mismatch" not in str(error):
            raise
        pytest.xfail("PyTorch cannot compile a matrix product of two levels of forward mode")
    assert_equal_trees(found, torch.autograd.functional.hessian(value, call.x))


# ---- compiled once --------------------------------------------------------------------------------------------------


def others_at_work() -> None:
    """Layers and cells of other sizes are built and called, as the rest of a program does."""
    for size in (3, 9):
        for name in ("LSTM", "GRU"):
            getattr(fused_rnn, name)(size, size + 1, num_layers=2)(torch.zeros(4, 2, size))[0].sum().backward()
            getattr(fused_rnn, name + "Cell")(size, size + 1)(torch.zeros(2, size))
        layer = fused_rnn.RNN(size, size, batch_first=True)
        layer(torch.zeros(2, 4, size), lengths=torch.tensor([4, 2]))


ONCE = [
    *(
        (Case(cell=cell, num_layers=2), *how)
        for cell in CELLS[:3]
        for how in (("", False), ("hx", True), ("mask", True))
    ),
    (Case("GRU", num_layers=2), "mask", False),
    (Case("GRU", num_layers=2), "", True),
    *((CellCase(cell), *how) for cell in CELLS[:3] for how in (("", False), ("hx", True))),
]


@pytest.mark.parametrize(("case", "what", "training"), ONCE, ids=str)
def test_a_module_is_compiled_once(case: Any, what: str, training: bool) -> None:
    case = case.replace(hx=what == "hx")
    module = case.build(fused_rnn)
    options = {"mask": random_mask(case)} if what == "mask" else {}
    run = compiled(module)
    # a layer of the same class whose call is compiled by itself
    other = compiled(nn.Sequential(case.build(fused_rnn, seed=1)))

    def call(seed: int) -> None:
        data = case.data(seed=seed)
        expected = case.outputs(module(data.input, data.hx, **options))
        with torch.set_grad_enabled(training):
            found = case.outputs(run(data.input, data.hx, **options))
            if training:
                sum(t.sum() for t in found.values()).backward()
        assert_close_to_twin(*({k: t.detach() for k, t in tensors.items()} for tensors in (found, expected)))

    call(1)
    others_at_work()
    other(case.data().input)
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        call(2)
        others_at_work()
        call(3)
    finally:
        torch._dynamo.config.error_on_recompile = before


@pytest.mark.kernels
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_compiled_does_not_grow_with_the_steps(cell: str) -> None:
    """Each pass of six layers is one operator, so that 512 steps compile as 8 do (benchmarks/compile_time.py)."""
    from functorch.compile import aot_module_simplified, make_boxed_func

    name, _, nonlinearity = cell.partition("_")
    layer = getattr(fused_rnn, name)(
        3, 4, num_layers=6, **({"nonlinearity": nonlinearity.lower()} if nonlinearity else {})
    )

    def nodes_of_both_passes(num_steps: int) -> list[list[str]]:
        graphs: list[list[str]] = []

        def keep(graph: Any, example: Any) -> Any:
            graphs.append([f"{node.op} {node.target}" for node in graph.graph.nodes if node.op == "call_function"])
            return make_boxed_func(graph.forward)

        def backend(graph: Any, example: Any) -> Any:
            return aot_module_simplified(graph, example, fw_compiler=keep, bw_compiler=keep)

        torch._dynamo.reset()
        run = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
        run(torch.randn(num_steps, 2, 3))[0].square().mean().backward()
        return graphs

    few, many = nodes_of_both_passes(8), nodes_of_both_passes(512)
    assert len(few) == 2 and few == many
    assert [sum("fused_rnn" in node for node in graph) for graph in few] == [1, 1]
