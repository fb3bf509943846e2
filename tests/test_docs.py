"""The code that the documentation shows runs as it stands."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_rnn
from fused_rnn.settings import LAYER_OPTIONS
from fused_rnn.twin import HasTwin

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "in-your-program.md"
WAYS = ("by-name", "patch", "convert", "subclasses")
PACKAGE = Path(__file__).parents[1] / "fused_rnn"


@pytest.fixture(autouse=True)
def _nothing_stays_patched() -> Iterator[None]:
    yield
    fused_rnn.unpatch()


def run_page(path: Path, monkeypatch: pytest.MonkeyPatch, **given: object) -> types.ModuleType:
    """Run the code that a page shows from top to bottom, and return what it has defined."""
    text = path.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python")
    page = types.ModuleType("page")
    vars(page).update(given)
    monkeypatch.setitem(sys.modules, "page", page)
    for block in blocks:
        # with the page's own line numbers, in errors and for torch.jit.script, which reads the source
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, str(path), "exec"), vars(page))
    return page


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
def test_code_of_the_page_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_page(PAGE, monkeypatch)
    assert torch.is_tensor(page.scripted(torch.zeros(1, 3, 16)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("way", WAYS)
def test_code_of_the_page_on_a_way_runs_from_top_to_bottom(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_page(DOCS / "in-your-program" / f"{way}.md", monkeypatch)
    made = {"by-name": "memory", "patch": "late", "convert": "model", "subclasses": "scaled"}[way]
    assert any(isinstance(module, HasTwin) for module in vars(page)[made].modules())


def test_all_pages_with_code_are_run_here() -> None:
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "```python" in path.read_text()}
    ways = {f"in-your-program/{way}.md" for way in WAYS}
    assert pages == {
        "in-your-program.md",
        "index.md",
        "c-library.md",  # tests/test_c_library_programs.py
        "migrating.md",
        "diagnostics.md",
        "exporting.md",
        "new-cell.md",
        "options.md",
        "private-training.md",  # tests/test_opacus.py
        "resets.md",
        "quantization.md",
        "serving.md",
        "state-sequences.md",
        "variable-lengths.md",
        *ways,
    }


@pytest.mark.compiles
def test_code_of_the_page_on_new_cells_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = re.findall(r"```cpp\n(// (\w+\.h).*?)```", (DOCS / "new-cell.md").read_text(), re.DOTALL)
    for text, name in headers:
        (tmp_path / name).write_text(text)
        example = DOCS.parent / "examples" / "cells" / name
        assert example.read_text() == text
    assert len(headers) == 3
    monkeypatch.chdir(tmp_path)
    page = run_page(DOCS / "new-cell.md", monkeypatch, torch=torch, fused_rnn=fused_rnn)
    assert page.model.rate.grad.count_nonzero() > 0 and page.output.shape == (20, 4, 32)


def test_code_of_the_page_on_options_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_page(DOCS / "options.md", monkeypatch, torch=torch, fused_rnn=fused_rnn)
    assert page.model.lstm.carried_h is None and page.model.lstm.weight_hh_l0.grad is not None


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:# The axis name", "ignore:.*torch.jit.*is deprecated")
def test_code_of_the_page_on_exporting_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    page = run_page(DOCS / "exporting.md", monkeypatch)
    assert {node.op_type for node in page.onnx_program.model_proto.graph.node} >= {"LSTM", "Transpose"}
    assert (tmp_path / "tagger.onnx").exists() and (tmp_path / "tagger.pt2").exists()


def test_code_of_the_page_on_diagnostics_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(DOCS / "diagnostics.md", monkeypatch, torch=torch, fused_rnn=fused_rnn)
    assert re.search(r"gradient flow of rnn.*\|dL/dc\| layer 1.*gates of rnn", capsys.readouterr().out, re.DOTALL)


def test_page_on_options_has_all_of_them_and_tests_that_exist() -> None:
    rows = re.findall(r"^\| `(\w+)=.*\| `([\w/.]+)` \|$", (DOCS / "options.md").read_text(), re.MULTILINE)
    assert {option for option, _ in rows} == set(LAYER_OPTIONS)
    tests = "".join((Path(__file__).parent / name).read_text() for name in ("test_options.py", "test_within.py"))
    for _, name in rows:
        assert (Path(__file__).parents[1] / name).exists() if "/" in name else f"def {name}(" in tests


def test_code_of_the_first_page_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = run_page(DOCS / "index.md", monkeypatch)
    assert page.x.grad is not None and type(page.model.recurrent) is fused_rnn.GRU
    assert "LSTM" in capsys.readouterr().out


def test_code_of_the_page_on_quantization(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a state dict
    page = run_page(DOCS / "quantization.md", monkeypatch, torch=torch, fused_rnn=fused_rnn)
    assert list(page.report.converted) == ["recurrent"]
    assert "torch.float64" in page.report.left_alone["other"]


def test_code_of_the_page_on_serving_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_page(DOCS / "serving.md", monkeypatch, torch=torch, fused_rnn=fused_rnn)
    assert not page.output[5:, 1].any() and len({id(stream._packed) for stream in page.fleet}) == 1
    assert len(page.pool) == 1


def test_code_of_the_page_on_resets_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"layer": fused_rnn.GRU(4, 6), "x": torch.randn(5, 3, 4), "hx": None}
    names |= {"reset": torch.rand(5, 3) < 0.3, "initial": torch.zeros(1, 3, 6)}
    page = run_page(DOCS / "resets.md", monkeypatch, torch=torch, fused_rnn=fused_rnn, **names)
    assert page.model.initial.grad is not None and page.model.initial.grad.count_nonzero() > 0
    for episode, (begin, end) in enumerate(((0, 5), (5, 8), (8, 16))):
        alone = page.model.lstm(page.episodes[episode])[0]
        torch.testing.assert_close(page.in_one_row[begin:end, 0], alone)
        torch.testing.assert_close(page.in_three_rows[: end - begin, episode], alone)
    parts = page.episodes[0].split([2, 3])
    torch.testing.assert_close(page.output[:5, 0], torch.cat([page.model.lstm(part)[0] for part in parts]))


def test_code_of_the_page_on_states_of_every_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"lstm": fused_rnn.LSTM(4, 6), "gru": fused_rnn.GRU(4, 6), "x": torch.randn(5, 3, 4)}
    page = run_page(DOCS / "state-sequences.md", monkeypatch, torch=torch, fused_rnn=fused_rnn, **names)
    assert page.network.lstm.weight_hh_l0.grad.count_nonzero() > 0 and page.stack.weight_hh_l0.grad.count_nonzero() > 0
    # the weights have not changed since: a window has the numbers of the whole
    whole = page.network.lstm(page.observations, page.begin)[0]
    alone = page.network.lstm(page.window, tuple(s[:, page.first, page.row] for s in page.stored))[0]
    torch.testing.assert_close(alone, whole[page.step, page.row])
    torch.testing.assert_close(page.output, alone[page.burn_in :])


def test_code_of_the_page_on_lengths_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, lengths = fused_rnn.GRU(4, 6), torch.randn(5, 3, 4), torch.tensor([5, 2, 4])
    mask = torch.arange(5).unsqueeze(1) < lengths
    pack = torch.nn.utils.rnn.pack_padded_sequence
    page = run_page(
        DOCS / "variable-lengths.md",
        monkeypatch,
        layer=layer,
        x=x,
        lengths=lengths,
        mask=mask,
        pack_padded_sequence=pack,
    )
    torch.testing.assert_close(page.h_n, layer(x, lengths=lengths)[1])


def test_weights_from_haste_give_its_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step, written as haste computes it: lib/lstm_forward_gpu and gru_forward_gpu of its source."""
    page = run_page(DOCS / "migrating.md", monkeypatch)
    inputs, units = 3, 4
    x, h, c = torch.randn(1, 2, inputs), torch.randn(1, 2, units), torch.randn(1, 2, units)

    kernel, recurrent, bias = torch.randn(inputs, 4 * units), torch.randn(units, 4 * units), torch.randn(4 * units)
    i, g, f, o = (x[0] @ kernel + h[0] @ recurrent + bias).split(units, dim=1)
    expected = f.sigmoid() * c[0] + i.sigmoid() * g.tanh()
    output, (_, new_c) = page.lstm_from_haste(kernel, recurrent, bias)(x, (h, c))
    torch.testing.assert_close(new_c[0], expected)
    torch.testing.assert_close(output[0], o.sigmoid() * expected.tanh())

    kernel, recurrent = torch.randn(inputs, 3 * units), torch.randn(units, 3 * units)
    biases = torch.randn(3 * units), torch.randn(3 * units)
    of_x, of_h = (x[0] @ kernel + biases[0]).split(units, 1), (h[0] @ recurrent + biases[1]).split(units, 1)
    z, r = ((of_x[k] + of_h[k]).sigmoid() for k in (0, 1))
    g = (of_x[2] + r * of_h[2]).tanh()
    output, _ = page.gru_from_haste(kernel, recurrent, *biases)(x, h)
    torch.testing.assert_close(output[0], z * h[0] + (1 - z) * g)


def test_every_test_that_the_pytorch_page_names_exists() -> None:
    text = (PAGE.parent / "pytorch.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > 40
    folder = Path(__file__).parent
    missing = [f"{file}::{name}" for file, name in sorted(named) if f"def {name}(" not in (folder / file).read_text()]
    assert not missing


def test_every_link_of_the_pytorch_page_is_given_and_used() -> None:
    text = (PAGE.parent / "pytorch.md").read_text()
    given, used = set(re.findall(r"^\[(\d+)\]: ", text, re.MULTILINE)), set(re.findall(r"(?<=[( ])\[(\d{3,})\]", text))
    assert given == used


def _messages(node: ast.AST) -> Iterator[str]:
    """Of every error that a module raises, a regular expression for its text."""
    for raised in ast.walk(node):
        if not (isinstance(raised, ast.Raise) and isinstance(raised.exc, ast.Call)) or not raised.exc.args:
            continue
        text = raised.exc.args[0]
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        yield "".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".*" for p in parts)


def test_every_message_of_the_checks_is_found_on_the_troubleshooting_page() -> None:
    messages = list(_messages(ast.parse((PACKAGE / "_checks.py").read_text())))
    assert len(messages) > 40
    shown = re.findall(r"`([^`]+)`", (PAGE.parent / "troubleshooting.md").read_text())
    missing = [message for message in messages if not any(re.fullmatch(message, text) for text in shown)]
    assert not missing


SEQUENCE = torch.zeros(5, 3, 8)
SHOWN: dict[str, Callable[[], object]] = {
    "hidden_size: expected an int, got 64.0 (float)": lambda: fused_rnn.LSTM(8, 64.0),  # type: ignore[arg-type]
    "recomput: unexpected keyword argument of a layer, which has recompute": lambda: fused_rnn.LSTM(
        8, 64, recomput=True
    ),
    "proj_size: expected 0 for GRU": lambda: fused_rnn.GRU(8, 64, proj_size=8),
    "input: expected input_size 8 as its last dimension, got (5, 2, 9)": lambda: fused_rnn.LSTM(8, 64)(
        torch.zeros(5, 2, 9)
    ),
    "hx: expected a tuple (h_0, c_0) of two Tensors or None, got a Tensor of shape (1, 2, 64)": lambda: fused_rnn.LSTM(
        8, 64
    )(SEQUENCE, torch.zeros(1, 2, 64)),
    "lengths: expected 0 to 5, the steps of the input, got 7": lambda: fused_rnn.GRU(8, 64)(
        SEQUENCE, lengths=torch.tensor([5, 7, 1])
    ),
    "mask: expected (5, 3), (T, B), got (3, 5)": lambda: fused_rnn.GRU(8, 64)(
        SEQUENCE, mask=torch.ones(3, 5, dtype=torch.bool)
    ),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_messages_are_shown_as_they_are(shown: str) -> None:
    assert shown in (PAGE.parent / "troubleshooting.md").read_text()
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        SHOWN[shown]()
    assert str(error.value).startswith(shown)
