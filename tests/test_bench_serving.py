"""The part of the benchmark on serving: its contests, what they compare, their bars. Nothing here asserts a speed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_rnn
from fused_rnn import bench
from fused_rnn.bench import bars, cases, peers, report, runner, serving, serving_cases
from fused_rnn.bench.cases import Case, Shape
from fused_rnn.bench.serving import Contest, Contestant, Field

pytestmark = pytest.mark.kernels

ONCE = runner.Plan(min_rounds=1, max_rounds=1, seconds=0.1, precision=1.0, sample_seconds=1e-4)


# Contests


def test_every_contest_has_a_name_of_its_own_and_a_group() -> None:
    found = serving_cases.contests()
    names = [contest.name for contest in found]
    assert len(set(names)) == len(names)
    assert {contest.group for contest in found} | {"voice"} == set(serving_cases.GROUPS)
    of_int8 = [contest.sizes for contest in found if (contest.group, contest.cell) == ("int8", "lstm")]
    assert {"B": 16, "T": 40, "I": 256, "H": 512} in of_int8 and {"B": 1, "T": 100, "I": 1024, "H": 1024} in of_int8


def test_contests_are_chosen_by_name_and_cell() -> None:
    chosen = serving_cases.select(pattern="step b1", cells=("gru",))
    assert [contest.name for contest in chosen] == [f"gru step B1 H{size}" for size in (8, 32, 64, 128, 256)]
    quick = serving_cases.select(quick=True)
    assert 0 < len(quick) < 15 and all(contest.quick for contest in quick)


def rivals_of(field: Field) -> list[str]:
    first, *others = (contestant.name for contestant in field.contestants)
    assert first == "fused"
    return others


@pytest.mark.parametrize("cell", cases.CELLS)
def test_a_step_is_that_of_torch_nn_and_the_engines(cell: str) -> None:
    contest = Contest("step", "step", cell, {}, lambda: serving_cases.step_field(cell, 8))
    outcome = serving.measure(contest, ONCE)
    assert outcome.passed and set(outcome.seconds) == set(outcome.errors)
    installed = [peer.name for peer in peers.PEERS if peer.available()]
    assert ["fused", *outcome.rivals] == installed


@pytest.mark.parametrize("cell", cases.CELLS)
def test_a_pool_has_the_numbers_of_a_loop_of_streams(cell: str) -> None:
    contest = Contest("pool", "pool", cell, {}, lambda: serving_cases.pool_field(cell, 5, 12))
    outcome = serving.measure(contest, ONCE)
    assert outcome.passed and outcome.rivals == ["loop of Streams"]


@pytest.mark.parametrize("shape", [Shape("int8", 1, 1, 24, 16), Shape("int8", 3, 7, 12, 16)], ids=lambda s: s.name)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_int8_is_measured_beside_onnx_runtime_and_our_float32(cell: str, shape: Shape) -> None:
    contest = Contest("int8", "int8", cell, {}, lambda: serving_cases.int8_field(cell, shape))
    outcome = serving.measure(contest, ONCE)
    assert outcome.passed and 1e-4 < outcome.errors["fused"] < 0.1
    theirs = ["ONNX Runtime int8"] if cell == "lstm" and peers.ONNX_RUNTIME_INT8.available() else []
    assert outcome.rivals == ["fused layer", "fused float32", *theirs]
    if theirs:  # it is int8, and no more wrong than that
        assert 1e-4 < outcome.errors["ONNX Runtime int8"] < 0.1


def test_onnx_runtime_has_int8_for_lstms_alone() -> None:
    int8 = peers.ONNX_RUNTIME_INT8
    shape = Shape("int8", 1, 4, 8, 8)
    assert int8.supports(Case(shape, "lstm", "inference", "float32"))
    assert not int8.supports(Case(shape, "gru", "inference", "float32"))
    assert not int8.supports(Case(shape, "lstm", "training", "float32"))
    assert int8 not in peers.PEERS  # or it would take part in every case


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_voice_activity_is_measured_beside_the_packages_own_files() -> None:
    if serving_cases.silero() is None:
        pytest.skip("silero-vad is not installed, which has the weights")
    contest = Contest("voice", "voice", "lstm", {}, serving_cases.voice_field, steps=serving_cases.VOICE_CHUNKS)
    outcome = serving.measure(contest, ONCE)
    assert outcome.passed
    theirs = ["ONNX Runtime", "ONNX Runtime, 16 kHz"] if peers.ONNX_RUNTIME.available() else []
    assert outcome.rivals == ["TorchScript", *theirs]
    (probabilities,) = serving_cases.voice_field().expected
    assert probabilities.max() - probabilities.min() > 0.1  # there is something to get wrong


def test_an_agent_acts_alike_on_every_layer() -> None:
    field = serving_cases.agent_field()
    with torch.no_grad():
        first, *others = ([contestant.run() for _ in range(2)] for contestant in field.contestants)
    assert rivals_of(field) == ["fused cell", "torch.nn"]
    for logits in others:
        torch.testing.assert_close(first, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=0)  # every episode begins anew


def test_the_agents_pole_is_that_of_gymnasium() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    theirs, ours = gymnasium.make("CartPole-v1").unwrapped, serving_cases.Pole()
    theirs.reset(seed=0)
    theirs.state = (ours.place, ours.speed, ours.angle, ours.turning)
    for number in range(200):
        right = number % 3 != 0
        _, _, fell, _, _ = theirs.step(int(right))
        ours.push(right)
        if fell:
            assert (ours.place, ours.angle) == (0.01, 0.02)
            return
        assert (ours.place, ours.speed, ours.angle, ours.turning) == pytest.approx(theirs.state, rel=1e-9)
    raise AssertionError("it never fell")


def made(factors: dict[str, float], steps: int = 1) -> Contest:
    """A contest whose contestants return ones, times a factor."""

    def field() -> Field:
        ones = torch.ones(3)
        contestants = [Contestant(name, lambda factor=factor: (factor * ones,)) for name, factor in factors.items()]
        return Field(contestants, [ones])

    return Contest("step", "made up", "lstm", {"B": 3}, field, steps=steps)


def test_a_contestant_with_wrong_numbers_is_named_and_nothing_is_timed() -> None:
    outcome = serving.measure(made({"fused": 1.0, "exact": 1.0, "wrong": 1.001, "broken": math.nan}), ONCE)
    assert outcome.wrong == ["wrong", "broken"] and not outcome.passed and not outcome.seconds
    line = report.serving_line(outcome)
    assert "PARITY FAILED: wrong is off by 1.00e-03 of the largest value, allowed 5e-06" in line
    record = serving.record_of(outcome)
    assert record["parity"]["passed"] is False and "seconds" not in record
    assert record["parity"]["errors"]["broken"] is None  # JSON has no NaN
    assert report.serving_sections([outcome]) == []


def test_a_result_that_is_missing_is_wrong() -> None:
    contest = Contest("step", "none", "lstm", {}, lambda: Field([Contestant("fused", lambda: ())], [torch.ones(1)]))
    assert serving.measure(contest, ONCE).wrong == ["fused"]


def test_times_are_of_one_of_the_steps_that_a_run_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_turn", lambda run, calls, seconds: 0.5)
    outcome = serving.measure(made({"fused": 1.0, "other": 1.0}, steps=10), ONCE)
    assert outcome.seconds == {"fused": [0.05], "other": [0.05]}


def test_contests_run_on_one_thread_whatever_is_set() -> None:
    seen = []

    def field() -> Field:
        def run() -> torch.Tensor:
            seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
            return torch.ones(1)

        return Field([Contestant("fused", run)], [torch.ones(1)])

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        serving.measure(Contest("step", "threads", "lstm", {}, field), ONCE)
        assert set(seen) == {(1, False)} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Bars

RIVALS: dict[str, tuple[str, ...]] = {
    "step": bars.ENGINES,
    "pool": ("loop of Streams",),
    "int8": ("fused float32", "ONNX Runtime int8"),
    "voice": ("TorchScript",),
    "agent": ("torch.nn",),
}


def whole_result(ratio: float, contests: Sequence[Contest]) -> dict[str, Any]:
    """A made-up result of the whole part, in which ours is everywhere so many times as fast as the others."""
    outcomes = []
    for contest in contests:
        rivals = RIVALS[contest.group][
            : 1 if (contest.group, contest.cell) in (("int8", "gru"), ("int8", "rnn")) else None
        ]
        seconds = {"fused": [1e-3]} | {name: [ratio * 1e-3] for name in rivals}
        outcome = serving.Outcome(contest=contest, seconds=seconds, calls=dict.fromkeys(seconds, 1))
        outcome.errors, outcome.tolerances = dict.fromkeys(seconds, 0.0), dict.fromkeys(seconds, 1.0)
        outcomes.append(outcome)
    results = []
    for threads, case in itertools.product((2, 1), cases.select(parts=("serving",))):
        rivals = ("torch.nn",) if case.training else bars.ENGINES
        seconds = {"fused": [1e-3]} | {name: [ratio * 1e-3] for name in rivals}
        results.append(runner.Result(case, threads, seconds=seconds, calls=dict.fromkeys(seconds, 1)))
    environment = {
        "processor": "a processor",
        "threads": {"processors": 2},
        "peers": {"fused": "1", "torch.nn": "2"},
        "instruction_sets": {"used": "portable"},
        "freed_memory_kept": True,
        "fused_rnn": {"version": "1"},
        "python": "3",
        "date": "today",
        "backend": "auto",
    }
    return report.to_json(environment, {}, results, bars.ENGINES, outcomes=outcomes)


def verdicts_at(ratio: float) -> list[bars.Verdict]:
    return bars.evaluate(whole_result(ratio, serving_cases.contests()), bars.SERVING)


def test_every_bar_of_serving_finds_its_cases_in_a_whole_result() -> None:
    verdicts = verdicts_at(4.1)
    assert [verdict.bar.name for verdict in verdicts if not verdict.met] == []
    counts = {verdict.bar.name: verdict.count for verdict in verdicts}
    assert counts == {
        "a Stream's step, fused / best peer": 15,
        "StreamPool, 256 sessions of H128, loop of Streams / pool": 3,
        "few rows, large weights, inference, fused / best peer": 135,
        "few rows, large weights, training, fused / torch.nn": 135,
        "int8, LSTM, fused / ONNX Runtime int8": 18,
        "int8, GRU, fused / fused float32": 6,
        "int8, RNN, fused / fused float32": 6,
    }
    assert {verdict.threads for verdict in verdicts if verdict.bar.table == "cases"} == {2, 1}


def test_bars_of_serving_that_are_missed_are_said_to_be() -> None:
    assert not any(verdict.met for verdict in verdicts_at(0.9))
    section = report.bars_section(verdicts_at(1.3), "Bars of serving")
    rows = {(row[0], row[1]): row for row in section.rows[1:]}
    step = rows["a Stream's step, fused / best peer", "-"]
    assert (step[2], step[3], step[5]) == ("at most 0.7", "0.77", "NO") and step[7]
    assert rows["StreamPool, 256 sessions of H128, loop of Streams / pool", "-"][2:6] == [
        "at least 4",
        "1.30",
        "-",
        "NO",
    ]
    assert rows["few rows, large weights, training, fused / torch.nn", "1"][5] == "yes"
    assert rows["int8, LSTM, fused / ONNX Runtime int8", "-"][5] == "yes"
    assert rows["int8, GRU, fused / fused float32", "-"][5] == "NO"
    assert section.title == "Bars of serving: 5 of 9 met"


def test_a_bar_is_judged_by_the_fastest_of_the_peers_and_by_the_worst_case() -> None:
    result = whole_result(10.0, serving_cases.contests())
    slow = next(record for record in result["serving"] if record["name"] == "gru step B1 H64")
    slow["ratio"]["ONNX Runtime"]["median"] = 1.25
    verdict = bars.evaluate(result, bars.SERVING)[0]
    assert (verdict.measured, verdict.worst, verdict.met) == (0.8, "gru step B1 H64", False)
    del slow["ratio"]["OpenVINO"]  # the best peer is not known
    verdict = bars.evaluate(result, bars.SERVING)[0]
    assert (verdict.measured, verdict.worst, verdict.met) == (None, "gru step B1 H64", False)


def test_without_int8_its_bars_are_not_met() -> None:
    result = whole_result(9.0, [contest for contest in serving_cases.contests() if contest.group != "int8"])
    of_int8 = [v for v in bars.evaluate(result, bars.SERVING) if v.bar.name.startswith("int8")]
    assert [(verdict.met, verdict.measured, verdict.count) for verdict in of_int8] == [(False, None, 0)] * 3
    section = report.bars_section(of_int8)
    assert all(row[3] == "not measured" and row[5] == "NO" for row in section.rows[1:])


def test_without_any_case_each_bar_is_said_to_be_unmeasured() -> None:
    verdicts = bars.evaluate(whole_result(9.0, serving_cases.contests()) | {"cases": []}, bars.SERVING)
    assert len(verdicts) == len(bars.SERVING) == 7
    assert [verdict.measured for verdict in verdicts if verdict.bar.table == "cases"] == [None, None]


def test_other_bars_do_not_look_at_cases_of_serving() -> None:
    others = bars.evaluate(whole_result(9.0, serving_cases.contests()))
    assert all(verdict.count == 0 for verdict in others)


# The command


@pytest.fixture(scope="module")
def result_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a real run over a few contests and a case."""
    path = tmp_path_factory.mktemp("serving") / "result.json"
    chosen = "gru (step B1 H8|agent|B1 T1 I96 .*inference)"
    options = ["--parts", "serving", "--cases", chosen, "--rounds", "1", "--threads", "1", "--no-keep-freed-memory"]
    assert bench.main([*options, "--json", str(path), "--markdown", str(path.with_suffix(".md"))]) == 0
    return path


def test_a_result_has_contests_and_cases(result_file: Path) -> None:
    result = json.loads(result_file.read_text())
    assert [record["name"] for record in result["cases"]] == ["gru B1 T1 I96 H1024 float32 inference"]
    step, agent = result["serving"]
    assert (step["name"], step["group"], step["threads"]) == ("gru step B1 H8", "step", 1)
    assert step["sizes"] == {"B": 1, "I": 8, "H": 8} and step["parity"]["passed"]
    assert step["ratio"]["torch.nn"]["median"] > 0 and len(step["seconds"]["fused"]["rounds"]) == 1
    assert agent["steps"] == 50 and set(agent["ratio"]) == {"fused cell", "torch.nn"}
    markdown = result_file.with_suffix(".md").read_text()
    assert "| gru step B1 H8 |" in markdown and "| 1 | gru | B1 T1 I96 H1024 | float32 | inference |" in markdown


def test_a_kept_result_of_serving_is_judged_by_its_own_bars(
    result_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert bench.main(["--bars", str(result_file)]) == 0
    printed = capsys.readouterr().out
    assert "Bars of serving: " in printed and "\nBars: " not in printed


def test_bars_are_printed_when_all_of_serving_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_cases, "contests", lambda: [made({"fused": 1.0, "torch.nn": 1.0})])
    shape = dataclasses.replace(cases.SERVING[-1], seq_length=2, input_size=4, hidden_size=4)
    monkeypatch.setattr(cases, "SHAPES", (shape,))
    options = ["--parts", "serving", "--rounds", "1", "--threads", "1", "--no-keep-freed-memory"]
    assert bench.main([*options, "--cells", "lstm"]) == 0  # a choice
    assert "Bars" not in capsys.readouterr().out
    assert bench.main(options) == 0
    printed = capsys.readouterr().out
    assert "Bars of serving: 0 of 7 met" in printed  # none has all of its cases
    assert "made up" in printed and "2 of 2 cases" in printed


def test_a_wrong_number_fails_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_cases, "contests", lambda: [made({"fused": 1.1, "torch.nn": 1.0})])
    options = ["--parts", "serving", "--cases", "made up", "--rounds", "1", "--no-keep-freed-memory"]
    assert bench.main(options) == 1
    assert "PARITY FAILED: fused is off by 1.00e-01" in capsys.readouterr().out


def test_without_kernels_contests_are_left_out_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with fused_rnn.use_backend("reference"):
        assert bench.main(["--parts", "serving", "--cases", "step"]) == 2
    assert "there are no streams without kernels" in capsys.readouterr().err


def test_disturbed_rounds_of_contests_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.OtherProcesses, "disturbed", lambda self: True)
    others = runner.OtherProcesses(patience=1e-9)
    exactly = dataclasses.replace(ONCE, min_rounds=4, max_rounds=4)
    outcome = serving.measure(made({"fused": 1.0, "other": 1.0}), exactly, others)
    assert (outcome.disturbed_rounds, outcome.disturbed_rounds_kept) == (1, 4)
    (note,) = report.footnotes([], [outcome])
    assert "in 5 of 5 rounds, of which 1 were repeated and 4 count" in note


def test_list_has_contests_where_serving_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list", "--parts", "serving"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "rnn step B1 H256" in listed and "lstm B6 T8 I2048 H2048 float32 training" in listed
    assert "lstm B1 T80 I512 H256 L2 bidir float32 training" not in listed
    assert bench.main(["--list"]) == 0
    assert not {name for name in capsys.readouterr().out.splitlines() if "step" in name}
    assert bench.main(["--list", "--parts", "serving", "--dtype", "bfloat16"]) == 0
    assert "step" not in capsys.readouterr().out
