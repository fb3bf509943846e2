"""Builds csrc/ops_cuda.cpp for the CPU: the CUDA operators on CPU tensors, their kernels on the engine of cuda_host."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

from fused_rnn import compiling, expressions

from . import cuda_host
from .compiled import Step

CSRC = cuda_host.ROOT / "csrc"


@functools.cache
def load() -> Path:
    """Makes torch.ops.fused_rnn_host.* known; compiled when a source is newer. Returns their library."""
    import fused_rnn.ops  # noqa: F401  (the schemas are copied from its operators)

    folder = cuda_host.BUILD / f"ops-{sysconfig.get_config_var('SOABI')}-torch-{torch.__version__}"
    with_torch = ["-O1", "-std=c++20"]
    with_torch += [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]

    def step(source: Path, name: str, flags: list[str]) -> Step:
        return cuda_host.compile_step(folder / f"{name}.o", [*flags, str(source)])

    objects = [
        step(cuda_host.SOURCES / "ops_on_host.cpp", "ops_on_host", with_torch),
        step(CSRC / "ops_cuda.cpp", "ops_cuda", with_torch),
        *cuda_host.persistent_kernels(),
        *(step(CSRC / name / "plan.cpp", f"{name}_plan", ["-O1"]) for name in ("cuda", "cpu")),
        step(CSRC / "cuda" / "custom.cpp", "cuda_custom", ["-O1"]),
        cuda_host.engine(),
    ]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu"]
    library = cuda_host.link(folder / "ops.so", ["-shared", *libraries], objects)
    torch.ops.load_library(str(library))
    return library


ARCH = 90  # of the GPU that ops_on_host.cpp describes


def custom_source(step: expressions.Step, number: int, dtype: torch.dtype, arch: int = ARCH) -> Path:
    """A file with the CUDA source of a custom cell's kernels, named by its content: see compiling.cuda_source."""
    text = compiling.cuda_source(step, number, arch, dtype)
    file = cuda_host.BUILD / "custom" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cu"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as other:
            other.write(text)
        Path(other.name).replace(file)
    return file


@functools.cache
def add_custom_kernels(step: expressions.Step, number: int, dtype: torch.dtype, *, interpreted: bool = False) -> None:
    """A custom cell's CUDA kernels for these operators: as g++ compiles them, or (``interpreted``) what nvcc makes of
    them, the file of the environment variable ``FRNN_PTX`` when they first run. The first of a cell and dtype stays."""
    operators, source = load(), custom_source(step, number, dtype)
    variant = "interpreted" if interpreted else "plain"
    flags = ["-O1", *(["-DFRNN_INTERPRETED"] if interpreted else [])]
    folder = source.parent / variant
    objects = [cuda_host.compile_step(folder / f"{source.stem}.o", [*flags, "-x", "c++", str(source)])]
    if interpreted:
        objects.append(cuda_host.compile_step(folder / "ptx.o", ["-O1", str(cuda_host.SOURCES / "ptx.cpp")]))
    # The engine is that of the operators.
    library = cuda_host.link(folder / f"{source.stem}.so", ["-shared", str(operators)], objects)
    torch.ops.fused_rnn_host.add_custom_kernels(str(library))
