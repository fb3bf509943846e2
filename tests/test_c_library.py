"""The C library (include/fused_rnn.h): the numbers of streams, and no input that it does not survive."""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backends import available_isas
from support.compare import assert_same
from torch import Tensor, nn

import fused_rnn
from fused_rnn import Stream, saving
from fused_rnn.check import instruction_set

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests/c_library"
CORPUS = sorted((ROOT / "tests/data/c_library").glob("*.safetensors"))
STEPS, B, F, H = 12, 3, 5, 20

# What is compiled for tests: the best that runs here, what it takes other dtypes' kernels from, and the portable one.
BEST = available_isas()[0] if available_isas() else "portable"
SETS = ["portable", "avx2" if BEST == "avx2" else "avx512", "avx512_bf16", "avx512_amx"]
SETS = SETS[: SETS.index(BEST) + 1] if BEST in SETS else [] if platform.machine() != "x86_64" else ["portable"]
ISAS = ["--isas", ",".join(SETS)] if SETS else []  # else all that the processor's family has
TESTED = list(dict.fromkeys((BEST, "portable")))

COMPILERS = [["gcc"], ["clang"]]


def is_there(program: str) -> str:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    return program


def run(*command: Any, **keywords: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **keywords)


def compiled(*command: Any) -> None:
    result = run(*command)
    assert result.returncode == 0 and not result.stderr, result.stderr


def build(name: str, *arguments: str) -> Path:
    """The library in a folder of its own that is kept: processes that share the tests wait for the one that builds."""
    out = ROOT / "build" / name
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run(sys.executable, ROOT / "tools/build_library.py", "--out", out, *arguments)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def library() -> Path:
    return build("library-tests", *ISAS)


class Layer(ctypes.Structure):
    NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_peephole")
    NORMS = ("weight_norm_ih", "weight_norm_hh", "weight_norm_c", "bias_norm_c")
    SCALES = ("scale_ih", "scale_hh", "scale_hr")
    _fields_ = [(name, ctypes.c_void_p) for name in NAMES + NORMS + SCALES]


class Description(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("struct_size", "layer_size")),
        *((name, ctypes.c_int32) for name in ("cell", "dtype")),
        *((name, ctypes.c_int64) for name in ("num_layers", "input_size", "hidden_size", "proj_size", "num_heads")),
        *((name, ctypes.c_int32) for name in ("activation", "recurrent_activation", "peephole", "coupled_gates")),
        *((name, ctypes.c_int32) for name in ("layer_norm", "matrix_format")),
        *((name, ctypes.c_double) for name in ("cell_clip", "zoneout", "zoneout_cell")),
        ("layers", ctypes.POINTER(Layer)),
        ("instruction_set", ctypes.c_char_p),
    ]

    def __init__(self, **values: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(Description), layer_size=ctypes.sizeof(Layer), **values)


ERRORS = {
    name.lower(): int(number)
    for name, number in re.findall(r"FUSED_RNN_ERROR_(\w+) = (\d+)", (ROOT / "include/fused_rnn.h").read_text())
}
DTYPES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3}


class Library:
    """The functions of the header; those that return an error raise what it says."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.fused_rnn_error_text.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        error = getattr(self.c, f"fused_rnn_{name}")(*arguments)
        if error:
            raise RuntimeError(self.text(error))

    def code(self, name: str, *arguments: Any) -> int:
        return getattr(self.c, f"fused_rnn_{name}")(*arguments)

    def text(self, error: int) -> str:
        return self.c.fused_rnn_error_text(error).decode()

    def load(self, path: Path, isa: str | None = None) -> ctypes.c_void_p:
        weights = ctypes.c_void_p()
        self.call("weights_load", str(path).encode(), isa.encode() if isa else None, ctypes.byref(weights))
        return weights

    def stream(self, weights: ctypes.c_void_p, rows: int = 1) -> ctypes.c_void_p:
        stream = ctypes.c_void_p()
        self.call("stream_create", weights, ctypes.c_int64(rows), None, ctypes.c_size_t(0), ctypes.byref(stream))
        return stream

    def step(self, stream: ctypes.c_void_p, x: Tensor, output_size: int) -> Tensor:
        x = x.contiguous()
        y = torch.full((x.shape[0], output_size), float("nan"), dtype=x.dtype)
        self.call("step", stream, address(x), address(y))
        return y

    def chunk(self, stream: ctypes.c_void_p, x: Tensor, output_size: int, lengths: Any = None) -> Tensor:
        x = x.contiguous()
        y = torch.full((*x.shape[:2], output_size), float("nan"), dtype=x.dtype)
        given = None if lengths is None else (ctypes.c_int64 * len(lengths))(*lengths)
        self.call("chunk", stream, ctypes.c_int64(x.shape[0]), given, address(x), address(y))
        return y


@pytest.fixture(scope="module")
def c(library: Path) -> Library:
    return Library(library / "lib/libfused_rnn.so")


def address(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: fused_rnn.LSTM(F, H),
    "gru": lambda: fused_rnn.GRU(F, H, 2),
    "rnn": lambda: fused_rnn.RNN(F, H),
    "rnn relu, narrow": lambda: fused_rnn.RNN(F, 7, nonlinearity="relu"),
    "rnn, an odd number of vectors": lambda: fused_rnn.RNN(F, 40, nonlinearity="softsign", bias=False),
    "projection": lambda: fused_rnn.LSTM(F, H, 3, proj_size=6, bias=False),
    "lstm options": lambda: fused_rnn.LSTM(
        F, H, 2, peephole=True, coupled_gates=True, cell_clip=0.3, zoneout=0.2, zoneout_cell=0.1
    ),
    "activations": lambda: fused_rnn.LSTM(F, H, activation="relu", recurrent_activation="hard_sigmoid"),
    "heads": lambda: fused_rnn.GRU(F, H, 2, num_heads=4),
    "layer_norm": lambda: fused_rnn.LSTM(F, H, 2, layer_norm=True, proj_size=6),
    "layer_norm, heads": lambda: fused_rnn.GRU(F, 64, layer_norm=True, num_heads=4, zoneout=0.1),
    "one bias": lambda: fused_rnn.LSTM(F, H, recurrent_bias=False),
    "indrnn": lambda: fused_rnn.IndRNN(F, H, 2),
    "torch.nn": lambda: nn.LSTM(F, H, 2, batch_first=True, dropout=0.5),
    "cell": lambda: nn.GRUCell(F, H),
    "wide": lambda: fused_rnn.LSTM(F, 130),
}


def made(name: str) -> Any:
    module = MODULES[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize("isa", TESTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_saved_layer_says_bit_for_bit_what_its_stream_says(
    name: str, dtype: torch.dtype, isa: str, c: Library, tmp_path: Path
) -> None:
    module = made(name)
    fused_rnn.save_weights(module, tmp_path / "weights", dtype)
    weights = c.load(tmp_path / "weights", isa)
    own = c.stream(weights, B)
    x = torch.randn(STEPS, B, F).to(dtype)
    with instruction_set(isa):
        stream = Stream(module, B, dtype)
        P = stream.output_size
        for row in x[:3]:
            assert_same(c.step(own, row, P), stream.step(row))
        lengths = [4, 0, 2]
        assert_same(c.chunk(own, x[3:7], P, lengths), stream.chunk(x[3:7], lengths))
        assert_same(c.chunk(own, x[7:], P), stream.chunk(x[7:]))
        h, cell = stream._states(None, True)
        twin = c.stream(weights, 2)
        for layer in range(h.shape[0]):
            for row in range(B):
                read_h = torch.empty(P, dtype=dtype)
                read_c = None if cell is None else torch.empty_like(cell[layer, row])
                to_c = None if read_c is None else address(read_c)
                c.call("read_state", own, ctypes.c_int64(layer), ctypes.c_int64(row), address(read_h), to_c)
                assert_same(read_h, h[layer, row])
                if cell is not None:
                    assert_same(read_c, cell[layer, row])
                # Into another row of another stream, which goes on from there.
                if row == 0:
                    c.call("write_state", twin, ctypes.c_int64(layer), ctypes.c_int64(1), address(read_h), to_c)
        c.call("reset", own, ctypes.c_int64(1))
        stream.reset([1])
        last = stream.step(x[0])
        assert_same(c.step(own, x[0], P), last)
        assert_same(c.step(twin, x[0, :2].flip(0), P)[1], last[0])
    for one in (own, twin):
        c.c.fused_rnn_stream_destroy(one)
    c.c.fused_rnn_weights_destroy(weights)


@pytest.mark.compiles
@pytest.mark.parametrize("isa", TESTED)
@pytest.mark.parametrize("weights", ["int8", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["lstm", "gru", "rnn", "projection", "lstm options", "heads", "layer_norm", "cell", "wide"]
)
def test_a_saved_quantized_layer_says_what_its_stream_says(
    name: str, weights: str, isa: str, c: Library, tmp_path: Path
) -> None:
    module = fused_rnn.quantize(made(name).eval(), weights=weights)
    fused_rnn.save_weights(module, tmp_path / "weights")
    held = c.load(tmp_path / "weights", isa)
    own, x = c.stream(held, B), torch.randn(STEPS, B, F)
    with instruction_set(isa):
        stream = Stream(module, B)
        assert_same(c.step(own, x[0], stream.output_size), stream.step(x[0]))
        assert_same(c.chunk(own, x[1:], stream.output_size), stream.chunk(x[1:]))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(held)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tensors, metadata: tensors.pop("scale_hh_l0"), "file_tensor_missing"),
        (lambda tensors, metadata: tensors.update(scale_ih_l0=torch.ones(3)), "file_tensor_shape"),
        (lambda tensors, metadata: tensors.update(scale_hr_l0=torch.ones(3)), "file_tensor_name"),
        (lambda tensors, metadata: tensors.update(weight_ih_l0=tensors["weight_ih_l0"].float()), "file_tensor_dtype"),
        (lambda tensors, metadata: metadata.update(matrices="same"), "file_tensor_name"),
        (lambda tensors, metadata: metadata.update(matrices="int4"), "file_metadata"),
        (lambda tensors, metadata: metadata.pop("matrices"), "file_metadata"),
        (lambda tensors, metadata: metadata.update(dtype="bfloat16"), "matrix_format"),
        (lambda tensors, metadata: tensors["weight_hh_l1"].view(-1)[-1:].fill_(-128), "int8_range"),
    ],
)
def test_files_of_quantized_layers_that_are_wrong(change: Any, error: str, c: Library, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    fused_rnn.save_weights(fused_rnn.quantize(made("gru").eval()), tmp_path / "weights")
    with safe_open(tmp_path / "weights", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, tmp_path / "changed", metadata)
    with pytest.raises(RuntimeError, match="^" + re.escape(c.text(ERRORS[error])) + "$"):
        c.load(tmp_path / "changed")


@pytest.mark.parametrize("isa", TESTED)
def test_many_rows_long_sequences_and_resets(isa: str, c: Library, tmp_path: Path) -> None:
    module = made("gru")
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights", isa)
    rows = 150  # more than one block
    own = c.stream(weights, rows)
    x = torch.randn(100, rows, F)
    with instruction_set(isa):
        stream = Stream(module, rows)
        assert_same(c.step(own, x[0], H), stream.step(x[0]))
        assert_same(c.chunk(own, x, H), stream.chunk(x))
        c.call("reset", own, ctypes.c_int64(149))
        stream.reset([149])
        assert_same(c.step(own, x[0], H), stream.step(x[0]))
        c.call("reset", own, ctypes.c_int64(-1))
        stream.reset()
        assert_same(c.step(own, x[0], H), stream.step(x[0]))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def described(module: Any, isa: str | None = None) -> tuple[Description, list[Tensor]]:
    """A description by hand of an LSTM or GRU without options, and what holds its memory."""
    state = [t.detach().contiguous() for t in module.state_dict().values()]
    layers = (Layer * module.num_layers)()
    per_layer = len(state) // module.num_layers
    for i, t in enumerate(state):
        setattr(layers[i // per_layer], Layer.NAMES[i % per_layer], t.data_ptr())
    description = Description(
        cell={"LSTM": 2, "GRU": 3}[module.mode],
        dtype=DTYPES[state[0].dtype],
        num_layers=module.num_layers,
        input_size=module.input_size,
        hidden_size=module.hidden_size,
        layers=layers,
        instruction_set=isa.encode() if isa else None,
    )
    return description, [*state]


class Guarded:
    """Memory that ends where a page begins that nobody may touch."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        whole = (size + page - 1) // page * page
        self.map = mmap.mmap(-1, whole + page)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(first + whole), ctypes.c_size_t(page), 0) == 0
        self.address = first + whole - size


@pytest.mark.parametrize("isa", TESTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_memory_of_the_caller_is_as_much_as_was_said_and_no_more(
    rows: int, dtype: torch.dtype, isa: str, c: Library
) -> None:
    module = fused_rnn.LSTM(7, 19, 2, dtype=dtype)
    description, held = described(module, isa)
    size = ctypes.c_size_t()
    c.call("weights_memory_size", ctypes.byref(description), ctypes.byref(size))
    assert size.value > sum(t.nbytes for t in held) and size.value % 64 == 0
    memory, weights = Guarded(size.value), ctypes.c_void_p()
    c.call("weights_create", ctypes.byref(description), ctypes.c_void_p(memory.address), size, ctypes.byref(weights))
    assert weights.value == memory.address
    c.call("stream_memory_size", weights, ctypes.c_int64(rows), ctypes.byref(size))
    own_memory, own = Guarded(size.value), ctypes.c_void_p()
    c.call(
        "stream_create",
        weights,
        ctypes.c_int64(rows),
        ctypes.c_void_p(own_memory.address),
        size,
        ctypes.byref(own),
    )
    x = torch.randn(9, rows, 7).to(dtype)
    with instruction_set(isa):
        stream = Stream(module, rows)
        assert_same(c.step(own, x[0], 19), stream.step(x[0]))
        assert_same(c.chunk(own, x, 19), stream.chunk(x))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_a_recurrent_bias_of_null_is_zeros(c: Library) -> None:
    module = fused_rnn.LSTM(F, H)
    with torch.no_grad():
        module.bias_hh_l0.zero_()
    description, held = described(module)
    description.layers[0].bias_hh = None
    weights = ctypes.c_void_p()
    c.call("weights_create", ctypes.byref(description), None, ctypes.c_size_t(0), ctypes.byref(weights))
    own, x = c.stream(weights, B), torch.randn(B, F)
    assert_same(c.step(own, x, H), Stream(module, B).step(x))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_steps_of_some_rows_are_those_of_a_pool(c: Library, tmp_path: Path) -> None:
    module, rows = made("gru"), 100
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    own, pool = c.stream(weights, rows), fused_rnn.StreamPool(module, rows)
    slots = [pool.open() for _ in range(rows)]
    assert slots == list(range(rows))

    def step(chosen: list[int], x: Tensor, y: Tensor) -> int:
        given = (ctypes.c_int64 * len(chosen))(*chosen)
        return c.code("step_rows", own, ctypes.c_int64(len(chosen)), given, address(x), address(y))

    for count in (1, 3, 90, 100):
        for _ in range(3):
            chosen, x, y = torch.randperm(rows)[:count].tolist(), torch.randn(count, F), torch.empty(count, H)
            assert step(chosen, x, y) == 0
            assert_same(y, pool.step(x, chosen))
    x, y, last = torch.randn(rows, F), torch.empty(rows, H), torch.empty(rows, H)
    for wrong in ([3, 3], [0, rows], [-1], list(range(rows)) + [0], []):
        assert step(wrong, torch.randn(rows + 1, F), torch.empty(rows + 1, H)) == ERRORS["chosen"]
    assert c.code("step_rows", own, ctypes.c_int64(1), None, address(x), address(y)) == ERRORS["chosen"]
    assert step(slots, x, y) == 0 and c.code("step", own, address(x), address(last)) == 0
    assert_same(y, pool.step(x, slots))
    assert_same(last, pool.step(x, slots))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_streams_of_the_same_weights_know_nothing_of_each_other(c: Library, tmp_path: Path) -> None:
    module = fused_rnn.GRU(F, H)
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    streams, x = [c.stream(weights) for _ in range(2)], torch.randn(2, 50, 1, F)
    results = [c.step(own, x[i % 2, i // 2], H) for i in range(100) for own in [streams[i % 2]]]
    for i in range(2):
        assert_same(torch.stack(results[i::2]), Stream(module).chunk(x[i]))

    description = Description()
    c.call("weights_describe", weights, ctypes.byref(description))
    assert (description.cell, description.dtype, description.num_layers) == (3, 1, 1)
    assert (description.input_size, description.hidden_size, description.proj_size) == (F, H, 0)
    assert description.instruction_set.decode() == BEST and not description.layers
    for own in streams:
        c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_every_error_has_a_text_of_its_own(c: Library) -> None:
    texts = {name: c.text(number) for name, number in ERRORS.items()}
    assert len(set(texts.values())) == len(ERRORS) == len(set(ERRORS.values()))
    assert "unknown error" not in texts.values() and c.text(0) == "no error"
    assert {c.text(number) for number in (-1, 30, 99, 1 << 20)} == {"unknown error"}
    assert c.c.fused_rnn_abi_version() == 1


def wrong_fields() -> list[tuple[str, Any, str]]:
    wrong: list[tuple[str, Any, str]] = [
        ("struct_size", 0, "struct_size"),
        ("struct_size", 1 << 31, "struct_size"),
        ("layer_size", 72, "struct_size"),
        ("layer_size", 84, "struct_size"),
        ("matrix_format", 1, "scales"),
        ("matrix_format", 4, "matrix_format"),
        ("matrix_format", -1, "matrix_format"),
        ("layers", None, "layers_null"),
        ("instruction_set", b"sse9", "instruction_set"),
        ("zoneout", float("nan"), "zoneout"),
        ("cell_clip", float("nan"), "cell_clip"),
        ("cell_clip", -1.0, "cell_clip"),
        ("zoneout", 1.5, "zoneout"),
        ("zoneout_cell", -0.1, "zoneout_cell"),
        ("num_heads", 3, "num_heads"),
        ("num_heads", -1, "num_heads"),
        ("num_heads", 1 << 62, "num_heads"),
        ("proj_size", H, "proj_size"),
        ("proj_size", 3, "weight_hr"),
        ("peephole", 1, "weight_peephole"),
        ("layer_norm", 1, "norm"),
    ]
    for name, values in {
        "cell": (0, 4, -1),
        "dtype": (0, 4, -5),
        "num_layers": (0, 65, -1, 1 << 62),
        "input_size": (0, -1, (1 << 20) + 1, 1 << 62),
        "hidden_size": (0, -1, (1 << 20) + 1, 1 << 62),
        "activation": (-1, 7),
        "recurrent_activation": (-1, 7),
        "peephole": (2, -1),
        "coupled_gates": (2, -1),
        "layer_norm": (2, -1),
    }.items():
        wrong += [(name, value, name) for value in values]
    return wrong


@pytest.mark.parametrize("field, value, error", wrong_fields())
def test_a_wrong_field_of_a_description_is_an_error_that_names_it(
    field: str, value: Any, error: str, c: Library
) -> None:
    description, held = described(fused_rnn.LSTM(F, H))
    setattr(description, field, value)
    weights, size = ctypes.c_void_p(7), ctypes.c_size_t(7)
    asked = c.code("weights_create", ctypes.byref(description), None, ctypes.c_size_t(0), ctypes.byref(weights))
    assert asked == ERRORS[error] and weights.value == 7
    if error not in ("layers_null", "weight_hr", "weight_peephole", "norm", "scales"):  # sizes do not ask for weights
        assert c.code("weights_memory_size", ctypes.byref(description), ctypes.byref(size)) == ERRORS[error]
        assert size.value == 7
    if error not in ("struct_size", "newer"):
        assert error.split("_")[0] in c.text(ERRORS[error])


def test_options_of_an_lstm_are_errors_of_others(c: Library) -> None:
    for field in ("peephole", "coupled_gates", "cell_clip", "zoneout_cell", "proj_size"):
        description, held = described(fused_rnn.GRU(F, H))
        setattr(description, field, 1)
        error = c.code("weights_memory_size", ctypes.byref(description), ctypes.byref(ctypes.c_size_t()))
        assert error == ERRORS[field]
    description, held = described(fused_rnn.GRU(F, H))
    description.cell, description.recurrent_activation = 1, 2
    error = c.code("weights_memory_size", ctypes.byref(description), ctypes.byref(ctypes.c_size_t()))
    assert error == ERRORS["recurrent_activation"]


def test_missing_unwanted_and_misaligned_weights_are_errors(c: Library) -> None:
    def error(module: Any, layer: int, name: str, value: int | None, shift: int = 0) -> int:
        description, held = described(module)
        of = description.layers[layer]
        setattr(of, name, getattr(of, name) + shift if shift else value)
        arguments = ctypes.byref(description), None, ctypes.c_size_t(0), ctypes.byref(ctypes.c_void_p())
        return c.code("weights_create", *arguments)

    for name in ("weight_ih", "weight_hh"):
        assert error(fused_rnn.LSTM(F, H, 2), 1, name, None) == ERRORS[name]
    assert error(fused_rnn.LSTM(F, H), 0, "bias_ih", None) == ERRORS["bias"]
    assert error(fused_rnn.GRU(F, H), 0, "bias_hh", None) == ERRORS["bias"]
    assert error(fused_rnn.LSTM(F, H, 2), 1, "bias_hh", None) == ERRORS["bias"]
    for name in Layer.NAMES[4:] + Layer.NORMS:
        expected = {"weight_hr": "weight_hr", "weight_peephole": "weight_peephole"}.get(name, "norm")
        assert error(fused_rnn.LSTM(F, H), 0, name, 64) == ERRORS[expected]
    for name in Layer.NAMES[:4]:
        assert error(fused_rnn.LSTM(F, H), 0, name, None, shift=2) == ERRORS["weight_alignment"]


def test_a_description_of_a_newer_program_is_read_if_its_new_fields_are_zero(c: Library) -> None:
    description, held = described(fused_rnn.LSTM(F, H))
    longer = ctypes.create_string_buffer(bytes(description) + bytes(24))
    Description.from_buffer(longer).struct_size = len(longer.raw) - 1
    size = ctypes.c_size_t()
    assert c.code("weights_memory_size", longer, ctypes.byref(size)) == 0 and size.value > 0
    longer[len(longer.raw) - 2] = 1
    assert c.code("weights_memory_size", longer, ctypes.byref(size)) == ERRORS["newer"]


@pytest.mark.parametrize("dtype", [1, 2, 3])
@pytest.mark.parametrize("cell", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 1 << 20])
def test_sizes_of_the_largest_layers_do_not_overflow(heads: int, cell: int, dtype: int, c: Library) -> None:
    most = 1 << 20
    one = torch.zeros(8, dtype=torch.float64)
    layers = (Layer * 64)(*[Layer(weight_ih=one.data_ptr(), weight_hh=one.data_ptr())] * 64)
    description = Description(
        cell=cell, dtype=dtype, num_layers=64, input_size=most, hidden_size=most, num_heads=heads, layers=layers
    )
    size, weights = ctypes.c_size_t(), ctypes.c_void_p()
    c.call("weights_memory_size", ctypes.byref(description), ctypes.byref(size))
    elements = 64 * {1: 1, 2: 4, 3: 3}[cell] * most * (most + most // heads)
    least = elements * {1: 4, 2: 8, 3: 2}[dtype]
    assert least < size.value < 4 * least
    asked = c.code("weights_create", ctypes.byref(description), None, ctypes.c_size_t(0), ctypes.byref(weights))
    assert asked == ERRORS["out_of_memory"] and not weights.value


def test_a_prime_number_of_heads_is_one_block(c: Library, tmp_path: Path) -> None:
    module = fused_rnn.RNN(1, 1009, num_heads=1009)
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    own, x = c.stream(weights), torch.randn(1, 1)
    assert_same(c.step(own, x, 1009), Stream(module).step(x))
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_descriptions_are_written_as_long_as_a_program_has_them(c: Library, tmp_path: Path) -> None:
    """A program of a later header has longer records: what it knows beyond the library's is zero."""
    file = GRU_FILE.read_bytes()
    held = ctypes.create_string_buffer(file, len(file) + 8)
    at = (ctypes.addressof(held) + 7) // 8 * 8
    ctypes.memmove(at, file, len(file))
    own, layer_size = ctypes.sizeof(Description), ctypes.sizeof(Layer)
    n = layer_size // 8 + 1  # words of a longer record
    longer, layers = (
        ctypes.create_string_buffer(b"\xff" * (own + 24)),
        (ctypes.c_uint64 * (2 * n + 1))(*[7] * (2 * n + 1)),
    )
    description = Description.from_buffer(longer)
    description.struct_size, description.layer_size = own + 16, layer_size + 8
    given = ctypes.c_void_p(at), ctypes.c_size_t(len(file)), layers, ctypes.c_int64(2)
    c.call("describe_file", *given, longer)
    assert (description.struct_size, description.layer_size, description.num_layers) == (own + 16, layer_size + 8, 2)
    assert longer.raw[own : own + 24] == bytes(16) + b"\xff" * 8
    assert layers[0] and layers[n - 1] == 0 and layers[n] and layers[2 * n - 1] == 0 and layers[2 * n] == 7
    size, weights = ctypes.c_size_t(), ctypes.c_void_p()
    c.call("weights_memory_size", longer, ctypes.byref(size))
    c.call("weights_create", longer, None, ctypes.c_size_t(0), ctypes.byref(weights))
    c.call("weights_describe", weights, longer)
    assert longer.raw[own : own + 24] == bytes(16) + b"\xff" * 8 and not description.layers
    for short in (0, own - 8):
        description.struct_size = short
        assert c.code("weights_describe", weights, longer) == ERRORS["struct_size"]
        assert c.code("describe_file", *given, longer) == ERRORS["struct_size"]
    c.c.fused_rnn_weights_destroy(weights)


def test_memory_that_is_missing_misaligned_or_too_small_is_an_error(c: Library) -> None:
    description, held = described(fused_rnn.GRU(F, H))
    size = ctypes.c_size_t()
    c.call("weights_memory_size", ctypes.byref(description), ctypes.byref(size))
    memory = Guarded((size.value + 63) // 64 * 64 + 4096)
    weights = ctypes.c_void_p()

    def create(at: int | None, bytes_: int) -> int:
        return c.code(
            "weights_create",
            ctypes.byref(description),
            ctypes.c_void_p(at),
            ctypes.c_size_t(bytes_),
            ctypes.byref(weights),
        )

    assert create(None, size.value) == ERRORS["memory_null"]
    assert create(memory.address + 8, size.value) == ERRORS["memory_alignment"]
    assert create(memory.address, size.value - 1) == create(memory.address, 0) == ERRORS["memory_size"]
    assert not weights.value and create(memory.address, size.value) == 0
    rows = ctypes.c_int64(2)
    c.call("stream_memory_size", weights, rows, ctypes.byref(size))
    own, at = ctypes.c_void_p(), Guarded(size.value)
    for address_, bytes_, error in (
        (None, size.value, "memory_null"),
        (at.address + 32, size.value, "memory_alignment"),
        (at.address, size.value - 1, "memory_size"),
    ):
        arguments = weights, rows, ctypes.c_void_p(address_), ctypes.c_size_t(bytes_), ctypes.byref(own)
        assert c.code("stream_create", *arguments) == ERRORS[error] and not own.value


def test_every_argument_of_a_call_is_checked(c: Library, tmp_path: Path) -> None:
    fused_rnn.save_weights(fused_rnn.GRU(F, H), tmp_path / "gru")
    weights = c.load(tmp_path / "gru")
    own, none = c.stream(weights, B), ctypes.c_void_p(0)
    size, result = ctypes.byref(ctypes.c_size_t()), ctypes.byref(ctypes.c_void_p())
    x, y = torch.randn(4, B, F), torch.empty(4, B, H)
    at, to, row, most = address(x), address(y), ctypes.c_int64, ctypes.c_int64
    before = c.step(own, x[0], H)
    state = torch.empty(H)
    c.call("read_state", own, row(0), row(1), address(state), None)

    cases = {
        "description_null": [("weights_memory_size", None, size), ("weights_create", None, None, most(0), result)],
        "weights": [
            ("weights_describe", none, result),
            ("stream_memory_size", none, most(1), size),
            ("stream_create", own, most(1), None, most(0), result),  # is another object
        ],
        "rows": [
            *(("stream_memory_size", weights, most(n), size) for n in (0, -1, (1 << 24) + 1)),
            *(("stream_create", weights, most(n), None, most(0), result) for n in (0, -1, 1 << 62)),
        ],
        "result_null": [
            ("weights_memory_size", ctypes.byref(Description()), None),
            ("stream_memory_size", weights, most(1), None),
            ("stream_create", weights, most(1), None, most(0), None),
            ("weights_describe", weights, None),
            ("weights_load", b"x", None, None),
        ],
        "stream": [
            ("step", none, at, to),
            ("step", weights, at, to),
            ("step", ctypes.c_void_p(own.value + 8), at, to),
            ("chunk", none, most(1), None, at, to),
            ("reset", none, row(0)),
            ("read_state", none, row(0), row(0), None, None),
            ("write_state", none, row(0), row(0), None, None),
        ],
        "x_null": [("step", own, none, to), ("chunk", own, most(2), None, none, to)],
        "y_null": [("step", own, at, none), ("chunk", own, most(2), None, at, none)],
        "alignment": [
            ("step", own, ctypes.c_void_p(at.value + 2), to),
            ("step", own, at, ctypes.c_void_p(to.value + 1)),
            ("chunk", own, most(2), None, at, ctypes.c_void_p(to.value + 2)),
            ("chunk", own, most(2), ctypes.c_void_p(to.value + 4), at, to),
            ("read_state", own, row(0), row(0), ctypes.c_void_p(to.value + 2), None),
        ],
        "overlap": [
            ("chunk", own, most(2), None, to, to),
            ("chunk", own, most(2), None, ctypes.c_void_p(to.value + 8), to),
        ],
        "steps": [("chunk", own, most(n), None, at, to) for n in (0, -1, 1 << 33, 1 << 62)],
        "lengths": [
            ("chunk", own, most(2), (ctypes.c_int64 * B)(*lengths), at, to)
            for lengths in ([1, 3, 0], [-1, 0, 0], [0, 0, 1 << 62])
        ],
        "layer": [("read_state", own, row(n), row(0), None, None) for n in (-1, 1, 1 << 62)],
        "row": [
            *(("write_state", own, row(0), row(n), None, None) for n in (-1, B, 1 << 62)),
            *(("reset", own, row(n)) for n in (-2, B)),
        ],
        "state": [("read_state", own, row(0), row(0), None, to), ("write_state", own, row(0), row(0), None, to)],
        "path_null": [("weights_load", None, None, result)],
        "file_open": [("weights_load", str(tmp_path / "nothing").encode(), None, result)],
        "file_read": [("weights_load", str(tmp_path).encode(), None, result)],
        "instruction_set": [("weights_load", str(tmp_path / "gru").encode(), b"", result)],
    }
    for error, calls in cases.items():
        for name, *arguments in calls:
            assert c.text(c.code(name, *arguments)) == c.text(ERRORS[error]), (error, name)
    # Whatever was asked has changed nothing.
    now = torch.empty(H)
    c.call("read_state", own, row(0), row(1), address(now), None)
    assert_same(now, state)
    assert_same(now, before[1])
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)
    c.c.fused_rnn_stream_destroy(none)
    c.c.fused_rnn_weights_destroy(none)


def test_a_result_may_be_the_next_input_of_a_few_rows(c: Library, tmp_path: Path) -> None:
    module = fused_rnn.GRU(H, H)
    fused_rnn.save_weights(module, tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    for rows in (64, 65):
        own, twin, x = c.stream(weights, rows), Stream(module, rows), torch.randn(rows, H)
        expected = twin.step(x)
        error = c.code("step", own, address(x), address(x))
        assert error == (0 if rows == 64 else ERRORS["overlap"])
        if rows == 64:
            assert_same(x, expected)
        c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


def test_a_second_thread_in_a_stream_gets_an_error(c: Library, tmp_path: Path) -> None:
    fused_rnn.save_weights(fused_rnn.LSTM(64, 256), tmp_path / "weights")
    weights = c.load(tmp_path / "weights")
    own = c.stream(weights, 4)
    x = torch.randn(2000, 4, 64)
    y, long_y, codes = torch.empty(4, 256), torch.empty(2000, 4, 256), set()

    def until_it_had_its_turn() -> None:
        while c.code("chunk", own, ctypes.c_int64(2000), None, address(x), address(long_y)):
            pass

    long = threading.Thread(target=until_it_had_its_turn)
    long.start()
    while long.is_alive():
        codes.add(c.code("step", own, address(x), address(y)))
    long.join()
    assert ERRORS["in_use"] in codes and codes <= {0, ERRORS["in_use"]}
    c.c.fused_rnn_stream_destroy(own)
    c.c.fused_rnn_weights_destroy(weights)


# ---- files ----------------------------------------------------------------------------------------------------------


def contents(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def describe(c: Library, file: bytes, capacity: int = 64) -> tuple[int, Description]:
    held = ctypes.create_string_buffer(len(file) + 16)
    at = (ctypes.addressof(held) + 7) // 8 * 8
    ctypes.memmove(at, file, len(file))
    description, layers = Description(), (Layer * 64)()
    given = ctypes.c_void_p(at), ctypes.c_size_t(len(file)), layers, ctypes.c_int64(capacity)
    error = c.code("describe_file", *given, ctypes.byref(description))
    description.held = held
    return error, description


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    file = path.read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


GRU_FILE = next(path for path in CORPUS if path.stem == "valid_gru")


def test_files_are_those_that_the_package_writes_today(c: Library) -> None:
    assert len(CORPUS) == 5
    for path in CORPUS:
        header, data = parts(path)
        assert describe(c, path.read_bytes())[0] == describe(c, contents(header, data))[0] == 0
        metadata = header["__metadata__"]
        module = fused_rnn.LSTM(2, 3) if metadata["cell"] == "lstm" else fused_rnn.GRU(2, 3)
        assert set(metadata) == set(saving._metadata(fused_rnn.stream.StreamDescription(module, None)))
    error, description = describe(c, GRU_FILE.read_bytes())
    assert (description.cell, description.dtype, description.num_layers, description.num_heads) == (3, 3, 2, 2)
    assert error == 0 and bool(description.layers[1].bias_hh)


def changed_metadata(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["__metadata__"].update(values)


def changed_tensor(name: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update(values)


def swapped(header: dict[str, Any]) -> None:
    """Two tensors of one size in one place; nothing in that of the second."""
    header["weight_hh_l0"]["data_offsets"] = header["weight_hh_l1"]["data_offsets"]


WRONG_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no metadata": (lambda h: h.pop("__metadata__"), "file_metadata"),
    "a key is missing": (lambda h: h["__metadata__"].pop("zoneout"), "file_metadata"),
    "a key too many": (changed_metadata(author="me"), "file_metadata"),
    "another format": (changed_metadata(format="pt"), "file_metadata"),
    "another version": (changed_metadata(format_version="2"), "file_version"),
    "no version": (changed_metadata(format_version="0"), "file_version"),
    "metadata that is no text": (changed_metadata(num_layers=2), "file_header"),
    "unknown cell": (changed_metadata(cell="sru"), "file_metadata"),
    "unknown dtype": (changed_metadata(dtype="float16"), "file_metadata"),
    "unknown activation": (changed_metadata(activation="elu"), "file_metadata"),
    "flag": (changed_metadata(layer_norm="2"), "file_metadata"),
    "negative": (changed_metadata(num_layers="-2"), "file_metadata"),
    "space": (changed_metadata(num_layers="2 "), "file_metadata"),
    "leading zero": (changed_metadata(num_layers="02"), "file_metadata"),
    "empty": (changed_metadata(num_layers=""), "file_metadata"),
    "overflow": (changed_metadata(num_layers="18446744073709551618"), "file_metadata"),
    "beyond 63 bits": (changed_metadata(num_layers="9223372036854775808"), "file_metadata"),
    "biases": (changed_metadata(biases="3"), "file_metadata"),
    "no recurrent bias of a GRU": (changed_metadata(biases="1"), "bias"),
    "decimal": (changed_metadata(zoneout="0.1"), "file_metadata"),
    "short": (changed_metadata(zoneout="0x1.8p-4"), "file_metadata"),
    "capitals": (changed_metadata(zoneout="0x1.999999999999Ap-4"), "file_metadata"),
    "infinite": (changed_metadata(zoneout="inf"), "file_metadata"),
    "exponent": (changed_metadata(zoneout="0x1.0000000000000p+1024"), "file_metadata"),
    "minus zero": (changed_metadata(zoneout="0x1.0000000000000p-0"), "file_metadata"),
    "too many layers": (changed_metadata(num_layers="65"), "num_layers"),
    "one layer less": (changed_metadata(num_layers="1"), "file_tensor_name"),
    "one layer more": (changed_metadata(num_layers="3"), "file_tensor_missing"),
    "huge": (changed_metadata(hidden_size="4611686018427387904"), "hidden_size"),
    "other heads": (changed_metadata(num_heads="4"), "file_tensor_shape"),
    "zoneout of c": (changed_metadata(zoneout_cell="0x1.0000000000000p-1"), "zoneout_cell"),
    "a tensor too many": (lambda h: h.update(other=h["bias_hh_l0"]), "file_tensor_name"),
    "a tensor of an option": (lambda h: h.update(weight_hr_l0=h["bias_hh_l0"]), "file_tensor_name"),
    "layer 00": (lambda h: h.update(weight_ih_l00=h.pop("weight_ih_l0")), "file_tensor_name"),
    "layer without number": (lambda h: h.update(weight_ih_l=h.pop("weight_ih_l0")), "file_tensor_name"),
    "a tensor is missing": (lambda h: h.pop("bias_ih_l1"), "file_tensor_missing"),
    "dtype of a tensor": (changed_tensor("weight_ih_l0", dtype="F16"), "file_tensor_dtype"),
    "one dimension more": (changed_tensor("bias_ih_l0", shape=[12, 1]), "file_tensor_shape"),
    "three dimensions": (changed_tensor("weight_ih_l0", shape=[12, 3, 1]), "file_tensor_shape"),
    "no dimension": (changed_tensor("bias_ih_l0", shape=[]), "file_tensor_shape"),
    "transposed": (changed_tensor("weight_ih_l0", shape=[3, 12]), "file_tensor_shape"),
    "shape that overflows": (changed_tensor("weight_ih_l0", shape=[12, (1 << 64) + 3]), "file_header"),
    "beyond the data": (changed_tensor("bias_ih_l0", data_offsets=[1 << 40, (1 << 40) + 24]), "file_offsets"),
    "offsets that wrap": (changed_tensor("bias_ih_l0", data_offsets=[(1 << 64) - 16, 8]), "file_offsets"),
    "backwards": (changed_tensor("bias_ih_l0", data_offsets=[24, 0]), "file_offsets"),
    "too short": (changed_tensor("bias_ih_l0", data_offsets=[0, 22]), "file_offsets"),
    "one offset": (changed_tensor("bias_ih_l0", data_offsets=[0]), "file_header"),
    "three offsets": (changed_tensor("bias_ih_l0", data_offsets=[0, 24, 24]), "file_header"),
    "offset of 65 bits": (changed_tensor("bias_ih_l0", data_offsets=[0, 1 << 64]), "file_header"),
    "negative offset": (changed_tensor("bias_ih_l0", data_offsets=[-24, 0]), "file_header"),
    "fraction": (changed_tensor("bias_ih_l0", data_offsets=[0.0, 24.0]), "file_header"),
    "a key of a tensor too many": (changed_tensor("bias_ih_l0", strides=[1]), "file_header"),
    "a key of a tensor is missing": (lambda h: h["bias_ih_l0"].pop("shape"), "file_header"),
    "two tensors in one place": (swapped, "file_offsets"),
    "deep": (changed_tensor("bias_ih_l0", shape=[[[[12]]]]), "file_header"),
    "a tensor that is none": (lambda h: h.update(bias_ih_l0=1), "file_header"),
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_wrong_header_is_an_error(name: str, c: Library) -> None:
    change, error = WRONG_HEADERS[name]
    header, data = parts(GRU_FILE)
    change(header)
    assert c.text(describe(c, contents(header, data))[0]) == c.text(ERRORS[error])


def test_bytes_that_are_no_header_are_errors(c: Library) -> None:
    header, data = parts(GRU_FILE)
    good = json.dumps(header).encode()
    tensor = b'"bias_ih_l0":' + json.dumps(header["bias_ih_l0"]).encode()
    metadata = b'"__metadata__":' + json.dumps(header["__metadata__"]).encode()
    for text in (
        b"",
        b" " + good,
        b"[" + good + b"]",
        b"{}",
        b"{" + metadata,
        b"{" + metadata + b",}",
        b"{" + metadata + b"}x",
        b"{" + metadata + b"}\0",
        b"{" + metadata + b"," + metadata + b"}",
        b"{" * 100000,
        b'{"a' + b"[" * 100000,
        good.replace(b'"gru"', b'"g\\u0072u"'),
        good.replace(b'"gru"', b'"gr\xc3"'),
        good.replace(b'"gru"', b'"gr\xff"'),
        good.replace(b'"gru"', b'"gr\n"'),
        good.replace(b'"gru"', b'"gru'),
        good.replace(b'"gru"', b"gru"),
        good.replace(b'"gru"', b"null"),
        good.replace(b'"cell":', b'"cell"'),
        good.replace(b'"dtype": "BF16"', b'"dtype": "BF16", "dtype": "BF16"', 1),
        good.replace(b"[12]", b"[012]"),
        good.replace(b"[12]", b"[12,]"),
        good.replace(b"[12]", b"[+12]"),
        good.replace(b"[12]", b"[1e1]"),
        good.replace(b"[12]", b"[12"),
    ):
        assert describe(c, contents(text, data))[0] in (ERRORS["file_header"], ERRORS["file_metadata"]), text[:80]
    twice = good[:-1] + b"," + tensor + b"}"
    assert describe(c, contents(twice, data))[0] == ERRORS["file_tensor_twice"]
    key_twice = good.replace(b'"cell": "gru"', b'"cell": "gru", "cell": "gru"')
    assert describe(c, contents(key_twice, data))[0] == ERRORS["file_metadata"]
    spread = good.replace(b",", b" ,\n\t").replace(b":", b" : ")
    assert describe(c, contents(spread, data))[0] == 0


def test_lengths_of_files_are_checked(c: Library) -> None:
    file = GRU_FILE.read_bytes()
    header, data = parts(GRU_FILE)
    for end in range(len(file)):
        assert describe(c, file[:end])[0] in (ERRORS["file_size"], ERRORS["file_offsets"])
    assert describe(c, file + b"\0")[0] == ERRORS["file_offsets"]
    for length in (0, 1, len(file) - 7, 1 << 22, (1 << 22) + 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1):
        assert describe(c, contents(header, data, length))[0] in (ERRORS["file_size"], ERRORS["file_header"])
    for capacity in (-1, 0, 1):
        assert describe(c, file, capacity)[0] == ERRORS["capacity"]
    assert describe(c, file, 2)[0] == 0
    result = ctypes.byref(Description())
    given = (Layer * 2)(), ctypes.c_int64(2), result
    buffer = ctypes.create_string_buffer(file)
    assert c.code("describe_file", None, ctypes.c_size_t(len(file)), *given) == ERRORS["data_null"]
    odd = ctypes.c_void_p(ctypes.addressof(buffer) // 8 * 8 + 4)
    assert c.code("describe_file", odd, ctypes.c_size_t(8), *given) == ERRORS["data_alignment"]


def test_modules_and_dtypes_that_cannot_be_saved_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, dtype, message in (
        (fused_rnn.LSTM(2, 3, bidirectional=True), None, "bidirectional"),
        (fused_rnn.GRU(2, 3, reset_after=False), None, "reset_after"),
        (fused_rnn.LSTM(2, 3), torch.float16, "dtype: expected one of"),
        (fused_rnn.RNN(1, 1, 65), None, "at most 64 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_rnn.save_weights(module, tmp_path / "file", dtype)
    with pytest.raises(TypeError, match="module"):
        fused_rnn.save_weights(nn.Linear(2, 3), tmp_path / "file")
    with pytest.raises(OSError):
        fused_rnn.save_weights(fused_rnn.LSTM(2, 3), tmp_path / "no" / "file")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        fused_rnn.save_weights(fused_rnn.LSTM(2, 3), tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.compiles
def test_changed_files_are_refused_or_right(tmp_path: Path) -> None:
    """Ten seconds of them under the sanitizers; `make fuzz` takes longer."""
    program = build_fuzz(tmp_path)
    result = run(program, 10, 1, *CORPUS)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {int(number): int(count) for number, count in re.findall(r"^(\d+) (\d+) ", result.stdout, re.MULTILINE)}
    tried = int(re.search(r"tried (\d+)", result.stdout)[1])
    assert tried == sum(found.values()) and tried > 10000
    # Some stay right, and each kind of fault of a file is met.
    names = ("size", "header", "metadata", "tensor_name", "tensor_twice", "tensor_missing", "tensor_dtype", "offsets")
    assert {0, *(ERRORS[f"file_{name}"] for name in (*names, "tensor_shape", "version"))} <= set(found)


SANITIZE = ["-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build_fuzz(folder: Path) -> Path:
    library = [ROOT / f"csrc/library/{name}.cpp" for name in ("file", "description", "errors")]
    compiled(
        *("g++", "-std=c++17", *SANITIZE, f"-I{ROOT}/include", f"-I{ROOT}/csrc", SOURCES / "fuzz_file.cpp", *library),
        *("-o", folder / "fuzz_file"),
    )
    return folder / "fuzz_file"


# ---- programs -------------------------------------------------------------------------------------------------------

WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic"]


@pytest.fixture(params=COMPILERS, ids=lambda command: command[0])
def compiler(request: pytest.FixtureRequest) -> str:
    return is_there(request.param[0])


def realtime(folder: Path, *command: Any) -> Path:
    compiled(
        *command[:1], ROOT / "examples/realtime.c", *command[1:], f"-I{ROOT}/include", "-lm", "-o", folder / "realtime"
    )
    return folder / "realtime"


def test_the_header_is_c_and_cpp_by_itself(compiler: str, tmp_path: Path) -> None:
    source = tmp_path / "header.c"
    source.write_text(
        '#include "fused_rnn.h"\nint use(void);\nint use(void) { return (int)fused_rnn_abi_version(); }\n'
    )
    for language in (["-std=c11"], ["-std=c17"], ["-xc++", "-std=c++98", "-Wno-long-long", "-Wno-variadic-macros"]):
        wanted = [*WARNINGS, *language, f"-I{ROOT}/include", "-fsyntax-only"]
        if language[0] == "-xc++":
            wanted = [flag for flag in wanted if flag != "-pedantic"]
        compiled(compiler, *wanted, source)


def test_clang_compiles_the_library() -> None:
    """To the end of what is checked; code it makes in a minute (`make library CXX=clang++`)."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from build_library import SOURCES as sources
        from build_library import Library as Build
    finally:
        sys.path.pop(0)
    of_clang = Build([is_there("clang++")], ROOT / "build/library-clang", *ISAS[1:] or [None], "")
    assert of_clang.is_clang and set(SETS) <= set(of_clang.sets)
    for source in sources:
        compiled("clang++", *of_clang.flags(), "-fsyntax-only", ROOT / source)
    for name, flags in of_clang.sets.items():
        compiled("clang++", *of_clang.flags(), *flags, "-fsyntax-only", ROOT / f"csrc/cpu/isa_{name}.cpp")


def test_the_example_says_bit_for_bit_what_the_stream_says(compiler: str, library: Path, tmp_path: Path) -> None:
    archive = library / "lib/libfused_rnn.a"
    program = realtime(tmp_path, compiler, "-std=c11", "-O2", *WARNINGS, archive)
    check_example(program, tmp_path)


def check_example(program: Path, folder: Path, **environment: str) -> None:
    module = fused_rnn.LSTM(4, H, 2)
    fused_rnn.save_weights(module, folder / "weights")
    samples = (8000 * torch.randn(3 * 256).clamp(-3, 3)).to(torch.int16).numpy()
    (folder / "sound.wav").write_bytes(wav(samples, channels=2))
    out, names = folder / "out", ["--weights", folder / "weights", "--wav", folder / "sound.wav"]
    env = os.environ | environment
    result = run(program, *names, "--out", out, "--block", "256", "--fast", env=env)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "3 blocks of 256 samples" in result.stdout and "deadlines missed:" in result.stdout
    x = torch.from_numpy(samples.astype("f") / 32768).view(-1, 1, 4)
    with instruction_set(environment.get("FUSED_RNN_ISA", BEST)):
        expected = Stream(module).chunk(x)
    assert_same(torch.from_numpy(np.fromfile(out, "f")).view(-1, 1, H), expected)
    # With weights of its own, waiting for each block.
    result = run(program, "--seconds", "0.05", env=env)
    assert result.returncode == 0 and "H 32" in result.stdout, result.stderr
    for wrong in (["--block", "0"], ["--weights", folder / "sound.wav"], ["--what"], ["--wav", folder / "weights"]):
        result = run(program, *wrong, env=env)
        assert result.returncode == 1 and result.stderr.startswith("error: ")


def wav(samples: Any, channels: int) -> bytes:
    frames = np.zeros((len(samples), channels), "<i2")
    frames[:, 0] = samples
    data = frames.tobytes()
    rate = 48000
    numbers = ((1, 2), (channels, 2), (rate, 4), (rate * channels * 2, 4), (channels * 2, 2), (16, 2))
    head = b"".join(value.to_bytes(size, "little") for value, size in numbers)
    chunks = b"fmt " + len(head).to_bytes(4, "little") + head + b"LIST" + (3).to_bytes(4, "little") + b"abc\0"
    chunks += b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + (4 + len(chunks)).to_bytes(4, "little") + b"WAVE" + chunks


def drive(program: Path, name: str, rows: int, dtype: torch.dtype, isa: str, folder: Path) -> None:
    """Run tests/c_library/drive.c and compare all that it wrote with a stream."""
    module = made(name)
    fused_rnn.save_weights(module, folder / "weights", dtype)
    x = torch.randn(9, rows, F).to(dtype)
    (folder / "x").write_bytes(x.view(torch.uint8).numpy().tobytes())
    result = run(program, folder / "weights", rows, folder / "x", folder / "y", env=os.environ | {"FUSED_RNN_ISA": isa})
    assert result.returncode == 0 and result.stdout == f"{isa}\n" and not result.stderr, result.stderr
    with instruction_set(isa):
        stream = Stream(module, rows, dtype)
        y = torch.cat([stream.chunk(x[:2]), stream.chunk(x[2:], [7] * (rows - 1) + [6])])
        h, c = stream._states(None, True)
    expected = [y.view(torch.uint8).flatten()]
    for states in zip(h.flatten(0, 1), h.flatten(0, 1) if c is None else c.flatten(0, 1), strict=True):
        expected += [state.view(torch.uint8) for state in states[: 1 if c is None else 2]]
    assert_same(torch.frombuffer(bytearray((folder / "y").read_bytes()), dtype=torch.uint8), torch.cat(expected))


@pytest.mark.parametrize("name, dtype", [("lstm options", torch.float32), ("gru", torch.bfloat16)])
def test_a_program_in_c_says_bit_for_bit_what_the_stream_says(
    name: str, dtype: torch.dtype, compiler: str, library: Path, tmp_path: Path
) -> None:
    program, source = tmp_path / "drive", SOURCES / "drive.c"
    archive = library / "lib/libfused_rnn.a"
    compiled(compiler, "-std=c11", *WARNINGS, source, f"-I{ROOT}/include", archive, "-o", program)
    drive(program, name, 5, dtype, BEST, tmp_path)


def test_programs_under_the_sanitizers(library: Path, tmp_path: Path) -> None:
    """All but the kernels is instrumented; those would take most of a minute to compile (`make library
    LIBRARY_ARGS="--sanitize address,undefined"`)."""
    sources = [ROOT / "csrc/stream/stack.cpp", *sorted((ROOT / "csrc/library").glob("*.cpp"))]
    sources += [ROOT / f"csrc/cpu/{name}.cpp" for name in ("dispatch", "memory")]
    kernels = library / "objects/isa_portable.o"
    flags = [
        "-std=c++17",
        "-fno-exceptions",
        "-fno-rtti",
        "-DFRNN_STREAMS_ALONE",
        f"-I{ROOT}/include",
        f"-I{ROOT}/csrc",
    ]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    for source, result in zip(sources, objects, strict=True):
        compiled("g++", *SANITIZE, *flags, "-c", source, "-o", result)
    check_example(
        realtime(tmp_path, "gcc", "-std=c11", *SANITIZE, *objects, kernels), tmp_path, FUSED_RNN_ISA="portable"
    )
    program, source = tmp_path / "drive", SOURCES / "drive.c"
    compiled("gcc", "-std=c11", *SANITIZE, source, f"-I{ROOT}/include", *objects, kernels, "-o", program)
    for name in ("projection", "layer_norm, heads", "lstm options", "indrnn", "heads"):
        drive(program, name, 70, torch.float64, "portable", tmp_path)


def test_the_program_that_is_timed_runs(library: Path, tmp_path: Path) -> None:
    fused_rnn.save_weights(fused_rnn.LSTM(8, 8), tmp_path / "weights")
    source, archive = ROOT / "benchmarks/c_step.c", library / "lib/libfused_rnn.a"
    compiled("gcc", "-std=c11", "-O2", *WARNINGS, source, f"-I{ROOT}/include", archive, "-o", tmp_path / "c_step")
    result = run(tmp_path / "c_step", tmp_path / "weights", "0.01")
    isa, step, chunk, refused = result.stdout.split()
    assert isa == BEST and float(step) > float(refused) > 0 and float(chunk) > 0


WRAPPED = ("malloc", "calloc", "realloc", "aligned_alloc", "free", "pthread_mutex_lock")


def test_calls_allocate_nothing_take_no_lock_and_make_no_system_call(library: Path, tmp_path: Path) -> None:
    program = tmp_path / "no_calls"
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    archive = library / "lib/libfused_rnn.a"
    compiled(
        "gcc",
        "-std=c11",
        "-O1",
        *WARNINGS,
        SOURCES / "no_calls.c",
        f"-I{ROOT}/include",
        archive,
        *wraps,
        "-lm",
        "-o",
        program,
    )
    for name, dtype in (("projection", None), ("layer_norm, heads", None), ("lstm options", torch.bfloat16)):
        fused_rnn.save_weights(made(name), tmp_path / name, dtype)
        result = run(program, tmp_path / name, "nothing")
        if result.returncode == 5:
            pytest.skip("this system has no seccomp, by which system calls are caught")
        assert result.returncode == 0, (name, result.returncode, result.stderr)
    # What such a mistake would look like.
    for mistake, function in (("allocate", "malloc"), ("free", "free"), ("lock", "pthread_mutex_lock")):
        result = run(program, tmp_path / name, mistake)
        assert result.returncode == 3 and result.stderr == f"{function} was called\n"
    assert run(program, tmp_path / name, "call").returncode == -signal.SIGKILL


def test_code_of_the_page_runs(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/c-library.md").read_text()
    python, program = (
        re.findall(rf"^```{name}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for name in ("python", "c")
    )
    assert len(python) == len(program) == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"fused_rnn": fused_rnn}
    exec(python[0], names)
    Path("program.c").write_text(program[0])
    compiled("gcc", *WARNINGS, "program.c", f"-I{library}/include", library / "lib/libfused_rnn.a", "-o", "program")
    result = run(tmp_path / "program")
    assert result.returncode == 0 and result.stdout
    x = torch.zeros(1, 20)
    x[0, 0] = 1
    assert float(result.stdout) == pytest.approx(
        Stream(names["layer"]).chunk(x.expand(100, 1, 20))[-1, 0, 0].item(), rel=1e-4
    )


# ---- what is installed ----------------------------------------------------------------------------------------------

# Of the C library and of the compiler's own; nothing of threads or of C++.
NEEDED = {
    *("aligned_alloc", "free", "malloc", "madvise", "getenv", "syscall"),
    *("fopen", "fread", "fclose", "fileno", "fstat"),
    *("memchr", "memcpy", "memcmp", "memset", "memmove", "strlen", "strcmp", "bcmp", "__stack_chk_fail"),
    *("__cpu_model", "__cpu_features2", "_GLOBAL_OFFSET_TABLE_"),
}


def declared() -> set[str]:
    return set(
        re.findall(r"^FUSED_RNN_API [^(]*?(fused_rnn_\w+)\(", (ROOT / "include/fused_rnn.h").read_text(), re.MULTILINE)
    )


def symbols(*arguments: Any) -> set[str]:
    result = run(is_there("nm"), *arguments)
    assert result.returncode == 0, result.stderr
    return {line.split()[-1].split("@")[0] for line in result.stdout.splitlines() if len(line.split()) > 1}


def test_the_library_exports_what_the_header_declares_and_nothing_else(library: Path) -> None:
    shared, archive = library / "lib/libfused_rnn.so", library / "lib/libfused_rnn.a"
    assert len(declared()) == 17
    assert symbols("-D", "--defined-only", shared) == declared()
    assert symbols("-g", "--defined-only", archive) == declared()
    assert symbols("-u", archive) <= NEEDED
    result = run(is_there("readelf"), "-d", shared)
    assert re.findall(r"NEEDED.*\[(.*)\]", result.stdout) == ["libc.so.6"]


def test_what_has_not_changed_is_not_compiled_again_and_what_is_built_is_installed(
    library: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (library / "objects").glob("*.o")}
    build("library-tests", *ISAS, "--prefix", str(tmp_path))
    assert before == {path: path.stat().st_mtime_ns for path in (library / "objects").glob("*.o")}
    assert (tmp_path / "include/fused_rnn.h").read_text() == (ROOT / "include/fused_rnn.h").read_text()
    found = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    cmake = {f"cmake/fused_rnn/fused_rnnConfig{part}.cmake" for part in ("", "Version")}
    assert found == {"libfused_rnn.so", "libfused_rnn.a", "pkgconfig/fused_rnn.pc", *cmake}


def test_instruction_sets_that_there_are_not_are_refused(tmp_path: Path) -> None:
    wrong = [("sse9", "expected some of portable")]
    if platform.machine() == "x86_64":
        wrong.append(("avx512_bf16", "needs avx512 beside it"))
    for isas, message in wrong:
        result = run(sys.executable, ROOT / "tools/build_library.py", "--isas", isas, "--out", tmp_path)
        assert result.returncode == 1 and result.stderr.startswith("error: --isas") and message in result.stderr
    result = run(sys.executable, ROOT / "tools/build_library.py", "--cxx", "no-such-compiler", "--out", tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: no-such-compiler")


@pytest.mark.parametrize("kind", ["static", "shared"])
def test_what_is_installed_is_found_by_cmake_wherever_it_is_moved(kind: str, library: Path, tmp_path: Path) -> None:
    is_there("cmake")
    prefix = tmp_path / "moved"
    for folder in ("include", "lib"):
        shutil.copytree(library / folder, prefix / folder)
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(p C)\nfind_package(fused_rnn 0.1 REQUIRED)\n"
        f"add_executable(p {ROOT}/examples/realtime.c)\ntarget_link_libraries(p fused_rnn::{kind} m)\n"
    )
    for command in (
        ("-S", project, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={prefix}"),
        ("--build", tmp_path / "b"),
    ):
        result = run("cmake", *command)
        assert result.returncode == 0, result.stdout + result.stderr
    assert run(tmp_path / "b/p", "--fast", "--seconds", "0.01").returncode == 0


def test_what_is_installed_is_found_by_pkg_config(library: Path, tmp_path: Path) -> None:
    is_there("pkg-config")
    prefix = tmp_path / "moved"
    for folder in ("include", "lib"):
        shutil.copytree(library / folder, prefix / folder)
    env = os.environ | {"PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "fused_rnn", env=env).stdout.split()
    assert run("pkg-config", "--modversion", "fused_rnn", env=env).stdout.strip() == fused_rnn.__version__
    program = tmp_path / "p"
    compiled("gcc", ROOT / "examples/realtime.c", *flags, f"-Wl,-rpath,{prefix}/lib", "-lm", "-o", program)
    assert run(program, "--fast", "--seconds", "0.01").returncode == 0


def test_the_version_of_the_format_is_the_same_on_both_sides() -> None:
    source = (ROOT / "csrc/library/file.cpp").read_text()
    assert f'value == "{saving.FORMAT}"' in source and f"metadata.version != {saving.FORMAT_VERSION}" in source
    header = (ROOT / "include/fused_rnn.h").read_text()
    assert f"FUSED_RNN_MOST_LAYERS {saving._MOST_LAYERS}\n" in header
    assert "FUSED_RNN_MOST_FEATURES (1 << 20)" in header and saving._MOST_FEATURES == 1 << 20
