"""Products on AMX's matrix tiles: right on emulated tiles everywhere, in the layers where the processor has them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import compiled
from support.backends import available_isas
from support.cases import CELLS, Case, run
from support.compare import assert_within
from torch import nn

import fused_rnn
from fused_rnn.check import instruction_set

sys.path.insert(0, str(compiled.ROOT / "tools"))
from kernel_flags import MATH_FLAGS, X86_FLAGS

TILES = compiled.ROOT / "tests" / "tiles"
COMPILER = compiled.COMPILER[0]
EMULATION = f'-DFRNN_EMULATE_TILES="{TILES}/emulated_tiles.h"'
IS_X86 = platform.machine() in ("x86_64", "AMD64")

compiles = pytest.mark.compiles
with_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no compiler: {COMPILER} is not on PATH")
on_x86 = pytest.mark.skipif(not IS_X86, reason="of x86-64 alone")
with_tiles = pytest.mark.skipif(
    "avx512_amx" not in available_isas(), reason="this processor, or its system, has no AMX tiles"
)


def made(result: str, source: Path, *flags: str) -> Path:
    command = (*compiled.COMPILER, "-std=c++17", "-O1", *flags, f"-I{compiled.ROOT / 'csrc'}", str(source))
    (program,) = compiled.make([compiled.Step(compiled.BUILD / result, command)])
    return program


def assert_succeeds(program: Path) -> None:
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@compiles
@with_compiler
def test_products_on_emulated_tiles_equal_the_sums_written_down() -> None:
    """Of bytes up to the ends of both operands, and of int32."""
    assert_succeeds(made("tiles", TILES / "product.cpp", EMULATION))


@compiles
@with_compiler
@on_x86
def test_products_on_tiles_of_this_processor_equal_the_sums_written_down() -> None:
    flags = set(re.findall(r"\S+", Path("/proc/cpuinfo").read_text()))
    if lacking := {"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16"} - flags:
        pytest.skip(f"this processor lacks {', '.join(sorted(lacking))}")
    assert_succeeds(made("tiles-here", TILES / "product.cpp", *X86_FLAGS["avx512_amx"]))


@compiles
@with_compiler
@on_x86
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump on PATH")
def test_kernels_with_tiles_multiply_bytes_by_the_instruction_for_it() -> None:
    """Rows without a sign times weights with one, in the source that is compiled for processors with AMX."""
    flags = (*MATH_FLAGS, *X86_FLAGS["avx512_amx"], "-DFRNN_STREAMS_ALONE", "-O0", "-c")
    source = compiled.ROOT / "csrc" / "cpu" / "isa_avx512_amx.cpp"
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(made("tiles.o", source, *flags))]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    # AT&T's order: B, A, sums. tdpbssd, tdpbsud and tdpbuud are of other signs.
    products = set(re.findall(r"(tdpb[su]\w+)\s+%tmm(\d),%tmm(\d),%tmm(\d)", listing))
    assert {name for name, *_ in products} == {"tdpbusd"}
    assert {(int(a), int(b)) for _, b, a, _ in products} == {(4, 6), (4, 7), (5, 6), (5, 7)}


# Of a processor with everything that is chosen by.
EVERYTHING = "avx2 fma avx512f avx512bw avx512dq avx512vl avx512bf16 avx512vnni avx_vnni amx_tile amx_bf16 amx_int8"


@compiles
@with_compiler
@on_x86
@pytest.mark.parametrize(
    ("lacking", "permitted", "wanted", "found"),
    [
        ("", True, None, "avx512_amx dots=1 tiles=1 asked=1"),
        # Tiles of bfloat16 alone: bytes are multiplied as without tiles.
        ("amx_int8", True, None, "avx512_amx dots=1 tiles=0 asked=1"),
        # Tiles of bytes are those of a set whose other products are bfloat16's.
        ("amx_bf16", True, None, "avx512_bf16 dots=1 tiles=0 asked=0"),
        ("amx_tile", True, None, "avx512_bf16 dots=1 tiles=0 asked=0"),
        ("avx512bf16", True, None, "avx512 dots=1 tiles=0 asked=0"),
        ("avx512f", True, None, "avx2 dots=1 tiles=0 asked=0"),
        # The system permits none.
        ("", False, None, "avx512_bf16 dots=1 tiles=0 asked=1"),
        # Another set is asked for.
        ("", True, "avx512_bf16", "avx512_bf16 dots=1 tiles=0 asked=0"),
        ("", True, "avx512", "avx512 dots=1 tiles=0 asked=0"),
    ],
)
def test_bytes_go_to_tiles_where_processor_and_system_have_them(
    lacking: str, permitted: bool, wanted: str | None, found: str
) -> None:
    features = " ".join(name for name in EVERYTHING.split() if name != lacking)
    environment = {name: value for name, value in os.environ.items() if name != "FUSED_RNN_ISA"}
    if wanted is not None:
        environment["FUSED_RNN_ISA"] = wanted
    result = subprocess.run(
        [str(made("dispatch", TILES / "dispatch.cpp")), features, str(int(permitted))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment,
    )
    assert result.stdout.strip() == found


@compiles
@with_compiler
@on_x86
@pytest.mark.kernels
@pytest.mark.skipif("avx2" not in available_isas(), reason="this processor has no AVX2")
def test_int8_streams_of_many_rows_go_to_tiles_and_keep_their_bits() -> None:
    """16 rows and more, x, h and a projection, on emulated tiles against products without them."""
    assert_succeeds(made("tiles-streams", TILES / "streams.cpp", EMULATION, *MATH_FLAGS, *X86_FLAGS["avx2"]))


@pytest.mark.kernels
@with_tiles
@pytest.mark.parametrize("cell", CELLS)
def test_layers_on_tiles_match_float64(cell: str) -> None:
    case = Case(cell, input_size=45, hidden_size=70, batch=19, steps=7, bidirectional=True, dtype=torch.bfloat16)
    expected = run(case.build(nn).double(), case.data().to(torch.float64))
    with instruction_set("avx512_amx"):
        assert_within(run(case.build(fused_rnn), case.data()), expected)


@pytest.mark.kernels
@with_tiles
@pytest.mark.parametrize("rows", [15, 16, 17, 33, 80])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_int8_layers_on_tiles_give_the_bits_of_those_without(name: str, rows: int) -> None:
    from fused_rnn import _C

    layer = fused_rnn.quantize(getattr(fused_rnn, name)(45, 70, num_layers=2, bidirectional=True).eval())
    x = torch.randn(5, rows, 45)
    with torch.no_grad():
        with instruction_set("avx512"):
            assert not _C.multiplies_bytes_on_tiles()
            expected = layer(x)[0]
        with instruction_set("avx512_amx"):
            if not _C.multiplies_bytes_on_tiles():
                pytest.skip("this processor has tiles, but none of bytes")
            assert torch.equal(layer(x)[0], expected)
