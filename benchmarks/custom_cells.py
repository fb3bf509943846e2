"""What a cell of one's own costs: time of a training step and of inference over those of the built-in cell whose
formulas its header has, in turns, in one run.

python -m benchmarks.custom_cells                        # 2 threads and 1, about two minutes after compiling
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fused_rnn
from benchmarks.options import PLAN, SHAPES, Shape
from fused_rnn.bench import environment
from fused_rnn.bench.peers import FUSED
from fused_rnn.bench.runner import Rounds, interleave

HEADER = Path(__file__).parent.parent / "tests" / "cells" / "like_ours.h"
# By name of the struct: the built-in cell, and the most that the time may be of its.
CELLS: dict[str, tuple[Callable[..., torch.nn.Module], float]] = {
    "Lstm": (fused_rnn.LSTM, 1.3),
    "LstmByHand": (fused_rnn.LSTM, 1.05),
    "Gru": (fused_rnn.GRU, 1.3),
    "Rnn": (lambda *sizes: fused_rnn.RNN(*sizes, nonlinearity="relu"), 1.3),
}


def calls_of(layer: torch.nn.Module, shape: Shape) -> dict[str, Callable[[], Any]]:
    x = torch.randn(shape.steps, shape.batch, shape.input_size, requires_grad=True)
    grad = torch.randn(shape.steps, shape.batch, shape.hidden_size)
    leaves = [x, *layer.parameters()]

    def train() -> None:
        torch.autograd.grad(layer(x)[0], leaves, grad)

    def infer() -> None:
        with torch.no_grad():
            layer(x)

    return {"training": train, "inference": infer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CELLS, nargs="+", default=list(CELLS))
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    arguments = parser.parse_args()
    environment.keep_freed_memory()
    print("| cell | shape | threads | training | inference | bar |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for name in arguments.only:
        built_in, most = CELLS[name]
        custom = fused_rnn.load_cell(HEADER, name)
        custom(1, 1)(torch.zeros(1, 1, 1))  # has the kernels compiled
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for shape in SHAPES:
                sizes = (shape.input_size, shape.hidden_size)
                ours, theirs = calls_of(built_in(*sizes), shape), calls_of(custom(*sizes), shape)
                ratios = []
                for kind, call in ours.items():
                    rounds = Rounds()
                    interleave({FUSED.name: call, name: theirs[kind]}, PLAN, rounds)
                    ratios.append(rounds.ratio(name).median)
                print(f"| {name} | {shape} | {threads} | {ratios[0]:.2f} | {ratios[1]:.2f} | {most} |", flush=True)


if __name__ == "__main__":
    main()
