"""The code that the documentation shows runs as it stands."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fused_rnn

PAGE = Path(__file__).parents[1] / "docs" / "in-your-program.md"
PACKAGE = Path(__file__).parents[1] / "fused_rnn"


@pytest.fixture(autouse=True)
def _nothing_stays_patched() -> Iterator[None]:
    yield
    fused_rnn.unpatch()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
def test_code_of_the_page_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python")
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for block in blocks:
        # with the page's own line numbers, in errors and for torch.jit.script, which reads the source
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, str(PAGE), "exec"), vars(page))
    assert torch.is_tensor(page.scripted(torch.zeros(1, 3, 16)))


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
