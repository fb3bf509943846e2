"""Products on AMX's matrix tiles: right on emulated tiles everywhere, in the layers where the processor has them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.backends import available_isas
from support.cases import CELLS, Case, run
from support.compare import assert_within
from torch import nn

import fused_rnn
from fused_rnn.check import instruction_set

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shlex.split(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(not shutil.which(COMPILER[0]), reason=f"no compiler: {COMPILER[0]} is not on PATH")
def test_product_on_emulated_tiles_equals_the_sums_written_down(tmp_path: Path) -> None:
    program = tmp_path / "product"
    emulation = f'-DFRNN_EMULATE_TILES="{ROOT}/tests/tiles/emulated_tiles.h"'
    source = ROOT / "tests" / "tiles" / "product.cpp"
    command = [*COMPILER, "-std=c++17", "-O1", emulation, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.kernels
@pytest.mark.skipif("avx512_amx" not in available_isas(), reason="this processor, or its system, has no AMX tiles")
@pytest.mark.parametrize("cell", CELLS)
def test_layers_on_tiles_match_float64(cell: str) -> None:
    case = Case(cell, input_size=45, hidden_size=70, batch=19, steps=7, bidirectional=True, dtype=torch.bfloat16)
    expected = run(case.build(nn).double(), case.data().to(torch.float64))
    with instruction_set("avx512_amx"):
        assert_within(run(case.build(fused_rnn), case.data()), expected)
