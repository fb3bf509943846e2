"""The CUDA operators on the CPU: csrc/ops_cuda.cpp with products by at::mm and its kernels on the host engine.

What these tests cannot see: cuBLAS, streams, devices. Those are in test_cuda.py, which needs a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import cuda_ops
from support.cases import CELLS, Case, CellCase, run
from support.compare import assert_same, assert_within
from support.pairwise import Row, pairwise

import fused_rnn
from fused_rnn import functional, ops
from fused_rnn.check import scaled_errors
from fused_rnn.settings import NOTHING_WITHIN, Controls, Settings

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:.*verriding a previously registered kernel"),
]

NAMES = ("rnn_forward", "rnn_backward", "cell_forward", "cell_backward")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Few sizes: a fibre runs for each CUDA thread. H 8 and 16 have vectors of 16 bytes, the others have not.
FACTORS = {
    "cell": CELLS,
    "input_size": (1, 3, 17),
    "hidden_size": (1, 7, 8, 16),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "proj": (False, True),
    "batch_first": (False, True),
    "packing": ("padded", "sorted", "unsorted"),
    "batch": (1, 2, 5),
    "steps": (1, 2, 5),
    "hx": (False, True),
    "dtype": DTYPES,
}


def _has_projection(row: Row) -> bool:
    return not row["proj"] or (row["cell"] == "LSTM" and row["hidden_size"] > 1)


CASES = [Case(**row) for row in pairwise(FACTORS, allowed=_has_projection)]
CELL_CASES = [
    CellCase(cell=cell, hidden_size=hidden_size, bias=bias, batch=batch, dtype=dtype)
    for cell in CELLS
    for dtype, hidden_size, bias, batch in (
        (torch.float32, 7, True, 4),
        (torch.float64, 16, False, 1),
        (torch.bfloat16, 8, True, 3),
        (torch.float16, 5, False, None),
    )
]


@pytest.fixture(autouse=True)
def _cuda_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls on CPU tensors go to the CUDA operators of this build instead of the CPU's. TF32 is off."""
    cuda_ops.load()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(ops, "_RESETS_BEFORE_PRODUCT", {"cpu"})
    library = torch.library.Library("fused_rnn", "IMPL")
    for name in NAMES:
        library.impl(name, getattr(torch.ops.fused_rnn_host, name).default, "CPU", allow_override=True)
    _allow("none")
    yield
    library._destroy()


def _allow(variant: str, *, team_blocks: int = 0, most_columns: int = 0, most_steps: int = 0, layers: int = 1) -> None:
    """Makes every layer run in this variant, "none" being a launch a step, wherever it can.

    In inference the projections of ``most_steps`` steps are there at once (0: of as many as the library would take).
    So many ``layers`` run in a wavefront, wherever they fit.
    """
    flags = [name == variant for name in ("block", "cluster", "grid", "none")]
    torch.ops.fused_rnn_host.allow(*flags, team_blocks, most_columns, most_steps, layers)
    torch.ops.fused_rnn_host.launches()


def _reference(case: Case | CellCase) -> dict[str, torch.Tensor]:
    with fused_rnn.use_backend("reference"):
        return run(copy.deepcopy(case.build(fused_rnn)).double(), case.data().to(torch.float64))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_matches_the_float64_reference(case: Case) -> None:
    assert_within(run(case.build(fused_rnn), case.data()), _reference(case))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_layer_without_gradients_matches_the_float64_reference(case: Case) -> None:
    module, data = case.build(fused_rnn), case.data()
    with torch.no_grad():
        found = run(module, data, gradients=False)
    assert_within(found, {name: value for name, value in _reference(case).items() if name in found})


@pytest.mark.parametrize("case", CELL_CASES, ids=str)
def test_cell_matches_the_float64_reference(case: CellCase) -> None:
    assert_within(run(case.build(fused_rnn), case.data()), _reference(case))


def test_lists_of_an_exported_program_none_of_which_is_empty_are_those_of_a_plain_cell() -> None:
    """There is a kernel for nothing else."""
    layer, x = fused_rnn.RNN(3, 4, nonlinearity="relu"), torch.randn(5, 2, 3)
    settings, params = layer._settings(), list(layer.parameters())
    nothing = [x.new_empty(0)] * len(Controls())
    lists = (nothing, *settings._replace(within=NOTHING_WITHIN).flatten())
    plain = torch.ops.fused_rnn.rnn_forward(x, None, None, params, [], *settings.flatten(), True)
    assert_same(torch.ops.fused_rnn.rnn_forward(x, None, None, params, *lists, True), plain)


# Variants, teams of so many blocks, and a dtype for each product that the kernels have but TF32's.
PERSISTENT = [
    ("block", 1, torch.bfloat16),
    ("cluster", 2, torch.bfloat16),
    ("cluster", 2, torch.float16),
    ("grid", 2, torch.float32),
]


@pytest.mark.parametrize(("variant", "team_blocks", "dtype"), PERSISTENT, ids=str)
@pytest.mark.parametrize("packing", ["padded", "unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_layer_matches_the_float64_reference(
    cell: str, packing: str, variant: str, team_blocks: int, dtype: torch.dtype
) -> None:
    case = Case(
        cell=cell,
        hidden_size=16,
        num_layers=2,
        bidirectional=True,
        batch=9,
        steps=4,
        packing=packing,
        batch_first=True,
        hx=packing == "padded",
        dtype=dtype,
    )
    _allow(variant, team_blocks=team_blocks)
    found = run(case.build(fused_rnn), case.data())
    kernels = f"{variant} {str(dtype).removeprefix('torch.')}"
    assert torch.ops.fused_rnn_host.launches() == [f"{kernels} forward"] * 2 + [f"{kernels} backward"] * 2
    assert_within(found, _reference(case))


@pytest.mark.parametrize(("variant", "team_blocks", "dtype"), PERSISTENT, ids=str)
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("packing", ["padded", "unsorted"])
def test_a_layer_with_a_projection_runs_all_steps_in_one_launch(
    packing: str, hx: bool, variant: str, team_blocks: int, dtype: torch.dtype
) -> None:
    """Merged: W_hh W_hr in the place of W_hh. Lengths end, and in the reverse direction begin, in different steps."""
    case = Case(
        hidden_size=16, proj=True, num_layers=2, bidirectional=True, batch=9, steps=5, packing=packing, hx=hx,
        dtype=dtype,
    )  # fmt: skip
    _allow(variant, team_blocks=team_blocks)
    module, data, expected = case.build(fused_rnn), case.data(), _reference(case)
    found = run(module, data)
    kernels = f"{variant} {str(dtype).removeprefix('torch.')}"
    assert torch.ops.fused_rnn_host.launches() == [f"{kernels} forward"] * 2 + [f"{kernels} backward"] * 2
    assert_within(found, expected)
    module.recompute = True
    assert_same(run(module, data), found)
    # In inference the states of a few steps at a time are projected.
    for most_steps in (0, 2):
        _allow(variant, team_blocks=team_blocks, most_steps=most_steps)
        with torch.no_grad():
            inferred = run(module, data, gradients=False)
        parts = 1 if most_steps == 0 else -(-case.steps // most_steps)
        assert torch.ops.fused_rnn_host.launches() == [f"{kernels} forward"] * 2 * parts
        assert_within(inferred, {name: expected[name] for name in inferred})


@pytest.mark.parametrize(
    ("cell", "proj", "variant"),
    [("LSTM", True, "cluster"), ("LSTM", True, "none"), *((cell, False, "none") for cell in CELLS)],
)
def test_each_gradient_alone_is_that_beside_the_others(cell: str, proj: bool, variant: str) -> None:
    case = Case(
        cell=cell, hidden_size=16, proj=proj, bidirectional=True, batch=9, steps=4, hx=True, dtype=torch.bfloat16
    )
    _allow(variant, team_blocks=2)
    module, data = case.build(fused_rnn), case.data()
    states = dict(zip(("h_0", "c_0"), data.states, strict=False))
    wanted = {"input": data.sequence, **states, **dict(module.named_parameters())}
    for results in (("output",), ("h_n",)):

        def grads(*of: torch.Tensor, results: tuple[str, ...] = results) -> tuple[torch.Tensor, ...]:
            found = case.outputs(module(data.sequence, data.states if cell == "LSTM" else data.states[0]))
            return torch.autograd.grad(sum(found[name].float().square().sum() for name in results), of)

        together = grads(*wanted.values())
        assert all(grad.isfinite().all() for grad in together)
        for (name, leaf), expected in zip(wanted.items(), together, strict=True):
            assert torch.equal(grads(leaf)[0], expected), (results, name)
    launches = torch.ops.fused_rnn_host.launches()
    assert ("cluster bfloat16 backward" in launches) == (variant == "cluster")


@pytest.mark.parametrize(("variant", "team_blocks", "dtype"), PERSISTENT, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_whose_step_is_a_persistent_kernel_matches_the_float64_reference(
    cell: str, variant: str, team_blocks: int, dtype: torch.dtype
) -> None:
    """As the planner wants it for thousands of rows."""
    case = CellCase(cell=cell, hidden_size=16, batch=9, dtype=dtype)
    _allow(variant, team_blocks=team_blocks)
    found = run(case.build(fused_rnn), case.data())
    kernels = f"{variant} {str(dtype).removeprefix('torch.')}"
    assert torch.ops.fused_rnn_host.launches() == [f"{kernels} forward", f"{kernels} backward"]
    assert_within(found, _reference(case))


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_is_rounded_to_tf32_where_the_flag_of_rnns_allows_it(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    case = Case(hidden_size=16, batch=9, steps=4)
    _allow("cluster", team_blocks=2)
    found = run(case.build(fused_rnn), case.data())
    product = "tf32" if allowed else "float32"
    assert torch.ops.fused_rnn_host.launches() == [f"cluster {product} forward", f"cluster {product} backward"]
    worst = max(scaled_errors(found, _reference(case)).values())
    # 2^13 epsilons of float32 are 2^-10: what TF32 rounds a product by at most.
    assert 100 < worst < 2.0**13 if allowed else worst <= 32


@pytest.mark.parametrize("cell", CELLS)
def test_persistent_layer_without_gradients_gives_the_same_bits_as_with_them(cell: str) -> None:
    case = Case(cell=cell, hidden_size=16, num_layers=2, steps=4, hx=True, dtype=torch.bfloat16)
    module, data = case.build(fused_rnn), case.data()
    _allow("cluster", team_blocks=2)
    with torch.no_grad():
        found = run(module, data, gradients=False)
    assert torch.ops.fused_rnn_host.launches() == ["cluster bfloat16 forward"] * 2
    with_gradients = run(module, data)
    assert_same(found, {name: with_gradients[name] for name in found})


@pytest.mark.parametrize(
    ("variant", "most_steps"), [("none", 2), ("none", 1), ("block", 2), ("cluster", 2), ("grid", 1)]
)
@pytest.mark.parametrize("packing", ["padded", "unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_projections_of_few_steps_at_a_time_change_no_bit(
    cell: str, packing: str, variant: str, most_steps: int
) -> None:
    case = Case(
        cell=cell,
        hidden_size=16,
        num_layers=2,
        bidirectional=True,
        batch=9,
        steps=5,
        packing=packing,
        hx=packing == "padded",
        dtype=torch.bfloat16,
    )
    module, data = case.build(fused_rnn), case.data()
    limits = {"team_blocks": 1 if variant == "block" else 2, "most_columns": 4}

    def infer(most_steps: int) -> tuple[dict[str, torch.Tensor], int]:
        _allow(variant, most_steps=most_steps, **limits)
        with torch.no_grad():
            result = run(module, data, gradients=False)
        return result, len(torch.ops.fused_rnn_host.launches())

    expected, launches = infer(0)
    found, parts = infer(most_steps)
    # The plain recurrence has its projections in its output.
    expected_parts = 1 if cell.startswith("RNN") else -(-case.steps // most_steps)
    assert parts == launches * expected_parts == (0 if variant == "none" else 2 * expected_parts)
    assert_same(found, expected)


@pytest.mark.parametrize("variant", ["none", "block", "cluster", "grid"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_gate_gradients_in_the_place_of_the_gates_change_nothing(cell: str, variant: str) -> None:
    case = Case(cell=cell, hidden_size=16, num_layers=2, bidirectional=True, batch=9, steps=4, dtype=torch.bfloat16)
    _allow(variant, team_blocks=1 if variant == "block" else 2)
    apart = run(case.build(fused_rnn), case.data())

    def backward(*args: Any) -> Any:
        return torch.ops.fused_rnn_host.rnn_backward(*args[:-1], True)

    library = torch.library.Library("fused_rnn", "IMPL")
    library.impl("rnn_backward", backward, "CPU", allow_override=True)
    in_place = run(case.build(fused_rnn), case.data())
    library._destroy()
    assert_same(in_place, apart)


@pytest.mark.parametrize("variant", ["none", "cluster"])
@pytest.mark.parametrize("packing", ["padded", "unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_gates_that_are_computed_again_give_the_same_bits(cell: str, packing: str, variant: str) -> None:
    case = Case(
        cell=cell, hidden_size=16, num_layers=2, bidirectional=True, packing=packing, hx=True, dtype=torch.bfloat16
    )
    _allow(variant, team_blocks=2)
    module = case.build(fused_rnn)
    expected = run(module, case.data())
    module.recompute = True
    assert_same(run(module, case.data()), expected)


def test_a_projected_layer_computes_gates_again() -> None:
    case = Case(hidden_size=8, proj=True, num_layers=2, bidirectional=True, packing="unsorted")
    module = case.build(fused_rnn)
    expected = run(module, case.data())
    module.recompute = True
    assert_same(run(module, case.data()), expected)


def _stack(cell: str, num_layers: int, **other: Any) -> Case:
    shape = {"input_size": 17, "hidden_size": 24, "batch": 9, "steps": 5, "dtype": torch.bfloat16}
    return Case(cell=cell, num_layers=num_layers, **(shape | other))


# Layers of the stack, layers at once, and how many launches of how many layers that makes.
STACKS = [(2, 2, [2]), (3, 3, [3]), (5, 2, [2, 2, 1]), (3, 2, [2, 1]), (4, 4, [4])]


def _launches(kind: str, at_once: list[int], which: str) -> list[str]:
    return [f"cluster {kind} {which}" + (f" of {n} layers" if n > 1 else "") for n in at_once]


@pytest.mark.parametrize(("num_layers", "layers", "at_once"), STACKS, ids=str)
@pytest.mark.parametrize("packing", ["padded", "unsorted"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_layers_in_a_wavefront_match_the_float64_reference(
    cell: str, packing: str, num_layers: int, layers: int, at_once: list[int]
) -> None:
    dtype = torch.float16 if num_layers == 3 else torch.bfloat16
    case = _stack(cell, num_layers, packing=packing, hx=packing == "padded", bias=num_layers != 4, dtype=dtype)
    _allow("cluster", team_blocks=4, layers=layers)
    found = run(case.build(fused_rnn), case.data())
    kind = str(dtype).removeprefix("torch.")
    # The lowest layers and the highest layers run together; those left over follow.
    expected = _launches(kind, at_once, "forward") + _launches(kind, at_once, "backward")
    assert torch.ops.fused_rnn_host.launches() == expected
    assert_within(found, _reference(case))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_wavefront_without_gradients_gives_the_same_bits_as_with_them(cell: str) -> None:
    case = _stack(cell, 3, hx=True)
    module, data = case.build(fused_rnn), case.data()
    results = {}
    for most_steps in (0, 1, 2):
        _allow("cluster", team_blocks=4, layers=2, most_steps=most_steps)
        with torch.no_grad():
            results[most_steps] = run(module, data, gradients=False)
        parts = 1 if most_steps == 0 else -(-case.steps // most_steps)
        once = [_launches("bfloat16", [n], "forward") for n in (2, 1)]
        assert torch.ops.fused_rnn_host.launches() == once[0] * parts + once[1] * parts
    with_gradients = run(module, data)
    for found in results.values():
        assert_same(found, {name: with_gradients[name] for name in found})


def test_frozen_lower_layers_stay_out_of_the_backward_wavefront() -> None:
    case = _stack("LSTM", 4)
    _allow("cluster", team_blocks=4, layers=3)

    def gradients() -> dict[str, torch.Tensor]:
        module, data = case.build(fused_rnn), case.data()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not name.endswith(("_l0", "_l1")))
        module(data.sequence.detach())[0].float().sum().backward()
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    found = gradients()
    launches = torch.ops.fused_rnn_host.launches()
    assert launches == _launches("bfloat16", [3, 1], "forward") + _launches("bfloat16", [1, 1], "backward")
    with fused_rnn.use_backend("reference"):
        expected = gradients()
    assert found.keys() == expected.keys()
    assert_within(found, expected)


def test_layers_whose_gates_are_computed_again_run_one_by_one() -> None:
    """The gates of several layers at once are what they are to keep out of memory."""
    case = _stack("LSTM", 2, hx=True)
    module = case.build(fused_rnn)
    _allow("cluster", team_blocks=4, layers=1)
    expected = run(module, case.data())
    module.recompute = True
    _allow("cluster", team_blocks=4, layers=2)
    found = run(module, case.data())
    forward, backward = (_launches("bfloat16", [1], which) for which in ("forward", "backward"))
    assert torch.ops.fused_rnn_host.launches() == forward * 2 + (forward + backward) * 2
    assert_same(found, expected)


@pytest.mark.parametrize(("packing", "num_layers", "layers"), [("padded", 2, 2), ("unsorted", 3, 3), ("padded", 5, 2)])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_dropout_inside_a_wavefront_matches_the_float64_reference(
    cell: str, packing: str, num_layers: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = _stack(cell, num_layers, packing=packing, dropout=0.5, batch_first=True)
    generator = torch.Generator().manual_seed(3)

    def same_factors(settings: Settings, input: torch.Tensor) -> torch.Tensor:
        """Whatever the dtype; bits as bfloat16 holds them."""
        rows = input.shape[:-1][::-1] if settings.batch_first else input.shape[:-1]
        generator.manual_seed(3)
        return 2 * torch.randint(2, (num_layers - 1, *rows, case.hidden_size), generator=generator).to(input)

    monkeypatch.setattr(functional, "_dropout_factors", same_factors)
    _allow("cluster", team_blocks=4, layers=layers)
    found = run(case.build(fused_rnn), case.data())
    launches = torch.ops.fused_rnn_host.launches()
    assert f"cluster bfloat16 forward of {layers} layers" in launches
    assert f"cluster bfloat16 backward of {layers} layers" in launches
    assert_within(found, _reference(case))
