"""Write the figures of a result file into the documentation.

    python benchmarks/tables.py benchmarks/results/NAME.json

What stands between `<!-- figures: NAME -->` and `<!-- figures: end -->` is replaced. NAME is `speed` (README), `bars`
(docs/benchmarks.md) or `charts` (docs/performance.md) for a result of `make bench`, `programs`
(docs/in-your-program.md) for one of `make programs`, `accuracy` (docs/quantization.md) for one of
`python -m benchmarks.quantization`. Nothing else in these files holds a figure of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    parser.add_argument("result", type=Path, help="JSON file of a benchmark")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that README.md and docs/ are in")
    arguments = parser.parse_args(argv)
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    source = arguments.result.resolve()
    name = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else source.name
    for file, regions in texts(result, name).items():
        path = arguments.root / file
        text = path.read_text(encoding="utf-8")
        for region, content in regions.items():
            text = replaced(text, region, content)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    return 0


def texts(result: Mapping[str, Any], name: str) -> dict[str, dict[str, str]]:
    """Return by file and region what a result of this name says."""
    if result.get("kind") == "programs":
        return {"docs/in-your-program.md": {"programs": programs(result, name)}}
    if result.get("kind") == "quantization":
        return {"docs/quantization.md": {"accuracy": accuracy(result, name)}}
    return {
        "README.md": {"speed": speed(result, name)},
        "docs/benchmarks.md": {"bars": standing(result, name)},
        "docs/performance.md": {"charts": charts(result, name)},
    }


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


def programs(result: Mapping[str, Any], name: str) -> str:
    """Return the table of programs: times at the largest thread count, ratios at each.

    Raises:
        ValueError: no program of the result was timed.
    """
    counts = sorted({record["threads"] for record in result["programs"] if "ratio" in record}, reverse=True)
    if not counts:
        raise ValueError(f"{name}: no program was timed")
    timed: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in result["programs"]:
        if "ratio" in record:
            timed.setdefault(record["name"], {})[record["threads"]] = record
    ratios = [f"torch.nn / fused, {threads} {'thread' if threads == 1 else 'threads'}" for threads in counts]
    header = ["program", "package", "way", "what is timed", "torch.nn", "fused", *ratios]
    rows = []
    for found in timed.values():
        first = next(found[threads] for threads in counts if threads in found)
        times = [report.time_text(first["seconds"][side]["median"]) for side in ("torch.nn", "fused")]
        spread = [_spread(found[threads]) if threads in found else "-" for threads in counts]
        what = [first["name"], f"{first['package']} {first['version']}", first["way"], first["timed"]]
        rows.append([*what, *times, *spread])
    failed = [record["name"] for record in result["programs"] if "ratio" not in record]
    slower = [
        f"{record['name']} ({record['threads']} {'thread' if record['threads'] == 1 else 'threads'}: "
        f"{_figure(record['ratio']['torch.nn']['median'])})"
        for record in result["programs"]
        if "ratio" in record and record["ratio"]["torch.nn"]["median"] < NOISE
    ]
    lines = [
        f"Time of the program with torch.nn / time with fused layers, and the quartiles of the rounds: above 1 fused "
        f"layers are faster. Times at {counts[0]} {'thread' if counts[0] == 1 else 'threads'}. {_where(result)}. "
        f"From `{name}`, as `make programs` writes it.",
        "",
        report.markdown_table(header, rows, 4),
        "",
        "![Programs of other packages](images/programs.png)",
        "",
        f"Slower than torch.nn: {'; '.join(slower) or 'none of these'}.",
    ]
    if any(record["disturbed_rounds"]["kept"] for record in result["programs"] if "ratio" in record):
        lines += ["", r"\* Other processes were at work in rounds that count: not a figure to rely on."]
    notes = {record["name"]: record["note"] for record in result["programs"] if record["note"]}
    lines += ["", *(f"- **{program}**: {note}" for program, note in notes.items())]
    if failed:
        lines += ["", f"Not the same numbers, and so not timed: {', '.join(failed)}."]
    if result["not_installed"]:
        lines += ["", f"Not installed: {', '.join(entry['name'] for entry in result['not_installed'])}."]
    return "\n".join(lines)


def accuracy(result: Mapping[str, Any], name: str) -> str:
    """Return the tables of docs/quantization.md: errors after many steps, and models before and after."""
    environment = result["environment"]
    versions = ", ".join(f"{peer} {version}" for peer, version in environment["peers"].items())
    where = f"{environment['processor']} ({environment['instruction_sets']['used']}), {environment['date'][:10]}"
    parts = [f"From `{name}`: {where}, PyTorch {environment['torch']}, {versions}."]
    if result["reduce_range"]:
        parts[0] += " ONNX Runtime's int8 has 7 bits there (`reduce_range`), without which its products overflow."
    steps = [f"{count} steps" for count in result["steps"]]
    for title, found in result["errors"].items():
        rows = [[weights, *(f"{error:.1e}" for error in errors)] for weights, errors in found.items()]
        parts += [f"{title}:", report.markdown_table(["", *steps], rows, 1)]
    if "silero" in result:
        heard = result["silero"]
        parts.append(
            f"What it does to the detector's probabilities of {heard['chunks']:,} chunks, of which "
            f"{heard['with_speech']:,} have speech, and how many lose or gain it:"
        )
        rows = [
            [weights, f"{difference:.1e}", str(heard["other_decisions"][weights])]
            for weights, difference in heard["largest_difference"].items()
        ]
        parts.append(report.markdown_table(["", "largest difference", "other decisions"], rows, 1))
    if "trained" in result:
        parts += ["Perplexity or accuracy of trained models, on text that they were not trained on:"]
        parts += [_before_and_after(result["trained"])]
        parts += ["Decisions that are others than those of float32 (the likeliest next character, the class):"]
        parts += [_other_decisions(result["trained"])]
    return "\n\n".join(parts)


def _before_and_after(models: Sequence[Record]) -> str:
    weights = _in_any(model["values"] for model in models)
    rows = [
        [
            f"{model['model']}, {model['steps']:,} steps of training",
            model["quantity"],
            *(f"{model['values'][w]:.4f}" if w in model["values"] else "-" for w in weights),
        ]
        for model in models
    ]
    return report.markdown_table(["model", "", *weights], rows, 2)


def _other_decisions(models: Sequence[Record]) -> str:
    weights = _in_any(model["other_decisions"] for model in models)
    rows = []
    for model in models:
        counts, all_of_them = model["other_decisions"], model["decisions"]
        shares = (f"{counts[w]:,} ({counts[w] / all_of_them:.2%})" if w in counts else "-" for w in weights)
        rows.append([model["model"], f"{all_of_them:,}", *shares])
    return report.markdown_table(["model", "decisions", *weights], rows, 1)


def _in_any(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(records)))


def _spread(record: Mapping[str, Any]) -> str:
    ratio = record["ratio"]["torch.nn"]
    mark = r"\*" if record["disturbed_rounds"]["kept"] else ""
    return f"{_figure(ratio['median'])} ({_figure(ratio['q1'])} to {_figure(ratio['q3'])}){mark}"


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
