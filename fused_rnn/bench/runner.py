"""Parity first, then interleaved timing."""

import gc
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import DTYPES, Case
from .peers import FUSED, TORCH_NN, Peer, Problem, Run, tensors_of


@dataclass(frozen=True)
class Plan:
    """How long a case is measured.

    Attributes:
        rounds: rounds of a case at most.
        min_rounds: rounds of a case at least, whatever they take.
        seconds: after `min_rounds`, no round is begun that would take the case past this.
        sample_seconds: a contestant repeats its call in each round until it has worked about this long.
    """

    rounds: int
    min_rounds: int
    seconds: float
    sample_seconds: float


FULL = Plan(rounds=15, min_rounds=5, seconds=4.0, sample_seconds=0.020)
QUICK = Plan(rounds=9, min_rounds=3, seconds=0.6, sample_seconds=0.005)


@dataclass(frozen=True)
class Tolerance:
    """Largest deviation allowed, as a share of the largest magnitude in the tensor compared."""

    results: float
    gradients: float


# float32 and float64: both sides round every step's sums in their own order. Outputs are bounded by 1 and the states of
# these weights forget, so errors stay at some tens of units in the last place; a weight gradient sums up to 6400
# (step, row) terms of both signs, hence the wider bound. bfloat16 and float16 are compared with torch.nn in float32 on
# the same rounded numbers: h is rounded every step, by 2^-9 (2^-12) of its value at most, and these errors add up.
TOLERANCES = {
    "float64": Tolerance(results=1e-13, gradients=1e-12),
    "float32": Tolerance(results=5e-6, gradients=2e-5),
    "float16": Tolerance(results=4e-3, gradients=2e-2),
    "bfloat16": Tolerance(results=3e-2, gradients=1e-1),
}


@dataclass(frozen=True)
class Deviation:
    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the rounds."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3)

    @property
    def relative(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.q3 - self.q1) / (2 * self.median)


@dataclass
class Result:
    """What was found for a case. `seconds` and `calls` are empty if parity failed.

    Attributes:
        kernel: what runs the fused layer.
        reference_reason: why that is not a kernel but the reference; `None` if it is a kernel.
        deviations: by peer, the deviation of every tensor from the yardstick.
        seconds: by peer, seconds of one call in each round.
        calls: by peer, calls in each round.
    """

    case: Case
    kernel: str = ""
    reference_reason: str | None = None
    yardstick: str = ""
    deviations: dict[str, list[Deviation]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.failures()

    def failures(self) -> list[tuple[str, Deviation]]:
        """Return every deviation past its tolerance, with its peer. torch.nn is not judged: its is for comparison."""
        return [
            (peer, deviation)
            for peer, found in self.deviations.items()
            for deviation in found
            if peer != TORCH_NN.name and not deviation.passed
        ]

    def time(self, peer: str) -> Spread:
        return Spread.of(self.seconds[peer])

    def ratio(self, peer: str) -> Spread:
        """Time of the peer over the time of the fused layer, round by round: above 1 the fused layer is faster."""
        pairs = zip(self.seconds[peer], self.seconds[FUSED.name], strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])

    @property
    def gflops(self) -> float:
        """Rate of the fused run, in 1e9 floating-point operations (`Case.flops`) a second."""
        return self.case.flops / self.time(FUSED.name).median / 1e9


def measure(case: Case, peers: Sequence[Peer], plan: Plan) -> Result:
    """Check the case, and time it if every peer has the right numbers."""
    problem = Problem(case)
    with torch.set_grad_enabled(case.training):
        explanation = FUSED.explain(problem)
        # The first line repeats the module and the sizes.
        kernel = "; ".join(line.strip() for line in str(explanation).splitlines()[1:])
        result = Result(case, kernel, reference_reason=explanation.reason)
        runs = {peer.name: peer.make(problem) for peer in peers if peer.supports(case)}
        _check(problem, runs, result)
        if result.passed:
            _time(runs, plan, result)
    return result


def _check(problem: Problem, runs: Mapping[str, Run], result: Result) -> None:
    dtype = problem.case.dtype
    wide = "float32" if DTYPES[dtype].itemsize < 4 else dtype
    yardstick = problem if wide == dtype else problem.to(DTYPES[wide])
    result.yardstick = f"torch.nn in {wide}"
    expected = list(tensors_of(TORCH_NN.make(yardstick)()))
    tolerance = TOLERANCES[dtype]
    for name, run in runs.items():
        if name == TORCH_NN.name and wide == dtype:
            continue  # it is the yardstick
        found = list(tensors_of(run()))
        result.deviations[name] = [
            Deviation(
                tensor_name,
                _deviation(found_tensor, expected_tensor),
                tolerance.gradients if tensor_name.startswith("gradient") else tolerance.results,
            )
            for tensor_name, found_tensor, expected_tensor in zip(problem.result_names(), found, expected, strict=True)
        ]


def _deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected; infinite for another shape, NaN if there is a NaN."""
    if found.shape != expected.shape:
        return math.inf
    scale = expected.detach().abs().max().item()
    difference = (found.detach().to(expected.dtype) - expected.detach()).abs().max().item()
    return difference / scale if scale else difference


def _time(runs: Mapping[str, Run], plan: Plan, result: Result) -> None:
    """Fill `seconds` and `calls`: contestants take turns, and the order turns round from one round to the next."""
    estimate = {name: _estimate(run, plan) for name, run in runs.items()}
    result.calls = {name: max(1, round(plan.sample_seconds / seconds)) for name, seconds in estimate.items()}
    round_seconds = sum(result.calls[name] * seconds for name, seconds in estimate.items())
    rounds = min(plan.rounds, max(plan.min_rounds, int(plan.seconds / round_seconds)))
    result.seconds = {name: [] for name in runs}
    order = list(runs)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                result.seconds[name].append(_time_calls(runs[name], result.calls[name]) / result.calls[name])
            order.reverse()
    finally:
        gc.enable()


def _estimate(run: Run, plan: Plan) -> float:
    """Return about how many seconds a call takes once it is warm."""
    calls = 1
    while (seconds := _time_calls(run, calls)) < plan.sample_seconds / 4:
        calls *= 4
    return seconds / calls


def _time_calls(run: Run, calls: int) -> float:
    repeats = range(calls)
    start = time.perf_counter()
    for _ in repeats:
        run()
    return time.perf_counter() - start


def geometric_means(results: Sequence[Result], peer: str) -> list[dict[str, Any]]:
    """Return the geometric mean of the ratios against a peer for every dtype, cell and mode, by group of shapes.

    Each entry has "dtype", "cell", "mode", the groups that were measured, and "all".
    """
    table: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for result in results:
        if result.passed and peer in result.seconds:
            case = result.case
            groups = table.setdefault((case.dtype, case.cell, case.mode), {})
            for group in (case.shape.group, "all"):
                groups.setdefault(group, []).append(result.ratio(peer).median)
    return [
        {"dtype": dtype, "cell": cell, "mode": mode}
        | {group: statistics.geometric_mean(ratios) for group, ratios in groups.items()}
        for (dtype, cell, mode), groups in table.items()
    ]
