"""Times one case with two checkouts, each built in place, in processes that take turns.

    python tools/compare_checkouts.py ../before . --cell LSTM --shape 40,64,256,512 --mode training --dtype bfloat16

prints the median of time with the second over time with the first, and its quartiles. On a busy machine the time of a
single call says nothing; a ratio of neighbours does. Compile nothing meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

MODES = ("inference", "forward", "training")


def work(options: argparse.Namespace) -> None:
    """Answer each line of standard input, a number of calls, with the mean seconds of one."""
    import torch

    import fused_rnn
    from fused_rnn.bench.environment import keep_freed_memory

    if not Path(fused_rnn.__file__).is_relative_to(Path(os.environ["PYTHONPATH"])):
        sys.exit(f"imported {fused_rnn.__file__}, not the checkout {os.environ['PYTHONPATH']}")
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    steps, batch, inputs, units = map(int, options.shape.split(","))
    dtype = getattr(torch, options.dtype)
    layer = getattr(fused_rnn, options.cell)(inputs, units).to(dtype)
    sequence = torch.randn(steps, batch, inputs).to(dtype).requires_grad_(options.mode == "training")
    gradient = torch.randn(steps, batch, units).to(dtype)

    def call() -> None:
        with torch.set_grad_enabled(options.mode != "inference"):
            output = layer(sequence)[0]
        if options.mode == "training":
            torch.autograd.grad(output, [sequence, *layer.parameters()], gradient)

    for _ in range(3):
        call()
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            call()
        print((time.perf_counter() - begin) / int(line), flush=True)


class Worker:
    def __init__(self, checkout: Path) -> None:
        # Threads that wait actively would take the other worker's processors.
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, __file__, *sys.argv[1:], "--work"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def seconds(self, calls: int) -> float:
        assert self.process.stdin and self.process.stdout
        print(calls, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("a worker has stopped; its message is above")
        return float(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout with a built extension")
    parser.add_argument("after", type=Path, help="another")
    parser.add_argument("--cell", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--shape", default="40,64,256,512", help="T,B,I,H")
    parser.add_argument("--mode", choices=MODES, default="inference")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options)
    workers = [Worker(options.before), Worker(options.after)]
    calls = max(1, int(0.03 / workers[0].seconds(1)))
    ratios = []
    for turn in range(options.rounds):
        order = workers if turn % 2 else workers[::-1]
        seconds = {worker: worker.seconds(calls) for worker in order}
        ratios.append(seconds[workers[1]] / seconds[workers[0]])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"after / before: {middle:.3f} (quartiles {low:.3f}, {high:.3f}; {options.rounds} rounds of {calls} calls)")
    for worker in workers:
        worker.process.kill()


if __name__ == "__main__":
    main()
