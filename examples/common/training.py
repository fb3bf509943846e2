"""A training loop in which the same model on torch.nn's layers trains along, and checkpoints that go on exactly.

The two models begin with the same weights and take the same batches, step by step in turns. Their loss curves must
agree, and the times of their steps are compared.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn

from .options import DTYPES, ExampleError

# When loss curves agree. The two sides round differently in the last place, and every optimizer step magnifies that: to
# some 1e-6 of the loss in 30 steps, some 1e-3 after 300, where training is chaotic and only the means over a window of
# steps can be held together. A wrong gradient shows in the strict early steps: one bias gradient left out, noise of 2 %
# on one weight gradient, or a gradient cut in the middle of the sequence makes 1e-3 and more.
EARLY_STEPS = 30
EARLY_TOLERANCE = 1e-4  # of the loss, in each of the early steps
LATE_TOLERANCE = 1e-2  # of the loss, in means over LATE_WINDOW steps
LATE_WINDOW = 20
# 16-bit formats round 2^16 times as coarsely as float32, in every step of the optimizer.
ROUGH_TOLERANCE = 0.1

# Steps of a run that are left out when times are compared: buffers and threads are still being set up.
WARM_UP_STEPS = 5


class Workload(ABC):
    """A model, its batches and its loss: what an example says, and all that the loop asks for.

    Attributes:
        name: of the model's files, and of its line in the closing table.
        title: over its picture.
        published: what is compared with the result, as text; empty if there is nothing.
        metric: which number of `evaluate` is the result; "loss" is the mean training loss of an epoch.
        layer_options: of `fused_rnn.convert`, which torch.nn lacks: with any the model trains alone.
    """

    name: str = ""
    title: str = ""
    published: str = ""
    metric: str = "loss"
    unit: str = "cross-entropy, nats"  # of the training loss, for the picture
    learning_rate: float = 1e-3
    clip: float | None = None  # the largest norm of a gradient
    layer_options: Mapping[str, Any] = {}

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int: ...

    @abstractmethod
    def make_model(self) -> nn.Module:
        """Return the model on torch.nn's layers, which `fused_rnn.convert` then takes."""

    @abstractmethod
    def batch(self, step: int) -> Any:
        """Return the batch of a step, the same whenever it is asked for: tensors, alone or in tuples."""

    @abstractmethod
    def loss(self, model: Any, batch: Any, memory: dict[str, Any]) -> Tensor:
        """Return the loss of a batch. `memory` is the learner's own, from step to step: a state that is carried on."""

    def evaluate(self, model: Any) -> dict[str, float]:
        """Return numbers that describe the model after an epoch; it is in eval mode, and nothing is recorded."""
        return {}

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.learning_rate

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=self.learning_rate)

    def identity(self) -> Mapping[str, Any]:
        """Return what a run cannot be resumed without: sizes, and a digest of the data."""
        return {}


class Shuffled(Workload):
    """Batches of examples in an order drawn anew for each epoch; a part that fills no batch is left out.

    Attributes:
        count: examples to train on.
        batch_size: of them in a batch.
        seed: of the order.
    """

    count: int
    batch_size: int
    seed: int
    _epoch = -1
    _order: list[Tensor]

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    @abstractmethod
    def pick(self, places: Tensor) -> Any:
        """Return a batch of the examples at `places` (batch_size)."""

    def order_of(self, epoch: int) -> list[Tensor]:
        """Return the places of each batch of an epoch."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(self.count, generator=generator)
        return list(order[: self.steps_per_epoch * self.batch_size].split(self.batch_size))

    def batch(self, step: int) -> Any:
        epoch, turn = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, self.order_of(epoch)
        return self.pick(self._order[turn])


class Streams:
    """Tokens (N) as `batch_size` parallel streams that begin at equal distances, read `seq_length` at a time."""

    def __init__(self, tokens: Tensor, batch_size: int, seq_length: int) -> None:
        needed = batch_size * (seq_length + 1)
        if len(tokens) < needed:
            raise ExampleError(
                f"--data: expected at least {needed:,} tokens to train on ({batch_size} streams of {seq_length}), "
                f"got {len(tokens):,}"
            )
        length = len(tokens) // batch_size
        self.tokens = tokens[: batch_size * length].view(batch_size, length).t().contiguous()
        self.seq_length = seq_length
        self.steps_per_epoch = (length - 1) // seq_length

    def batch(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """Return inputs (T, B), the tokens that follow them (T, B), and whether the streams begin here."""
        turn = step % self.steps_per_epoch
        start, end = turn * self.seq_length, (turn + 1) * self.seq_length
        return self.tokens[start:end], self.tokens[start + 1 : end + 1], turn == 0


class Continued(Workload):
    """A language model over streams: the state is carried from piece to piece without its gradient.

    The model takes tokens (T, B) and a state, and returns logits (T, B, classes) and the next state.
    """

    streams: Streams

    @property
    def steps_per_epoch(self) -> int:
        return self.streams.steps_per_epoch

    def batch(self, step: int) -> Any:
        return self.streams.batch(step)

    def loss(self, model: Any, batch: Any, memory: dict[str, Any]) -> Tensor:
        tokens, targets, begins = batch
        logits, state = model(tokens, None if begins else memory["state"])
        memory["state"] = detached(state)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def loss_of_stream(model: Any, tokens: Tensor, piece: int) -> float:
    """Return the mean cross-entropy of tokens (N) read as one stream from the zero state, `piece` at a time.

    model: (T, B) and a state -> logits (T, B, classes) and the state.
    """
    total, state = 0.0, None
    for start in range(0, len(tokens) - 1, piece):
        inputs = tokens[start : min(start + piece, len(tokens) - 1)]
        logits, state = model(inputs.unsqueeze(1), state)
        targets = tokens[start + 1 : start + 1 + len(inputs)]
        total += F.cross_entropy(logits.squeeze(1), targets, reduction="sum").item()
    return total / (len(tokens) - 1)


def digest_of(*parts: Any) -> str:
    """Return a digest of tensors and texts."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.numpy().tobytes() if isinstance(part, Tensor) else str(part).encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def moved(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a batch on a device, its floating-point tensors in dtype."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype) if batch.is_floating_point() else batch.to(device)
    if isinstance(batch, (tuple, list)):
        return tuple(moved(part, device, dtype) for part in batch)
    return batch


def detached(state: Any) -> Any:
    """Return a recurrent state without its gradient."""
    return tuple(map(detached, state)) if isinstance(state, tuple) else state.detach()


class Learner:
    """A model with all that training it needs, and the record of its steps.

    Attributes:
        losses: of every step.
        seconds: of every step: forward, backward, clipping and the optimizer.
        history: what was evaluated, with the step after which it was.
    """

    def __init__(self, name: str, model: nn.Module, workload: Workload, arguments: argparse.Namespace) -> None:
        self.name = name
        self.model = model
        self.workload = workload
        self.device, self.dtype = arguments.device, DTYPES[arguments.dtype]
        self.call: Any = torch.compile(model) if arguments.compile else model
        self.optimizer = workload.make_optimizer(model)
        self.memory: dict[str, Any] = {}
        # A random stream of its own: dropout masks do not depend on who else draws.
        self.random_state = torch.get_rng_state()
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.history: list[dict[str, float]] = []

    def step(self, batch: Any) -> None:
        step = len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.workload.rate(step)
        torch.set_rng_state(self.random_state)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.workload.loss(self.call, batch, self.memory)
        loss.backward()
        if self.workload.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.workload.clip)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.random_state = torch.get_rng_state()

    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            last = self.losses[-self.workload.steps_per_epoch :]
            found = {"step": float(len(self.losses)), "loss": statistics.fmean(last)}
            found |= self.workload.evaluate(self.call)
        self.model.train()
        self.history.append(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": self.memory,
            "random_state": self.random_state,
            "losses": self.losses,
            "seconds": self.seconds,
            "history": self.history,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.memory = saved["memory"]
        self.random_state = saved["random_state"]
        self.losses, self.seconds, self.history = saved["losses"], saved["seconds"], saved["history"]


def make_learners(workload: Workload, arguments: argparse.Namespace) -> list[Learner]:
    """Return the learner of --backend, and with fused layers, if they are to be compared, its twin on torch.nn's.

    Raises:
        ExampleError: the workload has options that torch.nn lacks, and `--backend torch` asks for its layers.
    """
    check_backend(workload, arguments)
    torch.manual_seed(arguments.seed)
    model = workload.make_model().to(arguments.device, DTYPES[arguments.dtype])
    if arguments.backend == "torch":
        return [Learner("torch.nn", model, workload, arguments)]
    twin = copy.deepcopy(model)
    fused = Learner("fused", fused_rnn.convert(model, **workload.layer_options), workload, arguments)
    if workload.layer_options or not arguments.compare_steps:
        return [fused]
    return [fused, Learner("torch.nn", twin, workload, arguments)]


def check_backend(workload: Workload, arguments: argparse.Namespace) -> None:
    if workload.layer_options and arguments.backend == "torch":
        raise ExampleError(
            f"--backend: expected fused for {workload.name}, got torch, and torch.nn's layers have no option "
            + ", ".join(workload.layer_options)
        )


@contextmanager
def interrupt_flag() -> Iterator[list[bool]]:
    """Turn Ctrl-C into a flag, so that a step is never cut in two; a second Ctrl-C stops at once."""
    raised: list[bool] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if raised:
            raise KeyboardInterrupt
        raised.append(True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield raised
    finally:
        signal.signal(signal.SIGINT, before)


def train(learners: Sequence[Learner], arguments: argparse.Namespace) -> str:
    """Train the first learner to the end, another along for the first `--compare-steps`.

    Returns:
        why it ended: "done", "interrupted", "out of time" or "curves disagree".
    """
    first, twins = learners[0], learners[1:]
    workload = first.workload
    total = arguments.epochs * workload.steps_per_epoch
    steps = total if arguments.steps is None else min(total, arguments.steps)
    deadline = time.monotonic() + 60 * (arguments.minutes or math.inf)
    begin = len(first.losses)
    with interrupt_flag() as interrupted, Progress(workload.name, begin, steps) as progress:
        for step in range(begin, steps):
            batch = moved(workload.batch(step), first.device, first.dtype)
            together = [first, *(twin for twin in twins if step < arguments.compare_steps)]
            # In turns, and the order turns round: a busy machine and warm caches favour neither.
            for learner in together if step % 2 else together[::-1]:
                learner.step(batch)
            done = step + 1
            if done % workload.steps_per_epoch == 0 or done == steps:
                progress.say(first.evaluate(), workload)
            progress.show(together)
            if twins and done in (EARLY_STEPS, arguments.compare_steps):
                if not Comparison(first, twins[0]).curves_agree:
                    return "curves disagree"
            if interrupted:
                return "interrupted"
            if time.monotonic() > deadline and done < steps:
                return "out of time"
    return "done"


class Progress:
    """A progress bar with loss and time of a step; without tqdm a line now and then."""

    def __init__(self, title: str, begin: int, steps: int) -> None:
        self._steps = steps
        self._title = title
        self._bar: Any = None
        if begin >= steps:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            print("no progress bar: tqdm is not installed (pip install tqdm)")
            return
        self._bar = tqdm(
            initial=begin,
            total=steps,
            bar_format=title + " |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stdout.isatty() else 5,
            file=sys.stdout,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, found: Mapping[str, float], workload: Workload) -> None:
        """Write what was evaluated above the bar."""
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if name != "step")
        if not numbers:
            return
        epoch = found["step"] / workload.steps_per_epoch
        text = f"{self._title} after {epoch:.3g} epoch{'s' if epoch != 1 else ''}: {numbers}"
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def show(self, learners: Sequence[Learner]) -> None:
        step = len(learners[0].losses)
        if self._bar is None and step % 50 and step != self._steps:
            return
        text = "; ".join(
            f"{learner.name} loss {learner.losses[-1]:.3f}, {1e3 * statistics.median(learner.seconds[-25:]):.1f} ms"
            for learner in learners
        )
        if self._bar is None:
            print(f"{self._title} step {step}/{self._steps}: {text}", flush=True)
        else:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update()


class Comparison:
    """The two learners over the steps both have taken.

    Attributes:
        differences: for each step |loss of one - loss of the other| / loss: of the losses themselves in the first
            `EARLY_STEPS`, then of their means over the last `LATE_WINDOW` steps.
        allowed: for each step the tolerance.
        ratio: median over the steps of time of torch.nn / time of the fused model.
    """

    def __init__(self, fused: Learner, twin: Learner) -> None:
        self.steps = min(len(fused.losses), len(twin.losses))
        ours, theirs = (
            learner.losses[: min(self.steps, EARLY_STEPS)] + windowed(learner.losses[: self.steps])[EARLY_STEPS:]
            for learner in (fused, twin)
        )
        self.differences = [abs(a - b) / abs(b) if b else abs(a) for a, b in zip(ours, theirs, strict=True)]
        early, late = EARLY_TOLERANCE, LATE_TOLERANCE
        if fused.dtype in (torch.bfloat16, torch.float16):
            early = late = ROUGH_TOLERANCE
        self.limits = early, late
        self.allowed = [early if step < EARLY_STEPS else late for step in range(self.steps)]
        skip = WARM_UP_STEPS if self.steps > 2 * WARM_UP_STEPS else 0
        self.fused_seconds, self.twin_seconds = fused.seconds[skip : self.steps], twin.seconds[skip : self.steps]
        self.ratio = statistics.median(b / a for a, b in zip(self.fused_seconds, self.twin_seconds, strict=True))

    @property
    def curves_agree(self) -> bool:
        # Written so that NaN disagrees.
        return all(found <= allowed for found, allowed in zip(self.differences, self.allowed, strict=True))

    @property
    def milliseconds(self) -> tuple[float, float]:
        """Medians of a step: fused, torch.nn."""
        return 1e3 * statistics.median(self.fused_seconds), 1e3 * statistics.median(self.twin_seconds)

    def __str__(self) -> str:
        early = (
            f"largest difference {largest(self.differences[:EARLY_STEPS]):.0e} of the loss in the first {EARLY_STEPS}"
        )
        late = f", {largest(self.differences[EARLY_STEPS:]):.0e} later" if self.steps > EARLY_STEPS else ""
        limits = f"{self.limits[0]:.0e} and {self.limits[1]:.0e} allowed"
        ours, theirs = self.milliseconds
        return (
            f"beside torch.nn for {self.steps} steps, from the same weights, on the same batches:\n"
            f"  loss curves {'agree' if self.curves_agree else 'DISAGREE'}: {early}{late} ({limits})\n"
            f"  time of a training step: fused {ours:.1f} ms, torch.nn {theirs:.1f} ms, ratio {self.ratio:.2f} "
            f"(median of {len(self.fused_seconds)} pairs)"
        )


def largest(differences: Sequence[float]) -> float:
    """Return the maximum; NaN if there is one."""
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def windowed(losses: Sequence[float]) -> list[float]:
    """Return for each step the mean of the last `LATE_WINDOW` losses, of fewer at the start."""
    sums = [0.0, *itertools.accumulate(losses)]
    starts = (max(0, end - LATE_WINDOW) for end in range(1, len(sums)))
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


# What may not differ between the run that wrote a checkpoint and the one that goes on from it.
KEPT_OPTIONS = ("seed", "dtype", "backend")


def checkpoint_identity(workload: Workload, arguments: argparse.Namespace) -> dict[str, str]:
    kept = {name: getattr(arguments, name) for name in KEPT_OPTIONS}
    return {name: json.dumps(value, default=str) for name, value in (kept | dict(workload.identity())).items()}


def save_checkpoint(path: Path, learners: Sequence[Learner], arguments: argparse.Namespace) -> None:
    """Write all that going on exactly needs; an interruption leaves the file before intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "identity": checkpoint_identity(learners[0].workload, arguments),
            "learners": {learner.name: learner.state_dict() for learner in learners},
        },
        partial,
    )
    os.replace(partial, path)


def load_checkpoint(path: Path, learners: Sequence[Learner], arguments: argparse.Namespace) -> None:
    """Put learners where the run that wrote the file was."""
    loaded: dict[str, Any]
    try:
        loaded = torch.load(path, weights_only=True, map_location=arguments.device)
    except FileNotFoundError:
        raise ExampleError(f"--resume: expected a checkpoint, got no file {path}") from None
    except Exception:  # torch.load raises many types for a file that is damaged or something else
        loaded = {}
    if not isinstance(loaded, dict) or "learners" not in loaded or "identity" not in loaded:
        raise ExampleError(f"--resume: expected a checkpoint of this program, got {path}")
    for name, value in checkpoint_identity(learners[0].workload, arguments).items():
        was = loaded["identity"].get(name)
        if was != value:
            option = "--" + name.replace("_", "-")
            raise ExampleError(f"{option}: expected {was} as in the checkpoint {path}, got {value}")
    for learner in learners:
        if learner.name not in loaded["learners"]:
            raise ExampleError(f"--compare-steps: expected 0, for {path} holds no torch.nn model")
        saved = loaded["learners"][learner.name]
        saved["random_state"] = saved["random_state"].cpu()
        learner.load_state_dict(saved)


@dataclass
class Outcome:
    """How a run of one workload ended, for the closing table and the picture."""

    workload: Workload
    learners: list[Learner]
    ended: str
    comparison: Comparison | None
    files: list[Path] = field(default_factory=list)

    @property
    def result(self) -> float | None:
        """The metric after the last epoch."""
        history = self.learners[0].history
        return history[-1].get(self.workload.metric) if history else None


def run_workload(workload: Workload, arguments: argparse.Namespace) -> Outcome:
    """Train a workload as the command line says, and leave a checkpoint whatever happens."""
    learners = make_learners(workload, arguments)
    path = arguments.out / f"{workload.name}.pt"
    if arguments.resume and path.exists():
        load_checkpoint(path, learners, arguments)
    ended = train(learners, arguments)
    save_checkpoint(path, learners, arguments)
    both = None
    if len(learners) == 2 and learners[1].losses:
        both = Comparison(learners[0], learners[1])
        print(both)
    return Outcome(workload, learners, ended, both, [path])
