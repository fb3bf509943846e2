"""Options within the recurrence, resets and returned states on the CUDA operators, executed as in test_cuda_ops.py.

Which options a layer has is decided for CPU tensors here, as in all of these tests: what a CUDA tensor changes about it
is in `test_what_a_cuda_tensor_...`.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import test_resets
import test_return_states
import torch
from support.cases import Case, incoming_gradients, run
from support.compare import assert_close_to_twin, assert_same, assert_within
from support.pairwise import Row, pairwise
from support.values import data
from test_cuda_ops import (
    PERSISTENT,
    _allow,
    _cuda_operators,  # noqa: F401  (a fixture)
)
from test_resets import (
    test_a_row_whose_resets_no_live_step_follows_ends_in_the_fresh_state,  # noqa: F401
    test_marks_of_other_bytes_than_0_and_1_and_of_other_strides,  # noqa: F401
    test_no_gradient_crosses_a_reset,  # noqa: F401
    test_what_a_row_of_a_marked_first_step_was_given_leaks_nowhere,  # noqa: F401
    test_what_reset_state_has_for_rows_without_a_mark_leaks_nowhere,  # noqa: F401
)
from test_return_states import (
    test_rows_without_a_step_that_counts_keep_their_initial_state,  # noqa: F401
    test_the_last_states_are_the_final_ones_and_the_output_is_the_top_layers,  # noqa: F401
)
from test_within import test_rates_of_1_and_of_0  # noqa: F401
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import backend as backends
from fused_rnn import check, functional, ops
from fused_rnn.settings import ACTIVATIONS, OPERATORS_VERSION, CellKind, Settings, Steps, Within

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:.*verriding a previously registered kernel"),
]

F64 = torch.float64


@pytest.fixture
def backend() -> Any:
    """Of the tests of other files: the kernels, wherever they take a call."""
    with fused_rnn.use_backend("auto"):
        yield "fused"


# ---- each option alone ----------------------------------------------------------------------------------------------

# A fibre runs for each CUDA thread: few steps, rows and units.
ALONE = [
    dataclasses.replace(call, steps=6, batch=4, input_size=5, hidden_size=12) for call in check.calls() if call.option
]


@pytest.mark.parametrize("call", ALONE, ids=str)
def test_each_option_matches_the_float64_formulas(call: check.Call) -> None:
    with fused_rnn.use_backend("fused"):
        found = call.run(call.build())
    assert_within(found, call.reference())


# ---- in one launch for all steps -------------------------------------------------------------------------------------

IN_LAUNCHES = [
    dataclasses.replace(call, steps=5, batch=9, input_size=5, hidden_size=16)
    for call in check.calls()
    if call.option in ("recurrent_dropout", "zoneout", "reset", "recurrent_grad_clip", "bptt_steps", "cell_clip")
    and call.dtype == torch.float32
]


def _expect_launches(variant: str, dtype: torch.dtype) -> None:
    kernels = f"{variant} {str(dtype).removeprefix('torch.')}"
    assert torch.ops.fused_rnn_host.launches() == [f"{kernels} forward"] * 2 + [f"{kernels} backward"] * 2


# What 16 bits round moves c across its clip, where a derivative jumps.
ONE_LAUNCH = [
    (call, *kernels)
    for call in IN_LAUNCHES
    for kernels in PERSISTENT
    if kernels[2].itemsize > 2 or call.option != "cell_clip"
]


@pytest.mark.parametrize(("call", "variant", "team_blocks", "dtype"), ONE_LAUNCH, ids=str)
def test_options_of_one_launch_match_the_float64_formulas(
    call: check.Call, variant: str, team_blocks: int, dtype: torch.dtype
) -> None:
    call = dataclasses.replace(call, dtype=dtype)
    _allow(variant, team_blocks=team_blocks)
    with fused_rnn.use_backend("fused"):
        found = call.run(call.build())
    _expect_launches(variant, dtype)
    assert_within(found, call.reference())


@pytest.mark.parametrize(("variant", "team_blocks", "dtype"), PERSISTENT, ids=str)
@pytest.mark.parametrize(("cell", "pattern"), [("LSTM", "some"), ("GRU", "first"), ("RNN_TANH", "ends")])
def test_resets_of_one_launch_match_the_float64_definition(
    cell: str, pattern: str, variant: str, team_blocks: int, dtype: torch.dtype
) -> None:
    case = Case(
        cell=cell, hidden_size=16, num_layers=2, bidirectional=True, batch=9, steps=5, hx=True, dtype=dtype
    )  # fmt: skip
    call = test_resets.Call(case, pattern, counts="mask")
    _allow(variant, team_blocks=team_blocks)
    with fused_rnn.use_backend("fused"):
        found = test_resets.run_call(call)
    _expect_launches(variant, dtype)
    assert_within(found, test_resets.by_hand(call))


@pytest.mark.parametrize(("variant", "team_blocks", "dtype"), PERSISTENT, ids=str)
@pytest.mark.parametrize("layout", ["mask", "reset and mask", "packed"])
def test_clips_of_one_launch_are_those_of_a_launch_a_step(
    layout: str, variant: str, team_blocks: int, dtype: torch.dtype
) -> None:
    """Which gradients are clipped depends on the steps that count, however many others stand between them."""
    torch.manual_seed(0)
    layer = fused_rnn.GRU(5, 16, bidirectional=True, recurrent_grad_clip=0.05, dtype=dtype)
    x, hx = data(7, 4, 5, seed=5).to(dtype).requires_grad_(), data(2, 4, 16, seed=6).to(dtype).requires_grad_()
    draws = torch.rand(2, 7, 4, generator=torch.Generator().manual_seed(7))
    given = {"reset": draws[0] > 0.7} if "reset" in layout else {}
    given |= {"mask": draws[1] < 0.5} if "mask" in layout else {}
    leaves = [x, hx, *layer.parameters()]
    results = []
    for name, number in ((variant, team_blocks), ("none", 0)):
        _allow(name, team_blocks=number)
        with fused_rnn.use_backend("fused"):
            argument: Any = pack_padded_sequence(x, [7, 5, 5, 1]) if layout == "packed" else x
            outputs = check._tensors(layer(argument, hx, **given))
            found = torch.autograd.grad(outputs, leaves, [20 * g for g in incoming_gradients(outputs)])
        assert bool(torch.ops.fused_rnn_host.launches()) == (name != "none")
        results.append({str(k): t.detach() for k, t in enumerate((*outputs, *found))})
    assert_within(results[0], {key: t.double() for key, t in results[1].items()})


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_options_go_on_from_launch_to_launch_without_gradients(cell: str) -> None:
    """The steps of several launches, each of which begins from what the one before has left."""
    torch.manual_seed(0)
    layer = getattr(fused_rnn, cell)(
        5, 16, bidirectional=True, recurrent_dropout=0.3, zoneout=0.3, dtype=torch.bfloat16
    )
    x = torch.randn(7, 3, 5, dtype=torch.bfloat16)
    reset = torch.rand(7, 3) < 0.3

    def result(most_steps: int) -> Tensor:
        _allow("cluster", team_blocks=2, most_steps=most_steps)
        torch.manual_seed(1)
        with torch.no_grad(), fused_rnn.use_backend("fused"):
            output: Tensor = layer(x, reset=reset)[0]
        assert len(torch.ops.fused_rnn_host.launches()) == (1 if most_steps == 0 else -(-7 // most_steps))
        return output

    for most_steps in (1, 3):
        assert_same([result(most_steps)], [result(0)])


# ---- several together -----------------------------------------------------------------------------------------------

FACTORS: dict[str, tuple[Any, ...]] = {
    "name": ("LSTM", "GRU", "RNN", "LSTM "),  # the LSTM has most options
    "activation": ACTIVATIONS,
    "recurrent_activation": ("sigmoid", "hard_sigmoid", "softsign"),
    "peephole": (False, True),
    "coupled_gates": (False, True),
    "num_heads": (1, 2, 6),
    "cell_clip": (None, 0.4),
    "layer_norm": (False, True),
    "zoneout": (0.0, 0.3),
    "zoneout_cell": (0.0, 0.3),
    "recurrent_dropout": (0.0, 0.3),
    "recurrent_grad_clip": (None, 0.1),
    "bptt_steps": (None, 2),
    "training": (True, False),
    "bias": (True, False),
    "proj_size": (0, 4),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "recompute": (False, True),
    "layout": ("padded", "batch first", "mask", "packed", "reset", "reset and mask"),
    "reset_state": (False, True),
    "return_states": (False, True),
    "hx": (False, True),
}
NOT_FOR = {
    "LSTM": set(),
    "GRU": {"peephole", "coupled_gates", "cell_clip", "zoneout_cell", "proj_size"},
    "RNN": {"peephole", "coupled_gates", "cell_clip", "zoneout_cell", "proj_size", "recurrent_activation"},
}


def _makes_sense(row: Row) -> bool:
    return (
        (row["num_heads"] == 1 or not row["proj_size"])
        and (not row["reset_state"] or "reset" in row["layout"])
        and (row["bptt_steps"] is None or (not row["bidirectional"] and row["layout"] in ("padded", "reset")))
        # gradients of means are for the formulas there
        and (row["name"] != "RNN" or row["training"] or not row["zoneout"])
    )


def _without_what_does_not_fit(row: Row) -> Row:
    name = row["name"].strip()
    return {key: FACTORS[key][0] if key in NOT_FOR[name] else level for key, level in (row | {"name": name}).items()}


ROWS = list(
    {str(row): row for row in map(_without_what_does_not_fit, pairwise(FACTORS, allowed=_makes_sense, candidates=30))}
    .values()
)  # fmt: skip
# A GRU whose reset gate is before the product: every pair of what it may have beside that.
BEFORE = {"name": "GRU", "reset_after": False}
ROWS_BEFORE = [
    row | BEFORE
    for row in pairwise(
        {key: levels for key, levels in (FACTORS | {"name": ("GRU",), "layer_norm": (False,)}).items()
         if key not in NOT_FOR["GRU"]} | {"proj_size": (0,)},
        allowed=_makes_sense,
        candidates=30,
    )
]  # fmt: skip
T, B, INPUT, H = 5, 4, 3, 6


def _results(row: Row) -> dict[str, Tensor]:
    """Outputs, and gradients of everything, of a call with the draws of one seed."""
    keywords = dict(row)
    name, layout, training, hx = (keywords.pop(key) for key in ("name", "layout", "training", "hx"))
    has_reset_state, return_states = keywords.pop("reset_state"), keywords.pop("return_states")
    for key in NOT_FOR[name]:
        keywords.pop(key, None)
    if name == "RNN":
        keywords["nonlinearity"] = keywords.pop("activation")
    torch.manual_seed(3)
    layer = getattr(fused_rnn, name)(INPUT, H, batch_first=layout == "batch first", dtype=F64, **keywords)
    check.draw_gains_(layer)
    layer.train(training)
    rows, sizes = row["num_layers"] * (1 + row["bidirectional"]), (row["proj_size"] or H, H)
    count = 2 if name == "LSTM" else 1

    def states(seed: int) -> list[Tensor]:
        return [data(rows, B, size, seed=seed + k).requires_grad_() for k, size in enumerate(sizes[:count])]

    def as_argument(given: list[Tensor]) -> Any:
        return tuple(given) if count == 2 else given[0]

    x = data(*((B, T) if layout == "batch first" else (T, B)), INPUT, seed=5).requires_grad_()
    leaves = {"x": x} | dict(layer.named_parameters())
    given: dict[str, Any] = {"return_states": True} if return_states else {}
    hx_given: Any = None
    if hx:
        initial = states(10)
        leaves |= {f"hx{k}": state for k, state in enumerate(initial)}
        hx_given = as_argument(initial)
    draws = torch.rand(2, T, B, generator=torch.Generator().manual_seed(7))
    draws[:, :, 1] = 1  # a row without a step that counts
    if "reset" in layout:
        given["reset"] = draws[0] > 0.6
    if has_reset_state:
        anew = states(20)
        leaves |= {f"anew{k}": state for k, state in enumerate(anew)}
        given["reset_state"] = as_argument(anew)
    if "mask" in layout:
        given["mask"] = draws[1] < 0.6
    argument: Any = pack_padded_sequence(x, [5, 3, 3, 1]) if layout == "packed" else x
    torch.manual_seed(1)
    results = layer(argument, hx_given, **given)
    outputs = check._tensors(results)
    found = torch.autograd.grad(
        outputs, list(leaves.values()), incoming_gradients(outputs), allow_unused=True, materialize_grads=True
    )
    named = {f"output{k}": output.detach() for k, output in enumerate(outputs)}
    return named | {f"grad({name})": gradient for name, gradient in zip(leaves, found, strict=True)}


FIRST = {key: levels[0] for key, levels in FACTORS.items()} | {"reset_after": True}


def _name_of(row: Row) -> str:
    return " ".join(f"{key}={value}" for key, value in row.items() if value != FIRST[key] or key == "name")


@pytest.mark.parametrize("row", ROWS + ROWS_BEFORE, ids=_name_of)
def test_options_together_match_the_formulas(row: Row) -> None:
    results = []
    for name in ("fused", "reference"):
        with fused_rnn.use_backend(name):
            results.append(_results(row))
    assert_close_to_twin(*results)


@pytest.mark.parametrize("index", range(0, len(test_resets.DRAWN), 8), ids=lambda i: str(test_resets.DRAWN[i]))
def test_resets_match_the_float64_definition(index: int) -> None:
    with fused_rnn.use_backend("fused"):
        assert_within(test_resets.run_call(test_resets.DRAWN[index]), test_resets.by_hand(test_resets.DRAWN[index]))


DESIGNED = test_return_states.DESIGNED


@pytest.mark.parametrize("index", range(0, len(DESIGNED), 3), ids=lambda i: str(DESIGNED[i]))
def test_returned_states_match_the_float64_definition(index: int) -> None:
    with fused_rnn.use_backend("fused"):
        assert_within(test_return_states.run_call(DESIGNED[index]), test_return_states.by_hand(DESIGNED[index]))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_what_a_row_begins_anew_from_leaks_nowhere_where_no_step_follows(cell: str) -> None:
    """Not into the gradients of weights either, which are sums over all rows."""
    torch.manual_seed(0)
    layer = getattr(fused_rnn, cell)(3, 4, num_layers=2, recurrent_dropout=0.3)
    x = torch.randn(5, 3, 3)
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[2:, 1] = False
    reset = torch.zeros(5, 3, dtype=torch.bool)
    reset[3, 1] = True

    def result(value: float) -> list[Tensor]:
        anew = torch.zeros(2, 3, 4)
        anew[:, 1] = value
        torch.manual_seed(1)
        given: dict[str, Any] = {"reset": reset, "reset_state": (anew, anew) if cell == "LSTM" else anew}
        with fused_rnn.use_backend("fused"):
            output = layer(x, mask=mask, **given)[0]
        return [output, *torch.autograd.grad(output.sum(), list(layer.parameters()))]

    assert_same(result(float("nan")), result(0.0))


# ---- the reset gate before the product ------------------------------------------------------------------------------


@pytest.mark.parametrize("most_steps", [0, 1, 3])
@pytest.mark.parametrize("layout", ["packed", "reset and mask"])
def test_without_gradients_the_reset_gate_is_before_the_product_too(layout: str, most_steps: int) -> None:
    """Nothing is saved then: what it leaves of h has memory of its own, and projections come some steps at a time."""
    torch.manual_seed(0)
    layer = fused_rnn.GRU(
        INPUT, H, num_layers=2, bidirectional=True, reset_after=False, recurrent_dropout=0.3, dtype=F64
    )
    x: Any = data(7, B, INPUT, seed=5)
    draws = torch.rand(2, 7, B, generator=torch.Generator().manual_seed(7))
    given = {"reset": draws[0] > 0.6, "mask": draws[1] < 0.6} if layout != "packed" else {}
    x = pack_padded_sequence(x, [7, 5, 5, 1]) if layout == "packed" else x
    results = []
    for name in ("fused", "reference"):
        _allow("none", most_steps=most_steps)
        torch.manual_seed(1)
        with torch.no_grad(), fused_rnn.use_backend(name):
            outputs = check._tensors(layer(x, data(4, B, H, seed=6), **given))
        results.append({str(k): output for k, output in enumerate(outputs)})
    assert_close_to_twin(*results)


@pytest.mark.parametrize("options", [{}, {"activation": "softsign", "bptt_steps": 2}], ids=str)
def test_second_derivatives_where_the_reset_gate_is_before_the_product(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = fused_rnn.GRU(INPUT, 4, reset_after=False, dtype=F64, **options)
    leaves = [data(3, 2, INPUT).requires_grad_(), *layer.parameters()]
    results = []
    for name in ("fused", "reference"):
        with fused_rnn.use_backend(name):
            first = torch.autograd.grad(layer(leaves[0])[0].square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append({str(k): t.detach() for k, t in enumerate((*first, *second))})
    assert_close_to_twin(*results)


def test_operators_refuse_a_reset_gate_before_the_product_where_no_kernel_has_it() -> None:
    def forward(library: Any, kind: CellKind, within: Within) -> None:
        gates = kind.num_gates * 4
        params = [torch.zeros(*shape) for shape in ((gates, 3), (gates, 4), (gates,), (gates,))]
        params += [torch.zeros(gates) for _ in range(2 if within.layer_norm else 0)]
        integers = [kind, 1, 1, 0, 0, 0, *within.integers(), OPERATORS_VERSION]
        library.rnn_forward(torch.zeros(5, 2, 3), None, None, params, [], integers, within.numbers(), True)

    before = Within(reset_after=False)
    forward(torch.ops.fused_rnn_host, CellKind.GRU, before)
    for kind, within in ((CellKind.RNN_TANH, before), (CellKind.GRU, before._replace(layer_norm=True))):
        with pytest.raises(RuntimeError, match="reset_after: expected True but for a GRU without layer_norm"):
            forward(torch.ops.fused_rnn_host, kind, within)


# ---- what runs where ------------------------------------------------------------------------------------------------


def _launches_of(**options: Any) -> list[str]:
    case = Case(hidden_size=16, num_layers=2, batch=9, steps=4, dtype=torch.bfloat16)
    call = {name: options.pop(name) for name in ("reset", "return_states") if name in options}
    torch.manual_seed(0)
    layer = fused_rnn.LSTM(5, 16, num_layers=2, dtype=torch.bfloat16, **options)
    _allow("cluster", team_blocks=2)
    output = layer(case.data().sequence, **call)
    sum(t.float().sum() for t in (output[0], *check._tensors(output[2:]))).backward()
    return list(torch.ops.fused_rnn_host.launches())


def _expected_launches(settings: Settings) -> list[str]:
    return [
        f"cluster bfloat16 {which}"
        for which in ("forward", "backward")
        if ops.why_step_by_step(settings, which == "backward") is None
        for _ in range(2)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 4},
        {"recurrent_grad_clip": 1.0},
        {"bptt_steps": 2},
        {"num_heads": 4, "return_states": True},
        {"peephole": True},
        {"zoneout": 0.1, "zoneout_cell": 0.1},
        {"recurrent_dropout": 0.2},
        {"reset": torch.zeros(4, 9, dtype=torch.bool)},
        {"zoneout": 0.1, "recurrent_grad_clip": 1.0, "reset": torch.zeros(4, 9, dtype=torch.bool)},
        {"recurrent_dropout": 0.2, "cell_clip": 1.0},
        {"bptt_steps": 2, "recurrent_grad_clip": 1.0, "cell_clip": 1.0, "coupled_gates": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_one_launch_for_all_steps_is_taken_where_explain_says_so(options: dict[str, Any]) -> None:
    layer = fused_rnn.LSTM(5, 16, **{name: v for name, v in options.items() if name not in ("reset", "return_states")})
    steps = Steps(return_states=options.get("return_states", False))
    settings = functional.settings_of_operator(layer._settings(), steps, 4)
    with fused_rnn.use_backend("fused"):
        assert _launches_of(**options) == _expected_launches(settings)


def test_states_without_gradients_come_from_the_kernels_of_all_steps() -> None:
    layer = fused_rnn.LSTM(5, 16, num_layers=2, dtype=torch.bfloat16)
    x = torch.randn(4, 9, 5, dtype=torch.bfloat16)
    _allow("cluster", team_blocks=2)
    with fused_rnn.use_backend("fused"):
        output, _, states = layer(x, return_states=True)
        output.float().sum().backward()
    kernels = [f"cluster bfloat16 {which}" for which in ("forward", "backward") for _ in range(2)]
    assert torch.ops.fused_rnn_host.launches() == kernels
    assert_same(states[0][1].detach(), output.detach())


def test_the_plan_names_what_runs_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"variant": "cluster", "layers": 1, "reason": "", "predicted_us": 1.0}
    monkeypatch.setattr(ops._C, "cuda_plan", lambda *_, options=False: dict(chosen, options=options), raising=False)

    def plan(layer: Any, **more: Any) -> dict[str, Any]:
        device = torch.device("cuda", 0)
        shape: dict[str, Any] = {"T": 9, "B": 4, "batch_sizes": None, "dtype": torch.float32, "device": device}
        return ops.plan(layer._settings(), **shape, training=True, **more)

    both = plan(fused_rnn.LSTM(3, 4, num_heads=2))
    assert both["variant"] == both["backward"]["variant"] == "cluster"
    both = plan(fused_rnn.LSTM(3, 4, num_layers=2, zoneout=0.1, peephole=True), has_reset=True)
    reason = "peephole: for the kernels of one step alone"
    assert both["variant"] == both["backward"]["variant"] == "none"
    assert both["reason"] == both["backward"]["reason"] == reason
    both = plan(fused_rnn.LSTM(3, 4, num_layers=2, zoneout=0.1), has_reset=True)
    assert both["variant"] == both["backward"]["variant"] == "cluster" and both["options"]
    assert "layers with options within the recurrence run one by one" in both["reason"]
    assert not plan(fused_rnn.LSTM(3, 4))["options"]
    both = plan(fused_rnn.GRU(3, 4, reset_after=False))
    assert both["reason"] == both["backward"]["reason"] == "reset_after: for the kernels of one step alone"
    both = plan(fused_rnn.GRU(3, 4, recurrent_grad_clip=1.0))
    assert both["variant"] == both["backward"]["variant"] == "cluster"
    assert not both["options"] and both["backward"]["options"]
    both = plan(fused_rnn.LSTM(3, 4, cell_clip=1.0, recurrent_grad_clip=1.0, bptt_steps=2))
    assert both["variant"] == both["backward"]["variant"] == "cluster" and both["options"]
    within = Within(return_states=True)
    assert ops.why_step_by_step(Settings(3, 4, 4, CellKind.GRU, within=within), False) is None
    reason = ops.why_step_by_step(Settings(3, 4, 4, CellKind.GRU, within=within), True)
    assert reason is not None and "gradients of return_states" in reason


def test_what_a_cuda_tensor_has_no_kernel_for(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda: Any = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    all_others = {"zoneout": 0.5, "peephole": True, "num_heads": 2, "recurrent_grad_clip": 1.0, "layer_norm": True}
    assert ops.why_not_within(CellKind.LSTM, Within(**all_others), on_cuda, True) is None
    monkeypatch.setattr(ops, "why_not_fused", lambda input: None)
    settings = Settings(4, 4, 4, CellKind.RNN_TANH, within=Within(zoneout=0.5))
    with fused_rnn.use_backend("fused"), pytest.raises(RuntimeError, match="no fused kernel has zoneout of an RNN"):
        backends.why_reference(on_cuda, settings, recorded=True)


def test_the_reset_gate_is_before_the_product_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what makes CPU tensors of these tests pass for others
    monkeypatch.setattr(ops, "why_not_fused", lambda input: None)
    settings = Settings(3, 4, 4, CellKind.GRU, within=Within(reset_after=False))
    on_cuda: Any = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    with fused_rnn.use_backend("fused"):
        assert backends.why_reference(on_cuda, settings, recorded=True) is None
        with pytest.raises(RuntimeError, match="no fused kernel has reset_after=False for cpu tensors"):
            backends.why_reference(torch.zeros(1), settings)


@pytest.mark.parametrize(
    ("options", "has_reset", "sliced"),
    [({}, False, True), ({"num_heads": 2}, False, True), ({}, True, False), ({"zoneout": 0.1}, False, False)],
    ids=str,
)
def test_what_a_cuda_tensor_takes_in_slices_of_bptt_steps(options: Any, has_reset: bool, sliced: bool) -> None:
    """A slice of the plain cell is one launch; what runs step by step anyway is one call."""
    on_cuda: Any = types.SimpleNamespace(is_cuda=True)
    settings = fused_rnn.LSTM(3, 4, bptt_steps=2, **options)._settings()
    steps = Steps(reset=torch.zeros(4, 1) if has_reset else None)
    assert functional._is_sliced(settings, steps, on_cuda) is sliced


# ---- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("units", [1, 7, 8, 13, 64])
def test_bits_are_those_that_the_cpu_draws(units: int, rate: float) -> None:
    for seeds in ([0], [-6], [2**62 + 1], [5, -6]):
        arguments = (torch.tensor(seeds), 2, 5, units, rate)
        found = torch.ops.fused_rnn_host.draw_bits(*arguments)
        assert_same(found, torch.ops.fused_rnn.draw_bits(*arguments))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_options_that_change_nothing_are_the_plain_kernels(cell: str) -> None:
    """Marks of False, and gates by way of the options' functions: the numbers of a call without."""
    case = Case(cell=cell if cell != "RNN" else "RNN_TANH", hidden_size=8, num_layers=2, bidirectional=True, hx=True)
    module, of_call = case.build(fused_rnn), case.data()
    with fused_rnn.use_backend("fused"):
        found = run(module, of_call, reset=torch.zeros(case.steps, case.batch, dtype=torch.bool))
        assert_close_to_twin(found, run(module, of_call))
