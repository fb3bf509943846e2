"""What `make cuda-compile`, `make gpu` and the GPU benchmark decide, on made-up reports and times: they need no GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

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
    assert second.must_not_spill
    assert not cuda_compile.parse(REPORT, "step.cu", "90a")[1].must_not_spill


def test_a_report_of_another_form_is_refused() -> None:
    import cuda_compile

    with pytest.raises(ValueError, match="not understood"):
        cuda_compile.parse("Compiling entry function '_Z5firstv' for 'sm_90a'\nUsed many registers", "step.cu", "90a")


def test_names_of_kernels_lose_what_every_one_has() -> None:
    import cuda_compile

    long = "void fused_rnn::cuda::step_kernel<fused_rnn::Elman<(fused_rnn::CellKind)0, fused_rnn::Tanh>, float, 4>(int)"
    assert cuda_compile._short(long) == "step_kernel<Elman<0, Tanh>, float, 4>"


def test_a_phase_that_runs_out_of_time_is_reported_and_the_next_still_runs(tmp_path: Path) -> None:
    import gpu as runner

    # On an interrupt Python says what it was at, as pytest says what failed.
    program = tmp_path / "slow.py"
    program.write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    slow = runner.Phase("slow", [sys.executable, str(program)], 1)
    good = runner.Phase("good", [sys.executable, "-c", "print('done')"], 1)
    bad = runner.Phase("bad", [sys.executable, "-c", "raise SystemExit(3)"], 1)
    for phase, seconds in ((slow, 2.2), (good, 20), (bad, 20)):
        runner.run(phase, tmp_path, seconds)
    assert slow.verdict.startswith("stopped after")
    assert slow.last_lines.startswith("begun\n") and slow.last_lines.endswith("KeyboardInterrupt")
    assert (good.verdict, good.last_lines) == ("ok", "done")
    assert bad.verdict == "failed, status 3"
    text = runner.summary([slow, good, bad], tmp_path)
    assert "| slow | stopped after 2 s |" in text and "| good | ok |" in text


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
    import gpu as runner

    (tmp_path / "test_it.py").write_text(TESTS_THAT_END_A_RUN)
    (tmp_path / "conftest.py").write_text(FUSED_RNN)
    (tmp_path / "stand_ins").mkdir()
    (tmp_path / "stand_ins" / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_ins"))
    command = [sys.executable, "-m", "pytest", "-p", "gpu_tests", "--gpu-log", str(tmp_path / "begun.txt"), "-v"]
    tests = runner.Phase("tests", [*command, str(tmp_path)], 200, stall=8, resumes=True)
    runner.run(tests, tmp_path, 200, without=["cluster"])
    log = (tmp_path / "log.txt").read_text()
    assert tests.verdict == "lost the CUDA context 2 times, hung, ok"
    assert [line.partition("::")[2] for line in tests.failures if "::" in line] == [
        "test_takes_the_context_along (call)",
        "test_takes_it_along_too (call)",
    ]
    assert "HUNG" in "".join(tests.failures) and "AssertionError: seen" in log
    assert log.count("allowed: {'cluster': False}") == 4
    begun = (tmp_path / "begun.txt").read_text().splitlines()
    assert [name.partition("::")[2] for name in begun] == [
        "test_first",
        "test_takes_the_context_along",
        "test_hangs",
        "test_takes_it_along_too",
        "test_variant[none]",
        "test_last",
    ]


def test_a_tool_that_is_not_there_is_reported(tmp_path: Path) -> None:
    import gpu as runner

    missing = runner.Phase("memcheck", ["no-such-program"], 5)
    runner.run(missing, tmp_path, 5)
    assert missing.verdict == "no-such-program is not found"


def test_variants_that_hang_are_left_out_of_what_follows(tmp_path: Path) -> None:
    import gpu as runner

    for name, option in (("tests", "--gpu-without"), ("bench", "--without")):
        phase = runner.Phase(name, [sys.executable, "-c", "import sys; print(sys.argv[1:])"], 20)
        runner.run(phase, tmp_path, 20, without=["grid"])
        assert f"'{option}', 'grid'" in phase.last_lines
    watched = runner.Phase("racecheck", [sys.executable, "-c", "import sys; print(sys.argv[1:])"], 20)
    runner.run(watched, tmp_path, 20, without=["grid"])
    assert watched.last_lines == str(
        [part for name in ("cluster", "wavefront", "block", "none") for part in ("--variant", name)]
    )


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
