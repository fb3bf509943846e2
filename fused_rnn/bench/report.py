"""Results as aligned lines for the terminal, as Markdown and as JSON."""

import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bars import Verdict
from .cases import GROUPS, Case
from .crowded import Crowding
from .memory import Saved
from .peers import FUSED, TORCH_NN
from .runner import Plan, Result, Spread, geometric_means
from .serving import Outcome, record_of
from .serving_cases import GROUPS as SERVING_GROUPS

SCHEMA = 2  # raised when a field of the JSON changes its meaning

_GREEN, _YELLOW, _RED, _BOLD, _RESET = "\033[32m", "\033[33m", "\033[31m", "\033[1m", "\033[0m"


@dataclass(frozen=True)
class Section:
    """A titled table; its first row is the header, columns from `numbers_from` on hold figures."""

    title: str
    rows: list[list[str]]
    numbers_from: int


class Table:
    """The table of cases: its lines can be printed one by one as results come, and are aligned all the same."""

    def __init__(self, cases: Sequence[Case], rivals: Sequence[str]) -> None:
        self.rivals = list(rivals)
        self.header = ["threads", "cell", "shape", "dtype", "mode"]
        rows = [self.header, *(["", *_identity(case)] for case in cases)]
        self._widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        self.header += [FUSED.name, *(f"{rival}/{FUSED.name}" for rival in rivals)]
        self.header += ["spread", "GFLOP/s", "of peak", "error"]
        self._widths += [max(9, len(name)) for name in self.header[5:]]

    def cells(self, result: Result) -> list[str]:
        """Return the texts of one line, in the order of `header`."""
        ratios = {rival: result.ratio(rival) for rival in self.rivals if rival in result.seconds}
        share = result.share_of_peak(FUSED.name)
        row = [str(result.threads), *_identity(result.case)]
        row.append(time_text(result.time(FUSED.name).median) + ("*" if result.reference_reason else ""))
        row += [f"{ratios[rival].median:.2f}x" if rival in ratios else "-" for rival in self.rivals]
        row.append(f"±{100 * min(ratios.values(), key=lambda r: r.median).relative:.1f}%" if ratios else "-")
        row.append(f"{result.gflops:.3g}")
        row.append(f"{100 * share.median:.0f}%" if share else "-")
        return [*row, f"{max(d.error for d in result.deviations[FUSED.name]):.1g}"]

    def header_line(self) -> str:
        return _paint(self._align(self.header), _BOLD)

    def line(self, result: Result) -> str:
        """Return one aligned line; if parity failed, which tensors were wrong instead of times."""
        if not result.passed:
            identity = self._align([str(result.threads), *_identity(result.case)])
            return _paint(f"{identity}  PARITY FAILED\n{failure_text(result)}", _RED)
        line = self._align(self.cells(result))
        worst = worst_ratio(result)
        if worst is None:
            return line
        return _paint(line, _GREEN if worst >= 1 else _YELLOW if worst >= 0.95 else _RED)

    def markdown(self, results: Sequence[Result]) -> str:
        return markdown_table(self.header, [self.cells(result) for result in results if result.passed], numbers_from=5)

    def _align(self, texts: Sequence[str]) -> str:
        aligned = (
            text.ljust(width) if 1 <= column < 5 else text.rjust(width)
            for column, (text, width) in enumerate(zip(texts, self._widths, strict=False))
        )
        return "  ".join(aligned).rstrip()


def worst_ratio(result: Result) -> float | None:
    """Return the ratio to the fastest of the peers; `None` if none was measured."""
    return min((result.ratio(name).median for name in result.seconds if name != FUSED.name), default=None)


def failure_text(result: Result) -> str:
    """Say for every tensor past its tolerance how far it is off."""
    return "\n".join(
        f"    {peer}: {deviation.name}: off by {deviation.error:.2e} of the largest value, "
        f"allowed {deviation.tolerance:.0e} (against {result.yardstick})"
        for peer, deviation in result.failures()
    )


def footnotes(results: Sequence[Result], outcomes: Sequence[Outcome] = ()) -> list[str]:
    """Explain the asterisks of the table, why the reference ran and no kernel; say how calm the machine was."""
    reasons = dict.fromkeys(result.reference_reason for result in results if result.reference_reason)
    notes = [f"* ran on the reference, not on a kernel: {reason}" for reason in reasons]
    timed = [*results, *outcomes]
    thrown = sum(found.disturbed_rounds for found in timed)
    kept = sum(found.disturbed_rounds_kept for found in timed)
    if thrown or kept:
        rounds = thrown + sum(len(found.seconds.get(FUSED.name, ())) for found in timed)
        notes.append(
            f"Other processes were at work in {thrown + kept} of {rounds} rounds, of which {thrown} were repeated and "
            f"{kept} count all the same."
        )
    return notes


def summary(results: Sequence[Result], rivals: Sequence[str]) -> list[Section]:
    """Return the geometric means against each rival, and of the sweeps the mean and the worst."""
    sections = []
    for rival in rivals:
        means = geometric_means(results, rival)
        groups = [group for group in (*GROUPS, "all") if any(group in entry for entry in means)]
        rows = [["threads", "cell", "dtype", "mode", *groups]]
        rows += [
            [str(entry["threads"]), entry["cell"], entry["dtype"], entry["mode"]]
            + [f"{entry[group]:.2f}x" if group in entry else "-" for group in groups]
            for entry in means
        ]
        if means:
            sections.append(
                Section(f"{rival} time / {FUSED.name} time, geometric mean over the table's cases", rows, 4)
            )
    sweeps = _sweep_rows(results)
    if sweeps:
        header = ["threads", "cell", "varied", "mode", "cases", "mean", "worst", "at"]
        sections.append(Section(f"{TORCH_NN.name} time / {FUSED.name} time over the sweeps", [header, *sweeps], 4))
    return sections


def _sweep_rows(results: Sequence[Result]) -> list[list[str]]:
    swept: dict[tuple[int, str, str, str], dict[str, float]] = {}
    for result in results:
        case = result.case
        if case.shape.part == "sweeps" and TORCH_NN.name in result.seconds:
            key = (result.threads, case.cell, case.shape.group, case.mode)
            swept.setdefault(key, {})[case.shape.name] = result.ratio(TORCH_NN.name).median
    rows = []
    for (threads, cell, varied, mode), ratios in swept.items():
        worst = min(ratios, key=lambda name: ratios[name])
        mean = statistics.geometric_mean(ratios.values())
        figures = [str(len(ratios)), f"{mean:.2f}x", f"{ratios[worst]:.2f}x", worst]
        rows.append([str(threads), cell, varied, mode, *figures])
    return rows


def memory_section(saved: Sequence[Saved]) -> Section:
    rows = [["cell", "shape", TORCH_NN.name, FUSED.name, "share"]]
    for found in saved:
        sizes = [f"{found.bytes_saved[name] / 2**20:.0f} MiB" for name in (TORCH_NN.name, FUSED.name)]
        rows.append([found.case.cell, found.case.shape.name, *sizes, f"{found.share:.2f}"])
    return Section("Saved for backward, without input and parameters", rows, 2)


def crowded_section(found: Sequence[Crowding]) -> Section:
    header = ["scenario", "case", "lost"]
    for name in (FUSED.name, TORCH_NN.name):
        header += [f"{name} alone", "crowded", "over loss"]
    rows = [header]
    for crowding in found:
        row = [crowding.scenario.name, f"{crowding.case.cell} {crowding.case.shape.name}", f"{crowding.loss:.0f}x"]
        for name in (FUSED.name, TORCH_NN.name):
            beyond = crowding.beyond_loss(name)
            for times in (crowding.alone.get(name), crowding.seconds.get(name)):
                row.append(time_text(statistics.median(times)) if times else "-")
            row.append("-" if beyond is None else f"{beyond:.2f}")
        rows.append(row)
    return Section("Crowded: mean time of a call; over what the processors lost explain", rows, 2)


def serving_line(outcome: Outcome) -> str:
    """Return one line: our time and by how much the others take longer; if numbers were wrong, whose."""
    name = f"  {outcome.contest.name}"
    if not outcome.passed:
        wrong = [
            f"{who} is off by {outcome.errors[who]:.2e} of the largest value, allowed {outcome.tolerances[who]:.0e}"
            for who in outcome.wrong
        ]
        return _paint(f"{name}  PARITY FAILED: {'; '.join(wrong)}", _RED)
    ratios = [f"{rival} {outcome.ratio(rival).median:.2f}x" for rival in outcome.rivals]
    line = "  ".join([f"{name:<44}", f"{_short_time(outcome):>8}", *ratios])
    worst = min((outcome.ratio(rival).median for rival in outcome.rivals), default=math.inf)
    return _paint(line, _GREEN if worst >= 1 else _YELLOW if worst >= 0.95 else _RED)


def _short_time(outcome: Outcome) -> str:
    """Our time, to three digits: a step may take less than a microsecond."""
    return f"{outcome.time(FUSED.name).median * 1e6:.3g} us"


def serving_sections(outcomes: Sequence[Outcome]) -> list[Section]:
    """Return a table for each group of contests, with those that took part in any of them."""
    sections = []
    for group in SERVING_GROUPS:
        found = [outcome for outcome in outcomes if outcome.contest.group == group and outcome.passed]
        rivals = list(dict.fromkeys(rival for outcome in found for rival in outcome.rivals))
        rows = [[group, FUSED.name, *(f"{rival}/{FUSED.name}" for rival in rivals), "spread", "error"]]
        rows[0] += [f"error of {rival}" for rival in rivals if group == "int8"]
        for outcome in found:
            ratios = {rival: outcome.ratio(rival) for rival in outcome.rivals}
            row = [outcome.contest.name, _short_time(outcome)]
            row += [f"{ratios[rival].median:.2f}x" if rival in ratios else "-" for rival in rivals]
            row.append(f"±{100 * min(ratios.values(), key=lambda r: r.median).relative:.1f}%" if ratios else "-")
            shown = [FUSED.name, *(rivals if group == "int8" else [])]
            row += [f"{outcome.errors[name]:.1g}" if name in outcome.errors else "-" for name in shown]
            rows.append(row)
        if found:
            sections.append(Section(f"Serving, {group}: time of one; 1 thread", rows, 1))
    return sections


def bars_section(verdicts: Sequence[Verdict], title: str = "Bars") -> Section:
    rows = [["bar", "threads", "required", "measured", "at the peak", "met", "cases", "furthest from it"]]
    for verdict in verdicts:
        bar = verdict.bar
        required = f"{'at most' if bar.at_most else 'at least'} {bar.required:g}"
        if bar.noise:
            required += f" ({bar.required - bar.noise:g} is noise)"
        rows.append(
            [
                bar.name,
                "-" if verdict.threads is None else str(verdict.threads),
                required,
                "not measured" if verdict.measured is None else f"{verdict.measured:.2f}",
                "-" if verdict.at_peak is None else f"{verdict.at_peak:.2f}",
                "yes" if verdict.met else "NO",
                str(verdict.count),
                verdict.worst,
            ]
        )
    met = sum(verdict.met for verdict in verdicts)
    return Section(f"{title}: {met} of {len(verdicts)} met", rows, 1)


def aligned(section: Section) -> str:
    """Align rows for the terminal: text to the left, figures to the right; what a bar misses in red."""
    widths = [max(map(len, column)) for column in zip(*section.rows, strict=True)]
    lines = []
    for row in section.rows:
        cells = (
            text.ljust(width) if column < section.numbers_from else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        line = "  ".join(cells).rstrip()
        lines.append(_paint(line, _RED) if "NO" in row else line)
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    rule = ["---" if column < numbers_from else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def heading(environment: dict[str, Any]) -> str:
    """Say in two lines where this is measured, from `environment.describe`."""
    heap = "kept in the process" if environment["freed_memory_kept"] else "handed back to the system"
    kernels = environment["instruction_sets"]["used"] or "not built"
    if environment["backend"] != "auto":
        kernels += f", backend {environment['backend']!r}"
    peers = [f"{name} {version}" for name, version in environment["peers"].items() if name != FUSED.name]
    return (
        f"{environment['processor']}, {environment['threads']['processors']} processors, freed memory {heap}, "
        f"{environment['date']}\n"
        f"fused_rnn {environment['fused_rnn']['version']} ({kernels}), {', '.join(peers)}, "
        f"Python {environment['python']}"
    )


def to_markdown(
    environment: dict[str, Any],
    table: Table,
    results: Sequence[Result],
    sections: Sequence[Section],
    outcomes: Sequence[Outcome] = (),
) -> str:
    """Return the whole report as Markdown; of the sweeps, their summary."""
    shown = [result for result in results if result.case.shape.part != "sweeps"]
    parts = [heading(environment).replace("\n", "  \n")]
    for section in reversed(sections):  # the bars first
        parts += [f"{section.title}:", markdown_table(section.rows[0], section.rows[1:], section.numbers_from)]
    parts += ["All cases but those of the sweeps:", table.markdown(shown)]
    parts += [note.replace("*", "\\*", 1) for note in footnotes(results, outcomes)]
    failed = [result.case.name for result in results if not result.passed]
    failed += [outcome.contest.name for outcome in outcomes if not outcome.passed]
    if failed:
        parts.append("Parity failed, not timed: " + ", ".join(failed))
    return "\n\n".join(parts) + "\n"


def to_json(
    environment: dict[str, Any],
    plans: Mapping[str, Plan],
    results: Sequence[Result],
    rivals: Sequence[str],
    saved: Sequence[Saved] = (),
    crowdings: Sequence[Crowding] = (),
    outcomes: Sequence[Outcome] = (),
) -> dict[str, Any]:
    """Return everything that was measured, as JSON values; the fields are described in docs/benchmarks.md."""
    return {
        "schema": SCHEMA,
        "environment": environment,
        "plans": {part: dataclasses.asdict(plan) for part, plan in plans.items()},
        "cases": [significant(_case_record(result, rivals)) for result in results],
        "geometric_means": {rival: geometric_means(results, rival) for rival in rivals},
        "memory": [_identity_record(found.case) | {"bytes_saved": found.bytes_saved} for found in saved],
        "crowded": [significant(_crowded_record(found)) for found in crowdings],
        "serving": [significant(record_of(outcome)) for outcome in outcomes],
    }


def json_text(result: Mapping[str, Any]) -> str:
    """Return the text of a result: the records of a list on a line each, so that changes of a result can be read."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(record) for record in value) + "\n]"
        else:
            text = json.dumps(value, indent=1)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def significant(value: Any) -> Any:
    """Round what is measured to six digits, in nested lists and dicts."""
    if isinstance(value, dict):
        return {key: significant(item) for key, item in value.items()}
    if isinstance(value, list):
        return [significant(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _identity_record(case: Case) -> dict[str, Any]:
    shape = dataclasses.asdict(case.shape)
    for irrelevant in ("part", "group", "cells", "modes", "dtypes", "quick"):
        del shape[irrelevant]
    return {
        "name": case.name,
        "part": case.shape.part,
        "group": case.shape.group,
        "cell": case.cell,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape_name": case.shape.name,
        "shape": shape,
    }


def _case_record(result: Result, rivals: Sequence[str]) -> dict[str, Any]:
    record = {"threads": result.threads} | _identity_record(result.case)
    record |= {
        "flops": result.case.flops,
        "kernel": result.kernel,
        "reference_reason": result.reference_reason,
        "parity": {
            "passed": result.passed,
            "yardstick": result.yardstick,
            "deviations": {
                # JSON has neither NaN nor infinity.
                peer: [dataclasses.asdict(d) | {"error": d.error if math.isfinite(d.error) else None} for d in found]
                for peer, found in result.deviations.items()
            },
        },
    }
    if result.passed:
        record["seconds"] = {
            name: dataclasses.asdict(result.time(name)) | {"calls": result.calls[name], "rounds": samples}
            for name, samples in result.seconds.items()
        }
        record["ratio"] = {
            rival: dataclasses.asdict(result.ratio(rival)) for rival in rivals if rival in result.seconds
        }
        record["fused_gflops"] = result.gflops
        record["disturbed_rounds"] = {"repeated": result.disturbed_rounds, "kept": result.disturbed_rounds_kept}
    if result.peak:
        shares = {name: result.share_of_peak(name) for name in result.seconds}
        record["peak_gflops"] = dataclasses.asdict(Spread.of([rate / 1e9 for rate in result.peak]))
        record["share_of_peak"] = {name: dataclasses.asdict(share) for name, share in shares.items() if share}
    return record


def _crowded_record(found: Crowding) -> dict[str, Any]:
    scenario = found.scenario
    return {
        "name": f"{scenario.name}, {found.case.name}",
        "scenario": scenario.name,
        "processes": scenario.processes,
        "threads": scenario.threads,
        "processors": scenario.processors,
        "case": _identity_record(found.case),
        "loss": found.loss,
        "seconds": found.seconds,
        "alone": found.alone,
        "beyond_loss": {name: found.beyond_loss(name) for name in found.seconds},
    }


def _identity(case: Case) -> list[str]:
    return [case.cell, case.shape.name, case.dtype, case.mode]


def time_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _paint(text: str, color: str) -> str:
    return f"{color}{text}{_RESET}" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
