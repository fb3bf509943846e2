"""The operators under `torch.ops.fused_rnn` hold to PyTorch's rules: schemas, fake kernels, dynamic shapes."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fused_rnn
from fused_rnn import settings

pytestmark = pytest.mark.kernels

NAMES = (
    "rnn_forward", "rnn_backward", "cell_forward", "cell_backward", "draw_bits", "rnn_tangent", "rnn_backward_tangent",
    "rnn_backward_each", "rnn_forward_stacked", "rnn_backward_stacked", "rnn_quantized",
)  # fmt: skip

CASES = [
    *(Case(cell=cell, num_layers=2, bidirectional=True, hx=True, packing="unsorted") for cell in CELLS),
    Case(proj=True, batch_first=True, dtype=torch.bfloat16),
    Case(cell="GRU", bias=False, dtype=torch.float64),
    Case(cell="LSTM", num_layers=3, dropout=0.5),
    *(CellCase(cell=cell) for cell in CELLS),
    CellCase(cell="LSTM", bias=False, hx=False, dtype=torch.float16),
]


class _Recorder(TorchDispatchMode):
    """Keeps every call of our operators: operator, arguments, keywords; and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.results: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "fused_rnn":
            detach = functools.partial(tree_map_only, torch.Tensor, lambda tensor: tensor.detach())
            self.calls.append((func, detach(args), detach(kwargs)))
            self.results.append(result)
        return result


def recorded_calls(case: Case | CellCase, device: str = "cpu") -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    with fused_rnn.use_backend("fused"), _Recorder() as recorder:
        run(case.build(fused_rnn).to(device), case.data().to(device))
    return recorder.calls


def test_every_registered_operator_is_known_here() -> None:
    registered = {
        name.removeprefix("fused_rnn::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fused_rnn::")
    }
    assert registered == set(NAMES)


def test_the_version_rises_with_every_change_of_a_schema() -> None:
    """PyTorch keeps compiled programs on disk under the operators' names and arguments. One that this version of the
    schemas cannot run must not be found by it: a new digest belongs to a new OPERATORS_VERSION, here and in
    csrc/settings.h."""
    schemas = "\n".join(str(getattr(torch.ops.fused_rnn, name).default._schema) for name in NAMES)
    digests = {8: "fc7c3a9bbc1350dea8e5ed8ba8c1da2145df76227b96710d3aa9702c487bb695"}
    assert digests == {settings.OPERATORS_VERSION: hashlib.sha256(schemas.encode()).hexdigest()}


def test_programs_of_another_version_are_refused_by_name() -> None:
    layer, x = fused_rnn.LSTM(3, 4), torch.randn(5, 2, 3)
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node.args for node in graph.graph.nodes if node.target is torch.ops.fused_rnn.rnn_forward.default)
        return graph

    torch.compile(layer, backend=backend)(x)
    (args,) = seen
    assert args[5][-1] == settings.OPERATORS_VERSION  # so that what is compiled is found by this version alone
    older = [*args[5][:-1], settings.OPERATORS_VERSION - 1]
    params = list(layer.parameters())
    for device in ("cpu", "meta"):
        arguments = [t.to(device) for t in params]
        with pytest.raises(
            (RuntimeError, ValueError), match=r"^settings: expected those of version .* compile or export"
        ):
            torch.ops.fused_rnn.rnn_forward(x.to(device), None, None, arguments, [], older, [], False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators_of_a_call_pass_opcheck(case: Case | CellCase) -> None:
    calls = recorded_calls(case)
    stem = "cell" if isinstance(case, CellCase) else "rnn"
    assert {call[0].overloadpacket.__name__ for call in calls} == {f"{stem}_forward", f"{stem}_backward"}
    for operator, args, kwargs in calls:
        torch.library.opcheck(operator, args, kwargs)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_inference_operator_passes_opcheck(case: Case) -> None:
    module, data = case.build(fused_rnn), case.data()
    with fused_rnn.use_backend("fused"), torch.no_grad(), _Recorder() as recorder:
        module(data.input, data.hx)
    assert len(recorder.calls) == 1
    operator, args, kwargs = recorder.calls[0]
    torch.library.opcheck(operator, args, kwargs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_operator_of_quantized_layers_passes_opcheck(cell: str, dtype: torch.dtype) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True, hx=True, batch_first=True)
    module, data = fused_rnn.quantize(case.build(fused_rnn).eval(), dtype), case.data()
    mask = torch.rand(data.input.shape[:2]) > 0.3
    with torch.no_grad(), _Recorder() as recorder:
        module(data.input, data.hx, mask=mask)
    ((operator, args, kwargs),) = recorder.calls
    assert operator is torch.ops.fused_rnn.rnn_quantized.default
    torch.library.opcheck(operator, args, kwargs)


def test_the_reset_gate_before_the_product_is_refused_on_a_cpu() -> None:
    gates = [torch.zeros(*shape) for shape in ((12, 3), (12, 4), (12,), (12,))]
    within = settings.Within(reset_after=False)
    of_call = [settings.CellKind.GRU, 1, 1, 0, 0, 0, *within.integers(), settings.OPERATORS_VERSION]
    with pytest.raises(RuntimeError, match="reset_after: no kernel for a reset gate before the product"):
        torch.ops.fused_rnn.rnn_forward(
            torch.zeros(5, 2, 3), None, None, gates, [], of_call, within.numbers(), True
        )  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
def test_a_whole_stack_is_one_forward_and_one_backward_call(cell: str) -> None:
    case = Case(cell=cell, num_layers=3, bidirectional=True, steps=8)
    names = [call[0].overloadpacket.__name__ for call in recorded_calls(case)]
    assert names == ["rnn_forward", "rnn_backward"]


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l0"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_that_nobody_needs_are_not_computed(cell: str, frozen: str) -> None:
    case = Case(cell=cell, num_layers=2, hx=True)
    module, data = case.build(fused_rnn), case.data()
    getattr(module, frozen).requires_grad_(False)
    with fused_rnn.use_backend("fused"), _Recorder() as recorder:
        module(data.sequence.detach(), data.hx)[0].sum().backward()
    grad_input, grad_h0, _, grad_params = recorder.results[-1]
    assert grad_input.numel() == 0
    assert grad_h0.shape == data.states[0].shape
    names = [name for name, _ in module.named_parameters()]
    sizes = {name: gradient.numel() for name, gradient in zip(names, grad_params, strict=True)}
    assert sizes == {name: 0 if name == frozen else p.numel() for name, p in module.named_parameters()}


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_saved_when_no_gradient_can_be_asked_for(cell: str) -> None:
    case = Case(cell=cell, num_layers=2)
    module, data = case.build(fused_rnn), case.data()
    with fused_rnn.use_backend("fused"), _Recorder() as recorder:
        with torch.no_grad():
            module(data.input)
        module.requires_grad_(False)(data.sequence.detach())
    for result in recorder.results:
        assert [tensor.numel() for tensor in result[3:]] == [0, 0, 0]
