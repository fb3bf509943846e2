"""A step of the C library beside the same through Python's `fused_rnn.Stream`, one thread, in turns, in one run.

make library
python -m benchmarks.c_library                 # under a minute
python -m benchmarks.c_library --sizes 8 64
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

import fused_rnn
from fused_rnn.bench import environment

CELLS = ("lstm", "gru", "rnn")
SIZES = (8, 32, 64, 128, 256)
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


def measure(sizes: list[int], rounds: int = 15, seconds: float = 0.1) -> None:
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
    arguments = parser.parse_args()
    environment.keep_freed_memory()
    torch.set_num_threads(1)
    with torch.no_grad():
        measure(arguments.sizes)


if __name__ == "__main__":
    main()
