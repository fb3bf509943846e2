"""Times calls with `reset=` over the same call without, turn by turn.

    python tools/resets.py

prints a table: for each layer and size, with no step marked, 1 % and 10 % of them, a training step (forward, backward,
all gradients) and inference, each on 1 and 2 threads. Above 1 the reset takes time. The figures of docs/resets.md,
"What it costs".
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fused_rnn

SIZES = ((128, 128, 256), (16, 512, 128), (4, 512, 256))  # B, T, H; I = H
SHARES = (0.0, 0.01, 0.1)
THREADS = (1, 2)
ROUNDS, SECONDS = 11, 0.05


def calls_of(
    layer: torch.nn.Module, x: torch.Tensor, marks: list[torch.Tensor | None]
) -> list[list[Callable[[], Any]]]:
    """Training steps, one for each of the marks, and the same in inference."""
    leaves = [x, *layer.parameters()]
    gradient = torch.randn(*x.shape[:2], layer.hidden_size).to(x.dtype)

    def train(reset: torch.Tensor | None) -> None:
        torch.autograd.grad(layer(x, reset=reset)[0], leaves, gradient)

    def infer(reset: torch.Tensor | None) -> None:
        with torch.no_grad():
            layer(x, reset=reset)

    return [[lambda reset=reset, call=call: call(reset) for reset in marks] for call in (train, infer)]


def seconds(call: Callable[[], Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def ratios(calls: list[Callable[[], Any]]) -> list[float]:
    """Of all calls but the first to it, medians over rounds in each of which every call has its turn."""
    for call in calls:
        seconds(call, 1)
    count = max(1, int(SECONDS / seconds(calls[0], 1)))
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(ROUNDS):
        times = {k: seconds(calls[k], count) for k in (range(len(calls)) if turn % 2 else reversed(range(len(calls))))}
        for k, of_call in enumerate(found):
            of_call.append(times[k] / times[0])
    return [statistics.median(of_call) for of_call in found[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=("LSTM", "GRU", "RNN"), default=("LSTM", "GRU"))
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    columns = [f"{what}, {share:.0%} of steps" for what in ("training", "inference") for share in SHARES]
    print("| | threads | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * (1 + len(columns)))
    for cell in options.cells:
        for rows, steps, units in SIZES:
            torch.manual_seed(0)
            layer = getattr(fused_rnn, cell)(units, units, dtype=dtype)
            x = torch.randn(steps, rows, units, dtype=dtype, requires_grad=True)
            draws = torch.rand(steps, rows)
            marks: list[torch.Tensor | None] = [None, *(draws < share for share in SHARES)]
            for threads in THREADS:
                torch.set_num_threads(threads)
                cells = [f"{ratio:.2f}" for calls in calls_of(layer, x, marks) for ratio in ratios(calls)]
                print(
                    f"| {cell} B{rows} T{steps} I{units} H{units} | {threads} | " + " | ".join(cells) + " |", flush=True
                )


if __name__ == "__main__":
    main()
