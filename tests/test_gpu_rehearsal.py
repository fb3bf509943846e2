"""`make gpu` with programs in place of its phases that hang, fault, lie, crash or say nothing: it must tell them apart.

The main loop, the order of phases and the files that come back are the real ones; what takes the place of a phase's
command is a line of Python.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
# Seconds: of silence that are a hang, and of patience after an interrupt. A Python that starts on a busy machine takes
# less than the first.
STALL, GRACE = 3.0, 0.5

SLEEPS = "import time; time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + SLEEPS
CRASHES = "import os, signal; print('begun', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"

# Starts in a tenth of the time.
PYTHON = [sys.executable, "-I", "-S", "-c"]

# What each phase prints where all is well.
GOOD = {
    "machine": "gpu: name: NVIDIA Stand-in",
    "build": "built",
    "micro": "13 of 13 measured",
    "constants": "8 of 8 constants measured",
    "info": "CUDA: yes",
    "try": "9 calls right, 0 wrong, 0 failed",
    "anchor": "forward, events: 1.000 us a step",
    "profile": "==PROF== Report: there",
    "read": "Duration 1 us",
    "tests": "880 passed",
    "bench": "  forward as counted",
    "memcheck": "9 calls right, 0 wrong, 0 failed",
    "racecheck": "9 calls right, 0 wrong, 0 failed",
    "synccheck": "9 calls right, 0 wrong, 0 failed",
    "table": "9 of 9 cases in 3 s",
    "check": "all right",
    "suite": "5000 passed",
}

Rehearse = Callable[..., dict[str, Any]]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """tools/gpu.py, with folders of its own and an extension that is a text."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu
    import gpu_library
    import gpu_machine
    import gpu_phases

    (tmp_path / "fused_rnn").mkdir()
    install = gpu_library.install
    monkeypatch.setattr(gpu_library, "FOLDER", tmp_path / "builds")
    monkeypatch.setattr(gpu_library, "install", lambda name: install(name, tmp_path / "fused_rnn"))
    monkeypatch.setattr(gpu_machine, "gpu", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(gpu_phases, "GRACE", GRACE)
    return gpu


@pytest.fixture
def rehearse(tools: Any, tmp_path: Path) -> Rehearse:
    """Runs all phases, those named here as these programs, and returns results.json."""
    import gpu_library

    def run(only: list[str] | None = None, **programs: str) -> dict[str, Any]:
        folder, work = tmp_path / "out", tmp_path / "work"
        tools.prepare(folder, work)
        gpu_library.forget()
        phases = tools.phases(folder, work, "90a", only or [])
        for phase in phases:
            name = phase.name.replace(" ", "_")
            program = programs.get(name, f"print({GOOD[phase.name.split()[0]]!r})")
            if phase.name.startswith("build ") and name not in programs:
                library = gpu_library.KINDS[phase.name.split()[1]].folder / "fused_rnn" / "_C.stand-in.so"
                program += (
                    f"; import pathlib; p = pathlib.Path({str(library)!r}); p.parent.mkdir(parents=True);"
                    f" p.write_text({phase.name!r})"
                )
            # A word of its own is a program that is not there; options of the phase follow what it is.
            phase.command = [program] if re.fullmatch(r"[\w-]+", program) else [*PYTHON, program]
            phase.stall = STALL if phase.stall else 0
        tools.Run(phases, folder, work, total=600).go()
        found: dict[str, Any] = json.loads((folder / "results.json").read_text())
        assert (folder / "summary.md").read_text().count("\n## ") == len(phases)
        return found

    return run


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    """Of the phases that were not ok."""
    return {name: phase["verdict"] for name, phase in found["phases"].items() if phase["verdict"] != "ok"}


def test_a_run_in_which_all_is_well(rehearse: Rehearse, tmp_path: Path) -> None:
    found = rehearse()
    assert verdicts(found) == {} and found["left out"] == []
    names = list(found["phases"])
    # What decides most comes first, and all that is measured is before what may leave a GPU in disorder.
    order = ["machine", "build plain", "build limited", "micro", "constants", "info", "try block", "try barriers"]
    order += ["try counted", "try grid", "try wavefront", "try none", "anchor counted", "anchor barriers"]
    assert names[: len(order)] == order
    wanted = ["anchor none", "profile forward", "profile backward", "tests", "bench", "memcheck", "table 1", "suite"]
    assert [name for name in names if name in wanted] == wanted
    assert found["phases"]["anchor counted"]["clock"] == "1980 MHz"
    # The next call need not build, and may take no more files than this.
    with tarfile.open(tmp_path / "out" / "built.tar.gz") as archive:
        assert {"plain/fused_rnn/_C.stand-in.so", "limited/fused_rnn/_C.stand-in.so"} < set(archive.getnames())
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_phases_run_on_the_build_that_they_need(rehearse: Rehearse, tmp_path: Path) -> None:
    # The command runs in the real root: the file is named by its path.
    library = tmp_path / "fused_rnn" / "_C.stand-in.so"
    says = f"print(open({str(library)!r}).read(), end=''); print("
    rehearse(
        try_block=says + f"', {GOOD['try']}')",
        anchor_grid=says + f"', {GOOD['anchor']}')",
        bench=says + f"', {GOOD['bench']}')",
        table_1=says + f"', {GOOD['table']}')",
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"build limited, {GOOD['try']}" in log
    assert f"build plain, {GOOD['anchor']}" in log and f"build plain, {GOOD['bench']}" in log
    assert f"build cpu, {GOOD['table']}" in log


def test_without_a_build_what_needs_none_still_runs(rehearse: Rehearse) -> None:
    found = rehearse(build_plain="raise SystemExit(1)", build_limited="raise SystemExit(1)")
    failed = verdicts(found)
    assert failed["build plain"] == "failed, status 1"
    assert failed["try counted"].startswith("not run: no build of the extension (plain: failed, status 1")
    assert failed["bench"].startswith("not run") and failed["memcheck"].startswith("not run")
    ran = {"machine", "micro", "constants", "build cpu", "table 1", "check", "suite", "suite alone"}
    assert ran <= set(found["phases"]) - set(failed)
    # What was not tried is not known to be wrong.
    assert found["left out"] == []


def test_one_build_takes_the_place_of_the_other(rehearse: Rehearse, tmp_path: Path) -> None:
    found = rehearse(build_limited="raise SystemExit(1)")
    assert verdicts(found) == {"build limited": "failed, status 1"}
    assert (
        "try block: on the build plain, because there is none that is limited"
        in (tmp_path / "out" / "log.txt").read_text()
    )


def test_a_variant_that_faults_hangs_or_crashes_is_left_out_and_one_with_wrong_numbers_goes_on(
    rehearse: Rehearse, tmp_path: Path
) -> None:
    shows = f"import sys; print('bench without', sys.argv[1:]); print({GOOD['bench']!r})"
    found = rehearse(
        try_block="print('WRONG: block LSTM', flush=True); raise SystemExit(4)",
        try_barriers="print('FAULT: the CUDA context is lost: an illegal address'); raise SystemExit(3)",
        try_counted="print('counted LSTM ... ', end='', flush=True)\n" + DEAF,
        try_grid=CRASHES,
        try_wavefront="raise KeyError('one that nobody foresaw')",
        try_none="raise SystemExit(3)",
        bench=shows,
    )
    failed = verdicts(found)
    assert failed["try block"] == "wrong numbers"
    assert failed["try barriers"] == "fault"
    assert failed["try counted"] == "hung"
    assert failed["try grid"] == "ended by SIGSEGV"
    assert failed["try wavefront"] == "failed, status 1"
    assert failed["try none"] == "fault"
    assert found["left out"] == ["barriers", "counted", "grid", "wavefront"]
    assert failed["anchor counted"] == "not run: counted is left out"
    # All the others ran, without them.
    assert set(failed) == {f"try {name}" for name in ("block", "barriers", "counted", "grid", "wavefront", "none")} | {
        f"anchor {name}" for name in ("counted", "barriers", "grid")
    }
    log = (tmp_path / "out" / "log.txt").read_text()
    left_out = ["--without", "barriers", "--without", "counted", "--without", "grid", "--without", "wavefront"]
    assert re.search(r"bench without \['--seconds', '\d+', " + re.escape(str(left_out)[1:]), log)
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "- WRONG: block LSTM" in summary and "- FAULT: the CUDA context is lost: an illegal address" in summary
    assert "| try counted | hung |" in summary and "- HUNG: no output for 3 s" in summary


def test_a_fault_in_one_exchange_leaves_the_measurements_of_the_other(rehearse: Rehearse) -> None:
    found = rehearse(only=["first"], try_counted="raise SystemExit(3)")
    assert verdicts(found) == {"try counted": "fault", "anchor counted": "not run: counted is left out"}
    assert found["phases"]["anchor barriers"]["verdict"] == "ok"


# Programs that are run again after what they were at, with a file for what they have begun.
GOES_ON = """
import pathlib, sys, time
file = pathlib.Path({file!r})
begun = file.read_text().split() if file.exists() else []
todo = [case for case in {cases!r} if case not in begun and not set(case.split(".")) & set(sys.argv)]
for case in todo:
    with file.open("a") as log:
        log.write(case + "\\n")
    variant, what = case.split(".")[:2]
    print(f"  forward as {{variant}}", flush=True)
    if what == "hangs":
        time.sleep(60)
    if what == "waits":
        print("WAITED TOO LONG: counter, line 121, step 7, block (3,0) of (16,1)", flush=True)
    if what in ("waits", "faults"):
        sys.exit(75)
"""


def test_what_hangs_or_faults_in_the_benchmark_alone_is_left_out_of_the_rest(
    rehearse: Rehearse, tmp_path: Path
) -> None:
    cases = ["counted.hangs", "counted.next", "barriers.faults.1", "barriers.right", "barriers.faults.2"]
    cases += ["barriers.last", "grid.waits", "grid.after", "block.right"]
    program = GOES_ON.format(file=str(tmp_path / "begun"), cases=cases)
    found = rehearse(
        bench=program, racecheck="import sys; print(sys.argv[1:]); print('9 calls right, 0 wrong, 0 failed')"
    )
    assert verdicts(found) == {"bench": "hung, lost the CUDA context 3 times, ok"}
    # A hang is enough, a wait that gave up is one, and of lost contexts the second.
    assert found["left out"] == ["counted", "barriers", "grid"]
    begun = (tmp_path / "begun").read_text().split()
    assert begun == [case for case in cases if case not in ("counted.next", "barriers.last", "grid.after")]
    summary = (tmp_path / "out" / "summary.md").read_text()
    for line in ("LEFT OUT from here on: counted", "WAITED TOO LONG: counter, line 121, step 7, block (3,0)"):
        assert line in summary
    log = (tmp_path / "out" / "log.txt").read_text()
    assert str(["--without", "counted", "--without", "barriers", "--without", "grid"]) in log


def test_what_was_running_is_read_from_what_was_said(tools: Any) -> None:
    import gpu_phases

    running_in = gpu_phases.running_in
    tests = "tests/test_cuda.py::test_a[grid-LSTM] PASSED\ntests/test_cuda.py::"
    assert running_in(tests + "test_b[cluster-GRU] ") == "counted"
    assert running_in(tests + "test_b[cluster-GRU] ", ["counted"]) == "barriers"
    assert running_in(tests + "test_layers_in_a_wavefront_match[2-LSTM] ") == "wavefront"
    # The last one says nothing, and the one before it is over.
    assert running_in(tests + "test_c ") == ""
    assert running_in(tests + "test_c \nWAITED TOO LONG: mbarrier, line 101, step -1, block (0,0)") == "counted"
    assert running_in("  forward as grid\n  forward: 1 ms\n  forward+backward as counted\n") == "counted"


def test_status_0_alone_proves_nothing(rehearse: Rehearse) -> None:
    found = rehearse(try_counted="0;", bench="0;", micro="0;", tests="print('no tests ran')")
    nothing = "status 0, but nothing that proves it"
    expected = dict.fromkeys(["try counted", "bench", "micro", "tests"], nothing)
    assert verdicts(found) == expected | {"anchor counted": "not run: counted is left out"}


def test_a_log_that_is_filled_keeps_its_beginning_and_its_end(
    rehearse: Rehearse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_phases

    monkeypatch.setattr(gpu_phases, "PHASE_BYTES", 100_000)
    monkeypatch.setattr(gpu_phases, "TAIL_BYTES", 10_000)
    monkeypatch.setattr(gpu_phases, "LOG_BYTES", 600_000)
    fills = "print('the first line')\nfor _ in range(40000): print('x' * 99)\nprint('the last line')"
    found = rehearse(only=["first"], anchor_grid=f"{fills}\nprint({GOOD['anchor']!r})", micro=fills)
    assert verdicts(found) == {"micro": "status 0, but nothing that proves it"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert len(log) < 500_000 and log.count("the first line") == 4  # two commands and their output
    assert log.count("bytes of output left out") == 2
    assert GOOD["read"] in log


def test_a_log_never_outgrows_what_comes_back(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_phases

    monkeypatch.setattr(gpu_phases, "LOG_BYTES", 1000)
    log = gpu_phases.Log(tmp_path / "log.txt")
    for _ in range(30):
        log.write("x" * 99 + "\n", "name")
    assert (tmp_path / "log.txt").stat().st_size == 1000
    assert gpu_phases.LOG_BYTES < 16 << 20


def test_tools_that_are_missing_are_named(rehearse: Rehearse, tmp_path: Path) -> None:
    missing = dict.fromkeys(["profile_forward", "profile_backward", "read_forward", "read_backward"], "no-ncu")
    missing |= dict.fromkeys(["memcheck", "racecheck", "synccheck"], "no-compute-sanitizer")
    found = rehearse(**missing)
    assert verdicts(found) == {name.replace("_", " "): f"{program} is not found" for name, program in missing.items()}


def test_without_phases_for_the_processor_the_others_are_complete(rehearse: Rehearse) -> None:
    found = rehearse(only=["first", "more"])
    assert verdicts(found) == {} and "bench" in found["phases"] and "table 1" not in found["phases"]
    found = rehearse(table_1="raise SystemExit(1)", check="raise SystemExit(1)", suite_alone=CRASHES)
    failed = dict.fromkeys(["table 1", "check"], "failed, status 1")
    assert verdicts(found) == failed | {"suite alone": "ended by SIGSEGV"}


def test_files_that_are_no_json_are_said_to_be_none(rehearse: Rehearse, tmp_path: Path) -> None:
    writes = "import pathlib; pathlib.Path({!r}).write_text({!r}); print({!r})"
    found = rehearse(
        only=["first"],
        micro=writes.format(str(tmp_path / "work" / "micro.json"), '{"multiply": ', GOOD["micro"]),
        anchor_grid=writes.format(str(tmp_path / "work" / "anchor_grid.json"), '{"64": {}}', GOOD["anchor"]),
    )
    assert found["micro"].startswith("no JSON: ") and found["anchor_grid"] == {"64": {}}


def test_time_that_runs_out_is_said(tools: Any, tmp_path: Path) -> None:
    import gpu_phases

    waiting = [gpu_phases.Phase(name, [sys.executable, "-c", "print(1)"], 30) for name in ("one", "two")]
    tools.prepare(tmp_path / "out", tmp_path / "work")
    done = tools.Run(waiting, tmp_path / "out", tmp_path / "work", total=2).go()
    assert [phase.verdict for phase in done] == ["not run: no time left"] * 2


def test_a_group_brings_the_builds_that_it_needs(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(only: str) -> list[str]:
        phases = tools.phases(tmp_path, tmp_path, "90a", [only])
        return [phase.name for phase in tools._with_builds(phases, tmp_path, tmp_path, "90a")]

    assert names("more") == ["build plain", "build limited", "tests", "bench", "memcheck", "racecheck", "synccheck"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    tables = [f"table {count}" for count in (1, 8, 4, 2)]
    assert names("cpu") == ["build cpu", *tables, "check", "suite", "suite alone"]
    assert names("bench") == ["build plain", "bench"]
    assert names("micro") == ["micro"]


def test_what_was_built_is_taken_again_for_the_same_sources_alone(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_library

    library = gpu_library.KINDS["plain"].folder / "fused_rnn" / "_C.stand-in.so"
    library.parent.mkdir(parents=True)
    library.write_text("built")
    packed = tmp_path / "built.tar.gz"
    gpu_library.pack(packed)
    gpu_library.forget()
    assert gpu_library.install("plain") == ""
    assert gpu_library.unpack(packed) == "" and library.read_text() == "built"
    assert gpu_library.install("limited") == "plain"
    monkeypatch.setattr(gpu_library, "sources_key", lambda: "of other sources")
    assert "built from other sources" in gpu_library.unpack(packed)
    packed.write_bytes(packed.read_bytes()[:50])
    assert str(packed) in gpu_library.unpack(packed)


def _main(tools: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """tools/gpu.py on a machine with a GPU, where every phase prints what proves it."""
    order = tools.phases

    def phases(*places: Any) -> list[Any]:
        found = order(*places)
        for phase in found:
            phase.command = [*PYTHON, f"print({GOOD[phase.name.split()[0]]!r})"]
        return list(found)

    monkeypatch.setattr(tools, "capability", lambda: (9, 0))
    monkeypatch.setattr(tools, "phases", phases)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    try:
        return int(tools.main())
    finally:
        monkeypatch.setattr(tools, "phases", order)


def test_the_next_call_takes_what_the_first_has_built(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_library

    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setenv("FUSED_RNN_CUDA_ARCHS", "90a")
    for name in ("plain", "limited"):
        library = gpu_library.KINDS[name].folder / "fused_rnn" / "_C.stand-in.so"
        library.parent.mkdir(parents=True)
        library.write_text(f"build {name}")
    out.mkdir()
    gpu_library.pack(out / "built.tar.gz")
    # Also where it lies in the folder that the run writes to.
    assert _main(tools, monkeypatch, "--only", "more", "--built", str(out / "built.tar.gz")) == 0
    said = capsys.readouterr().out
    assert "taken instead of a build" in said and "build plain" not in said and "| bench | ok |" in said
    assert (out / "built.tar.gz").exists()
    # What is measured afterwards, by hand, is not the build with limits.
    assert (tmp_path / "fused_rnn" / "_C.stand-in.so").read_text() == "build plain"
    # For another GPU it is none.
    monkeypatch.setenv("FUSED_RNN_CUDA_ARCHS", "100")
    _main(tools, monkeypatch, "--only", "bench", "--built", str(out / "built.tar.gz"))
    said = capsys.readouterr().out
    assert "for another Python, PyTorch or GPU" in said and "build plain: ok" in said


def test_a_machine_without_a_gpu_is_told_so_unless_none_is_needed(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("FUSED_RNN_CUDA_ARCHS", "90a")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(tools, "capability", lambda: "RuntimeError: no NVIDIA driver")
    with pytest.raises(SystemExit, match="no NVIDIA driver"):
        tools.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(tools, "capability", lambda: pytest.fail("asked for a GPU"))
    monkeypatch.setattr(tools.Run, "go", lambda run: run.waiting)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "cpu"])
    tools.main()
    assert "summary: " in capsys.readouterr().out
