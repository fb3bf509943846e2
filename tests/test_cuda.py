"""The layers on a GPU: the numbers of the float64 reference in every variant, and the rules of CUDA code.

Everything here is skipped without a GPU. test_cuda_ops.py and the host execution of the kernels (test_cuda_host.py and
others) check what can be checked without one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_close_to_twin, assert_same, assert_within
from test_parity import CELL_CASES, DTYPES, LAYER_CASES, ODD_CASES
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn.bench.gpu_peers import flatten_weights
from fused_rnn.check import scaled_errors

pytestmark = [pytest.mark.cuda, pytest.mark.kernels]

VARIANTS = ("none", "block", "cluster", "grid")
# Each cell, and whether its layer has a projection: those run merged in kernels of all steps.
LAYERS = [*((cell, False) for cell in CELLS), ("LSTM", True)]
# TF32 has 10 bits of fraction: a product of two rounded numbers is off by 2^-10 of itself at most, which is 2^13
# epsilons of float32. In a sum of products of both signs the error stays that share of the sum's size; the recurrence
# and the sums over steps carry some of it on, for which this leaves a factor of 8.
TF32_LIMIT = 8 * 2.0**13


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """TF32 is allowed for RNNs unless a program says otherwise; these tests do, and say so where they want it."""
    with tf32(False):
        yield


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def variant(name: str, **limits: int) -> Iterator[None]:
    """Lets layers run in this variant only, "none" (a launch a step) where it cannot be."""
    from fused_rnn import _C

    before = _C.cuda_allow()
    # Wavefronts and exchanges stay out where a whole run is without them.
    kept = {option: before[option] for option in ("layers", "counted", "barriers")}
    _C.cuda_allow(**(kept | {v: v == name for v in VARIANTS} | limits))
    try:
        yield
    finally:
        _C.cuda_allow(**before)


def planned(case: Case, *, backward: bool = False) -> str:
    """The variant that the case runs in."""
    module, data = case.build(fused_rnn).cuda(), case.data().to("cuda")
    plan = fused_rnn.explain(module, data.input, data.hx).plan
    assert plan is not None
    return (plan["backward"] if backward else plan)["variant"]


def skip_unless_planned(name: str, case: Case) -> None:
    """Both passes of the case run in the variant, or there is nothing to test."""
    for backward in (False, True):
        if planned(case, backward=backward) != name:
            pytest.skip(f"this GPU has no {name} variant for the case")


def on_cpu(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in results.items()}


def run_on_gpu(case: Case | CellCase, library: Any = fused_rnn, **options: bool) -> dict[str, Tensor]:
    return on_cpu(run(case.build(library).cuda(), case.data().to("cuda"), **options))


def float64_reference(case: Case | CellCase) -> dict[str, Tensor]:
    """By the plain formulas, on the GPU, where large cases take no time."""
    module = copy.deepcopy(case.build(fused_rnn)).double().cuda()
    with fused_rnn.use_backend("reference"):
        return on_cpu(run(module, case.data().to(torch.float64).to("cuda")))


# Numbers


@pytest.mark.parametrize("case", LAYER_CASES + ODD_CASES, ids=str)
def test_layer_matches_the_float64_reference(case: Case) -> None:
    assert_within(run_on_gpu(case), float64_reference(case))


@pytest.mark.parametrize("case", LAYER_CASES[::4], ids=str)
def test_layer_without_gradients_matches_the_float64_reference(case: Case) -> None:
    with torch.no_grad():
        found = run_on_gpu(case, gradients=False)
    expected = float64_reference(case)
    assert_within(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("case", CELL_CASES, ids=str)
def test_cell_matches_the_float64_reference(case: CellCase) -> None:
    assert_within(run_on_gpu(case), float64_reference(case))


@pytest.mark.parametrize("case", LAYER_CASES[::6], ids=str)
def test_layer_matches_torch_nn_on_the_gpu(case: Case) -> None:
    found, twin = run_on_gpu(case), run_on_gpu(case, nn)
    if case.dtype in (torch.float32, torch.float64):
        assert_close_to_twin(found, twin)
    else:
        # Here cuDNN's own rounding is not known: both have to be right.
        assert_within(found, float64_reference(case))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gru_d", "minimal", "sLSTM"])
def test_cells_of_ones_own_match_the_float64_formulas(name: str, dtype: torch.dtype) -> None:
    """Kernels that nvcc compiles here and now: vectors and scalars, with and without options."""
    header = Path(__file__).parent.parent / "examples" / "cells" / f"{name}.h"
    cls = fused_rnn.SLSTM if name == "sLSTM" else fused_rnn.load_cell(header)
    for hidden_size, batch, options in ((13, 5, {}), (256, 2048, {}), (16, 5, {"recurrent_grad_clip": 0.5})):
        torch.manual_seed(0)
        layer = cls(7, hidden_size, num_layers=2, bidirectional=True, dtype=dtype, **options)
        x = torch.randn(6, batch, 7).to(dtype)
        reference = copy.deepcopy(layer).double()
        layer.cuda()
        assert fused_rnn.explain(layer, x.cuda()).backend == "fused"
        weight = torch.randn(6, batch, 2 * hidden_size).to(dtype)
        results = []
        for module, backend in ((layer, "fused"), (reference, "reference")):
            like = next(module.parameters())
            leaf = x.to(like).requires_grad_()
            with fused_rnn.use_backend(backend):
                output, _ = module(leaf)
            grads = torch.autograd.grad(output, [leaf, *module.parameters()], weight.to(like))
            results.append({str(i): t.detach().cpu() for i, t in enumerate((output, *grads))})
        assert_within(*results)


def variant_case(name: str, **changes: Any) -> Case:
    """Several blocks of a team, or what one block holds; columns and steps that divide by nothing."""
    hidden_size = 27 if name == "block" else 72
    case = Case(input_size=24, hidden_size=hidden_size, num_layers=2, bidirectional=True, batch=21, steps=19, hx=True)
    return case.replace(**changes)


@pytest.mark.parametrize("packing", ["padded", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "proj"), LAYERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_matches_the_float64_reference(
    name: str, cell: str, proj: bool, dtype: torch.dtype, packing: str
) -> None:
    case = variant_case(name, cell=cell, proj=proj, packing=packing, dtype=dtype)
    with variant(name):
        skip_unless_planned(name, case)
        assert_within(run_on_gpu(case), float64_reference(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_a_cell(name: str, cell: str, dtype: torch.dtype) -> None:
    # By itself the planner takes a persistent variant for a cell of some thousand rows.
    case = CellCase(cell=cell, input_size=9, hidden_size=27, batch=21, dtype=dtype)
    with variant(name):
        assert_within(run_on_gpu(case), float64_reference(case))


@pytest.mark.parametrize("team_blocks", [2, 4, 8, 16])
@pytest.mark.parametrize("exchange", ["counted", "barriers"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_clusters_of_every_size_match_the_float64_reference(cell: str, exchange: str, team_blocks: int) -> None:
    case = Case(cell=cell, input_size=24, hidden_size=136, batch=21, steps=19, hx=True, dtype=torch.bfloat16)
    exchanges = {name: name == exchange for name in ("counted", "barriers")}
    with variant("cluster", **exchanges, team_blocks=team_blocks):
        skip_unless_planned("cluster", case)
        assert_within(run_on_gpu(case), float64_reference(case))


def at_once(case: Case) -> set[int]:
    """How many layers of the case run at once, forward and backward."""
    module, data = case.build(fused_rnn).cuda(), case.data().to("cuda")
    plan = fused_rnn.explain(module, data.input, data.hx).plan
    assert plan is not None
    return {plan["layers"], plan["backward"]["layers"]}


# Cells, layers of the stack and layers at once.
WAVEFRONTS = [("LSTM", 2, 2), ("GRU", 3, 3), ("LSTM", 4, 4), ("GRU", 5, 2)]


@pytest.mark.parametrize("packing", ["padded", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_size", [27, 72, 128])
@pytest.mark.parametrize(("cell", "num_layers", "layers"), WAVEFRONTS)
def test_layers_in_a_wavefront_match_the_float64_reference(
    cell: str, num_layers: int, layers: int, hidden_size: int, dtype: torch.dtype, packing: str
) -> None:
    case = Case(cell=cell, input_size=24, hidden_size=hidden_size, num_layers=num_layers, batch=21, steps=19, hx=True)
    case = case.replace(dtype=dtype, packing=packing)
    with variant("cluster", layers=layers):
        if at_once(case) != {layers}:
            pytest.skip(f"this GPU has no wavefront of {layers} layers for the case")
        assert_within(run_on_gpu(case), float64_reference(case))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_wavefront_gives_the_same_bits_again(cell: str) -> None:
    case = Case(cell=cell, input_size=24, hidden_size=128, num_layers=4, batch=40, steps=50, dtype=torch.bfloat16)
    with variant("cluster", layers=4):
        if at_once(case) != {4}:
            pytest.skip("this GPU has no wavefront of 4 layers for the case")
        first = run_on_gpu(case)
        for _ in range(5):
            assert_same(run_on_gpu(case), first)


@pytest.mark.parametrize("name", ["block", "cluster", "grid"])
def test_many_columns_of_a_team_match_the_float64_reference(name: str) -> None:
    case = variant_case(name, batch=333, dtype=torch.bfloat16)
    with variant(name):
        skip_unless_planned(name, case)
        assert_within(run_on_gpu(case), float64_reference(case))


@pytest.mark.parametrize("hidden_size", [128, 512, 768, 1024, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_large_layer_matches_the_float64_reference(cell: str, dtype: torch.dtype, hidden_size: int) -> None:
    case = Case(cell=cell, input_size=64, hidden_size=hidden_size, batch=16, steps=40, dtype=dtype)
    assert_within(run_on_gpu(case), float64_reference(case))


@pytest.mark.slow
def test_more_than_two_to_the_31_gate_values_are_right() -> None:
    steps, batch, hidden_size = 2048, 512, 640
    assert steps * batch * 4 * hidden_size > 2**31
    if torch.cuda.mem_get_info()[1] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    layer = fused_rnn.LSTM(8, hidden_size, dtype=torch.bfloat16, device="cuda")
    sequence = torch.randn(steps, batch, 8, dtype=torch.bfloat16, device="cuda")
    few = sequence[:, -3:].contiguous().requires_grad_()
    sequence.requires_grad_()
    (found,) = torch.autograd.grad(layer(sequence)[0][:, -3:].sum(), sequence)
    (expected,) = torch.autograd.grad(layer(few)[0].sum(), few)
    torch.testing.assert_close(found[:, -3:], expected, rtol=0.05, atol=0.02)
    assert not found[:, :-3].any()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_input_reaches_the_outputs_that_torch_nn_gives(cell: str, value: float, dtype: torch.dtype) -> None:
    case = Case(cell=cell, hidden_size=19, batch=5, dtype=dtype)
    module, twin = case.build(fused_rnn).cuda(), case.build(nn).double()
    sequence = case.data().sequence.detach().clone()
    sequence[2, 1, 0] = value
    with torch.no_grad():
        found, expected = module(sequence.cuda())[0].cpu(), twin(sequence.double())[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("cell", CELLS)
def test_strided_input_gives_the_same_bits_as_contiguous_input(cell: str) -> None:
    case = Case(cell=cell, batch=5, steps=7, hidden_size=16)
    module = case.build(fused_rnn).cuda()
    wide = torch.randn(9, 11, 12, device="cuda")
    for sequence in (wide[1:8, 2:7, ::2][..., :5], wide[:7, :5, 3:8], wide[:1, :5, :5].expand(7, 5, 5)):
        assert_same(
            {"output": module(sequence)[0]},
            {"output": module(sequence.clone(memory_format=torch.contiguous_format))[0]},
        )


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch_gives_empty_outputs_and_zero_gradients(cell: str) -> None:
    module = Case(cell=cell, num_layers=2).build(fused_rnn).cuda()
    sequence = torch.zeros(6, 0, 5, device="cuda", requires_grad=True)
    output, _ = module(sequence)
    assert output.shape == (6, 0, 7)
    output.sum().backward()
    assert sequence.grad is not None and sequence.grad.shape == sequence.shape
    assert all(not parameter.grad.any() for parameter in module.parameters())


# TF32 and autocast


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_tf32_follows_the_flag_of_rnns(cell: str, name: str) -> None:
    case = Case(cell=cell, input_size=64, hidden_size=96, batch=8, steps=12)
    reference = float64_reference(case)

    def worst() -> float:
        return max(scaled_errors(run_on_gpu(case), reference).values())

    with variant(name):
        exact = worst()
        with tf32(True):
            rounded = worst()
    assert exact <= 32
    assert 32 < rounded <= TF32_LIMIT


def test_the_tf32_flag_of_matrix_products_changes_nothing() -> None:
    case = Case(input_size=64, hidden_size=96, batch=8, steps=12)
    expected = run_on_gpu(case)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert_same(run_on_gpu(case), expected)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("suffix", ["", "Cell"])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_gives_the_dtypes_and_numbers_of_torch_nn(cell: str, suffix: str, dtype: torch.dtype) -> None:
    case = CellCase(cell=cell, hidden_size=16) if suffix else Case(cell=cell, hidden_size=16, hx=True)
    module, twin = (part.cuda() for part in case.twins())
    data = case.data().to("cuda")
    with torch.autocast("cuda", dtype=dtype):
        found, expected = case.outputs(module(data.input, data.hx)), case.outputs(twin(data.input, data.hx))
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in expected.items()}
    assert_close_to_twin(found, expected)
    next(iter(found.values())).float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


# Streams, graphs, devices


def test_a_side_stream_waits_for_what_made_the_input() -> None:
    case = Case(num_layers=2, hidden_size=64, batch=8, steps=50)
    module, sequence = case.build(fused_rnn).cuda(), case.data().sequence.detach().cuda()
    expected = module(sequence)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        late = torch.zeros_like(sequence)
        torch.cuda._sleep(20_000_000)
        late.copy_(sequence)
        found = module(late)[0]
    stream.synchronize()
    assert_same({"output": found}, {"output": expected})


@pytest.mark.parametrize("packing", ["padded", "sorted"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("cell", "proj"), LAYERS)
def test_a_captured_training_step_replays_on_new_numbers(cell: str, proj: bool, name: str, packing: str) -> None:
    case = Case(
        cell=cell, proj=proj, num_layers=2, bidirectional=True, hidden_size=24, batch=6, steps=8, packing=packing
    )
    module, data = case.build(fused_rnn).cuda(), case.data().to("cuda")
    leaves = [data.sequence, *module.parameters()]

    def step() -> list[Tensor]:
        output = case.outputs(module(data.input))["output"]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    with variant(name):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # cuBLAS makes its handle and its workspace in a first call
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in (5, 6):
            with torch.no_grad():
                data.sequence.copy_(case.data(seed=seed).sequence)
            graph.replay()
            torch.cuda.synchronize()
            names = [str(i) for i in range(len(captured))]
            assert_same(dict(zip(names, captured, strict=True)), dict(zip(names, step(), strict=True)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("packing", ["padded", "unsorted"])
def test_a_layer_on_the_second_device_runs_there(packing: str) -> None:
    case = Case(num_layers=2, hidden_size=64, batch=8, packing=packing)
    assert torch.cuda.current_device() == 0
    found = run(case.build(fused_rnn).to("cuda:1"), case.data().to("cuda:1"))
    assert all(tensor.device == torch.device("cuda:1") for tensor in found.values())
    assert_same(on_cpu(found), run_on_gpu(case))


def test_a_call_that_mixes_devices_is_refused() -> None:
    with pytest.raises(RuntimeError, match="weight_ih_l0: expected on cuda:0"):
        fused_rnn.LSTM(5, 7)(torch.zeros(3, 2, 5, device="cuda"))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("case", [*LAYER_CASES[::10], *CELL_CASES[:3]], ids=str)
def test_nothing_waits_for_the_device(case: Case | CellCase, name: str) -> None:
    module, data = case.build(fused_rnn).cuda(), case.data().to("cuda")
    leaves = [*data.leaves.values(), *module.parameters()]
    with variant(name):
        call = (data.input, data.hx)
        outputs = list(case.outputs(module(*call)).values())
        seeds = [torch.ones_like(x) for x in outputs]
        # Kept, because the packed input is part of it: packing copies indices to the GPU and waits for that.
        torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(list(case.outputs(module(*call)).values()), leaves, seeds)
            with torch.no_grad():
                module(*call)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Determinism and memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
def test_same_call_again_gives_the_same_bits(cell: str, name: str, dtype: torch.dtype) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True, hidden_size=96, batch=40, steps=30, dtype=dtype)
    with variant(name):
        first = run_on_gpu(case)
        for _ in range(5):
            assert_same(run_on_gpu(case), first)


def peak_memory(action: Callable[[], Any]) -> int:
    """Bytes allocated at the most during the action, above what was allocated before."""
    action()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_a_training_step_takes_no_more_memory_than_torch_nn(cell: str, dtype: torch.dtype) -> None:
    case = Case(cell=cell, input_size=256, hidden_size=256, batch=32, steps=256, dtype=dtype)

    def step_of(module: nn.Module) -> Callable[[], None]:
        sequence = case.data().sequence.detach().cuda()

        def step() -> None:
            module.zero_grad(set_to_none=True)
            module(sequence)[0].sum().backward()

        return step

    module, twin = (part.cuda() for part in case.twins())
    flatten_weights(twin)
    assert peak_memory(step_of(module)) <= peak_memory(step_of(twin))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(cell: str, name: str) -> None:
    case = Case(cell=cell, num_layers=2, hidden_size=24, hx=True)
    module, data = case.build(fused_rnn).cuda(), case.data().to("cuda")
    leaves = [*data.leaves.values(), *module.parameters()]
    with variant(name):
        output = case.outputs(module(data.input, data.hx))["output"]
        first = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
        last = torch.autograd.grad(output, leaves, torch.ones_like(output))
    names = [str(i) for i in range(len(leaves))]
    assert_same(dict(zip(names, last, strict=True)), dict(zip(names, first, strict=True)))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
def test_gates_that_are_computed_again_give_the_same_bits(cell: str, name: str) -> None:
    case = Case(cell=cell, num_layers=2, bidirectional=True, hidden_size=24, packing="unsorted", hx=True)
    module, data = case.build(fused_rnn).cuda(), case.data().to("cuda")
    with variant(name):
        expected = run(module, data)
        module.recompute = True
        assert_same(run(module, data), expected)


def test_calls_leave_no_memory_behind() -> None:
    case = Case(num_layers=2, bidirectional=True, hidden_size=64, batch=8, packing="unsorted")
    run_on_gpu(case)
    before = torch.cuda.memory_allocated()
    run_on_gpu(case)
    assert torch.cuda.memory_allocated() == before


# PyTorch around it


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_match_finite_differences(cell: str) -> None:
    case = Case(cell=cell, hidden_size=3, steps=2, batch=2, input_size=2, dtype=torch.float64)
    module, sequence = case.build(fused_rnn).cuda(), case.data().sequence.detach().cuda().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (sequence,))


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_over_an_ensemble_equals_a_loop(cell: str) -> None:
    case = Case(cell=cell, dtype=torch.float64)
    modules = [case.build(fused_rnn, seed=seed).cuda() for seed in range(3)]
    sequence = case.data().sequence.detach().cuda()
    parameters, buffers = torch.func.stack_module_state(modules)

    def output(values: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(modules[0], (values, rest), (sequence,))[0]

    found = torch.vmap(output)(parameters, buffers)
    assert_close_to_twin({"output": found}, {"output": torch.stack([module(sequence)[0] for module in modules])})


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_compiled_without_a_graph_break_gives_the_same(cell: str) -> None:
    case = Case(cell=cell, num_layers=2)
    module, sequence = case.build(fused_rnn).cuda(), case.data().sequence.detach().cuda()

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    leaves = list(module.parameters())
    expected = torch.autograd.grad(loss(sequence), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(sequence), leaves)
    names = [str(i) for i in range(len(leaves))]
    assert_close_to_twin(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


def test_operators_pass_opcheck() -> None:
    from test_operators import recorded_calls

    for case in (Case(cell="GRU", num_layers=2, bidirectional=True, packing="unsorted"), CellCase(cell="LSTM")):
        for operator, args, kwargs in recorded_calls(case, "cuda"):
            if operator.overloadpacket.__name__ == "rnn_backward":
                assert args[-1], "nothing else reads the saved gates"
                args = (*args[:-1], False)
            torch.library.opcheck(operator, args, kwargs)


def test_explain_and_info_name_the_device_and_its_kernels() -> None:
    from fused_rnn import info

    layer = fused_rnn.LSTM(64, 128, dtype=torch.bfloat16, device="cuda")
    explanation = fused_rnn.explain(layer, torch.zeros(50, 8, 64, dtype=torch.bfloat16, device="cuda"))
    assert explanation.backend == "fused"
    assert explanation.plan is not None and explanation.plan["variant"] in VARIANTS
    assert "cuda:0" in str(explanation)
    report = info.collect()
    assert report["cuda"]["kernels"] and report["cuda"]["why_off"] is None
    assert torch.cuda.get_device_name(0) in info.render(report)


def test_packed_input_of_one_long_sequence_is_right() -> None:
    case = Case(batch=3, steps=1200, hidden_size=16)
    module, sequence = case.build(fused_rnn).cuda(), case.data().sequence.detach().cuda()
    packed = pack_padded_sequence(sequence, torch.tensor([1200, 700, 1]))
    with torch.no_grad():
        found = module(packed)[1]
        alone = [module(sequence[:length, row : row + 1])[1] for row, length in enumerate((1200, 700, 1))]
    for i in range(2):
        expected = torch.cat([states[i] for states in alone], dim=1)
        assert_within({"state": found[i].cpu()}, {"state": expected.double().cpu()})
