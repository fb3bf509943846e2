"""Write the figures of a result file into README.md, docs/benchmarks.md and docs/performance.md.

    python benchmarks/tables.py benchmarks/results/NAME.json

What stands between `<!-- figures: NAME -->` and `<!-- figures: end -->` is replaced: NAME is `speed` (README), `bars`
(benchmarks) or `charts` (performance). Nothing else in these files holds a figure of the suite.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fused_rnn.bench import bars, report  # noqa: E402

CELLS = ("lstm", "gru", "rnn")
NOISE = 0.97

Record = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the files; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON file of `python -m fused_rnn bench --json FILE`")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that README.md and docs/ are in")
    arguments = parser.parse_args(argv)
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    source = arguments.result.resolve()
    name = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else source.name
    texts = {
        "README.md": {"speed": speed(result, name)},
        "docs/benchmarks.md": {"bars": standing(result, name)},
        "docs/performance.md": {"charts": charts(result, name)},
    }
    for file, regions in texts.items():
        path = arguments.root / file
        text = path.read_text(encoding="utf-8")
        for region, content in regions.items():
            text = replaced(text, region, content)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    return 0


def replaced(text: str, region: str, content: str) -> str:
    """Return the text with another content between the marks of a region.

    Raises:
        ValueError: the text has no such region, or more than one.
    """
    pattern = re.compile(rf"(<!-- figures: {region} -->\n).*?(<!-- figures: end -->)", re.DOTALL)
    found = len(pattern.findall(text))
    if found != 1:
        raise ValueError(f"region {region!r}: expected it once, found it {found} times")
    return pattern.sub(lambda marks: f"{marks[1]}{content}\n{marks[2]}", text)


def speed(result: Mapping[str, Any], name: str) -> str:
    """Return the README's table: ratios of the table's cases at the largest thread count."""
    threads = max(record["threads"] for record in result["cases"])
    records = {
        (r["shape_name"], r["cell"], r["mode"]): r
        for r in result["cases"]
        if (r["part"], r["dtype"], r["threads"]) == ("table", "float32", threads) and "ratio" in r
    }
    engines = [engine for engine in bars.ENGINES if any(engine in record["ratio"] for record in records.values())]
    header = ["case", *(cell.upper() for cell in CELLS), *(f"{cell.upper()} training" for cell in CELLS)]
    rows = []
    for shape in dict.fromkeys(shape for shape, _, _ in records):
        row = [shape]
        for mode, names in (("inference", engines), ("training", engines[:1])):
            for cell in CELLS:
                ratio = records.get((shape, cell, mode), {}).get("ratio", {})
                row.append(", ".join(_figure(ratio[engine]["median"]) if engine in ratio else "-" for engine in names))
        rows.append(row)
    slower = [
        f"{cell.upper()} {shape} {mode} ({worst} {_figure(record['ratio'][worst]['median'])})"
        for (shape, cell, mode), record in records.items()
        for worst in [min(record["ratio"], key=lambda engine: record["ratio"][engine]["median"])]
        if record["ratio"][worst]["median"] < NOISE
    ]
    verdicts = bars.evaluate(result)
    met = sum(verdict.met for verdict in verdicts)
    return "\n".join(
        [
            f"Time of {', '.join(engines)} / time of `fused_rnn` in inference, of torch.nn in training: above 1 "
            f"`fused_rnn` is faster. {_where(result)}, {threads} {'thread' if threads == 1 else 'threads'}, float32. "
            f"From `{name}`, as `make bench` writes it.",
            "",
            report.markdown_table(header, rows, 1),
            "",
            f"![Ratios case by case](docs/images/ratios-{threads}.png)",
            "",
            f"Slower than the fastest of them: {'; '.join(slower) if slower else 'none of these'}.",
            "",
            f"{met} of the {len(verdicts)} bars that the project has set itself are met: "
            "[docs/benchmarks.md](docs/benchmarks.md) lists them all, with sweeps of the sizes and the share of the "
            "arithmetic peak.",
        ]
    )


def standing(result: Mapping[str, Any], name: str) -> str:
    """Return the table of bars and the images for docs/benchmarks.md."""
    section = report.bars_section(bars.evaluate(result))
    counts = sorted({record["threads"] for record in result["cases"]}, reverse=True)
    images = [
        f"![{text}, {threads} threads](images/{file}-{threads}.png)"
        for file, text in (("ratios", "Ratios case by case"), ("sweeps", "Time of a call against B, H and T"))
        for threads in counts
    ]
    images.append("![Share of the measured multiply-add peak](images/peak.png)")
    table = report.markdown_table(section.rows[0], section.rows[1:], section.numbers_from)
    return "\n\n".join([f"{section.title}. {_where(result)}; from `{name}`.", table, *images])


def charts(result: Mapping[str, Any], name: str) -> str:
    """Return the images for docs/performance.md, each with what is seen in it."""
    threads = max(record["threads"] for record in result["cases"])
    timed = [r for r in result["cases"] if "ratio" in r and (r["dtype"], r["threads"]) == ("float32", threads)]
    of = f"{threads} {'thread' if threads == 1 else 'threads'}, float32; from `{name}`."
    parts = [f"{_where(result)}, {of}"]
    parts += _ratios_seen([record for record in timed if record["part"] == "table"], threads)
    parts += _sweeps_seen([record for record in timed if record["part"] == "sweeps"], threads)
    parts += _shares_seen(timed)
    return "\n\n".join(parts)


def _ratios_seen(records: Sequence[Record], threads: int) -> list[str]:
    drawn = [(ratio["median"], engine, record) for record in records for engine, ratio in record["ratio"].items()]
    if not drawn:
        return []
    ends = [choose(drawn, key=lambda bar: bar[0]) for choose in (min, max)]
    least, most = (f"{_figure(ratio)} ({engine}, {_case(record)})" for ratio, engine, record in ends)
    means = []
    for mode, engine in itertools.product(("inference", "training"), bars.ENGINES):
        ratios = [ratio for ratio, of, record in drawn if (of, record["mode"]) == (engine, mode)]
        if ratios:
            means.append(f"{engine} {_figure(statistics.geometric_mean(ratios))} in {mode}")
    below = [record["group"] for ratio, _, record in drawn if ratio < 1]
    groups = ", ".join(f"{group} {below.count(group)}" for group in dict.fromkeys(below))
    return [
        f"![Bars of other engines' times over ours, {len(drawn)} in {len(records)} cases: from {least} to {most}; "
        f"{len(below)} are below 1](images/ratios-{threads}.png)",
        f"Geometric means of the ratios: {', '.join(means)}. {len(below)} of the {len(drawn)} bars point to the left "
        f"of 1{f', by group: {groups}' if below else ''}.",
    ]


def _sweeps_seen(records: Sequence[Record], threads: int) -> list[str]:
    drawn = [(record["ratio"][bars.TORCH_NN.name]["median"], _case(record)) for record in records]
    if not drawn:
        return []
    (least, slowest), (most, fastest) = min(drawn), max(drawn)
    return [
        f"![Lines of the time of a call over B, H and T: torch.nn's are at {_figure(least)} to {_figure(most)} times "
        f"ours](images/sweeps-{threads}.png)",
        "A line is flat where the call costs more than its arithmetic, and rises with the work from there. `torch.nn` "
        f"takes {_figure(least)} ({slowest}) to {_figure(most)} times ({fastest}) as long.",
    ]


def _shares_seen(records: Sequence[Record]) -> list[str]:
    ranges = []
    for group, mode in itertools.product(("large", "small"), ("inference", "training")):
        found = [bars.share_of_peak(record) for record in records if (record["group"], record["mode"]) == (group, mode)]
        shares = [100 * share for share in found if share is not None]
        if shares:
            ranges.append(f"{group} {mode} {min(shares):.0f} to {max(shares):.0f}")
    if not ranges:
        return []
    return [
        f"![Bars of the share of the measured multiply-add peak, per cent: {'; '.join(ranges)}](images/peak.png)",
        f"Share of the peak in per cent: {'; '.join(ranges)}. Where sizes are small, gates, barriers and packing take "
        "the rest.",
    ]


def _case(record: Record) -> str:
    return f"{record['cell'].upper()} {record['shape_name']} {record['mode']}"


def _where(result: Mapping[str, Any]) -> str:
    environment = result["environment"]
    versions = ", ".join(f"{peer} {version}" for peer, version in environment["peers"].items() if peer != "fused")
    heap = "kept in the process" if environment["freed_memory_kept"] else "handed back to the system"
    return (
        f"{environment['threads']['processors']} processors of {environment['processor']} "
        f"({environment['instruction_sets']['used']}); {versions}; freed memory {heap}"
    )


def _figure(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
