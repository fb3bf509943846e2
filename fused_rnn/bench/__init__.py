"""`python -m fused_rnn bench`: parity, then speed against `torch.nn`, on this machine."""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import cases, environment, report, runner
from .peers import FUSED, PEERS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0 if every case had the right numbers, 1 if a parity check failed (that case is not timed), 2 if nothing could
        be measured, 130 if interrupted (what was measured until then is reported).
    """
    arguments = _parser().parse_args(argv)
    selected = cases.select(
        pattern=arguments.cases,
        cells=arguments.cells,
        modes=arguments.mode,
        dtypes=arguments.dtype,
        quick=arguments.quick,
    )
    if not selected:
        print("bench: no case is left by these options; --list without them shows all", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(case.name for case in selected))
        return 0

    begin = time.perf_counter()
    freed_memory_kept = arguments.keep_freed_memory and environment.keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = environment.describe(freed_memory_kept=freed_memory_kept)
    plan = runner.QUICK if arguments.quick else runner.FULL
    if arguments.rounds:
        plan = dataclasses.replace(plan, rounds=arguments.rounds, min_rounds=arguments.rounds)

    peers = [peer for peer in PEERS if peer.available()]
    rivals = [peer.name for peer in peers if peer is not FUSED]
    table = report.Table(selected, rivals)
    print(f"{report.heading(where)}\n\n{table.header_line()}")
    results: list[runner.Result] = []
    interrupted = False
    try:
        _measure_all(selected, lambda case: runner.measure(case, peers, plan), table, results)
    except KeyboardInterrupt:
        interrupted = True
    except ImportError as error:  # the extension is not built
        print(f"bench: {error}", file=sys.stderr)
        return 2
    for note in report.footnotes(results):
        print(note)
    for title, rows in report.summary(results, rivals):
        print(f"\n{title}\n{report.aligned(rows)}")

    if arguments.json:
        _write(arguments.json, json.dumps(report.to_json(where, plan, results, rivals), indent=1) + "\n")
    if arguments.markdown:
        _write(arguments.markdown, report.to_markdown(where, table, results))
    failed = [result for result in results if not result.passed]
    ending = f"in {time.perf_counter() - begin:.0f} s" + (", interrupted" if interrupted else "")
    print(f"\n{len(results)} of {len(selected)} cases {ending}; parity failed in {len(failed)}")
    return 130 if interrupted else 1 if failed else 0


def _measure_all(
    selected: Sequence[cases.Case],
    measure: Callable[[cases.Case], runner.Result],
    table: report.Table,
    results: list[runner.Result],
) -> None:
    """Append result after result, and print each line as it is known, under a progress bar if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("bench: no progress bar, tqdm is not installed (pip install tqdm)", file=sys.stderr)
        for case in selected:
            results.append(measure(case))
            print(table.line(results[-1]), flush=True)
        return
    # disable=None: no bar where standard error is not a terminal.
    with tqdm(selected, unit="case", leave=False, dynamic_ncols=True, disable=None) as bar:
        for case in bar:
            bar.set_description(case.name)
            results.append(measure(case))
            tqdm.write(table.line(results[-1]))
            sys.stdout.flush()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn bench",
        description="Check the numbers of the fused layers against torch.nn, then time both in turns.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: under a minute on 2 cores")
    parser.add_argument("--list", action="store_true", help="print the names of the selected cases and stop")
    parser.add_argument("--cases", type=_pattern, default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument(
        "--cells", type=_choices(cases.CELLS), default=cases.CELLS, metavar="NAMES", help="of lstm,gru,rnn"
    )
    parser.add_argument(
        "--mode", type=_choices(cases.MODES), default=cases.MODES, metavar="NAMES", help="of inference,training"
    )
    parser.add_argument(
        "--dtype",
        type=_choices(tuple(cases.DTYPES)),
        metavar="NAMES",
        help="measure every shape in each of these (float32, float64, bfloat16, float16); "
        "otherwise float32, and bfloat16 in two shapes",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="torch.set_num_threads(N)")
    parser.add_argument(
        "--rounds", type=_positive, metavar="N", help="exactly N rounds of every case, whatever it takes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument(
        "--keep-freed-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep freed memory in the process (glibc), so that torch.nn pays no page faults",
    )
    return parser


def _choices(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(part.strip() for part in text.split(","))
        for part in chosen:
            if part not in names:
                raise argparse.ArgumentTypeError(f"expected a comma-separated list of {', '.join(names)}, got {text!r}")
        return chosen

    return parse


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from None
    return text


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number
