"""The code that the documentation shows runs as it stands."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_rnn

PAGE = Path(__file__).parents[1] / "docs" / "in-your-program.md"


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
