"""Which CUDA variant the planner chooses for GPUs that are not there: csrc/cuda/plan.cpp is part of every build."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_rnn import _C, ops
from fused_rnn.explain import _describe_pass
from fused_rnn.settings import CellKind, Settings

DEVICES = {
    "A100": {"arch": 80, "sms": 108, "shared": 163, "l2": 40, "max_cluster": 1, "mhz": 1410},
    "H200": {"arch": 90, "sms": 132, "shared": 227, "l2": 50, "max_cluster": 16, "mhz": 1980},
    "B200": {"arch": 100, "sms": 148, "shared": 227, "l2": 126, "max_cluster": 16, "mhz": 1965},
    "RTX 5090": {"arch": 120, "sms": 170, "shared": 99, "l2": 96, "max_cluster": 8, "mhz": 2407},
}
WITH_CLUSTERS = [device for device, properties in DEVICES.items() if properties["max_cluster"] > 1]
CELLS = {"lstm": CellKind.LSTM, "gru": CellKind.GRU, "rnn_tanh": CellKind.RNN_TANH}
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

# The grids of issue-sized benchmarks: FlashRNN's (B 2 to 256 at H 768), haste's (H 128 to 4096), and the CPU table's.
SHAPES = sorted(
    {(16, 64), (32, 64), (1, 256), (64, 512), (64, 1024), (20, 650)}
    | {(batch, 768) for batch in (2, 4, 8, 16, 32, 64, 128, 256)}
    | set(itertools.product((1, 32, 64, 128), (128, 256, 512, 1024, 2048, 4096)))
)
# Stacks: layers, batch size, hidden size.
STACKS = list(itertools.product((2, 3, 4, 6), (1, 16, 64, 256), (13, 64, 128, 256, 384, 512)))
TABLE = Path(__file__).parent / "data" / "cuda_plans.json"


def fields_of(device: str) -> dict[str, Any]:
    d = DEVICES[device]
    return {
        "arch": d["arch"],
        "sms": d["sms"],
        "shared_per_block": d["shared"] * 1024,
        "shared_per_sm": (d["shared"] + 1) * 1024,
        "registers_per_sm": 65536,
        "l2_bytes": d["l2"] << 20,
        "max_cluster": d["max_cluster"],
        "cooperative": True,
        "clock_khz": d["mhz"] * 1000,
    }


def plan(
    device: str, cell: str, dtype: str, batch: int, hidden: int, *, backward: bool, tf32: bool = True, **other: Any
) -> dict[str, Any]:
    return _C.cuda_plan_for(
        CELLS[cell],
        T=other.get("T", 1024),
        B=batch,
        input_size=hidden,
        hidden_size=hidden,
        state_size=other.get("state_size", hidden),
        directions=other.get("directions", 1),
        dtype=DTYPES[dtype],
        backward=backward,
        device=fields_of(device),
        tf32=tf32,
        layers=other.get("layers", 1),
    )


def described(p: dict[str, Any]) -> str:
    """Like ``cluster of 16, 8 teams of 2 columns``."""
    if p["variant"] == "none":
        return "none"
    return f"{p['variant']} of {p['team_blocks']}, {p['teams']} teams of {p['columns']} columns"


def described_stack(p: dict[str, Any]) -> str:
    """Like ``2 layers in a cluster of 16, 8 teams of 2 columns``."""
    return f"{p['layers']} layers in a {described(p)}" if p["layers"] > 1 else "one by one"


def decisions() -> dict[str, dict[str, str]]:
    """What tests/data/cuda_plans.json holds: per device and layer or stack, forward and backward."""
    layers = {
        device: {
            f"{cell} {dtype} B{batch} H{hidden}": "; ".join(
                described(plan(device, cell, dtype, batch, hidden, backward=backward)) for backward in (False, True)
            )
            for cell in ("lstm", "gru")
            for dtype in ("bfloat16", "float32")
            for batch, hidden in SHAPES
        }
        for device in DEVICES
    }
    stacks = {
        device: {
            f"{cell} {dtype} L{count} B{batch} H{hidden}": "; ".join(
                described_stack(plan(device, cell, dtype, batch, hidden, backward=backward, layers=count))
                for backward in (False, True)
            )
            for cell, dtype in (("lstm", "bfloat16"), ("gru", "float16"), ("lstm", "float32"))
            for count, batch, hidden in STACKS
        }
        for device in WITH_CLUSTERS
    }
    return {device: layers[device] | stacks.get(device, {}) for device in DEVICES}


@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_holds_the_weights_and_the_batch(device: str) -> None:
    d = DEVICES[device]
    for cell, dtype, directions, backward in itertools.product(CELLS, BYTES, (1, 2), (False, True)):
        for batch, hidden in [*SHAPES, (3, 1), (7, 13), (300, 100)]:
            p = plan(device, cell, dtype, batch, hidden, backward=backward, directions=directions)
            if p["variant"] == "none":
                assert p["reason"]
                continue
            weights = GATES[cell] * hidden * hidden * BYTES[dtype]
            assert (p["register_bytes"] + p["weight_bytes"]) * p["team_blocks"] >= weights
            assert p["register_bytes"] <= 65536 * 4
            assert p["weight_bytes"] < p["shared_bytes"] <= d["shared"] * 1024
            assert (p["teams"] - 1) * p["columns"] < batch <= p["teams"] * p["columns"]
            assert p["blocks"] == p["teams"] * p["team_blocks"] * directions
            assert p["variant"] != "grid" or p["blocks"] <= d["sms"]
            assert p["variant"] != "cluster" or p["team_blocks"] <= d["max_cluster"]
            assert (p["workspace_bytes"] > 0) == (p["variant"] == "grid")
            assert p["predicted_us"] > 0


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"dtype": "float64", "state_size": 64}, "float64"),
        ({"T": 1 << 30}, "2^31 rows"),
        ({"hidden": 8192, "state_size": 64}, "do not fit"),
        ({"hidden": 8192}, "do not fit"),
    ],
)
def test_what_no_persistent_kernel_takes_says_why(case: dict[str, Any], reason: str) -> None:
    arguments = {"cell": "lstm", "dtype": "bfloat16", "batch": 16, "hidden": 512, "backward": False, **case}
    p = plan("H200", **arguments)
    assert p["variant"] == "none"
    assert reason in p["reason"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_with_a_projection_is_planned_as_one_without(device: str, directions: int, backward: bool) -> None:
    """And the products that it has beside the launch are counted: few steps or a small P may not be worth them."""
    found = set()
    for T, (batch, hidden), P in itertools.product((2, 1024), SHAPES, (16, 320)):
        if P >= hidden:
            continue
        case = {"backward": backward, "directions": directions, "T": T}
        p = plan(device, "lstm", "bfloat16", batch, hidden, state_size=P, **case)
        plain = plan(device, "lstm", "bfloat16", batch, hidden, **case)
        found.add(p["merged"])
        assert p["merged"] == (p["variant"] != "none")
        assert not plain["merged"]
        if not p["merged"]:
            continue
        assert "products for the projection" in p["reason"]
        same = ("variant", "blocks", "teams", "columns", "register_bytes", "shared_bytes", "predicted_us")
        assert plain["variant"] == "none" or {key: p[key] for key in same} == {key: plain[key] for key in same}
    assert found == {False, True}


def test_without_clusters_the_reason_says_so() -> None:
    assert "cluster: this GPU has no clusters" in plan("A100", "lstm", "bfloat16", 16, 512, backward=False)["reason"]


@pytest.mark.parametrize("device", WITH_CLUSTERS)
def test_a_wavefront_holds_the_weights_of_its_layers(device: str) -> None:
    d = DEVICES[device]
    sizes = set()
    for cell, dtype, backward in itertools.product(("lstm", "gru"), ("float16", "float32"), (False, True)):
        for count, batch, hidden in STACKS:
            p = plan(device, cell, dtype, batch, hidden, backward=backward, layers=count)
            assert 1 <= p["layers"] <= min(count, 4)
            sizes.add(p["layers"])
            if p["layers"] == 1:
                assert "one after the other" in p["reason"]
                continue
            # W_hh of each layer, and W_ih of all but the lowest.
            weights = (2 * p["layers"] - 1) * GATES[cell] * hidden * hidden * BYTES[dtype]
            assert (p["register_bytes"] + p["weight_bytes"]) * p["team_blocks"] >= weights
            assert p["register_bytes"] <= 65536 * 4
            assert p["weight_bytes"] < p["shared_bytes"] <= d["shared"] * 1024
            assert (p["teams"] - 1) * p["columns"] < batch <= p["teams"] * p["columns"]
            assert p["variant"] == "cluster"
            assert p["team_blocks"] <= d["max_cluster"]
    assert {1, 2, 3, 4} <= sizes


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"state_size": 64}, "projection"),
        ({"directions": 2}, "both directions"),
        ({"cell": "rnn_tanh"}, "no kernel of several layers"),
        ({"dtype": "float32", "tf32": False}, "no kernel of several layers for this cell in float32"),
        ({"device": "A100"}, "this GPU has no clusters"),
        ({"hidden": 1024}, "a kernel takes"),
    ],
)
def test_layers_that_run_one_by_one_say_why(case: dict[str, Any], reason: str) -> None:
    arguments = {"device": "H200", "cell": "lstm", "dtype": "bfloat16", "batch": 16, "hidden": 128, "layers": 2, **case}
    p = plan(**arguments, backward=False)
    assert p["layers"] == 1
    assert reason in p["reason"]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_explanation_of_a_stack_names_its_wavefronts(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def cuda_plan(*arguments: Any, options: bool = False) -> dict[str, Any]:
        assert not options
        kind, T, B, input_size, hidden_size, state_size, directions, dtype, backward, _, *layers = arguments
        d = fields_of("H200")
        sizes = (kind, T, B, input_size, hidden_size, state_size, directions, dtype, backward)
        return _C.cuda_plan_for(*sizes, d, True, *layers)

    monkeypatch.setattr(_C, "cuda_plan", cuda_plan, raising=False)

    def stack(num_layers: int, bidirectional: bool = False) -> dict[str, Any]:
        return ops.plan(
            Settings(40, 256, 256, CellKind.LSTM, True, num_layers, bidirectional, recompute=recompute),
            T=1024,
            B=16,
            batch_sizes=None,
            dtype=torch.bfloat16,
            device=torch.device("cuda", 0),
            training=True,
        )

    one, five = stack(1), stack(5)
    for whole, layer in ((five, one), (five["backward"], one["backward"])):
        text = _describe_pass(whole)
        assert whole["layers"] == (1 if recompute else 2)
        assert ("all steps of 2 layers, in a wavefront" in text) == (not recompute)
        assert ("a wavefront: layers whose gates are computed again" in text) == recompute
        assert (whole["predicted_us"] < 4 * layer["predicted_us"]) == (not recompute)
    for other, why in ((one, ""), (stack(2, bidirectional=True), "a wavefront: ")):
        assert other["layers"] == other["backward"]["layers"] == 1
        assert "wavefront" not in _describe_pass(other).partition("(others")[0]
        assert why in _describe_pass(other["backward"])
        assert bool(why) == ("wavefront" in other["backward"]["reason"])


def test_float32_is_rounded_to_tf32_only_where_that_is_allowed() -> None:
    for tf32, multiply in ((True, "tf32"), (False, "float32")):
        assert plan("H200", "gru", "float32", 16, 256, backward=False, tf32=tf32)["multiply"] == multiply


def test_decisions_are_those_of_the_table() -> None:
    """After a deliberate change of the cost model: ``python tests/test_cuda_plan.py`` writes the table anew."""
    assert decisions() == json.loads(TABLE.read_text())


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps(decisions(), indent=1) + "\n")
