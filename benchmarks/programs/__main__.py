"""`python -m benchmarks.programs`: other packages' programs with fused layers beside `torch.nn`.

Each program is built on both sides from the same seed by the package's own API, compared (`compare.py`), and if the
numbers agree, timed in turns. Packages that are not installed are named and left out; `make programs` installs all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fused_rnn
from fused_rnn.bench import environment, report, runner
from fused_rnn.bench.arguments import counts, pattern, positive

from . import forecasting, ocr, reinforcement_learning, speech, text
from .compare import CannotCompareError, compare
from .program import FUSED, TORCH_NN, WAYS, Program, Running, seed_everything
from .records import layers_record, line, parity_record, passed, program_record, times_record

PROGRAMS: tuple[Program, ...] = (
    *reinforcement_learning.PROGRAMS,
    *forecasting.PROGRAMS,
    *speech.PROGRAMS,
    *text.PROGRAMS,
    *ocr.PROGRAMS,
)

KIND, SCHEMA = "programs", 1  # the second is raised when a field of the JSON changes its meaning

PLAN = runner.Plan(min_rounds=3, max_rounds=20, seconds=1.5, precision=0.02, sample_seconds=0.05)
# What a run spends at most on repeating rounds in which other processes were at work.
_PATIENCE_SECONDS = 40.0


def main(argv: Sequence[str] | None = None, programs: Sequence[Program] = PROGRAMS) -> int:
    """Run the programs.

    Returns:
        0 if all that are installed computed the same with fused layers, 1 if one did not or ended with an error (it is
        not timed), 2 if none could be run, 130 if interrupted (what was measured until then is reported).
    """
    arguments = _parser().parse_args(argv)
    selected = [program for program in programs if re.search(arguments.only, program.name, re.IGNORECASE)]
    if arguments.list:
        for program in selected:
            missing = program.missing()
            state = f"not installed: {', '.join(missing)}" if missing else program.way
            print(f"{program.field:24}{program.name:32}{state}")
        return 0 if selected else 2
    run = _Run(arguments)
    interrupted = False
    print(report.heading(run.where))
    try:
        for program in selected:
            run.add(program)
    except KeyboardInterrupt:
        interrupted = True
    status = run.finish()
    return 130 if interrupted else status


class _Run:
    """One run: what was asked for and what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.thread_counts: Sequence[int] = arguments.threads or _default_threads()
        self.plan = PLAN
        if arguments.rounds:
            self.plan = dataclasses.replace(PLAN, min_rounds=arguments.rounds, max_rounds=arguments.rounds)
        kept = arguments.keep_freed_memory and environment.keep_freed_memory()
        torch.set_num_threads(self.thread_counts[0])
        self.where = environment.describe(
            freed_memory_kept=kept, peers={TORCH_NN: torch.__version__, FUSED: fused_rnn.__version__}
        )
        self.others = environment.OtherProcesses(patience=_PATIENCE_SECONDS)
        self.kept = [record for path in arguments.keep for record in _undisturbed(path, self.where)]
        self.records: list[dict[str, Any]] = []
        self.not_installed: list[dict[str, Any]] = []

    def add(self, program: Program) -> None:
        """Compare a program, and time it if the numbers agree."""
        if missing := program.missing():
            self.not_installed.append({"name": program.name, "field": program.field, "missing": missing})
            print(f"{program.name:32}not installed: {', '.join(missing)}", flush=True)
            return
        kept = {record["threads"]: record for record in self.kept if record["name"] == program.name}
        if set(self.thread_counts) <= set(kept):
            found = [kept[threads] for threads in self.thread_counts]
        else:
            found = self._run_quietly(program)
        for record in found:
            self.records.append(record)
            print(line(record), flush=True)

    def _run_quietly(self, program: Program) -> list[dict[str, Any]]:
        torch.set_num_threads(self.thread_counts[0])
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            found = self._run(program)
        if any("error" in record for record in found):
            print(said.getvalue(), file=sys.stderr)
        return found

    def _run(self, program: Program) -> list[dict[str, Any]]:
        record = program_record(program)
        try:
            running, deviations = compare(program)
            record |= {"layers": layers_record(running[FUSED].model), "parity": parity_record(deviations)}
            return [record | self._time(running, threads) for threads in self.thread_counts if passed(record)] or [
                record
            ]
        except Exception as error:  # whatever a package raises: the others are run all the same
            if not isinstance(error, CannotCompareError):
                traceback.print_exc()
            return [record | {"error": f"{type(error).__name__}: {error}"}]

    def _time(self, running: Mapping[str, Running], threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)  # some packages set it when they are imported
        seed_everything(0)
        rounds = runner.Rounds()
        steps = {name: running[name].step for name in (FUSED, TORCH_NN)}
        runner.interleave(steps, self.plan, rounds, others=self.others)
        return {"threads": threads} | times_record(rounds)

    def finish(self) -> int:
        """Write what was asked for; return the exit status."""
        names = list(dict.fromkeys(record["name"] for record in self.records))
        failed = list(dict.fromkeys(record["name"] for record in self.records if not passed(record)))
        print(f"\n{len(names) - len(failed)} of {len(names)} programs compute the same with fused layers")
        for title, found in (("failed", failed), ("not installed", [entry["name"] for entry in self.not_installed])):
            if found:
                print(f"{title}: {', '.join(found)}")
        if self.arguments.json:
            path: Path = self.arguments.json
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(report.json_text(self.result()), encoding="utf-8")
            print(f"wrote {path}")
        return 1 if failed else 0 if names else 2

    def result(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "environment": self.where,
            "plan": dataclasses.asdict(self.plan),
            "programs": [report.significant(record) for record in self.records],
            "not_installed": self.not_installed,
        }


def _undisturbed(path: Path, where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a result that need not be measured again here.

    Raises:
        ValueError: the result is of another processor, PyTorch or heap.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    for key in ("processor", "torch", "freed_memory_kept"):
        if result["environment"][key] != where[key]:
            raise ValueError(f"{path}: {key} is {result['environment'][key]}, here it is {where[key]}")
    return [record for record in result["programs"] if "ratio" in record and not record["disturbed_rounds"]["kept"]]


def _default_threads() -> Sequence[int]:
    all_threads = torch.get_num_threads()
    return (all_threads,) if all_threads == 1 else (all_threads, 1)


def _parser() -> argparse.ArgumentParser:
    ways = "; ".join(f"{name}: {meaning}" for name, meaning in WAYS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.programs",
        description="Run programs of other packages with fused layers beside torch.nn: numbers, checkpoints, times. "
        f"Ways in which the layers come in: {ways}.",
    )
    parser.add_argument("--list", action="store_true", help="print the programs, and whether they are installed")
    parser.add_argument("--only", type=pattern, default="", metavar="REGEX", help="only programs whose name matches")
    parser.add_argument("--threads", type=counts, metavar="N,...", help="thread counts; by default all and 1")
    parser.add_argument("--rounds", type=positive, metavar="N", help="exactly N rounds of every program")
    parser.add_argument(
        "--keep",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="take from these results what was measured undisturbed at all thread counts, and measure only the rest",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--keep-freed-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep freed memory in the process (glibc), so that torch.nn pays no page faults",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
