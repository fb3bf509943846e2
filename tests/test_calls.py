"""The short way of a call from Python to its operator, and the gradient without Python: the same as the long way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_close_to_twin, assert_same
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import fused_rnn
from fused_rnn import backend

pytestmark = pytest.mark.kernels

CASES = [
    *(Case(cell=cell, num_layers=2, bidirectional=True, hx=True) for cell in CELLS),
    Case(proj=True, batch_first=True, dtype=torch.float64),
    Case(cell="GRU", bias=False, dtype=torch.bfloat16),
    Case(cell="LSTM", num_layers=3, dropout=0.5),
    *(CellCase(cell=cell) for cell in CELLS),
    CellCase(cell="LSTM", bias=False, hx=False, dtype=torch.float16),
]
ONE_OF_EACH = [Case(cell="LSTM", num_layers=2, hx=True), CellCase(cell="GRU")]


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "eager_kernels", lambda: None)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For every attempt at the short way, whether it was taken."""
    found: list[bool] = []

    def recording(attempt: Callable[..., Any]) -> Callable[..., Any]:
        def try_it(*args: Any) -> Any:
            result = attempt(*args)
            found.append(result is not None)
            return result

        return try_it

    assert backend.ops is not None
    for name in ("try_stack", "try_step"):
        monkeypatch.setattr(backend.ops, name, recording(getattr(backend.ops, name)))
    yield found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_the_long_way(case: Case | CellCase, request: Any) -> None:
    module = case.build(fused_rnn)
    torch.manual_seed(3)
    found = run(module, case.data())
    request.getfixturevalue("long_way")
    torch.manual_seed(3)
    assert_same(found, run(module, case.data()))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_the_usual_call_takes_the_short_way(case: Case | CellCase, taken: list[bool]) -> None:
    module, data = case.build(fused_rnn), case.data()
    module(data.input, data.hx)
    with torch.no_grad():
        module(data.input, data.hx)
    module(data.input)
    assert taken == [True] * 3


def test_steps_that_are_not_given_by_name_take_the_short_way_too(taken: list[bool]) -> None:
    fused_rnn.GRU(3, 4)(torch.zeros(5, 2, 3), lengths=None, mask=None)
    assert taken == [True]


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize(
    "context",
    [_Watch, lambda: torch.autocast("cpu"), lambda: fused_rnn.use_backend("reference")],
    ids=["function mode", "autocast", "reference"],
)
def test_what_looks_at_calls_sees_the_long_way(
    context: Callable[[], AbstractContextManager[Any]], case: Case | CellCase, taken: list[bool]
) -> None:
    module, data = case.build(fused_rnn), case.data()
    with context() as mode:
        module(data.input, data.hx)
    assert taken[:1] != [True]  # inside of autocast's casts there may be a second attempt
    if isinstance(mode, _Watch):
        function = fused_rnn.functional.gru_cell if isinstance(case, CellCase) else fused_rnn.functional.lstm
        assert mode.functions == [function]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_subclass_of_tensor_stays_one(case: Case | CellCase, taken: list[bool]) -> None:
    module, data = case.build(fused_rnn), case.data()
    result = next(iter(case.outputs(module(data.sequence.as_subclass(_Subclass))).values()))
    assert isinstance(result, _Subclass) and taken[0] is False


@pytest.mark.parametrize("grad", [False, True])
def test_jit_trace_records_the_operator(grad: bool) -> None:
    case = Case(cell="GRU")
    module, data = case.build(fused_rnn), case.data()
    with nullcontext() if grad else torch.no_grad():
        traced = torch.jit.trace(module, data.sequence.detach())
    other = case.data(seed=5).sequence.detach()
    assert_same({"output": traced(other)[0]}, {"output": module(other)[0]})
    assert "fused_rnn::rnn_forward" in str(traced.graph)


def test_exchanged_parameters_are_read(taken: list[bool]) -> None:
    case = Case(cell="RNN_TANH")
    module, data = case.build(fused_rnn), case.data()
    before = module(data.input)[0]
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    after = module(data.input)[0]
    assert taken == [True, True] and not torch.equal(before[1:], after[1:]) and torch.equal(before[0], after[0])


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_the_gradient_needs_no_python(case: Case | CellCase) -> None:
    data = case.data()
    for result in case.outputs(case.build(fused_rnn)(data.input, data.hx)).values():
        assert type(result.grad_fn).__name__ == "CppFunction"
        assert "fused_rnn::" in result.grad_fn.name()


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_vmap_over_backward_equals_a_loop(case: Case | CellCase) -> None:
    module, data = case.build(fused_rnn), case.data()
    output = next(iter(case.outputs(module(data.input, data.hx)).values()))
    leaves = [data.sequence, *module.parameters()]
    seeds = torch.randn(3, *output.shape)

    def gradients(seed: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, seed, retain_graph=True)

    found = torch.func.vmap(gradients)(seeds)
    expected = [torch.stack(values) for values in zip(*(gradients(seed) for seed in seeds), strict=True)]
    names = [str(i) for i in range(len(leaves))]  # close, as one call over all seeds sums in another order
    assert_close_to_twin(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_forward_mode_of_eager_calls_equals_func_jvp(case: Case | CellCase) -> None:
    module = case.build(fused_rnn)
    at = case.data().sequence.detach()
    along = torch.randn_like(at)

    def output(sequence: Tensor) -> Tensor:
        return next(iter(case.outputs(module(sequence)).values()))

    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(output(forward_ad.make_dual(at, along)))
    assert tangent is not None
    expected_value, expected = torch.func.jvp(output, (at,), (along,))
    # Close: the parameters require gradients, so that the one goes through the formulas, the other through kernels.
    assert_close_to_twin({"output": value, "tangent": tangent}, {"output": expected_value, "tangent": expected})


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_an_operator_called_directly_is_differentiable(case: Case) -> None:
    module, data = case.build(fused_rnn), case.data()
    params = list(module.parameters())
    h0, c0 = (*data.states, None)[:2]
    arguments = (data.sequence, h0, c0, params, [], *module._settings().flatten(), False)
    output, h_n, c_n, *saved = torch.ops.fused_rnn.rnn_forward(*arguments)
    assert [t.numel() for t in saved] == [0, 0, 0]
    assert output.requires_grad and h_n.requires_grad and c_n.requires_grad == (case.cell == "LSTM")
    found = torch.autograd.grad(output.sum(), [data.sequence, *params])
    expected = torch.autograd.grad(module(data.input, data.hx)[0].sum(), [data.sequence, *params])
    assert_same(dict(enumerate(found)), dict(enumerate(expected)))  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.fused_rnn.rnn_forward.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_compiled_autograd_traces_the_backward_pass(case: Case | CellCase) -> None:
    from torch._dynamo import compiled_autograd

    module, data = case.build(fused_rnn), case.data()

    def loss() -> Tensor:
        return next(iter(case.outputs(module(data.input, data.hx)).values())).square().sum()

    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(loss(), list(parameters.values()))
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss().backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}
    assert_close_to_twin(found, dict(zip(parameters, expected, strict=True)))
