"""`lengths=` and `mask=` on a GPU. Skipped without one; test_cuda_masks.py runs the same operators on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.cases import Case, run
from support.compare import assert_same, assert_within
from test_cuda import (
    LAYERS,
    VARIANTS,
    _float32_is_float32,  # noqa: F401  (a fixture)
    on_cpu,
    skip_unless_planned,
    variant,
    variant_case,
)
from test_masks import (
    CASES,
    SOME,
    as_argument,
    assert_masked_steps_are_empty,
    float64_reference,
    random_lengths,
    random_mask,
)
from torch import Tensor

import fused_rnn

pytestmark = [pytest.mark.cuda, pytest.mark.kernels]


def run_on_gpu(case: Case, mask: Tensor, **options: Any) -> dict[str, Tensor]:
    module, data = case.build(fused_rnn).cuda(), case.data().to("cuda")
    return on_cpu(run(module, data, mask=as_argument(case, mask).cuda(), **options))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_matches_the_float64_definition(case: Case) -> None:
    assert_within(run_on_gpu(case, random_mask(case)), float64_reference(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "proj"), LAYERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_matches_the_float64_definition(name: str, cell: str, proj: bool, dtype: torch.dtype) -> None:
    case = variant_case(name, cell=cell, proj=proj, dtype=dtype)
    with variant(name):
        skip_unless_planned(name, case)
        assert_within(run_on_gpu(case, random_mask(case)), float64_reference(case))
        with torch.no_grad():
            found = run_on_gpu(case, random_mask(case), gradients=False)
    assert_within(found, {name: float64_reference(case)[name] for name in found})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_what_stands_in_masked_steps_leaks_nowhere(case: Case, name: str, value: float) -> None:
    module, data, mask = case.build(fused_rnn).cuda(), case.data().to("cuda"), random_mask(case).cuda()
    spoilt = copy.deepcopy(data)
    with torch.no_grad():
        spoilt.sequence[~mask] = value
    with variant(name):
        expected = run(module, data, mask=as_argument(case, mask))
        found = run(module, spoilt, mask=as_argument(case, mask))
    assert_same(found, expected)
    assert_masked_steps_are_empty(on_cpu(found), case, mask.cpu())


@pytest.mark.parametrize("on", ["cpu", "cuda"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_lengths_may_be_on_either_device(case: Case, on: str) -> None:
    module, data, lengths = case.build(fused_rnn).cuda(), case.data().to("cuda"), random_lengths(case)
    mask = torch.arange(case.steps).unsqueeze(1) < lengths
    assert_same(run(module, data, lengths=lengths.to(on)), run(module, data, mask=as_argument(case, mask).cuda()))
    on_host, host_data = case.build(fused_rnn), case.data()
    assert_same(run(on_host, host_data, lengths=lengths.to(on)), run(on_host, host_data, lengths=lengths))


@pytest.mark.parametrize("option", ["mask", "lengths"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_captured_training_step_takes_new_masks_and_nothing_waits(case: Case, name: str, option: str) -> None:
    module, data = case.build(fused_rnn).cuda(), case.data().to("cuda")
    leaves = [data.sequence, *module.parameters()]

    def values(seed: int) -> Tensor:
        mask = random_mask(case, seed=seed)
        return as_argument(case, mask) if option == "mask" else mask.sum(0)

    options = {option: values(1).cuda()}

    def step() -> list[Tensor]:
        output = case.outputs(module(data.input, data.hx, **options))["output"]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    with variant(name):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # cuBLAS makes its handle and its workspace in a first call
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in (5, 6):
            options[option].copy_(values(seed))
            graph.replay()
            torch.cuda.synchronize()
            names = [str(i) for i in range(len(captured))]
            assert_same(dict(zip(names, captured, strict=True)), dict(zip(names, step(), strict=True)))
