"""Times what torch.compile adds to an inference call: of an LSTM layer, of its operator alone, and of torch.nn.Linear.

    python tools/compiled_calls.py

prints medians of processor time of the thread, in microseconds. The figures of docs/performance.md, "Compiled calls".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fused_rnn

TURNS, CALLS = 25, 300


def microseconds(call: Callable[[], Any]) -> float:
    for _ in range(20):
        call()
    begin = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - begin) / CALLS * 1e6


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer, sequence = fused_rnn.LSTM(64, 64), torch.randn(20, 8, 64)
    linear, row = torch.nn.Linear(8, 8), torch.randn(1, 8)
    params, settings = list(layer.parameters()), layer._settings().flatten()

    def operator(x: torch.Tensor) -> Any:
        return torch.ops.fused_rnn.rnn_forward.default(x, None, None, params, [], *settings, False)[:3]

    compiled = [torch.compile(function) for function in (layer, operator, linear)]
    calls: dict[str, Callable[[], Any]] = {
        "layer, eager": lambda: layer(sequence),
        "layer, compiled": lambda: compiled[0](sequence),
        "operator alone, compiled": lambda: compiled[1](sequence),
        "Linear, eager": lambda: linear(row),
        "Linear, compiled": lambda: compiled[2](row),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            found[name].append(microseconds(call))
    for name, values in found.items():
        print(f"{name}: {statistics.median(values):.1f}")


if __name__ == "__main__":
    main()
