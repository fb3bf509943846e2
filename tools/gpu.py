"""`make gpu`: everything that only a GPU can show, in one run of under nine minutes on 16 cores.

Builds the extension with CUDA, tries small calls of each variant, runs the tests marked `cuda`, the benchmark, then
compute-sanitizer on small calls. Each phase has a budget of seconds; a phase that runs out of it is stopped and
reported, and the next one still runs. A kernel that hangs or takes the CUDA context with it costs the test or case that
it stood in: the phase goes on after it in another process, and a variant whose smallest calls hang or crash is left out
of everything that follows.

summary.md, log.txt (what all phases printed), gpu.json and gpu.md go to one folder: $OUT where that is set, else
runs/gpu.

Uses the Python that runs it and the PyTorch in it, and installs nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of all phases together, in seconds. What a phase leaves over goes to those after it.
TOTAL = 520
# Exit status of a process that another may go on after (gpu_tests.py, fused_rnn.bench.gpu).
AGAIN = 75
# Processes of one phase.
MOST_PROCESSES = 8
# Seconds from an interrupt, on which pytest still says what failed, to the end.
GRACE = 8.0
VARIANTS = ("cluster", "wavefront", "grid", "block", "none")
SANITIZERS = ("memcheck", "racecheck", "synccheck")


@dataclass
class Phase:
    name: str
    command: list[str]
    budget: float  # seconds
    stall: float = 0  # seconds without output after which it hangs; 0: output says nothing
    resumes: bool = False  # run again, the command goes on after what it was at
    verdict: str = "not run"
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)  # lines of output
    last_lines: str = ""


def phases(folder: Path, only: list[str]) -> list[Phase]:
    """Most important first: what a stopped run has shown until then counts."""
    python = [sys.executable]
    small = [*python, str(ROOT / "tools" / "gpu_sanitized.py")]
    tests = [*python, "-m", "pytest", "-p", "gpu_tests", "--gpu-log", str(folder / "begun.txt"), "tests", "-m", "cuda"]
    tests += ["-v", "-rfE", "--tb=short", "--continue-on-collection-errors"]
    bench = [*python, "-m", "fused_rnn.bench.gpu", "--json", str(folder / "gpu.json"), "--resume"]
    found = [
        Phase("build", [*python, "setup.py", "build_ext", "--inplace"], 240),
        Phase("info", [*python, "-m", "fused_rnn", "info"], 30),
        *(Phase(f"try {name}", [*small, "--variant", name], 40, stall=25) for name in VARIANTS),
        Phase("tests", tests, 150, stall=40, resumes=True),
        # Before the sanitizers: what they leave a GPU in, should they hang, is not to be measured.
        Phase("bench", [*bench, "--markdown", str(folder / "gpu.md")], 150, stall=40, resumes=True),
    ]
    found += [Phase(tool, [*_sanitizer(tool), *small], 40) for tool in SANITIZERS]
    return [phase for phase in found if not only or phase.name.split()[0] in only]


def _sanitizer(tool: str) -> list[str]:
    # Beside nvcc where it is not on PATH.
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders)) or "compute-sanitizer"
    # Kernels of this library alone, and no word about calls of the driver that PyTorch makes and that may fail.
    options = ["--kernel-name", "kns=fused_rnn", "--report-api-errors", "no", "--destroy-on-device-error", "kernel"]
    return [program, "--tool", tool, *options, "--print-limit", "30", "--error-exitcode", "9"]


def run(phase: Phase, folder: Path, seconds: float, without: list[str] | None = None) -> None:
    """Runs the phase for at most so many seconds; its output goes to log.txt and, in short, to the summary."""
    log = folder / "log.txt"
    start = time.monotonic()
    begin = log.stat().st_size if log.exists() else 0
    counts: dict[str, int] = {}
    while True:
        left = seconds - (time.monotonic() - start)
        verdict = _run_once(phase, log, left, without or [])
        goes_on = phase.resumes and verdict in ("hung", "lost the CUDA context")
        counts[verdict] = counts.get(verdict, 0) + 1
        if not goes_on or sum(counts.values()) >= MOST_PROCESSES or time.monotonic() - start > seconds - 2 * GRACE:
            break
    phase.verdict = ", ".join(name if count == 1 else f"{name} {count} times" for name, count in counts.items())
    phase.seconds = time.monotonic() - start
    with log.open(errors="replace") as file:
        file.seek(begin)
        lines = file.read().splitlines()
    phase.failures = [line for line in lines if line.startswith(("FAILED at once", "ERROR ", "HUNG"))]
    phase.last_lines = "\n".join([line for line in lines if line and not line.startswith("===== ")][-15:])


def _run_once(phase: Phase, log: Path, seconds: float, without: list[str]) -> str:
    """One process; what became of it."""
    environment = os.environ | {"FUSED_RNN_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = phase.command
    if phase.name == "bench":
        command = [*command, "--seconds", f"{max(5.0, seconds - GRACE):.0f}"]
        command += [part for name in without for part in ("--without", name)]
    elif phase.name == "tests":
        command = [*command, *(part for name in without for part in ("--gpu-without", name))]
    elif phase.name in SANITIZERS and without:
        command = [*command, *(part for name in VARIANTS if name not in without for part in ("--variant", name))]
    with log.open("a") as file:
        file.write(f"\n===== {phase.name}: {shlex.join(command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Shells start what runs in the background with interrupts ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        except FileNotFoundError:
            file.write(f"{command[0]} is not found\n")
            return f"{command[0]} is not found"
        end = time.monotonic() + seconds
        size, moved = -1, time.monotonic()
        while True:
            try:
                status = process.wait(timeout=0.2)
                return {0: "ok", AGAIN: "lost the CUDA context"}.get(status, f"failed, status {status}")
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            if log.stat().st_size != size:
                size, moved = log.stat().st_size, now
            if phase.stall and now - moved > phase.stall:
                _end(process)
                file.write(f"\nHUNG: no output for {phase.stall:.0f} s\n")
                return "hung"
            if now > end:
                _end(process)
                return f"stopped after {seconds:.0f} s"


def _end(process: subprocess.Popen[bytes]) -> None:
    """First by an interrupt; one that waits for a GPU in vain does not hear it."""
    for sent, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, 60.0)):
        try:
            os.killpg(process.pid, sent)
            process.wait(timeout=patience)
            break
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.poll()


def summary(done: list[Phase], folder: Path) -> str:
    lines = [
        f"# GPU run of {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "",
        "| phase | result | seconds |",
        "| --- | --- | --- |",
        *(f"| {phase.name} | {phase.verdict} | {phase.seconds:.0f} |" for phase in done),
        "",
    ]
    for phase in done:
        # The benchmark's tables are in the summary whole; of the others the end says what happened.
        tables = folder / "gpu.md"
        text = tables.read_text() if phase.name == "bench" and tables.exists() else f"```\n{phase.last_lines}\n```"
        failures = [f"- {line}" for line in dict.fromkeys(phase.failures[:60])]
        lines += [f"## {phase.name}", "", *failures, *([""] if failures else []), text, ""]
    return "\n".join(lines)


def is_built() -> bool:
    """Whether an extension with CUDA for this GPU is there and loads."""
    probe = "from fused_rnn import _C; print(_C.build_info()['cuda_architectures'])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode == 0 and os.environ["FUSED_RNN_CUDA_ARCHS"] in done.stdout.strip().split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="run this phase alone (may be repeated)")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--built", action="store_true", help="take the extension that is there, if it loads")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"error: this Python has no PyTorch ({error}); name another with GPU_PYTHON=") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"error: PyTorch {torch.__version__} sees no CUDA device here")
    folder = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("log.txt", "begun.txt", "gpu.json", "gpu.md"):
        (folder / name).unlink(missing_ok=True)
    major, minor = torch.cuda.get_device_capability()
    # Machine code for the GPU that is here: the other architectures would not run.
    os.environ.setdefault("FUSED_RNN_CUDA_ARCHS", "90a" if (major, minor) == (9, 0) else f"{major}0")

    end = time.monotonic() + arguments.total
    done: list[Phase] = []
    without: list[str] = []
    waiting = phases(folder, arguments.only)
    if arguments.built and is_built():
        waiting = [phase for phase in waiting if phase.name != "build"]
    while waiting:
        phase = waiting.pop(0)
        left = end - time.monotonic()
        # More than its budget where those that still wait leave something over.
        seconds = min(left, max(phase.budget, left - sum(p.budget for p in waiting)))
        print(f"{phase.name}: at most {seconds:.0f} s ...", flush=True)
        if seconds < 5:
            phase.verdict = "not run: no time left"
        else:
            run(phase, folder, seconds, without)
        print(f"{phase.name}: {phase.verdict}, {phase.seconds:.0f} s", flush=True)
        for line in phase.failures[:10]:
            print(f"  {line}", flush=True)
        done.append(phase)
        (folder / "summary.md").write_text(summary(done, folder))
        if phase.name == "build" and phase.verdict != "ok":
            print(phase.last_lines)
            break
        first, _, name = phase.name.partition(" ")
        # Status 1 is wrong numbers: the others may still show which.
        if first == "try" and name != "none" and phase.verdict not in ("ok", "failed, status 1"):
            print(f"  without {name} from here on", flush=True)
            without.append(name)
    print(f"summary: {folder / 'summary.md'}")
    return 0 if all(phase.verdict == "ok" for phase in done) else 1


if __name__ == "__main__":
    sys.exit(main())
