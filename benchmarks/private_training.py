"""A step of differentially private training by Opacus: its own layers, and fused ones, in turns.

    python -m benchmarks.private_training --cell lstm --hidden 128 --threads 2

A classifier (embedding, one recurrent layer, linear) is trained by DP-SGD: forward, backward with the gradient of every
example, clipping, noise, the optimizer's step. Before anything is timed the two have the same gradients of examples.
Times are medians of a step; the two take turns, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from typing import Any

import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn

import fused_rnn
import fused_rnn.opacus
from fused_rnn.bench.environment import keep_freed_memory

WORDS, CLASSES = 1000, 4


class Classifier(nn.Module):
    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        layer = {"lstm": nn.LSTM, "gru": nn.GRU}[arguments.cell]
        self.embedding = nn.Embedding(WORDS, arguments.input)
        self.recurrent = layer(arguments.input, arguments.hidden, batch_first=True)
        self.output = nn.Linear(arguments.hidden, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.recurrent(self.embedding(tokens))[0].mean(1))


class Training:
    """DP-SGD of one model on one batch."""

    def __init__(self, model: nn.Module, tokens: Tensor, labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, labels), batch_size=len(tokens))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.model, self.optimizer, _ = PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )

    def step(self) -> float:
        """Return its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.tokens), self.labels).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def largest_difference(models: list[nn.Module], tokens: Tensor, labels: Tensor) -> float:
    """Return that of the gradients of examples, over the largest gradient of the weight."""
    found: list[dict[str, Tensor]] = []
    for model in models:
        sampled: Any = GradSampleModule(copy.deepcopy(model))
        nn.functional.cross_entropy(sampled(tokens), labels).backward()
        named = [(name.rpartition(".")[2], p.grad_sample) for name, p in sampled.named_parameters()]
        found.append({name: grads for name, grads in named if name.endswith("_l0")})
    ours, theirs = found
    assert len(ours) == 4 and ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in ours)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cell", choices=("lstm", "gru"), default="lstm")
    for name, default in (("batch", 64), ("steps", 50), ("input", 64), ("hidden", 128), ("threads", 2), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = Classifier(arguments)
    tokens = torch.randint(WORDS, (arguments.batch, arguments.steps))
    labels = torch.randint(CLASSES, (arguments.batch,))
    theirs = ModuleValidator.fix(copy.deepcopy(model))
    ours = ModuleValidator.fix(fused_rnn.convert(copy.deepcopy(model)))
    print(f"gradients of examples differ by {largest_difference([ours, theirs], tokens, labels):.1e} of the largest")
    trainings = [Training(ours, tokens, labels), Training(theirs, tokens, labels)]
    for training in trainings:
        training.step()
    seconds = list(zip(*([training.step() for training in trainings] for _ in range(arguments.rounds)), strict=True))
    fused, opacus = (1e3 * statistics.median(of_one) for of_one in seconds)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    sizes = f"B{arguments.batch} T{arguments.steps} I{arguments.input} H{arguments.hidden}"
    print(f"{arguments.cell} {sizes}, {arguments.threads} threads, milliseconds of a step, {arguments.rounds} pairs:")
    print(f"fused {fused:.1f}, Opacus {opacus:.1f}, ratio {ratio:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
