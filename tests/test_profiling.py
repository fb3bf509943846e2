"""What PyTorch's own tools see of a call: the FLOP counter, and the profiler with its traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase
from torch.func import functional_call, grad, jvp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn

pytestmark = pytest.mark.kernels

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def forward_flops(case: Case) -> int:
    """Products of a stack, a multiply-add being 2, worked out from the sizes alone."""
    directions = 2 if case.bidirectional else 1
    rows = GATES[case.cell] * case.hidden_size
    columns = sum(
        (case.input_size if layer == 0 else directions * case.hidden_size) + case.hidden_size
        for layer in range(case.num_layers)
    )
    return 2 * case.steps * case.batch * directions * rows * columns


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_flops_of_both_passes_are_counted(cell: str, bidirectional: bool) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=bidirectional, hx=False)
    module, data = case.build(fused_rnn), case.data()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(data.input)
    forward = forward_flops(case)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        module(data.input)[0].sum().backward()
    assert counter.get_total_flops() == 3 * forward
    # without the gradient of the input, a product less in each direction
    with FlopCounterMode(display=False) as counter:
        module(data.sequence.detach())[0].sum().backward()
    saved = 2 * case.steps * case.batch * GATES[cell] * case.hidden_size * case.input_size * (1 + bidirectional)
    assert counter.get_total_flops() == 3 * forward - saved


@pytest.mark.parametrize("cell", CELLS)
def test_gates_that_are_computed_again_are_counted_again(cell: str) -> None:
    case = Case(cell=cell, num_layers=2, hx=False)
    module, data = case.build(fused_rnn), case.data()
    module.recompute = True
    with FlopCounterMode(display=False) as counter:
        module(data.input)[0].sum().backward()
    passes = 3 if cell.startswith("RNN") else 4
    assert counter.get_total_flops() == passes * forward_flops(case)


@pytest.mark.parametrize("cell", CELLS)
def test_flops_of_a_cell_are_counted(cell: str) -> None:
    case = CellCase(cell=cell, hx=True)
    module, data = case.build(fused_rnn), case.data()
    forward = 2 * case.batch * GATES[cell] * case.hidden_size * (case.input_size + case.hidden_size)
    with FlopCounterMode(display=False) as counter:
        output = next(iter(case.outputs(module(data.input, data.hx)).values()))
        assert counter.get_total_flops() == forward
        output.sum().backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("cell", CELLS)
def test_flops_of_derivatives_are_counted(cell: str) -> None:
    """In products of a forward pass of one layer, of which each W is a half here."""
    case = Case(cell=cell, input_size=6, hidden_size=6, hx=False)
    layer, x = case.build(fused_rnn), case.data().sequence.detach()
    unit = forward_flops(case)
    frozen = {name: p.detach() for name, p in layer.named_parameters()}

    def count(call: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / unit

    def output(parameters: Any, x: Any) -> Any:
        return functional_call(layer, parameters, (x,))[0]

    change = {name: torch.ones_like(p) for name, p in frozen.items()}
    assert count(lambda: jvp(lambda x: output(frozen, x), (x,), (x,))) == 1 + 1
    assert count(lambda: jvp(output, (frozen, x), (change, x))) == 1 + 1 + 1

    def twice() -> None:  # by backward(): FlopCounterMode does not take autograd.grad()
        given = x.clone().requires_grad_()
        leaves = [given, *layer.parameters()]
        layer(given)[0].backward(torch.ones_like(x), create_graph=True)
        first = [leaf.grad for leaf in leaves if leaf.grad is not None]
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(first, [torch.ones_like(g) for g in first])

    # The tangents 2; back through time 1/2; once more, with all gradients 1 + 1; of what changes 1 and 1/2 + 1/2.
    assert count(twice) == 3 + 2 + 0.5 + 2 + 2
    loss = lambda parameters, x: output(parameters, x).sum()  # noqa: E731
    each = vmap(grad(loss), in_dims=(None, 0))
    assert count(lambda: each(frozen, torch.stack([x, x]))) == 2 * (1 + 0.5 + 1)
    models = {name: torch.stack([p, p, p]) for name, p in frozen.items()}
    assert count(lambda: vmap(grad(loss), in_dims=(0, None))(models, x)) == 3 * (1 + 0.5 + 1)


def test_flops_are_those_that_torch_counts_for_the_formulas() -> None:
    case = Case(cell="GRU", hx=False)
    module, data = case.build(fused_rnn), case.data()
    counts = []
    for backend in ("fused", "reference"):
        with fused_rnn.use_backend(backend), FlopCounterMode(display=False) as counter, torch.no_grad():
            module(data.input)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_trace_names_cell_sizes_and_variant_of_each_pass(cell: str, tmp_path: Path) -> None:
    layer = getattr(fused_rnn, cell)(5, 16, bidirectional=True)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        layer(torch.randn(7, 3, 5))[0].sum().backward()
    found.export_chrome_trace(str(tmp_path / "trace.json"))
    names = [event.get("name", "") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    ours = [name for name in names if name.startswith("fused_rnn ")]
    isa = fused_rnn.ops._C.isa_used()
    where = f"T7 B3 I5 H16 x2 float32 {isa} 1 thread"
    assert ours == [f"fused_rnn {cell} forward {where}", f"fused_rnn {cell} backward {where}"]


def test_each_layer_of_a_stack_is_a_range_of_its_own() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as found, torch.no_grad():
        fused_rnn.LSTM(5, 16, num_layers=3, proj_size=4)(torch.randn(7, 3, 5))
    names = [event.name for event in found.events() if event.name.startswith("fused_rnn LSTM forward")]
    assert len(names) == 3 and "I5 H16 P4" in names[0] and "I4 H16 P4" in names[1]
