"""The case that the design was made for, in one way to run it: LSTM bfloat16 B 16 H 768, forward and backward.

    python tools/gpu_anchor.py counted            microseconds a step: by events, and as replayed CUDA graphs
    python tools/gpu_anchor.py cudnn
    ncu ... python tools/gpu_anchor.py auto --profile backward

Times at two lengths tell what a step takes (their difference) from what a call takes (the rest). Numbers that are wrong
are said to be, and timed all the same: what they cost is worth knowing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_phases import FAULT, WRONG

import fused_rnn
from fused_rnn import _C
from fused_rnn.bench import gpu
from fused_rnn.bench.gpu_cases import ANCHOR_US, VARIANTS, GpuCase, allowed_only, cases, variant_of
from fused_rnn.bench.gpu_peers import CUDNN, FUSED, PEERS, Problem

LENGTHS = (64, 1024)
PROFILED_STEPS = 32
ROUNDS = 5


def times_of(run: Callable[[], Any]) -> float:
    """Milliseconds of a pass: the median over rounds of some milliseconds of work."""
    calls = gpu.calls_for(run)
    return statistics.median(gpu.milliseconds_of(run, calls) for _ in range(ROUNDS))


def error_of(problem: Problem, expected: list[torch.Tensor]) -> str:
    """What is wrong with the fused numbers of a training step; "" if nothing is."""
    measured = gpu.Measured(problem.case, "forward+backward")
    gpu.check(problem, expected, True, measured)
    return measured.problem


def planned(problem: Problem) -> dict[str, Any]:
    plan = fused_rnn.explain(problem.layer(fused_rnn), problem.input).plan
    assert plan is not None
    return plan


def measure(case: GpuCase, variant: str, found: dict[str, Any], save: Callable[[], None]) -> bool:
    """Fills `found`, a dict for each length; False if numbers were wrong."""
    problem = Problem(case)
    peer = CUDNN if variant == "cudnn" else FUSED
    right = True
    if peer == FUSED:
        plan = planned(problem)
        names = (variant_of(plan), variant_of(plan["backward"]))
        print(f"  T {case.seq_length}: {names[0]} forward, {names[1]} backward", flush=True)
        if variant != "auto" and set(names) != {variant}:
            raise RuntimeError(f"runs as {names[0]} forward and {names[1]} backward: {plan['reason']}")
        found["predicted_step_us"] = [plan["predicted_step_us"], plan["backward"]["predicted_step_us"]]
        found["problem"] = error_of(problem, gpu.expected_of(problem))
        right = not found["problem"]
        print(f"  T {case.seq_length}: {found['problem'] or 'numbers are right'}", flush=True)
        save()
    elif not gpu.runs_on_cudnn(problem):
        problem = Problem(replace(case, dtype="float16"), problem)
        found["rival"] = "cuDNN in float16"
    for which, training in (("forward", False), ("training", True)):
        run = PEERS[peer](problem, training)
        found[f"{which}_ms"] = times_of(run)
        save()
        try:
            found[f"{which}_replayed_ms"] = times_of(gpu.captured(run))
        except Exception as error:
            found[f"{which}_not_replayed"] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        torch.cuda.synchronize()
        save()
        print(f"  T {case.seq_length}, {which}: {shown(found, which)}", flush=True)
    return right


def shown(found: dict[str, Any], which: str) -> str:
    replayed = found.get(f"{which}_replayed_ms")
    graph = f"{replayed:.3f} ms" if replayed else found.get(f"{which}_not_replayed", "not measured")
    return f"{found[f'{which}_ms']:.3f} ms, as a graph {graph}"


def steps(found: dict[str, Any]) -> dict[str, float]:
    """Microseconds a step, by the difference of the lengths; backward is a training step less a forward pass."""
    short, long = (found.get(str(length), {}) for length in LENGTHS)
    result = {}
    for name in ("ms", "replayed_ms"):
        keys = [f"{which}_{name}" for which in ("forward", "training")]
        if not all(key in part for key in keys for part in (short, long)):
            continue
        forward, training = ((long[key] - short[key]) * 1e3 / (LENGTHS[1] - LENGTHS[0]) for key in keys)
        kind = "graph" if name == "replayed_ms" else "events"
        result |= {f"forward, {kind}": forward, f"backward, {kind}": training - forward}
    return result


def profile(case: GpuCase, which: str) -> int:
    """Runs the pass once to make what is made once, and once more; a profiler picks its kernels."""
    problem = Problem(replace(case, seq_length=PROFILED_STEPS))
    run = PEERS[FUSED](problem, which == "backward")
    for _ in range(2):
        run()
        torch.cuda.synchronize()
    plan = planned(problem)
    print(f"  {which} as {variant_of(plan['backward'] if which == 'backward' else plan)}")
    print("profiled")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns 0, WRONG, FAULT if the CUDA context is lost, 1 if it was not measured for another reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=[*VARIANTS, "auto", "cudnn"], help="auto: what the planner takes")
    parser.add_argument("--json", type=Path, help="write what was measured, after each figure")
    parser.add_argument("--profile", choices=["forward", "backward"], help="only run this pass, of a few steps")
    parser.add_argument("--without", action="append", default=[], choices=VARIANTS, help="of auto, not this")
    arguments = parser.parse_args(argv)
    case = cases()[0]
    found: dict[str, Any] = {"case": case.name, "variant": arguments.variant}

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))

    if arguments.variant in VARIANTS:
        _C.cuda_allow(**allowed_only(arguments.variant))
    elif arguments.without:
        _C.cuda_allow(**gpu.allowed_without(arguments.without))
    right = True
    try:
        if arguments.profile:
            return profile(case, arguments.profile)
        for length in LENGTHS:
            part = found[str(length)] = {}
            right &= measure(replace(case, seq_length=length), arguments.variant, part, save)
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        print(f"FAULT: {found['failed']}", flush=True)
    try:
        torch.cuda.synchronize()
    except Exception:
        save()
        return FAULT
    found["step_us"] = steps(found)
    save()
    for name, us in found["step_us"].items():
        print(f"{name}: {us:.3f} us a step (bar: {ANCHOR_US[name.split(',')[0]]})")
    return 1 if "failed" in found else 0 if right else WRONG


if __name__ == "__main__":
    sys.exit(main())
