"""CUDA kernels of cells of one's own: the source that `load_cell` gives nvcc, executed on the CPU (docs/cuda.md).

Twice: as g++ compiles it for the engine of tests/cuda_host, below the operators of test_cuda_ops.py, and what nvcc
makes of it, by the interpreter of PTX. And for real, as far as that goes without a GPU: nvcc makes a library, which
is loaded.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import cuda_host, cuda_ops
from test_cuda_ops import _allow, _cuda_operators  # noqa: F401  (a fixture)
from test_cuda_plan import fields_of
from test_custom_cells import EXAMPLES, assert_close, run, states_of
from test_custom_cells import cell as cell_of_tests

import fused_rnn
from fused_rnn import backend, compiling, custom, expressions
from fused_rnn.custom import CustomLayer

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:.*verriding a previously registered kernel"),
]
needs_nvcc = pytest.mark.skipif(not cuda_host.find_nvcc(), reason="nvcc is not there")

F64 = torch.float64
# What kernels tell apart: private states, none to three; gates whose x and r are apart, none to all; fewer values saved
# than there are gates, whose projections then have memory of their own; h before the step read or not; a step by hand.
CELLS = ("GruD", "SLSTM", "AllFunctions", "Apart", "Gru", "LstmByHand", "MoreGates")

MORE_GATES = """struct MoreGates {
  static constexpr int gates = 3;
  static constexpr int states = 2;
  template <class V>
  static void forward(const V* x, const V* r, V, const V* before, V& h, V* after) {
    after[0] = 0.5 * before[0] + 0.25 * (x[0] + r[0]) - 0.125 * before[1];
    after[1] = 0.75 * before[1] + 0.25 * (x[1] + r[1]);
    h = tanh(x[2] + r[2]) - after[0] + 0.5 * after[1];
  }
};
"""


def cell(name: str) -> type[CustomLayer]:
    if name == "GruD":
        return fused_rnn.load_cell(EXAMPLES / "gru_d.h")
    if name == "MoreGates":
        return custom.load_cell_text(MORE_GATES, name, "more_gates.h")
    return cell_of_tests(name)


def add_kernels(layer: CustomLayer, dtype: torch.dtype) -> None:
    cuda_ops.add_custom_kernels(layer._step, layer._custom.value, dtype)


@pytest.fixture(autouse=True)
def _no_kernels_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody compiles them: the CUDA operators are in their place."""
    monkeypatch.setattr(backend, "why_no_kernels", lambda number, dtype, device: None)


def expected_of(layer: CustomLayer, *arguments: Any, **steps: Any) -> list[torch.Tensor]:
    with fused_rnn.use_backend("reference"):
        return run(layer, *arguments, **steps)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("hidden_size, batch", [(1, 1), (8, 3), (11, 2)])
def test_kernels_are_the_formulas(name: str, hidden_size: int, batch: int) -> None:
    torch.manual_seed(1)
    layer = cell(name)(4, hidden_size, num_layers=2, bidirectional=True, dtype=F64)
    add_kernels(layer, F64)
    x, hx = torch.randn(5, batch, 4, dtype=F64), states_of(layer, batch)
    reset, reset_state = torch.rand(5, batch) < 0.3, states_of(layer, batch, seed=8)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (None, {}),
        (hx, {"lengths": torch.arange(batch) % 6}),
        (hx, {"mask": torch.rand(5, batch) < 0.7}),
        (hx, {"reset": reset, "reset_state": reset_state, "lengths": torch.full((batch,), 4)}),
    ]
    for states, steps in calls:
        expected = expected_of(layer, x, states, **steps)
        assert_close(run(layer, x, states, **steps), expected)
        layer.recompute = True
        assert_close(run(layer, x, states, **steps), expected)
        layer.recompute = False
        with torch.no_grad():
            output, final = layer(x, states, **steps)
        assert_close(
            [output, *(final if isinstance(final, tuple) else [final])], expected[: 2 + layer._custom.num_states]
        )


@pytest.mark.parametrize("name", ["GruD", "SLSTM"])
def test_packed_batches(name: str) -> None:
    torch.manual_seed(2)
    layer = cell(name)(3, 5, bidirectional=True, dtype=F64)
    add_kernels(layer, F64)
    x, hx = torch.randn(6, 3, 3, dtype=F64), states_of(layer, 3)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 6, 1]), enforce_sorted=False)
    with fused_rnn.use_backend("reference"):
        expected, states = layer(packed, hx)
    found, found_states = layer(packed, hx)
    assert_close([found.data, *found_states], [expected.data, *states])


@pytest.mark.parametrize("name", ["GruD", "SLSTM", "Apart"])
def test_options_of_the_loops(name: str) -> None:
    torch.manual_seed(3)
    options: dict[str, Any] = {"zoneout": 0.3, "recurrent_dropout": 0.2, "num_heads": 2, "bptt_steps": 3}
    layer = cell(name)(3, 8, num_layers=2, dtype=F64, recurrent_grad_clip=0.05, **options)
    add_kernels(layer, F64)
    x, hx = torch.randn(5, 3, 3, dtype=F64), states_of(layer, 3)
    for steps in ({}, {"mask": torch.rand(5, 3) < 0.7, "reset": torch.rand(5, 3) < 0.3}):
        torch.manual_seed(4)
        found = run(layer, x, hx, **steps)
        torch.manual_seed(4)
        assert_close(found, expected_of(layer, x, hx, **steps))


@pytest.mark.parametrize("name", ["GruD", "SLSTM"])
def test_the_states_of_every_step(name: str) -> None:
    torch.manual_seed(5)
    layer = cell(name)(3, 8, num_layers=2, dtype=F64)
    add_kernels(layer, F64)
    x, hx = torch.randn(4, 3, 3, dtype=F64, requires_grad=True), states_of(layer, 3)

    def results() -> list[torch.Tensor]:
        _, _, states = layer(x, hx, return_states=True)
        weighted = [(s * torch.arange(s.numel(), dtype=F64).view_as(s).cos()).sum() for s in states]
        return [*states, *torch.autograd.grad(torch.stack(weighted).sum(), [x, *layer.parameters()])]

    found = results()
    with fused_rnn.use_backend("reference"):
        expected = results()
    assert_close(found, expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_projections_of_some_steps_at_a_time(steps: int) -> None:
    """In training, too, where fewer values are saved than there are gates."""
    torch.manual_seed(6)
    layer = cell("MoreGates")(3, 8, bidirectional=True, dtype=F64)
    assert layer._custom.num_saved < layer._custom.num_gates
    add_kernels(layer, F64)
    _allow("none", most_steps=steps)
    x, hx = torch.randn(5, 3, 3, dtype=F64), states_of(layer, 3)
    assert_close(run(layer, x, hx), expected_of(layer, x, hx))


TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["GruD", "SLSTM"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    layer = cell(name)(3, 8).to(dtype)
    add_kernels(layer, dtype)
    x, hx = torch.randn(4, 3, 3).to(dtype), states_of(layer, 3)
    found = run(layer, x, hx)
    assert all(t.dtype == dtype for t in found)
    assert_close(found, expected_of(layer.double(), x.double(), states_of(layer, 3)), TOLERANCES[dtype])


def test_second_derivatives_go_through_the_formulas() -> None:
    torch.manual_seed(8)
    layer = cell("GruD")(2, 3, dtype=F64)
    add_kernels(layer, F64)
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x, atol=1e-4)


def test_a_call_that_finds_no_kernels_says_so() -> None:
    layer = custom.load_cell_text(MORE_GATES.replace("0.125", "0.0625"), "MoreGates", "other.h")(3, 8, dtype=F64)
    with pytest.raises(RuntimeError, match="kind: expected 0 to 3 or that of a loaded cell"):
        layer(torch.randn(4, 2, 3, dtype=F64))
    layer = cell("Apart")(3, 8, dtype=F64)
    add_kernels(layer, F64)
    with pytest.raises(RuntimeError, match="this custom cell has no CUDA kernels here"):
        layer.half()(torch.randn(4, 2, 3).half())


# ---- what nvcc makes of it ------------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a", "100", "120"])
@pytest.mark.parametrize("name, dtype", [("GruD", torch.bfloat16), ("SLSTM", torch.float32)], ids=str)
def test_nvcc_compiles_it(name: str, dtype: torch.dtype, arch: str) -> None:
    layer = cell(name)
    source = cuda_ops.custom_source(layer._step, layer._custom.value, dtype)
    assert cuda_host.translate(source, arch, to="cubin").stat().st_size > 0


INTERPRETED = """
import os, sys, torch
sys.path.insert(0, "tests")
import test_cuda_custom as tests
from fused_rnn import backend
from support import cuda_host, cuda_ops

dtype = getattr(torch, sys.argv[2])
cls = tests.cell(sys.argv[1])
cuda_ops.add_custom_kernels(cls._step, cls._custom.value, dtype, interpreted=True)
backend.why_no_kernels = lambda number, dtype, device: None
library = torch.library.Library("fused_rnn", "IMPL")
for name in ("rnn_forward", "rnn_backward"):
    library.impl(name, getattr(torch.ops.fused_rnn_host, name).default, "CPU", allow_override=True)
torch.manual_seed(1)
layer = cls(3, 6, bidirectional=True).to(dtype)
x, hx = torch.randn(3, 2, 3).to(dtype), tests.states_of(layer, 2)
plain = tests.run(layer, x, hx)
with_options = tests.run(layer, x, hx, reset=torch.tensor([[0, 1], [1, 0], [0, 0]]).bool())
layer.double()
given = x.double(), tests.states_of(layer, 2)
tolerance = 1e-11 if dtype == torch.float64 else tests.TOLERANCES[dtype]
tests.assert_close(plain, tests.expected_of(layer, *given), tolerance)
reset = torch.tensor([[0, 1], [1, 0], [0, 0]]).bool()
tests.assert_close(with_options, tests.expected_of(layer, *given, reset=reset), tolerance)
print("equal")
"""


@needs_nvcc
@pytest.mark.parametrize(
    "name, dtype",
    [("GruD", F64), ("GruD", torch.bfloat16), ("SLSTM", F64), ("SLSTM", torch.float32), ("AllFunctions", F64)],
    ids=str,
)
def test_what_nvcc_makes_of_it_is_the_formulas(name: str, dtype: torch.dtype) -> None:
    layer = cell(name)
    ptx = cuda_host.translate(cuda_ops.custom_source(layer._step, layer._custom.value, dtype))
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, name, str(dtype).removeprefix("torch.")]
    environment = os.environ | {"FRNN_PTX": str(ptx)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cuda_host.ROOT, check=False)
    assert result.stdout == "equal\n", result.stderr


@needs_nvcc
def test_a_library_of_nvcc_is_loaded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path))
    # PyTorch for CUDA has loaded this.
    ctypes.CDLL(str(compiling._cuda_runtime(compiling.nvcc())), mode=ctypes.RTLD_GLOBAL)
    layer = cell("GruD")
    step, number = layer._step, layer._custom.value
    library = compiling.compile_cuda_kernels(step, number, 90, torch.float32)
    compiling.add_cuda_kernels(library)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # no nvcc is asked for
    assert compiling.compile_cuda_kernels(step, number, 90, torch.float32) == library
    with pytest.raises(RuntimeError, match="expected nvcc in CUDA_HOME"):
        compiling.compile_cuda_kernels(step, number, 80, torch.float32)


# ---- registration, and what is said without it ----------------------------------------------------------------------

OF_ANOTHER_BUILD = """
#include "cuda/custom.h"
using namespace fused_rnn;
extern "C" FRNN_EXPORT const cuda::CustomKernels* fused_rnn_custom_cuda_kernels() {
  static const cuda::CustomKernels kernels = {cuda::sizes_of_steps() + DIFFERENCE, CellKind(NUMBER), DType::float32, 90,
                                              GATES, 1, 1, 5, {}, {}, nullptr, nullptr};
  return &kernels;
}
"""


@pytest.mark.parametrize("difference, gates", [(1, 4), (0, 3)])
def test_a_library_of_something_else_is_refused(tmp_path: Path, difference: int, gates: int) -> None:
    assert backend.ops is not None
    number = cell("GruD")._custom.value
    text = OF_ANOTHER_BUILD.replace("DIFFERENCE", str(difference)).replace("NUMBER", str(number))
    (tmp_path / "other.cpp").write_text(text.replace("GATES", str(gates)))
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{cuda_host.ROOT / 'csrc'}"]
    subprocess.run([*command, str(tmp_path / "other.cpp"), "-o", str(tmp_path / "other.so")], check=True)
    with pytest.raises(RuntimeError, match="compiled for this build"):
        backend.ops.add_custom_cuda_kernels(str(tmp_path / "other.so"))
    (tmp_path / "nothing.so").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="path: expected a library of a custom cell"):
        backend.ops.add_custom_cuda_kernels(str(tmp_path / "nothing.so"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(backend.ops, "_capabilities", {})
    monkeypatch.setattr(custom, "_problems", {})
    monkeypatch.setattr(custom, "_added", set())
    yield torch.device("cuda", 0)


def test_without_nvcc_the_formulas_run_and_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path / "cache"))
    number = cell("GruD")._custom.value
    with caplog.at_level(logging.WARNING, "fused_rnn"):
        said = [custom._why_no_kernels(number, torch.float32, gpu) for _ in range(2)]
    expected = "the CUDA kernels of GruD could not be compiled: load_cell: expected nvcc in CUDA_HOME, on PATH or in"
    assert said[0] == said[1] and said[0] is not None and said[0].startswith(expected)
    assert len(caplog.records) == 1  # a warning for each dtype
    # So are calls and explain(), which ask for a reason with their input.
    monkeypatch.setattr(backend, "why_no_kernels", custom._why_no_kernels)
    monkeypatch.setattr(backend.ops, "_HAS_CUDA", True)
    input: Any = SimpleNamespace(device=gpu, dtype=torch.float32, layout=torch.strided)
    kind = cell("GruD")._custom
    assert backend.why_reference(input, custom=kind) == said[0]
    with fused_rnn.use_backend("fused"), pytest.raises(RuntimeError, match="the CUDA kernels of GruD"):
        backend.why_reference(input, custom=kind)


def test_an_nvcc_of_another_cuda_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvcc"
    program.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RuntimeError, match="expected nvcc of CUDA 13.0, which PyTorch has, got 11"):
        compiling.nvcc()


def test_kernels_are_compiled_for_a_device_once(monkeypatch: pytest.MonkeyPatch, gpu: torch.device) -> None:
    asked: list[tuple[int, int, torch.dtype]] = []

    def compile_cuda_kernels(step: expressions.Step, number: int, arch: int, dtype: torch.dtype) -> Path:
        asked.append((number, arch, dtype))
        return Path("kept.so")

    monkeypatch.setattr(compiling, "compile_cuda_kernels", compile_cuda_kernels)
    monkeypatch.setattr(compiling, "add_cuda_kernels", lambda library: None)
    number = cell("GruD")._custom.value
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        assert custom._why_no_kernels(number, dtype, gpu) is None
    assert asked == [(number, 90, torch.float32), (number, 90, torch.bfloat16)]


def test_the_planner_has_no_persistent_kernel_for_a_custom_cell() -> None:
    from fused_rnn import _C

    sizes = {"T": 64, "B": 16, "input_size": 256, "hidden_size": 256, "state_size": 256, "directions": 1, "dtype": 0}
    kind = cell("GruD")._custom.value
    for layers in (1, 2):
        found = _C.cuda_plan_for(kind, **sizes, backward=False, device=fields_of("H200"), tf32=True, layers=layers)
        assert found["variant"] == "none" and found["reason"] == "no persistent kernel for a custom cell"
