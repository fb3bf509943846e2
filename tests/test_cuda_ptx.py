"""The CUDA kernels as nvcc translates them, executed on the CPU by an interpreter of PTX (tests/cuda_host/ptx.h).

Host execution compiles the kernels with g++, with a twin in the place of each function of csrc/cuda/device.h. Here the
inline PTX of device.h takes part, and nvcc's optimiser.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import cuda_host
from test_cuda_persistent import DTYPES, EXCHANGES, KINDS, PASSES, SHAPES
from test_cuda_step import WITH_OPTIONS, Problem, check_result, with_options

from fused_rnn.settings import CellKind

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(not cuda_host.find_nvcc(), reason="nvcc is not there"),
]

FUNCTIONS = cuda_host.SOURCES / "device_functions.cu"
KERNELS = cuda_host.KERNELS


@pytest.mark.parametrize("arch", ["80", "90a", "100", "120"])
def test_every_device_function_assembles(arch: str) -> None:
    assert cuda_host.translate(FUNCTIONS, arch, to="cubin").exists()


def test_every_device_function_does_what_its_twin_does() -> None:
    result = cuda_host.run(cuda_host.build("test_ptx"), ptx=cuda_host.translate(FUNCTIONS))
    assert result.returncode == 0, result.stdout + result.stderr


MISTAKES = {
    "halves of a packed pair": ('"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    "rows of a fragment": ("f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5", "f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%5,%4"),
    "k of a fragment": (
        "tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}",
        "tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%9,%8}",
    ),
    "tiles that are not transposed": ("x4.trans.shared", "x4.shared"),
    "a copy that is not awaited": ("cp.async.wait_group %0;", "cp.async.wait_group 2;"),
    "another rank": ("mapa.shared::cluster.u32 %0, %1, %2;", "mapa.shared::cluster.u32 %0, %1, 0;"),
    "words of a remote store": ("bytes.v4.b32 [%0], {%1,%2,", "bytes.v4.b32 [%0], {%2,%1,"),
    "the parity of another phase": ("cta.b64 p, [%1], %2;", "cta.b64 p, [%1], 1;"),
    "rounding": ("cvt.rna.tf32.f32 %0, %1;", "mov.b32 %0, %1;"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_device_function_is_found(mistake: str) -> None:
    right, wrong = MISTAKES[mistake]
    # A folder that stays, so that nvcc translates it once.
    csrc = cuda_host.BUILD / "mistakes" / mistake.replace(" ", "_") / "csrc"
    (csrc / "cuda").mkdir(parents=True, exist_ok=True)
    for name in ("cpu", "problem.h"):
        if not (csrc / name).is_symlink():
            (csrc / name).symlink_to(cuda_host.ROOT / "csrc" / name)
    text = (KERNELS / "device.h").read_text()
    assert right in text
    (csrc / "cuda" / "device.h").write_text(text.replace(right, wrong))
    result = cuda_host.run(cuda_host.build("test_ptx"), ptx=cuda_host.translate(FUNCTIONS, csrc=csrc))
    assert result.returncode == 1, result.stdout + result.stderr


def _shape_of(exchange: str) -> str:
    """Several column tiles, both directions, a mask or falling lengths."""
    return {
        "none": SHAPES["a mask in one block"],
        "counted": SHAPES["falling lengths, several column tiles"],
        "barriers": SHAPES["a mask, several column tiles, barriers"],
        "memory": SHAPES["falling lengths through memory"],
    }[exchange]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", PASSES)
def test_persistent_kernels_agree_with_float64(direction: str, dtype: str) -> None:
    ptx = cuda_host.translate(KERNELS / f"persistent_{direction}_{dtype}.cu")
    program = cuda_host.build(f"ptx_{direction}")
    for kind in KINDS:
        for seed, exchange in enumerate(EXCHANGES):
            case = f"{_shape_of(exchange)} kind={kind} dtype={dtype} seed={seed}"
            result = cuda_host.run(program, *case.split(), ptx=ptx)
            assert result.returncode == 0, f"{case}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


@pytest.mark.parametrize("direction", PASSES)
def test_options_of_persistent_kernels_agree_with_float64(direction: str) -> None:
    ptx = cuda_host.translate(KERNELS / f"persistent_{direction}_bfloat16.cu")
    names = (
        "all options that draw",
        "resets through memory, a mask",
        "options with falling lengths",
        "zoneout on average",
        "clips of what is drawn through memory, a mask",
        "gradients that end, and all other options",
    )
    for name, kind in zip(names, ("lstm", "gru", "lstm", "rnn_tanh", "lstm", "lstm"), strict=True):
        case = f"{SHAPES[name]} kind={kind} dtype=bfloat16"
        result = cuda_host.run(cuda_host.build(f"ptx_{direction}"), *case.split(), ptx=ptx)
        assert result.returncode == 0, f"{case}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


# float16 is what bfloat16 is but for the functions of device.h, which are compared one by one above.
@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
@pytest.mark.parametrize("direction", PASSES)
def test_persistent_kernels_of_several_layers_agree_with_float64(direction: str, dtype: str) -> None:
    ptx = cuda_host.translate(KERNELS / f"persistent_wavefront_{dtype}.cu")
    for kind in ("lstm", "gru"):
        for name in ("two layers, falling lengths, several column tiles", "three layers, a mask, nothing saved"):
            case = f"{SHAPES[name]} kind={kind} dtype={dtype}"
            result = cuda_host.run(cuda_host.build(f"ptx_{direction}"), *case.split(), ptx=ptx)
            assert result.returncode == 0, f"{case}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


@pytest.mark.parametrize("direction", PASSES)
def test_persistent_kernels_for_ampere_agree_with_float64(direction: str) -> None:
    ptx = cuda_host.translate(KERNELS / f"persistent_{direction}_bfloat16.cu", "80")
    for exchange in ("none", "memory"):
        # Where warps cannot hand registers to others, a block has one kind of them.
        case = f"{_shape_of(exchange)} kind=gru threads=256"
        result = cuda_host.run(cuda_host.build(f"ptx_{direction}"), *case.split(), ptx=ptx)
        assert result.returncode == 0, f"{case}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", CellKind, ids=lambda kind: kind.name)
def test_step_kernels_match_the_reference(kind: CellKind, dtype: torch.dtype, tmp_path: Path) -> None:
    problem = Problem(kind, dtype, H=16, vectors=dtype != torch.float32, packed=True, lengths=(4, 3, 3, 2, 1), seed=1)
    problem.write(tmp_path / "in")
    program, ptx = cuda_host.build("ptx_step"), cuda_host.translate(KERNELS / "step.cu")
    check_result(problem, tmp_path, cuda_host.run(program, tmp_path / "in", tmp_path / "out", ptx=ptx))


# Sixteen bits are what float32 is, but for the functions that store them.
@pytest.mark.parametrize(
    ("index", "dtype"),
    [(i, torch.float64 if i % 2 else torch.float32) for i in range(len(WITH_OPTIONS))]
    + [(3, torch.bfloat16), (8, torch.bfloat16), (12, torch.float16), (19, torch.bfloat16)],
    ids=lambda value: str(WITH_OPTIONS[value] if isinstance(value, int) else value),
)
def test_step_kernels_with_options_match_the_reference(index: int, dtype: torch.dtype, tmp_path: Path) -> None:
    problem = with_options(dtype, WITH_OPTIONS[index], 20 + index)
    problem.write(tmp_path / "in")
    program, ptx = cuda_host.build("ptx_step"), cuda_host.translate(KERNELS / "step.cu")
    check_result(problem, tmp_path, cuda_host.run(program, tmp_path / "in", tmp_path / "out", ptx=ptx))
