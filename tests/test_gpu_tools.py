"""What `make cuda-compile`, `make gpu` and the GPU benchmark decide, on made-up reports and times: they need no GPU."""

from __future__ import annotations

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

    slow = runner.Phase("slow", [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 1)
    good = runner.Phase("good", [sys.executable, "-c", "print('done')"], 1)
    bad = runner.Phase("bad", [sys.executable, "-c", "raise SystemExit(3)"], 1)
    for phase, seconds in ((slow, 1.5), (good, 20), (bad, 20)):
        runner.run(phase, tmp_path, seconds)
    assert slow.verdict.startswith("stopped after") and slow.last_lines == "begun"
    assert (good.verdict, good.last_lines) == ("ok", "done")
    assert bad.verdict == "failed, status 3"
    text = runner.summary([slow, good, bad], tmp_path)
    assert "| slow | stopped after 2 s |" in text and "| good | ok |" in text


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
    return gpu.Measured(case, which, variant, 0.001, "", times, 0.6 if which == "forward" else 0.0, memory)


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
    report = {
        "environment": {"device": "a GPU", "driver": "1", "torch": "2", "cudnn": "9", "date": "today"},
        "flops": {"bfloat16": 1e15},
        "barriers_us": {"cluster": 0.5},
        "bars": gpu.verdicts(results),
        "not_reached": ["some case"],
    }
    text = gpu.markdown(report, results)
    assert "cluster 0.500 us" in text and "1000 TFLOP/s" in text
    assert "wrong numbers: off by 0.5" in text
    assert "Not reached in time: 1 of the cases" in text
    floor = next(line for line in report["bars"] if line.startswith("times the floor"))
    assert "1.67" in floor and floor.endswith(": met")
    memory = next(line for line in report["bars"] if line.startswith("memory"))
    assert "0.90" in memory and memory.endswith(": met")


def test_the_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
