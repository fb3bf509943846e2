"""Fewer processors than threads: how much slower a call gets, beside what the processors lost explain.

Every process of a scenario is a child that waits for orders on its standard input. All are started first; then the
scenarios take turns, and while one is measured the others sleep.
"""

import contextlib
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import environment
from .cases import Case, Shape
from .peers import FUSED, TORCH_NN, Problem, Run

# One call of each is about 1 and 20 ms alone: shorter than the time slices that processes get, and longer.
SHAPES = (
    Shape("crowded", 1, 100, 256, 256, part="crowded"),
    Shape("crowded", 64, 40, 256, 512, part="crowded"),
)
CASES = tuple(Case(shape, "lstm", "inference", "float32") for shape in SHAPES)

# A child answers later than this only if something hangs. torch.nn took 1.2 s for one call of 1 ms.
ANSWER_LIMIT_SECONDS = 30.0
# Threads of a child spin after an order until each has had some milliseconds of a processor; 64 threads take a second.
_IDLE_LIMIT_SECONDS = 3.0
_IDLE_STEP_SECONDS = 0.03
_CALM_THREADS = 2


@dataclass(frozen=True)
class Scenario:
    """Some processes, each with a number of threads, on all processors or on a few."""

    name: str
    processes: int
    threads: int
    processors: int | None = None

    def loss(self, machine: int) -> float:
        """Return by how much the processors lost slow a process down, on a machine with so many processors.

        Alone it runs on two of them. Crowded, `processes` share the processors that are there.
        """
        wanted = self.processes * min(_CALM_THREADS, machine)
        return max(1.0, wanted / min(machine, self.processors or machine))


# How often a contestant is measured. torch.nn is there for comparison, and takes long.
REPEATS = {FUSED.name: 3, TORCH_NN.name: 1}

ALONE = Scenario("alone", 1, _CALM_THREADS)
SCENARIOS = (
    Scenario("pinned", 1, _CALM_THREADS, processors=1),
    Scenario("four processes", 4, _CALM_THREADS),
    Scenario("64 threads", 1, 64),
)


@dataclass
class Crowding:
    """What was found for a case in a scenario.

    Attributes:
        loss: `Scenario.loss` on this machine.
        seconds: by contestant, the mean time of a call in each repeat; empty where a call did not come back.
        alone: the same without a crowd.
    """

    scenario: Scenario
    case: Case
    loss: float
    seconds: dict[str, list[float]] = field(default_factory=dict)
    alone: dict[str, list[float]] = field(default_factory=dict)

    def beyond_loss(self, contestant: str) -> float | None:
        """Return how many times slower than alone it was, over what the processors lost explain."""
        crowded, alone = self.seconds.get(contestant), self.alone.get(contestant)
        if not crowded or not alone:
            return None
        return statistics.median(crowded) / statistics.median(alone) / self.loss


def measure(
    *,
    cases: Sequence[Case] = CASES,
    repeats: Mapping[str, int] = REPEATS,
    seconds: float = 0.4,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Crowding]:
    """Measure every case in every scenario.

    The mean of the calls is taken, not the median: what makes a crowded call slow is that some wait very long.

    Args:
        cases: of `CASES`.
        repeats: by contestant, how often.
        seconds: how long each time, if a call does not take longer.
        progress: is told what comes next.
    """
    machine = len(os.sched_getaffinity(0))
    everything = (ALONE, *SCENARIOS)
    times: dict[tuple[Scenario, Case, str], list[float]] = {}
    progress("starting processes")
    with contextlib.ExitStack() as stack:
        children = {
            scenario: [stack.enter_context(_Child(scenario)) for _ in range(scenario.processes)]
            for scenario in everything
        }
        for child in itertools.chain(*children.values()):
            child.answer()  # it is ready
        rounds = [(name, case) for name, count in repeats.items() for _ in range(count) for case in cases]
        for contestant, case in rounds:
            # The one without a crowd between those with one: a machine that slows down slows all.
            for scenario in everything:
                progress(f"{scenario.name}, {contestant}, {case.shape.name}")
                for child in children[scenario]:
                    child.order(case, contestant, seconds)
                answers = [child.answer() for child in children[scenario]]
                taken = times.setdefault((scenario, case, contestant), [])
                taken += [answer for answer in answers if answer is not None]
                _wait_until_idle(list(itertools.chain(*children.values())))
    return [
        Crowding(
            scenario,
            case,
            scenario.loss(machine),
            seconds={name: times[scenario, case, name] for name in repeats},
            alone={name: times[ALONE, case, name] for name in repeats},
        )
        for scenario, case in itertools.product(SCENARIOS, cases)
    ]


def _wait_until_idle(children: "Sequence[_Child]") -> None:
    end = time.perf_counter() + _IDLE_LIMIT_SECONDS
    while time.perf_counter() < end:
        before = sum(child.processor_ticks() for child in children)
        time.sleep(_IDLE_STEP_SECONDS)
        if sum(child.processor_ticks() for child in children) == before:
            return


class _Child:
    """A process of a scenario. One that does not answer in time is ended, and answers nothing from then on."""

    def __init__(self, scenario: Scenario) -> None:
        before = os.sched_getaffinity(0)
        if scenario.processors:
            os.sched_setaffinity(0, sorted(before)[: scenario.processors])
        try:  # a child has the processors of the thread that starts it
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({scenario.threads})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            os.sched_setaffinity(0, before)
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)

    def order(self, case: Case, contestant: str, seconds: float) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it was ended
            print(json.dumps([CASES.index(case), contestant, seconds]), file=self._process.stdin, flush=True)

    def processor_ticks(self) -> int:
        """Return the processor time it has used, in units of 1 / 100 s; 0 when it was ended."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0
        return int(fields[11]) + int(fields[12])  # utime and stime, proc(5)

    def answer(self) -> float | None:
        """Return the seconds of one call, the mean of an order's calls; `None` if none came in time."""
        if self._process.poll() is not None:
            return None
        try:
            return float(self._answers.get(timeout=ANSWER_LIMIT_SECONDS))
        except queue.Empty:
            self._process.kill()
            self._process.wait()
            return None


def serve(threads: int) -> None:
    """Do what standard input orders, until it ends: the other side of `_Child`."""
    torch.set_num_threads(threads)
    environment.keep_freed_memory()
    makers: dict[str, Callable[[Problem], Run]] = {peer.name: peer.make for peer in (FUSED, TORCH_NN)}
    problems = [Problem(case) for case in CASES]
    runs: dict[tuple[int, str], Run] = {}
    print(0.0, flush=True)
    with torch.no_grad():
        for line in sys.stdin:
            index, contestant, seconds = json.loads(line)
            if (index, contestant) not in runs:
                runs[index, contestant] = makers[contestant](problems[index])
            print(_mean_seconds(runs[index, contestant], seconds), flush=True)


def _mean_seconds(run: Run, seconds: float) -> float:
    run()
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        run()
        calls += 1
    return elapsed / calls
