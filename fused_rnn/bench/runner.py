"""Parity first, then interleaved timing."""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import DTYPES, Case
from .environment import OtherProcesses
from .peers import FUSED, TORCH_NN, Peer, Problem, Run, tensors_of


@dataclass(frozen=True)
class Plan:
    """How long a case is measured.

    Attributes:
        min_rounds: rounds of a case at least, whatever they take.
        max_rounds: rounds of a case at most.
        seconds: after `min_rounds`, no round is begun that would take the case past this.
        precision: rounds end before that, but not before the fifth, when the median of every ratio is known to this
            share of it (standard error).
        sample_seconds: a contestant repeats its call in each round until it has worked about this long.
        doubtful_ratio, doubtful_seconds: where a ratio is below, `seconds` is this instead: the verdict on a case that
            seems slower should not be a few rounds' noise.
    """

    min_rounds: int
    max_rounds: int
    seconds: float
    precision: float
    sample_seconds: float
    doubtful_ratio: float = 0.0
    doubtful_seconds: float = 0.0


# Every case of the table decides about a bar, of the workloads none does; of the many in the sweeps the worst does,
# and that is looked at longer.
TABLE = Plan(
    min_rounds=3,
    max_rounds=30,
    seconds=1.2,
    precision=0.01,
    sample_seconds=0.015,
    doubtful_ratio=1.05,
    doubtful_seconds=2.5,
)
WORKLOAD = Plan(min_rounds=3, max_rounds=15, seconds=0.8, precision=0.02, sample_seconds=0.01)
SWEEP = Plan(
    min_rounds=3,
    max_rounds=40,
    seconds=0.12,
    precision=0.02,
    sample_seconds=0.003,
    doubtful_ratio=1.02,
    doubtful_seconds=1.5,
)
# Of many cases with large weights the worst decides.
SERVING = Plan(
    min_rounds=3,
    max_rounds=30,
    seconds=0.4,
    precision=0.01,
    sample_seconds=0.008,
    doubtful_ratio=1.05,
    doubtful_seconds=2.0,
)
QUICK = Plan(min_rounds=3, max_rounds=9, seconds=0.5, precision=0.02, sample_seconds=0.005)

# Precision is not judged by fewer rounds.
_ROUNDS_TO_JUDGE = 5


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


def standard_error(samples: Sequence[float]) -> float:
    """Return the standard error of the median of samples, as a share of it, were their distribution normal."""
    # The standard deviation is 1.483 half distances of the quartiles, the median's error 1.253 / sqrt(n) of that.
    return 1.253 * 1.483 * Spread.of(samples).relative / math.sqrt(len(samples))


@dataclass(kw_only=True)
class Rounds:
    """Times of contestants that took turns. Ratios are taken round by round.

    Attributes:
        seconds: by contestant, seconds of one call in each round.
        calls: by contestant, calls in each round.
        peak: operations a second that the arithmetic units reached in each round; empty where it was not measured.
        disturbed_rounds: rounds thrown away because other processes were at work.
        disturbed_rounds_kept: rounds that count all the same, because there were too many of these.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    peak: list[float] = field(default_factory=list)
    disturbed_rounds: int = 0
    disturbed_rounds_kept: int = 0

    def time(self, peer: str) -> Spread:
        return Spread.of(self.seconds[peer])

    def ratio(self, peer: str) -> Spread:
        """Time of the peer over the time of the fused layer, round by round: above 1 the fused layer is faster."""
        return Spread.of(self._ratios(peer))

    def _ratios(self, peer: str) -> list[float]:
        pairs = zip(self.seconds[peer], self.seconds[FUSED.name], strict=True)
        return [theirs / ours for theirs, ours in pairs]

    def enough(self, plan: Plan, elapsed: float) -> bool:
        """Tell whether the rounds so far, which took `elapsed` seconds, are all that the plan wants."""
        rounds = len(self.seconds[FUSED.name])
        if rounds < plan.min_rounds or rounds >= plan.max_rounds:
            return rounds >= plan.max_rounds
        ratios = [self._ratios(peer) for peer in self.seconds if peer != FUSED.name]
        doubtful = any(statistics.median(samples) < plan.doubtful_ratio for samples in ratios)
        precise = rounds >= _ROUNDS_TO_JUDGE and all(standard_error(samples) < plan.precision for samples in ratios)
        allowed = max(plan.seconds, plan.doubtful_seconds) if doubtful else plan.seconds
        return precise or elapsed * (rounds + 1) / rounds > allowed


@dataclass
class Result(Rounds):
    """What was found for a case. `seconds` and `calls` are empty if parity failed.

    Attributes:
        kernel: what runs the fused layer.
        reference_reason: why that is not a kernel but the reference; `None` if it is a kernel.
        deviations: by peer, the deviation of every tensor from the yardstick.
    """

    case: Case
    threads: int = 1
    kernel: str = ""
    reference_reason: str | None = None
    yardstick: str = ""
    deviations: dict[str, list[Deviation]] = field(default_factory=dict)

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

    @property
    def gflops(self) -> float:
        """Rate of the fused run, in 1e9 floating-point operations (`Case.flops`) a second."""
        return self.case.flops / self.time(FUSED.name).median / 1e9

    def share_of_peak(self, peer: str) -> Spread | None:
        """Rate of the peer over the peak, round by round; `None` where no peak was measured."""
        pairs = zip(self.seconds[peer], self.peak, strict=False)
        return Spread.of([self.case.flops / seconds / peak for seconds, peak in pairs]) if self.peak else None


def measure(
    case: Case,
    peers: Sequence[Peer],
    plan: Plan,
    *,
    peak: Callable[[str], float] | None = None,
    others: OtherProcesses | None = None,
) -> Result:
    """Check the case, and time it if every peer has the right numbers.

    Args:
        case: what to measure, on the threads that PyTorch is set to.
        peers: contestants; those that do not support the case are left out.
        plan: how long.
        peak: measures the arithmetic units for a dtype, in operations a second; called once a round.
        others: watches for other processes, with what patience is left for all cases.
    """
    problem = Problem(case)
    with torch.set_grad_enabled(case.training):
        explanation = FUSED.explain(problem)
        # The first line repeats the module and the sizes.
        kernel = "; ".join(line.strip() for line in str(explanation).splitlines()[1:])
        result = Result(case, torch.get_num_threads(), kernel, reference_reason=explanation.reason)
        contestants = {peer.name: peer for peer in peers if peer.supports(case)}
        runs = {name: peer.make(problem) for name, peer in contestants.items()}
        first_seconds = _check(problem, runs, result)
        if result.passed:
            # A first call can take several times as long as the others, but that of much work is believed.
            long = 10 * plan.sample_seconds if case.flops >= 1e9 else math.inf
            believed = {name: seconds for name, seconds in first_seconds.items() if seconds >= long}
            interleave(
                runs,
                plan,
                result,
                expected=believed,
                pools={name: peer.pool for name, peer in contestants.items()},
                peak=functools.partial(peak, case.dtype) if peak else None,
                others=others,
            )
    return result


def _check(problem: Problem, runs: Mapping[str, Run], result: Result) -> dict[str, float]:
    """Fill in the deviations; return the seconds that the first call of each contestant took."""
    dtype = problem.case.dtype
    wide = "float32" if DTYPES[dtype].itemsize < 4 else dtype
    yardstick = TORCH_NN.make(problem if wide == dtype else problem.to(DTYPES[wide]))
    result.yardstick = f"torch.nn in {wide}"
    seconds = {}
    expected, yardstick_seconds = _tensors_and_seconds(yardstick)
    for name, run in runs.items():
        if name == TORCH_NN.name and wide == dtype:
            seconds[name] = yardstick_seconds
            continue
        found, seconds[name] = _tensors_and_seconds(run)
        result.deviations[name] = _deviations(problem, found, expected)
    return seconds


def _tensors_and_seconds(run: Run) -> tuple[list[Tensor], float]:
    start = time.perf_counter()
    results = run()
    return list(tensors_of(results)), time.perf_counter() - start


def _deviations(problem: Problem, found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[Deviation]:
    tolerance = TOLERANCES[problem.case.dtype]
    return [
        Deviation(
            name,
            deviation_of(found_tensor, expected_tensor),
            tolerance.gradients if name.startswith("gradient") else tolerance.results,
        )
        for name, found_tensor, expected_tensor in zip(problem.result_names(), found, expected, strict=True)
    ]


def deviation_of(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected; infinite for another shape, NaN if there is a NaN."""
    if found.shape != expected.shape:
        return math.inf
    scale = expected.detach().abs().max().item()
    difference = (found.detach().to(expected.dtype) - expected.detach()).abs().max().item()
    return difference / scale if scale else difference


def interleave(
    runs: Mapping[str, Run],
    plan: Plan,
    rounds: Rounds,
    *,
    expected: Mapping[str, float] | None = None,
    pools: Mapping[str, str] | None = None,
    peak: Callable[[], float] | None = None,
    others: OtherProcesses | None = None,
) -> None:
    """Time the runs in turns, and fill in the rounds; the order turns round from one round to the next.

    Args:
        runs: what is called, by contestant.
        plan: how long.
        rounds: where the times go; those of an earlier call are dropped.
        expected: seconds of a call, where they are known; of the others, calls are timed first.
        pools: whose threads a contestant computes on, if not all on the same.
        peak: measures the arithmetic units, in operations a second; called once a round.
        others: watches for other processes, with what patience is left for all calls of this function.
    """
    others = others or OtherProcesses()
    seconds_of = {name: (expected or {}).get(name) or _estimate(run, plan) for name, run in runs.items()}
    rounds.calls = {name: max(1, round(plan.sample_seconds / seconds_of[name])) for name in runs}
    rounds.seconds = {name: [] for name in runs}
    order = list(runs)
    pool_of = dict.fromkeys(runs, "") | dict(pools or {})
    last_pool: str | None = None
    gc.collect()
    gc.disable()
    try:
        start, wasted = time.perf_counter(), 0.0
        while not rounds.enough(plan, time.perf_counter() - start - wasted):
            others.start()
            if peak is not None:
                _wait_until_idle()
                rounds.peak.append(peak())
                last_pool = None
            for name in order:
                if last_pool is None or pool_of[name] != last_pool:
                    _wait_until_idle()
                    last_pool = pool_of[name]
                rounds.seconds[name].append(_turn(runs[name], rounds.calls[name], seconds_of[name]))
            order.reverse()
            if not others.disturbed():
                continue
            if others.patience < 0 or wasted > _DISTURBED_SECONDS:
                rounds.disturbed_rounds_kept += 1
            else:
                rounds.disturbed_rounds += 1
                wasted += others.span()
                others.patience -= others.span()
                for samples in (*rounds.seconds.values(), *([rounds.peak] if peak else [])):
                    samples.pop()
    finally:
        gc.enable()


# A case spends at most about this on repeating rounds in which other processes were at work.
_DISTURBED_SECONDS = 1.5

# Pools were seen to spin for up to 50 ms (ONNX Runtime), 10 (libgomp) and 1 (TBB) after a call.
_IDLE_LIMIT_SECONDS = 0.2
# Linux accounts for the time of running threads at every tick, of up to 4 ms.
_IDLE_STEP_SECONDS = 0.005


def _wait_until_idle() -> None:
    """Wait until no thread of this process spins any more: it would take a processor away from the next contestant."""
    end = time.perf_counter() + _IDLE_LIMIT_SECONDS
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_IDLE_STEP_SECONDS)
        if time.process_time() - before < _IDLE_STEP_SECONDS / 5:
            return


# A call that takes longer does not notice that its threads have to wake up and its data are in no cache.
_LONG_CALL_SECONDS = 0.05


def _turn(run: Run, calls: int, seconds: float) -> float:
    """Return the seconds of one call, of which about `seconds` are expected, in steady state."""
    if seconds < _LONG_CALL_SECONDS:
        run()
    return _time_calls(run, calls) / calls


def _estimate(run: Run, plan: Plan) -> float:
    """Return about how many seconds a call takes once it is warm."""
    _wait_until_idle()  # beside a pool that still spins, a team of threads takes many times as long
    calls = 1
    while (seconds := _time_calls(run, calls)) < plan.sample_seconds / 4:
        calls *= 4
    # A single call that something held up would make every turn a single call.
    return min(seconds, _time_calls(run, calls)) / calls


def _time_calls(run: Run, calls: int) -> float:
    repeats = range(calls)
    start = time.perf_counter()
    for _ in repeats:
        run()
    return time.perf_counter() - start


def geometric_means(results: Sequence[Result], peer: str) -> list[dict[str, Any]]:
    """Return the geometric mean of the ratios against a peer in the table's cases, by group of shapes.

    Each entry has "threads", "dtype", "cell", "mode", the groups that were measured, and "all".
    """
    table: dict[tuple[int, str, str, str], dict[str, list[float]]] = {}
    for result in results:
        case = result.case
        if result.passed and peer in result.seconds and case.shape.part == "table":
            groups = table.setdefault((result.threads, case.dtype, case.cell, case.mode), {})
            for group in (case.shape.group, "all"):
                groups.setdefault(group, []).append(result.ratio(peer).median)
    return [
        {"threads": threads, "dtype": dtype, "cell": cell, "mode": mode}
        | {group: statistics.geometric_mean(ratios) for group, ratios in groups.items()}
        for (threads, dtype, cell, mode), groups in table.items()
    ]
