"""The closing table of a program, its exit status, and the picture of its runs."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_rnn import info

from .options import table
from .training import LATE_WINDOW, Comparison, Learner, Outcome, Workload, check_backend, run_workload, windowed

INK, GRID, FUSED_COLOR, TORCH_COLOR = "#222222", "#e4e4e4", "#0b6e99", "#e58a2b"
OTHERS = ("#0b6e99", "#b3261e", "#4c8c2b", "#7a4fa3", "#a87900", "#555555")


def run_all(
    name: str, workloads: Sequence[Workload], arguments: argparse.Namespace, outcomes: list[Outcome] | None = None
) -> int:
    """Train workloads one after the other, print the closing table, and return the exit status.

    outcomes: a list to which those of the runs are appended, for a caller that goes on with the models.
    """
    outcomes = [] if outcomes is None else outcomes
    for workload in workloads:
        check_backend(workload, arguments)
    for workload in workloads:
        print(f"\n{describe(workload)}")
        outcomes.append(run_workload(workload, arguments))
        if outcomes[-1].ended in ("interrupted", "curves disagree"):
            break
    print(f"\n{closing_table(outcomes)}\n")
    files = [file for outcome in outcomes for file in outcome.files]
    picture = arguments.out / f"{name}.png"
    if draw(picture, outcomes):
        files.append(picture)
    print(f"saved {', '.join(map(str, files))}")
    return exit_status(name, outcomes)


def exit_status(name: str, outcomes: Sequence[Outcome]) -> int:
    last = outcomes[-1]
    if any(outcome.comparison and not outcome.comparison.curves_agree for outcome in outcomes):
        print(
            f"{name}: the fused model did not learn as torch.nn's does; this is a bug, please report it",
            file=sys.stderr,
        )
        return 1
    if last.ended == "interrupted":
        print(f"interrupted after step {len(last.learners[0].losses)} of {last.workload.name}; --resume goes on")
        return 130
    return 0


def describe(workload: Workload) -> str:
    model = workload.make_model()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = f"{workload.name}: {workload.title}, {parameters:,} parameters, {workload.steps_per_epoch:,} steps an epoch"
    if workload.layer_options:
        given = ", ".join(f"{name} {value}" for name, value in workload.layer_options.items())
        text += f"\nwith {given}: torch.nn has no such option, so this model is not compared with torch.nn's"
    return text


def closing_table(outcomes: Sequence[Outcome]) -> str:
    rows = [["model", "epochs", "result", "published", "ms a step", "torch.nn", "ratio", "curves"]]
    for outcome in outcomes:
        learner, both = outcome.learners[0], outcome.comparison
        epochs = len(learner.losses) / outcome.workload.steps_per_epoch
        result = "-" if outcome.result is None else f"{outcome.workload.metric} {outcome.result:.4g}"
        own = f"{1e3 * statistics.median(learner.seconds):.1f}" if learner.seconds else "-"
        compared = ["-", "-", "not compared"]
        if both:
            own, theirs = (f"{value:.1f}" for value in both.milliseconds)
            compared = [theirs, f"{both.ratio:.2f}", "agree" if both.curves_agree else "DISAGREE"]
        rows.append([outcome.workload.name, f"{epochs:.3g}", result, outcome.workload.published or "-", own, *compared])
    return table(rows)


def draw(path: Path, outcomes: Sequence[Outcome]) -> bool:
    """Draw loss curves, what was evaluated, and times of a step; tell whether matplotlib was there to do it."""
    outcomes = [outcome for outcome in outcomes if outcome.learners[0].losses]
    if not outcomes:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return False
    figure = Figure(figsize=(11, 5.2), dpi=130, facecolor="white")
    panels = figure.add_gridspec(
        2, 2, width_ratios=(1.5, 1), left=0.06, right=0.985, top=0.84, bottom=0.1, wspace=0.3, hspace=0.55
    )
    count = torch.get_num_threads()
    machine = (
        f"PyTorch {torch.__version__}, {info.collect()['processor']}, {count} thread{'s' if count > 1 else ''}, "
        f"{outcomes[0].learners[0].device}, {str(outcomes[0].learners[0].dtype).removeprefix('torch.')}"
    )
    titles = list(dict.fromkeys(outcome.workload.title for outcome in outcomes))
    figure.text(0.012, 0.945, titles[0] if len(titles) == 1 else outcomes[0].workload.name.split("-")[0], color=INK,
                fontsize=13, fontweight="bold")  # fmt: skip
    figure.text(0.012, 0.908, machine, color="#666666", fontsize=9)
    names = short_names([outcome.workload.name for outcome in outcomes])
    compared = [outcome for outcome in outcomes if outcome.comparison]
    evaluated = [outcome for outcome in outcomes if outcome.result is not None]
    draw_losses(figure.add_subplot(panels[:, 0] if compared or evaluated else panels[:, :]), outcomes, names)
    if evaluated:
        draw_results(figure.add_subplot(panels[0, 1] if compared else panels[:, 1]), evaluated)
    if compared:
        axes = figure.add_subplot(panels[1, 1] if evaluated else panels[0, 1])
        draw_times(axes, [(names[o.workload.name], o.comparison) for o in compared[::-1] if o.comparison])
        if not evaluated:
            draw_differences(figure.add_subplot(panels[1, 1]), compared[0].comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return for each name what is left of it without the words that all begin with."""
    words = [name.split("-") for name in names]
    same = 0
    while len(names) > 1 and all(len(each) > same + 1 and each[same] == words[0][same] for each in words):
        same += 1
    return {name: "-".join(each[same:]) for name, each in zip(names, words, strict=True)}


def style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=8)
    axes.xaxis.label.set(color="#555555", fontsize=9)
    axes.yaxis.label.set(color="#555555", fontsize=9)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def draw_losses(axes: Any, outcomes: Sequence[Outcome], names: Mapping[str, str]) -> None:
    for outcome, color in zip(outcomes, OTHERS * len(outcomes)):
        single = len(outcomes) == 1
        for twin in outcome.learners[1:]:
            # Wide and below: where the curves agree the fused line lies inside this band.
            label = "torch.nn" if single else None
            steps = range(1, len(twin.losses) + 1)
            axes.plot(steps, twin.losses, color=TORCH_COLOR, linewidth=5, alpha=0.6, label=label)
        draw_curve(axes, outcome.learners[0], color, "fused" if single else names[outcome.workload.name])
    axes.set(xlabel="training step", ylabel=outcomes[0].workload.unit)
    axes.margins(x=0.01)
    axes.legend(frameon=False, fontsize=9)
    style(axes, "Training loss")


def draw_curve(axes: Any, learner: Learner, color: str, label: str) -> None:
    steps = range(1, len(learner.losses) + 1)
    if len(steps) <= 600:
        axes.plot(steps, learner.losses, color=color, linewidth=0.9, label=label)
        return
    axes.plot(steps, learner.losses, color=color, linewidth=0.6, alpha=0.25)
    # At the middle of each window; at the very start the mean would lag behind the steep fall.
    begin = 2 * LATE_WINDOW
    centred = [step - LATE_WINDOW / 2 for step in steps]
    axes.plot(centred[begin:], windowed(learner.losses)[begin:], color=color, linewidth=1.6, label=label)


def draw_results(axes: Any, outcomes: Sequence[Outcome]) -> None:
    metric = outcomes[0].workload.metric
    for outcome, color in zip(outcomes, OTHERS * len(outcomes)):
        found = [(entry["step"], entry[metric]) for entry in outcome.learners[0].history if metric in entry]
        epochs = [step / outcome.workload.steps_per_epoch for step, _ in found]
        axes.plot(epochs, [value for _, value in found], "o-", color=color, markersize=3, linewidth=1.3)
    axes.set(xlabel="epoch")  # the colours are those of the losses
    style(axes, metric)


def draw_times(axes: Any, compared: Sequence[tuple[str, Comparison]]) -> None:
    if len(compared) > 1:
        for row, (_, both) in enumerate(compared):
            for shift, value, color in zip((0.2, -0.2), both.milliseconds, (FUSED_COLOR, TORCH_COLOR)):
                axes.barh(row + shift, value, height=0.36, color=color)
                axes.text(value, row + shift, f" {value:.1f}", va="center", fontsize=8, color="#555555")
        axes.set_yticks(range(len(compared)), [name for name, _ in compared])
        axes.margins(x=0.12)
        axes.set(xlabel="milliseconds: fused above, torch.nn below")
        style(axes, "Time of a training step")
    else:
        draw_times_of_one(axes, compared[0][1])
    axes.grid(axis="y", visible=False)


def draw_times_of_one(axes: Any, both: Comparison) -> None:
    rows = (("torch.nn", both.twin_seconds, TORCH_COLOR), ("fused", both.fused_seconds, FUSED_COLOR))
    longest = 0.0
    for row, (_, seconds, color) in enumerate(rows):
        milliseconds = sorted(1e3 * s for s in seconds)
        median = statistics.median(milliseconds)
        longest = max(longest, 1.4 * median, milliseconds[int(0.97 * (len(milliseconds) - 1))])
        axes.barh(row, median, height=0.55, color=color, alpha=0.9)
        axes.text(0, row, f"  {median:.1f} ms", va="center", fontsize=10, fontweight="bold", color="white")
        # Every step as a tick, so that the spread can be seen.
        axes.plot(milliseconds, [row] * len(milliseconds), "|", color=INK, markersize=13, alpha=0.12)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, longest)
    axes.set(xlabel="milliseconds: median, and each step as a tick")
    style(axes, f"Time of a training step: ratio {both.ratio:.2f}")


def draw_differences(axes: Any, both: Comparison | None) -> None:
    assert both is not None
    # A difference of zero has no place on a logarithmic axis; float32 resolves about 1e-7.
    shown = [max(difference, 1e-8) for difference in both.differences]
    highest = max((difference for difference in shown if math.isfinite(difference)), default=0.0)
    axes.semilogy(range(1, len(shown) + 1), shown, color=INK, linewidth=1.2)
    axes.step(
        range(1, len(both.allowed) + 1), both.allowed, color="#b3261e", linewidth=1.2, linestyle="--", where="mid"
    )
    axes.annotate(
        "allowed",
        (1, both.allowed[-1]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#b3261e",
    )
    axes.set_ylim(5e-9, max(15 * both.allowed[-1], 2 * highest))
    axes.minorticks_off()
    axes.set(xlabel="training step", ylabel="share of the loss")
    axes.margins(x=0.01)
    style(axes, "Difference of the two loss curves")
