"""Results as aligned lines for the terminal, as Markdown and as JSON."""

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from .cases import GROUPS, Case
from .peers import FUSED
from .runner import Plan, Result, Spread, geometric_means

SCHEMA = 1  # raised when a field of the JSON changes its meaning

_GREEN, _YELLOW, _RED, _BOLD, _RESET = "\033[32m", "\033[33m", "\033[31m", "\033[1m", "\033[0m"


class Table:
    """The table of cases: its lines can be printed one by one as results come, and are aligned all the same."""

    def __init__(self, cases: Sequence[Case], rivals: Sequence[str]) -> None:
        self.rivals = list(rivals)
        self.header = ["cell", "shape", "dtype", "mode"]
        self._widths = [max(len(row[i]) for row in [self.header, *map(_identity, cases)]) for i in range(4)]
        self.header += [*rivals, FUSED.name, *(f"{_ratio_name(rival, rivals)}" for rival in rivals)]
        self.header += ["spread", "GFLOP/s", "error"]
        self._widths += [max(10, len(name)) for name in self.header[4:]]

    def cells(self, result: Result) -> list[str]:
        """Return the texts of one line, in the order of `header`."""
        row = _identity(result.case)
        row += [_time(result.time(name)) if name in result.seconds else "-" for name in self.rivals]
        row.append(_time(result.time(FUSED.name)) + ("*" if result.reference_reason else ""))
        row += [f"{result.ratio(rival).median:.2f}x" if rival in result.seconds else "-" for rival in self.rivals]
        first = next((rival for rival in self.rivals if rival in result.seconds), None)
        row.append(f"±{100 * result.ratio(first).relative:.1f}%" if first else "-")
        return [*row, f"{result.gflops:.3g}", f"{max(d.error for d in result.deviations[FUSED.name]):.1g}"]

    def header_line(self) -> str:
        return _paint(self._align(self.header), _BOLD)

    def line(self, result: Result) -> str:
        """Return one aligned line; if parity failed, which tensors were wrong instead of times."""
        if not result.passed:
            return _paint(f"{self._align(_identity(result.case))}  PARITY FAILED\n{failure_text(result)}", _RED)
        line = self._align(self.cells(result))
        ratios = [result.ratio(rival).median for rival in self.rivals if rival in result.seconds]
        if not ratios:
            return line
        worst = min(ratios)
        return _paint(line, _GREEN if worst >= 1 else _YELLOW if worst >= 0.95 else _RED)

    def markdown(self, results: Sequence[Result]) -> str:
        return markdown_table(self.header, [self.cells(result) for result in results if result.passed], numbers_from=4)

    def _align(self, texts: Sequence[str]) -> str:
        aligned = (
            text.ljust(width) if column < 4 else text.rjust(width)
            for column, (text, width) in enumerate(zip(texts, self._widths, strict=False))
        )
        return "  ".join(aligned).rstrip()


def failure_text(result: Result) -> str:
    """Say for every tensor past its tolerance how far it is off."""
    return "\n".join(
        f"    {peer}: {deviation.name}: off by {deviation.error:.2e} of the largest value, "
        f"allowed {deviation.tolerance:.0e} (against {result.yardstick})"
        for peer, deviation in result.failures()
    )


def footnotes(results: Sequence[Result]) -> list[str]:
    """Explain the asterisks of the table: why the reference ran and no kernel."""
    reasons = dict.fromkeys(result.reference_reason for result in results if result.reference_reason)
    return [f"* ran on the reference, not on a kernel: {reason}" for reason in reasons]


def summary(results: Sequence[Result], rivals: Sequence[str]) -> list[tuple[str, list[list[str]]]]:
    """Return for each rival a title and the rows (header first) of the geometric means."""
    tables = []
    for rival in rivals:
        means = geometric_means(results, rival)
        groups = [group for group in (*GROUPS, "all") if any(group in entry for entry in means)]
        rows = [["cell", "dtype", "mode", *groups]]
        rows += [
            [entry["cell"], entry["dtype"], entry["mode"]]
            + [f"{entry[group]:.2f}x" if group in entry else "-" for group in groups]
            for entry in means
        ]
        if means:
            tables.append((f"Geometric mean of {rival} time / fused time", rows))
    return tables


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align rows for the terminal: the first three columns to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 3 else text.rjust(width + 2)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int) -> str:
    rule = ["---" if column < numbers_from else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def heading(environment: dict[str, Any]) -> str:
    """Say in two lines where this is measured, from `environment.describe`."""
    heap = "kept in the process" if environment["freed_memory_kept"] else "handed back to the system"
    threads = environment["threads"]
    kernels = environment["instruction_sets"]["used"] or "not built"
    if environment["backend"] != "auto":
        kernels += f", backend {environment['backend']!r}"
    return (
        f"{environment['processor']}, threads {threads['torch']}, processors {threads['processors']}, "
        f"freed memory {heap}\n"
        f"fused_rnn {environment['fused_rnn']['version']} ({kernels}), PyTorch {environment['torch']} "
        f"({environment['torch_instruction_set']}), Python {environment['python']}, {environment['date']}"
    )


def to_markdown(environment: dict[str, Any], table: Table, results: Sequence[Result]) -> str:
    """Return the whole report as Markdown."""
    parts = [heading(environment).replace("\n", "  \n"), table.markdown(results)]
    parts += [f"\\{note}" for note in footnotes(results)]
    for title, rows in summary(results, table.rivals):
        parts += [f"{title}:", markdown_table(rows[0], rows[1:], numbers_from=3)]
    failed = [result for result in results if not result.passed]
    if failed:
        parts.append("Parity failed, not timed: " + ", ".join(result.case.name for result in failed))
    return "\n\n".join(parts) + "\n"


def to_json(
    environment: dict[str, Any], plan: Plan, results: Sequence[Result], rivals: Sequence[str]
) -> dict[str, Any]:
    """Return everything that was measured, as JSON values; the fields are described in docs/benchmarks.md."""
    return {
        "schema": SCHEMA,
        "environment": environment,
        "plan": dataclasses.asdict(plan),
        "cases": [_case_record(result, rivals) for result in results],
        "geometric_means": {rival: geometric_means(results, rival) for rival in rivals},
    }


def _case_record(result: Result, rivals: Sequence[str]) -> dict[str, Any]:
    shape = dataclasses.asdict(result.case.shape)
    for irrelevant in ("dtypes", "quick"):
        del shape[irrelevant]
    record: dict[str, Any] = {
        "name": result.case.name,
        "cell": result.case.cell,
        "mode": result.case.mode,
        "dtype": result.case.dtype,
        "shape": shape,
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
    return record


def _identity(case: Case) -> list[str]:
    return [case.cell, case.shape.name, case.dtype, case.mode]


def _ratio_name(rival: str, rivals: Sequence[str]) -> str:
    return "ratio" if len(rivals) == 1 else f"{rival}/{FUSED.name}"


def _time(spread: Spread) -> str:
    seconds = spread.median
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _paint(text: str, color: str) -> str:
    return f"{color}{text}{_RESET}" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
