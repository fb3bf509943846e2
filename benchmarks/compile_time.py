"""Does what torch.compile takes depend on the number of steps? The same model for many steps and for few, in turns.

    python -m benchmarks.compile_time

A training step (a layer of six, or six layers with what a program has between them, and a linear head) is compiled from
nothing, fullgraph, forward and backward: Dynamo and every cache of PyTorch's are empty before each. Compile time is the
first step's less a second one's, which has nothing to compile: processor time, of the C++ compiler, too, so that what
else the machine does is not in it. Ratios are of neighbouring compilations, in alternating order; the first pair, which
imports what compiles, does not count. Before anything is timed the compiled gradients are those without the compiler.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fused_rnn
from fused_rnn.bench.environment import keep_freed_memory

BATCH, INPUT, HIDDEN, LAYERS = 8, 32, 64, 6


class Stack(nn.Module):
    """One layer of six."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.recurrent = getattr(fused_rnn, cell)(INPUT, HIDDEN, num_layers=LAYERS)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.recurrent(x)[0]).square().mean()
        return result


class Blocks(nn.Module):
    """Six layers, each behind a normalisation and beside what goes past it."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.into = nn.Linear(INPUT, HIDDEN)
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN) for _ in range(LAYERS)])
        self.layers = nn.ModuleList([getattr(fused_rnn, cell)(HIDDEN, HIDDEN) for _ in range(LAYERS)])
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))[0]
        result: Tensor = self.head(x).square().mean()
        return result


def processor_seconds() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of_one.ru_utime + of_one.ru_stime for of_one in used)


def seconds_to_compile(model: nn.Module, x: Tensor, backend: str) -> float:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)

    def step() -> float:
        start = processor_seconds()
        compiled(x).backward()
        model.zero_grad()
        return processor_seconds() - start

    return step() - step()


def check(model: nn.Module, x: Tensor, backend: str) -> None:
    torch.compiler.reset()
    parameters = list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    found, expected = (torch.autograd.grad(run(x), parameters) for run in (compiled, model))
    assert_close(found, expected)


def compare(make: Callable[[], nn.Module], steps: tuple[int, int], rounds: int, backend: str) -> tuple[float, ...]:
    """Median seconds for few and for many steps, and the median, least and largest ratio."""
    torch.manual_seed(0)
    model, inputs = make(), [torch.randn(T, BATCH, INPUT) for T in steps]
    for x in inputs:
        check(model, x, backend)
    pairs = []
    for round_ in range(rounds + 1):
        order = (0, 1) if round_ % 2 else (1, 0)
        seconds = {index: seconds_to_compile(model, inputs[index], backend) for index in order}
        pairs.append((seconds[0], seconds[1]))
    few, many = zip(*pairs[1:], strict=True)
    ratios = [b / a for a, b in pairs[1:]]
    return statistics.median(few), statistics.median(many), statistics.median(ratios), min(ratios), max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["LSTM", "GRU", "RNN"])
    parser.add_argument("--steps", type=int, nargs=2, default=(8, 512), metavar="T")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1  # in this process, whose time is counted
    few, many = arguments.steps
    sizes = f"B{BATCH} I{INPUT} H{HIDDEN}"
    print(f"six layers, {sizes}, {arguments.backend}, {arguments.rounds} pairs; processor time; bar: 1.2")
    print(f"| | T{few}, s | T{many}, s | ratio | least, largest |\n| --- | ---: | ---: | ---: | ---: |")
    for kind, what in ((Stack, "one layer of six"), (Blocks, "six layers")):
        for cell in arguments.cells:
            found = compare(lambda kind=kind, cell=cell: kind(cell), (few, many), arguments.rounds, arguments.backend)
            a, b, ratio, least, most = found
            print(f"| {cell}, {what} | {a:.2f} | {b:.2f} | {ratio:.2f} | {least:.2f}, {most:.2f} |", flush=True)


if __name__ == "__main__":
    main()
