"""The C library (include/fused_rnn.h) for tests: how it is built, its functions and records, and modules to save."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_rnn

from .backends import available_isas

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests/c_library"
CORPUS = sorted((ROOT / "tests/data/c_library").glob("*.safetensors"))
GRU_FILE = ROOT / "tests/data/c_library/valid_gru.safetensors"
STEPS, B, F, H = 12, 3, 5, 20

# What is compiled for tests: the best that runs here, what it takes other dtypes' kernels from, and the portable one.
BEST = available_isas()[0] if available_isas() else "portable"
SETS = ["portable", "avx2" if BEST == "avx2" else "avx512", "avx512_bf16", "avx512_amx"]
SETS = SETS[: SETS.index(BEST) + 1] if BEST in SETS else [] if platform.machine() != "x86_64" else ["portable"]
ISAS = ["--isas", ",".join(SETS)] if SETS else []  # else all that the processor's family has
TESTED = list(dict.fromkeys((BEST, "portable")))

SANITIZE = ["-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


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
