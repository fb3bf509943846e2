"""Small calls of every variant on a GPU, each compared with the float64 reference and named before it runs.

By itself it shows in seconds which variants work at all; compute-sanitizer watches the same calls. The most telling
come first: a run that is stopped has seen something of each variant.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fused_rnn
from fused_rnn import _C
from fused_rnn.check import ERROR_LIMITS, Call, scaled_errors

# Beside those of single layers the stacks of layers that run at once.
VARIANTS = ("cluster", "wavefront", "grid", "block", "none")
CELLS = ("LSTM", "GRU", "RNN_TANH")
# And whether float32 may be rounded to TF32.
NUMBERS = ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False), (torch.float16, False))
OPTIONS: tuple[dict[str, bool], ...] = ({}, {"packed": True}, {"masked": True})
# Epsilons of float32: 8 times what TF32 rounds a product by at most.
TF32_LIMIT = 8 * 2.0**13


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

    @property
    def allowed(self) -> dict[str, int]:
        """What `cuda_allow` is asked for."""
        wavefront = self.variant == "wavefront"
        kernels = {name: name == ("cluster" if wavefront else self.variant) for name in VARIANTS if name != "wavefront"}
        return kernels | {"layers": 2 if wavefront else 1}


def calls() -> list[Watched]:
    """Every variant with every cell, dtype and option that it has."""
    factors = itertools.product(enumerate(CELLS), enumerate(NUMBERS), enumerate(OPTIONS))
    found = []
    for (_, cell), (_, (dtype, tf32)), (_, options) in sorted(factors, key=lambda row: sum(index for index, _ in row)):
        # Rows that end on 16 bytes, and rows that do not.
        sizes = {"steps": 4, "batch": 9, "input_size": 16, "hidden_size": 27 if options.get("packed") else 32}
        for variant in VARIANTS:
            if variant == "wavefront" and (cell == "RNN_TANH" or (dtype == torch.float32 and not tf32)):
                continue
            both = {"bidirectional": variant != "wavefront"}
            found.append(Watched(variant, Call(cell, dtype, **both, **options, **sizes), tf32))  # type: ignore[arg-type]
    return found


def variants_of(call: Call) -> set[str]:
    """What the forward and the backward pass of the call run in."""
    sequence = torch.empty(call.steps, call.batch, call.input_size, dtype=call.dtype, device="cuda")
    plan = fused_rnn.explain(call.build().to("cuda"), sequence).plan
    assert plan is not None
    return {"wavefront" if one["layers"] > 1 else one["variant"] for one in (plan, plan["backward"])}


def worst_error(call: Call) -> float:
    """In epsilons of the dtype; infinite where a result is NaN."""
    errors = scaled_errors(call.run(call.build().to("cuda")), call.reference()).values()
    return max(error if error == error else float("inf") for error in errors)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if numbers were wrong or a variant was not to be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="this alone (may be repeated)")
    arguments = parser.parse_args(argv)
    wrong = 0
    worst = 0.0
    for watched in calls():
        if watched.variant not in (arguments.variant or VARIANTS):
            continue
        _C.cuda_allow(**watched.allowed)
        torch.backends.cudnn.allow_tf32 = watched.tf32
        print(f"{watched} ... ", end="", flush=True)
        found = variants_of(watched.call)
        if found != {watched.variant}:
            print(f"runs as {', '.join(sorted(found))}", flush=True)
            wrong += 1
            continue
        error = worst_error(watched.call)
        worst = max(worst, error)
        right = error <= watched.limit
        wrong += not right
        print(f"{error:.3g} epsilons{'' if right else ', WRONG'}", flush=True)
    print(f"{wrong} calls wrong" if wrong else f"all right, at most {worst:.3g} epsilons from the reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
