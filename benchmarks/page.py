"""Write docs/results.html, the page to look at results: one file that needs nothing else.

    python benchmarks/page.py                  # of benchmarks/results/*.json
    python benchmarks/page.py FILE.json --out page.html

The page holds of each result only the fields that it shows, with their values as they are in the file. `page/` has its
parts: `template.html`, `page.css` and the script in several files, which also reads what a visitor drops on the page.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = Path(__file__).resolve().parent / "page"
# One script in the end: each uses what those before it define.
SCRIPTS = ("read.js", "words.js", "charts.js", "table.js", "choices.js")
sys.path.insert(0, str(ROOT))

from fused_rnn.bench import bars, gpu, report  # noqa: E402
from fused_rnn.bench.cases import CELLS, MODES  # noqa: E402

SPREAD = ("median", "q1", "q3")
# Of a case: what stays, in the order of the page's columns. `None` keeps all below it.
CASE: dict[str, Any] = {
    "threads": None,
    "part": None,
    "group": None,
    "cell": None,
    "mode": None,
    "dtype": None,
    "shape_name": None,
    "shape": dict.fromkeys(("batch_size", "seq_length", "input_size", "hidden_size")),
    "parity": {"passed": None, "deviations": None},
    "seconds": {"*": dict.fromkeys(SPREAD)},
    "ratio": {"*": dict.fromkeys(SPREAD)},
    "fused_gflops": None,
    "peak_gflops": {"median": None},
    "share_of_peak": {"*": dict.fromkeys(SPREAD)},
    "disturbed_rounds": {"kept": None},
    "reference_reason": None,
}
GPU_CASE: dict[str, Any] = dict.fromkeys(
    ("case", "which", "variant", "layers", "rival", "error", "problem", "floor_ms", "milliseconds")
)
SCHEMAS = {"processor": report.SCHEMA, "gpu": gpu.SCHEMA}
ENVIRONMENT = dict.fromkeys(
    ("date", "processor", "fused_rnn", "python", "torch", "threads", "peers", "freed_memory_kept", "load_average")
) | {"instruction_sets": {"used": None}, **dict.fromkeys(("device", "driver", "cudnn"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="*", help="result files; those of benchmarks/results by default")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.html", help="the page")
    arguments = parser.parse_args(argv)
    paths = arguments.results or kept_results()
    arguments.out.write_text(page(paths), encoding="utf-8")
    print(f"wrote {arguments.out}")
    return 0


def kept_results() -> list[Path]:
    """Return the results of layers in benchmarks/results. (Those of other kinds are tables in the docs.)"""
    others = ("programs-", "options-", "serving-", "quantization-")
    return sorted(p for p in (ROOT / "benchmarks" / "results").glob("*.json") if not p.name.startswith(others))


def page(paths: Sequence[Path]) -> str:
    """Return the page with these results, the newest first."""
    results = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    results.sort(key=lambda named: named[1]["environment"]["date"], reverse=True)
    for name, result in results:
        if result.get("schema") != SCHEMAS[kind_of(result)]:
            raise ValueError(f"{name}: expected schema {SCHEMAS[kind_of(result)]}, got {result.get('schema')}")
    style = (PARTS / "page.css").read_text(encoding="utf-8")
    script = "\n".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    held = ",\n".join(packed(name, result) for name, result in results)
    data = f'{{"schemas":{_compact(SCHEMAS)},"results":[\n{held}\n]}}'
    filled = {
        "policy": policy(script, style),
        "style": style,
        "script": script,
        # No tag can begin inside, whatever the strings hold.
        "data": data.replace("<", "\\u003c"),
        "tables": "\n".join(table for name, result in results for table in static_tables(name, result)),
    }
    text = (PARTS / "template.html").read_text(encoding="utf-8")
    for mark, content in filled.items():
        before, found, after = text.partition("{{" + mark + "}}")
        if not found:
            raise ValueError(f"template.html: expected {{{{{mark}}}}}")
        text = before + content + after
    return text


def kind_of(result: Mapping[str, Any]) -> str:
    """Return `gpu` for what `fused_rnn.bench.gpu` writes, else `processor`."""
    return "gpu" if "results" in result else "processor"


def policy(script: str, style: str) -> str:
    """Return the content security policy: this script, this style, pictures within the page, and no network."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def packed(name: str, result: Mapping[str, Any]) -> str:
    """Return a result as JSON: its cases as rows under columns, each the path of keys to a value."""
    is_gpu = kind_of(result) == "gpu"
    records = [shown(record) for record in result["results" if is_gpu else "cases"]]
    paths = list(dict.fromkeys(path for record in records for path, _ in leaves(record)))
    # In the order of the keep-lists, and within it that of first appearance; rows end at their last value.
    order = list(GPU_CASE if is_gpu else CASE)
    paths.sort(key=lambda path: order.index(path[0]))
    found = {
        "name": name,
        "kind": kind_of(result),
        "schema": result.get("schema"),
        "environment": kept(result["environment"], ENVIRONMENT),
    } | {key: result[key] for key in ("machine", "not_reached", "without") if key in result}
    lines = [_compact(value) for value in found.values()]
    head = ",\n".join(f"{_compact(key)}:{line}" for key, line in zip(found, lines, strict=True))
    rows = ",\n".join(_compact(row(dict(leaves(record)), paths)) for record in records)
    return f'{{{head},\n"columns":{_compact(paths)},\n"rows":[\n{rows}\n]}}'


def shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a case: of the deviations those at fault, or else the largest of ours."""
    if "which" in record:
        return kept(record, GPU_CASE)
    found = kept(record, CASE)
    parity = record["parity"]
    if parity["passed"]:
        largest = max(parity["deviations"]["fused"], key=lambda deviation: deviation["error"])
        found["parity"]["deviations"] = {"fused": [largest]}
    else:
        found["parity"]["deviations"] = {
            peer: wrong
            for peer, deviations in parity["deviations"].items()
            if (wrong := [d for d in deviations if d["error"] is None or not d["error"] <= d["tolerance"]])
        }
    return found


def kept(value: Mapping[str, Any], keep: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that `keep` names; `*` is any."""
    if "*" in keep:
        return {key: kept(item, keep["*"]) for key, item in value.items()}
    return {
        key: kept(value[key], below) if below and isinstance(value[key], Mapping) else value[key]
        for key, below in keep.items()
        if key in value
    }


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in nested dicts with the keys that lead to it; null and NaN are as good as none."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from leaves(item, (*path, key))
        elif item is not None and item == item:
            yield (*path, key), item


def row(values: Mapping[tuple[str, ...], Any], paths: Sequence[tuple[str, ...]]) -> list[Any]:
    found = [values.get(path) for path in paths]
    while found and found[-1] is None:
        found.pop()
    return found


def static_tables(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    """What a reader without JavaScript sees of a result: the ratios of the table's cases, the bars of a GPU."""
    environment = result["environment"]
    if kind_of(result) == "gpu":
        title = f"{environment['device']}, {environment['date'][:10]} ({name})"
        items = "".join(f"<li>{html.escape(line)}</li>" for line in result["bars"])
        yield f"<h2>{html.escape(title)}</h2><ul>{items}</ul>"
        return
    threads = max(record["threads"] for record in result["cases"])
    records = {
        (record["shape_name"], record["cell"], record["mode"]): record
        for record in result["cases"]
        if (record["part"], record["dtype"], record["threads"]) == ("table", "float32", threads)
    }
    columns = [(mode, cell) for mode in MODES for cell in CELLS]
    title = f"{environment['processor']}, {environment['date'][:10]} ({name}): {threads} threads, float32"
    cells = "".join(f'<th scope="col">{cell.upper()} {mode}</th>' for mode, cell in columns)
    lines = [f'<tr><th scope="col">case</th>{cells}</tr>']
    for shape in dict.fromkeys(shape for shape, _, _ in records):
        figures = "".join(f"<td>{_ratios(records.get((shape, cell, mode)))}</td>" for mode, cell in columns)
        lines.append(f'<tr><th scope="row">{html.escape(shape)}</th>{figures}</tr>')
    yield (
        f"<h2>{html.escape(title)}</h2><p>Time of {', '.join(bars.ENGINES)} (as far as measured) over ours: above 1 "
        f'fused_rnn is faster.</p><div class="scroll"><table>{"".join(lines)}</table></div>'
    )


def _ratios(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "not measured"
    if not record["parity"]["passed"]:
        return "wrong numbers"
    return ", ".join(f"{spread['median']:.2f}" for spread in record["ratio"].values())


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


if __name__ == "__main__":
    raise SystemExit(main())
