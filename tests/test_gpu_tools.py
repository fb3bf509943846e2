"""What `make cuda-compile`, `make gpu` and the GPU benchmark decide, on made-up reports and times: they need no GPU."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fused_rnn.bench import gpu, gpu_cases

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_90a'
ptxas info    : Function properties for _Z5firstv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 1 barriers, 1024 bytes smem, 440 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90a'
ptxas info    : Function properties for _Z6secondv
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_registers_shared_memory_and_spills_are_read_from_ptxas() -> None:
    import cuda_compile

    first, second = cuda_compile.parse(REPORT, "persistent_x.cu", "90a")
    assert (first.name, first.registers, first.shared, first.stack, first.spilled) == ("_Z5firstv", 38, 1024, 0, 0)
    assert (second.registers, second.shared, second.stack, second.spilled) == (255, 0, 8, 16)
    assert second.may_spill == 0
    assert cuda_compile.parse(REPORT, "step.cu", "90a")[1].may_spill > second.spilled
    assert 0 < cuda_compile.parse(REPORT, "persistent_backward_float32.cu", "80")[1].may_spill < 100


def test_a_report_of_another_form_is_refused() -> None:
    import cuda_compile

    with pytest.raises(ValueError, match="not understood"):
        cuda_compile.parse("Compiling entry function '_Z5firstv' for 'sm_90a'\nUsed many registers", "step.cu", "90a")


def test_names_of_kernels_lose_what_every_one_has() -> None:
    import cuda_compile

    long = "void fused_rnn::cuda::step_kernel<fused_rnn::Elman<(fused_rnn::CellKind)0, fused_rnn::Tanh>, float, 4>(int)"
    assert cuda_compile._short(long) == "step_kernel<Elman<0, Tanh>, float, 4>"


def test_a_phase_that_runs_out_of_time_is_interrupted_first(tmp_path: Path) -> None:
    import gpu_phases

    # On an interrupt Python says what it was at, as pytest says what failed.
    slow = gpu_phases.Phase(
        "slow", [sys.executable, "-c", "import time\nprint('begun', flush=True)\ntime.sleep(60)"], 1
    )
    gpu_phases.run(slow, gpu_phases.Log(tmp_path / "log.txt"), 2.2)
    assert slow.verdict == "stopped after 2 s"
    assert slow.last_lines.startswith("begun\n") and slow.last_lines.endswith("KeyboardInterrupt")


TESTS_THAT_END_A_RUN = """
import time
import pytest

def test_first(): pass
def test_takes_the_context_along(): assert 1 == 2, "seen"
def test_hangs(): time.sleep(60)
def test_takes_it_along_too(): assert False
@pytest.mark.parametrize("name", ["cluster", "none"])
def test_variant(name): assert name == "none"
def test_last(): pass
"""


# What the plugin asks of PyTorch and of fused_rnn: four processes would load them, and a hang is one only when it takes
# longer than that. A failed test takes the context along.
TORCH = """
class cuda:
    def synchronize():
        raise RuntimeError("CUDA error")
"""
FUSED_RNN = """
import sys, types

class _C:
    def cuda_allow(**variants):
        print("allowed:", variants)

fused_rnn = types.ModuleType("fused_rnn")
fused_rnn._C = _C
gpu_cases = types.ModuleType("fused_rnn.bench.gpu_cases")
gpu_cases.allowed_without = lambda variants: dict.fromkeys(variants, False)
sys.modules |= {"fused_rnn": fused_rnn, "fused_rnn.bench": types.ModuleType("bench"), gpu_cases.__name__: gpu_cases}
"""


@pytest.mark.slow
def test_tests_go_on_after_one_that_hangs_and_one_that_loses_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_phases

    (tmp_path / "test_it.py").write_text(TESTS_THAT_END_A_RUN)
    (tmp_path / "conftest.py").write_text(FUSED_RNN)
    (tmp_path / "stand_ins").mkdir()
    (tmp_path / "stand_ins" / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_ins"))
    command = [sys.executable, "-m", "pytest", "-p", "gpu_tests", "--gpu-log", str(tmp_path / "begun.txt"), "-v"]
    tests = gpu_phases.Phase("tests", [*command, str(tmp_path)], 200, stall=8, resumes=True, without="--gpu-without")
    losses = gpu_phases.Losses(["counted", "barriers"])
    gpu_phases.run(tests, gpu_phases.Log(tmp_path / "log.txt"), 200, losses)
    log = (tmp_path / "log.txt").read_text()
    assert tests.verdict == "lost the CUDA context 2 times, hung, ok"
    assert [line.partition("::")[2] for line in tests.failures if "::" in line] == [
        "test_takes_the_context_along (call)",
        "test_takes_it_along_too (call)",
    ]
    assert "HUNG" in "".join(tests.failures) and "AssertionError: seen" in log
    assert log.count("allowed: {'counted': False, 'barriers': False}") == 4
    begun = (tmp_path / "begun.txt").read_text().splitlines()
    assert [name.partition("::")[2] for name in begun] == [
        "test_first",
        "test_takes_the_context_along",
        "test_hangs",
        "test_takes_it_along_too",
        "test_variant[none]",
        "test_last",
    ]


def test_variants_can_be_asked_for_and_left_out() -> None:
    for name in gpu_cases.VARIANTS:
        allowed = gpu_cases.allowed_only(name)
        # Where only one may run, no kernel but its own is allowed.
        kernels = {kernel for kernel in ("block", "grid", "none", "counted", "barriers") if allowed[kernel]}
        assert kernels == {"counted" if name == "wavefront" else name}
        assert allowed["cluster"] == (kernels <= {"counted", "barriers"})
        assert (allowed["layers"] > 1) == (name == "wavefront")
    assert gpu_cases.allowed_without(["counted", "wavefront"]) == {"counted": False, "layers": 1}


def fake(folder: Path, body: str) -> Path:
    """A program in the place of micro."""
    program = folder / "micro"
    program.write_text(f"#!{sys.executable} -IS\nimport os, signal, sys, time\n{body}\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('{\"interval\": 6.5')", "printed no measurement"),
        ("print('[1]')", "printed no measurement"),
        ('print(\'{"interval": "fast"}\')', "printed no measurement"),
        ("pass", "printed no measurement"),
        ("sys.exit('an illegal memory access')", "status 1: an illegal memory access"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "status -11"),
        ("time.sleep(60)", "hung: nothing for 1 s"),
    ],
)
def test_a_measurement_that_is_none_is_told_from_one(tmp_path: Path, body: str, said: str) -> None:
    import gpu_micro

    with pytest.raises(RuntimeError, match=said):
        gpu_micro.measure(fake(tmp_path, body), "multiply", seconds=1.0)


def test_a_measurement_is_what_the_program_prints(tmp_path: Path) -> None:
    import gpu_micro

    program = fake(tmp_path, "print('{\"interval\": 6.5, \"of\": ' + str(len(sys.argv[1])) + '}')")
    assert gpu_micro.measure(program, "multiply", seconds=20.0) == {"interval": 6.5, "of": 8.0}
    program = fake(tmp_path, "print('WAITED TOO LONG: mbarrier, line 9')\nsys.exit(3)")
    assert gpu_micro.where_it_stands(program, "exchange") == ["WAITED TOO LONG: mbarrier, line 9"]


MICRO: dict[str, dict[str, float]] = {
    "shared": {"bytes_per_cycle": 127.0},
    "exchange": {"bytes_per_cycle": 20.0},
    "async_to_16": {"round_trip": 600.0, "wrong": 0},
    "multiply": {"interval": 8.25},
    "grid": {"counter_16": 1500.0},
    "l2": {"latency": 270.0, "bytes_per_cycle_of_all": 40.0},
}


def test_constants_of_the_planner_are_written_anew_where_they_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_constants

    results, out = tmp_path / "results.json", tmp_path / "measured.h"
    gpu = {"gpu": {"name": "GPU of */ a kind"}}
    results.write_text(json.dumps({"machine": gpu, "micro": MICRO | {"launch": "hung: nothing for 8 s"}}))
    monkeypatch.setattr(sys, "argv", ["gpu_constants.py", "--results", str(results), "--out", str(out)])
    assert gpu_constants.main() == 1  # not all of them
    before, after = gpu_constants.HEADER.read_text().splitlines(), out.read_text().splitlines()
    changed = {new.split()[2]: new for old, new in zip(before, after, strict=True) if old != new}
    expected = {"shared_bytes_per_cycle": 127, "remote_bytes_per_cycle": 20, "remote_cycles": 300}
    expected |= {"multiply_cycles": 8.25, "memory_cycles": 1770, "l2_bytes_per_cycle": 40}
    assert {name: float(line.split()[4].rstrip(";")) for name, line in changed.items()} == expected
    assert "// measured on GPU of  a kind (multiply); between two" in changed["multiply_cycles"]
    # And again, from what was written.
    monkeypatch.setattr(gpu_constants, "HEADER", out)
    gpu_constants.main()
    assert out.read_text().splitlines() == after


def test_every_measured_constant_is_one_of_the_planner(tools_header: str) -> None:
    import gpu_constants

    known = {match[1] for line in tools_header.splitlines() if (match := gpu_constants.LINE.match(line))}
    assert set(gpu_constants.SOURCES) <= known
    assert tools_header.count("constexpr double") == len(known)


@pytest.fixture
def tools_header() -> str:
    return (TOOLS.parent / "csrc" / "cuda" / "measured.h").read_text()


def test_measurements_that_no_gpu_gives_are_not_taken() -> None:
    import gpu_constants

    micro = MICRO | {"multiply": {"interval": 0.01}, "shared": {"bytes_per_cycle": float("nan")}}
    assert gpu_constants.measured(micro).keys().isdisjoint({"multiply_cycles", "shared_bytes_per_cycle"})
    # Stores that bring wrong words are fast.
    late = MICRO | {"async_to_16": {"round_trip": 600.0, "wrong": 3}}
    assert gpu_constants.measured(late).keys().isdisjoint({"remote_cycles", "remote_bytes_per_cycle"})
    assert gpu_constants.measured({}) == {}


def test_constants_of_clusters_come_from_the_largest_that_there_are() -> None:
    import gpu_constants

    small: dict[str, Any] = {
        "async_to_16": "status 3: cudaErrorInvalidValue",
        "async_to_peer": {"round_trip": 500.0},
        "cluster_barrier": {"release_2": 200.0, "release_8": 240.0},
    }
    found = gpu_constants.measured(small)
    assert found["remote_cycles"][0] == 250 and found["cluster_barrier_cycles"][0] == 240
    small["cluster_barrier"]["release_16"] = 260.0
    assert gpu_constants.measured(small)["cluster_barrier_cycles"][0] == 260


def test_every_measurement_of_the_program_is_known_to_it() -> None:
    import cuda_build
    import gpu_constants

    (source,) = (path.read_text() for path in cuda_build.programs() if path.name == "micro.cu")
    listed = re.findall(r'^    \{"(\w+)", (?:true|false), ', source, re.MULTILINE)
    used = {name.strip() for source in gpu_constants.SOURCES.values() for name in source.where.split(",")}
    assert used <= set(listed) and len(listed) == len(set(listed))


def test_the_anchor_is_measured_first_and_no_case_twice() -> None:
    cases = gpu_cases.cases()
    assert cases[0].name == "lstm B16 T1024 I768 H768 bfloat16"
    assert len({case.name for case in cases}) == len(cases)
    assert {case.batch_size for case in cases if case.grid == "flashrnn"} == {2, 4, 8, 16, 32, 64, 128, 256}
    assert {case.hidden_size for case in cases if case.grid == "haste"} == {128, 256, 512, 1024, 2048, 4096}


def _measured(
    ratio: float, *, which: str = "forward", dtype: str = "bfloat16", hidden_size: int = 512, variant: str = "cluster"
) -> gpu.Measured:
    case = gpu_cases.GpuCase("haste", "lstm", 32, 100, 64, hidden_size, dtype)
    times = {gpu.CUDNN: [ratio, ratio], gpu.FUSED: [1.0, 1.0]}
    memory = {gpu.CUDNN: 100, gpu.FUSED: 90}
    return gpu.Measured(case, which, variant, error=0.001, milliseconds=times, floor_ms=0.6, peak_bytes=memory)


def test_bars_are_met_or_not_by_mean_and_by_worst_case() -> None:
    def line(results: list[gpu.Measured]) -> str:
        return gpu._verdict_of(gpu_cases.BARS[0], "forward", results)

    assert line([_measured(2.0), _measured(1.2)]).endswith(": met")
    assert line([_measured(4.0), _measured(0.9)]).endswith("NOT met")  # the mean is 1.9
    assert line([_measured(1.4), _measured(1.4)]).endswith("NOT met")
    assert line([_measured(9.0, dtype="float32"), _measured(9.0, hidden_size=2048)]).endswith("not measured")
    slow = [_measured(0.95, hidden_size=4096, variant="none"), _measured(0.1)]
    assert gpu._verdict_of(gpu_cases.BARS[2], "forward", slow).endswith(": met")


def test_a_report_names_what_was_wrong_and_what_was_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = _measured(1.0)
    wrong.problem = "wrong numbers: off by 0.5 (cuDNN: 0.001)"
    results = [_measured(2.0), wrong, _measured(2.0, which="forward+backward")]
    where = {"device": "a GPU", "driver": "1", "torch": "2", "cudnn": "9", "date": "today"}
    machine = gpu.Machine({"bfloat16": 1e15}, {"cluster": 0.5})
    report = gpu.as_json(results, machine, ["some case"], where, ["grid"])
    assert gpu.from_json(json.loads(json.dumps(report))) == (results, machine)
    text = gpu.markdown(report, results)
    assert "cluster 0.500 us" in text and "1000 TFLOP/s" in text
    assert "wrong numbers: off by 0.5" in text
    assert "Not reached in time: 1 of the cases" in text and "Left out: the variants grid" in text
    floors = [line for line in report["bars"] if line.startswith("times the floor")]
    assert len(floors) == 2
    assert all("1.67" in line and line.endswith(": met") for line in floors)
    memory = next(line for line in report["bars"] if line.startswith("memory"))
    assert "0.90" in memory and memory.endswith(": met")


def test_the_floor_of_one_layer_is_its_steps_its_projection_and_its_weight_gradients() -> None:
    case = gpu_cases.GpuCase("haste", "lstm", 4, 100, 32, 64, "bfloat16")
    rate = 1e12
    step_us = 2 * 4 * 256 * 64 / rate * 1e6
    projection_us = 100 * 2 * 4 * 256 * 32 / rate * 1e6
    # The longer of arithmetic and barrier.
    assert case.floor_us("forward", rate, 0.0) == pytest.approx(100 * step_us + projection_us)
    assert case.floor_us("forward", rate, 1.0) == pytest.approx(100 * 1.0 + projection_us)
    weights_us = 100 * step_us + projection_us
    training_us = 2 * (100 * 1.0 + projection_us) + weights_us
    assert case.floor_us("forward+backward", rate, 1.0) == pytest.approx(training_us)


def test_the_floor_of_a_stack_has_its_layers_side_by_side_where_they_can_be() -> None:
    case = gpu_cases.GpuCase("stacks", "lstm", 4, 100, 64, 64, "bfloat16", num_layers=3)
    both = dataclasses.replace(case, bidirectional=True)
    assert case.floor_us("forward", 1e18, 1.0) == pytest.approx(102, rel=1e-3)
    assert both.floor_us("forward", 1e18, 1.0) == pytest.approx(300, rel=1e-3)
    # Where arithmetic decides, side by side does not make it less.
    one = dataclasses.replace(case, num_layers=1)
    assert case.floor_us("forward", 1e6, 0.0) >= 3 * one.floor_us("forward", 1e6, 0.0)
    assert case.floor_us("forward", 1e6, 0.0) <= 3 * one.floor_us("forward", 1e6, 0.0) * 102 / 100


def test_grids_without_a_bar_are_no_part_of_its_mean() -> None:
    stack = _measured(9.0)
    stack.case = dataclasses.replace(stack.case, grid="stacks", num_layers=2)
    lines = gpu.verdicts([_measured(1.0), stack])
    assert "geometric mean 1.00 of 1 cases" in lines[0]
    assert any(line.startswith("stacks (no bar), forward: geometric mean 9.00 of 1 cases") for line in lines)


def test_the_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
