"""Writes the planner's constants anew (csrc/cuda/measured.h) from what a GPU run measured.

    python tools/gpu_constants.py --results results.json --out measured.h
    python tools/gpu_constants.py --calculated          # from tests/data/cuda_cycles.json, into csrc/cuda/measured.h

The file can take the place of csrc/cuda/measured.h as it is. A constant whose measurement is missing, or says something
that no GPU does, keeps its value and its origin.

Without a GPU those constants that are the time of a kernel's own instructions are calculated: so that the planner's
cycles of a step are, on average, those that tools/cuda_cycles.py finds in machine code.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "measured.h"
LINE = re.compile(r"^constexpr double (\w+) = ([^;]+);  // ([^;]+); (.*)$")

Micro = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Source:
    """How a constant follows from measurements of micro.cu; outside of `between` it is not believed."""

    where: str
    value: Callable[[Micro], float]
    between: tuple[float, float]


def _memory_cycles(micro: Micro) -> float:
    # Store, counter and waiting thread, then the copy of what the others have stored.
    return micro["grid"]["counter_16"] + micro["l2"]["latency"]


def _one_way(micro: Micro) -> float:
    # From one end of the largest cluster to the other, or of a pair where there is none of 16.
    far = micro.get("async_to_16")
    return (far if isinstance(far, dict) else micro["async_to_peer"])["round_trip"] / 2


def _cluster_barrier(micro: Micro) -> float:
    values = micro["cluster_barrier"]
    return next(values[name] for name in ("release_16", "release_8") if name in values)


SOURCES = {
    "shared_bytes_per_cycle": Source("shared", lambda m: m["shared"]["bytes_per_cycle"], (16, 512)),
    "remote_bytes_per_cycle": Source("exchange", lambda m: m["exchange"]["bytes_per_cycle"], (1, 256)),
    "l2_bytes_per_cycle": Source("l2", lambda m: m["l2"]["bytes_per_cycle_of_all"], (1, 256)),
    "remote_cycles": Source("async_to_16", _one_way, (50, 5000)),
    "cluster_barrier_cycles": Source("cluster_barrier", _cluster_barrier, (50, 10000)),
    "memory_cycles": Source("grid, l2", _memory_cycles, (200, 50000)),
    "multiply_cycles": Source("multiply", lambda m: m["multiply"]["interval"], (1, 64)),
    "launch_us": Source("launch", lambda m: m["launch"]["stream_us"], (0.5, 100)),
}


def measured(micro: Micro) -> dict[str, tuple[float, str]]:
    """Value and origin of each constant that was measured."""
    found = {}
    for name, source in SOURCES.items():
        try:
            value = float(source.value(micro))
        except (KeyError, TypeError, ValueError, StopIteration):
            continue
        low, high = source.between
        if math.isfinite(value) and low <= value <= high:
            found[name] = (value, source.where)
        else:
            print(f"{name}: {value:g} of {source.where} is not between {low:g} and {high:g}: not taken")
    if micro_wrong(micro):
        # Words that arrive late or not at all make a fast exchange.
        for name in ("remote_bytes_per_cycle", "remote_cycles"):
            found.pop(name, None)
    return found


def calculated() -> dict[str, tuple[float, str]]:
    """Value and origin of each constant that follows from the committed cycles of a step."""
    import cuda_cycles

    program = cuda_cycles.build_arguments()
    typical = {name: case["typical"] for name, case in json.loads(cuda_cycles.FIGURES.read_text())["cases"].items()}
    now = constants(HEADER.read_text())
    less: dict[str, list[float]] = {"gates_cycles": [], "backward_gates_cycles": [], "memory_cycles": []}
    for case in cuda_cycles.CASES:
        plan = cuda_cycles.plan(case, program)
        if case.layers > 1:
            continue  # of several layers, whose blocks wait for each other: the model is only compared with it
        which = "backward_gates_cycles" if case.kernel == "backward" else "gates_cycles"
        which = "memory_cycles" if plan["exchange"] == "memory" else which
        less[which].append(typical[case.name] - plan["predicted_cycles"])
    # The way through L2 is what is left of a grid's step, whose gates are the others'.
    found = {name: now[name] + sum(values) / len(values) for name, values in less.items()}
    found["memory_cycles"] -= found["gates_cycles"] - now["gates_cycles"]
    return {name: (value, "tools/cuda_cycles.py") for name, value in found.items()}


def constants(header: str) -> dict[str, float]:
    """The constants of a header by name."""
    return {match[1]: float(match[2]) for match in map(LINE.match, header.splitlines()) if match}


def micro_wrong(micro: Micro) -> bool:
    """Whether asynchronous stores brought wrong words."""
    letters = [values for name, values in micro.items() if name.startswith("async_") and isinstance(values, dict)]
    return any(values.get("wrong", 0) != 0 for values in letters)


def rewritten(header: str, found: dict[str, tuple[float, str]], how: str) -> str:
    """The header with these values in place of its own; ``how`` they were found."""
    lines = []
    for line in header.splitlines():
        match = LINE.match(line)
        if match and match[1] in found:
            value, where = found[match[1]]
            line = f"constexpr double {match[1]} = {value:.4g};  // {how} ({where}); {match[4]}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def device_of(results: dict[str, Any]) -> str:
    """One word or two for a comment in C++; nothing else of what a driver says gets in there."""
    gpu = (results.get("machine") or {}).get("gpu") or {}
    return re.sub(r"[^\w .-]", "", str(gpu.get("name", ""))).strip() or "a GPU"


def main() -> int:
    """Returns 0 if all constants that have a measurement were measured, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="what a run wrote")
    parser.add_argument("--calculated", action="store_true", help="from the cycles of machine code instead")
    parser.add_argument("--out", type=Path, default=HEADER)
    arguments = parser.parse_args()
    if arguments.calculated == (arguments.results is not None):
        parser.error("one of --results and --calculated")
    if arguments.calculated:
        # Only where no GPU has measured one.
        origins = {match[1]: match[3] for match in map(LINE.match, HEADER.read_text().splitlines()) if match}
        found = {name: one for name, one in calculated().items() if not origins[name].startswith("measured")}
        arguments.out.write_text(rewritten(HEADER.read_text(), found, "calculated"))
        return 0
    results = json.loads(arguments.results.read_text())
    found = measured(results.get("micro") or {})
    header = HEADER.read_text()
    arguments.out.write_text(rewritten(header, found, f"measured on {device_of(results)}"))
    for name, (value, where) in found.items():
        print(f"{name} = {value:.4g} ({where})")
    missing = [name for name in SOURCES if name not in found]
    print(f"{len(found)} of {len(SOURCES)} constants measured" + (f"; not {', '.join(missing)}" if missing else ""))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
