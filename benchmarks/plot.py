"""Draw the figures of the documentation and the README from a result file.

    python benchmarks/plot.py benchmarks/results/NAME.json --out docs/images

Writes ratios-<threads>.png, sweeps-<threads>.png and peak.png, or programs.png: what the result holds data for.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

CELLS = ("lstm", "gru", "rnn")
MODES = ("inference", "training")
FUSED = "fused"
# Told apart without colours too: by lightness, and by the markers of lines. The palette is Okabe and Ito's.
COLORS = {FUSED: "#000000", "torch.nn": "#0072b2", "ONNX Runtime": "#e69f00", "OpenVINO": "#009e73"}
MARKERS = {FUSED: "o", "torch.nn": "s"}
SWEPT = {"B": "batch size B (T = 20, I = H = 128)", "H": "hidden size H (B = 8, T = 20, I = H)"}
SWEPT["T"] = "steps T (B = 4, I = H = 64)"
DPI = 110

Record = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the result holds; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON file of `make bench` or `make programs`")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the images")
    arguments = parser.parse_args(argv)
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    for name, figure in figures(result).items():
        path = arguments.out / f"{name}.png"
        # Without a date in it, the same result gives the same file.
        figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
        plt.close(figure)
        print(f"wrote {path}")
    return 0


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures that the result holds data for, by name."""
    return _of_programs(result) if result.get("kind") == "programs" else _of_cases(result)


def _of_programs(result: Mapping[str, Any]) -> dict[str, Figure]:
    timed = [record for record in result["programs"] if "ratio" in record]
    where = f"{result['environment']['processor']}, {result['environment']['instruction_sets']['used']}"
    return {"programs": _programs(timed, where)} if timed else {}


def _of_cases(result: Mapping[str, Any]) -> dict[str, Figure]:
    timed = [record for record in result["cases"] if "seconds" in record and record["dtype"] == "float32"]
    drawn: dict[str, Figure] = {}
    counts = sorted({record["threads"] for record in timed}, reverse=True)
    where = f"{result['environment']['processor']}, float32"
    for threads in counts:
        mine = [record for record in timed if record["threads"] == threads]
        title = f"{where}, {threads} {'thread' if threads == 1 else 'threads'}"
        table = [record for record in mine if record["part"] == "table"]
        sweeps = [record for record in mine if record["part"] == "sweeps"]
        if table:
            drawn[f"ratios-{threads}"] = _ratios(table, title)
        if sweeps:
            drawn[f"sweeps-{threads}"] = _sweeps(sweeps, title)
    shares = [record for record in timed if "share_of_peak" in record and record["group"] in ("large", "small")]
    if shares:
        drawn["peak"] = _shares(shares, where)
    return drawn


def _ratios(records: Sequence[Record], title: str) -> Figure:
    """A panel for each mode and cell: a bar for each case and peer, as long as the peer's time over ours."""
    shapes = list(dict.fromkeys(record["shape_name"] for record in records))
    figure, axes = plt.subplots(
        len(MODES),
        len(CELLS),
        figsize=(9.5, 1.4 + 0.66 * len(shapes)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for row, mode in zip(axes, MODES):
        for panel, cell in zip(row, CELLS):
            chosen = {r["shape_name"]: r for r in records if (r["cell"], r["mode"]) == (cell, mode)}
            _ratio_panel(panel, shapes, chosen)
            panel.set_title(f"{cell.upper()}, {mode}")
            panel.set_xlabel("time of the peer / time of fused_rnn")
    axes[0][0].invert_yaxis()
    handles = {bar.get_label(): bar for panel in axes.flat for bar in panel.containers}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{title}: right of the line fused_rnn is faster")
    return figure


def _ratio_panel(panel: Axes, shapes: Sequence[str], records: Mapping[str, Record]) -> None:
    peers = [name for name in COLORS if any(name in record["ratio"] for record in records.values())]
    height = 0.8 / max(1, len(peers))
    for i, peer in enumerate(peers):
        found = [(y, records[name]["ratio"][peer]) for y, name in enumerate(shapes) if peer in _ratio_of(records, name)]
        places = [y + (i - (len(peers) - 1) / 2) * height for y, _ in found]
        medians = [ratio["median"] for _, ratio in found]
        # From 1 to the ratio, so that on the logarithmic axis a bar points to the side that is faster.
        panel.barh(places, [m - 1 for m in medians], height, left=1, color=COLORS[peer], label=peer)
        for place, (_, ratio) in zip(places, found):
            panel.plot([ratio["q1"], ratio["q3"]], [place, place], color="0.4", linewidth=1)
    panel.set_yticks(range(len(shapes)), shapes)
    _logarithmic_ratios(panel)


def _logarithmic_ratios(panel: Axes) -> None:
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, 0.7), max(high, 2.5))
    panel.axvline(1, color="black", linewidth=0.8)
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)


def _ratio_of(records: Mapping[str, Record], name: str) -> Mapping[str, Any]:
    ratio: Mapping[str, Any] = records[name]["ratio"] if name in records else {}
    return ratio


def _programs(records: Sequence[Record], title: str) -> Figure:
    """A panel for each field, a bar for each program and thread count: torch.nn's time over ours."""
    fields = list(dict.fromkeys(record["field"] for record in records))
    counts = sorted({record["threads"] for record in records}, reverse=True)
    names = {field: list(dict.fromkeys(r["name"] for r in records if r["field"] == field)) for field in fields}
    rows = [len(names[field]) for field in fields]
    figure, axes = plt.subplots(
        len(fields),
        1,
        figsize=(9.5, 1.5 + 0.3 * sum(rows) + 0.25 * len(fields)),
        sharex=True,
        layout="constrained",
        squeeze=False,
        height_ratios=rows,
    )
    for panel, field in zip(axes[:, 0], fields):
        height = 0.8 / len(counts)
        for i, (threads, color) in enumerate(zip(counts, (COLORS["torch.nn"], "#56b4e9", "#d55e00"))):
            mine = {r["name"]: r for r in records if (r["field"], r["threads"]) == (field, threads)}
            found = [(y, mine[name]["ratio"]["torch.nn"]) for y, name in enumerate(names[field]) if name in mine]
            places = [y + (i - (len(counts) - 1) / 2) * height for y, _ in found]
            label = f"{threads} {'thread' if threads == 1 else 'threads'}"
            bars = panel.barh(
                places, [ratio["median"] - 1 for _, ratio in found], height, left=1, color=color, label=label
            )
            for bar, (y, _) in zip(bars, found):
                if mine[names[field][y]]["disturbed_rounds"]["kept"]:
                    bar.set(hatch="////", facecolor="white", edgecolor=color)
            for place, (_, ratio) in zip(places, found):
                panel.plot([ratio["q1"], ratio["q3"]], [place, place], color="0.3", linewidth=1)
        panel.set_yticks(range(len(names[field])), names[field])
        panel.set_ylim(len(names[field]) - 0.5, -0.5)
        panel.set_title(field, loc="left")
        _logarithmic_ratios(panel)
    axes[-1][0].set_xlabel("time of the program with torch.nn / time with fused_rnn")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    disturbed = any(record["disturbed_rounds"]["kept"] for record in records)
    note = "; hatched: other processes were at work" if disturbed else ""
    figure.suptitle(f"{title}: right of the line fused_rnn is faster{note}")
    return figure


def _sweeps(records: Sequence[Record], title: str) -> Figure:
    """A row for each swept size, a panel for each cell: time of a call against the size."""
    size: dict[str, Callable[[Record], int]] = {
        "B": lambda record: record["shape"]["batch_size"],
        "H": lambda record: record["shape"]["hidden_size"],
        "T": lambda record: record["shape"]["seq_length"],
    }
    swept = [name for name in SWEPT if any(record["group"] == name for record in records)]
    figure, axes = plt.subplots(
        len(swept), len(CELLS), figsize=(9.5, 2.7 * len(swept) + 0.6), layout="constrained", squeeze=False, sharey="row"
    )
    for row, name in zip(axes, swept):
        for panel, cell in zip(row, CELLS):
            for mode, style in zip(MODES, ("-", "--")):
                chosen = [r for r in records if (r["group"], r["cell"], r["mode"]) == (name, cell, mode)]
                chosen.sort(key=size[name])
                for peer in MARKERS:
                    points = [
                        (size[name](r), 1e3 * r["seconds"][peer]["median"]) for r in chosen if peer in r["seconds"]
                    ]
                    if points:
                        panel.plot(
                            *zip(*points),
                            style,
                            color=COLORS[peer],
                            marker=MARKERS[peer],
                            markersize=3,
                            linewidth=1.2,
                            label=f"{'fused_rnn' if peer == FUSED else peer}, {mode}",
                        )
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.grid(color="0.92")
            panel.set_xlabel(SWEPT[name])
            panel.set_title(cell.upper())
        row[0].set_ylabel("time of a call (ms)")
    handles = {line.get_label(): line for panel in axes.flat for line in panel.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    return figure


def _shares(records: Sequence[Record], title: str) -> Figure:
    """A panel for each mode: a bar for each case and thread count, our rate over that of the multiply-add units."""
    counts = sorted({record["threads"] for record in records}, reverse=True)
    names = list(dict.fromkeys((record["shape_name"], record["cell"]) for record in records))
    figure, axes = plt.subplots(
        1, len(MODES), figsize=(9.5, 0.9 + 0.24 * len(names)), layout="constrained", squeeze=False, sharey=True
    )
    height = 0.8 / len(counts)
    for panel, mode in zip(axes[0], MODES):
        for i, (threads, color) in enumerate(zip(counts, ("#000000", "#56b4e9", "#d55e00"))):
            share = {
                (r["shape_name"], r["cell"]): 100 * r["share_of_peak"][FUSED]["median"]
                for r in records
                if r["mode"] == mode and r["threads"] == threads
            }
            places = [y + (i - (len(counts) - 1) / 2) * height for y, name in enumerate(names) if name in share]
            label = f"{threads} {'thread' if threads == 1 else 'threads'}{_peak_text(records, threads)}"
            panel.barh(places, [share[n] for n in names if n in share], height, color=color, label=label)
        panel.set_yticks(range(len(names)), [f"{cell.upper()} {shape}" for shape, cell in names])
        panel.set_xlim(0, 100)
        panel.set_xlabel("share of the measured multiply-add peak (%)")
        panel.set_title(mode)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(counts), frameon=False)
    figure.suptitle(title)
    return figure


def _peak_text(records: Sequence[Record], threads: int) -> str:
    peaks = [r["peak_gflops"]["median"] for r in records if r["threads"] == threads]
    return f" (peak {statistics.median(peaks):.0f} GFLOP/s)" if peaks else ""


if __name__ == "__main__":
    raise SystemExit(main())
