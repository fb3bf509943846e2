"""The command line that all examples have, and errors as one line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_rnn.bench.environment import keep_freed_memory

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExampleError(Exception):
    """Something the user can mend; shown as one line."""


def number_type(kind: type, minimum: float, maximum: float, words: str, *, exclusive: bool = False) -> Any:
    """Return an argparse type for numbers from `minimum` (or above it, if exclusive) to `maximum`."""

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not minimum <= number <= maximum or (exclusive and number == minimum):
            raise argparse.ArgumentTypeError(f"expected {words}, got {text!r}")
        return number

    return parse


positive_int = number_type(int, 1, 2**31, "a whole number of at least 1")
natural_int = number_type(int, 0, 2**62, "a whole number of at least 0")
positive_float = number_type(float, 0, sys.float_info.max, "a number above 0", exclusive=True)
natural_float = number_type(float, 0, sys.float_info.max, "a number of at least 0")
probability = number_type(float, 0, 1, "a number from 0 to 1")


def make_parser(
    name: str, description: str, *, data: str, epochs: int, download: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with the options of every example, to which an example adds its own.

    data: what --data PATH is expected to be; empty for an example that needs none. epochs: the default of --epochs.
    download: whether there is something to fetch.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    if data:
        group = parser.add_argument_group("data")
        group.add_argument("--data", type=Path, metavar="PATH", help=data)
        if download:
            group.add_argument(
                "--download", action="store_true", help="fetch what is not there into --data (default: runs/data)"
            )
        group.add_argument(
            "--sample", action="store_true", help="a tiny made-up data set instead, to see that everything runs"
        )
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--epochs", type=positive_int, default=epochs, metavar="N", help="passes over the data (default: %(default)s)"
    )
    run.add_argument("--steps", type=natural_int, metavar="N", help="stop after so many steps of each model")
    run.add_argument("--minutes", type=positive_float, metavar="N", help="stop after so many minutes of each model")
    run.add_argument(
        "--compare-steps",
        type=natural_int,
        default=100,
        metavar="N",
        help="steps that torch.nn trains along, from the same weights; 0 leaves it out (default: %(default)s)",
    )
    run.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    run.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / name,
        metavar="FOLDER",
        help="for checkpoints and pictures (default: %(default)s)",
    )
    add_layer_options(parser)
    return parser


def add_layer_options(parser: argparse.ArgumentParser, *, dtype: str = "float32") -> None:
    """Add what says where and how layers run."""
    group = parser.add_argument_group("the layers")
    group.add_argument("--backend", choices=("fused", "torch"), default="fused", help="whose layers (default: fused)")
    group.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    group.add_argument("--dtype", choices=tuple(DTYPES), default=dtype, help="of the model (default: %(default)s)")
    group.add_argument("--compile", action="store_true", help="with torch.compile")
    group.add_argument("--threads", type=positive_int, metavar="N", help="default: PyTorch's")
    group.add_argument(
        "--seed", type=natural_int, default=0, metavar="N", help="of weights, order and dropout (default: 0)"
    )


def device(text: str) -> torch.device:
    try:
        chosen = torch.device(text)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a device that this PyTorch has, got {text!r}: {str(error).splitlines()[0]}"
        ) from None
    return chosen


def data_path(arguments: argparse.Namespace, expected: str, *sources: tuple[str, str]) -> Path:
    """Return --data, which has to be there; expected says what it is.

    sources: addresses and checksums of what --download fetches into it.
    """
    if sources and arguments.download:
        from .data import fetch

        folder: Path = arguments.data or Path("runs/data")
        for url, checksum in sources:
            fetch(url, checksum, folder)
        return folder
    if arguments.data is None:
        others = "--download to fetch it, or --sample for made-up data" if sources else "or --sample for made-up data"
        raise ExampleError(f"--data: expected {expected}; {others}")
    if not arguments.data.exists():
        raise ExampleError(f"--data: expected {expected}, got {arguments.data}, which does not exist")
    path: Path = arguments.data
    return path


def prepare(arguments: argparse.Namespace) -> None:
    """Set threads, and memory as in the benchmarks: without it torch.nn pays page faults in each step, which would
    flatter the ratio."""
    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def run_program(name: str, program: Callable[[], int]) -> int:
    """Run an example's program and return its exit status.

    0 when done, 1 if the loss curves disagree, 2 for a wrong option, 130 if interrupted.
    """
    try:
        return program()
    except ExampleError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, of which the first is the heading, as aligned text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
