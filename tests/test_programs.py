"""The programs of other packages (`make programs`): what the runner makes of made-up ones. No package is needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn.bench import report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import plot, tables  # noqa: E402
from benchmarks.programs import __main__ as programs  # noqa: E402
from benchmarks.programs import wheels  # noqa: E402
from benchmarks.programs.compare import CannotCompareError, compare, recurrent_layers, tensors_in  # noqa: E402
from benchmarks.programs.program import (  # noqa: E402
    CONVERT,
    FUSED,
    KEYWORD,
    PATCH,
    TORCH_NN,
    Program,
    Running,
    training_step,
)
from benchmarks.programs.records import line, passed  # noqa: E402

ONE_ROUND = ["--rounds", "1", "--threads", "1", "--no-keep-freed-memory"]


def running(model: nn.Module, trains: bool = True) -> Running:
    x = torch.randn(4, 3, 5)

    def outputs() -> Tensor:
        return model(x)[0]

    def loss() -> Tensor:
        return outputs().square().mean()

    return Running(model, training_step(model, loss) if trains else outputs, outputs)


def built() -> Running:
    return running(nn.GRU(5, 6))


def program(build: Callable[..., Running] = built, way: str = PATCH, **options: Any) -> Program:
    given = {"name": "made up", "field": "text", "requires": ("torch",), "timed": "a step"} | options
    return Program(way=way, build=build, **given)


def keyword(layers: ModuleType) -> Running:
    return running(layers.GRU(5, 6))


@pytest.mark.parametrize(("way", "build"), [(PATCH, built), (CONVERT, built), (KEYWORD, keyword)])
def test_fused_layers_come_in_by_each_way(way: str, build: Callable[..., Running]) -> None:
    both, deviations = compare(program(build, way))
    assert [type(both[name].model) for name in (TORCH_NN, FUSED)] == [nn.GRU, fused_rnn.GRU]
    assert nn.GRU is not fused_rnn.GRU
    assert len(deviations) == 7 and all(deviation.passed for deviation in deviations)
    assert deviations[0].error == 0 < deviations[1].tolerance


class Wrong(nn.Module):
    """Computes something else if its layer is a fused one."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6)
        self.off = off

    def forward(self, x: Tensor) -> tuple[Tensor]:
        result = self.rnn(x)[0]
        return (result + self.off if isinstance(self.rnn, fused_rnn.GRU) else result,)


def test_other_numbers_are_a_failure_and_are_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = program(lambda: running(Wrong(off=1e-3)), name="wrong")
    assert programs.main(ONE_ROUND, [wrong, program(name="right")]) == 1
    printed = capsys.readouterr().out
    assert "PARITY FAILED outputs off by" in printed
    assert "1 of 2 programs compute the same with fused layers\nfailed: wrong" in printed


class Drifting(Wrong):
    """The same values, but other gradients."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        result = self.rnn(x)[0]
        return (result - self.off * (result - result.detach()) if isinstance(self.rnn, fused_rnn.GRU) else result,)


def test_another_gradient_is_found_by_what_was_learned() -> None:
    _, deviations = compare(program(lambda: running(Drifting(off=0.01))))
    failed = {deviation.name: deviation.error for deviation in deviations if not deviation.passed}
    assert "learned" in failed and "outputs" not in failed
    assert failed["learned"] == pytest.approx(0.01, rel=0.2)


class Deaf(Wrong):
    """Does not load what its fused layer is given."""

    def load_state_dict(self, state: Any, **options: Any) -> Any:
        return None if isinstance(self.rnn, fused_rnn.GRU) else super().load_state_dict(state, **options)


def test_a_checkpoint_that_is_not_loaded_is_found() -> None:
    _, deviations = compare(program(lambda: running(Deaf(off=0.0))))
    assert [d.name for d in deviations if not d.passed] == ["torch.nn's checkpoint in fused layers"]


def test_a_program_that_does_not_train_its_model_is_refused() -> None:
    with pytest.raises(CannotCompareError, match="its steps do not change parameters"):
        compare(program(lambda: running(nn.GRU(5, 6), trains=False)))
    with pytest.raises(CannotCompareError, match="its steps change parameters"):
        compare(program(trains=False))


def test_an_error_of_a_package_leaves_the_others_running(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Running:
        raise RuntimeError("no such device")

    assert programs.main(ONE_ROUND, [program(broken, name="broken"), program(name="right")]) == 1
    printed = capsys.readouterr()
    assert "ERROR RuntimeError: no such device" in printed.out and "Traceback" in printed.err
    assert "1 of 2 programs" in printed.out


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: running(nn.Identity(), trains=False), "0 recurrent layers"),
        (lambda: running(fused_rnn.GRU(5, 6)), "fused on the other"),
        (lambda: running(LATE(5, 6)), "not fused on the fused side: GRU"),
    ],
)
def test_a_comparison_of_something_with_itself_is_refused(build: Callable[..., Running], message: str) -> None:
    with pytest.raises(CannotCompareError, match=message):
        compare(program(build, trains=False))


LATE = nn.GRU  # as a package has it that was imported before the patch


def test_a_package_that_is_not_installed_is_named_and_counts_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    absent = program(name="absent", requires=("torch", "no-such-distribution"))
    assert absent.missing() == ["no-such-distribution"]
    assert programs.main(ONE_ROUND, [absent]) == 2
    assert programs.main(ONE_ROUND, [absent, program()]) == 0
    printed = capsys.readouterr().out
    assert "not installed: no-such-distribution" in printed
    assert "1 of 1 programs compute the same with fused layers\nnot installed: absent" in printed


def test_list_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    absent = program(name="absent", requires=("no-such-distribution",))
    assert programs.main(["--list", "--only", "ABSENT|made"], [absent, program(), program(name="third")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("not installed: no-such-distribution") and second.endswith(PATCH)


def test_programs_have_names_of_their_own_and_a_known_way() -> None:
    names = [one.name for one in programs.PROGRAMS]
    assert len(set(names)) == len(names) >= 8
    assert len({one.field for one in programs.PROGRAMS}) == 5
    assert all(one.way in programs.WAYS and one.timed and one.note for one in programs.PROGRAMS)


def test_every_package_of_a_program_is_in_the_requirements() -> None:
    text = (ROOT / "benchmarks" / "requirements-programs.txt").read_text()
    pinned = {
        row.split("==")[0].lower().replace("_", "-").replace(".", "-") for row in text.splitlines() if "==" in row
    }
    needed = {name.lower().replace("_", "-").replace(".", "-") for one in programs.PROGRAMS for name in one.requires}
    assert needed <= pinned


def test_tensors_are_found_in_what_packages_return() -> None:
    given = {"a": [torch.ones(2), (1.5, True)], "b": {"c": torch.zeros(1).numpy()}, "d": "text", "e": None}
    assert [tensor.tolist() for tensor in tensors_in(given)] == [[1.0, 1.0], 1.5, 1.0, [0.0]]


def test_layers_are_counted_with_cells() -> None:
    model = nn.ModuleList([nn.LSTM(2, 3), fused_rnn.GRUCell(2, 3), nn.Linear(2, 3)])
    assert [type(layer).__name__ for layer in recurrent_layers(model)] == ["LSTM", "GRUCell"]


def test_a_package_whose_library_does_not_load_is_imported_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_wheel.py").write_text("import sys\nif sys.made_up is None:\n    raise OSError('no libcuda')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "made_up", None, raising=False)
    with pytest.raises(OSError, match="no libcuda"):
        wheels.import_or_do_without("made_up_wheel", lambda: None)
    wheels.import_or_do_without("made_up_wheel", lambda: setattr(sys, "made_up", "done without"))
    assert "made_up_wheel" in sys.modules
    wheels.import_or_do_without("no_such_package", lambda: pytest.fail("it is not installed"))


# Results


@pytest.fixture(scope="module")
def result_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "made-up.json"
    absent = program(name="absent", requires=("no-such-distribution",))
    wrong = program(lambda: running(Wrong(off=1e-3)), name="wrong")
    right = [program(note="By a note."), program(name="another", field="speech", way=CONVERT)]
    assert programs.main([*ONE_ROUND, "--json", str(path)], [*right, wrong, absent]) == 1
    return path


def test_result_says_what_was_found(result_file: Path) -> None:
    result = json.loads(result_file.read_text())
    assert (result["kind"], result["schema"]) == ("programs", programs.SCHEMA)
    assert result["environment"]["peers"]["torch.nn"] == torch.__version__
    assert result["not_installed"] == [{"name": "absent", "field": "text", "missing": ["no-such-distribution"]}]
    first, _, wrong = result["programs"]
    assert first["layers"] == {"GRU": 1} and first["threads"] == 1 and first["version"] == torch.__version__
    assert len(first["seconds"]["fused"]["rounds"]) == 1 and first["ratio"]["torch.nn"]["median"] > 0
    assert first["parity"]["passed"] and len(first["parity"]["deviations"]) == 7
    assert not wrong["parity"]["passed"] and "seconds" not in wrong


def test_what_was_measured_undisturbed_is_kept_and_the_rest_measured(
    result_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(result_file.read_text())
    calm, disturbed, _ = result["programs"]
    calm["disturbed_rounds"]["kept"], disturbed["disturbed_rounds"]["kept"] = 0, 1
    kept, written = tmp_path / "kept.json", tmp_path / "written.json"
    kept.write_text(json.dumps(result))

    def not_again() -> Running:
        raise AssertionError("measured again")

    both = [program(not_again), program(not_again, name="another")]
    assert programs.main([*ONE_ROUND, "--keep", str(kept), "--json", str(written)], both) == 1
    first, second = json.loads(written.read_text())["programs"]
    assert first == calm and second["error"] == "AssertionError: measured again"

    result["environment"]["processor"] = "another"
    kept.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="processor is another, here it is"):
        programs.main([*ONE_ROUND, "--keep", str(kept)], both)


def test_a_line_says_threads_times_and_ratio(result_file: Path) -> None:
    first, _, wrong = json.loads(result_file.read_text())["programs"]
    assert "made up" in line(first) and " 1  " in line(first) and "x  ±" in line(first)
    assert passed(first) and not passed(wrong) and "PARITY FAILED" in line(wrong)
    assert "off by nan or inf" in line(wrong | {"parity": {"passed": False, "deviations": [not_finite()]}})


def not_finite() -> dict[str, Any]:
    return {"name": "outputs", "error": None, "tolerance": 1e-5}


def test_a_result_is_drawn_by_field(result_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = json.loads(result_file.read_text())
    figures = plot.figures(result)
    assert set(figures) == {"programs"}
    assert [axes.get_title(loc="left") for axes in figures["programs"].axes] == ["text", "speech"]
    assert plot.main([str(result_file), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "programs.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_the_docs_comes_from_a_result(result_file: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "in-your-program.md"
    page.write_text((ROOT / "docs" / "in-your-program.md").read_text())
    assert tables.main([str(result_file), "--root", str(tmp_path)]) == 0
    written = page.read_text()
    assert f"| made up | torch {torch.__version__} | patch | a step |" in written
    assert "made-up.json" in written and "Not the same numbers, and so not timed: wrong." in written
    assert "Not installed: absent." in written and "**made up**: By a note." in written
    assert "## In every way" in written  # what follows the figures is still there
    assert tables.main([str(result_file), "--root", str(tmp_path)]) == 0
    assert page.read_text() == written


def test_a_disturbed_figure_is_marked_as_one(result_file: Path) -> None:
    pytest.importorskip("matplotlib")
    result = json.loads(result_file.read_text())
    for record in result["programs"][:2]:
        record["disturbed_rounds"]["kept"] = 0
    assert "\\*" not in tables.programs(result, "made-up.json")
    result["programs"][0]["disturbed_rounds"]["kept"] = 1
    assert tables.programs(result, "made-up.json").count("\\*") == 2  # the figure, and what the mark means
    (text, *_), (speech, *_) = (axes.patches for axes in plot.figures(result)["programs"].axes)
    assert text.get_hatch() and not speech.get_hatch()


def test_a_result_without_times_makes_no_table(result_file: Path) -> None:
    wrong = json.loads(result_file.read_text())["programs"][-1]
    with pytest.raises(ValueError, match="no program was timed"):
        tables.programs({"programs": [wrong], "not_installed": []}, "made-up.json")


def test_numbers_of_a_result_have_six_digits() -> None:
    assert report.significant({"a": [1 / 3]}) == {"a": [0.333333]}
