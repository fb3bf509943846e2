"""What was found for a program: as JSON, and as a line for the terminal."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fused_rnn.bench import report
from fused_rnn.bench.runner import Deviation, Rounds

from .compare import recurrent_layers
from .program import FUSED, TORCH_NN, Program


def program_record(program: Program) -> dict[str, Any]:
    versions = program.versions()
    return {
        "name": program.name,
        "field": program.field,
        "package": program.requires[0],
        "version": versions[program.requires[0]],
        "versions": versions,
        "way": program.way,
        "timed": program.timed,
        "note": program.note,
    }


def layers_record(model: nn.Module) -> dict[str, int]:
    """Count the recurrent layers by their class's name."""
    return dict(collections.Counter(type(layer).__name__ for layer in recurrent_layers(model)))


def parity_record(deviations: Sequence[Deviation]) -> dict[str, Any]:
    return {
        "passed": all(deviation.passed for deviation in deviations),
        # JSON has neither NaN nor infinity.
        "deviations": [
            dataclasses.asdict(deviation) | {"error": deviation.error if math.isfinite(deviation.error) else None}
            for deviation in deviations
        ],
    }


def times_record(rounds: Rounds) -> dict[str, Any]:
    return {
        "seconds": {
            name: dataclasses.asdict(rounds.time(name)) | {"calls": rounds.calls[name], "rounds": samples}
            for name, samples in rounds.seconds.items()
        },
        "ratio": {TORCH_NN: dataclasses.asdict(rounds.ratio(TORCH_NN))},
        "disturbed_rounds": {"repeated": rounds.disturbed_rounds, "kept": rounds.disturbed_rounds_kept},
    }


def passed(record: Mapping[str, Any]) -> bool:
    return "error" not in record and bool(record["parity"]["passed"])


def line(record: Mapping[str, Any]) -> str:
    """Return one aligned line: threads, times and ratio, or what went wrong instead."""
    begin = f"{record['name']:32}{record['way']:10}"
    if "error" in record:
        return f"{begin}ERROR {record['error']}"
    if not record["parity"]["passed"]:
        wrong = [
            f"{found['name']} off by {'nan or inf' if found['error'] is None else format(found['error'], '.1e')}, "
            f"allowed {found['tolerance']:.1e}"
            for found in record["parity"]["deviations"]
            if found["error"] is None or found["error"] > found["tolerance"]
        ]
        return f"{begin}PARITY FAILED {'; '.join(wrong)}"
    ratio = record["ratio"][TORCH_NN]
    theirs, ours = (report.time_text(record["seconds"][name]["median"]) for name in (TORCH_NN, FUSED))
    spread = 100 * (ratio["q3"] - ratio["q1"]) / (2 * ratio["median"])
    return f"{begin}{record['threads']:2}  {theirs:>10} {ours:>10}  {ratio['median']:5.2f}x  ±{spread:.1f}%"
