"""Times what torch.compile adds to an inference call of an LSTM layer, beside the least that PyTorch allows for it.

    python tools/compiled_calls.py

prints medians of processor time of the thread, in microseconds. The least is a module that does nothing but call the
layer's operator, with every argument a constant but the sequence and its own four Parameters; then the operator in a
plain function, torch.nn.LSTM and torch.nn.Linear. The figures of docs/performance.md, "Compiled calls".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo

import fused_rnn

TURNS, CALLS = 25, 300


def microseconds(call: Callable[[], Any]) -> float:
    for _ in range(20):
        call()
    begin = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - begin) / CALLS * 1e6


class Bare(torch.nn.Module):
    """The layer's operator as a module of its own, which decides and checks nothing."""

    def __init__(self, layer: fused_rnn.LSTM) -> None:
        super().__init__()
        self.w_ih, self.w_hh, self.b_ih, self.b_hh = layer.parameters()
        self.settings = layer._settings().flatten()

    def forward(self, x: torch.Tensor, hx: None = None) -> Any:
        params = [self.w_ih, self.w_hh, self.b_ih, self.b_hh]
        output, h, c = torch.ops.fused_rnn.rnn_forward.default(x, None, None, params, [], *self.settings, False)[:3]
        return output, (h, c)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.allow_rnn = True
    torch.manual_seed(0)
    layer, sequence = fused_rnn.LSTM(64, 64), torch.randn(20, 8, 64)
    params, settings = list(layer.parameters()), layer._settings().flatten()

    def operator(x: torch.Tensor) -> Any:
        return torch.ops.fused_rnn.rnn_forward.default(x, None, None, params, [], *settings, False)[:3]

    contestants: dict[str, tuple[Callable[[torch.Tensor], Any], torch.Tensor]] = {
        "layer": (layer, sequence),
        "bare module": (Bare(layer), sequence),
        "operator alone": (operator, sequence),
        "torch.nn.LSTM": (torch.nn.LSTM(64, 64), sequence),
        "torch.nn.Linear(8, 8)": (torch.nn.Linear(8, 8), torch.randn(1, 8)),
    }
    calls: dict[str, Callable[[], Any]] = {}
    for name, (function, argument) in contestants.items():
        calls[f"{name}, eager"] = partial(function, argument)
        for backend in ("eager", "aot_eager", "inductor"):
            calls[f"{name}, compiled, {backend}"] = partial(torch.compile(function, backend=backend), argument)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            found[name].append(microseconds(call))
    for name, values in found.items():
        print(f"{name}: {statistics.median(values):.1f}")


if __name__ == "__main__":
    main()
