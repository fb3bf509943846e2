"""Times one step of cells with few rows and large weights, torch.nn beside ours, turn by turn.

    python tools/few_rows.py --dtype bfloat16 --threads 2

prints torch.nn's time over ours, medians: with all gradients, then in inference, each of LSTM, GRU and RNN. The figures
of docs/performance.md, "Weights in place".
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fused_rnn

SIZES = ((256, 256), (512, 512), (1024, 1024), (64, 2048), (2048, 256))  # I, H
ROWS = (1, 3, 16, 32, 64)
ROUNDS, SECONDS = 11, 0.01


def seconds(call: Callable[[], Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def calls_of(cell: torch.nn.Module, rows: int, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """A step with all gradients, and one in inference."""
    sizes = cell.input_size, cell.hidden_size
    x = torch.randn(rows, sizes[0]).to(dtype).requires_grad_()
    gradient = torch.randn(rows, sizes[1]).to(dtype)
    leaves = [x, *cell.parameters()]

    def step() -> torch.Tensor:
        result = cell(x)
        return result[0] if isinstance(result, tuple) else result

    def train() -> None:
        torch.autograd.grad(step(), leaves, gradient)

    return [train, torch.no_grad()(step)]


def ratio(theirs: Callable[[], Any], ours: Callable[[], Any]) -> float:
    for call in (theirs, ours):
        seconds(call, 3)
    count = max(1, int(SECONDS / seconds(ours, 2)))
    ratios = []
    for turn in range(ROUNDS):
        order = (theirs, ours) if turn % 2 else (ours, theirs)
        found = {call: seconds(call, count) for call in order}
        ratios.append(found[theirs] / found[ours])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    for inputs, units in SIZES:
        for rows in ROWS:
            found: list[list[str]] = [[], []]
            for kind in ("LSTM", "GRU", "RNN"):
                cells = [getattr(package, f"{kind}Cell")(inputs, units).to(dtype) for package in (torch.nn, fused_rnn)]
                for mode, pair in enumerate(zip(*(calls_of(cell, rows, dtype) for cell in cells), strict=True)):
                    found[mode].append(f"{ratio(*pair):.2f}")
            training, inference = (", ".join(ratios) for ratios in found)
            print(f"I{inputs} H{units} B{rows}: training {training}; inference {inference}", flush=True)


if __name__ == "__main__":
    main()
