"""`python -m fused_rnn bench`: parity, then speed against `torch.nn` and others, on this machine; and the bars."""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import backend
from . import bars, cases, crowded, environment, memory, report, runner, serving, serving_cases
from .arguments import choices, counts, pattern, positive
from .peers import FUSED, PEERS, TORCH_NN, Peer

if TYPE_CHECKING:
    from tqdm import tqdm

# What a run spends at most on repeating rounds in which other processes were at work.
_PATIENCE_SECONDS = 40.0

PARTS = (*cases.PARTS, "memory", "crowded")
# Measured only where it is named: it has several hundred cases, and bars of its own.
SERVING = "serving"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0 if every case had the right numbers, 1 if a parity check failed (that case is not timed), 2 if nothing could
        be measured, 130 if interrupted (what was measured until then is reported).
    """
    arguments = _parser().parse_args(argv)
    if arguments.bars:
        return _judge(arguments.bars)
    parts = arguments.parts or _default_parts(arguments)
    selected = cases.select(
        parts=parts,
        pattern=arguments.cases,
        cells=arguments.cells,
        modes=arguments.mode,
        dtypes=arguments.dtype,
        quick=arguments.quick,
    )
    contests: list[serving.Contest] = []
    if SERVING in parts and "inference" in arguments.mode and "float32" in (arguments.dtype or ("float32",)):
        contests = serving_cases.select(pattern=arguments.cases, cells=arguments.cells, quick=arguments.quick)
        if backend.ops is None or backend.current_backend() == "reference":
            print("bench: there are no streams without kernels; their contests are left out", file=sys.stderr)
            contests = []
    if not selected and not contests and not {"memory", "crowded"} & set(parts):
        print("bench: no case is left by these options; --list without them shows all", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join([case.name for case in selected] + [contest.name for contest in contests]))
        return 0
    try:
        return _Run(arguments, parts, selected, contests).report()
    except ImportError as error:  # the extension is not built
        print(f"bench: {error}", file=sys.stderr)
        return 2


class _Run:
    """One run of the benchmark: what was asked for and what was found."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        parts: Sequence[str],
        selected: Sequence[cases.Case],
        contests: Sequence[serving.Contest],
    ) -> None:
        self.arguments = arguments
        self.parts = parts
        self.selected = selected
        self.contests = contests
        self.thread_counts = arguments.threads or _default_threads(arguments)
        self.plans = _plans(arguments)
        self.peers = [peer for peer in PEERS if peer.available()]
        self.rivals = [peer.name for peer in self.peers if peer is not FUSED]
        freed_memory_kept = arguments.keep_freed_memory and environment.keep_freed_memory()
        torch.set_num_threads(self.thread_counts[0])
        self.where = environment.describe(
            freed_memory_kept=freed_memory_kept, peers={peer.name: peer.version() for peer in self.peers}
        )
        self.table = report.Table([case for case in selected if case.shape.part != "sweeps"], self.rivals)
        self.others = environment.OtherProcesses(patience=_PATIENCE_SECONDS)
        self.results: list[runner.Result] = []
        self.saved: list[memory.Saved] = []
        self.crowdings: list[crowded.Crowding] = []
        self.outcomes: list[serving.Outcome] = []

    def report(self) -> int:
        """Measure, print and write everything; return the exit status."""
        begin = time.perf_counter()
        print(report.heading(self.where))
        interrupted = False
        try:
            self._measure()
        except KeyboardInterrupt:
            interrupted = True
        sections = report.summary(self.results, self.rivals)
        if self.saved:
            sections.append(report.memory_section(self.saved))
        if self.crowdings:
            sections.append(report.crowded_section(self.crowdings))
        sections += report.serving_sections(self.outcomes)
        result = report.to_json(
            self.where, self.plans, self.results, self.rivals, self.saved, self.crowdings, self.outcomes
        )
        # A bar that is met by a choice of its cases is not met.
        if not _chosen(self.arguments) and not interrupted:
            if set(PARTS) <= set(self.parts):
                sections.append(report.bars_section(bars.evaluate(result)))
            if SERVING in self.parts:
                sections.append(_serving_bars(result))

        for note in report.footnotes(self.results, self.outcomes):
            print(note)
        for section in sections:
            print(f"\n{section.title}\n{report.aligned(section)}")
        if self.arguments.json:
            _write(self.arguments.json, report.json_text(result))
        if self.arguments.markdown:
            _write(
                self.arguments.markdown,
                report.to_markdown(self.where, self.table, self.results, sections, self.outcomes),
            )
        failed = [not found.passed for found in self.results] + [not found.passed for found in self.outcomes]
        ending = f"in {time.perf_counter() - begin:.0f} s" + (", interrupted" if interrupted else "")
        planned = len(self.selected) * len(self.thread_counts) + len(self.contests)
        measured = len(self.results) + len(self.outcomes)
        print(f"\n{measured} of {planned} cases {ending}; parity failed in {sum(failed)}")
        return 130 if interrupted else 1 if any(failed) else 0

    def _measure(self) -> None:
        everything = [(threads, case) for threads in self.thread_counts for case in self.selected]
        heading = None
        with _progress(len(everything) + len(self.contests)) as progress:
            for threads, case in everything:
                if heading != (threads, case.shape.part):
                    heading = (threads, case.shape.part)
                    progress.write(f"\n{case.shape.part}, {threads} {'thread' if threads == 1 else 'threads'}")
                    progress.write(
                        "  (lines of the cases in which torch.nn is faster)"
                        if case.shape.part == "sweeps"
                        else self.table.header_line()
                    )
                progress.step(case.name)
                torch.set_num_threads(threads)
                self.results.append(self._measure_case(case))
                worst = report.worst_ratio(self.results[-1])
                if case.shape.part != "sweeps" or worst is None or worst < 1:
                    progress.write(self.table.line(self.results[-1]))
            torch.set_num_threads(self.thread_counts[0])
            if self.contests:
                progress.write("\nserving, 1 thread: time of one, and of the others over it")
            for contest in self.contests:
                progress.step(contest.name)
                self.outcomes.append(serving.measure(contest, self.plans["contests"], self.others))
                progress.write(report.serving_line(self.outcomes[-1]))
            if "memory" in self.parts:
                progress.write("\nmemory")
                self.saved = [memory.measure(case) for case in memory.CASES]
            if "crowded" in self.parts:
                progress.write("\ncrowded runs")
                self.crowdings = crowded.measure(progress=progress.note)

    def _measure_case(self, case: cases.Case) -> runner.Result:
        plan = self.plans[case.shape.part]
        if case.shape.part == "sweeps":
            contestants: list[Peer] = [FUSED, TORCH_NN]
            return runner.measure(case, contestants, plan, others=self.others)
        if case.shape.part == SERVING:  # its bars are about times alone
            return runner.measure(case, self.peers, plan, others=self.others)
        return runner.measure(case, self.peers, plan, peak=_peak if backend.ops else None, others=self.others)


def _peak(dtype: str) -> float:
    assert backend.ops is not None
    peak: float = backend.ops.peak_flops(cases.DTYPES[dtype], 0.005)
    return peak


def _plans(arguments: argparse.Namespace) -> dict[str, runner.Plan]:
    plans = {
        "table": runner.TABLE,
        "workloads": runner.WORKLOAD,
        "sweeps": runner.SWEEP,
        SERVING: runner.SERVING,
        "contests": serving.PLAN,
    }
    if arguments.quick:
        plans = dict.fromkeys(plans, runner.QUICK)
    if arguments.rounds:
        exactly = {"min_rounds": arguments.rounds, "max_rounds": arguments.rounds}
        plans = {part: dataclasses.replace(plan, **exactly) for part, plan in plans.items()}
    return plans


def _default_parts(arguments: argparse.Namespace) -> Sequence[str]:
    if arguments.quick:
        return ("table",)
    return cases.PARTS if _chosen(arguments) else PARTS


def _chosen(arguments: argparse.Namespace) -> bool:
    """Tell whether the arguments choose some of the cases."""
    selection = (arguments.cases, arguments.cells, arguments.mode, arguments.dtype, arguments.quick)
    return selection != ("", cases.CELLS, cases.MODES, None, False)


def _default_threads(arguments: argparse.Namespace) -> Sequence[int]:
    all_threads = torch.get_num_threads()
    return (all_threads,) if arguments.quick or all_threads == 1 else (all_threads, 1)


def _judge(path: Path) -> int:
    result = json.loads(path.read_text(encoding="utf-8"))
    sections = []
    if result.get(SERVING):
        sections.append(_serving_bars(result))
    if not sections or any(record["part"] in cases.PARTS for record in result["cases"]):
        sections.insert(0, report.bars_section(bars.evaluate(result)))
    print(report.heading(result["environment"]))
    for section in sections:
        print(f"\n{section.title}\n{report.aligned(section)}")
    return 0


def _serving_bars(result: Mapping[str, Any]) -> report.Section:
    return report.bars_section(bars.evaluate(result, bars.SERVING), "Bars of serving")


class _Progress:
    """Lines of results, and what is being measured: on a terminal as a bar, if tqdm is installed."""

    def __init__(self, bar: "tqdm[Any] | None") -> None:
        self._bar = bar
        self._started = False

    def step(self, name: str) -> None:
        """Begin the next case."""
        if self._bar is not None:
            self._bar.update(int(self._started))
            self._bar.set_description(name)
        self._started = True

    def note(self, text: str) -> None:
        """Say what is done besides cases."""
        if self._bar is not None:
            self._bar.set_description(text)

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)
            sys.stdout.flush()


@contextlib.contextmanager
def _progress(steps: int) -> "Iterator[_Progress]":
    try:
        from tqdm import tqdm
    except ImportError:
        print("bench: no progress bar, tqdm is not installed (pip install tqdm)", file=sys.stderr)
        yield _Progress(None)
        return
    # disable=None: no bar where standard error is not a terminal.
    with tqdm(total=steps, unit="case", leave=False, dynamic_ncols=True, disable=None) as bar:
        yield _Progress(bar)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn bench",
        description="Check the numbers of the fused layers against torch.nn, then time them, torch.nn and what other "
        "engines are installed in turns; print what was reached of what was meant to be.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: under a minute on 2 cores")
    parser.add_argument(
        "--parts",
        type=choices((*PARTS, SERVING)),
        metavar="NAMES",
        help=f"of {','.join(PARTS)}; by default all of them and the bars, with --quick the table, and with a choice "
        f"of cases these in the first three; or {SERVING}, with bars of its own",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the selected cases and stop")
    parser.add_argument("--cases", type=pattern, default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument(
        "--cells", type=choices(cases.CELLS), default=cases.CELLS, metavar="NAMES", help="of lstm,gru,rnn"
    )
    parser.add_argument(
        "--mode", type=choices(cases.MODES), default=cases.MODES, metavar="NAMES", help="of inference,training"
    )
    parser.add_argument(
        "--dtype",
        type=choices(tuple(cases.DTYPES)),
        metavar="NAMES",
        help="measure every shape in each of these (float32, float64, bfloat16, float16); "
        "otherwise float32, and bfloat16 in two shapes",
    )
    parser.add_argument(
        "--threads",
        type=counts,
        metavar="N,...",
        help="thread counts, one after the other; by default all and 1, with --quick all",
    )
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help="exactly N rounds of every case, whatever it takes"
    )
    parser.add_argument("--bars", type=Path, metavar="FILE", help="judge the result in this JSON file, and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument(
        "--keep-freed-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep freed memory in the process (glibc), so that torch.nn pays no page faults",
    )
    return parser
