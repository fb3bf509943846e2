"""What a step of a Stream takes beside torch.nn's cell and ONNX Runtime, and a pool beside as many Streams; on one
thread, in turns, in one run. Numbers are compared before anything is timed.

python -m benchmarks.serving                             # about three minutes
python -m benchmarks.serving --sizes 8 64 --sessions 256
python -m benchmarks.serving --only c                    # the C library beside a Stream; after `make library`
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fused_rnn
from fused_rnn.bench import environment
from fused_rnn.bench.cases import CELLS, Case, Shape
from fused_rnn.bench.peers import FUSED, ONNX_RUNTIME, TORCH_NN, Problem
from fused_rnn.bench.runner import Plan, Rounds, interleave

PLAN = Plan(min_rounds=11, max_rounds=41, seconds=4.0, precision=0.01, sample_seconds=0.02)
SIZES = (8, 32, 64, 128, 256)
# The most that a step may take of the best peer's time, and how many times as many sessions a second a pool of 256
# LSTMs of 128 units has to serve as Streams in a loop.
MOST_OF_PEER, LEAST_OF_LOOP = 0.7, 4.0


def step_of(problem: Problem) -> Callable[[], Any]:
    stream = fused_rnn.Stream(problem.module)
    x, step = problem.inputs[0], stream.step
    stream.state = problem.inputs[1]
    expected = problem.module(*problem.inputs)
    h = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(step(x), h)
    return lambda: step(x)


def measure_steps(sizes: list[int]) -> None:
    peers = [peer for peer in (TORCH_NN, ONNX_RUNTIME) if peer.available()]
    print("| cell | B1 I = H | Stream, us | " + " | ".join(f"{peer.name} / Stream" for peer in peers) + " | met |")
    print("| --- | ---: | ---: |" + " ---: |" * len(peers) + " --- |")
    for cell in CELLS:
        for size in sizes:
            case = Case(Shape("call", 1, 1, size, size, single_step=True), cell, "inference", "float32")
            problem = Problem(case)
            calls = {FUSED.name: step_of(problem)} | {peer.name: peer.make(problem) for peer in peers}
            rounds = Rounds()
            interleave(calls, PLAN, rounds, pools={peer.name: peer.pool for peer in (FUSED, *peers)})
            ratios = [rounds.ratio(peer.name).median for peer in peers]
            met = "yes" if min(ratios) * MOST_OF_PEER >= 1 else "no"
            shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {cell} | {size} | {1e6 * rounds.time(FUSED.name).median:.2f} | {shown} | {met} |", flush=True)


def measure_pool(sessions: int, sizes: list[int]) -> None:
    print(f"\n| cell | {sessions} sessions, I = H | pool, us a step of all | loop of Streams / pool | met |")
    print("| --- | ---: | ---: | ---: | --- |")
    for cell in CELLS:
        for size in sizes:
            module = getattr(fused_rnn, cell.upper())(size, size)
            pool, streams = (
                fused_rnn.StreamPool(module, sessions),
                [fused_rnn.Stream(module) for _ in range(sessions)],
            )
            slots, x = [pool.open() for _ in streams], torch.randn(sessions, size)
            pairs = list(zip(streams, x.split(1), strict=True))

            def loop(pairs: Any = pairs) -> None:
                for stream, row in pairs:
                    stream.step(row)

            def of_pool(pool: Any = pool, x: Any = x, slots: Any = slots) -> None:
                pool.step(x, slots)

            of_pool()
            loop()
            for stream, slot in zip(streams, slots, strict=True):
                torch.testing.assert_close(pool.state(slot), stream.state, rtol=0, atol=0)
            rounds = Rounds()
            interleave({FUSED.name: of_pool, "loop": loop}, PLAN, rounds)
            ratio = rounds.ratio("loop").median
            met = "yes" if ratio >= LEAST_OF_LOOP else "no"
            print(f"| {cell} | {size} | {1e6 * rounds.time(FUSED.name).median:.0f} | {ratio:.2f} | {met} |", flush=True)


ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build/library"


def shortest_step(stream: fused_rnn.Stream, seconds: float) -> float:
    """Nanoseconds, by the same samples as c_step.c takes."""
    x, step, calls = torch.randn(1, stream.input_size), stream.step, 500
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(calls):
            step(x)
        shortest = min(shortest, 1e9 * (time.perf_counter() - begin) / calls)
    return shortest


def measure_c(sizes: list[int], rounds: int = 15, seconds: float = 0.1) -> None:
    """In turns: the shortest step of each round, and the medians over the rounds of times and of their ratios."""
    if not (LIBRARY / "lib/libfused_rnn.a").exists():
        raise SystemExit("error: the C library is not built: make library")
    print("| cell | B1 I = H | C, ns | in chunks of 100 | a refused call | Stream in Python / C |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        program, weights = Path(folder) / "c_step", Path(folder) / "weights"
        source, archive = ROOT / "benchmarks/c_step.c", LIBRARY / "lib/libfused_rnn.a"
        command = [os.environ.get("CC", "cc"), "-O2", source, f"-I{LIBRARY}/include", archive, "-o", program]
        subprocess.run([str(part) for part in command], check=True)
        for cell in CELLS:
            for size in sizes:
                module = getattr(fused_rnn, cell.upper())(size, size)
                fused_rnn.save_weights(module, weights)
                stream, found = fused_rnn.Stream(module), []
                for _ in range(rounds):
                    line = subprocess.run([program, weights, str(seconds)], check=True, capture_output=True, text=True)
                    found.append([*map(float, line.stdout.split()[1:]), shortest_step(stream, seconds)])
                step, chunk, refused, _ = (statistics.median(column) for column in zip(*found, strict=True))
                ratio = statistics.median(row[-1] / row[0] for row in found)
                print(f"| {cell} | {size} | {step:.0f} | {chunk:.0f} | {refused:.1f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--only", choices=("step", "pool", "c"), help="without it step and pool")
    arguments = parser.parse_args()
    environment.keep_freed_memory()
    torch.set_num_threads(1)
    with torch.no_grad():
        if arguments.only == "c":
            return measure_c(arguments.sizes)
        if arguments.only != "pool":
            measure_steps(arguments.sizes)
        if arguments.only != "step":
            measure_pool(arguments.sessions, arguments.sizes)


if __name__ == "__main__":
    main()
