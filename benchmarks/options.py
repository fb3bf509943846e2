"""What each option of a layer costs: time of a training step with it over the plain layer's, in turns, in one run.

python -m benchmarks.options                                 # all options, 2 threads and 1, about a minute
python -m benchmarks.options --only weight_dropout
python -m benchmarks.options --json benchmarks/results/options-NAME.json --docs docs/options.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fused_rnn
from benchmarks.tables import replaced
from fused_rnn.bench import environment
from fused_rnn.bench.peers import FUSED
from fused_rnn.bench.runner import Plan, Rounds, interleave

PLAN = Plan(min_rounds=9, max_rounds=41, seconds=6.0, precision=0.01, sample_seconds=0.02)
CELLS = ("LSTM", "GRU")


class Shape(NamedTuple):
    steps: int
    batch: int
    input_size: int
    hidden_size: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.steps} I{self.input_size} H{self.hidden_size}"


SHAPES = (Shape(40, 64, 256, 512), Shape(200, 32, 20, 64))

# By name: keywords of the constructor, and the most that the time may be of the plain layer's.
OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "input_dropout": ({"input_dropout": 0.3}, 1.25),
    "recurrent_dropout": ({"recurrent_dropout": 0.3}, 1.25),
    "weight_dropout": ({"weight_dropout": 0.3}, 1.25),
    "zoneout": ({"zoneout": 0.1}, 1.25),
    "zoneout_cell": ({"zoneout_cell": 0.1}, 1.25),
    "activation": ({"activation": "softsign"}, 1.1),
    "recurrent_activation": ({"recurrent_activation": "hard_sigmoid"}, 1.1),
    "peephole": ({"peephole": True}, 1.1),
    "coupled_gates": ({"coupled_gates": True}, 1.1),
    "num_heads": ({"num_heads": 4}, 1.1),
    "layer_norm": ({"layer_norm": True}, 1.6),
    "cell_clip": ({"cell_clip": 3.0}, 1.1),
    "recurrent_grad_clip": ({"recurrent_grad_clip": 1.0}, 1.1),
    "recurrent_bias=False": ({"recurrent_bias": False}, 1.1),
    "stateful": ({"stateful": True}, 1.1),
    "bptt_steps": ({"bptt_steps": 20}, 1.25),
    "reset": ({}, 1.1),  # of a call: one step in a hundred is marked
    "return_states": ({}, 1.1),  # of a call: the states of every step have a gradient, too
}
_LSTM_ALONE = ("recurrent_bias=False", "zoneout_cell", "peephole", "coupled_gates", "cell_clip")


def has(cell: str, option: str) -> bool:
    return cell == "LSTM" or option not in _LSTM_ALONE


def training_step(cell: str, shape: Shape, option: str | None) -> Callable[[], None]:
    torch.manual_seed(0)
    keywords = {} if option is None else OPTIONS[option][0]
    layer = getattr(fused_rnn, cell)(shape.input_size, shape.hidden_size, **keywords)
    x = torch.randn(shape.steps, shape.batch, shape.input_size, requires_grad=True)
    grad = torch.randn(shape.steps, shape.batch, shape.hidden_size)
    of_call: dict[str, Any] = {}
    if option == "reset":
        of_call = {"reset": torch.rand(shape.steps, shape.batch) < 0.01}
    elif option == "return_states":
        of_call = {"return_states": True}
    leaves = [x, *layer.parameters()]
    states = [torch.randn(1, shape.steps, shape.batch, shape.hidden_size) for _ in range(1 + (cell == "LSTM"))]

    def step() -> None:
        output, _, *of_steps = layer(x, **of_call)
        found = [output, *(of_steps[0] if cell == "LSTM" and of_steps else of_steps)]
        torch.autograd.grad(found, leaves, [grad, *states][: len(found)])

    return step


def measure(cell: str, shape: Shape, options: list[str]) -> dict[str, Any]:
    runs = {FUSED.name: training_step(cell, shape, None)}
    runs |= {option: training_step(cell, shape, option) for option in options}
    rounds = Rounds()
    interleave(runs, PLAN, rounds)
    return {
        "cell": cell,
        "shape": str(shape),
        "threads": torch.get_num_threads(),
        "plain_seconds": rounds.time(FUSED.name).median,
        "ratio": {option: rounds.ratio(option).median for option in options},
        "rounds": len(rounds.seconds[FUSED.name]),
        "disturbed_rounds": rounds.disturbed_rounds + rounds.disturbed_rounds_kept,
    }


def _label(option: str) -> str:
    if option == "return_states":
        return "return_states=True"
    keywords = OPTIONS[option][0]
    return ", ".join(f"{name}={value!r}" for name, value in keywords.items()) or f"{option}=, 1 % of steps"


def table_of(result: dict[str, Any]) -> str:
    """Markdown: a row for each option, a column for each cell, shape and number of threads."""
    cases = result["cases"]
    where = result["environment"]
    headers = [f"{c['cell']} {c['shape']}, {c['threads']} thread{'s' if c['threads'] > 1 else ''}" for c in cases]
    lines = [
        "Time of a training step, with all gradients, over that of the layer without the option; freed memory kept in "
        f"the process; {where['processor']} ({where['instruction_sets']['used']}), {where['date'][:10]}. From "
        "`python -m benchmarks.options`.",
        "",
        f"| | {' | '.join(headers)} |",
        f"| --- |{' ---: |' * len(headers)}",
    ]
    for option in OPTIONS:
        values = [f"{c['ratio'][option]:.2f}" if option in c["ratio"] else "" for c in cases]
        if any(values):
            lines.append(f"| `{_label(option)}` | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=OPTIONS, nargs="+", default=list(OPTIONS))
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--docs", type=Path, help="write the table into this page")
    arguments = parser.parse_args()
    kept = environment.keep_freed_memory()
    cases = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for cell in CELLS:
                options = [option for option in arguments.only if has(cell, option)]
                if not options:
                    continue
                cases.append(measure(cell, shape, options))
                ratios = ", ".join(f"{option} {ratio:.2f}" for option, ratio in cases[-1]["ratio"].items())
                print(f"{cell} {shape}, {threads} threads: {ratios}", flush=True)
    result = {"environment": environment.describe(freed_memory_kept=kept, peers={}), "cases": cases}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.docs:
        arguments.docs.write_text(replaced(arguments.docs.read_text(), "options", table_of(result)))
    late = [
        f"{c['cell']} {c['shape']}, {c['threads']} threads: {option} takes {ratio:.2f}, more than {OPTIONS[option][1]}"
        for c in cases
        for option, ratio in c["ratio"].items()
        if ratio > OPTIONS[option][1]
    ]
    print("\n".join(late) if late else "every option is within its bar")
    return bool(late)


if __name__ == "__main__":
    sys.exit(main())
