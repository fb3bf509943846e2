"""Programs for a GPU with the CPU in its place: the benchmark, the calls for compute-sanitizer, the tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import stand_in

from fused_rnn import check, ops
from fused_rnn.bench import gpu, gpu_cases, gpu_peers

pytestmark = pytest.mark.kernels

CASES = [
    gpu_cases.GpuCase("flashrnn", "lstm", 3, 4, 5, 72, "bfloat16"),
    gpu_cases.GpuCase("cpu table", "gru", 3, 4, 5, 8, "float32", num_layers=2, bidirectional=True),
    gpu_cases.GpuCase("stacks", "rnn", 3, 4, 5, 8, "float16", num_layers=2),
    gpu_cases.GpuCase("stacks", "lstm", 3, 4, 5, 64, "float16", num_layers=3),
    gpu_cases.GpuCase("projections", "lstm", 3, 4, 5, 16, "float16", proj_size=4),
]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu, "cases", lambda: list(CASES))
    monkeypatch.setattr(gpu, "PRODUCT_SIZE", 32)
    monkeypatch.setattr(gpu, "SAMPLE_MS", 0.1)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "tools"))
    with stand_in.gpu(monkeypatch):
        yield


def _run(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Status, report and tables."""
    files = (folder / "gpu.json", folder / "gpu.md")
    status = gpu.main(["--json", str(files[0]), "--markdown", str(files[1]), *options])
    return status, json.loads(files[0].read_text()), files[1].read_text()


def test_all_cases_are_checked_timed_and_reported(tmp_path: Path) -> None:
    status, report, tables = _run(tmp_path)
    assert status == 0
    assert report["environment"]["device"] == "a stand-in" and report["not_reached"] == []
    assert [(r["name"], r["which"]) for r in report["results"]] == [
        (case.name, which) for case in CASES for which in gpu_cases.PASSES
    ]
    for r in report["results"]:
        assert r["problem"] == "" and 0 <= r["error"] < 0.1
        assert {name: len(times) for name, times in r["milliseconds"].items()} == {"cuDNN": 7, "fused": 7}
        assert r["floor_ms"] > 0 and r["variant"] in ("block", "counted", "barriers", "grid", "none")
        assert r["replayed"].keys() == {"cuDNN", "fused"}
        assert r["peak_bytes"] == {"cuDNN": 4096, "fused": 4096}
    # Here nothing runs on cuDNN. Another dtype stands in for it where torch.nn may have no kernels of its own.
    assert [r["rival"] for r in report["results"]] == ["cuDNN in float16"] * 2 + [""] * (2 * len(CASES) - 2)
    assert f"| stacks | {CASES[2].name} | forward+backward | " in tables
    # The memory of another dtype is no match.
    (memory,) = (line for line in report["bars"] if line.startswith("memory"))
    assert "bfloat16" not in memory and memory.endswith(": met")


def test_wrong_numbers_are_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(problem: gpu_peers.Problem, training: bool) -> gpu_peers.Run:
        run = gpu_peers.fused(problem, training)
        return lambda: [1.5 * tensor for tensor in run()]

    monkeypatch.setitem(gpu.PEERS, gpu.FUSED, wrong)
    status, report, tables = _run(tmp_path)
    assert status == 1
    assert all(r["problem"].startswith("wrong numbers") and not r["milliseconds"] for r in report["results"])
    assert tables.count("wrong numbers: off by 0.5") == 2 * len(CASES)


def test_a_case_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(problem: gpu_peers.Problem, training: bool) -> gpu_peers.Run:
        if training and problem.case.cell == "gru":
            raise torch.OutOfMemoryError("tried to allocate too much\nand more")
        return gpu_peers.fused(problem, training)

    monkeypatch.setitem(gpu.PEERS, gpu.FUSED, failing)
    status, report, _ = _run(tmp_path)
    assert status == 1
    problems = [r["problem"] for r in report["results"]]
    assert problems == [
        *[""] * 3, "failed: out of memory: tried to allocate too much", *[""] * (2 * len(CASES) - 4)
    ]  # fmt: skip


def test_a_rival_that_fails_leaves_times_without_a_ratio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(problem: gpu_peers.Problem, training: bool) -> gpu_peers.Run:
        if problem.case.dtype == "float16":
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
        return gpu_peers.cudnn(problem, training)

    monkeypatch.setitem(gpu.PEERS, gpu.CUDNN, failing)
    status, report, tables = _run(tmp_path, "--cases", "rnn .*float16")
    assert status == 0
    assert all(list(r["milliseconds"]) == ["fused"] for r in report["results"])
    assert "| | " in tables


def test_another_process_goes_on_after_a_case_that_loses_the_context(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost = False

    def crashing(problem: gpu_peers.Problem, training: bool) -> gpu_peers.Run:
        nonlocal lost
        if training and problem.case.cell == "gru":
            lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return gpu_peers.fused(problem, training)

    def synchronize() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu.PEERS, gpu.FUSED, crashing)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    status, report, _ = _run(tmp_path, "--resume")
    assert status == gpu.AGAIN
    problems = [r["problem"] for r in report["results"]]
    assert problems[:3] == ["", "", ""] and problems[3].startswith("failed: RuntimeError: CUDA error: an illegal")
    assert report["not_reached"] == [case.name for case in CASES[2:]]
    lost = False
    machine = report["machine"]
    # The first case after those that are known is the one that a process ended in.
    status, report, tables = _run(tmp_path, "--resume")
    assert report["machine"] == machine
    assert [r["problem"] for r in report["results"]][4:] == ["failed: hung, or ended its process"] * 2 + [""] * (
        2 * len(CASES) - 6
    )
    assert status == 1 and report["not_reached"] == []


def test_what_runs_is_said_before_it_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_phases

    said: list[str] = []

    def hanging(problem: gpu_peers.Problem, training: bool) -> gpu_peers.Run:
        said.append(capsys.readouterr().out)
        return gpu_peers.fused(problem, training)

    monkeypatch.setitem(gpu.PEERS, gpu.FUSED, hanging)
    gpu.main(["--cases", "lstm .*L3"])
    assert gpu_phases.running_in(said[0]) == "wavefront"


def test_a_capture_that_fails_costs_the_replays_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: gpu_peers.Run) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu, "captured", fails)
    status, report, _ = _run(tmp_path, "--cases", "rnn")
    assert status == 0 and "not permitted when stream is capturing" in capsys.readouterr().err
    assert all(r["milliseconds"].keys() == {"cuDNN", "fused"} and not r["replayed"] for r in report["results"])


def test_the_floor_counts_both_products_of_a_step_with_a_projection() -> None:
    case = gpu_cases.GpuCase("projections", "lstm", 3, 4, 5, 16, "float16", proj_size=4)
    assert case.name == "lstm B3 T4 I5 H16 P4 float16"
    assert case.step_flops == 2 * 3 * (4 * 16 * 4 + 16 * 4)
    assert case.input_flops(0) == 2 * 3 * 4 * 16 * 5


def test_the_floor_is_what_lets_blocks_hear_of_each_other() -> None:
    case = gpu_cases.GpuCase("haste", "lstm", 1, 1000, 1, 1, "bfloat16")

    def floor(**microseconds: float) -> float:
        return gpu.Machine({"bfloat16": 1e18}, microseconds).floor_ms(case, "forward")

    assert floor(exchange=0.4, cluster=1.0) == pytest.approx(0.4, rel=1e-3)
    assert floor(cluster=1.0, grid=3.0) == pytest.approx(1.0, rel=1e-3)
    assert floor() == pytest.approx(0.0, abs=1e-6)


def test_a_run_without_time_says_what_it_did_not_reach(tmp_path: Path) -> None:
    status, report, tables = _run(tmp_path, "--seconds", "0")
    assert status == 0 and report["results"] == []
    assert f"Not reached in time: {len(CASES)} of the cases, such as {CASES[0].name}" in tables


def test_variants_are_taken_away_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(ops._C, "cuda_allow", lambda **variants: asked.append(variants), raising=False)
    _, report, tables = _run(tmp_path, "--without", "cluster", "--without", "wavefront", "--cases", "rnn")
    assert asked == [{"cluster": False, "layers": 1}]
    assert "Left out: the variants cluster, wavefront." in tables


@pytest.fixture
def sanitized(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """tools/gpu_sanitized.py with a few calls, all of which run as "block"."""
    import gpu_sanitized

    some = gpu_sanitized.calls()[:20]
    monkeypatch.setattr(gpu_sanitized, "variants_of", lambda call: {"block"})
    monkeypatch.setattr(gpu_sanitized, "calls", lambda: some)
    before = torch.backends.cudnn.allow_tf32
    yield gpu_sanitized
    torch.backends.cudnn.allow_tf32 = before


def test_the_first_calls_have_every_variant() -> None:
    import gpu_sanitized

    everything = gpu_sanitized.calls()
    assert len({str(watched) for watched in everything}) == len(everything)
    assert [watched.variant for watched in everything[:6]] == list(gpu_cases.VARIANTS)


def test_calls_of_each_variant_have_the_options_of_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_sanitized

    def found() -> dict[str, set[str]]:
        calls = gpu_sanitized.calls()
        return {v: {w.call.option for w in calls if w.variant == v} - {""} for v in gpu_cases.VARIANTS}

    in_launches = {"reset", "zoneout", "recurrent_grad_clip"}
    on_hopper = found()
    assert on_hopper["none"] == set(check.OPTIONS) - {"recurrent_dropout"}  # which draws
    assert on_hopper["wavefront"] == set()
    assert all(on_hopper[variant] == in_launches for variant in ("block", "barriers", "counted", "grid"))
    # With one kind of warps those kernels have no options.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    assert {variant for variant, options in found().items() if options} == {"none"}


def test_calls_for_the_sanitizer_are_compared_with_the_reference(
    sanitized: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanitized.main(["--variant", "block"]) == 0
    assert re.search(r"^4 calls right, 0 wrong, 0 failed$", capsys.readouterr().out, re.MULTILINE)
    assert sanitized.main(["--variant", "grid"]) == sanitized.FAILED
    assert "runs as block" in capsys.readouterr().out
    everything_else = [part for name in gpu_cases.VARIANTS if name != "block" for part in ("--without", name)]
    assert sanitized.main(everything_else) == 0
    assert "4 calls right" in capsys.readouterr().out
    monkeypatch.setattr(sanitized, "scaled_errors", lambda *results: {"output": float("nan")})
    assert sanitized.main(["--variant", "block"]) == sanitized.WRONG
    assert "WRONG: block" in capsys.readouterr().out


def test_a_call_that_raises_hides_no_other_and_a_lost_context_is_a_fault(
    sanitized: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = iter([1.0, RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"), 1.0, 1.0])

    def worst_error(call: Any) -> float:
        found = next(errors)
        if isinstance(found, RuntimeError):
            raise found
        return found

    monkeypatch.setattr(sanitized, "worst_error", worst_error)
    assert sanitized.main(["--variant", "block"]) == sanitized.FAILED
    out = capsys.readouterr().out
    assert "CUBLAS_STATUS_NOT_SUPPORTED" in out and "3 calls right, 0 wrong, 1 failed" in out

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    errors = iter([RuntimeError("CUDA error: an illegal memory access")])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert sanitized.main(["--variant", "block"]) == sanitized.FAULT
    assert "0 calls right, 0 wrong, 1 failed, 3 not tried" in capsys.readouterr().out


def test_the_anchor_is_measured_by_events_and_as_graphs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_anchor

    small = gpu_cases.GpuCase("flashrnn", "lstm", 3, 4, 5, 72, "bfloat16")
    monkeypatch.setattr(gpu_anchor, "cases", lambda: [small])
    monkeypatch.setattr(gpu_anchor, "LENGTHS", (2, 6))
    file = tmp_path / "anchor.json"
    assert gpu_anchor.main(["auto", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["2"]["problem"] == "" and found["6"]["training_replayed_ms"] >= 0
    assert found["step_us"].keys() == {f"{w}, {how}" for w in ("forward", "backward") for how in ("events", "graph")}
    assert re.search(r"^forward, events: [-.\d]+ us a step", capsys.readouterr().out, re.MULTILINE)
    # The plans of the stand-in do not follow what is allowed.
    assert gpu_anchor.main(["none", "--json", str(file)]) == 1
    assert "runs as" in json.loads(file.read_text())["failed"]
    assert gpu_anchor.main(["cudnn"]) == 0
    assert gpu_anchor.main(["auto", "--profile", "backward"]) == 0
    assert "backward as " in capsys.readouterr().out


def test_wrong_numbers_of_the_anchor_are_said_and_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gpu_anchor

    def wrong(problem: gpu_peers.Problem, training: bool) -> gpu_peers.Run:
        run = gpu_peers.fused(problem, training)
        return lambda: [1.5 * tensor for tensor in run()]

    monkeypatch.setitem(gpu.PEERS, gpu.FUSED, wrong)
    monkeypatch.setattr(gpu_anchor, "cases", lambda: [CASES[0]])
    monkeypatch.setattr(gpu_anchor, "LENGTHS", (2, 4))
    file = tmp_path / "anchor.json"
    assert gpu_anchor.main(["auto", "--json", str(file)]) == gpu_anchor.WRONG
    found = json.loads(file.read_text())
    assert found["2"]["problem"].startswith("wrong numbers") and found["4"]["training_ms"] > 0


# Those that say something of the layers on any device, and where the tests are more than one call and a comparison.
TESTS_FOR_A_GPU = (
    "nothing_waits_for or side_stream or kept_gives or empty_batch or strided or no_memory_behind or packed_input or "
    "clusters_of_every_size or either_device or wavefront or together_match or from_the_seed"
)


def test_tests_for_a_gpu_run() -> None:
    tests = Path(__file__).parent
    files = [str(tests / name) for name in ("test_cuda.py", "test_masks_on_gpu.py", "test_cuda_options_on_gpu.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "support.stand_in",
        "-m",
        "cuda",
        "-k",
        TESTS_FOR_A_GPU,
        "-q",
        *files,
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped|failed)", done.stdout)}
    assert counts["passed"] >= 80 and "failed" not in counts
