"""What the package promises of its own parts: imports without a circle, one record of settings on both sides."""

from __future__ import annotations

import ast
import graphlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import Case

import fused_rnn
from fused_rnn import settings
from fused_rnn.settings import INTEGER_SETTINGS, CellKind, Controls, Settings

PACKAGE = Path(fused_rnn.__file__).parent

# Lowest first. A module of the library imports only what stands in a line above its own.
LEVELS = [
    {"settings", "expressions"},
    {"formulas", "_checks", "batching", "flops"},
    {"ops", "onnx_nodes"},
    {"backend"},
    {"functional", "packed_weights"},
    {"reference", "weights", "initial", "carried", "options"},
    {"twin"},
    {"compiling"},
    {"layers", "cells"},
    {"indrnn", "custom"},
    {"subclasses", "explain", "diagnostics"},
    {"class_tests"},
    {"convert"},
    {"patching", "quantized"},
    {"stream"},
    {"opacus", "saving"},
    {"__init__"},
]
LIBRARY = set().union(*LEVELS)
# Programs: they import what they like, and nothing of the library imports them.
MAY_KNOW_THE_EXTENSION = {"ops", "info", "check", "bench"}


def module_of(path: Path) -> str:
    """`settings`, `bench.cases`; `__init__` for the package's own file."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported_by(source: str, module: str, files: set[str]) -> set[str]:
    """Modules of the package that the source imports, in functions, too; what only a type checker reads is left out."""
    found: set[str] = set()

    def name_of(dotted: str) -> None:
        """The longest part of it that is a module."""
        parts = dotted.split(".")
        while parts and ".".join(parts) not in files:
            parts.pop()
        found.add(".".join(parts) or "__init__")

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fused_rnn":
                    name_of(alias.name.removeprefix("fused_rnn").removeprefix("."))
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if (PACKAGE / module.replace(".", "/")).is_dir() else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            elif base.split(".")[0] == "fused_rnn":
                base = base.removeprefix("fused_rnn").removeprefix(".")
            else:
                base = ""
                node = ast.Pass()
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name_of(f"{base}.{alias.name}".strip("."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def imports() -> dict[str, set[str]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    files = {module_of(path) for path in paths} | {"_C"}
    return {module_of(path): imported_by(path.read_text(), module_of(path), files) for path in paths}


def test_what_counts_as_an_import() -> None:
    source = """
import os, fused_rnn.ops as o
from . import _C, formulas
from .settings import Settings
from .bench.cases import Case
if TYPE_CHECKING:
    from . import layers
else:
    from . import cells
def late():
    from fused_rnn import backend, LSTM
    from torch import nn
"""
    files = {"ops", "_C", "formulas", "settings", "layers", "cells", "backend", "bench", "bench.cases", "__init__"}
    found = imported_by(source, "functional", files)
    assert found == {"ops", "_C", "formulas", "settings", "bench.cases", "cells", "backend", "__init__"}


def test_imports_have_no_circle() -> None:
    graph = {module: names - {module} for module, names in imports().items()}
    # raises CycleError, which names it
    list(graphlib.TopologicalSorter(graph).static_order())


def test_every_module_of_the_library_imports_only_from_below() -> None:
    rank = {name: number for number, names in enumerate(LEVELS) for name in names}
    wrong = [
        f"{module} imports {name}"
        for module, names in imports().items()
        if module in LIBRARY
        for name in names - {"_C"}
        if name not in LIBRARY or rank[name] >= rank[module]
    ]
    assert not wrong


def test_every_module_is_of_the_library_or_a_program() -> None:
    programs = {"__main__", "info", "check", "bench", "demo"}
    assert {module.split(".")[0] for module in imports()} == LIBRARY | programs


def test_only_the_operators_and_programs_know_the_compiled_module() -> None:
    found = {module.split(".")[0] for module, names in imports().items() if "_C" in names}
    assert found <= MAY_KNOW_THE_EXTENSION and "ops" in found


# ---- the record of settings -----------------------------------------------------------------------------------------


@pytest.mark.kernels
def test_both_sides_have_the_same_settings_in_the_same_order() -> None:
    from fused_rnn import _C

    assert tuple(_C.integer_settings()) == INTEGER_SETTINGS
    assert _C.operators_version == settings.OPERATORS_VERSION


@pytest.mark.kernels
def test_cells_have_the_same_numbers_on_both_sides() -> None:
    """Shown by what the operator saves and demands of each: gates for the LSTM, whose cell state no other has."""
    for kind, name in zip(CellKind, ("RNN_TANH", "RNN_RELU", "LSTM", "GRU"), strict=True):
        case = Case(cell=name)
        layer, data = case.build(fused_rnn), case.data()
        integers, numbers = layer._settings().flatten()
        assert integers[0] == kind and settings.CellKind[name] is kind
        result = torch.ops.fused_rnn.rnn_forward(
            data.sequence, None, None, [*layer.parameters()], [], integers, numbers, True
        )
        assert (result[2].numel() > 0) == (kind is CellKind.LSTM)
        torch.testing.assert_close(result[0], layer(data.sequence)[0], rtol=0, atol=0)


def every_setting() -> list[Settings]:
    flags = (False, True)
    found = []
    for kind, bias, num_layers, bidirectional, batch_first, recompute in itertools.product(
        CellKind, flags, (1, 3), flags, flags, flags
    ):
        state_size = 2 if kind is CellKind.LSTM and bias else 4
        found.append(Settings(3, 4, state_size, kind, bias, num_layers, bidirectional, batch_first, recompute))
    return found


@pytest.mark.parametrize("given", every_setting(), ids=lambda s: "-".join(map(str, s.flatten()[0])))
def test_settings_come_out_of_the_operators_lists_as_they_went_in(given: Settings) -> None:
    from fused_rnn._checks import param_specs

    integers, numbers = given.flatten()
    assert all(type(value) is int for value in integers) and all(type(value) is float for value in numbers)
    params = [torch.empty(shape, device="meta") for _, shape in param_specs(given)]
    restored = Settings.restore(integers, numbers, torch.empty(5, 2, given.input_size), params)
    assert restored == given
    assert restored.flatten() == (integers, numbers)


@pytest.mark.parametrize("there", list(itertools.product((False, True), repeat=len(Controls._fields))), ids=str)
def test_controls_come_out_of_the_operators_list_as_they_went_in(there: tuple[bool, ...]) -> None:
    tensors: list[Any] = [torch.full((2,), i) for i in range(len(there))]
    given = Controls(*(t if is_there else None for t, is_there in zip(tensors, there, strict=True)))
    flat = given.flatten(torch.zeros(2, 2, 3))
    assert len(flat) == (len(there) if any(there) else 0)
    restored = Controls.restore(flat) if flat else Controls()
    assert all(a is b for a, b in zip(restored, given, strict=True))


@pytest.mark.parametrize("module", [fused_rnn.LSTM(3, 4, proj_size=2), fused_rnn.GRUCell(3, 4, bias=False)], ids=repr)
def test_settings_of_modules_have_all_fields_in_their_places(module: Any) -> None:
    found = module._settings()
    sizes = {"input_size": 3, "hidden_size": 4}
    if isinstance(module, torch.nn.RNNBase):
        expected = Settings(**sizes, state_size=2, kind=CellKind.LSTM)
    else:
        names = ("weight_ih", "weight_hh")
        expected = Settings(**sizes, state_size=4, kind=CellKind.GRU, bias=False, cell_names=names)
    assert found == expected and type(found) is Settings


WITHOUT_THE_EXTENSION = """
import sys
sys.modules["fused_rnn._C"] = None
import torch, fused_rnn
layer, x = fused_rnn.LSTM(2, 3), torch.randn(4, 1, 2)
with fused_rnn.use_backend("reference"):
    print(tuple(layer(x)[0].shape))
layer(x)
"""


def test_without_the_extension_the_formulas_run_and_other_calls_say_what_is_missing() -> None:
    command = [sys.executable, "-c", WITHOUT_THE_EXTENSION]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.stdout == "(4, 1, 3)\n", result.stderr
    assert "ImportError: fused_rnn's compiled extension is not built, or cannot be loaded: " in result.stderr
    assert "fused_rnn._C" in result.stderr.splitlines()[-1]
