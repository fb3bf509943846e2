"""`python -m fused_rnn.bench.gpu`: parity, then time on this GPU against cuDNN and what else is installed.

Every contestant's numbers are compared first, with the fused layer's and torch.nn's run in float32 without TF32. Then
contestants take turns: in each round each repeats its pass until the GPU has worked some milliseconds between two CUDA
events. Reported are medians over the rounds and the ratios of cuDNN's time to ours, beside the floor: what the pass
cannot be faster than on this GPU, by what was measured on it in this run. Times of the same passes as replayed CUDA
graphs stand beside them: where a pass is short, the others are in part those of Python and of launches.

A run ends after --seconds (or FUSED_RNN_BENCH_SECONDS); what was not reached is named. Where a kernel takes the CUDA
context with it, status 75 asks for another process that goes on after that case (--resume).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_rnn

from .. import info
from .gpu_cases import (
    ANCHOR_US,
    BAR_GRIDS,
    BARS,
    DTYPES,
    MOST_FLOORS,
    PASSES,
    VARIANTS,
    Bar,
    GpuCase,
    allowed_without,
    cases,
    variant_of,
)
from .gpu_peers import CUDNN, FUSED, PEERS, Problem, Run, importable, runs_on_cudnn
from .runner import TOLERANCES

SCHEMA = 1  # raised when a field of the JSON changes its meaning

ROUNDS = 7
REPLAY_ROUNDS = 3
PRODUCT_SIZE = 8192
# Of GPU work between two events: a launch's jitter of some microseconds is then a thousandth of it.
SAMPLE_MS = 3.0

# Exit status: the process is of no more use, another may go on (tools/gpu.py).
AGAIN = 75

# A product of TF32 numbers is off by 2^-10 of itself at most; the recurrence carries errors on.
TF32_TOLERANCE = {"results": 2e-2, "gradients": 5e-2}


@dataclass
class Measured:
    """One case and pass. Times in milliseconds of one pass, a list over the rounds for each contestant."""

    case: GpuCase
    which: str  # of PASSES
    variant: str = ""
    layers: int = 1  # that run at once
    rival: str = ""  # what CUDNN stands for here, where it is not cuDNN in this dtype
    error: float = 0.0  # worst deviation of the fused results, as a share of each tensor's largest value
    problem: str = ""  # why it was not timed
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    floor_ms: float = 0.0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    replayed: dict[str, float] = field(default_factory=dict)  # the median as a CUDA graph, in milliseconds

    @property
    def kernels(self) -> str:
        """The variant, and how many layers run at once where it is not one."""
        return self.variant + (f" of {self.layers} layers" if self.layers > 1 else "")

    def median(self, peer: str) -> float:
        return statistics.median(self.milliseconds[peer])

    @property
    def ratio(self) -> float:
        """cuDNN's time over ours, the median over the rounds."""
        pairs = zip(self.milliseconds[CUDNN], self.milliseconds[FUSED], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def milliseconds_of(run: Callable[[], Any], calls: int) -> float:
    """Of one call, by CUDA events around `calls` of them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def captured(run: Run) -> Callable[[], Any]:
    """The same pass as a CUDA graph; what it is given and what it returns stay where they are."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()  # what is made once is made here
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def replayed_milliseconds(run: Run) -> float:
    """The median of a pass as a CUDA graph."""
    replay = captured(run)
    calls = calls_for(replay)
    return statistics.median(milliseconds_of(replay, calls) for _ in range(REPLAY_ROUNDS))


def calls_for(run: Callable[[], Any]) -> int:
    """How many calls take about SAMPLE_MS, once it is warm."""
    run()
    return max(1, math.ceil(SAMPLE_MS / max(milliseconds_of(run, 2), 1e-3)))


def deviation(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each tensor the largest difference over the largest magnitude expected; NaN where there is one."""
    result = []
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().item() or 1.0
        result.append(((ours.float() - theirs.float()).abs().max() / scale).item())
    return result


def expected_of(problem: Problem) -> list[Tensor]:
    """Output and gradients by torch.nn, in float32 without TF32."""
    wide = Problem(replace(problem.case, dtype="float32"), problem)
    with tf32(False):
        return PEERS[CUDNN](wide, True)()


def check(problem: Problem, expected: list[Tensor], training: bool, measured: Measured) -> None:
    """Fills error, and problem where the numbers are wrong."""
    case = problem.case
    expected = expected if training else expected[:1]
    errors = deviation(PEERS[FUSED](problem, training)(), expected)
    measured.error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    of_dtype = TOLERANCES[case.dtype]
    limits = (of_dtype.results, of_dtype.gradients)
    if case.dtype == "float32":
        limits = (TF32_TOLERANCE["results"], TF32_TOLERANCE["gradients"])
    if not all(error <= limits[min(i, 1)] for i, error in enumerate(errors)):
        theirs = deviation(PEERS[CUDNN](problem, training)(), expected)
        measured.problem = f"wrong numbers: off by {measured.error:.2g} (cuDNN: {max(theirs):.2g})"


def peak_of(run: Run) -> int:
    """Bytes allocated at the most during one pass, above what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class ContextLost(Exception):
    """The process can do nothing more on this GPU."""


@contextmanager
def attempt(measured: list[Measured]) -> Iterator[None]:
    """What goes wrong inside is the problem of these, and no reason to end the run unless the context is lost."""
    try:
        yield
    except ContextLost:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[:1] or [""]
        kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        for one in measured:
            one.problem = one.problem or f"failed: {kind}: {first[0]}"
            one.milliseconds = {}
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise ContextLost(str(error).splitlines()[0]) from error


def measure(case: GpuCase, peers: list[str], machine: Machine) -> list[Measured]:
    """Both passes of a case, forward first.

    Raises:
        ContextLost: with `args[1]` what was measured until then.
    """
    results = [Measured(case, which) for which in PASSES]
    try:
        with attempt(results):
            problem = Problem(case)
            expected = expected_of(problem)
            for measured in results:
                with attempt([measured]):
                    measure_pass(problem, expected, measured, peers, machine)
    except ContextLost as error:
        for measured in results:
            if not measured.milliseconds:
                measured.problem = measured.problem or "not measured: the CUDA context is lost"
        raise ContextLost(str(error), results) from error
    return results


def measure_pass(
    problem: Problem, expected: list[Tensor], measured: Measured, peers: list[str], machine: Machine
) -> None:
    """Fills `measured`."""
    case, training = measured.case, measured.which != "forward"
    layer = problem.layer(fused_rnn)
    with torch.set_grad_enabled(training):
        plan = fused_rnn.explain(layer, problem.input).plan
    if plan is not None:
        chosen = plan["backward"] if training else plan
        measured.variant, measured.layers = chosen["variant"], chosen["layers"]
        if chosen["variant"] == "cluster":
            measured.variant = chosen["exchange"]
        # Before it runs: whoever reads this knows what did, if nothing follows.
        print(f"  {measured.which} as {variant_of(chosen)}", flush=True)
    check(problem, expected, training, measured)
    if measured.problem:
        return
    runs: dict[str, Run] = {}
    for name in peers:
        theirs = problem
        if name == CUDNN and case.dtype == "bfloat16" and not runs_on_cudnn(problem):
            # Its formulas op by op would be no match.
            theirs = Problem(replace(case, dtype="float16"), problem)
            measured.rival = "cuDNN in float16"
        try:
            runs[name] = PEERS[name](theirs, training)
            runs[name]()
        except NotImplementedError:
            runs.pop(name, None)
        except Exception as error:
            if name == FUSED:
                raise
            print(f"  {name}: {type(error).__name__}: {error}", file=sys.stderr)
            runs.pop(name, None)
    calls = {name: calls_for(run) for name, run in runs.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(ROUNDS):
        for name in order:
            milliseconds[name].append(milliseconds_of(runs[name], calls[name]))
        order.reverse()
    measured.peak_bytes = {name: peak_of(runs[name]) for name in (CUDNN, FUSED) if name in runs}
    measured.floor_ms = machine.floor_ms(case, measured.which)
    measured.milliseconds = milliseconds
    # Last: a capture that fails costs nothing of what was measured until then.
    for name in [name for name in (CUDNN, FUSED) if name in runs]:
        try:
            measured.replayed[name] = replayed_milliseconds(runs[name])
        except Exception as error:
            print(f"  {name} as a graph: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)


@dataclass
class Machine:
    """What the GPU can do, measured in this run."""

    flops: dict[str, float]  # a second, of a large product in each of DTYPES
    barriers_us: dict[str, float]  # of a cluster and of the grid, and an "exchange" inside a cluster

    def floor_ms(self, case: GpuCase, which: str) -> float:
        # The least that lets blocks hear of each other. A barrier of a cluster is more than that: its release is a
        # fence of the whole GPU.
        heard = [self.barriers_us[kind] for kind in ("exchange", "cluster") if kind in self.barriers_us]
        return case.floor_us(which, self.flops[case.dtype], min(heard, default=0.0)) / 1e3


def measured_machine(barriers: bool = True) -> Machine:
    return Machine({dtype: _product_rate(dtype) for dtype in DTYPES}, measured_barriers() if barriers else {})


def _product_rate(dtype: str) -> float:
    """Floating-point operations a second of a large matrix product, float32 in TF32."""
    size = PRODUCT_SIZE
    a, b = (torch.randn(size, size, device="cuda", dtype=DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        times = [milliseconds_of(lambda: torch.mm(a, b, out=out), 3) for _ in range(4)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2.0 * size**3 / (min(times) / 1e3)


def measured_barriers() -> dict[str, float]:
    """Microseconds from one to the next, in a cluster of the most blocks ("exchange": of asynchronous stores between
    all of its blocks) and on a grid of all SMs."""
    from .. import _C

    many, few = 20000, 2000

    def latency(kind: str) -> float:
        _C.cuda_barrier(kind, few)
        torch.cuda.synchronize()
        longer = min(milliseconds_of(lambda: _C.cuda_barrier(kind, many), 1) for _ in range(3))
        return (longer - milliseconds_of(lambda: _C.cuda_barrier(kind, few), 1)) * 1e3 / (many - few)

    found = {}
    for kind in ("exchange", "cluster", "grid"):
        try:
            found[kind] = latency(kind)
        except RuntimeError as error:
            print(f"barrier, {kind}: {error}", file=sys.stderr)
    return found


def verdicts(results: list[Measured]) -> list[str]:
    """A line for each bar: what was asked, what was measured, whether it is met."""
    timed = [r for r in results if not r.problem and FUSED in r.milliseconds and CUDNN in r.milliseconds]
    lines = [_verdict_of(bar, which, timed) for bar in BARS for which in PASSES]
    anchor = [r for r in timed if r.case == cases()[0]]
    times = {r.which: r.median(FUSED) * 1e3 / r.case.seq_length for r in anchor}
    if len(times) == len(PASSES):
        steps = {"forward": times["forward"], "backward": times["forward+backward"] - times["forward"]}
        for name, most in ANCHOR_US.items():
            met = "met" if steps[name] <= most else "NOT met"
            lines.append(f"{anchor[0].case.name}, {name}: {steps[name]:.2f} us a step, at most {most}: {met}")
    for which in PASSES:
        floors = [(r.median(FUSED) / r.floor_ms, r) for r in timed if r.which == which and _has_floor(r)]
        if not floors:
            continue
        worst, case = max(floors, key=lambda pair: pair[0])
        mean = statistics.geometric_mean(floor for floor, _ in floors)
        met = "met" if worst <= MOST_FLOORS else "NOT met"
        lines.append(
            f"times the floor, persistent, {which}: geometric mean {mean:.2f} of {len(floors)} cases; "
            f"worst {worst:.2f} ({case.case.name}), at most {MOST_FLOORS}: {met}"
        )
    for grid in dict.fromkeys(r.case.grid for r in timed if r.case.grid not in BAR_GRIDS):
        for which in PASSES:
            if chosen := [r for r in timed if r.case.grid == grid and r.which == which]:
                mean = statistics.geometric_mean(r.ratio for r in chosen)
                slowest = min(chosen, key=lambda r: r.ratio)
                lines.append(
                    f"{grid} (no bar), {which}: geometric mean {mean:.2f} of {len(chosen)} cases; "
                    f"worst {slowest.ratio:.2f} ({slowest.case.name})"
                )
    for which in PASSES:
        if both := [r for r in timed if r.which == which and {CUDNN, FUSED} <= r.replayed.keys()]:
            mean = statistics.geometric_mean(r.replayed[CUDNN] / r.replayed[FUSED] for r in both)
            lines.append(f"as CUDA graphs (no bar), {which}: geometric mean {mean:.2f} of {len(both)} cases")
    # Of the same dtype: a rival in another one has memory of its own kind.
    training = [r for r in timed if r.which != "forward" and not r.rival]
    if training:
        shares = [(r.peak_bytes[FUSED] / max(1, r.peak_bytes[CUDNN]), r) for r in training]
        worst, case = max(shares, key=lambda pair: pair[0])
        met = "met" if worst <= 1 else "NOT met"
        lines.append(
            f"memory of a training step against cuDNN, worst: {worst:.2f} ({case.case.name}), at most 1: {met}"
        )
    return lines


def _has_floor(r: Measured) -> bool:
    """Whether blocks met at barriers: one by itself does not, and the floor, which has them, says nothing of it."""
    return r.floor_ms > 0 and r.variant not in ("", "none", "block")


def _verdict_of(bar: Bar, which: str, timed: list[Measured]) -> str:
    chosen = [
        r
        for r in timed
        if r.which == which
        and r.case.grid in BAR_GRIDS
        and r.case.dtype in bar.dtypes
        and r.case.hidden_size <= bar.most_hidden
        and (bar.persistent or r.variant == "none")
    ]
    if not chosen:
        return f"{bar.what}, {which}: not measured"
    mean = statistics.geometric_mean(r.ratio for r in chosen)
    slowest = min(chosen, key=lambda r: r.ratio)
    worst = slowest.ratio
    met = "met" if mean >= bar.mean and worst >= bar.worst else "NOT met"
    return (
        f"{bar.what}, {which}: geometric mean {mean:.2f} of {len(chosen)} cases, at least {bar.mean}; "
        f"worst {worst:.2f} ({slowest.case.name}), at least {bar.worst}: {met}"
    )


def environment() -> dict[str, Any]:
    described = info.collect()
    del described["fused_rnn"]["folder"]
    properties = torch.cuda.get_device_properties(0)
    return described | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": properties.name,
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"(\d+\.\d+(\.\d+)?)", text)
    return match.group(1) if match else "unknown"


def as_json(
    results: list[Measured], machine: Machine | None, missed: list[str], described: dict[str, Any], without: list[str]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "environment": described,
        "without": without,
        "machine": asdict(machine) if machine else None,
        "results": [asdict(r) | {"name": r.case.name} for r in results],
        "bars": verdicts(results),
        "not_reached": missed,
    }


def from_json(report: dict[str, Any]) -> tuple[list[Measured], Machine | None]:
    """What `as_json` was given."""
    known = {one.name for one in fields(Measured)}
    results = []
    for entry in report["results"]:
        values = {name: value for name, value in entry.items() if name in known}
        results.append(Measured(**values | {"case": GpuCase(**entry["case"])}))
    return results, Machine(**report["machine"]) if report["machine"] else None


def write(path: Path, text: str) -> None:
    """All of it or nothing, however the run ends."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def markdown(report: dict[str, Any], results: list[Measured]) -> str:
    where = report["environment"]
    lines = [
        f"{where['device']}, driver {where['driver']}, PyTorch {where['torch']}, cuDNN {where['cudnn']}.",
        f"{where['date']}. Milliseconds, medians; ratio: cuDNN's time over ours.",
        "",
        *_machine_lines(report["machine"]),
        *([f"Left out: the variants {', '.join(report['without'])}."] if report["without"] else []),
        "",
        "## Bars",
        "",
        *(f"- {line}" for line in report["bars"]),
        "",
        "| grid | case | pass | variant | cuDNN | fused | ratio | as graphs: cuDNN | fused | floor | error | others |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        start = f"| {r.case.grid} | {r.case.name} | {r.which} | {r.kernels} |"
        if r.problem:
            lines.append(f"{start} {r.problem} | | | | | | {r.error:.1e} | |")
            continue
        others = [f"{n} {r.median(n):.3f}" for n in r.milliseconds if n not in (CUDNN, FUSED)]
        others += [f"{CUDNN} is {r.rival}"] if r.rival else []
        if CUDNN in r.milliseconds:
            times = f"{r.median(CUDNN):.3f} | {r.median(FUSED):.3f} | {r.ratio:.2f}"
        else:
            times = f"| {r.median(FUSED):.3f} |"
        graphs = " | ".join(f"{r.replayed[n]:.3f}" if n in r.replayed else "" for n in (CUDNN, FUSED))
        lines.append(f"{start} {times} | {graphs} | {r.floor_ms:.3f} | {r.error:.1e} | {', '.join(others)} |")
    if report["not_reached"]:
        lines += [
            "",
            f"Not reached in time: {len(report['not_reached'])} of the cases, such as {report['not_reached'][0]}.",
        ]
    return "\n".join(lines) + "\n"


def _machine_lines(machine: dict[str, Any] | None) -> list[str]:
    if machine is None:
        return []
    barriers = ", ".join(f"{name} {us:.3f} us" for name, us in machine["barriers_us"].items())
    products = ", ".join(f"{name} {flops / 1e12:.0f} TFLOP/s" for name, flops in machine["flops"].items())
    return [f"Barriers: {barriers or 'not measured'}.", f"Large products: {products}."]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, 1 if a case had wrong numbers or failed, 2 if there is no GPU or no kernel for it, 75 if another process has
        to go on.
    """
    parser = argparse.ArgumentParser(prog="python -m fused_rnn.bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUSED_RNN_BENCH_SECONDS", 600)))
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--json", type=Path, help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, help="write the tables")
    parser.add_argument("--resume", action="store_true", help="go on after what --json has, and the case that followed")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=[*VARIANTS[:-1], "cluster"],
        help="a persistent variant that is not to be used (may be repeated)",
    )
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() or not (info.collect()["build"] or {}).get("cuda"):
        print("no CUDA device, or kernels built without CUDA: python -m fused_rnn info says which", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.seconds
    wanted = re.compile(arguments.cases, re.IGNORECASE)
    todo = [case for case in cases() if wanted.search(case.name)]
    results: list[Measured] = []
    machine: Machine | None = None
    resumed = arguments.resume and arguments.json and arguments.json.exists()
    if resumed:
        results, machine = from_json(json.loads(arguments.json.read_text()))
        done = {r.case for r in results}
        todo = [case for case in todo if case not in done]
        if todo and machine is not None:
            silent = todo.pop(0)
            results += [Measured(silent, which, problem="failed: hung, or ended its process") for which in PASSES]
    if arguments.without:
        from .. import _C

        _C.cuda_allow(**allowed_without(arguments.without))
    described = environment()

    def save() -> None:
        report = as_json(results, machine, [case.name for case in todo], described, arguments.without)
        if arguments.json:
            write(arguments.json, json.dumps(report, indent=1, default=str))
        if arguments.markdown:
            write(arguments.markdown, markdown(report, results))

    peers = importable()
    lost = False
    with tf32(True):
        save()
        # Without the barriers where those, or what is before them, ended the process before this.
        try:
            machine = machine or measured_machine(barriers=not resumed)
        except RuntimeError as error:
            print(f"what the GPU can do: {error}", file=sys.stderr)
            return 1 if resumed else AGAIN
        save()
        while todo and time.monotonic() < end and not lost:
            print(f"{todo[0].name} ...", flush=True)
            try:
                found = measure(todo[0], peers, machine)
            except ContextLost as error:
                lost = True
                message, found = error.args
                print(f"  the CUDA context is lost: {message}", flush=True)
            todo.pop(0)
            results += found
            for one in found:
                print(f"  {one.which}, {one.kernels}: {_shown(one)}", flush=True)
            # After every case: a run that is stopped leaves what it has measured.
            save()
    if lost:
        return AGAIN
    for line in verdicts(results):
        print(line)
    for r in results:
        if r.problem:
            print(f"{'WRONG' if r.problem.startswith('wrong') else 'ERROR'} {r.case.name}, {r.which}: {r.problem}")
    return 1 if any(r.problem for r in results) else 0


def _shown(one: Measured) -> str:
    if one.problem:
        return one.problem
    ratio = f", cuDNN / fused {one.ratio:.2f}" if CUDNN in one.milliseconds else ""
    return f"{one.median(FUSED):.3f} ms{ratio}, floor {one.floor_ms:.3f}"


if __name__ == "__main__":
    sys.exit(main())
