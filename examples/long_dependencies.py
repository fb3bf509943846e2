"""Where a plain RNN forgets: the adding problem and the copy task at growing length, and the gradients that say why.

    python examples/long_dependencies.py
    python examples/long_dependencies.py --lengths 30 100 300 --steps 1000

Adding problem (Hochreiter and Schmidhuber 1997): of T random numbers two are marked, and their sum is to be said at
the end; always saying 1 has a mean squared error of 1/6 = 0.167. Copy task (Arjovsky 2016): ten symbols, then T blanks,
then the ten are to be repeated. The second picture shows the norm of the loss's gradient with respect to the state of
every step, |dL/dh_t|, before training and after it: through an RNN it vanishes with the distance from the end (Bengio
1994), through gates it does too until they have learned to stay open. Gradients are clipped to a norm of 1;
`--truncate` cuts them off after so many steps besides, with which what lies further back cannot be learned.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import options, report, training
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
BATCH_SIZE, HIDDEN = 50, 64
SYMBOLS, REPEATED = 8, 10


def adding(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1) and marks (T, B, 2), and the sum of the two marked numbers (B)."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(length, BATCH_SIZE, generator=generator)
    marks = torch.zeros(length, BATCH_SIZE)
    rows = torch.arange(BATCH_SIZE)
    half = length // 2
    for begin, end in ((0, half), (half, length)):
        marks[torch.randint(begin, end, (BATCH_SIZE,), generator=generator), rows] = 1
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(0)


def copying(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Symbols (T + 20, B) as one-hot vectors, and what is to be said at each step: blanks, then the first ten."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, SYMBOLS + 1, (REPEATED, BATCH_SIZE), generator=generator)
    blank, signal = 0, SYMBOLS + 1
    given = torch.full((length + 2 * REPEATED, BATCH_SIZE), blank)
    given[:REPEATED] = drawn
    given[-REPEATED - 1] = signal
    wanted = torch.full_like(given, blank)
    wanted[-REPEATED:] = drawn
    return F.one_hot(given, SYMBOLS + 2).float(), wanted


class Model(nn.Module):
    """A recurrent layer, and a dense one on its output: (T, B, I) -> (T, B, O).

    truncate: after so many steps the state goes on without its gradient; 0 never.
    """

    def __init__(self, layer: type[nn.RNNBase], inputs: int, outputs: int, truncate: int = 0) -> None:
        super().__init__()
        self.recurrent = layer(inputs, HIDDEN)
        self.output = nn.Linear(HIDDEN, outputs)
        self.truncate = truncate
        if layer is nn.LSTM:
            with torch.no_grad():  # the forget gate begins open (Gers 2000, Jozefowicz 2015)
                self.recurrent.bias_ih_l0[HIDDEN : 2 * HIDDEN] = 1

    def states(self, x: Tensor) -> Tensor:
        """Hidden states of all steps, (T, B, H)."""
        pieces, state = [], None
        for piece in x.split(self.truncate or len(x)):
            output, state = self.recurrent(piece, state)
            state = training.detached(state)
            pieces.append(output)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.output(self.states(x))
        return result


class Task(training.Workload):
    title = "Long dependencies"
    clip = 1.0

    def __init__(self, task: str, cell: str, length: int, arguments: argparse.Namespace) -> None:
        self.task, self.cell, self.length = task, cell, length
        self.name = f"{task}-{length}-{cell}"
        self.seed, self.device, self.truncate = arguments.seed, arguments.device, arguments.truncate
        self.steps = arguments.steps
        # With 2e-3 the copy task's first steps are chaotic: torch.nn's own curve, begun one rounding beside, differs.
        self.learning_rate = 4e-3 if task == "adding" else 1e-3
        self.metric = "error" if task == "adding" else "accuracy"
        self.unit = "mean squared error" if task == "adding" else "cross-entropy, nats"
        guess = math.log(SYMBOLS) * REPEATED / (length + 2 * REPEATED)
        self.published = "0.167 is a guess" if task == "adding" else f"0.125 is a guess, loss {guess:.3f}"

    @property
    def steps_per_epoch(self) -> int:
        return int(self.steps)

    def make_model(self) -> nn.Module:
        inputs, outputs = (2, 1) if self.task == "adding" else (SYMBOLS + 2, SYMBOLS + 1)
        return Model(LAYERS[self.cell], inputs, outputs, self.truncate)

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        return (adding if self.task == "adding" else copying)(self.length, seed)

    def batch(self, step: int) -> Any:
        return self.draw((self.seed << 24) + step)

    def loss(self, model: Any, batch: Any, memory: dict[str, Any]) -> Tensor:
        x, wanted = batch
        said = model(x)
        if self.task == "adding":
            return F.mse_loss(said[-1, :, 0], wanted)
        return F.cross_entropy(said.flatten(0, 1), wanted.flatten())

    def evaluate(self, model: Any) -> dict[str, float]:
        """On ten batches that were not trained on: the error, or the share of the ten symbols that are right."""
        found = []
        for turn in range(10):
            x, wanted = self.draw(-1 - turn)
            said = model(x.to(self.device, next(model.parameters()).dtype)).cpu()
            if self.task == "adding":
                found.append(F.mse_loss(said[-1, :, 0].float(), wanted).item())
            else:
                found.append((said[-REPEATED:].argmax(2) == wanted[-REPEATED:]).float().mean().item())
        return {self.metric: sum(found) / len(found)}

    def identity(self) -> dict[str, Any]:
        return {"truncate": self.truncate, "length": self.length}

    def gradient_norms(self, model: Any) -> list[float]:
        """|dL/dh_t| of every step of the adding problem, mean over rows.

        Each step is a call of its own, so that every state is a tensor that the loss is differentiated by.
        """
        x, wanted = training.moved(self.batch(0), self.device, next(model.parameters()).dtype)
        states, state = [], None
        for row in x:
            _, state = model.recurrent(row.unsqueeze(0), state)
            states.append(state[0] if isinstance(state, tuple) else state)
        loss = F.mse_loss(model.output(states[-1])[0, :, 0], wanted)
        gradients = torch.autograd.grad(loss, states)
        # In float64, for the squares of what is left of them are below float32.
        return [gradient[0].double().norm(dim=1).mean().item() for gradient in gradients]


def draw_gradients(path: Path, norms: dict[str, tuple[list[float], list[float]]]) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for (cell, curves), color in zip(norms.items(), report.OTHERS):
        for values, line, label in zip(curves, (":", "-"), (None, cell.upper())):
            axes.semilogy(range(1, len(values) + 1), values, line, color=color, linewidth=1.6, label=label)
    axes.set(xlabel="step t", ylabel="|dL/dh_t|")
    axes.legend(frameon=False)
    report.style(axes, "Gradient with respect to the state of each step: before (dotted) and after training")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    tasks = [
        Task(task, cell, length, arguments)
        for task in arguments.tasks
        for length in arguments.lengths
        for cell in LAYERS
    ]
    outcomes: list[training.Outcome] = []
    status = report.run_all("long_dependencies", tasks, arguments, outcomes)
    longest = [task for task in tasks if (task.task, task.length) == ("adding", max(arguments.lengths))]
    trained = {outcome.workload.name: outcome.learners[0].model for outcome in outcomes}
    norms = {}
    for task in longest:
        if task.name not in trained:
            continue
        torch.manual_seed(arguments.seed)
        begun = task.make_model().to(arguments.device, next(trained[task.name].parameters()).dtype)
        norms[task.cell] = task.gradient_norms(begun), task.gradient_norms(trained[task.name])
        first = [values[0] for values in norms[task.cell]]
        print(f"|dL/dh_1| of {task.name}: {first[0]:.1e} before training, {first[1]:.1e} after it")
    picture = arguments.out / "gradients.png"
    if norms and draw_gradients(picture, norms):
        print(f"saved {picture}")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = options.make_parser("long_dependencies", str(__doc__).splitlines()[0], data="", epochs=1)
    parser.add_argument("--tasks", nargs="+", choices=("adding", "copy"), default=["adding", "copy"])
    parser.add_argument(
        "--lengths", nargs="+", type=options.positive_int, default=[20, 100], metavar="T", help="(default: 20 100)"
    )
    parser.add_argument(
        "--truncate", type=options.natural_int, default=0, metavar="T", help="cut gradients off after so many steps"
    )
    parser.set_defaults(steps=3000)
    return options.run_program("long_dependencies", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
