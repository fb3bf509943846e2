"""The benchmark suite: its cases, adapters, rounds, bars and reports. Nothing here asserts a speed."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fused_rnn import bench
from fused_rnn.bench import bars, cases, crowded, memory, peers, report, runner
from fused_rnn.bench.cases import Case, Shape

ROOT = Path(__file__).resolve().parent.parent
ENGINES = (peers.ONNX_RUNTIME, peers.OPENVINO)
TINY = Shape("small", 2, 3, 4, 5)


# Cases


def test_every_case_has_a_name_of_its_own_in_its_part() -> None:
    for part in cases.PARTS:
        names = [case.name for case in cases.select(parts=(part,))]
        assert names
        assert len(set(names)) == len(names)


def test_select_keeps_parts_cells_modes_and_names() -> None:
    chosen = cases.select(parts=("table",), pattern="b16 t40", cells=("gru",), modes=("training",))
    assert [case.name for case in chosen] == ["gru B16 T40 I64 H16 float32 training"]
    assert all(case.shape.quick for case in cases.select(quick=True))
    assert not {case.cell for case in cases.select(parts=("workloads",))} - {"lstm", "gru"}


def test_sweeps_vary_one_size_and_hold_sizes_that_fill_no_vector() -> None:
    for name in ("batch_size", "hidden_size", "seq_length"):
        letter = {"batch_size": "B", "hidden_size": "H", "seq_length": "T"}[name]
        swept = [shape for shape in cases.SWEEPS if shape.group == letter]
        sizes = [getattr(shape, name) for shape in swept]
        assert sizes == sorted(set(sizes))
        assert sizes[0] == 1
        others = {"batch_size", "hidden_size", "seq_length"} - {name}
        assert all(len({getattr(shape, other) for shape in swept}) == 1 for other in others)
    assert any(size % 8 for size in (shape.hidden_size for shape in cases.SWEEPS))


def test_flops_count_both_products_of_every_layer_and_direction() -> None:
    shape = Shape("small", 2, 3, 4, 5, num_layers=2, bidirectional=True)
    # Steps x rows x gate rows x (inputs + hidden), of which the second layer's inputs are both directions' outputs.
    forward = 2 * 2 * 3 * (3 * 5) * (2 * (4 + 5) + 2 * (10 + 5))
    assert Case(shape, "gru", "inference", "float32").flops == forward
    assert Case(shape, "gru", "training", "float32").flops == 3 * forward


# Engines that run the ONNX model

SHAPES = {
    "layer": TINY,
    "both directions, two layers": dataclasses.replace(TINY, num_layers=2, bidirectional=True),
    "three layers": dataclasses.replace(TINY, num_layers=3),
    "one row, one step": Shape("call", 1, 1, 3, 7),
    "cell": Shape("call", 3, 1, 4, 5, single_step=True),
}


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("cell", cases.CELLS)
def test_engine_computes_what_torch_nn_does(engine: peers.OnnxEngine, shape: Shape, cell: str) -> None:
    if not engine.available():
        pytest.skip(f"{engine.name} is not installed")
    case = Case(shape, cell, "inference", "float32")
    problem = peers.Problem(case)
    with torch.no_grad():
        expected = list(peers.tensors_of(peers.TORCH_NN.make(problem)()))
        run = engine.make(problem)
        run()
        found = list(peers.tensors_of(run()))  # the second call must not see what the first left behind
    assert len(found) == len(problem.result_names())
    for found_tensor, expected_tensor in zip(found, expected, strict=True):
        torch.testing.assert_close(found_tensor, expected_tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_engines_are_asked_for_inference_in_float32_only(engine: peers.OnnxEngine) -> None:
    assert engine.supports(Case(TINY, "lstm", "inference", "float32"))
    assert not engine.supports(Case(TINY, "lstm", "training", "float32"))
    assert not engine.supports(Case(TINY, "lstm", "inference", "bfloat16"))


def test_engine_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not peers.ONNX_RUNTIME.available()
    assert not peers.OPENVINO.available()


# Rounds

PLAN = runner.Plan(min_rounds=3, max_rounds=8, seconds=1.0, precision=0.01, sample_seconds=1e-4)


def result_of(fused: list[float], torch_nn: list[float]) -> runner.Result:
    case = Case(TINY, "lstm", "inference", "float32")
    return runner.Result(case, seconds={"fused": fused, "torch.nn": torch_nn})


def test_rounds_end_when_every_ratio_is_known_or_time_is_up() -> None:
    same, moving = [1.0] * 5, [1.0, 3.0, 1.0, 3.0, 1.0]
    assert not result_of(same[:2], same[:2]).enough(PLAN, 100.0)  # the least number of rounds, whatever they take
    assert not result_of(same[:4], same[:4]).enough(PLAN, 0.1)  # too few to judge their precision by
    assert result_of(same, same).enough(PLAN, 0.1)
    assert not result_of(same, moving).enough(PLAN, 0.1)
    assert result_of(same, moving).enough(PLAN, 0.9)  # the next round would end after 1.08 s
    assert result_of([1.0] * 8, moving + [3.0, 1.0, 3.0]).enough(PLAN, 0.1)


def test_a_case_that_seems_slower_gets_more_time() -> None:
    plan = dataclasses.replace(PLAN, doubtful_ratio=1.0, doubtful_seconds=2.0)
    slower = [0.9, 0.5, 0.9, 0.5, 0.9]
    assert result_of([1.0] * 5, slower).enough(PLAN, 1.5)
    assert not result_of([1.0] * 5, slower).enough(plan, 1.5)


def test_ratio_and_share_of_peak_are_taken_round_by_round() -> None:
    result = result_of([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert result.ratio("torch.nn") == runner.Spread(2.0, 2.0, 2.0)
    assert result.share_of_peak("fused") is None
    result.peak = [result.case.flops * rate for rate in (2.0, 1.0, 0.5)]
    share = result.share_of_peak("fused")
    assert share is not None
    assert share.median == pytest.approx(0.5)


def test_standard_error_falls_with_the_square_root_of_the_rounds() -> None:
    samples = [0.9, 1.0, 1.1]
    assert runner.standard_error([1.0] * 5) == 0.0
    few, many = runner.standard_error(samples * 3), runner.standard_error(samples * 12)
    assert many == pytest.approx(few / 2, rel=0.1)


class Double:
    """A peer that returns torch.nn's results times a factor."""

    name, pool = "double", "another"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def available(self) -> bool:
        return True

    def version(self) -> str:
        return "1"

    def supports(self, case: Case) -> bool:
        return True

    def make(self, problem: peers.Problem) -> peers.Run:
        run = peers.TORCH_NN.make(problem)
        return lambda: [self.factor * tensor for tensor in peers.tensors_of(run())]


def test_a_peer_with_wrong_numbers_is_named_and_nothing_is_timed() -> None:
    case = Case(TINY, "gru", "training", "float32")
    result = runner.measure(case, [peers.FUSED, peers.TORCH_NN, Double(1.001)], PLAN)
    assert {peer for peer, _ in result.failures()} == {"double"}
    assert not result.seconds
    table = report.Table([case], ["torch.nn", "double"])
    assert "double: gradient of weight_hh_l0: off by 1.00e-03" in table.line(result)


def test_every_contestant_and_the_peak_are_measured_in_every_round() -> None:
    case = Case(TINY, "gru", "inference", "float32")
    contestants = [peers.FUSED, peers.TORCH_NN, Double(1.0)]
    result = runner.measure(case, contestants, PLAN, peak=lambda dtype: 1e9)
    assert result.passed
    rounds = len(result.seconds["fused"])
    assert 3 <= rounds <= 8
    assert {name: len(samples) for name, samples in result.seconds.items()} == dict.fromkeys(result.seconds, rounds)
    assert set(result.seconds) == {"fused", "torch.nn", "double"}
    assert len(result.peak) == rounds


def test_rounds_with_other_processes_at_work_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = itertools.chain([True, False, True], itertools.repeat(False))
    monkeypatch.setattr(runner.OtherProcesses, "disturbed", lambda self: next(answers))
    exactly = dataclasses.replace(PLAN, min_rounds=4, max_rounds=4)
    result = runner.measure(Case(TINY, "rnn", "inference", "float32"), [peers.FUSED, peers.TORCH_NN], exactly)
    assert result.disturbed_rounds == 2
    assert [len(samples) for samples in result.seconds.values()] == [4, 4]
    assert (
        "Other processes were at work in 2 of 6 rounds, of which 2 were repeated and 0 count"
        in report.footnotes([result])[-1]
    )


def test_disturbed_rounds_count_once_patience_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.OtherProcesses, "disturbed", lambda self: True)
    exactly = dataclasses.replace(PLAN, min_rounds=4, max_rounds=4)
    others = runner.OtherProcesses(patience=1e-9)
    case = Case(TINY, "rnn", "inference", "float32")
    result = runner.measure(case, [peers.FUSED, peers.TORCH_NN], exactly, others=others)
    assert others.patience < 0
    assert (result.disturbed_rounds, result.disturbed_rounds_kept) == (1, 4)
    assert len(result.seconds["fused"]) == 4


@pytest.mark.kernels
def test_peak_is_positive_and_refuses_what_it_cannot_measure(isa: str) -> None:
    from fused_rnn import _C
    from fused_rnn.backend import ops

    assert ops is not None
    for dtype in cases.DTYPES.values():
        assert ops.peak_flops(dtype, 0.001) > 1e8
    with pytest.raises(ValueError, match="seconds: expected more than 0 and at most 1, got 2"):
        ops.peak_flops(torch.float32, 2.0)
    with pytest.raises(ValueError, match="dtype: expected 0 to 3, got 4"):
        _C.peak_flops(4, 0.001)


# Bars


def judged(values: list[float], **options: Any) -> bars.Verdict:
    bar = bars.Bar("made up", 1.0, bars.ratio_to_torch, {"group": ("a",)}, **options)
    records = [
        {"name": f"case {i}", "threads": 2, "group": "a", "ratio": {"torch.nn": {"median": value}}}
        for i, value in enumerate(values)
    ]
    stray = {"name": "of another group", "threads": 2, "group": "b", "ratio": {"torch.nn": {"median": 0.1}}}
    (verdict,) = bars.evaluate({"cases": [*records, stray]}, [bar])
    return verdict


def test_a_bar_for_each_case_is_judged_by_the_worst() -> None:
    assert judged([1.5, 1.0]).met
    verdict = judged([1.5, 0.98, 2.0])
    assert not verdict.met
    assert (verdict.measured, verdict.worst, verdict.count) == (0.98, "case 1", 3)
    assert judged([1.5, 0.98], noise=0.03).met
    assert not judged([1.5, 0.96], noise=0.03).met


def test_a_bar_for_the_mean_takes_the_geometric_one() -> None:
    verdict = judged([0.5, 2.0, 1.0], mean=True)
    assert verdict.measured == pytest.approx(1.0)
    assert not judged([0.5, 1.9], mean=True).met


def test_what_a_bar_would_be_at_the_peak_is_bounded_by_the_worst_case_or_the_mean() -> None:
    def at_peak(cases: list[tuple[float, float | None]], **options: Any) -> float | None:
        bar = bars.Bar("made up", 1.0, bars.ratio_to_torch, {}, **options)
        records = [
            {"name": f"case {i}", "threads": 2, "ratio": {"torch.nn": {"median": ratio}}}
            | ({} if share is None else {"share_of_peak": {"fused": {"median": share}}})
            for i, (ratio, share) in enumerate(cases)
        ]
        (verdict,) = bars.evaluate({"cases": records}, [bar])
        return verdict.at_peak

    assert at_peak([(1.5, 0.5), (1.8, 0.9)]) == pytest.approx(2.0)
    assert at_peak([(2.0, 0.5), (0.5, 0.5)], mean=True) == pytest.approx(2.0)
    assert at_peak([(1.5, 0.5), (1.8, None)]) is None


def test_an_upper_limit_is_missed_by_the_largest() -> None:
    verdict = judged([0.5, 1.1], at_most=True)
    assert (verdict.met, verdict.worst) == (False, "case 1")
    assert judged([0.5, 1.0], at_most=True).met


def test_a_bar_is_not_met_if_a_case_of_it_was_not_measured() -> None:
    case = {"name": "failed parity", "threads": 2, "group": "a"}
    bar = bars.Bar("made up", 1.0, bars.ratio_to_torch, {"group": ("a",)})
    good = case | {"name": "good", "ratio": {"torch.nn": {"median": 2.0}}}
    (verdict,) = bars.evaluate({"cases": [good, case]}, [bar])
    assert (verdict.met, verdict.measured, verdict.worst) == (False, None, "failed parity")
    (verdict,) = bars.evaluate({"cases": [good | {"group": "b"}]}, [bar])
    assert (verdict.met, verdict.measured, verdict.count) == (False, None, 0)


def test_the_best_peer_is_known_only_if_all_were_measured() -> None:
    record = {"name": "case", "ratio": {"torch.nn": {"median": 2.0}, "ONNX Runtime": {"median": 0.9}}}
    assert bars.ratio_to_best(record) is None
    record["ratio"]["OpenVINO"] = {"median": 1.1}
    assert bars.ratio_to_best(record) == 0.9


def test_every_thread_count_is_judged_by_itself() -> None:
    bar = bars.Bar("made up", 1.0, bars.ratio_to_torch, {})
    records = [
        {"name": "case", "threads": threads, "ratio": {"torch.nn": {"median": ratio}}}
        for threads, ratio in ((1, 2.0), (2, 0.5))
    ]
    verdicts = bars.evaluate({"cases": records}, [bar])
    assert [(verdict.threads, verdict.met) for verdict in verdicts] == [(2, False), (1, True)]


def whole_result(ratio: float) -> dict[str, Any]:
    """A made-up result of the whole suite, in which the fused layers are everywhere so many times as fast."""
    spread = {"median": ratio, "q1": ratio, "q3": ratio}
    records = []
    for threads, case in itertools.product((2, 1), cases.select()):
        result = runner.Result(case, threads, seconds={"fused": [1e-3], "torch.nn": [ratio * 1e-3]})
        result.calls = dict.fromkeys(result.seconds, 1)
        record = report.to_json({}, {}, [result], ["torch.nn"])["cases"][0]
        if not case.training and case.dtype == "float32" and case.shape.part != "sweeps":
            record["ratio"] |= {engine.name: spread for engine in ENGINES}
        if case.shape.part != "sweeps":
            record["share_of_peak"] = {"fused": {"median": ratio / 10}}
            record["peak_gflops"] = {"median": 100.0}
        records.append(record)
    saved = [memory.Saved(case, {"fused": 100, "torch.nn": int(100 * ratio)}) for case in memory.CASES]
    times = {"seconds": {"fused": [0.4 / ratio]}, "alone": {"fused": [0.1]}}
    crowdings = [
        crowded.Crowding(scenario, case, scenario.loss(2), **times)
        for scenario in crowded.SCENARIOS
        for case in crowded.CASES
    ]
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
    return report.to_json(environment, {}, [], [], saved, crowdings) | {"cases": records}


def test_every_bar_finds_its_cases_in_a_whole_result() -> None:
    verdicts = bars.evaluate(whole_result(20.0))
    assert [verdict.bar.name for verdict in verdicts if not verdict.met] == []
    counts = {verdict.bar.name: verdict.count for verdict in verdicts}
    assert counts["inference, best peer / fused, each"] == 18
    assert counts["training, torch.nn / fused, mean, large, GRU"] == 3
    assert counts["bfloat16 training, torch.nn / fused, each, LSTM"] == 2
    assert counts["tiny call, fused / torch.nn, each"] == 3
    assert {verdict.threads for verdict in verdicts if verdict.bar.table == "cases"} == {2, 1}
    assert all(verdict.met is False for verdict in bars.evaluate(whole_result(0.1)))


def test_unmet_bars_are_said_plainly() -> None:
    section = report.bars_section(bars.evaluate(whole_result(1.0)))
    rows = {tuple(row[:2]): row for row in section.rows[1:]}
    row = rows["inference, best peer / fused, mean", "2"]
    assert (row[2:4], row[5]) == (["at least 1.2", "1.00"], "NO")
    row = rows["inference, best peer / fused, each", "1"]
    assert (row[2:4], row[5]) == (["at least 1 (0.97 is noise)", "1.00"], "yes")
    assert section.title.startswith("Bars: ")
    empty = report.bars_section(bars.evaluate({"cases": []}))
    assert all(row[3:6] == ["not measured", "-", "NO"] for row in empty.rows[1:])


# Memory and crowds


@pytest.mark.kernels
def test_saved_bytes_leave_out_what_the_caller_holds_anyway() -> None:
    case = Case(Shape("memory", 3, 5, 4, 16, part="memory"), "rnn", "training", "float32")
    # A plain recurrence needs its outputs again, and nothing else of its own.
    assert memory.measure(case).bytes_saved["fused"] == 5 * 3 * 16 * 4


def test_loss_is_the_share_of_processors_that_is_gone() -> None:
    pinned, four, many = crowded.SCENARIOS
    assert [scenario.loss(2) for scenario in (crowded.ALONE, pinned, four, many)] == [1.0, 2.0, 4.0, 1.0]
    assert [scenario.loss(8) for scenario in (crowded.ALONE, pinned, four, many)] == [1.0, 2.0, 1.0, 1.0]
    assert pinned.loss(1) == 1.0


def test_slowdown_is_measured_against_the_loss() -> None:
    times = {"seconds": {"fused": [3.0, 4.0, 9.0]}, "alone": {"fused": [1.0]}}
    crowding = crowded.Crowding(crowded.SCENARIOS[0], crowded.CASES[0], 2.0, **times)
    assert crowding.beyond_loss("fused") == 2.0
    assert crowding.beyond_loss("torch.nn") is None


@pytest.fixture
def child() -> Iterator[crowded._Child]:
    with crowded._Child(crowded.ALONE) as process:
        yield process


def test_a_child_that_does_not_answer_is_ended(child: crowded._Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowded, "ANSWER_LIMIT_SECONDS", 0.01)  # it cannot have started yet
    assert child.answer() is None
    child.order(crowded.CASES[0], "fused", 0.01)
    assert child.answer() is None
    assert child.processor_ticks() == 0


@pytest.mark.slow
def test_crowded_processes_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowded, "SCENARIOS", crowded.SCENARIOS[:1])
    (crowding,) = crowded.measure(cases=crowded.CASES[:1], repeats={"fused": 1}, seconds=0.01)
    beyond = crowding.beyond_loss("fused")
    assert beyond is not None
    assert math.isfinite(beyond)


# Reports


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a real run over a few tiny cases, on the suite's one thread."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    options = ["--cases", "gru (B1 T1 I8|B4 T[12] )", "--rounds", "1", "--threads", "1", "--no-keep-freed-memory"]
    assert bench.main([*options, "--json", str(path), "--markdown", str(path.with_suffix(".md"))]) == 0
    return path


def test_result_says_where_and_what_was_measured(result_file: Path) -> None:
    result = json.loads(result_file.read_text())
    assert result["schema"] == report.SCHEMA
    assert result["environment"]["peers"]["torch.nn"] == torch.__version__
    assert result["environment"]["freed_memory_kept"] is False
    assert "commit" in result["environment"]["fused_rnn"]
    record = next(record for record in result["cases"] if record["name"] == "gru B1 T1 I8 H8 float32 inference")
    assert (record["threads"], record["part"], record["group"], record["shape_name"]) == (
        1,
        "table",
        "call",
        "B1 T1 I8 H8",
    )
    assert record["ratio"]["torch.nn"]["median"] > 0
    assert len(record["seconds"]["fused"]["rounds"]) == 1
    markdown = result_file.with_suffix(".md").read_text()
    assert "| 1 | gru | B1 T1 I8 H8 | float32 | inference |" in markdown


def test_bars_are_not_judged_by_a_choice_of_their_cases(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowded, "measure", lambda progress: [])
    monkeypatch.setattr(memory, "CASES", ())
    monkeypatch.setattr(bench.cases, "SHAPES", (cases.SHAPES[6],))
    options = ["--rounds", "1", "--threads", "1", "--no-keep-freed-memory", "--parts", ",".join(bench.PARTS)]
    assert bench.main([*options, "--cells", "gru"]) == 0
    assert "Bars: " not in capsys.readouterr().out
    assert bench.main(options) == 0
    assert "Bars: " in capsys.readouterr().out
    assert torch.get_num_threads() == 1


def test_a_kept_result_is_judged_again(result_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert bench.main(["--bars", str(result_file)]) == 0
    printed = capsys.readouterr().out
    assert "Bars: " in printed
    assert "not measured" in printed


def test_plots_are_drawn_from_a_result(result_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = script("plot")
    assert plot.main([str(result_file), "--out", str(tmp_path / "images")]) == 0
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    assert {"ratios-1.png", "sweeps-1.png"} <= drawn
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "images").iterdir())


def test_plots_of_a_whole_result_have_a_panel_for_every_cell() -> None:
    pytest.importorskip("matplotlib")
    figures = script("plot").figures(whole_result(2.0))
    assert set(figures) == {"ratios-2", "ratios-1", "sweeps-2", "sweeps-1", "peak"}
    assert len(figures["ratios-2"].axes) == 6
    assert len(figures["sweeps-1"].axes) == 9
    assert all(axes.get_xlabel() for figure in figures.values() for axes in figure.axes)


def test_figures_of_the_readme_come_from_a_result(tmp_path: Path) -> None:
    tables = script("tables")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md", "docs/performance.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    result = tmp_path / "made-up.json"
    result.write_text(report.json_text(whole_result(0.5)))
    assert tables.main([str(result), "--root", str(tmp_path)]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert (
        "| B64 T40 I256 H512 | 0.50, 0.50, 0.50 | 0.50, 0.50, 0.50 | 0.50, 0.50, 0.50 | 0.50 | 0.50 | 0.50 |" in readme
    )
    assert "made-up.json" in readme
    assert "LSTM B16 T40 I64 H16 training (torch.nn 0.50)" in readme
    assert "## Licence" in readme  # what follows the figures is still there
    assert (
        "| inference, best peer / fused, mean | 2 | at least 1.2 | 0.50 | 10.00 | NO |"
        in (tmp_path / "docs/benchmarks.md").read_text()
    )
    performance = (tmp_path / "docs/performance.md").read_text()
    assert "torch.nn 0.50 in inference, ONNX Runtime 0.50 in inference" in performance
    assert "by group: large " in performance and "large inference 5 to 5; large training 5 to 5" in performance
    assert "## Bounds" in performance
    before = readme
    assert tables.main([str(result), "--root", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == before


def test_a_region_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="region 'speed': expected it once, found it 0 times"):
        script("tables").replaced("no marks", "speed", "")


def test_json_text_reads_back() -> None:
    result = whole_result(3.0)
    assert json.loads(report.json_text(result)) == result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "tables"], "of table, workloads, sweeps, memory, crowded, serving, got 'tables'"),
        (["--threads", "2,0"], "expected a whole number of at least 1, got '0'"),
        (["--cases", "("], "expected a regular expression, got '('"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_choice_that_leaves_no_case_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--cases", "no such case"]) == 2
    assert "no case is left" in capsys.readouterr().err


def test_list_prints_the_names_of_the_chosen_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list", "--parts", "workloads"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in cases.select(parts=("workloads",))]
