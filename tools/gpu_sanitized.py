"""Small calls of every variant on a GPU, each compared with the float64 reference and named before it runs.

By itself it shows in seconds which variants work at all; compute-sanitizer watches the same calls. The most telling
come first: a run that is stopped has seen something of each variant.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch

import fused_rnn
from fused_rnn import _C
from fused_rnn.check import ERROR_LIMITS, Call, scaled_errors

VARIANTS = ("cluster", "grid", "block", "none")
CELLS = ("LSTM", "GRU", "RNN_TANH")
# And whether float32 may be rounded to TF32.
NUMBERS = ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False), (torch.float16, False))
OPTIONS: tuple[dict[str, bool], ...] = ({}, {"packed": True}, {"masked": True})
# Epsilons of float32: 8 times what TF32 rounds a product by at most.
TF32_LIMIT = 8 * 2.0**13


def calls() -> Iterator[tuple[Call, bool]]:
    """Two layers of sizes that every variant holds, and whether TF32 is allowed."""
    factors = itertools.product(enumerate(CELLS), enumerate(NUMBERS), enumerate(OPTIONS))
    for (_, cell), (_, (dtype, tf32)), (_, options) in sorted(factors, key=lambda row: sum(index for index, _ in row)):
        # Rows that end on 16 bytes, and rows that do not.
        sizes = {"steps": 4, "batch": 9, "input_size": 16, "hidden_size": 27 if options.get("packed") else 32}
        yield Call(cell, dtype, bidirectional=True, **options, **sizes), tf32  # type: ignore[arg-type]


def variants_of(call: Call) -> set[str]:
    """What the forward and the backward pass of the call run in."""
    sequence = torch.empty(call.steps, call.batch, call.input_size, dtype=call.dtype, device="cuda")
    plan = fused_rnn.explain(call.build().to("cuda"), sequence).plan
    assert plan is not None
    return {plan["variant"], plan["backward"]["variant"]}


def worst_error(call: Call) -> float:
    """In epsilons of the dtype; infinite where a result is NaN."""
    errors = scaled_errors(call.run(call.build().to("cuda")), call.reference()).values()
    return max(error if error == error else float("inf") for error in errors)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if numbers were wrong or a variant was not to be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="this alone (may be repeated)")
    arguments = parser.parse_args(argv)
    wanted = arguments.variant or VARIANTS
    wrong = 0
    worst = 0.0
    for (call, tf32), variant in itertools.product(calls(), wanted):
        _C.cuda_allow(**{name: name == variant for name in VARIANTS})
        torch.backends.cudnn.allow_tf32 = tf32
        print(f"{variant} {call}{' TF32' if tf32 else ''} ... ", end="", flush=True)
        if variants_of(call) != {variant}:
            print(f"runs as {', '.join(sorted(variants_of(call)))}")
            wrong += 1
            continue
        error = worst_error(call)
        worst = max(worst, error)
        right = error <= (TF32_LIMIT if tf32 else ERROR_LIMITS[call.dtype])
        wrong += not right
        print(f"{error:.3g} epsilons{'' if right else ', WRONG'}", flush=True)
    print(f"{wrong} calls wrong" if wrong else f"all right, at most {worst:.3g} epsilons from the reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
