"""Options within the recurrence on a GPU. Skipped without one; test_cuda_options.py runs the operators on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import test_resets
import torch
from support.compare import assert_close_to_twin, assert_same, assert_within
from test_cuda import (
    _float32_is_float32,  # noqa: F401  (a fixture)
    on_cpu,
)
from test_within import ROWS, build, name_of
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import check, formulas, functional

pytestmark = [pytest.mark.cuda, pytest.mark.kernels]

ALONE = [call for call in check.calls() if call.option and call.runs_on("cuda")]


@pytest.mark.parametrize("call", ALONE, ids=str)
def test_each_option_matches_the_float64_formulas(call: check.Call) -> None:
    with fused_rnn.use_backend("fused"):
        found = call.run(call.build().cuda())
    assert_within(found, call.reference())


def _on_gpu(row: dict[str, Any]) -> tuple[Callable[..., Any], list[Tensor]]:
    layer, call, arguments = build(row)
    layer.cuda()
    return call, [t.detach().cuda().requires_grad_(t.requires_grad) for t in arguments]


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("row", [row for row in ROWS if row["layout"] not in ("mask", "reset")], ids=name_of)
def test_options_together_match_the_formulas_with_the_draws_of_the_gpu(row: Any, clip: float | None) -> None:
    results = []
    for name in ("auto", "reference"):
        with fused_rnn.use_backend(name):
            call, arguments = _on_gpu(row | {"recurrent_grad_clip": clip})
            outputs = call(*arguments)
            leaves = [t for t in arguments if t.requires_grad]
            found = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
            results.append(on_cpu({str(k): t.detach() for k, t in enumerate((*outputs, *found))}))
    assert_close_to_twin(*results)


@pytest.mark.parametrize("index", range(0, len(test_resets.DRAWN), 4), ids=lambda i: str(test_resets.DRAWN[i]))
def test_resets_match_the_float64_definition(index: int) -> None:
    call = test_resets.DRAWN[index]
    module, (data, states) = call.build().cuda(), call.data()
    on_gpu, anew = data.to("cuda"), tuple(state.detach().cuda().requires_grad_() for state in states)
    options = {
        name: value.cuda() if name in ("reset", "mask", "lengths") else value
        for name, value in call.options(anew).items()
    }
    with fused_rnn.use_backend("fused"):
        outputs = call.case.outputs(module(on_gpu.input, on_gpu.hx, **options))
    found = on_cpu(test_resets.with_gradients(module, on_gpu, anew, outputs))
    assert_within(found, test_resets.by_hand(call))


def test_bits_are_those_that_the_cpu_draws_from_the_seed() -> None:
    seed = torch.tensor([-6])
    for units, rate in ((13, 0.3), (64, 0.0), (7, 1.0)):
        expected = torch.ops.fused_rnn.draw_bits(seed, 2, 50, units, rate)
        assert_same(torch.ops.fused_rnn.draw_bits(seed.cuda(), 2, 50, units, rate).cpu(), expected)
    torch.manual_seed(1)
    bits = functional._draw_bits(torch.zeros(1, device="cuda"), (1, 4000), 64, 0.3)
    assert 0.29 < formulas.unpack_bits(bits, 64).double().mean().item() < 0.31


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_captured_graph_draws_anew_and_nothing_waits(cell: str) -> None:
    layer: Any = getattr(fused_rnn, cell)(5, 16, num_layers=2, zoneout=0.5, device="cuda")
    x = torch.randn(6, 3, 5, device="cuda")
    reset = torch.rand(6, 3, device="cuda") < 0.2

    def step() -> Tensor:
        output: Tensor = layer(x, reset=reset)[0]
        return output.detach()

    with fused_rnn.use_backend("fused"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()
    results = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        results.append(output.clone())
    assert not torch.equal(*results)


def test_explain_says_what_runs_step_by_step() -> None:
    x = torch.zeros(50, 8, 64, dtype=torch.bfloat16, device="cuda")
    layer = fused_rnn.LSTM(64, 128, zoneout=0.1, peephole=True, dtype=torch.bfloat16, device="cuda")
    text = str(fused_rnn.explain(layer, x))
    assert "peephole: for the kernels of one step alone" in text
    assert "runs on: the fused kernels" in text
    gru = fused_rnn.GRU(64, 128, reset_after=False, dtype=torch.bfloat16, device="cuda")
    text = str(fused_rnn.explain(gru, x))
    assert "reset_after: for the kernels of one step alone" in text
    assert "runs on: the fused kernels" in text


@pytest.mark.parametrize("layout", ["packed", "reset"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_reset_gate_before_the_product_matches_the_float64_formulas(recompute: bool, layout: str) -> None:
    torch.manual_seed(0)
    layer = fused_rnn.GRU(
        5, 48, num_layers=2, bidirectional=True, reset_after=False, recompute=recompute, recurrent_grad_clip=0.5
    )
    x, reset = torch.randn(7, 4, 5), torch.rand(7, 4) < 0.3
    results = []
    for module, device, name in ((copy.deepcopy(layer).cuda(), "cuda", "fused"), (layer.double(), "cpu", "reference")):
        leaves = [x.to(next(module.parameters())).requires_grad_(), *module.parameters()]
        given: dict[str, Any] = {"reset": reset.to(device)} if layout == "reset" else {}
        argument: Any = pack_padded_sequence(leaves[0], [7, 5, 5, 1]) if layout == "packed" else leaves[0]
        with fused_rnn.use_backend(name):
            outputs = check._tensors(module(argument, **given))
            found = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
        results.append(on_cpu({str(k): t.detach() for k, t in enumerate((*outputs, *found))}))
    assert_within(*results)
