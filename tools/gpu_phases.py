"""One phase of `make gpu`: a command with a time limit, of which everything that can become is told apart.

A phase may do what a program on a GPU does when a kernel is wrong: end by a signal, raise, say wrong numbers, hang, say
nothing, fill the log. Each has its verdict, and none of them reaches past the phase. Standard library only.
"""

from __future__ import annotations

import collections
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Exit statuses of the programs that a phase runs, beside 0 and 1.
FAULT = 3  # the CUDA context is lost
WRONG = 4  # everything ran, some numbers are wrong
AGAIN = 75  # the CUDA context is lost, another process may go on after what took it
STATUSES = {0: "ok", FAULT: "fault", WRONG: "wrong numbers", AGAIN: "lost the CUDA context"}

# Processes of one phase.
MOST_PROCESSES = 8
# Seconds from an interrupt, on which pytest still says what failed, to the end.
GRACE = 4.0
# Of a phase's output this much goes to the log, and its end; of all phases LOG_BYTES, below the 16 MiB that many places
# take of a file.
PHASE_BYTES, TAIL_BYTES, LOG_BYTES = 3 << 20, 64 << 10, 15 << 20

# The persistent variants that can be left out; "none", a launch a step, is what runs then.
VARIANTS = ("block", "barriers", "counted", "grid", "wavefront")
# What device.h says when FRNN_WAIT_LIMIT is over, and whose waits those are, where nothing else says what was running.
WAITED = re.compile(r"WAITED TOO LONG: (mbarrier|counter)")
WAITS_OF = {"mbarrier": "counted", "counter": "grid"}
# The benchmark says what comes next, and tests have it in their names.
RUNNING = re.compile(r"^  \S+ as (\w+)|^\S+\.py::(\S+)", re.MULTILINE)


@dataclass
class Phase:
    """What is to be run, and what became of it.

    Args:
        budget: seconds that are its own; it may get more.
        stall: seconds without output after which it hangs; 0: output says nothing.
        resumes: run again, the command goes on after what it was at.
        group: --only takes it too.
        library: which build of the extension it needs (gpu_library.py); "": none.
        beside: runs at the same time as the phase before it.
        variant: what it measures, so that there is no point in it where that hangs or faults.
        tries: what it tries, which is left out of what follows unless it ends by itself.
        proof: a pattern that its output has where it did what it should: status 0 alone proves nothing.
        without: the option that leaves a variant out, if the command has one.
        seconds_option: the option that tells the command its time.
    """

    name: str
    command: list[str]
    budget: float
    stall: float = 0
    resumes: bool = False
    group: str = ""
    library: str = ""
    beside: bool = False
    variant: str = ""
    tries: str = ""
    proof: str = ""
    without: str = ""
    seconds_option: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    verdict: str = "not run"
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)  # lines of output
    last_lines: str = ""
    clock: str = ""  # of the GPU right after it

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"


class Log:
    """log.txt of all phases, which does not outgrow LOG_BYTES; lines of phases side by side have their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._left = LOG_BYTES - (path.stat().st_size if path.exists() else 0)

    def write(self, text: str, name: str = "") -> None:
        if name:
            text = "".join(f"[{name}] {line}" for line in text.splitlines(keepends=True))
        data = text.encode(errors="replace")
        with self._lock, self.path.open("ab") as file:
            file.write(data[: max(0, self._left)])
            self._left -= len(data)


class Losses:
    """Variants that hung or took the CUDA context along: which, how often, and which are left out for it."""

    def __init__(self, left_out: Iterable[str] = ()) -> None:
        self.left_out = list(left_out)
        self._counts: collections.Counter[str] = collections.Counter()

    def leave_out(self, variant: str) -> bool:
        """Whether it was not left out before, and can be."""
        if variant not in VARIANTS or variant in self.left_out:
            return False
        self.left_out.append(variant)
        return True

    def seen(self, variant: str, hung: bool) -> bool:
        """A hang costs its stall and is enough; a lost context may be one case's, the second is not."""
        self._counts[variant] += 1
        return (hung or self._counts[variant] > 1) and self.leave_out(variant)


def running_in(output: str, left_out: Iterable[str] = ()) -> str:
    """The variant that a process was at when it ended; "" where its output does not say."""
    words = re.split(r"[^a-z]+", "".join((RUNNING.findall(output) or [("", "")])[-1]))
    if found := [word for word in words if word in VARIANTS]:
        return found[0]
    if "cluster" in words:
        return "barriers" if "counted" in left_out else "counted"
    waited = WAITED.search(output)
    return WAITS_OF[waited[1]] if waited else ""


def run(phase: Phase, log: Log, seconds: float, losses: Losses | None = None) -> None:
    """Runs the phase for at most so many seconds; its output goes to the log and, in short, to the phase."""
    losses = losses or Losses()
    start = time.monotonic()
    counts: dict[str, int] = {}
    output = ""
    while True:
        left = seconds - (time.monotonic() - start)
        verdict, said = _run_once(phase, log, left, losses.left_out)
        output += said
        counts[verdict] = counts.get(verdict, 0) + 1
        if not phase.resumes or verdict not in ("hung", STATUSES[AGAIN]):
            break
        variant = running_in(said, losses.left_out)
        if losses.seen(variant, verdict == "hung" or WAITED.search(said) is not None):
            line = f"LEFT OUT from here on: {variant}\n"
            output += line
            log.write(line)
        if sum(counts.values()) >= MOST_PROCESSES or time.monotonic() - start > seconds - 2 * GRACE:
            break
    phase.verdict = ", ".join(name if count == 1 else f"{name} {count} times" for name, count in counts.items())
    phase.seconds = time.monotonic() - start
    lines = output.splitlines()
    telling = ("FAILED at once", "ERROR ", "HUNG", "FAULT", "WRONG", "LEFT OUT")
    phase.failures = [line for line in lines if line.startswith(telling) or WAITED.search(line)]
    phase.last_lines = "\n".join([line[:400] for line in lines if line][-15:])


def _command(phase: Phase, seconds: float, without: list[str]) -> list[str]:
    command = list(phase.command)
    if phase.seconds_option:
        command += [phase.seconds_option, f"{max(5.0, seconds - GRACE):.0f}"]
    if phase.without:
        command += [part for name in without for part in (phase.without, name)]
    return command


def _run_once(phase: Phase, log: Log, seconds: float, without: list[str]) -> tuple[str, str]:
    """One process: what became of it, and what it printed."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | phase.environment
    paths = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = _command(phase, seconds, without)
    name = phase.name if phase.beside else ""
    log.write(f"\n===== {phase.name}: {shlex.join(command)}\n")
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Shells start what runs in the background with interrupts ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    except OSError as error:
        known = isinstance(error, FileNotFoundError)
        verdict = f"{command[0]} is not found" if known else f"{command[0]} cannot be run: {error.strerror}"
        log.write(verdict + "\n", name)
        return verdict, verdict + "\n"
    output = _Output(process, log, name)
    end = time.monotonic() + seconds
    while True:
        try:
            status = process.wait(timeout=0.1)
            verdict = _verdict_of(status)
            break
        except subprocess.TimeoutExpired:
            pass
        now = time.monotonic()
        if phase.stall and now - output.moved > phase.stall:
            verdict = "hung"
        elif now > end:
            verdict = f"stopped after {seconds:.0f} s"
        else:
            continue
        _end(process)
        break
    said = output.finish()
    if verdict == "hung":
        line = f"HUNG: no output for {phase.stall:.0f} s\n"
        log.write("\n" + line, name)
        said += "\n" + line
    if verdict == "ok" and not re.search(phase.proof, said):
        verdict = "status 0, but nothing that proves it"
    return verdict, said


def _verdict_of(status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return STATUSES.get(status, f"failed, status {status}")


class _Output:
    """Reads what a process prints, all of it, and keeps as much as the log may hold: the beginning and the end."""

    def __init__(self, process: subprocess.Popen[bytes], log: Log, name: str) -> None:
        self.moved = time.monotonic()
        self._process, self._log, self._name = process, log, name
        self._kept: list[str] = []
        self._line = b""  # that has not ended
        self._tail: collections.deque[bytes] = collections.deque()
        self._tail_bytes = self._lost_bytes = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        left = PHASE_BYTES
        while data := os.read(stream.fileno(), 1 << 16):
            self.moved = time.monotonic()
            if left > 0:
                left -= len(data)
                # Whole lines, so that those of phases side by side do not run into each other.
                lines, newline, self._line = (self._line + data).rpartition(b"\n")
                self._keep(lines + newline)
                continue
            self._tail.append(data)
            self._tail_bytes += len(data)
            while self._tail_bytes - len(self._tail[0]) > TAIL_BYTES:
                self._tail_bytes -= len(self._tail[0])
                self._lost_bytes += len(self._tail.popleft())

    def _keep(self, data: bytes) -> None:
        text = data.decode(errors="replace")
        self._kept.append(text)
        self._log.write(text, self._name)

    def finish(self) -> str:
        """All that was kept. A descendant that holds the pipe open is not waited for."""
        self._thread.join(timeout=2.0)
        self._keep(self._line)
        if self._lost_bytes:
            self._keep(f"\n... {self._lost_bytes} bytes of output left out ...\n".encode())
        for data in list(self._tail):
            self._keep(data)
        return "".join(self._kept)


def _end(process: subprocess.Popen[bytes]) -> None:
    """First by an interrupt; one that waits for a GPU in vain does not hear it."""
    for sent, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, 30.0)):
        try:
            os.killpg(process.pid, sent)
            process.wait(timeout=patience)
            break
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    # What the process has started and left behind is in its group too.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.poll()


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
