"""Kernels for 64-bit Arm (NEON), cross-compiled and run by an emulator. No Arm processor has run any of this.

Skipped where the cross compiler or the emulator is missing: `make arm-tools` installs them.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import arm, compiled
from support.arm import ARM_FLAGS, X86_FLAGS, choose_sets
from support.cases import Case, Data, incoming_gradients, run
from support.compare import assert_same, assert_within
from test_activations import ULP_LIMITS, dense_samples, true_value, ulp_error
from test_quantized import grid_rows
from torch import Tensor, nn

import fused_rnn
from fused_rnn.check import draw_gains_
from fused_rnn.settings import CellKind

MISSING = arm.missing()
needs_tools = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of DType (csrc/problem.h)


def answered(path: Path, given: list[Any], **options: Any) -> list[bytes]:
    result = arm.run(path, given=arm.encoded(given), **options)
    assert result.returncode == 0, result.stderr.decode()
    return arm.arrays(result.stdout)


# ---- how it is built ------------------------------------------------------------------------------------------------

# What setup.py would have compiled there.
NINJA_OF_A_MACHINE = """
import pathlib, platform, runpy, sys
machine, folder = sys.argv[1:]
platform.machine = lambda: machine
sys.argv = ["setup.py", "--version"]
of_setup = runpy.run_path("setup.py")
of_setup["write_kernels_ninja"](pathlib.Path(folder), [], None)
"""


@pytest.mark.parametrize(
    "machine, expected",
    [
        ("aarch64", ARM_FLAGS),
        ("x86_64", X86_FLAGS),
        ("riscv64", {"portable": []}),
    ],
)
def test_a_build_compiles_the_kernels_of_its_architecture(
    machine: str, expected: dict[str, list[str]], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", NINJA_OF_A_MACHINE, machine, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "FUSED_RNN_ISAS"}
    subprocess.run(command, cwd=arm.ROOT, check=True, capture_output=True, timeout=300, env=environment)
    ninja = (tmp_path / "build.ninja").read_text()
    assert dict(re.findall(r"isa_(\w+)\.cpp\n  isa = (.*)", ninja)) == {n: " ".join(f) for n, f in expected.items()}
    assert "stack.cpp" in ninja and "team.cpp" in ninja


def test_sets_that_are_asked_for_are_those_of_the_architecture() -> None:
    assert list(choose_sets("aarch64", None, "sets")) == ["portable", "neon", "neon_bf16"]
    assert list(choose_sets("arm64", "neon_bf16,neon", "sets")) == ["neon", "neon_bf16"]
    assert list(choose_sets("aarch64", "portable", "sets")) == ["portable"]
    assert list(choose_sets("x86_64", "avx2", "sets")) == ["portable", "avx2"]
    assert list(choose_sets("armv7l", None, "sets")) == ["portable"]
    with pytest.raises(ValueError, match="sets: expected some of portable,neon,neon_bf16, got avx2"):
        choose_sets("aarch64", "avx2", "sets")
    with pytest.raises(ValueError, match="sets: neon_bf16 has bfloat16 kernels alone and needs neon beside it"):
        choose_sets("aarch64", "neon_bf16", "sets")
    with pytest.raises(ValueError, match="sets: avx512_amx has bfloat16 kernels alone and needs avx512 beside it"):
        choose_sets("x86_64", "avx512_amx", "sets")


# ---- what the processor has instructions for ------------------------------------------------------------------------


@pytest.mark.compiles
@needs_tools
@pytest.mark.parametrize("isa", ["neon", "neon_bf16"])
def test_products_and_conversions_equal_what_they_stand_for_bit_for_bit(isa: str) -> None:
    name = f"primitives_{isa}"
    program = arm.program(name, [arm.object_of(arm.SOURCES / "primitives.cpp", *arm.flags_of(isa), name=name)])
    result = arm.run(program)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
    assert result.stdout.decode().count("products are right") == (2 if isa == "neon" else 1)


@pytest.fixture(scope="module")
def activations() -> Path:
    return arm.program("activations", [arm.object_of(arm.SOURCES / "activations.cpp", *arm.flags_of("neon"))])


def activate(program: Path, name: str, values: Tensor) -> Tensor:
    given = [("tanh", "sigmoid").index(name), DTYPES.index(values.dtype), values]
    (result,) = answered(program, given, processor=arm.OLDEST)
    return arm.tensor(result, values.shape, values.dtype)


@pytest.mark.compiles
@needs_tools
@pytest.mark.parametrize("dtype", ULP_LIMITS, ids=str)
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_gate_functions_are_as_exact_as_those_of_other_processors(
    name: str, dtype: torch.dtype, activations: Path
) -> None:
    values = dense_samples(dtype)
    if name == "sigmoid":
        values = values[values > (-87.0 if dtype == torch.float32 else -708.0)]
    found = activate(activations, name, values)
    error = ulp_error(found, true_value(name, values))
    assert error.max() <= ULP_LIMITS[dtype], f"{error.max():.2f} ulp at {values[int(error.argmax())].item()!r}"
    assert found.max() <= 1 and found.min() >= (-1 if name == "tanh" else 0)

    infinity, largest = float("inf"), torch.finfo(dtype).max
    ends = torch.tensor([infinity, largest, -largest, -infinity, 0.0, -0.0, float("nan")], dtype=dtype)
    found = activate(activations, name, ends)
    low, middle = (-1.0, 0.0) if name == "tanh" else (0.0, 0.5)
    assert found[:6].tolist() == [1.0, 1.0, low, low, middle, middle] and found[6].isnan()
    if name == "tanh":
        assert torch.signbit(found[4:6]).tolist() == [False, True]


# ---- the C library --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streams() -> Path:
    library = arm.library()
    archive = library / "lib" / "libfused_rnn.a"
    flags = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{library / 'include'}")
    source = arm.ROOT / "tests" / "c_library" / "drive.c"
    command = (arm.C_COMPILER, "-static", *flags, str(source), str(archive))
    return compiled.make([compiled.Step(arm.BUILD / "streams", command, (archive,))])[0]


STREAMS: dict[str, Callable[..., Any]] = {
    "lstm": lambda **k: fused_rnn.LSTM(5, 20, **k),
    "gru": lambda **k: fused_rnn.GRU(7, 33, **k),
    "rnn": lambda **k: fused_rnn.RNN(6, 17, **k),
    "rnn relu, narrow": lambda **k: fused_rnn.RNN(3, 2, nonlinearity="relu", **k),
    "one unit": lambda **k: fused_rnn.LSTM(1, 1, **k),
    "three layers": lambda **k: fused_rnn.GRU(5, 21, 3, **k),
    "projection": lambda **k: fused_rnn.LSTM(5, 22, 2, proj_size=6, bias=False, **k),
    "wide": lambda **k: fused_rnn.LSTM(40, 130, **k),
    "lstm options": lambda **k: fused_rnn.LSTM(
        5, 20, 2, peephole=True, coupled_gates=True, cell_clip=0.3, zoneout=0.2, zoneout_cell=0.1, **k
    ),
    "activations": lambda **k: fused_rnn.LSTM(5, 20, activation="softsign", recurrent_activation="hard_sigmoid", **k),
    "heads": lambda **k: fused_rnn.GRU(5, 32, 2, num_heads=4, **k),
    "layer_norm": lambda **k: fused_rnn.LSTM(5, 24, 2, layer_norm=True, proj_size=8, **k),
}
# Rows: one takes several panels at once, so do two; more make tiles.
ROWS = {"lstm": 1, "gru": 2, "rnn": 13, "wide": 9}
STEPS = 12


def lengths_of(x: Tensor) -> Tensor:
    """As tests/c_library/drive.c calls it: the last row ends one step earlier."""
    steps, rows, _ = x.shape
    return torch.tensor([steps] * (rows - 1) + [steps - 1])


def stream_of(layer: Any, x: Tensor, program: Path, folder: Path, isa: str, processor: str) -> dict[str, Tensor]:
    """A step, a step of all rows in another order, the rest at once."""
    steps, rows, _ = x.shape
    settings = layer._settings()
    units, features, dtype = settings.hidden_size, settings.state_size, x.dtype
    fused_rnn.save_weights(layer, folder / "weights")
    (folder / "x").write_bytes(arm.bytes_of(x))
    files = folder / "weights", rows, folder / "x", folder / "y"
    result = arm.run(program, *files, processor=processor, isa=isa)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode() == f"{isa}\n"
    answer, at = (folder / "y").read_bytes(), steps * rows * features * dtype.itemsize
    found = {"output": arm.tensor(answer[:at], (steps, rows, features), dtype)}
    of_cell = torch.float32 if dtype == torch.bfloat16 else dtype
    of_h, of_c = features * dtype.itemsize, units * of_cell.itemsize * (settings.kind == CellKind.LSTM)
    states = [answer[i : i + of_h + of_c] for i in range(at, len(answer), of_h + of_c)]
    shape = settings.num_layers, rows
    found["h_n"] = torch.stack([arm.tensor(s[:of_h], (features,), dtype) for s in states]).view(*shape, features)
    if of_c:
        c_n = torch.stack([arm.tensor(s[of_h:], (units,), of_cell) for s in states]).view(*shape, units)
        found["c_n"] = c_n.to(dtype)
    return found


def made(name: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer = STREAMS[name](dtype=dtype).eval()
    draw_gains_(layer)
    return layer, torch.randn(STEPS, ROWS.get(name, 3), layer.input_size).to(dtype)


@pytest.mark.compiles
@needs_tools
@pytest.mark.parametrize("isa, dtype", [*(("neon", dtype) for dtype in DTYPES[:3]), ("neon_bf16", torch.bfloat16)])
@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_streams_match_the_formulas_in_float64(
    name: str, isa: str, dtype: torch.dtype, streams: Path, tmp_path: Path
) -> None:
    layer, x = made(name, dtype)
    with fused_rnn.use_backend("reference"):
        output, hx = copy.deepcopy(layer).double()(x.double(), lengths=lengths_of(x))
    hx = hx if isinstance(hx, tuple) else (hx,)
    expected = {"output": output} | dict(zip(("h_n", "c_n"), hx, strict=False))
    processor = arm.NEWEST if isa == "neon_bf16" else arm.OLDEST
    assert_within(stream_of(layer, x, streams, tmp_path, isa, processor), expected)


@needs_tools
@pytest.mark.parametrize("weights", ["int8", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "rnn relu, narrow", "projection", "wide", "heads"])
@torch.no_grad()
def test_streams_of_quantized_layers(name: str, weights: str, streams: Path, tmp_path: Path) -> None:
    """16-bit weights are float32 arithmetic. int8: a first step in which rounding changes nothing is, too; and the
    sums are the same with the instruction for them and without."""
    layer, x = made(name, torch.float32)
    small = fused_rnn.quantize(layer, weights=weights)
    x[0] = grid_rows(*x.shape[1:])
    found = stream_of(small, x, streams, tmp_path, "neon", arm.OLDEST)
    with fused_rnn.use_backend("reference"):
        output = small.dequantize().double()(x.double(), lengths=lengths_of(x))[0]
    if weights != "int8":
        return assert_within({"output": found["output"]}, {"output": output})
    if name not in ("projection", "heads"):  # of two layers, or with a product of what is not on the grid
        assert_within({"output": found["output"][:1]}, {"output": output[:1]})
    torch.testing.assert_close(found["output"], output.float(), rtol=0, atol=0.05)
    assert_same(found, stream_of(small, x, streams, tmp_path, "neon", arm.NEWEST))


@needs_tools
def test_a_row_is_the_same_bits_among_others_as_alone(streams: Path, tmp_path: Path) -> None:
    for name, dtype in (("wide", torch.float32), ("lstm", torch.bfloat16), ("gru", torch.float64)):
        layer, _ = made(name, dtype)
        x = torch.randn(STEPS, 17, layer.input_size).to(dtype)
        isa = "neon_bf16" if dtype == torch.bfloat16 else "neon"
        together = stream_of(layer, x, streams, tmp_path, isa, arm.NEWEST)["output"]
        for row in (0, 15):
            alone = stream_of(layer, x[:, row : row + 1], streams, tmp_path, isa, arm.NEWEST)["output"]
            assert_same(together[:-1, row : row + 1], alone[:-1])


@needs_tools
@pytest.mark.parametrize("processor, expected", [(arm.NEWEST, "neon_bf16"), (arm.OLDEST, "neon")])
def test_the_processor_decides_which_kernels_run(processor: str, expected: str, streams: Path, tmp_path: Path) -> None:
    layer, x = made("lstm", torch.bfloat16)
    fused_rnn.save_weights(layer, tmp_path / "weights")
    (tmp_path / "x").write_bytes(arm.bytes_of(x))
    files = tmp_path / "weights", x.shape[1], tmp_path / "x", tmp_path / "y"
    # A name that cannot run there is as none.
    for wanted in (None, "neon_bf16"):
        result = arm.run(streams, *files, processor=processor, isa=wanted)
        assert result.returncode == 0, result.stderr.decode()
        assert result.stdout.decode() == f"{expected}\n"


@needs_tools
@torch.no_grad()
def test_numbers_below_the_normal_ones_are_zero_in_a_call(streams: Path, tmp_path: Path) -> None:
    # tests/arm/layers.cpp sees to it that they are not after one.
    for dtype, tiny, small in ((torch.float32, 1e-40, 1e-30), (torch.float64, 1e-310, 1e-300)):
        layer = fused_rnn.RNN(4, 4, nonlinearity="relu", bias=False, dtype=dtype)
        layer.weight_ih_l0.copy_(torch.eye(4))
        layer.weight_hh_l0.zero_()
        x = torch.full((6, 2, 4), small, dtype=dtype)
        x[1::2] = tiny
        assert x.count_nonzero() == x.numel()
        output = stream_of(layer, x, streams, tmp_path, "neon", arm.OLDEST)["output"]
        assert_same(output[::2], x[::2])
        assert output[1::2].count_nonzero() == 0


@needs_tools
@pytest.mark.usefixtures("streams")  # which builds the library
def test_no_loop_over_k_keeps_sums_on_the_stack() -> None:
    """As tests/test_product_registers.py says of x86-64."""
    loops = [loop for isa in ("neon", "neon_bf16") for loop in arm.loops_of_products(isa)]
    assert {(loop.isa, loop.element) for loop in loops} == {
        ("neon", "float32"),
        ("neon", "float64"),
        *(("neon", stored) for stored in ("bfloat16 weights", "float16 weights", "int8", "int8, sdot")),
        ("neon_bf16", "bfloat16"),
    }
    assert not {str(loop): loop.on_the_stack for loop in loops if loop.on_the_stack}
    # The highest tiles that registers hold are there, and take several k of a row by one load of it.
    highest = {(loop.rows, loop.vectors): loop for loop in loops if loop.element == "float32" and loop.k == 4}
    for rows, vectors in ((6, 4), (7, 3), (8, 2), (8, 1)):
        loop = highest[rows, vectors]
        assert loop.multiplications == 4 * loop.sums and loop.loads <= rows + 4 * vectors


@needs_tools
@pytest.mark.usefixtures("streams")
def test_a_steps_instructions_are_about_those_of_its_products(tmp_path: Path) -> None:
    program = tmp_path / "steps"
    arm.compile_program(arm.library(), program)
    found = {}
    for processor in (arm.NEWEST, arm.OLDEST):
        fused_rnn.save_weights(fused_rnn.LSTM(64, 64), tmp_path / "weights", torch.bfloat16)
        found[processor] = arm.instructions_of_a_step(program, tmp_path / "weights", 1, processor)
    # 8192 multiply-adds of four numbers, each with a load of the weights; half as many dot products of bfloat16.
    assert 2 * 8192 < found[arm.OLDEST] < 4 * 8192
    assert 2 * 4096 < found[arm.NEWEST] < 0.75 * found[arm.OLDEST]


# ---- layers ---------------------------------------------------------------------------------------------------------

LAYER_KERNELS = [
    ("LSTM", torch.float32, "neon"),
    ("RNN_TANH", torch.float64, "neon"),
    ("GRU", torch.float16, "neon"),
    ("LSTM", torch.bfloat16, "neon_bf16"),
]
CELL_NAMES = {"LSTM": "Lstm", "GRU": "Gru", "RNN_TANH": "RnnTanh"}
ELEMENTS = dict(zip(DTYPES, ("float", "double", "BFloat16", "Half"), strict=True))


@pytest.fixture(scope="module")
def layers() -> Path:
    files = ["custom", "memory", "packed", "plan", "team"]
    objects = [arm.object_of(arm.ROOT / "csrc" / "cpu" / f"{file}.cpp") for file in files]
    objects.append(arm.object_of(arm.SOURCES / "layers.cpp"))
    for cell, dtype, isa in LAYER_KERNELS:
        given = CELL_NAMES[cell], ELEMENTS[dtype]
        flags = [*arm.flags_of(isa), f"-DCELL={given[0]}", f"-DELEMENT={given[1]}"]
        source = arm.SOURCES / "layer_kernels.cpp"
        objects.append(arm.object_of(source, *flags, name="_".join(("layer", isa, *given))))
    return arm.program("layers", objects)


def layer_of(case: Case, data: Data, program: Path, isa: str, threads: int, recomputes: bool) -> dict[str, Tensor]:
    """What `support.cases.run` gives."""
    layer: Any = case.build(nn)
    directions = 2 if case.bidirectional else 1
    units, features = case.hidden_size, case.proj_size or case.hidden_size
    x = data.input
    lengths = None if isinstance(x, Tensor) else x.batch_sizes
    rows = data.sequence if isinstance(x, Tensor) else x.data
    shapes = [(*rows.shape[:-1], directions * features), (directions, case.batch, features)]
    shapes += [(directions, case.batch, units)] * case.has_cell_state
    gradients = [x.to(case.dtype) for x in incoming_gradients([torch.empty(shape).double() for shape in shapes])]
    names = [
        f"{name}_l0{suffix}"
        for suffix in ("", "_reverse")[:directions]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    ]
    parameters = [getattr(layer, name, None) for name in names]
    kind = {"LSTM": CellKind.LSTM, "GRU": CellKind.GRU, "RNN_TANH": CellKind.RNN_TANH}[case.cell]
    parts = [int(kind), DTYPES.index(case.dtype), case.steps, case.batch, case.input_size, units, features]
    parts += [directions, threads, int(recomputes), lengths, rows, *data.states, *[None] * (2 - len(data.states))]
    used, *found = answered(program, [*parts, *parameters, *gradients, *[None] * (3 - len(gradients))])
    assert used.decode() == isa
    expected = [("output", shapes[0]), ("h_n", shapes[1]), ("c_n", shapes[-1]), ("grad(input)", rows.shape)]
    expected += [("grad(h_0)", shapes[1]), ("grad(c_0)", shapes[-1])]
    expected += [(f"grad({name})", () if p is None else p.shape) for name, p in zip(names, parameters, strict=True)]
    return {
        name: arm.tensor(array, shape, case.dtype)
        for (name, shape), array in zip(expected, found, strict=True)
        if array
    }


LAYERS = {
    "odd sizes": ({"input_size": 19, "hidden_size": 33, "batch": 9, "steps": 13, "hx": True}, 1),
    "both directions, two threads": (
        {"input_size": 6, "hidden_size": 37, "batch": 5, "steps": 7, "bidirectional": True, "hx": True},
        2,
    ),
    "packed": ({"input_size": 5, "hidden_size": 18, "batch": 6, "steps": 7, "packing": "sorted"}, 1),
    "one step, in place": ({"input_size": 10, "hidden_size": 21, "batch": 1, "steps": 1, "hx": True}, 1),
    "few rows, in place": ({"input_size": 9, "hidden_size": 22, "batch": 5, "steps": 2, "bias": False}, 1),
}


@pytest.mark.compiles
@needs_tools
@pytest.mark.parametrize("cell, dtype, isa", LAYER_KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_their_gradients_match_float64(
    name: str, cell: str, dtype: torch.dtype, isa: str, layers: Path
) -> None:
    keywords, threads = LAYERS[name]
    case = Case(cell, dtype=dtype, **keywords)
    expected = run(case.build(nn).double(), case.data().to(torch.float64))
    packed = case.argument(expected["grad(input)"])
    if not isinstance(packed, Tensor):
        expected["grad(input)"] = packed.data
    assert_within(layer_of(case, case.data(), layers, isa, threads, recomputes=False), expected)


@needs_tools
def test_projections_and_gates_computed_again_match_float64(layers: Path) -> None:
    case = Case("LSTM", input_size=7, hidden_size=30, batch=4, steps=9, proj=True, hx=True)
    expected = run(case.build(nn).double(), case.data().to(torch.float64))
    for recomputes in (False, True):
        assert_within(layer_of(case, case.data(), layers, "neon", 1, recomputes), expected)
