"""Products on AMX's matrix tiles: right on emulated tiles everywhere, in the layers where the processor has them."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from support import compiled
from support.backends import available_isas
from support.cases import CELLS, Case, run
from support.compare import assert_within
from torch import nn

import fused_rnn
from fused_rnn.check import instruction_set

TILES = compiled.ROOT / "tests" / "tiles"
COMPILER = compiled.COMPILER[0]


@pytest.mark.compiles
@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no compiler: {COMPILER} is not on PATH")
def test_product_on_emulated_tiles_equals_the_sums_written_down() -> None:
    emulation = f'-DFRNN_EMULATE_TILES="{TILES}/emulated_tiles.h"'
    flags = ("-std=c++17", "-O1", emulation, f"-I{compiled.ROOT / 'csrc'}")
    (program,) = compiled.make(
        [compiled.Step(compiled.BUILD / "tiles", (*compiled.COMPILER, *flags, str(TILES / "product.cpp")))]
    )
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
