"""Train a character language model on several processes, and go on where one of them died.

    python examples/train_distributed.py                                        # one process
    torchrun --nproc-per-node 2 examples/train_distributed.py                   # two, each with half of the streams
    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel fsdp   # and with half of the parameters
    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py  # all start anew when one dies
    torchrun --nproc-per-node 4 examples/train_distributed.py --resume --epochs 20

The text is cut into parallel streams. Each process reads its share of them, a piece in each step, and carries their
states on without the gradient (truncated backpropagation through time). Gradients are averaged over the processes, so
the loss curve is that of one process with all streams, to rounding. Every --save-every steps all processes write a
checkpoint together: the shards that each has of the model and the optimizer, the states of its streams, its random
numbers. It counts when it is complete. Started anew by torchrun, or with --resume, the processes go on from the last
one, exactly as if nothing had been. With another number of processes the streams are divided anew, with their states.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from char_lm import CharLM, Settings, Text, read_text
from common import options, training
from common.options import DTYPES, ExampleError
from common.processes import Processes, joined
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_rnn

HELD_OUT_SHARE = 0.05
CLIP = 1.0  # the largest norm of a gradient


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_distributed", description=str(__doc__).splitlines()[0])
    group = parser.add_argument_group("data")
    text = "text to learn, UTF-8 (default: pydoc_data.topics, tables left out)"
    group.add_argument("--data", type=Path, metavar="PATH", help=text)
    group.add_argument("--sample", action="store_true", help="a tiny made-up text instead, to see that everything runs")
    run = parser.add_argument_group("the run")
    words = "the whole model in each process, or shards of it (default: ddp)"
    run.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help=words)
    run.add_argument("--epochs", type=options.positive_int, default=4, metavar="N", help="(default: %(default)s)")
    run.add_argument("--steps", type=options.natural_int, metavar="N", help="stop after so many steps")
    words = "steps between checkpoints (default: %(default)s)"
    run.add_argument("--save-every", type=options.positive_int, default=50, metavar="N", help=words)
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    words = "for checkpoints and losses.json; one folder for all processes (default: %(default)s)"
    run.add_argument("--out", type=Path, default=Path("runs/train_distributed"), metavar="FOLDER", help=words)
    model = parser.add_argument_group("the model")
    model.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="(default: lstm)")
    for option, kind, default, words in (
        ("--hidden-size", options.positive_int, 256, "units of a recurrent layer"),
        ("--layers", options.positive_int, 2, "recurrent layers"),
        ("--dropout", options.probability, 0.1, "dropout between recurrent layers"),
        ("--streams", options.positive_int, 32, "parallel streams of text, of all processes together"),
        ("--seq-length", options.positive_int, 64, "characters of each stream in a step"),
        ("--learning-rate", options.positive_float, 3e-3, "of Adam"),
    ):
        model.add_argument(option, type=kind, default=default, metavar="N", help=f"{words} (default: %(default)s)")
    options.add_layer_options(parser)
    return parser.parse_args(argv)


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(
        cell=arguments.cell,
        hidden_size=arguments.hidden_size,
        layers=arguments.layers,
        dropout=arguments.dropout,
        batch_size=arguments.streams,
        seq_length=arguments.seq_length,
        learning_rate=arguments.learning_rate,
    )


def distributed(model: nn.Module, processes: Processes, arguments: argparse.Namespace) -> nn.Module:
    """Return the model as all processes train it together."""
    if arguments.compile:
        model.compile()
    if processes.count == 1:
        return model
    if arguments.parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for part in model.children():
        fully_shard(part, mesh=mesh)  # gathered when it is called, by itself
    return fully_shard(model, mesh=mesh)


class Run:
    """What a process trains, and all that going on exactly needs."""

    def __init__(self, processes: Processes, arguments: argparse.Namespace) -> None:
        self.processes, self.out = processes, arguments.out
        settings = settings_of(arguments)
        text = Text(read_text(arguments))
        end = len(text.tokens) - int(len(text.tokens) * HELD_OUT_SHARE)
        self.held_out = text.tokens[end:]
        self.streams = training.Streams(text.tokens[:end], settings.batch_size, settings.seq_length)
        if settings.batch_size % processes.count:
            raise ExampleError(
                f"--streams: expected a multiple of the {processes.count} processes, got {settings.batch_size}"
            )
        share = settings.batch_size // processes.count
        self.own = slice(processes.rank * share, (processes.rank + 1) * share)
        torch.manual_seed(arguments.seed)  # the same first weights in all processes
        model: nn.Module = CharLM(len(text.vocabulary), settings).to(processes.device, DTYPES[arguments.dtype])
        if arguments.backend == "fused":
            model = fused_rnn.convert(model)
        self.model = distributed(model, processes, arguments)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        self.state: Any = None  # of this process's streams
        self.losses: list[float] = []
        kept = {name: getattr(arguments, name) for name in training.KEPT_OPTIONS}
        self.identity = kept | dataclasses.asdict(settings) | {"data": training.digest_of(text.tokens)}
        self.draw_anew(arguments.seed)

    def draw_anew(self, *numbers: int) -> None:
        """Begin random numbers that are this process's own: dropout masks of its streams."""
        digest = training.digest_of(*numbers, self.processes.rank)
        torch.manual_seed(int(digest[:15], 16))

    def step(self) -> None:
        tokens, targets, begins = self.streams.batch(len(self.losses))
        tokens, targets = (part[:, self.own].to(self.processes.device) for part in (tokens, targets))
        self.optimizer.zero_grad(set_to_none=True)
        logits, state = self.model(tokens, None if begins else self.state)
        self.state = training.detached(state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(self.processes.mean(loss))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the loss on text that was held out, in nats a character; every process reads all of it."""
        self.model.eval()
        loss = training.loss_of_stream(self.model, self.held_out.to(self.processes.device), 1024)
        self.model.train()
        return loss

    # A checkpoint is a folder: the shards of model and optimizer, a file of each process, and run.json.

    def save(self) -> None:
        """Write a checkpoint; until its last byte is on the disk those before are what counts."""
        step = len(self.losses)
        folder = self.out / f"step-{step:08d}"
        partial = folder.with_suffix(".partial")
        if self.processes.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.processes.wait()
        save(self.sharded_state(), checkpoint_id=partial, no_dist=self.processes.count == 1)
        own = {"state": self.state, "random": random_state(self.processes.device)}
        with on_disk(partial / f"process-{self.processes.rank}.pt") as file:
            torch.save(own, file)
        if self.processes.rank == 0:
            processes = self.processes
            record = {"job": processes.job, "processes": processes.count}
            record |= {"identity": self.identity, "losses": self.losses}
            with on_disk(partial / "run.json") as file:
                file.write(json.dumps(record).encode())
        self.processes.wait()
        if self.processes.rank == 0:
            sync(partial)
            partial.rename(folder)
            sync(self.out)
            for other in checkpoints(self.out):
                if other != folder:
                    shutil.rmtree(other)

    def sharded_state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ExampleError: it is of a run with other options or another text.
        """
        record = json.loads((folder / "run.json").read_text())
        for name, value in self.identity.items():
            if (was := record["identity"].get(name)) != value:
                option = "--streams" if name == "batch_size" else "--" + name.replace("_", "-")
                raise ExampleError(f"{option}: expected {was} as in the checkpoint {folder}, got {value}")
        sharded = self.sharded_state()
        load(sharded, checkpoint_id=folder, no_dist=self.processes.count == 1)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=sharded["model"], optim_state_dict=sharded["optimizer"]
        )
        self.losses = record["losses"]
        count = record["processes"]
        files = [
            torch.load(folder / f"process-{rank}.pt", map_location=self.processes.device, weights_only=True)
            for rank in range(count)
        ]
        if count == self.processes.count:
            self.state = files[self.processes.rank]["state"]
            set_random_state(files[self.processes.rank]["random"], self.processes.device)
            return
        self.state = rows_of([file["state"] for file in files], self.own)
        self.draw_anew(self.identity["seed"], len(self.losses))
        self.processes.say(
            f"the checkpoint is of {count} processes, now {self.processes.count}: the streams are divided anew with "
            "their states; dropout draws other numbers than it would have drawn"
        )


def rows_of(states: Sequence[Any], rows: slice) -> Any:
    """Return these rows of recurrent states (layers, B, H), or tuples of them, put together along the batch."""
    if states[0] is None:
        return None
    if isinstance(states[0], tuple):
        return tuple(rows_of(parts, rows) for parts in zip(*states, strict=True))
    return torch.cat(list(states), 1)[:, rows].contiguous()


def random_state(device: torch.device) -> list[Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1].cpu(), device)


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[Any]:
    """A file to write, which is on the disk, and not only on its way there, when this has ended."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """See to it that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the last at the end."""
    return sorted(path for path in out.glob("step-*") if not path.suffix)


def begin(run: Run, resume: bool) -> None:
    """Go on from the last checkpoint, where there is one and it is asked for, or torchrun has started all anew.

    Raises:
        ExampleError: a run that begins finds checkpoints of another one, from which a later restart would go on.
    """
    processes = run.processes
    found = checkpoints(run.out) if processes.rank == 0 else []
    last = processes.from_first(found[-1] if found else None)
    if last is None:
        return
    # Where a whole machine was lost, another may have come in its place, and nobody has counted a restart.
    is_same_job = bool(processes.job) and json.loads((last / "run.json").read_text())["job"] == processes.job
    if not (resume or processes.restarts or is_same_job):
        raise ExampleError(f"--out: expected a folder without checkpoints, got {run.out}; --resume goes on from there")
    run.load(last)
    processes.say(f"goes on from step {len(run.losses)}")


def train(run: Run, arguments: argparse.Namespace) -> None:
    total = arguments.epochs * run.streams.steps_per_epoch
    steps = total if arguments.steps is None else min(total, arguments.steps)
    while len(run.losses) < steps:
        run.step()
        done = len(run.losses)
        if done % arguments.save_every == 0 or done == steps:
            run.processes.say(f"step {done}/{steps}: loss {run.losses[-1]:.4f}")
            run.save()


def program(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves by itself
    with joined(arguments.device) as processes:
        run = Run(processes, arguments)
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        processes.say(
            f"{processes.count} process{'es' if processes.count > 1 else ''}, {parameters:,} parameters, "
            f"{arguments.streams} streams, {run.streams.steps_per_epoch} steps an epoch"
        )
        begin(run, arguments.resume)
        train(run, arguments)
        processes.say(f"held-out loss {run.held_out_loss():.4f}")
        if processes.rank == 0:
            written = arguments.out / "losses.json"
            with on_disk(written.with_suffix(".partial")) as file:
                file.write(json.dumps(run.losses).encode())
            os.replace(file.name, written)
            print(f"saved {written}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    return options.run_program("train_distributed", lambda: program(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
