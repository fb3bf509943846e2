"""`python -m fused_rnn.bench.gpu`: parity, then time on this GPU against cuDNN and what else is installed.

Every contestant's numbers are compared first, with the fused layer's and torch.nn's run in float32 without TF32. Then
contestants take turns: in each round each repeats its pass until the GPU has worked some milliseconds between two CUDA
events. Reported are medians over the rounds and the ratios of cuDNN's time to ours, beside the floor: what the step
cannot be faster than on this GPU, by what was measured on it in this run.

A run ends after --seconds (or FUSED_RNN_BENCH_SECONDS); what was not reached is named.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_rnn

from .. import info
from .gpu_cases import ANCHOR_US, BARS, DTYPES, MOST_FLOORS, PASSES, Bar, GpuCase, cases
from .gpu_peers import CUDNN, FUSED, PEERS, Problem, Run, importable
from .runner import TOLERANCES

ROUNDS = 7
# Of GPU work between two events: a launch's jitter of some microseconds is then a thousandth of it.
SAMPLE_MS = 3.0

# A product of TF32 numbers is off by 2^-10 of itself at most; the recurrence carries errors on.
TF32_TOLERANCE = {"results": 2e-2, "gradients": 5e-2}


@dataclass
class Measured:
    """One case and pass. Times in milliseconds of one pass, a list over the rounds for each contestant."""

    case: GpuCase
    which: str  # of PASSES
    variant: str = ""
    error: float = 0.0  # worst deviation of the fused results, as a share of each tensor's largest value
    problem: str = ""  # why it was not timed
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    floor_ms: float = 0.0  # forward only
    peak_bytes: dict[str, int] = field(default_factory=dict)

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


def check(problem: Problem, training: bool, measured: Measured) -> None:
    """Fills error, and problem where the numbers are wrong."""
    case = problem.case
    wide = Problem(GpuCase(**(asdict(case) | {"dtype": "float32"})))
    wide.twin.load_state_dict({name: value.float() for name, value in problem.twin.state_dict().items()})
    wide.grad = problem.grad.float()
    wide.input = problem.input.float()
    with tf32(False):
        expected = PEERS[CUDNN](wide, training)()
    errors = deviation(PEERS[FUSED](problem, training)(), expected)
    measured.error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    of_dtype = TOLERANCES[case.dtype]
    limits = (of_dtype.results, of_dtype.gradients)
    if case.dtype == "float32":
        limits = (TF32_TOLERANCE["results"], TF32_TOLERANCE["gradients"])
    if not all(error <= limits[min(i, 1)] for i, error in enumerate(errors)):
        theirs = deviation(PEERS[CUDNN](problem, training)(), expected)
        measured.problem = f"wrong numbers: off by {max(errors):.2g} (cuDNN: {max(theirs):.2g})"


def peak_of(run: Run) -> int:
    """Bytes allocated at the most during one pass, above what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: GpuCase, which: str, peers: list[str], machine: Machine) -> Measured:
    measured = Measured(case, which)
    training = which != "forward"
    problem = Problem(case)
    layer = problem.layer(fused_rnn, "cuda")
    with torch.set_grad_enabled(training):
        plan = fused_rnn.explain(layer, problem.input).plan
    if plan is not None:
        measured.variant = (plan["backward"] if training else plan)["variant"]
    check(problem, training, measured)
    if measured.problem:
        return measured
    runs: dict[str, Run] = {}
    for name in peers:
        try:
            runs[name] = PEERS[name](problem, training)
            runs[name]()
        except NotImplementedError:
            runs.pop(name, None)
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {error}", file=sys.stderr)
            runs.pop(name, None)
    calls = {name: calls_for(run) for name, run in runs.items()}
    measured.milliseconds = {name: [] for name in runs}
    order = list(runs)
    for _ in range(ROUNDS):
        for name in order:
            measured.milliseconds[name].append(milliseconds_of(runs[name], calls[name]))
        order.reverse()
    measured.peak_bytes = {name: peak_of(runs[name]) for name in (CUDNN, FUSED)}
    if not training:
        measured.floor_ms = machine.floor_ms(case)
    return measured


class Machine:
    """What the GPU can do, measured in this run."""

    def __init__(self) -> None:
        self.flops = {dtype: self._product_rate(dtype) for dtype in DTYPES}
        self.barriers_us = measured_barriers()

    def _product_rate(self, dtype: str) -> float:
        """Floating-point operations a second of a large matrix product."""
        size = 8192
        a, b = (torch.randn(size, size, device="cuda", dtype=DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            times = [milliseconds_of(lambda: torch.mm(a, b, out=out), 3) for _ in range(4)]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        return 2.0 * size**3 / (min(times) / 1e3)

    def floor_ms(self, case: GpuCase) -> float:
        """T steps of the longer of their arithmetic and a barrier, layers one after the other, and the projections."""
        barrier_us = self.barriers_us.get("cluster", 0.0)
        rate = self.flops[case.dtype]
        step_us = max(case.step_flops / case.num_layers / rate * 1e6, barrier_us)
        projections = sum(2.0 * rows * columns * depth for rows, columns, depth in case.projections()) / rate
        return case.num_layers * case.seq_length * step_us / 1e3 + projections * 1e3


def measured_barriers() -> dict[str, float]:
    """Microseconds from one barrier to the next, for a cluster of the most blocks and for a grid of all SMs."""
    from .. import _C

    many, few = 20000, 2000

    def latency(kind: str) -> float:
        _C.cuda_barrier(kind, few)
        longer = min(milliseconds_of(lambda: _C.cuda_barrier(kind, many), 1) for _ in range(3))
        return (longer - milliseconds_of(lambda: _C.cuda_barrier(kind, few), 1)) * 1e3 / (many - few)

    found = {}
    for kind in ("cluster", "grid"):
        try:
            found[kind] = latency(kind)
        except RuntimeError as error:
            print(f"barrier of a {kind}: {error}", file=sys.stderr)
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
    floors = [(r.median(FUSED) / r.floor_ms, r) for r in timed if r.floor_ms and r.variant not in ("", "none")]
    if floors:
        worst, case = max(floors, key=lambda pair: pair[0])
        met = "met" if worst <= MOST_FLOORS else "NOT met"
        lines.append(
            f"times the floor, persistent, worst: {worst:.2f} ({case.case.name}), at most {MOST_FLOORS}: {met}"
        )
    training = [r for r in timed if r.which != "forward"]
    if training:
        shares = [(r.peak_bytes[FUSED] / max(1, r.peak_bytes[CUDNN]), r) for r in training]
        worst, case = max(shares, key=lambda pair: pair[0])
        met = "met" if worst <= 1 else "NOT met"
        lines.append(
            f"memory of a training step against cuDNN, worst: {worst:.2f} ({case.case.name}), at most 1: {met}"
        )
    return lines


def _verdict_of(bar: Bar, which: str, timed: list[Measured]) -> str:
    chosen = [
        r
        for r in timed
        if r.which == which
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


def as_json(results: list[Measured], machine: Machine, missed: list[str]) -> dict[str, Any]:
    return {
        "environment": environment(),
        "flops": machine.flops,
        "barriers_us": machine.barriers_us,
        "results": [asdict(r) | {"name": r.case.name} for r in results],
        "bars": verdicts(results),
        "not_reached": missed,
    }


def markdown(report: dict[str, Any], results: list[Measured]) -> str:
    where = report["environment"]
    lines = [
        f"{where['device']}, driver {where['driver']}, PyTorch {where['torch']}, cuDNN {where['cudnn']}.",
        f"{where['date']}. Milliseconds, medians; ratio: cuDNN's time over ours.",
        "",
        "Barriers: " + (", ".join(f"{k} {v:.3f} us" for k, v in report["barriers_us"].items()) or "not measured") + ".",
        "Large products: " + ", ".join(f"{k} {v / 1e12:.0f} TFLOP/s" for k, v in report["flops"].items()) + ".",
        "",
        "## Bars",
        "",
        *(f"- {line}" for line in report["bars"]),
        "",
        "| grid | case | pass | variant | cuDNN | fused | ratio | floor | error | others |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        start = f"| {r.case.grid} | {r.case.name} | {r.which} | {r.variant} |"
        if r.problem:
            lines.append(f"{start} {r.problem} | | | | {r.error:.1e} | |")
            continue
        others = ", ".join(f"{n} {r.median(n):.3f}" for n in r.milliseconds if n not in (CUDNN, FUSED))
        floor = f"{r.floor_ms:.3f}" if r.floor_ms else ""
        times = f"{r.median(CUDNN):.3f} | {r.median(FUSED):.3f} | {r.ratio:.2f}"
        lines.append(f"{start} {times} | {floor} | {r.error:.1e} | {others} |")
    if report["not_reached"]:
        lines += [
            "",
            f"Not reached in time: {len(report['not_reached'])} of the cases, such as {report['not_reached'][0]}.",
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, 1 if a case had wrong numbers, 2 if there is no GPU or no kernel for it.
    """
    parser = argparse.ArgumentParser(prog="python -m fused_rnn.bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUSED_RNN_BENCH_SECONDS", 600)))
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--json", type=Path, help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, help="write the tables")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() or not (info.collect()["build"] or {}).get("cuda"):
        print("no CUDA device, or kernels built without CUDA: python -m fused_rnn info says which", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.seconds
    wanted = re.compile(arguments.cases, re.IGNORECASE)
    todo = [(case, which) for case in cases() if wanted.search(case.name) for which in PASSES]
    peers = importable()
    results: list[Measured] = []
    with tf32(True):
        machine = Machine()
        while todo and time.monotonic() < end:
            case, which = todo.pop(0)
            try:
                measured = measure(case, which, peers, machine)
            except torch.OutOfMemoryError as error:
                measured = Measured(case, which, problem=f"out of memory: {str(error).splitlines()[0]}")
            results.append(measured)
            shown = measured.problem or f"{measured.median(FUSED):.3f} ms, cuDNN / fused {measured.ratio:.2f}"
            print(f"{case.name}, {which}, {measured.variant}: {shown}", flush=True)
            # After every case: a run that is stopped leaves what it has measured.
            report = as_json(results, machine, [f"{c.name}, {w}" for c, w in todo])
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1, default=str))
            if arguments.markdown:
                arguments.markdown.write_text(markdown(report, results))
    for line in verdicts(results):
        print(line)
    return 1 if any(r.problem.startswith("wrong") for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
