"""`make gpu`: everything that only a GPU can show, what decides most first (docs/on-a-gpu.md is the page for it).

Three groups of phases, --only takes a group or the first word of a phase:

    first   builds beside micro-benchmarks of the machine, small calls of each variant, the anchor in each exchange,
            a profile of its kernels
    more    tests, benchmark, compute-sanitizer
    cpu     what is to be known of the processor: the CPU table and the whole test suite; needs no GPU

Each phase has a budget of seconds and survives the failure of every other. A kernel that faults is told from one that
computes wrong numbers and from one that hangs: the first and the last cost their variant, which is left out of what
follows; wrong numbers are reported, and the variant goes on.

What comes back, in $OUT where that is set, else in runs/gpu: summary.md, log.txt, results.json (machine,
micro-benchmarks, anchor, processor), gpu.json (the benchmark), measured.h (the planner's constants, to be put in
csrc/cuda), forward.ncu-rep and backward.ncu-rep, built.tar.gz (the extension, for --built in the next call).

Uses the Python that runs it and the PyTorch in it, and installs nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gpu_library
import gpu_machine
from gpu_phases import ROOT, Log, Losses, Phase, python, run

# Of all phases together, in seconds. What a phase leaves over goes to those after it.
TOTAL = 520
GROUPS = ("first", "more", "cpu")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# In which order they are tried: those whose exchange has least to go wrong come first.
TRIED = ("block", "barriers", "counted", "grid", "wavefront", "none")
# In which way the anchor is measured.
ANCHORS = ("counted", "barriers", "grid", "cudnn", "none")
# Of the CPU table; the two ends first.
THREADS = (16, 1, 8, 4, 2)
# Seconds without output after which a process on a GPU hangs: PyTorch starts in less.
STALL = 15
# Files in the working folder that are parts of results.json.
PARTS = ("machine", "micro", *(f"anchor_{name}" for name in ANCHORS), *(f"cpu_{count}" for count in THREADS))
# In the folder of results; the others stay in the working folder.
RESULTS = ("summary.md", "log.txt", "results.json", "gpu.json", "measured.h", "built.tar.gz")
PROFILES = ("forward.ncu-rep", "backward.ncu-rep")


def phases(folder: Path, work: Path, arch: str, only: list[str]) -> list[Phase]:
    """Most important first: what a stopped run has shown until then counts."""
    found = [*first_phases(folder, work, arch), *more_phases(folder, work), *cpu_phases(work)]
    return [phase for phase in found if not only or phase.group in only or phase.name.split()[0] in only]


def tool(name: str, *arguments: str) -> list[str]:
    return python(str(ROOT / "tools" / f"{name}.py"), *arguments)


def first_phases(folder: Path, work: Path, arch: str) -> list[Phase]:
    def anchor(name: str) -> Phase:
        command = tool("gpu_anchor", name, "--json", str(work / f"anchor_{name}.json"))
        return Phase(
            f"anchor {name}", command, 30, STALL, library="plain", variant=name, proof=r"(?m)^forward, events: "
        )

    constants = ["--results", str(folder / "results.json"), "--out", str(folder / "measured.h")]
    found = [
        Phase("machine", tool("gpu_machine", "--json", str(work / "machine.json")), 30, proof="gpu: name: "),
        gpu_library.build_phase("plain", 240),
        gpu_library.build_phase("limited", 240, beside=True),
        Phase(
            "micro",
            tool("gpu_micro", "--arch", arch, "--json", str(work / "micro.json")),
            120,
            stall=100,
            beside=True,
            proof=r"(?m)^\d+ of \d+ measured",
        ),
        Phase("constants", tool("gpu_constants", *constants), 15, proof="constants measured"),
        Phase("info", python("-m", "fused_rnn", "info"), 30, library="limited", proof="CUDA|cuda"),
    ]
    for name in TRIED:
        command = tool("gpu_sanitized", "--variant", name)
        proof = r"(?m)^\d+ calls right, 0 wrong, 0 failed"
        found.append(Phase(f"try {name}", command, 25, STALL, library="limited", tries=name, proof=proof))
    found += [anchor(name) for name in ANCHORS]
    for which in ("forward", "backward"):
        report = folder / f"{which}.ncu-rep"
        command = [*_profiler(which, report), *tool("gpu_anchor", "auto", "--profile", which)]
        # A kernel is run many times, for one group of counters after the other, and nothing is printed meanwhile.
        found.append(
            Phase(f"profile {which}", command, 50, library="plain", without="--without", proof="==PROF== Report")
        )
        # As text too, for whoever has no viewer.
        read = [_found("ncu"), "--import", str(report), "--page", "details"]
        found.append(Phase(f"read {which}", read, 20, proof="Duration"))
    for phase in found:
        phase.group = "first"
    return found


def more_phases(folder: Path, work: Path) -> list[Phase]:
    tests = python("-m", "pytest", "-p", "gpu_tests", "--gpu-log", str(work / "begun.txt"), "tests", "-m", "cuda")
    tests += ["-v", "-rfE", "--tb=short", "--continue-on-collection-errors"]
    bench = python("-m", "fused_rnn.bench.gpu", "--json", str(folder / "gpu.json"), "--resume")
    bench += ["--markdown", str(work / "gpu.md")]
    found = [
        Phase("tests", tests, 150, 25, True, library="limited", without="--gpu-without", proof=r"\d+ passed"),
        # Before the sanitizers: what they leave a GPU in, should they hang, is not to be measured.
        Phase(
            "bench",
            bench,
            150,
            25,
            True,
            library="plain",
            without="--without",
            seconds_option="--seconds",
            proof=r"(?m)^  forward as ",
        ),
    ]
    for name in SANITIZERS:
        command = [*_sanitizer(name), *tool("gpu_sanitized")]
        proof = r"(?m)^\d+ calls right, 0 wrong, 0 failed"
        found.append(Phase(name, command, 40, library="plain", without="--without", proof=proof))
    for phase in found:
        phase.group = "more"
    return found


def cpu_phases(work: Path) -> list[Phase]:
    # bfloat16 too, because of the units that some processors have for it.
    bench = python("-m", "fused_rnn", "bench", "--parts", "table", "--quick", "--dtype", "float32,bfloat16")

    def table(threads: int) -> Phase:
        command = [*bench, "--threads", str(threads), "--json", str(work / f"cpu_{threads}.json")]
        return Phase(f"table {threads}", command, 60, library="cpu", proof=r"\d+ of \d+ cases in")

    suite = python("-m", "pytest", "tests", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-m")
    found = [
        gpu_library.build_phase("cpu", 200),
        *(table(count) for count in THREADS if count <= len(os.sched_getaffinity(0))),
        Phase("check", python("-m", "fused_rnn", "check"), 90, library="cpu"),
        Phase("suite", [*suite, "not cuda and not alone", *_side_by_side()], 400, library="cpu", proof=r"\d+ passed"),
        Phase("suite alone", [*suite, "alone and not cuda"], 60, library="cpu", proof=r"\d+ passed"),
    ]
    for phase in found:
        phase.group = "cpu"
    return found


def _side_by_side() -> list[str]:
    """As many tests at once as there are processors, where pytest can do that."""
    there = importlib.util.find_spec("xdist") is not None
    return ["-n", str(len(os.sched_getaffinity(0))), "--dist", "worksteal"] if there else []


def _found(program: str, *folders: str) -> str:
    """Its path: tools of CUDA stand beside nvcc where they are not on PATH."""
    everywhere = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", *folders]
    return shutil.which(program, path=os.pathsep.join(everywhere)) or program


def _profiler(which: str, report: Path) -> list[str]:
    # The clocks are left as they are: they are not this program's to set. Of two passes the second.
    options = ["--clock-control", "none", "--set", "full", "--import-source", "yes", "--force-overwrite"]
    options += ["--kernel-name", f"regex:persistent.*{which}", "--launch-skip", "1", "--launch-count", "1"]
    return [_found("ncu"), *options, "--export", str(report)]


def _sanitizer(name: str) -> list[str]:
    program = _found("compute-sanitizer", "/usr/local/cuda/compute-sanitizer")
    # Kernels of this library alone, and no word about calls of the driver that PyTorch makes and that may fail.
    options = ["--kernel-name", "kns=fused_rnn", "--report-api-errors", "no", "--destroy-on-device-error", "kernel"]
    return [program, "--tool", name, *options, "--print-limit", "30", "--error-exitcode", "9"]


class Run:
    """Phases one after the other, and what they leave in the folder of results."""

    def __init__(self, waiting: list[Phase], folder: Path, work: Path, total: float) -> None:
        self.waiting, self.folder, self.work = list(waiting), folder, work
        self.log = Log(folder / "log.txt")
        self.end = time.monotonic() + total
        self.losses = Losses()
        self.builds = {phase.name.partition(" ")[2]: phase for phase in waiting if phase.name.startswith("build ")}
        self.done: list[Phase] = []

    def go(self) -> list[Phase]:
        while self.waiting:
            together = [self.waiting.pop(0)]
            while self.waiting and self.waiting[0].beside:
                together.append(self.waiting.pop(0))
            left = self.end - time.monotonic()
            # More than its budget where those that still wait leave something over.
            waiting = sum(phase.budget for phase in self.waiting if not phase.beside)
            for phase in together:
                phase.beside = len(together) > 1
            threads = [threading.Thread(target=self._run, args=(phase, left, waiting)) for phase in together]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for phase in together:
                self._after(phase)
        return self.done

    def _run(self, phase: Phase, left: float, waiting: float) -> None:
        seconds = min(left, max(phase.budget, left - waiting))
        why_not = "no time left" if seconds < min(5.0, phase.budget) else self._refusal(phase)
        if why_not:
            phase.verdict = f"not run: {why_not}"
            return
        print(f"{phase.name}: at most {seconds:.0f} s ...", flush=True)
        try:
            run(phase, self.log, seconds, self.losses)
        except Exception as error:  # of this program: the other phases are worth more than a traceback
            phase.verdict = f"{type(error).__name__} in the runner: {error}"
        if phase.library == "plain" or phase.name == "micro":
            phase.clock = gpu_machine.gpu().get("clocks.sm", "")

    def _refusal(self, phase: Phase) -> str:
        """Why the phase cannot run or would say nothing; makes its build of the extension the package's."""
        if phase.variant in self.losses.left_out:
            return f"{phase.variant} is left out"
        if not phase.library:
            return ""
        installed = gpu_library.install(phase.library)
        if not installed and self.builds:
            return f"no build of the extension ({', '.join(f'{n}: {p.verdict}' for n, p in self.builds.items())})"
        if installed and installed != phase.library:
            self.log.write(f"{phase.name}: on the build {installed}, because there is none that is {phase.library}\n")
        return ""

    def _after(self, phase: Phase) -> None:
        print(f"{phase.name}: {phase.verdict}, {phase.seconds:.0f} s", flush=True)
        for line in phase.failures[:10]:
            print(f"  {line[:200]}", flush=True)
        # Wrong numbers say that it ran: the tests and the benchmark may show which.
        if (
            phase.tries
            and not phase.ok
            and phase.verdict != "wrong numbers"
            and not phase.verdict.startswith("not run")
        ):
            if self.losses.leave_out(phase.tries):
                print(f"  without {phase.tries} from here on", flush=True)
        self.done.append(phase)
        try:
            if phase.name.startswith("build ") and phase.ok:
                gpu_library.pack(self.folder / "built.tar.gz")
            (self.folder / "results.json").write_text(json.dumps(self.results(), indent=1))
            (self.folder / "summary.md").write_text(self.summary())
        except Exception as error:
            print(f"  what is kept of it could not be written: {type(error).__name__}: {error}", flush=True)

    def results(self) -> dict[str, Any]:
        """What the phases have left in the working folder; a file that is no JSON is said to be none."""
        found: dict[str, Any] = {}
        for name in PARTS:
            path = self.work / f"{name}.json"
            if path.exists():
                try:
                    found[name] = json.loads(path.read_text())
                except ValueError as error:
                    found[name] = f"no JSON: {error}"
        found["phases"] = {
            phase.name: {"verdict": phase.verdict, "seconds": round(phase.seconds, 1), "clock": phase.clock}
            for phase in self.done
        }
        found["left out"] = self.losses.left_out
        return found

    def table(self) -> list[str]:
        return [
            f"Variants left out: {', '.join(self.losses.left_out) or 'none'}.",
            "",
            "| phase | result | seconds | SM clock after it |",
            "| --- | --- | --- | --- |",
            *(f"| {p.name} | {p.verdict} | {p.seconds:.0f} | {p.clock} |" for p in self.done),
        ]

    def summary(self) -> str:
        lines = [f"# GPU run of {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", "", *self.table(), ""]
        for phase in self.done:
            # The benchmark's tables are in the summary whole; of the others the end says what happened.
            tables = self.work / "gpu.md"
            text = tables.read_text() if phase.name == "bench" and tables.exists() else f"```\n{phase.last_lines}\n```"
            failures = [f"- {line[:400]}" for line in dict.fromkeys(phase.failures[:60])]
            lines += [f"## {phase.name}", "", *failures, *([""] if failures else []), text, ""]
        return "\n".join(lines)


def capability() -> tuple[int, int] | str:
    """Of the first GPU, or why there is none; asked in another process, which takes its CUDA context along."""
    probe = "import torch; print(torch.__version__, *torch.cuda.get_device_capability())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    if done.returncode == 0 and len(words) == 3:
        return int(words[1]), int(words[2])
    return (done.stderr.strip().splitlines() or ["no answer"])[-1]


def prepare(folder: Path, work: Path) -> None:
    """Removes what an earlier run has left where this one writes."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in (*RESULTS, *PROFILES):
        if name != "built.tar.gz":
            (folder / name).unlink(missing_ok=True)


def main() -> int:
    """Returns 0 if every phase was ok, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], help=f"of {', '.join(GROUPS)}, or this phase (may be repeated)"
    )
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--built", type=Path, metavar="FILE", help="built.tar.gz of an earlier run on the same sources")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu").absolute()
    work = gpu_library.FOLDER / "work"
    arch = ""
    if any(phase.group != "cpu" for phase in phases(folder, work, arch, arguments.only)):
        found = capability()
        if isinstance(found, str):
            raise SystemExit(f"error: PyTorch sees no CUDA device here: {found}; GPU_PYTHON= names another Python")
        # Machine code for the GPU that is here: the other architectures would not run.
        arch = "90a" if found == (9, 0) else f"{found[0]}0"
        os.environ.setdefault("FUSED_RNN_CUDA_ARCHS", arch)
    waiting = _with_builds(phases(folder, work, arch, arguments.only), folder, work, arch)
    built = arguments.built and arguments.built.read_bytes()
    prepare(folder, work)
    gpu_library.forget()
    if built:
        (folder / "built.tar.gz").write_bytes(built)
        problem = gpu_library.unpack(folder / "built.tar.gz")
        print(problem or f"{arguments.built}: taken instead of a build")
        if not problem:
            waiting = [phase for phase in waiting if phase.name not in ("build plain", "build limited")]
    run_of_all = Run(waiting, folder, work, arguments.total)
    done = run_of_all.go()
    gpu_library.install("plain")
    print("\n".join(run_of_all.table()))
    print(f"summary: {folder / 'summary.md'}")
    return 0 if all(phase.ok for phase in done) else 1


def _with_builds(waiting: list[Phase], folder: Path, work: Path, arch: str) -> list[Phase]:
    """Before the phases those builds that they need and that are not among them."""
    names = {phase.name for phase in waiting}
    needed = {f"build {phase.library}" for phase in waiting if phase.library} - names
    return [phase for phase in phases(folder, work, arch, []) if phase.name in needed] + waiting


if __name__ == "__main__":
    sys.exit(main())
