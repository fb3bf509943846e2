"""Small calls of every variant on a GPU, each compared with the float64 reference and named before it runs.

By itself it shows in seconds which variants work at all; compute-sanitizer watches the same calls. The most telling
come first: a run that is stopped has seen something of each variant.

A call that raises is one call: the next ones run, unless the CUDA context went with it. Wrong numbers, failures and a
lost context are different exit statuses, because what follows depends on which it was.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_phases import FAULT, WRONG

import fused_rnn
from fused_rnn import _C
from fused_rnn.bench.gpu_cases import VARIANTS, allowed_only, variant_of
from fused_rnn.check import ERROR_LIMITS, Call, scaled_errors
from fused_rnn.check import calls as calls_of_check

CELLS = ("LSTM", "GRU", "RNN_TANH")
# And whether float32 may be rounded to TF32.
NUMBERS = ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False), (torch.float16, False))
OPTIONS: tuple[dict[str, bool], ...] = ({}, {"packed": True}, {"masked": True})
# Options within the recurrence that kernels of all steps have, where warps can hand registers to others. (What is drawn
# differs from the CPU's draws: means stand in.)
IN_LAUNCHES = ("reset", "zoneout", "recurrent_grad_clip")
# Epsilons of float32: 8 times what TF32 rounds a product by at most.
TF32_LIMIT = 8 * 2.0**13
# Exit status: calls raised, the CUDA context is there.
FAILED = 5


@dataclass(frozen=True)
class Watched:
    """Two layers of sizes that every variant holds."""

    variant: str
    call: Call
    tf32: bool

    def __str__(self) -> str:
        return f"{self.variant} {self.call}{' TF32' if self.tf32 else ''}"

    @property
    def limit(self) -> float:
        return TF32_LIMIT if self.tf32 else ERROR_LIMITS[self.call.dtype]


def calls() -> list[Watched]:
    """Every variant with every cell, dtype and option that it has."""
    factors = itertools.product(enumerate(CELLS), enumerate(NUMBERS), enumerate(OPTIONS))
    found: list[Watched] = []
    within: list[Watched] | None = calls_within()

    def order(row: tuple[tuple[int, object], ...]) -> int:
        return sum(index for index, _ in row)

    for row in sorted(factors, key=order):
        (_, cell), (_, (dtype, tf32)), (_, options) = row
        if order(row) > 1 and within is not None:
            found, within = found + within, None
        # Rows that end on 16 bytes, and rows that do not.
        sizes = {"steps": 4, "batch": 9, "input_size": 16, "hidden_size": 27 if options.get("packed") else 32}
        for variant in VARIANTS:
            if variant == "wavefront" and (cell == "RNN_TANH" or (dtype == torch.float32 and not tf32)):
                continue
            both = {"bidirectional": variant != "wavefront"}
            found.append(Watched(variant, Call(cell, dtype, **both, **options, **sizes), tf32))  # type: ignore[arg-type]
    return found


def calls_within() -> list[Watched]:
    """Calls with an option within the recurrence: all of them a launch a step, some in all variants."""
    all_variants = torch.cuda.get_device_capability() == (9, 0)
    found = []
    for call in calls_of_check():
        if not call.option or not call.runs_on("cuda") or call.dtype not in (torch.bfloat16, torch.float32):
            continue
        call = replace(call, steps=4, batch=9, input_size=16, hidden_size=48 if call.option == "IndRNN" else 32)
        for variant in VARIANTS:
            in_launches = all_variants and call.option in IN_LAUNCHES and variant != "wavefront"
            if variant == "none" or (in_launches and call.dtype == torch.bfloat16):
                found.append(Watched(variant, call, False))
    return found


def variants_of(call: Call) -> set[str]:
    """What the forward and the backward pass of the call run in."""
    sequence = torch.empty(call.steps, call.batch, call.input_size, dtype=call.dtype, device="cuda")
    given: dict[str, Any] = {}
    if call.option == "reset":
        given["reset"] = torch.zeros(call.steps, call.batch, dtype=torch.bool, device="cuda")
    plan = fused_rnn.explain(call.build().to("cuda"), sequence, **given).plan
    assert plan is not None
    return {variant_of(plan), variant_of(plan["backward"])}


def worst_error(call: Call) -> float:
    """In epsilons of the dtype; infinite where a result is NaN."""
    errors = scaled_errors(call.run(call.build().to("cuda")), call.reference()).values()
    return max(error if error == error else float("inf") for error in errors)


def try_call(watched: Watched) -> tuple[bool, str]:
    """Whether it ran as its variant and its numbers are right, and what is to be said of it."""
    _C.cuda_allow(**allowed_only(watched.variant))
    torch.backends.cudnn.allow_tf32 = watched.tf32
    found = variants_of(watched.call)
    if found != {watched.variant}:
        raise RuntimeError(f"runs as {', '.join(sorted(found))}")
    error = worst_error(watched.call)
    right = error <= watched.limit
    return right, f"{error:.3g} epsilons{'' if right else ', WRONG'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, WRONG, FAILED if calls raised or were not to be had, FAULT if the CUDA context is lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="this alone (may be repeated)")
    parser.add_argument("--without", action="append", default=[], choices=VARIANTS, help="not this (may be repeated)")
    arguments = parser.parse_args(argv)
    wanted = set(arguments.variant or VARIANTS) - set(arguments.without)
    todo = [watched for watched in calls() if watched.variant in wanted]
    right, wrong, failed = 0, [], []
    for done, watched in enumerate(todo, 1):
        print(f"{watched} ... ", end="", flush=True)
        try:
            is_right, said = try_call(watched)
            print(said, flush=True)
            right += is_right
            if not is_right:
                wrong.append(watched)
        except Exception as error:
            failed.append(watched)
            print(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        try:
            torch.cuda.synchronize()
        except Exception as error:
            print(f"FAULT: the CUDA context is lost: {str(error).splitlines()[0]}")
            print(f"{right} calls right, {len(wrong)} wrong, {len(failed)} failed, {len(todo) - done} not tried")
            return FAULT
    for watched in wrong:
        print(f"WRONG: {watched}")
    print(f"{right} calls right, {len(wrong)} wrong, {len(failed)} failed")
    return FAILED if failed else WRONG if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
