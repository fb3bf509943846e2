"""Serving: a step of a stream, many sessions, int8, whole programs, each beside what is used for it otherwise.

What differs from the other cases: a contestant is anything that can be called, and some keep a state from call to call.
The contests are in `serving_cases`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .environment import OtherProcesses
from .peers import FUSED, Run, tensors_of
from .runner import Plan, Rounds, deviation_of, interleave

# What ratios are taken to besides other engines.
FUSED_FLOAT32, LOOP = "fused float32", "loop of Streams"

PLAN = Plan(min_rounds=5, max_rounds=41, seconds=1.5, precision=0.01, sample_seconds=0.01)

# Largest deviation of the first results, as a share of the largest magnitude. float32: as in the table's cases.
FLOAT32_TOLERANCE = 5e-6
# A guard against timing something wrong. How far int8 is off is measured by itself.
INT8_TOLERANCE = 0.1


@dataclass(frozen=True)
class Contestant:
    """What takes part.

    Attributes:
        run: does the contest's work once; the first tensors of its result are those that `Field.expected` has.
        pool: whose threads it computes on, see `peers.Peer`.
        tolerance: deviation of its first result that is allowed.
    """

    name: str
    run: Run
    pool: str = "openmp"
    tolerance: float = FLOAT32_TOLERANCE


@dataclass(frozen=True)
class Field:
    """The contestants of a contest, ours (`FUSED.name`) first, and what each has to compute in its first run."""

    contestants: Sequence[Contestant]
    expected: Sequence[Tensor]


@dataclass(frozen=True)
class Contest:
    """One line of the results.

    Attributes:
        group: of `GROUPS`; what belongs to one bar.
        sizes: by name, such as B, T, I and H.
        make: builds the contestants; the weights are the same in each run of the benchmark.
        steps: what a run repeats; times are of one of them.
        quick: whether it is measured with --quick.
    """

    group: str
    name: str
    cell: str
    sizes: Mapping[str, int]
    make: Callable[[], Field]
    steps: int = 1
    quick: bool = False


@dataclass
class Outcome(Rounds):
    """What was found for a contest. `seconds` and `calls` are empty if a contestant had wrong numbers.

    Attributes:
        errors: by contestant, the largest deviation from what was expected.
        tolerances: by contestant.
    """

    contest: Contest
    errors: dict[str, float] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """Contestants whose numbers are not what was expected."""
        return [name for name, error in self.errors.items() if not error <= self.tolerances[name]]

    @property
    def passed(self) -> bool:
        return not self.wrong

    @property
    def rivals(self) -> list[str]:
        return [name for name in self.errors if name != FUSED.name]


def measure(contest: Contest, plan: Plan = PLAN, others: OtherProcesses | None = None) -> Outcome:
    """Check the contestants' numbers, and time them in turns if all are right; on one thread, without gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            taking_part = contest.make()
        with torch.inference_mode():
            return _measure(contest, taking_part, plan, others)
    finally:
        torch.set_num_threads(before)


def _measure(contest: Contest, taking_part: Field, plan: Plan, others: OtherProcesses | None) -> Outcome:
    outcome = Outcome(contest=contest)
    for contestant in taking_part.contestants:
        found = list(tensors_of(contestant.run()))
        outcome.errors[contestant.name] = _error(found, taking_part.expected)
        outcome.tolerances[contestant.name] = contestant.tolerance
    if outcome.passed:
        interleave(
            {contestant.name: contestant.run for contestant in taking_part.contestants},
            plan,
            outcome,
            pools={contestant.name: contestant.pool for contestant in taking_part.contestants},
            others=others,
        )
        for samples in outcome.seconds.values():
            samples[:] = [seconds / contest.steps for seconds in samples]
    return outcome


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if len(found) < len(expected):
        return math.inf
    errors = [deviation_of(mine, theirs) for mine, theirs in zip(found, expected, strict=False)]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def record_of(outcome: Outcome) -> dict[str, Any]:
    """Return what was found as JSON values."""
    contest = outcome.contest
    record: dict[str, Any] = {
        "name": contest.name,
        "group": contest.group,
        "cell": contest.cell,
        "sizes": dict(contest.sizes),
        "threads": 1,
        "steps": contest.steps,
        "parity": {
            "passed": outcome.passed,
            "errors": {name: error if math.isfinite(error) else None for name, error in outcome.errors.items()},
            "tolerances": dict(outcome.tolerances),
        },
    }
    if outcome.seconds:
        record["seconds"] = {
            name: vars(outcome.time(name)) | {"calls": outcome.calls[name], "rounds": list(samples)}
            for name, samples in outcome.seconds.items()
        }
        record["ratio"] = {name: vars(outcome.ratio(name)) for name in outcome.rivals}
        record["disturbed_rounds"] = {
            "repeated": outcome.disturbed_rounds,
            "kept": outcome.disturbed_rounds_kept,
        }
    return record
