"""`make gpu`: everything that only a GPU can show, in one run of under nine minutes on 16 cores.

Builds the extension with CUDA, runs the tests marked `cuda`, then compute-sanitizer on small calls, then the benchmark.
Each phase has a budget of seconds; a phase that runs out of it is stopped and reported, and the next one still runs.
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
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of all phases together, in seconds. What a phase leaves over goes to those after it.
TOTAL = 520


@dataclass
class Phase:
    name: str
    command: list[str]
    budget: float  # seconds
    verdict: str = "not run"
    seconds: float = 0.0
    last_lines: str = ""


def phases(folder: Path, only: list[str]) -> list[Phase]:
    python = [sys.executable]
    sanitized = [str(ROOT / "tools" / "gpu_sanitized.py")]
    found = [
        Phase("build", [*python, "setup.py", "build_ext", "--inplace"], 240),
        Phase("info", [*python, "-m", "fused_rnn", "info"], 30),
        # Most important first: what a stopped run has shown until then counts.
        Phase(
            "tests", [*python, "-m", "pytest", "tests", "-m", "cuda", "-q", "-rfE", "--tb=short", "--maxfail=40"], 150
        ),
    ]
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck", "synccheck"):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *python, *sanitized]
            found.append(Phase(tool, command, 40))
    bench = [*python, "-m", "fused_rnn.bench.gpu", "--json", str(folder / "gpu.json")]
    found.append(Phase("bench", [*bench, "--markdown", str(folder / "gpu.md")], 150))
    return [phase for phase in found if not only or phase.name in only]


def run(phase: Phase, folder: Path, seconds: float) -> None:
    """Runs the phase for at most so many seconds; its output goes to log.txt and, in short, to the summary."""
    log = folder / "log.txt"
    environment = os.environ | {"FUSED_RNN_CUDA": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    if phase.name == "bench":
        environment["FUSED_RNN_BENCH_SECONDS"] = str(max(10.0, seconds - 10))
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n===== {phase.name}: {shlex.join(phase.command)}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            phase.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
            phase.verdict = "ok" if status == 0 else f"failed, status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            phase.verdict = f"stopped after {seconds:.0f} s"
    phase.seconds = time.monotonic() - start
    with log.open(errors="replace") as file:
        file.seek(begin)
        phase.last_lines = "\n".join(file.read().splitlines()[-15:])


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
        lines += [f"## {phase.name}", "", text, ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="run this phase alone (may be repeated)")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"error: this Python has no PyTorch ({error}); name another with GPU_PYTHON=") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"error: PyTorch {torch.__version__} sees no CUDA device here")
    folder = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").unlink(missing_ok=True)
    major, minor = torch.cuda.get_device_capability()
    # Machine code for the GPU that is here: the other architectures would not run.
    os.environ.setdefault("FUSED_RNN_CUDA_ARCHS", "90a" if (major, minor) == (9, 0) else f"{major}{0}")

    end = time.monotonic() + arguments.total
    done: list[Phase] = []
    waiting = phases(folder, arguments.only)
    while waiting:
        phase = waiting.pop(0)
        left = end - time.monotonic()
        # Half of what is left is the most that a phase may take from those that still wait, beyond its own budget.
        kept = sum(p.budget for p in waiting)
        seconds = min(left, max(phase.budget, left - kept))
        print(f"{phase.name}: at most {seconds:.0f} s ...", flush=True)
        if seconds < 5:
            phase.verdict = "not run: no time left"
        else:
            run(phase, folder, seconds)
        print(f"{phase.name}: {phase.verdict}, {phase.seconds:.0f} s", flush=True)
        done.append(phase)
        (folder / "summary.md").write_text(summary(done, folder))
        if phase.name == "build" and phase.verdict != "ok":
            print(phase.last_lines)
            break
    print(f"summary: {folder / 'summary.md'}")
    return 0 if all(phase.verdict == "ok" for phase in done) else 1


if __name__ == "__main__":
    sys.exit(main())
