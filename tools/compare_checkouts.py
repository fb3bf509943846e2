"""Times the benchmark's cases with two checkouts, each built in place, in processes that take turns.

    python tools/compare_checkouts.py ../before . --threads 2
    python tools/compare_checkouts.py ../before . --only 'lstm B64 .* training' --parts table sweeps

prints for each case the median of time with the second over time with the first, and its quartiles; then the geometric
mean of the medians, and the worst. On a busy machine the time of a single call says nothing; a ratio of neighbours
does. Compile nothing meanwhile. Any shape:

    python tools/compare_checkouts.py ../before . --cell LSTM --shape 40,64,256,512 --mode training --dtype bfloat16

The cases are those of the checkout in which this program stands.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODES = ("inference", "forward", "training")


@dataclass(frozen=True)
class Problem:
    """What is timed: ``forward`` is a forward pass that a backward pass could follow."""

    name: str
    cell: str  # lstm, gru, rnn
    mode: str
    dtype: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    single_step: bool = False


def work() -> None:
    """Answer each line of standard input, a problem and a number of calls, with the mean seconds of one call."""
    import torch

    import fused_rnn
    from fused_rnn.bench.environment import keep_freed_memory

    if not Path(fused_rnn.__file__).is_relative_to(Path(os.environ["PYTHONPATH"])):
        sys.exit(f"imported {fused_rnn.__file__}, not the checkout {os.environ['PYTHONPATH']}")
    keep_freed_memory()
    torch.set_num_threads(int(os.environ["COMPARED_THREADS"]))
    calls: dict[str, Any] = {}
    for line in sys.stdin:
        order = json.loads(line)
        name = order["problem"]["name"]
        if name not in calls:
            calls = {name: make_call(Problem(**order["problem"]))}
            for _ in range(3):
                calls[name]()
        call, count = calls[name], order["count"]
        begin = time.perf_counter()
        for _ in range(count):
            call()
        print((time.perf_counter() - begin) / count, flush=True)


def make_call(problem: Problem) -> Any:
    import torch

    import fused_rnn

    torch.manual_seed(0)
    dtype = getattr(torch, problem.dtype)
    kind = problem.cell.upper()
    sizes = (problem.input_size, problem.hidden_size)
    if problem.single_step:
        module = getattr(fused_rnn, f"{kind}Cell")(*sizes)
        shape: tuple[int, ...] = (problem.batch,)
    else:
        module = getattr(fused_rnn, kind)(*sizes, problem.num_layers, bidirectional=problem.bidirectional)
        shape = (problem.steps, problem.batch)
    module = module.to(dtype)
    training = problem.mode == "training"
    sequence = torch.randn(*shape, problem.input_size).to(dtype).requires_grad_(training)
    gradient = torch.randn(*shape, problem.hidden_size * (2 if problem.bidirectional else 1)).to(dtype)
    parameters = list(module.parameters())

    def call() -> None:
        with torch.set_grad_enabled(problem.mode != "inference"):
            result = module(sequence)
        if training:
            output = result[0] if isinstance(result, tuple) else result
            torch.autograd.grad(output, [sequence, *parameters], gradient)

    return call


class Worker:
    def __init__(self, checkout: Path, threads: int) -> None:
        # Threads that wait actively would take the other worker's processors.
        environment = os.environ | {
            "PYTHONPATH": str(checkout.resolve()),
            "OMP_WAIT_POLICY": "passive",
            "COMPARED_THREADS": str(threads),
        }
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"], stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def seconds(self, problem: Problem, count: int) -> float:
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"problem": asdict(problem), "count": count}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("a worker has stopped; its message is above")
        return float(answer)


def compare(workers: list[Worker], problem: Problem, rounds: int, seconds: float) -> float:
    """Print and return the median ratio."""
    for worker in workers:
        worker.seconds(problem, 1)
    count = max(1, int(seconds / workers[0].seconds(problem, 3)))
    ratios = []
    for turn in range(rounds):
        order = workers if turn % 2 else workers[::-1]
        found = {worker: worker.seconds(problem, count) for worker in order}
        ratios.append(found[workers[1]] / found[workers[0]])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{problem.name}: {middle:.3f} (quartiles {low:.3f}, {high:.3f}; {rounds} rounds of {count})", flush=True)
    return middle


def problems(options: argparse.Namespace) -> list[Problem]:
    if options.shape:
        steps, batch, inputs, units = map(int, options.shape.split(","))
        name = f"{options.cell} T{steps} B{batch} I{inputs} H{units} {options.dtype} {options.mode}"
        return [
            Problem(name, options.cell.lower(), options.mode, options.dtype, steps, batch, inputs, units),
        ]
    from fused_rnn.bench import cases

    return [
        Problem(
            case.name,
            case.cell,
            case.mode,
            case.dtype,
            case.shape.seq_length,
            case.shape.batch_size,
            case.shape.input_size,
            case.shape.hidden_size,
            case.shape.num_layers,
            case.shape.bidirectional,
            case.shape.single_step,
        )
        for case in cases.select(parts=options.parts, pattern=options.only)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout with a built extension")
    parser.add_argument("after", type=Path, help="another")
    parser.add_argument("--parts", nargs="+", default=["table"], help="of the benchmark: table, workloads, sweeps")
    parser.add_argument("--only", default="", help="regular expression searched in the names of cases")
    parser.add_argument("--shape", help="T,B,I,H, instead of the benchmark's cases")
    parser.add_argument("--cell", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--mode", choices=MODES, default="inference")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--seconds", type=float, default=0.03, help="of a round, for each checkout")
    options = parser.parse_args()
    chosen = problems(options)
    if not chosen:
        sys.exit(f"--only: no case has {options.only!r} in its name")
    workers = [Worker(checkout, options.threads) for checkout in (options.before, options.after)]
    print("time after / before, medians")
    medians = {problem.name: compare(workers, problem, options.rounds, options.seconds) for problem in chosen}
    if len(medians) > 1:
        mean = math.exp(statistics.mean(map(math.log, medians.values())))
        worst = max(medians, key=medians.__getitem__)
        print(f"geometric mean {mean:.3f}; worst {medians[worst]:.3f}, {worst}")
    for worker in workers:
        worker.process.kill()


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        main()
